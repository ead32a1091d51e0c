"""Compiled inner loops of `chunks`: the non-zeros of decompressed chunks, and chunks of genes to cells of genes."""

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


@njit(cache=True, nogil=True)
def pick(chunk: bytes, positions: Array, values: Array, n: int) -> int:
    """Append the non-zeros of a chunk to `positions` and `values` from `n` on; returns where they end.

    The chunk holds items of the dtype of `values`, which must have room for all of them.
    """
    items = np.frombuffer(chunk, values.dtype)
    words = np.frombuffer(chunk, np.uint8)[: len(chunk) // 64 * 64].view(np.uint64)
    per = 64 // values.itemsize
    for g in range(words.size // 8):  # most of a chunk is zeros: look at 64 bytes at once
        w = 8 * g
        if (
            words[w] | words[w + 1] | words[w + 2] | words[w + 3]
            | words[w + 4] | words[w + 5] | words[w + 6] | words[w + 7]
        ) != 0:  # fmt: skip
            for i in range(g * per, (g + 1) * per):
                positions[n] = i
                values[n] = items[i]
                n += int(items[i] != 0)  # no branch: the next item goes over a zero
    for i in range(words.size // 8 * per, items.size):
        if items[i] != 0:
            positions[n] = i
            values[n] = items[i]
            n += 1
    return n


@njit(cache=True, nogil=True)
def pick_shuffled(chunk: bytes, positions: Array, values: Array, n: int) -> int:
    """The same for a chunk in which the first bytes of all items come first, then the second bytes, and so on."""
    stored = np.frombuffer(chunk, np.uint8)
    made = values.view(np.uint8)
    size = values.itemsize
    count = stored.size // size
    for start in range(0, count, 64):
        stop = min(start + 64, count)
        some = np.uint8(0)
        for b in range(size):
            for i in range(b * count + start, b * count + stop):
                some |= stored[i]
        if some != 0:
            for i in range(start, stop):
                for b in range(size):
                    made[n * size + b] = stored[b * count + i]
                positions[n] = i
                n += int(values[n] != 0)
    return n


@njit(cache=True, nogil=True)
def chunks_to_csr(
    ends: Array,
    positions: Array,
    values: Array,
    width: int,
    step: int,
    n_features: int,
    cells_in_rows: bool,
    indptr: Array,
    indices: Array,
    out: Array,
) -> None:
    """What `pick` found in chunks of `width` items a row, `step` features each, to CSR.

    Chunks come in the order of their features; what lies beyond the last cell or feature is left out. `positions` is
    overwritten.
    """
    features = np.empty(positions.size, np.int32)
    indptr[:] = 0
    k = 0
    for c in range(ends.size):
        row = start = 0
        while k < ends[c]:
            while positions[k] >= start + width:
                row += 1
                start += width
            cell, feature = row, positions[k] - start
            if not cells_in_rows:
                cell, feature = feature, row
            feature += c * step
            inside = cell < indptr.size - 1 and feature < n_features
            positions[k] = cell if inside else -1
            features[k] = feature
            if inside:
                indptr[cell + 1] += 1
            k += 1
    for r in range(indptr.size - 1):
        indptr[r + 1] += indptr[r]
    cursor = indptr[:-1].copy()
    for k in range(positions.size):
        if positions[k] >= 0:
            to = cursor[positions[k]]
            indices[to] = features[k]
            out[to] = values[k]
            cursor[positions[k]] = to + 1
