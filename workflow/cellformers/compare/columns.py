"""Parquet, HDF5 and safetensors as named columns that are read a block at a time.

Several files (the shards of a dataset) are one table: their rows one after the other. Nothing is unpickled, and no
link or dataset that leads out of an HDF5 file is followed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellformers.errors import UserError
from cellformers.io.arrow import as_numbers
from cellformers.io.files import DAMAGES, METADATA_KEY, open_parquet, whole
from cellformers.io.hdf5 import child, open_hdf5

Array = np.ndarray[Any, Any]
ROWS = 4096  # of a Parquet table at a time
VALUES = 1 << 20  # of an HDF5 dataset or a tensor at a time
_DEEPEST = 32  # groups in groups
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
TENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?", "F8_E4M3": "<u1", "F8_E5M2": "<u1",
}  # fmt: skip


class Column(NamedTuple):
    """One column: its type in words, and a function that reads it, block by block, from the start."""

    kind: str
    blocks: Callable[[], Iterator[Array]]


class Content(NamedTuple):
    """Columns by name, and whatever else is said in the file, by its key."""

    columns: dict[str, Column]
    facts: dict[str, Any]


def parquet(paths: Sequence[Path]) -> Content:
    """Columns of Parquet tables, nested ones taken apart; facts are the metadata of the first."""
    with open_parquet(paths[0]) as file:
        schema = file.schema_arrow
    columns = {}
    for field in schema:
        for leaf, kind in _leaves(field.type):
            columns[field.name + leaf] = Column(kind, _parquet_blocks(paths, field.name, leaf))
    facts: dict[str, Any] = {}
    for key, value in (schema.metadata or {}).items():
        name = key.decode("utf-8", "replace")
        if key == METADATA_KEY:
            facts["metadata"] = _parsed(value)
        elif name != "ARROW:schema":
            facts[name] = value.decode("utf-8", "replace")
    return Content(columns, facts)


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.decode("utf-8", "replace")


def _leaves(kind: pa.DataType) -> list[tuple[str, str]]:
    """(what follows the name of the column, type) of the flat arrays of a type."""
    if pa.types.is_fixed_size_list(kind):
        return [(leaf, f"{text}[{kind.list_size}]") for leaf, text in _leaves(kind.value_type)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [
            (" (lengths)", "int"),
            *((leaf + " (items)", text) for leaf, text in _leaves(kind.value_type)),
        ]
    return [("", str(kind))]


def _parquet_blocks(paths: Sequence[Path], name: str, leaf: str) -> Callable[[], Iterator[Array]]:
    def blocks() -> Iterator[Array]:
        for path in paths:
            with open_parquet(path) as file:
                if name not in file.schema_arrow.names:
                    raise UserError(f"has no column {name!r}", path=path)
                try:
                    for batch in file.iter_batches(batch_size=ROWS, columns=[name]):
                        yield _flat(batch.column(0), leaf)
                except DAMAGES as error:
                    raise UserError("is damaged", path=path) from error

    return blocks


def _flat(array: pa.Array, leaf: str) -> Array:
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        if leaf == " (lengths)":
            array = pc.list_value_length(array)
            break
        array, leaf = array.flatten(), leaf.removesuffix(" (items)")
    while pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    kind = array.type
    if array.null_count == 0 and (pa.types.is_boolean(kind) or str(kind) in _PLAIN):
        return as_numbers(array)
    if pa.types.is_float16(kind) and array.null_count == 0:
        return np.asarray(array.to_numpy(zero_copy_only=False))
    return _objects(array.to_pylist())


_PLAIN = ("int16", "int32", "int64", "uint16", "uint32", "float", "double")


def _objects(values: list[Any]) -> Array:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def hdf5(paths: Sequence[Path], *, recut: bool = False) -> Content:
    """Datasets of HDF5 files and attributes of the first; `recut`: of h5ad files the rows one after the other."""
    with open_hdf5(paths[0]) as file, whole(paths[0]):
        names, facts = _walk(file)
    columns = {}
    for name, kind in names.items():
        by_row = name.split("/")[0] in ("X", "layers", "obs", "obsm")
        columns[name] = Column(kind, _hdf5_blocks(paths if by_row else paths[:1], name, recut))
    return Content(columns, facts)


def _walk(file: h5py.File) -> tuple[dict[str, str], dict[str, Any]]:
    """Types of all datasets and values of all attributes, by path."""
    names: dict[str, str] = {}
    facts: dict[str, Any] = {}

    def visit(group: h5py.Group, prefix: str, above: frozenset[int]) -> None:
        if len(above) > _DEEPEST:
            facts[prefix] = "groups are nested too deep to be compared"
            return
        _attributes(group, prefix, facts)
        for name in sorted(group):
            path = f"{prefix}{name}"
            try:
                node = child(group, name)
            except UserError as error:
                facts[path] = f"not compared: {error.what}"
                continue
            if isinstance(node, h5py.Dataset):
                names[path] = str(node.dtype)
                _attributes(node, path, facts)
            elif isinstance(node, h5py.Group):
                address = h5py.h5o.get_info(node.id).addr
                if address in above:
                    facts[path] = "a link to a group that holds it"
                else:
                    visit(node, path + "/", above | {address})

    visit(file, "", frozenset({h5py.h5o.get_info(file["/"].id).addr}))
    return names, facts


def _attributes(node: Any, path: str, facts: dict[str, Any]) -> None:
    for key in sorted(node.attrs):
        try:
            value = node.attrs[key]
        except (OSError, TypeError) as error:
            facts[f"{path}@{key}"] = f"not compared: {error}"
            continue
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        facts[f"{path}@{key}"] = text.tolist() if isinstance(text, np.ndarray | np.generic) else text


def _hdf5_blocks(paths: Sequence[Path], name: str, recut: bool) -> Callable[[], Iterator[Array]]:
    def blocks() -> Iterator[Array]:
        for path in paths:
            with open_hdf5(path) as file:
                dataset = child(file, name)
                if not isinstance(dataset, h5py.Dataset):
                    raise UserError(f"has no dataset {name!r}", path=path)
                try:
                    found = _dataset_blocks(dataset)
                    # pointers to rows are those of a shard: the lengths of rows are those of the whole
                    yield from _lengths(found) if recut and name.endswith("/indptr") else found
                except DAMAGES as error:
                    raise UserError(f"{name} can't be read ({error})", path=path) from error

    return blocks


def _dataset_blocks(dataset: h5py.Dataset) -> Iterator[Array]:
    if dataset.shape is None:
        return
    if dataset.ndim == 0:
        yield _comparable(np.asarray([dataset[()]]))
        return
    width = max(1, int(np.prod(dataset.shape[1:], dtype=np.float64)))
    step = max(1, VALUES // width)
    if dataset.chunks and dataset.chunks[0] < step:
        step -= step % dataset.chunks[0]
    for start in range(0, dataset.shape[0], step):
        yield _comparable(dataset[start : start + step])


def _comparable(block: Array) -> Array:
    """One-dimensional: numbers, or objects where they are anything else."""
    if block.dtype.kind in "biuf":
        return block.reshape(-1)
    if block.dtype.kind == "V":  # compound types and the like, by their bytes
        return _objects([item.tobytes() for item in block.reshape(-1)])
    return block.astype(object).reshape(-1)


def _lengths(pointers: Iterator[Array]) -> Iterator[Array]:
    last: Array | None = None
    for block in pointers:
        joined = block if last is None else np.concatenate([last, block])
        yield np.diff(joined)
        last = joined[-1:]


def safetensors(paths: Sequence[Path]) -> Content:
    """Tensors of a safetensors file, by the format's own description: length of the header, header, bytes.

    Raises
    ------
    UserError
        If the header is damaged, or says that tensors lie outside the file.
    """
    path = paths[0]
    with path.open("rb") as file:
        size = path.stat().st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise UserError("is not a safetensors file", path=path)
        header = _parsed(file.read(length))
    columns = {}
    try:
        facts = dict(header.pop("__metadata__", {}))
        for name, entry in sorted(header.items()):
            dtype = np.dtype(TENSORS[entry["dtype"]])
            start, stop = (int(at) for at in entry["data_offsets"])
            count = int(np.prod([int(n) for n in entry["shape"]], dtype=np.float64))
            if not 0 <= start <= stop <= size - 8 - length or count * dtype.itemsize != stop - start:
                raise ValueError(name)
            kind = f"{entry['dtype']}{entry['shape']}"
            columns[name] = Column(kind, _tensor_blocks(path, 8 + length + start, count, entry["dtype"]))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"is not a safetensors file ({error})", path=path) from None
    return Content(columns, facts)


def _tensor_blocks(path: Path, start: int, count: int, kind: str) -> Callable[[], Iterator[Array]]:
    dtype = np.dtype(TENSORS[kind])

    def blocks() -> Iterator[Array]:
        with path.open("rb") as file:
            file.seek(start)
            for done in range(0, count, VALUES):
                values = np.frombuffer(file.read(min(VALUES, count - done) * dtype.itemsize), dtype)
                # the upper half of a float32
                yield (values.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else values

    return blocks
