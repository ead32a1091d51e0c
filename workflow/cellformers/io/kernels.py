"""Compiled inner loops of the readers. Importing this imports numba; only functions that run a loop import it.

Every loop releases the GIL, so that a consumer can read in one thread and compute in another.
"""

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]


@njit(cache=True, nogil=True)
def convert(values: Array, limit: Any, out: Array) -> bool:
    """Write `values` to the integer array `out`; True if one is negative, NaN, fractional or above `limit`."""
    bad = np.uint8(0)
    for i in range(values.size):
        value = values[i]
        fits = (value >= 0) & (value <= limit)
        kept = value if fits else values.dtype.type(0)  # a cast of NaN or of what does not fit is undefined
        count = out.dtype.type(kept)
        out[i] = count
        bad |= np.uint8((not fits) | (count != kept))
    return bad != 0


@njit(cache=True, nogil=True)
def convert_rounded(values: Array, limit: Any, out: Array) -> bool:
    """The same with halves rounded up; True if a value is negative, NaN or above `limit`."""
    bad = False
    for i in range(values.size):
        value = np.float64(values[i])
        fits = (value >= 0) & (value <= limit)
        kept = value if fits else 0.0
        count = np.int64(kept)
        out[i] = count + (1 if kept - count >= 0.5 else 0)
        bad |= not fits
    return bad


@njit(cache=True, nogil=True)
def convert_indices(indices: Array, n: int, out: Array) -> bool:
    """Write `indices` to the int32 array `out`; True if one is not in [0, n)."""
    bad = np.uint8(0)
    for i in range(indices.size):
        index = indices[i]
        fits = (index >= 0) & (index < n)
        bad |= np.uint8(not fits)
        out[i] = np.int32(index)
    return bad != 0


@njit(cache=True, nogil=True)
def outside(indices: Array, n: int) -> bool:
    """Whether one of `indices` is not in [0, n)."""
    bad = np.uint8(0)
    for i in range(indices.size):
        bad |= np.uint8((indices[i] < 0) | (indices[i] >= n))
    return bad != 0


@njit(cache=True, nogil=True)
def count_rows(dense: Array, indptr: Array) -> None:
    """Fill indptr[rows + 1] with the running number of non-zeros of the rows of `dense`."""
    total = 0
    indptr[0] = 0
    for i in range(dense.shape[0]):
        for j in range(dense.shape[1]):
            total += dense[i, j] != 0
        indptr[i + 1] = total


@njit(cache=True, nogil=True)
def fill_rows(dense: Array, indices: Array, values: Array) -> None:
    """Write the non-zeros of `dense`, row after row, and their columns."""
    k = 0
    for i in range(dense.shape[0]):
        for j in range(dense.shape[1]):
            if dense[i, j] != 0:
                indices[k] = j
                values[k] = dense[i, j]
                k += 1


@njit(cache=True, nogil=True)
def count_columns(dense: Array, indptr: Array) -> None:
    """Fill indptr[columns + 1] with the running number of non-zeros of the columns of `dense`."""
    indptr[:] = 0
    for i in range(dense.shape[0]):
        for j in range(dense.shape[1]):
            indptr[j + 1] += dense[i, j] != 0
    for j in range(dense.shape[1]):
        indptr[j + 1] += indptr[j]


@njit(cache=True, nogil=True)
def fill_columns(dense: Array, indptr: Array, indices: Array, values: Array) -> None:
    """Write the non-zeros of `dense`, column after column, and their rows."""
    cursor = indptr[:-1].copy()
    for i in range(dense.shape[0]):
        for j in range(dense.shape[1]):
            if dense[i, j] != 0:
                k = cursor[j]
                indices[k] = i
                values[k] = dense[i, j]
                cursor[j] = k + 1


