"""Embedding shards and the table of cells, joined into one file: AnnData that scanpy opens as it is, or a table.

cellformers gather embeddings/small/*.parquet --cells cells.parquet --name small -o embeddings/small.h5ad
cellformers gather embeddings/small/*.parquet --cells cells.parquet --label cell_type -o small.csv.gz

Vectors go from the shards into the result a block at a time, so memory holds the cells' names and labels, but never
their vectors.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellformers.errors import UserError, did_you_mean
from cellformers.io.arrow import as_numbers, numbers, strings
from cellformers.io.files import METADATA_KEY, atomic_path, read_table, stamp
from cellformers.revisions import REVISIONS
from cellformers.selection import rows_of
from cellformers.vectors import Embeddings, blocks, open_embeddings

if TYPE_CHECKING:
    import h5py

Array = np.ndarray[Any, Any]

CHUNK_BYTES = 1 << 18  # of vectors in an HDF5 chunk
ROWS = 1024  # of a row group, and of vectors in memory
SUFFIXES = (".h5ad", ".parquet", ".csv", ".tsv", ".csv.gz", ".tsv.gz")


@dataclass(frozen=True)
class Ordered:
    """The vectors on disk of the cells of a file, NaN for cells that no shard holds."""

    embeddings: Embeddings
    rows: Array
    """int64[embedded cells], ascending: the cell of each vector."""
    n_cells: int

    def blocks(self, size: int = ROWS) -> Iterator[Array]:
        """float32[size, dim] at a time, in the order of the cells; the last block may be shorter."""
        held = np.empty((0, self.embeddings.dim), np.float32)
        coming = blocks(self.embeddings, size)
        for start in range(0, self.n_cells, size):
            low, high = np.searchsorted(self.rows, (start, start + size))
            while len(held) < high - low:
                held = np.concatenate([held, next(coming)])
            block = np.full((min(size, self.n_cells - start), self.embeddings.dim), np.nan, np.float32)
            block[self.rows[low:high] - start] = held[: high - low]
            held = held[high - low :]
            yield block


def ordered(names: pa.StringArray, shards: Sequence[str | Path]) -> Ordered:
    """Vectors of the cells `names`, in their order, from embedding shards that hold some of them in the same order."""
    embeddings = open_embeddings(shards)
    rows = as_numbers(pc.index_in(embeddings.cell_ids, value_set=names)).astype(np.int64)
    if (np.diff(rows) <= 0).any():
        raise ValueError("the shards hold cells in another order")
    return Ordered(embeddings, rows, len(names))


def in_order(cell_ids: Array, shards: Sequence[str | Path]) -> Array:
    """Vectors of these cells from embedding shards, float32[n_cells, dim]; NaN for cells that no shard holds."""
    embeddings = open_embeddings(shards)
    rows = as_numbers(pc.index_in(embeddings.cell_ids, value_set=strings(cell_ids)))
    result = np.full((len(cell_ids), embeddings.dim), np.nan, np.float32)
    start = 0
    for block in blocks(embeddings, ROWS):
        result[rows[start : start + len(block)]] = block
        start += len(block)
    return result


def check_name(name: str) -> str:
    """The name of an embedding; UserError where AnnData files have no room for it."""
    if "/" in name:
        raise UserError(
            f"the name {name!r} has a slash, which divides names in .h5ad files", fix="choose another --name"
        )
    return name


def gather_cells(
    shards: Sequence[str | Path],
    cells: str | Path,
    *,
    output: str | Path,
    name: str | None = None,
    labels: Sequence[str] | None = None,
) -> int:
    """Write the embedding of a dataset with the cells' metadata, in the order of the shards; returns their number.

    Parameters
    ----------
    shards
        Embedding shards of one dataset, in order. The result has the same bytes for any number of them.
    cells
        The dataset's cells.parquet.
    output
        By its suffix: `.h5ad`, AnnData with obs = the cells' metadata and obsm["X_{name}"] float32[n, dim];
        `.parquet`, cell_id, labels and embedding, as an embedding shard is; `.csv` or `.tsv`, also with `.gz`:
        cell_id, labels, and the dimensions from 0.
    name
        Of the embedding; default: of the output.
    labels
        Columns of `cells` to write; None: all into an .h5ad, none into a table.

    Raises
    ------
    UserError
        If shards differ in model, dataset or parameters, or name a cell that the table does not have, a label does
        not exist or holds no plain values, the name has a slash, or the output has another suffix.
    """
    output = Path(output)
    check_name(name or "")
    suffix = next((s for s in sorted(SUFFIXES, key=len, reverse=True) if output.name.endswith(s)), None)
    if suffix is None:
        raise UserError(
            f"what should it be? gather writes {', '.join(SUFFIXES)}", path=output, fix="name it so"
        )
    embeddings = open_embeddings(shards)
    table = read_table(cells)
    for label in ["cell_id", *(labels or ())]:
        if label not in table.column_names:
            raise UserError(
                f"has no column {label!r}", path=cells, fix=did_you_mean(label, table.column_names)
            )
    if labels is not None or suffix != ".h5ad":
        table = _plain(table.select(list(dict.fromkeys(["cell_id", *(labels or ())]))))
    nested = next((field.name for field in table.schema if pa.types.is_nested(field.type)), None)
    if nested is not None:
        raise UserError(
            f"the column {nested!r} holds lists, not one value a cell",
            path=cells,
            fix="give the dataset's cells.parquet",
        )
    names = table["cell_id"].cast(pa.string())
    table = table.take(numbers(rows_of(embeddings.cell_ids, names, path=embeddings.paths[0], cells=cells)))
    parameters, inputs = (embeddings.metadata.get(key, {}) for key in ("parameters", "inputs"))
    made = json.dumps(stamp("gather", REVISIONS["gather"], parameters=parameters, inputs=inputs))
    with atomic_path(output) as temporary:
        if suffix == ".h5ad":
            _write_h5ad(temporary, embeddings, table, made, name=name or output.name.removesuffix(suffix))
        elif suffix == ".parquet":
            _write_parquet(temporary, embeddings, table, made)
        else:
            _write_text(temporary, embeddings, table, suffix)
    return len(embeddings)


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionary types, which are not written as text."""
    kinds = [(f.name, f.type.value_type if pa.types.is_dictionary(f.type) else f.type) for f in table.schema]
    return table.cast(pa.schema(kinds))


