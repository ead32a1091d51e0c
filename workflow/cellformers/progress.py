"""Progress on stderr: a bar on a terminal, a line now and then in a log.

with progress("tokenize", total=10_000, unit="cells") as advance:
    advance(512)
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cellformers.errors import one_line

SECONDS_BETWEEN_LINES = 20.0


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Meter:
    """Counts what is done and writes about it, seldom enough to cost nothing."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = one_line(label), total, unit
        self.done, self.started = 0, time.monotonic()
        self.bar = sys.stderr.isatty()
        self.shown_at = self.started

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.shown_at >= (0.2 if self.bar else SECONDS_BETWEEN_LINES):
            self.shown_at = now
            self.show(now)

    def text(self, now: float) -> str:
        elapsed = max(now - self.started, 1e-9)
        rate = self.done / elapsed
        if not self.total:
            return f"{self.label}: {self.done:,} {self.unit}, {rate:,.0f} a second"
        left = (self.total - self.done) / rate if rate else float("inf")
        ahead = f", {_clock(left)} to go" if left < 1e6 else ""
        return f"{self.label}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.0f} a second{ahead}"

    def show(self, now: float) -> None:
        if not self.bar:
            print(self.text(now), file=sys.stderr, flush=True)
            return
        drawn = ""
        if self.total:
            filled = round(24 * min(self.done / self.total, 1.0))
            drawn = "━" * filled + "╌" * (24 - filled) + " "
        print(f"\r\033[2K{drawn}{self.text(now)}", end="", file=sys.stderr, flush=True)

    def finish(self) -> None:
        elapsed = max(time.monotonic() - self.started, 1e-9)
        end = "\r\033[2K" if self.bar else ""
        line = f"{self.label}: {self.done:,} {self.unit} in {_clock(elapsed)}, {self.done / elapsed:,.0f} a second"
        print(end + line, file=sys.stderr, flush=True)


@contextmanager
def progress(
    label: str, total: int | None = None, *, unit: str = "cells", quiet: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield a function to call with the number of units done; says how it went when the block ends."""
    if quiet:
        yield lambda _: None
        return
    meter = _Meter(label, total, unit)
    try:
        yield meter.advance
    except BaseException:
        if meter.bar:
            print(file=sys.stderr)
        raise
    meter.finish()


def say(message: str, *, quiet: bool = False) -> None:
    """One line on stderr."""
    if not quiet:
        print(one_line(message), file=sys.stderr, flush=True)
