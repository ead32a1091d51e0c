"""Are these values counts? One pass over every value that checks and converts at once.

A count is finite, not negative and whole. With `round`, fractions are rounded, halves up (0.5 becomes 1), for
estimates such as alevin's or SoupX's; what is negative or not finite is refused all the same.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError

Array = np.ndarray[Any, Any]
_INT32 = 2**31 - 1
_EXACT = 2**53  # above it floats skip integers


def to_counts(values: Array, *, round_values: bool = False) -> Array | None:
    """`values` as uint16 (where they are stored so, or as uint8), int32, or int64 where one is above 2^31 - 1.

    None if one of them isn't a count.
    """
    from cellformers.io import kernels

    if not values.dtype.isnative:
        values = values.astype(values.dtype.newbyteorder("="))
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b" or (kind == "u" and size <= 2):
        return values.astype(np.uint16, copy=False)
    if kind not in "iuf":
        raise TypeError(f"can't count with {values.dtype}")
    if kind == "f" and size not in (4, 8):
        values = values.astype(np.float32 if size == 2 else np.float64)
    run = kernels.convert_rounded if round_values and kind == "f" else kernels.convert
    for dtype, limit in ((np.int32, _INT32), (np.int64, _EXACT)):
        out = np.empty(values.size, dtype=dtype)
        if not run(values, _limit(limit, values.dtype), out):
            return out
        if _first_bad(values, limit=math.inf, round_values=round_values) is not None or values.size == 0:
            return None
    return None


def _limit(limit: int, dtype: np.dtype[Any]) -> Any:
    """The largest value of `dtype` that is not above `limit`."""
    if dtype.kind != "f":
        return dtype.type(min(limit, np.iinfo(dtype).max))
    bound = dtype.type(limit)
    return bound if int(bound) <= limit else np.nextafter(bound, dtype.type(0))


def _first_bad(values: Array, *, limit: float = _EXACT, round_values: bool = False) -> int | None:
    """Position of the first value that isn't a count, or None."""
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values) | (values < 0) | (values > limit)
        if not round_values:
            bad |= values != np.floor(values)
    else:
        bad = (values < 0) | (values > limit)
    return int(np.argmax(bad)) if bad.any() else None


def looks_logged(values: Array) -> bool:
    """Whether the non-zero values of one cell are log1p of one size factor times whole numbers.

    The smallest value then stands for a count of one (or two, three), and expm1 of the others are multiples of its.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[values != 0]
    if values.size < 8 or not np.isfinite(values).all() or values.min() <= 0 or values.max() > 30:
        return False
    if (values == np.floor(values)).all():
        return False
    raw = np.expm1(values)
    for unit in (1, 2, 3):
        multiples = raw / (raw.min() / unit)
        small = multiples < 50  # beyond, float32 rounding hides what is whole
        if small.sum() >= 8 and np.mean(np.abs(multiples - np.round(multiples))[small] < 0.02) > 0.95:
            return True
    return False


class Checker:
    """Turns raw values into counts, or refuses them in one line that names the first offender.

    Parameters
    ----------
    name
        What the matrix is called in the file: "X", "layers['counts']".
    cell_id, feature_id
        Name of the cell, feature with that number.
    elsewhere
        Which keys may lead to raw counts in this file.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        cell_id: Callable[[int], str],
        feature_id: Callable[[int], str],
        round_values: bool = False,
        elsewhere: str = "",
    ) -> None:
        self.path, self.name, self.round_values, self.elsewhere = path, name, round_values, elsewhere
        self._cell_id, self._feature_id = cell_id, feature_id

    def __call__(
        self, values: Array, locate: Callable[[int], tuple[int, int]], *, by_cell: bool = True
    ) -> Array:
        """`values` as counts; `locate(position)` tells the cell and the feature of one.

        `by_cell` says whether neighbouring values belong to one cell, so that log values can be recognised.
        """
        counts = to_counts(values, round_values=self.round_values)
        if counts is not None:
            return counts
        position = _first_bad(values, round_values=self.round_values)
        if position is None:
            raise AssertionError("a value was refused that is a count")
        cell, feature = locate(position)
        cells_values = values[:0]
        if by_cell:
            lo = position
            while lo > 0 and position - lo < 5000 and locate(lo - 1)[0] == cell:
                lo -= 1
            hi = position
            while hi < values.size and hi - position < 5000 and locate(hi)[0] == cell:
                hi += 1
            cells_values = values[lo:hi]
        raise self.refusal(values[position], cell, feature, cells_values)

    def refusal(self, value: Any, cell: int, feature: int, cells_values: Array) -> UserError:
        """The error about `value`, which isn't a count."""
        value = float(value)
        elsewhere = fix = self.elsewhere
        if math.isnan(value):
            reason, shown = "missing values (NaN)", "NaN"
            fix = "; ".join(x for x in ("replace the missing values", elsewhere) if x)
        elif math.isinf(value):
            reason, shown = "infinite values", str(value)
        elif value < 0:
            reason, shown = "negative values (scaled or corrected?)", f"{value:.6g}"
        elif value >= _EXACT:  # what is refused there is above it, rounded
            reason, shown = "values too large to be counts", f"{value:.6g}"
        elif looks_logged(cells_values):
            reason, shown = "log-normalised values", f"{value:.6g}"
        else:
            reason, shown = "non-integer values", f"{value:.6g}"
            estimates = "set round: true if these are estimated counts (alevin, SoupX)"
            fix = "; or ".join(x for x in (elsewhere, estimates) if x)
        if not fix:
            fix = "give a file of raw counts"
        return UserError(
            f"{self.name} holds {reason}, not counts: {shown} in cell {self._cell_id(cell)!r}, "
            f"gene {self._feature_id(feature)!r}",
            path=self.path,
            fix=fix,
        )