def _write_h5ad(path: Path, embeddings: Embeddings, table: pa.Table, made: str, *, name: str) -> None:
    """The cells by anndata, then the vectors, chunk after chunk, as anndata stores a dense array."""
    import anndata
    import h5py

    obs = table.to_pandas().set_index("cell_id")
    obs.index.name = None
    for column in obs.select_dtypes(object).columns:
        obs[column] = obs[column].astype("category")
    adata = anndata.AnnData(obs=obs)
    adata.uns["cellformers"] = made
    adata.write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        vectors = _dataset(file["obsm"], f"X_{name}", len(embeddings), embeddings.dim)
        rows = vectors.chunks[0] if vectors.chunks else ROWS
        start = 0
        for block in blocks(
            embeddings, rows
        ):  # whole chunks, each written once: their order is that of the rows
            vectors[start : start + len(block)] = block
            start += len(block)


def _dataset(group: "h5py.Group", name: str, n: int, dim: int) -> "h5py.Dataset":
    options: dict[str, Any] = {}
    if n:
        # floats hardly compress: with bytes of one significance together they take 7 % less, and a third of the time
        # to read; a higher level of gzip gains half a percent at a fifth more time
        options = {"chunks": (min(n, max(1, CHUNK_BYTES // (4 * dim))), dim), "compression": "gzip"}
        options |= {"compression_opts": 1, "shuffle": True}
    dataset = group.create_dataset(name, shape=(n, dim), dtype=np.float32, **options)
    dataset.attrs["encoding-type"] = "array"
    dataset.attrs["encoding-version"] = "0.2.0"
    return dataset


def _pieces(embeddings: Embeddings, table: pa.Table) -> Iterator[tuple[pa.Table, Array]]:
    """The cells' metadata and vectors, some rows at a time."""
    start = 0
    for block in blocks(embeddings, ROWS):
        yield table.slice(start, len(block)).combine_chunks(), block
        start += len(block)


def _write_parquet(path: Path, embeddings: Embeddings, table: pa.Table, made: str) -> None:
    field = pa.field("embedding", pa.list_(pa.float32(), embeddings.dim))
    schema = table.schema.append(field).with_metadata({METADATA_KEY: made.encode()})
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for piece, block in _pieces(embeddings, table):
            column = pa.FixedSizeListArray.from_arrays(numbers(block.reshape(-1)), embeddings.dim)
            writer.write_table(pa.table([*piece.columns, column], schema=schema))


@contextmanager
def _text_file(path: Path, *, gzipped: bool) -> Iterator[BinaryIO | gzip.GzipFile]:
    with path.open("wb") as file:
        if not gzipped:
            yield file
            return
        with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0, compresslevel=4) as packed:
            yield packed  # without name and time, the same content makes the same bytes


def _write_text(path: Path, embeddings: Embeddings, table: pa.Table, suffix: str) -> None:
    """A header and a line a cell; numbers as short as they can be and still be read back the same."""
    from pyarrow import csv as pacsv

    separator = "," if suffix.startswith(".csv") else "\t"
    header = [*table.column_names, *map(str, range(embeddings.dim))]
    options = pacsv.WriteOptions(include_header=False, delimiter=separator)
    with _text_file(path, gzipped=suffix.endswith(".gz")) as file:
        line = io.StringIO()
        csv.writer(line, delimiter=separator, lineterminator="\n").writerow(header)
        file.write(line.getvalue().encode())
        for piece, block in _pieces(embeddings, table):
            columns = [numbers(column) for column in np.ascontiguousarray(block.T)]
            pacsv.write_csv(pa.table([*piece.columns, *columns], names=header), file, options)
