"""Between numpy and Arrow, without pandas.

`pyarrow.array(...)` and `Array.to_numpy()` import pandas just to see whether they were given one of its objects,
which costs a third of a second at the start of a command. These functions work on the buffers instead.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

Array = np.ndarray[Any, Any]

_TYPES = {
    name: getattr(pa, name)()
    for name in ("int16", "int32", "int64", "uint16", "uint32", "float32", "float64")
}
_DTYPES = {type_: np.dtype(name) for name, type_ in _TYPES.items()}


def strings(values: Sequence[str | None] | Array) -> pa.StringArray:
    """Strings as an Arrow array; None becomes null. At most 2 GiB of text."""
    items = values.tolist() if isinstance(values, np.ndarray) else list(values)
    mask = None
    if None in items:
        present = np.fromiter((item is not None for item in items), bool, len(items))
        mask = pa.py_buffer(np.packbits(present, bitorder="little"))
    encoded = [item.encode() if item else b"" for item in items]
    offsets = np.zeros(len(items) + 1, np.int32)
    offsets[1:] = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(items)))
    return pa.StringArray.from_buffers(
        len(items), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)), mask
    )


def numbers(values: Array) -> pa.Array:
    """A one-dimensional array of numbers as an Arrow array of the same type, sharing its memory."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(_TYPES[values.dtype.name], len(values), [None, pa.py_buffer(values)])


def as_strings(column: pa.Array | pa.ChunkedArray) -> Array:
    """A column of strings as an object array of str; null becomes None."""
    result = np.empty(len(column), dtype=object)
    result[:] = column.to_pylist()
    return result


def as_numbers(column: pa.Array | pa.ChunkedArray, *, missing: int | None = None) -> Array:
    """A column of integers, floats or booleans as a read-only numpy array of the same type.

    Parameters
    ----------
    column
        One-dimensional.
    missing
        What stands for null.

    Raises
    ------
    ValueError
        If a value is missing and `missing` is not given.
    """
    if column.null_count and missing is None:
        raise ValueError("a column of numbers has missing values")
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_chunk_as_numbers(chunk, missing) for chunk in chunks if len(chunk)]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, _dtype(column.type))


def _dtype(kind: pa.DataType) -> np.dtype[Any]:
    return np.dtype(bool) if pa.types.is_boolean(kind) else _DTYPES[kind]


def _chunk_as_numbers(chunk: pa.Array, missing: int | None) -> Array:
    present, content = chunk.buffers()
    if pa.types.is_boolean(chunk.type):
        values = _bits(content, chunk).astype(bool)
    else:
        values = np.frombuffer(content, _DTYPES[chunk.type])[chunk.offset : chunk.offset + len(chunk)]
    if chunk.null_count == 0:
        return values
    return np.where(_bits(present, chunk), values, np.asarray(missing, values.dtype))


def _bits(buffer: pa.Buffer, chunk: pa.Array) -> Array:
    """uint8[len(chunk)]: a bit-packed buffer of a chunk as zeros and ones."""
    end = chunk.offset + len(chunk)
    return np.unpackbits(np.frombuffer(buffer, np.uint8), count=end, bitorder="little")[chunk.offset :]
