"""One process at a time: locks that the kernel drops when their holder dies.

with exclusive("cache/.lock-model"):
    ...
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cellformers.errors import UserError


@contextmanager
def exclusive(path: str | Path, waiting: Callable[[], None] = lambda: None) -> Iterator[bool]:
    """Hold the lock file `path`, which exists only meanwhile; `waiting` is called if another process holds it.

    The kernel drops the lock of a process that dies. Yields False where the file system knows no locks. UserError
    where the folder of `path` can't be made or written to.
    """
    path = Path(path)
    while True:
        handle = _open(path)
        try:
            held = _lock(handle, waiting)
            if held and not _same_file(handle, path):
                continue  # the holder before us removed it; somebody may hold a new one
            try:
                yield held
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(
            f"can't write here ({os.strerror(error.errno or 0)})",
            path=path.parent,
            fix="choose a folder of your own (--output, or CELLFORMERS_HOME)",
        ) from error


def _lock(handle: int, waiting: Callable[[], None]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        waiting()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:  # some cluster file systems are mounted without locks
        return False
    return True


def _same_file(handle: int, path: Path) -> bool:
    try:
        there, here = path.stat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
