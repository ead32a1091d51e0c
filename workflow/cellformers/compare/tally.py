"""Numbers and words of two runs held against each other, a block at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Difference(NamedTuple):
    """One thing that differs within an artefact.

    Parameters
    ----------
    place
        Where, e.g. "column embedding".
    text
        What, in words.
    accepted
        Whether the tolerance covers it.
    largest
        Largest absolute and relative difference, where both are numbers.
    """

    place: str
    text: str
    accepted: bool = False
    largest: tuple[float, float] | None = None


@dataclass
class Tally:
    """Sums up the differences of two columns: add blocks of the same length, then ask for `difference`."""

    n: int = 0
    differing: int = 0
    beyond: int = 0  # differing values that no tolerance covers: words, whole numbers, NaN beside a number
    largest: float = 0.0
    scale: float = 0.0  # the largest magnitude of either

    def add(self, left: Array, right: Array) -> None:
        """Count two blocks of one shape."""
        self.n += left.size
        if left.dtype.kind == right.dtype.kind == "f":
            self._add_floats(left, right)
            return
        if left.dtype.kind in "iub" and right.dtype.kind in "iub":
            unlike = left != right
            if unlike.any():
                gap = np.abs(left[unlike].astype(np.float64) - right[unlike].astype(np.float64))
                self.largest = max(self.largest, float(gap.max()))
                self.scale = max(
                    self.scale, *(float(np.abs(x.astype(np.float64)).max()) for x in (left, right))
                )
        else:
            unlike = np.fromiter(
                (x != y for x, y in zip(left.tolist(), right.tolist(), strict=True)), bool, len(left)
            )
        count = int(np.count_nonzero(unlike))
        self.differing += count
        self.beyond += count

    def _add_floats(self, left: Array, right: Array) -> None:
        left, right = left.astype(np.float64, copy=False), right.astype(np.float64, copy=False)
        unlike = ~((left == right) | (np.isnan(left) & np.isnan(right)))
        for block in (left, right):
            finite = block[np.isfinite(block)]
            self.scale = max(self.scale, float(np.abs(finite).max()) if finite.size else 0.0)
        if not unlike.any():
            return
        left, right = left[unlike], right[unlike]
        both = np.isfinite(left) & np.isfinite(right)
        self.differing += len(left)
        self.beyond += int(np.count_nonzero(~both))
        if both.any():
            self.largest = max(self.largest, float(np.abs(left[both] - right[both]).max()))

    @property
    def relative(self) -> float:
        """The largest difference in units of the largest magnitude."""
        return self.largest / self.scale if self.scale else 0.0

    def difference(self, place: str, tolerance: float) -> Difference | None:
        """What is to be said of the columns; None where they are equal."""
        if not self.differing:
            return None
        text = f"{self.differing:,} of {self.n:,} values differ"
        numbers = self.largest > 0
        if numbers:
            text += f", by at most {self.largest:.3g} ({self.relative:.2g} of the largest value)"
        if self.beyond and numbers and self.beyond < self.differing:
            text += f"; {self.beyond:,} are no finite numbers in one"
        accepted = self.beyond == 0 and self.relative <= tolerance
        return Difference(place, text, accepted, (self.largest, self.relative) if numbers else None)


def hold_together(left: Iterable[Array], right: Iterable[Array]) -> tuple[Tally, int, int]:
    """Compare two streams of blocks of any lengths; the tally of what both have, and the lengths of both."""
    tally, lengths = Tally(), [0, 0]
    sides: list[Iterator[Array]] = [iter(left), iter(right)]
    held: list[Array | None] = [None, None]
    while True:
        for side in (0, 1):
            if held[side] is None:
                held[side] = next((block for block in sides[side] if len(block)), None)
                lengths[side] += 0 if held[side] is None else len(held[side])  # type: ignore[arg-type]
        a, b = held
        if a is None or b is None:
            break
        n = min(len(a), len(b))
        tally.add(a[:n], b[:n])
        held = [a[n:] if len(a) > n else None, b[n:] if len(b) > n else None]
    for side in (0, 1):
        lengths[side] += sum(len(block) for block in sides[side])
    return tally, lengths[0], lengths[1]
