"""Doublet scores: scrublet on every batch of a dataset, whatever its shards.

    cellformers doublets counts/*.h5ad --metadata metadata.parquet --batch donor -o doublets.parquet

Method: Wolock et al., Cell Systems 8:281, 2019, as in `scanpy.pp.scrublet`. `qc` then drops the predicted doublets.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cellformers.counts import canonical_blocks, shard_digest
from cellformers.errors import UserError, did_you_mean
from cellformers.io.arrow import as_numbers
from cellformers.io.files import read_metadata, read_table, stamp, write_table
from cellformers.io.source import Array, open_counts
from cellformers.progress import progress
from cellformers.revisions import REVISIONS

SMALLEST_BATCH = 30  # with fewer cells there are no neighbourhoods to compare
CELLS_AT_ONCE = 20_000  # cells of several batches that are held together
COMPONENTS = 30  # scrublet's default


def score_doublets(
    shards: Sequence[str | Path],
    metadata: str | Path,
    *,
    output: str | Path,
    batch: str | None = None,
    seed: int = 0,
    quiet: bool = True,
) -> list[str]:
    """Score every cell as a doublet with scrublet, batch by batch over the dataset, whatever the shards.

    Writes cell_id, doublet_score (float64) and predicted_doublet (bool); both are null in batches of under 30 cells
    and in cells in which under three genes are detected. Memory holds the counts of 20,000 cells or of the largest
    batch, and what scrublet makes of a batch.

    Parameters
    ----------
    batch
        The metadata column whose values are scored apart (doublets form within a library); None: all cells at once.

    Returns
    -------
    Notes on batches in which no cell was scored or called.

    Raises
    ------
    UserError
        If there is no such column or a shard is of another dataset.
    """
    digest = read_metadata(metadata).get("inputs", {}).get("dataset", "")
    for shard in shards:
        if shard_digest(shard) != digest:
            raise UserError("is of another dataset than the metadata", path=shard, fix="make it again")
    table = read_table(metadata)
    if "cell_id" not in table.column_names:
        raise UserError(
            "not the metadata of a dataset", path=metadata, fix="give metadata.parquet by `ingest`"
        )
    if batch is not None and batch not in table.column_names:
        raise UserError(
            f"has no column {batch!r} for qc's batch",
            path=metadata,
            fix=did_you_mean(batch, table.column_names),
        )
    members = (
        {"all": np.arange(table.num_rows)}
        if batch is None
        else _members(table.column(batch), batch, metadata)
    )
    scores = np.full(table.num_rows, np.nan)
    doublet = np.zeros(table.num_rows, bool)
    notes = []
    with progress("doublets", table.num_rows, quiet=quiet) as advance:
        for group in _groups(members):
            held = np.sort(np.concatenate(list(group.values())))
            X = _load_rows(shards, held)
            for name, rows in group.items():
                found = _scrublet(X[np.searchsorted(held, rows)], seed)
                if isinstance(found, str):
                    notes.append(f"batch {name!r}: no doublet scores, {found}")
                else:
                    scores[rows], doublet[rows], called = found
                    if not called:
                        notes.append(
                            f"batch {name!r}: no threshold stands out in its scores, no cell is called"
                        )
                advance(len(rows))
    unknown = np.isnan(scores)
    result = pa.table(
        {
            "cell_id": table.column("cell_id"),
            "doublet_score": pa.array(scores, mask=unknown),
            "predicted_doublet": pa.array(doublet, mask=unknown),
        }
    )
    made = stamp(
        "doublets",
        REVISIONS["doublets"],
        parameters={"batch": batch, "seed": seed},
        inputs={"dataset": digest},
    )
    write_table(result, output, made)
    return notes


def _members(column: pa.ChunkedArray, name: str, path: str | Path) -> dict[str, Array]:
    """The rows of each value of a column, ascending, by the value as text; values in order of first appearance."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        column = column.cast(pa.string())
    try:
        encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    except pa.ArrowNotImplementedError:
        raise UserError(
            f"column {name!r} holds {column.type}, no batches", path=path, fix="name a column of labels"
        ) from None
    codes = as_numbers(encoded.indices)
    order = np.argsort(codes, kind="stable")
    ends = np.cumsum(np.bincount(codes, minlength=len(encoded.dictionary)))
    parts = np.split(order, ends[:-1]) if len(ends) else []
    return dict(zip(map(str, encoded.dictionary.to_pylist()), parts, strict=True))


def _groups(members: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
    """Batches that are held together, so that the shards are read once for several small ones."""
    group: dict[str, Array] = {}
    for name, rows in members.items():
        if group and sum(map(len, group.values())) + len(rows) > CELLS_AT_ONCE:
            yield group
            group = {}
        group[name] = rows
    if group:
        yield group


def _load_rows(shards: Sequence[str | Path], rows: Array) -> Any:
    """The counts of some of the dataset's cells (ascending row numbers), scipy CSR of float32."""
    import scipy.sparse as sp

    parts = []
    offset = 0
    for shard in shards:
        with open_counts(shard) as source:
            first, last = np.searchsorted(rows, (offset, offset + source.n_cells))
            for block in canonical_blocks(source) if first < last else ():
                low = offset + block.start
                first, last = np.searchsorted(rows, (low, low + block.n_cells))
                if first < last:
                    shape = (block.n_cells, source.n_features)
                    X = sp.csr_matrix((block.data, block.indices, block.indptr), shape=shape)
                    parts.append(X[rows[first:last] - low].astype(np.float32))
            offset += source.n_cells
    if len(rows) and rows[-1] >= offset:
        raise UserError(
            f"the shards have {offset:,} cells, the metadata more",
            path=shards[-1],
            fix="give all shards in order",
        )
    return sp.vstack(parts, format="csr")


def _scrublet(X: Any, seed: int) -> tuple[Array, Array, bool] | str:
    """One batch's scores (NaN where unknown), calls, and whether there was a threshold; or why there are none."""
    if X.shape[0] < SMALLEST_BATCH:
        return f"it has only {X.shape[0]} cells"
    # What scrublet itself leaves out and selects; known here, so that it isn't asked for more components than genes.
    genes = np.flatnonzero(X.getnnz(axis=0) >= 3)
    kept = np.flatnonzero(X[:, genes].getnnz(axis=1) >= 3)
    if len(kept) < SMALLEST_BATCH:
        return f"it has only {len(kept)} cells with genes that three cells share"
    import anndata
    import scanpy as sc

    adata = anndata.AnnData(X[kept][:, genes])
    logged = adata.copy()
    sc.pp.normalize_total(logged)
    sc.pp.log1p(logged)
    sc.pp.highly_variable_genes(logged)
    n_variable = int(logged.var["highly_variable"].sum())
    if n_variable < SMALLEST_BATCH:
        return f"it has only {n_variable} highly variable genes"
    n_prin_comps = min(COMPONENTS, len(kept) - 1, n_variable - 1)
    sc.pp.scrublet(adata, random_state=seed, n_prin_comps=n_prin_comps, verbose=False)
    scores = np.full(X.shape[0], np.nan)
    doublet = np.zeros(X.shape[0], bool)
    scores[kept] = adata.obs["doublet_score"].to_numpy()
    doublet[kept] = adata.obs["predicted_doublet"].to_numpy()
    return scores, doublet, "threshold" in adata.uns["scrublet"]
