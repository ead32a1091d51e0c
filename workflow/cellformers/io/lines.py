"""Text in pieces of whole lines."""

from collections.abc import Iterator
from typing import Any

_PIECE = 4 << 20


def whole_lines(file: Any, size: int = _PIECE) -> Iterator[bytes]:
    """The rest of a binary file in pieces of about `size` bytes that end with a line end; one is added at the end.

    A line longer than `size` makes its piece longer.
    """
    rest = b""
    while piece := file.read(size):
        cut = piece.rfind(b"\n") + 1
        if cut == 0:
            rest += piece
            continue
        yield rest + piece[:cut]
        rest = piece[cut:]
    if rest.strip():
        yield rest + b"\n"
