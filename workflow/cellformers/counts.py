"""Counts shards: the canonical form in which every later step reads a dataset.

`ingest` streams one or several raw files into contiguous shards, a table of cell metadata and a table of features:

    cellformers ingest my.h5ad --shards 2 -o results/mine

A shard is an h5ad whose X is a CSR of raw integer counts in canonical form (indices ascending within a row, no
duplicates, no explicit zeros). A dataset is known by the digest of its cells, features and their totals, which
does not depend on the format it came in, on the order of entries within a cell or on the number of shards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cellformers.errors import UserError
from cellformers.genes import check_species
from cellformers.io.files import atomic_path, digest_arrays, stamp, write_table
from cellformers.io.labels import LabelTable, join_labels
from cellformers.io.shards import ShardWriter, read_shard_stamp, write_shard_stamp
from cellformers.io.source import Array, Block, CountSource, ReadOptions, open_counts
from cellformers.progress import progress
from cellformers.revisions import REVISIONS

# Names of columns that this package gives; a deposit's own column of such a name is kept as `input_<name>`.
RESERVED = (
    "cell_id",
    "n_counts",
    "n_genes",
    "mito_fraction",
    "doublet_score",
    "predicted_doublet",
    "qc_pass",
)
BLOCK_BYTES = 32 << 20
Columns = dict[str, pa.Array | pa.ChunkedArray]


@dataclass(frozen=True)
class Sample:
    """One raw file of a dataset; `columns` are written for each of its cells."""

    path: Path
    name: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What is known of the files of a deposit beyond their formats.

    Parameters
    ----------
    describe
        (names of the cells within their files, string[n]; their samples, string[n], or None; the metadata columns
        there are) -> further columns of n values, and notes.
    check
        (total counts of the cells, int64[n]; the metadata columns) -> notes; UserError where they can't be right.
    own_columns
        Whether the files' own cell metadata are taken; False where `describe` brings them from elsewhere.
    origin
        Names the deposit and the part; goes into the metadata of what is written.
    """

    describe: Callable[[pa.Array, pa.Array | None, Columns], tuple[Columns, list[str]]]
    check: Callable[[Array, Columns], list[str]] | None = None
    own_columns: bool = True
    origin: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ingested:
    """What `ingest` found: sizes, the dataset's digest, and notes on what was decided on the way."""

    n_cells: int
    n_features: int
    digest: str
    notes: tuple[str, ...]


def shard_bounds(n_cells: int, n_shards: int, *, path: str | Path | None = None) -> list[tuple[int, int]]:
    """Contiguous row ranges [low, high) that cover `n_cells` cells; sizes differ by at most one, larger ones first.

    `path` is the file to name in the error.

    Raises
    ------
    UserError
        If there are fewer cells than shards.
    """
    if not 1 <= n_shards <= n_cells:
        raise UserError(
            f"{n_cells} cells can't be split into {n_shards} shards",
            path=path,
            fix=f"set shards: 1 to {n_cells}",
        )
    size, larger = divmod(n_cells, n_shards)
    edges = [i * size + min(i, larger) for i in range(n_shards + 1)]
    return list(pairwise(edges))


def canonical(block: Block, n_features: int) -> Block:
    """The same counts with indices ascending within a row, duplicates summed (in int64) and no explicit zeros."""
    import scipy.sparse as sp

    shape = (len(block.indptr) - 1, n_features)
    X = sp.csr_matrix((block.data, block.indices, block.indptr), shape=shape)
    if not X.has_canonical_format:
        # A copy: scipy sorts in place. int64, because sums of uint16 would wrap.
        X = sp.csr_matrix(
            (block.data.astype(np.int64), block.indices.copy(), block.indptr.copy()), shape=shape
        )
        X.sum_duplicates()
    if not X.data.all():
        X = X.copy()
        X.eliminate_zeros()
    return Block(block.start, X.indptr.astype(np.int64, copy=False), X.indices, X.data)


