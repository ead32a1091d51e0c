"""Embeddings of cells on disk, read block by block: shards by `cellformers embed`, or one .h5ad by `gather`.

    embeddings = open_embeddings(["embeddings/0.parquet", "embeddings/1.parquet"])
    for block in blocks(embeddings, rows=1024):      # float32[1024, dim], the last one shorter
        ...

Blocks go on from one shard to the next, so nothing that is made of them depends on the number of shards.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellformers.errors import UserError, did_you_mean
from cellformers.io.arrow import as_numbers, strings
from cellformers.io.files import open_parquet, read_metadata, read_table, whole

Array = np.ndarray[Any, Any]

H5AD = ".h5ad"
OTHER_KEYS = ("X_pca", "X_umap")  # what scanpy writes beside an embedding
ROWS = 1024  # read at a time


@dataclass(frozen=True)
class Embeddings:
    """The files of one embedding, and everything about them but the vectors."""

    paths: tuple[Path, ...]
    cell_ids: pa.ChunkedArray
    """string[n], in the order of the files, each once."""
    dim: int
    metadata: dict[str, Any]
    """The same of all files; {} where an .h5ad carries none."""
    key: str | None = None
    """obsm key, of an .h5ad."""

    def __len__(self) -> int:
        return len(self.cell_ids)


def open_embeddings(paths: Sequence[str | Path]) -> Embeddings:
    """Read what the embedding files of a dataset are, but not their vectors.

    Raises
    ------
    UserError
        If a file is missing, broken or no embedding, files are of different datasets, models or parameters, or a
        cell is there twice.
    """
    files = tuple(map(Path, paths))
    if not files:
        raise UserError("no embedding files are given", fix="name at least one embedding shard")
    if any(path.suffix == H5AD for path in files):
        if len(files) > 1:
            raise UserError("an .h5ad is a whole embedding", path=files[0], fix="give it alone")
        return _open_h5ad(files[0])
    metadata = read_metadata(files[0])
    chunks: list[pa.Array] = []
    dim = 0
    for path in files:
        with open_parquet(path) as file:
            dim = _width(file.schema_arrow, path)
        if read_metadata(path) != metadata:
            raise UserError(
                f"made from another dataset, model or choice of cells than {files[0]}", path=path,
                fix="give shards of one embedding",
            )  # fmt: skip
        chunks += read_table(path, ["cell_id"])["cell_id"].cast(pa.string()).chunks
    return Embeddings(files, _unique(pa.chunked_array(chunks, pa.string()), files[0]), dim, metadata)


def _width(schema: pa.Schema, path: Path) -> int:
    for column in ("cell_id", "embedding"):
        if column not in schema.names:
            raise UserError(
                f"has no column {column!r}", path=path, fix="give shards that `cellformers embed` made"
            )
    kind = schema.field("embedding").type
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32() or not kind.list_size:
        raise UserError(
            "its embeddings are not fixed-size lists", path=path, fix="make it with `cellformers embed`"
        )
    return int(kind.list_size)


def _unique(names: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    if pc.count_distinct(names).as_py() < len(names):
        found = pc.value_counts(names)
        twice = found.filter(pc.greater(found.field("counts"), 1))[0]["values"].as_py()
        raise UserError(f"cell {twice!r} is there twice", path=path, fix="give every shard once")
    return names


def _open_h5ad(path: Path) -> Embeddings:
    from cellformers.io.frames import Frame
    from cellformers.io.hdf5 import child, open_hdf5
    from cellformers.io.inflate import check_packed

    if not path.is_file():
        raise UserError("no such file", path=path)
    with closing(open_hdf5(path)) as file, whole(path):
        names = Frame(file, "obs", path).index()
        found = list(child(file, "obsm") or ())
        named = f"X_{path.stem}"
        own = [key for key in found if not key.startswith(OTHER_KEYS)]
        if named not in found and len(own) != 1:
            raise UserError(
                f"which of {', '.join(found) or 'no obsm entries'} is the embedding is not clear", path=path,
                fix=f"call the entry {named}",
            )  # fmt: skip
        key = named if named in found else own[0]
        vectors = child(file, f"obsm/{key}")
        if getattr(vectors, "ndim", 0) != 2:
            raise UserError(f"obsm[{key!r}] is no matrix", path=path, fix="embed the cells again")
        stamped = child(file, "uns/cellformers")
        metadata = {} if stamped is None else dict(json.loads(stamped.asstr()[()]))
        if vectors.shape[0] != len(names) or vectors.dtype.kind != "f":
            raise ValueError("no row of numbers for every cell")
        check_packed(vectors)
        ids = _unique(pa.chunked_array([strings(names)]), path)
        return Embeddings((path,), ids, int(vectors.shape[1]), metadata, key)


def read_obs(embeddings: Embeddings, column: str) -> pa.ChunkedArray:
    """A column of the cells' metadata in an .h5ad."""
    from cellformers.io.frames import Frame
    from cellformers.io.hdf5 import open_hdf5

    path = embeddings.paths[0]
    with closing(open_hdf5(path)) as file, whole(path):
        frame = Frame(file, "obs", path)
        if column not in frame.columns:
            raise UserError(f"has no column {column!r}", path=path, fix=did_you_mean(column, frame.columns))
        values = frame.column(column)
    if values is None:
        raise UserError(f"column {column!r} holds no labels", path=path, fix="name a column of labels")
    return pa.chunked_array([pa.array(values, from_pandas=True)])


