"""Rows of large sparse matrices, some at a time: put one below the other, and summed, without a second copy."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp

ROWS = 1024  # what is made of them is in memory at a time
Array = np.ndarray[Any, Any]


def split(rows: Array, size: int = ROWS) -> Iterator[Array]:
    """Row numbers, some at a time."""
    return (rows[start : start + size] for start in range(0, len(rows), size))


def stacked(parts: Iterable[sp.csr_matrix], width: int) -> sp.csr_matrix:
    """Matrices of this width one below the other; of integers of several sizes the larger ones.

    Unlike those of `scipy.sparse.vstack` the parts need not all be there at once: memory is that of the result and
    of one part.
    """
    data, indices, lengths = np.empty(0, np.int32), np.empty(0, np.int32), [np.zeros(1, np.int64)]
    for number, part in enumerate(parts):
        data = data.astype(part.dtype if number == 0 else np.result_type(data, part.dtype), copy=False)
        data, indices = _grown(data, part.data), _grown(indices, part.indices)
        lengths.append(np.diff(part.indptr))
    indptr = np.cumsum(np.concatenate(lengths), dtype=np.int64)
    return sp.csr_matrix((data, indices, indptr), shape=(len(indptr) - 1, width))


def _grown(array: Array, more: Array) -> Array:
    """An array of its own with `more` at its end; memory is moved to where there is room, not copied."""
    n = len(array)
    array.resize(n + len(more), refcheck=False)
    array[n:] = more
    return array


def filled(parts: Iterable[Array], n: int) -> Array:
    """Blocks of rows one below the other, float32[n, width]; at least one."""
    result, start = np.empty((n, 0), np.float32), 0
    for part in parts:
        if start == 0:
            result = np.empty((n, part.shape[1]), np.float32)
        result[start : start + len(part)] = part
        start += len(part)
    return result


def add_columns(total: Array, X: sp.csr_matrix, values: Array) -> None:
    """Add a value for each stored entry of X to the total of its column, in their order: `total` holds float64[width].

    Rounds as `numpy.bincount` of all rows at once does, whatever parts they come in.
    """
    np.add.at(total, X.indices, values.astype(np.float64, copy=False))