def canonical_blocks(source: CountSource, *, max_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """All rows of a source, in order, each block in canonical form."""
    for block in source.blocks(max_bytes=max_bytes):
        yield canonical(block, source.n_features)


def row_totals(indptr: Array, values: Array) -> Array:
    """Sum of `values` (nnz) over each row, int64[rows]."""
    totals = np.zeros(len(indptr) - 1, np.int64)
    filled = np.flatnonzero(np.diff(indptr))
    if len(filled):
        # Rows between two filled ones are empty, so each segment ends where its row ends.
        totals[filled] = np.add.reduceat(values, indptr[filled], dtype=np.int64)
    return totals


def feature_sums(block: Block, n_features: int) -> Array:
    """Counts and cells of each feature in a canonical block, int64[2, n_features]."""
    # float64 sums of integers are exact far beyond what a block can hold
    counts = np.bincount(block.indices, weights=block.data, minlength=n_features)
    cells = np.bincount(block.indices, minlength=n_features)
    return np.stack([counts.astype(np.int64), cells])


def dataset_digest(
    cell_ids: pa.Array,
    feature_ids: Array,
    *,
    cell_totals: Array,
    feature_totals: Array,
) -> str:
    """What identifies a dataset: names and totals of its cells and features, all in order."""
    return digest_arrays(cell_ids, feature_ids, cell_totals.astype(np.int64), feature_totals.astype(np.int64))


def shard_digest(path: str | Path) -> str:
    """The digest of the dataset that a counts shard is a part of.

    Raises
    ------
    UserError
        If the file is not a counts shard.
    """
    made = read_shard_stamp(path)
    if made is None:
        raise UserError("not a counts shard", path=path, fix="make one with `cellformers ingest`")
    return str(made["inputs"]["dataset"])


def ingest(
    samples: Sequence[Sample],
    outputs: Sequence[Path],
    *,
    metadata: Path,
    features: Path,
    options: ReadOptions | None = None,
    labels: LabelTable | None = None,
    known: Knowledge | None = None,
    quiet: bool = True,
) -> Ingested:
    """Stream raw files into counts shards; all outputs appear together when everything is read, or none does.

    Parameters
    ----------
    samples
        The raw files in order. A single one keeps its cell names; those of several become `{name}:{cell}`.
    outputs
        The shards (h5ad), in row order; their number decides the split.
    metadata, features
        Tables to write: cell_id and all labels; feature_id, symbol, n_counts, n_cells over the dataset.
    labels
        A table to join on the cell names.
    known
        What is known of a deposit's files; its columns come before those of `labels`.
    quiet
        Show no progress on stderr.

    Raises
    ------
    UserError
        For input that can't be read, isn't human or isn't counts; for sample names that aren't unique; for more
        shards than cells; for labels that match no cell.
    """
    options = options or ReadOptions()
    _check_samples(samples)
    with ExitStack() as stack:
        sources = [stack.enter_context(open_counts(sample.path, options=options)) for sample in samples]
        for source in sources:
            check_species(source.feature_ids, source.feature_symbols, source.path)
        notes = [
            f"{sample.name}: {note}" if len(samples) > 1 else note
            for sample, source in zip(samples, sources, strict=True)
            for note in source.notes
        ]
        barcodes = pa.concat_arrays([source.names for source in sources])
        columns = _metadata_columns(samples, sources, notes, own=known is None or known.own_columns)
        cell_ids = _cell_ids(barcodes, columns.get("sample") if len(samples) > 1 else None)
        bounds = shard_bounds(
            len(cell_ids), len(outputs), path=samples[0].path if len(samples) == 1 else None
        )
        feature_ids, symbols, places = _unite_features(sources)
        if known is not None:
            described, more = known.describe(barcodes, columns.get("sample"), columns)
            notes += more
            _add_columns(columns, described, reserved=_reserved(samples), origin="the deposit", notes=notes)
        if labels is not None:
            joined, said = join_labels(
                labels, cell_ids, barcodes=barcodes, samples=columns["sample"] if len(samples) > 1 else None
            )
            notes.append(said)
            _add_columns(columns, joined, reserved=_reserved(samples), origin="the label table", notes=notes)

        parts = [stack.enter_context(atomic_path(target)) for target in (*outputs, metadata, features)]
        *shards, metadata_part, features_part = parts
        cell_totals = np.zeros(len(cell_ids), np.int64)
        feature_totals = np.zeros((2, len(feature_ids)), np.int64)  # counts, cells
        with (
            ShardWriter(
                shards, bounds, cell_ids=cell_ids, feature_ids=feature_ids, symbols=symbols
            ) as writer,
            progress("ingest", len(cell_ids), quiet=quiet) as advance,
        ):
            for block in _dataset_blocks(sources, places, n_features=len(feature_ids)):
                cell_totals[block.start : block.start + block.n_cells] = row_totals(block.indptr, block.data)
                feature_totals += feature_sums(block, len(feature_ids))
                writer.write(block)
                advance(block.n_cells)
        if known is not None and known.check is not None:
            notes += known.check(cell_totals, columns)
        digest = dataset_digest(
            cell_ids, feature_ids, cell_totals=cell_totals, feature_totals=feature_totals[0]
        )
        parameters = {**({} if known is None else known.origin), **_parameters(options)}
        made = stamp("ingest", REVISIONS["ingest"], parameters=parameters, inputs={"dataset": digest})
        for shard in shards:
            write_shard_stamp(shard, made)
        write_table(_feature_table(feature_ids, symbols, feature_totals), features_part, made)
        write_table(pa.table({"cell_id": cell_ids, **columns}), metadata_part, made)
    return Ingested(len(cell_ids), len(feature_ids), digest, tuple(notes))


def _parameters(options: ReadOptions) -> dict[str, Any]:
    """The reading options that were set; what is left at its default says nothing about the data."""
    default = asdict(ReadOptions())
    return {key: value for key, value in asdict(options).items() if value != default[key]}


def _check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise UserError("no input files", fix="give a path or a samples table")
    if len(samples) == 1:
        return
    seen: set[str] = set()
    for sample in samples:
        if not sample.name:
            raise UserError("has no sample name", path=sample.path, fix="name each sample of the table")
        if sample.name in seen:
            raise UserError(
                f"sample name {sample.name!r} is given twice", fix="give each sample its own name"
            )
        if ":" in sample.name:
            raise UserError(
                f"sample name {sample.name!r} contains ':', which separates it from the cell's name"
            )
        seen.add(sample.name)


def _cell_ids(barcodes: pa.Array, samples: pa.Array | None) -> pa.Array:
    import pyarrow.compute as pc

    return barcodes if samples is None else pc.binary_join_element_wise(samples, barcodes, ":")


def _reserved(samples: Sequence[Sample]) -> tuple[str, ...]:
    return (*RESERVED, "filter_pass", "sample") if len(samples) > 1 else (*RESERVED, "filter_pass")


def _unite_features(
    sources: Sequence[CountSource],
) -> tuple[Array, Array | None, list[Array]]:
    """The features of all files in order of first appearance, and where each file's features went.

    Duplicates within a file stay apart: the k-th feature of a name is the k-th of that name in every file.
    """
    order: dict[tuple[str, int], int] = {}
    symbols: list[str | None] = []
    places = []
    for source in sources:
        met: dict[str, int] = {}
        place = np.empty(source.n_features, np.int32)
        known = source.feature_symbols
        for i, name in enumerate(source.feature_ids):
            occurrence = met.get(name, 0)
            met[name] = occurrence + 1
            place[i] = order.setdefault((name, occurrence), len(order))
            symbol = None if known is None else known[i]
            if place[i] == len(symbols):
                symbols.append(symbol or None)
            elif symbols[place[i]] is None:
                symbols[place[i]] = symbol or None
        places.append(place)
    ids = np.array([name for name, _ in order], dtype=object)
    return ids, (np.array(symbols, dtype=object) if any(symbols) else None), places


def _dataset_blocks(
    sources: Sequence[CountSource], places: Sequence[Array], *, n_features: int
) -> Iterator[Block]:
    """Canonical blocks over all files; `start` counts the dataset's cells, columns are the dataset's features."""
    offset = 0
    for source, place in zip(sources, places, strict=True):
        same = bool((place == np.arange(len(place))).all())
        for block in source.blocks(max_bytes=BLOCK_BYTES):
            indices = block.indices if same else place[block.indices]
            yield canonical(block._replace(start=offset + block.start, indices=indices), n_features)
        offset += source.n_cells


def _metadata_columns(
    samples: Sequence[Sample], sources: Sequence[CountSource], notes: list[str], *, own: bool
) -> Columns:
    """Sample names where there are several, the files' filter_pass and own columns, the sample table's columns."""
    sizes = [source.n_cells for source in sources]
    columns: Columns = {}
    if len(samples) > 1:
        columns["sample"] = pa.array(np.repeat([str(s.name) for s in samples], sizes), pa.string())
    if any(source.filter_pass is not None for source in sources):
        flags = [np.ones(s.n_cells, bool) if s.filter_pass is None else s.filter_pass for s in sources]
        columns["filter_pass"] = pa.array(np.concatenate(flags))
    if own:
        theirs = _concatenate([_obs_columns(source) for source in sources], sizes)
        theirs.pop("filter_pass", None)
        if "cell_id" in theirs and theirs["cell_id"].to_pylist() == [
            name for s in sources for name in s.names.to_pylist()
        ]:
            del theirs["cell_id"]
        _add_columns(columns, theirs, reserved=_reserved(samples), origin="the file", notes=notes)
    given = [
        {k: pa.array([v] * size) for k, v in s.columns.items()}
        for s, size in zip(samples, sizes, strict=True)
    ]
    table = _concatenate(given, sizes)
    _add_columns(columns, table, reserved=_reserved(samples), origin="the samples table", notes=notes)
    return columns


def _obs_columns(source: CountSource) -> Columns:
    """The file's own cell metadata as plain Arrow arrays; a column of mixed types becomes text."""
    import pandas as pd

    frame = source.obs()
    columns: Columns = {}
    for position, name in enumerate(frame.columns):
        values = frame.iloc[:, position]
        try:
            array = pa.array(values, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            array = pa.array([None if pd.isna(v) else str(v) for v in values], pa.string())
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if pa.types.is_large_string(array.type):
            array = array.cast(pa.string())
        columns[str(name)] = array
    return columns


def _concatenate(parts: Sequence[Columns], sizes: Sequence[int]) -> Columns:
    """Columns of several files one below the other: absent ones are null, types that don't agree become text."""
    joined: Columns = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        arrays = [part.get(name, pa.nulls(size)) for part, size in zip(parts, sizes, strict=True)]
        tables = [pa.table({name: array}) for array in arrays]
        try:
            joined[name] = pa.concat_tables(tables, promote_options="permissive").column(name)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            joined[name] = pa.chunked_array([array.cast(pa.string()) for array in arrays])
    return joined


def _add_columns(
    columns: Columns, more: Columns, *, reserved: Sequence[str], origin: str, notes: list[str]
) -> None:
    """Put `more` behind `columns`; reserved names get a prefix, an earlier column of the same name is replaced."""
    for name, values in more.items():
        kept = f"input_{name}" if name in reserved else name
        if kept in columns:
            notes.append(f"metadata column {kept!r} is taken from {origin}")
        elif kept != name:
            notes.append(f"metadata column {name!r} of {origin} is kept as {kept!r}")
        columns[kept] = values


def _feature_table(feature_ids: Array, symbols: Array | None, totals: Array) -> pa.Table:
    known = np.full(len(feature_ids), None, dtype=object) if symbols is None else symbols
    return pa.table(
        {
            "feature_id": pa.array(feature_ids, pa.string()),
            "symbol": pa.array(known, pa.string()),
            "n_counts": totals[0],
            "n_cells": totals[1],
        }
    )