def _group(file: pq.ParquetFile, group: int, dim: int, path: Path) -> Iterator[Array]:
    with whole(path):
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=["embedding"], use_threads=False):
            column = batch.column("embedding")
            if column.null_count:
                raise UserError("has cells without an embedding", path=path, fix="embed again")
            yield as_numbers(column.flatten()).reshape(-1, dim)


def _parts(embeddings: Embeddings) -> Iterator[Array]:
    if embeddings.key is None:
        for path in embeddings.paths:
            with open_parquet(path) as file:
                for group in range(file.num_row_groups):  # all at once, Arrow may hold the whole file
                    yield from _group(file, group, embeddings.dim, path)
        return
    from cellformers.io.hdf5 import child, open_hdf5

    path = embeddings.paths[0]
    with closing(open_hdf5(path)) as file, whole(path):
        vectors = child(file, f"obsm/{embeddings.key}")
        for start in range(0, len(vectors), ROWS):
            yield vectors[start : start + ROWS].astype(np.float32, copy=False)


def blocks(embeddings: Embeddings, rows: int) -> Iterator[Array]:
    """The vectors in order, float32[rows, dim] at a time; the last block may be shorter."""
    waiting: list[Array] = []
    n = 0
    for part in _parts(embeddings):
        rest = part
        while n + len(rest) >= rows:
            yield np.concatenate([*waiting, rest[: rows - n]])
            waiting, rest, n = [], rest[rows - n :], 0
        if len(rest):
            waiting.append(rest)
            n += len(rest)
    if n:
        yield np.concatenate(waiting)


def principal_components(embeddings: Embeddings, n: int) -> Array:
    """The first `n` principal components of all vectors, float32[cells, n], in two passes over the files.

    The sign of a component is that which makes its largest loading positive. Memory: that of the result.
    """
    sums, products = np.zeros(embeddings.dim), np.zeros((embeddings.dim, embeddings.dim))
    for block in blocks(embeddings, ROWS):
        wide = block.astype(np.float64)
        sums += wide.sum(axis=0)
        products += wide.T @ wide
    mean = sums / len(embeddings)
    _, found = np.linalg.eigh(products - len(embeddings) * np.outer(mean, mean))
    axes = found[:, ::-1][:, :n]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    result = np.empty((len(embeddings), axes.shape[1]), np.float32)
    start = 0
    for block in blocks(embeddings, ROWS):
        result[start : start + len(block)] = (block.astype(np.float64) - mean) @ axes
        start += len(block)
    return result
