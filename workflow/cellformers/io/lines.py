"""Text in pieces of whole lines, and what keeps a small file from becoming an endless one.

A gzip file of some MB can unpack to gigabytes of one byte, one line, or one name. What counts of cells never are is
refused early: packed more than 500 times, lines over 64 MiB, tens of thousands of equal names in a row.
"""

import gzip
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cellformers.io.files import check_plain

_PIECE = 4 << 20
_LONGEST = 64 << 20
_SUSPECT = 128 << 20  # bytes unpacked, from which on their ratio to the packed ones is looked at
_MOST_PACKED = 500
_MOST_SKIPPED = 10_000
_NAMES = 1 << 16
_FEWEST_NAMES = 600  # that differ of as many


class _Unzipped(gzip.GzipFile):
    """Unpacks a gzip file as long as it unpacks to something plausible."""

    def __init__(self, path: Path) -> None:
        self._packed = path.open("rb")
        super().__init__(fileobj=self._packed, mode="rb")

    def read(self, size: int | None = -1) -> bytes:
        """The next bytes; OSError where it has become too many."""
        data = super().read(size)
        self._check()
        return data

    def readline(self, size: int | None = -1) -> bytes:
        """The next line."""
        line = super().readline(size)
        self._check()
        return line

    def read1(self, size: int = -1) -> bytes:
        """The next bytes that are at hand."""
        data = super().read1(size)
        self._check()
        return data

    def close(self) -> None:
        """Close both."""
        super().close()
        self._packed.close()

    def _check(self) -> None:
        done = self.tell()
        if done > _SUSPECT and done > _MOST_PACKED * (packed := self._packed.tell()):
            raise OSError(
                f"its first {packed:,} bytes unpack to more than {done:,}: no table is packed so tightly"
            )


def open_bytes(path: Path) -> Any:
    """A file's bytes, gunzipped where it is gzipped, whatever its name; UserError for pipes and devices."""
    check_plain(path)
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    return _Unzipped(path) if gzipped else path.open("rb")


def one_line(file: Any) -> bytes:
    """The next line of a binary file.

    Raises
    ------
    OSError
        If it is longer than 64 MiB.
    """
    line: bytes = file.readline(_LONGEST + 1)
    return _not_too_long(line)


def first_line(file: Any, *, skip: Callable[[bytes], bool]) -> tuple[bytes, int]:
    """The first line that is not to be skipped (b"" at the end of the file), and how many were.

    Raises
    ------
    OSError
        If 10,000 are, or a line is longer than 64 MiB.
    """
    for skipped in range(_MOST_SKIPPED):
        line = one_line(file)
        if not line or not skip(line):
            return line, skipped
    raise OSError(f"its first {_MOST_SKIPPED:,} lines hold nothing")


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing."""
    return not line.strip()


def whole_lines(file: Any, size: int = _PIECE) -> Iterator[bytes]:
    """The rest of a binary file in pieces of about `size` bytes that end with a line end; one is added at the end.

    A line longer than `size` makes its piece longer.

    Raises
    ------
    OSError
        If a line is longer than 64 MiB.
    """
    rest: list[bytes] = []
    held = 0
    while piece := file.read(size):
        cut = piece.rfind(b"\n") + 1
        if cut == 0:
            rest.append(piece)
            held += len(piece)
            if held > _LONGEST:
                raise OSError(f"it has a line of more than {_LONGEST >> 20} MiB")
            continue
        yield b"".join([*rest, piece[:cut]])
        rest, held = [piece[cut:]], len(piece) - cut
    last = b"".join(rest)
    if last.strip():
        yield last + b"\n"


def _not_too_long(line: bytes) -> bytes:
    if len(line) > _LONGEST:
        raise OSError(f"it has a line of more than {_LONGEST >> 20} MiB")
    return line


def various(names: Iterable[str]) -> Iterator[str]:
    """The same names.

    Raises
    ------
    OSError
        If of 65,536 in a row under 600 differ: names of cells and genes don't.
    """
    rest = iter(names)
    while some := list(islice(rest, _NAMES)):
        if len(some) == _NAMES and len(set(some)) < _FEWEST_NAMES:
            raise OSError(f"of {_NAMES:,} names in a row {len(set(some))} differ, such as {some[0][:40]!r}")
        yield from some