@njit(cache=True, nogil=True)
def sort_entries(
    keys: Array, divisor: int, offsets: Array, cells: Array, features: Array, counts: Array, out: Array
) -> None:
    """Stable counting sort of entries by `keys // divisor` into the record array `out`; fills `offsets`."""
    offsets[:] = 0
    for i in range(keys.size):
        offsets[keys[i] // divisor + 1] += 1
    for b in range(offsets.size - 1):
        offsets[b + 1] += offsets[b]
    cursor = offsets[:-1].copy()
    for i in range(keys.size):
        b = keys[i] // divisor
        k = cursor[b]
        out[k, 0] = cells[i]
        out[k, 1] = features[i]
        out[k, 2] = counts[i]
        cursor[b] = k + 1


@njit(cache=True, nogil=True)
def entries_to_csr(entries: Array, first: int, indptr: Array, indices: Array, data: Array) -> None:
    """Entries [n, 3] of (cell, feature, count) with cells from `first` on to CSR, stable within a cell."""
    indptr[:] = 0
    for i in range(entries.shape[0]):
        indptr[entries[i, 0] - first + 1] += 1
    for r in range(indptr.size - 1):
        indptr[r + 1] += indptr[r]
    cursor = indptr[:-1].copy()
    for i in range(entries.shape[0]):
        r = entries[i, 0] - first
        k = cursor[r]
        indices[k] = entries[i, 1]
        data[k] = entries[i, 2]
        cursor[r] = k + 1


@njit(cache=True, nogil=True)
def keep_features(indptr: Array, indices: Array, values: Array, position: Array) -> int:
    """Drop, in place, the entries whose `position` is -1 and renumber the others; returns how many stay."""
    k = 0
    lo = indptr[0]
    for r in range(indptr.size - 1):
        hi = indptr[r + 1]
        for i in range(lo, hi):
            to = position[indices[i]]
            if to >= 0:
                indices[k] = to
                values[k] = values[i]
                k += 1
        lo = hi
        indptr[r + 1] = k
    return k


NEWLINE, RETURN, QUOTE, SPACE, TAB = 10, 13, 34, 32, 9
OK, RAGGED, NOT_A_NUMBER = 0, 1, 2


@njit(cache=True, nogil=True)
def _number(text: Array, i: int) -> tuple[float, int]:
    """The number that starts at `i` and the position behind it, which is -1 where there is none."""
    n = text.size
    sign = 1.0
    if i < n and (text[i] == 45 or text[i] == 43):
        sign = -1.0 if text[i] == 45 else 1.0
        i += 1
    # NA, NaN and Inf in any case: left to the check of values, which knows cell and gene
    if i + 1 < n and (text[i] | 32) == 110 and (text[i + 1] | 32) == 97:
        i += 2
        if i < n and (text[i] | 32) == 110:
            i += 1
        return np.nan, i
    if i + 2 < n and (text[i] | 32) == 105 and (text[i + 1] | 32) == 110 and (text[i + 2] | 32) == 102:
        return sign * np.inf, i + 3
    mantissa, exponent, digits = np.int64(0), 0, 0
    while i < n and 48 <= text[i] <= 57:
        if mantissa < 100000000000000000:
            mantissa = mantissa * 10 + (text[i] - 48)
        else:
            exponent += 1
        digits += 1
        i += 1
    if i < n and text[i] == 46:
        i += 1
        while i < n and 48 <= text[i] <= 57:
            if mantissa < 100000000000000000:
                mantissa = mantissa * 10 + (text[i] - 48)
                exponent -= 1
            digits += 1
            i += 1
    if digits == 0:
        return 0.0, -1
    if i < n and (text[i] | 32) == 101:
        i += 1
        down = False
        if i < n and (text[i] == 45 or text[i] == 43):
            down = text[i] == 45
            i += 1
        power, digits = 0, 0
        while i < n and 48 <= text[i] <= 57:
            power = min(power * 10 + (text[i] - 48), 9999)
            digits += 1
            i += 1
        if digits == 0:
            return 0.0, -1
        exponent += -power if down else power
    if exponent == 0:
        return sign * mantissa, i
    if exponent < 0:
        return sign * mantissa / 10.0**-exponent, i
    return sign * mantissa * 10.0**exponent, i


@njit(cache=True, nogil=True)
def parse_table(
    text: Array,
    separator: int,
    width: int,
    labels: Array,
    starts: Array,
    counts: Array,
    columns: Array,
    values: Array,
) -> tuple[int, int, int, int]:
    """Parse whole lines of "label, number, number, ...": the non-zeros and where the labels are.

    Parameters
    ----------
    text
        uint8, ends with a line end.
    width
        Numbers a line must have.
    labels
        int64[lines, 2]: first byte of the label and the byte behind it (without quotes).
    starts
        int64[lines]: where the line starts.
    counts
        int64[lines]: non-zeros of the line.
    columns, values
        int32 and float64, room for every number there may be.

    Returns
    -------
    Lines parsed, OK or RAGGED or NOT_A_NUMBER, in which field (1 = first number), non-zeros.
    """
    n = text.size
    i = line = k = 0
    while i < n:
        if text[i] == NEWLINE or (text[i] == RETURN and i + 1 < n and text[i + 1] == NEWLINE):
            i += 1 if text[i] == NEWLINE else 2
            continue
        starts[line] = i
        before = k
        if text[i] == QUOTE:
            i += 1
            labels[line, 0] = i
            while text[i] != NEWLINE and not (text[i] == QUOTE and text[i + 1] != QUOTE):
                i += 2 if text[i] == QUOTE else 1
            labels[line, 1] = i
            if text[i] == QUOTE:
                i += 1
        else:
            labels[line, 0] = i
            while text[i] != separator and text[i] != NEWLINE and text[i] != RETURN:
                i += 1
            labels[line, 1] = i
        for field in range(width):
            if text[i] != separator:
                return line, RAGGED, field + 1, k
            i += 1
            while text[i] == SPACE and separator != SPACE:
                i += 1
            quoted = text[i] == QUOTE
            value, behind = _number(text, i + 1 if quoted else i)
            if behind < 0:
                # nothing at the end of the line: too few fields; nothing or a word inside it: not a number
                at_end = (text[i] == NEWLINE or text[i] == RETURN) and field > 0
                return line, RAGGED if at_end else NOT_A_NUMBER, field + 1, k
            i = behind
            if quoted:
                if text[i] != QUOTE:
                    return line, NOT_A_NUMBER, field + 1, k
                i += 1
            while text[i] == SPACE and separator != SPACE:
                i += 1
            if text[i] != separator and text[i] != NEWLINE and text[i] != RETURN:
                return line, NOT_A_NUMBER, field + 1, k
            if value != 0:
                columns[k] = field
                values[k] = value
                k += 1
        if text[i] == separator and (text[i + 1] == NEWLINE or text[i + 1] == RETURN):
            i += 1  # one separator too many at the end of a line is common and harmless
        if text[i] == RETURN:
            i += 1
        if text[i] != NEWLINE:
            return line, RAGGED, width + 1, k
        i += 1
        counts[line] = k - before
        line += 1
    return line, OK, 0, k


@njit(cache=True, nogil=True)
def parse_entries(text: Array, rows: Array, columns: Array, values: Array) -> tuple[int, int]:
    """Parse whole lines of "row column value" (1-based, blanks between); entries parsed, position of a bad line.

    The position is -1 where every line was well.
    """
    n = text.size
    i = k = 0
    while i < n:
        start = i
        found = 0
        row = column = value = 0.0
        while text[i] != NEWLINE:
            if text[i] == SPACE or text[i] == TAB or text[i] == RETURN:
                i += 1
                continue
            number, i = _number(text, i)
            if i < 0 or found == 3:
                return k, start
            if text[i] != SPACE and text[i] != TAB and text[i] != RETURN and text[i] != NEWLINE:
                return k, start
            if found == 0:
                row = number
            elif found == 1:
                column = number
            else:
                value = number
            found += 1
        i += 1
        if found == 0:
            continue
        if found < 3 or not (1 <= row <= 2147483647.0) or not (1 <= column <= 2147483647.0):
            return k, start
        rows[k] = np.int64(row) - 1
        columns[k] = np.int64(column) - 1
        values[k] = value
        k += 1
    return k, -1
