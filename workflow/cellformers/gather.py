"""Embedding shards and the table of cells, joined into one AnnData file that scanpy opens as it is.

cellformers gather embeddings/small/*.parquet --cells cells.parquet --name small -o embeddings/small.h5ad
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellformers.errors import UserError
from cellformers.io.files import atomic_path, read_metadata, read_table, stamp
from cellformers.revisions import REVISIONS


def read_vectors(path: str | Path) -> tuple[pa.ChunkedArray, np.ndarray]:
    """Names and vectors of an embedding shard: string[n], float32[n, dim].

    Raises
    ------
    UserError
        If the file is not an embedding shard.
    """
    table = read_table(path, ["cell_id", "embedding"])
    kind = table.schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind):
        raise UserError(
            "its embeddings are not fixed-size lists", path=path, fix="make it with `cellformers embed`"
        )
    flat = pc.list_flatten(table["embedding"]).to_numpy().astype(np.float32, copy=False)
    return table["cell_id"], flat.reshape(-1, kind.list_size)


def in_order(cell_ids: np.ndarray, shards: Sequence[str | Path]) -> np.ndarray:
    """Vectors of these cells from embedding shards, float32[n_cells, dim]; NaN for cells that no shard holds."""
    names, vectors = zip(*(read_vectors(shard) for shard in shards), strict=True)
    row_of = {cell: row for row, cell in enumerate(cell_ids)}
    joined = np.concatenate(vectors)
    result = np.full((len(cell_ids), joined.shape[1]), np.nan, np.float32)
    result[[row_of[cell] for ids in names for cell in ids.to_pylist()]] = joined
    return result


def gather_cells(shards: Sequence[str | Path], cells: str | Path, *, name: str, output: str | Path) -> int:
    """Write the embedding of a dataset: obs = the cells' metadata, obsm["X_{name}"] float32[n, dim].

    The same bytes for any number of shards. Returns the number of cells.

    Raises
    ------
    UserError
        If shards differ in model, dataset or parameters, or name cells that the table does not have.
    """
    import anndata

    if not shards:
        raise UserError("no embedding shards to gather", fix="name at least one")
    metadata = read_metadata(shards[0])
    names, vectors = [], []
    for shard in shards:
        if read_metadata(shard) != metadata:
            raise UserError(
                f"made from another dataset or model than {shards[0]}",
                path=shard,
                fix="gather shards of one embedding",
            )
        ids, block = read_vectors(shard)
        names.append(ids)
        vectors.append(block)
    embedded = pa.chunked_array([chunk for ids in names for chunk in ids.chunks], pa.string())
    table = read_table(cells)
    rows = pc.index_in(embedded, value_set=table["cell_id"])
    if rows.null_count:
        stranger = embedded.filter(pc.is_null(rows))[0].as_py()
        raise UserError(f"has no cell {stranger!r}, which {shards[0]} embeds", path=cells)
    obs = table.take(rows).to_pandas().set_index("cell_id")
    obs.index.name = None
    for column in obs.select_dtypes(object).columns:
        obs[column] = obs[column].astype("category")
    adata = anndata.AnnData(obs=obs, obsm={f"X_{name}": np.concatenate(vectors)})
    made = stamp(
        "gather", REVISIONS["gather"], parameters=metadata.get("parameters", {}), inputs=metadata["inputs"]
    )
    adata.uns["cellformers"] = json.dumps(made)
    with atomic_path(output) as temporary:
        adata.write_h5ad(temporary, compression="gzip")
    return len(obs)
