"""The one exception meant for the user: it says what is wrong, where, and what to do about it.

The command line prints it on one line and exits with status 2; everything else that escapes is a defect of
this package and keeps its traceback.
"""

import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path

LONGEST = 4_000  # characters of a message
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full_disk(error: object) -> int | None:
    """The errno of an error that is of a full disk, or of a file that may not grow; None for others.

    HDF5 and safetensors have it in the text of errors of their own.
    """
    if isinstance(error, OSError) and error.errno is not None:
        number = error.errno
    else:
        found = (
            re.search(r"(?:errno = |os error )(\d+)", str(error)) if isinstance(error, Exception) else None
        )
        number = int(found[1]) if found else 0
    return number if number in DISK_FULL else None


def one_line(text: str) -> str:
    """A text for a terminal: one line, without what would move its cursor, colour it or turn its direction.

    Names of cells and files come from others, and are part of messages. What is left out is shown as \\x1b; of a very
    long text the middle is.
    """
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return printable(text)


def printable(text: str) -> str:
    """A text without line breaks and tabs, which become blanks, and with other control characters as \\x1b."""
    shown = "".join(
        c if c.isprintable() or c.isspace() else c.encode("unicode_escape").decode("ascii") for c in text
    )
    return " ".join(shown.split())


class UserError(Exception):
    """Something only the user can mend.

    Parameters
    ----------
    what
        What is wrong, without a full stop.
    path
        The file or folder it is about, put in front.
    fix
        What to do about it, put behind.
    """

    def __init__(self, what: str, *, path: str | Path | None = None, fix: str | None = None) -> None:
        self.what, self.path, self.fix = what, path, fix
        parts = [what if path is None else f"{path}: {what}"]
        if fix:
            parts.append(fix)
        super().__init__(one_line("; ".join(parts)))


class DiskFullError(UserError):
    """There is no room for what is written, which is no fault of what was asked for."""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate spelt most like `word`, or None if none is close."""
    matches = difflib.get_close_matches(str(word), [str(c) for c in candidates], n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """A hint that names the nearest candidate, else the first few there are."""
    known = [str(c) for c in candidates]
    close = nearest(word, known)
    if close is not None:
        return f"did you mean {close!r}?"
    shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
    return f"there is: {shown}" if known else "there is none"
