"""The one exception meant for the user: it says what is wrong, where, and what to do about it.

The command line prints it on one line and exits with status 2; everything else that escapes is a defect of
this package and keeps its traceback.
"""

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        super().__init__(" ".join("; ".join(parts).split()))


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
