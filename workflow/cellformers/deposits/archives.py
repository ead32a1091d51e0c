"""Unpacking what was downloaded, trusting none of it: members of a tar by plain names, gzip as a stream.

    unpack_tar(folder / "GSE155468_RAW.tar", work, expected=...)
    gunzip(folder / "counts.loom.gz", work / "counts.loom", limit=64 << 30)

An archive may ask for a path outside the folder, for links and devices, or for more bytes than a disk has. Only plain
files with plain names are taken, each is written under its own name into a folder that belongs to the caller, and
sizes are bounded.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cellformers.errors import UserError, full_disk

PIECE = 8 << 20
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
# What tarfile raises over archives that are damaged or made to harm; RuntimeError is of headers in headers.
TAR_ERRORS = (tarfile.TarError, EOFError, ArithmeticError, OSError, RuntimeError, ValueError)
_AGAIN = "download it again"


def unpack_tar(archive: Path, folder: Path, *, expected: Callable[[str], bool]) -> dict[str, Path]:
    """Write the members of an uncompressed tar into `folder`; returns their paths by name, in the archive's order.

    Parameters
    ----------
    folder
        An empty folder of the caller's.
    expected
        Whether a member of this name belongs into the archive.

    Raises
    ------
    UserError
        If the file is no tar or is cut off, or a member is a link, a folder or a device, has a name with a folder
        in it, is larger than the archive, is there twice or is not expected. What was written by then stays in
        `folder`, which the caller removes.
    """
    room = _size(archive)
    written: dict[str, Path] = {}
    try:
        with open_tar(archive) as tar:
            for member in tar:
                _check_member(member, archive, room, written, expected)
                content = tar.extractfile(member)
                target = folder / member.name
                if content is None or _write(content, target, limit=member.size) != member.size:
                    raise UserError(f"is cut off within {member.name!r}", path=archive, fix=_AGAIN)
                written[member.name] = target
    except TAR_ERRORS as error:
        if full_disk(error):
            raise
        text = " ".join(str(error).split())[:120]
        raise UserError(f"is not a readable tar archive ({text})", path=archive, fix=_AGAIN) from error
    return written


@contextmanager
def open_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar; no member can be larger than the archive, and no header asks for more memory than that.

    Raises
    ------
    One of TAR_ERRORS
        If it is none.
    """
    with archive.open("rb") as file, tarfile.open(fileobj=_Bounded(file, _size(archive)), mode="r:") as tar:
        yield tar


class _Bounded(io.RawIOBase):
    """A file that gives memory for what it holds only, whatever it is asked for."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size = file, size

    def read(self, n: int = -1) -> bytes:
        left = max(self._size - self._file.tell(), 0)
        return self._file.read(left if n < 0 else min(n, left))

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0 and offset > self._size:
            raise tarfile.ReadError("a member ends behind the end of the file")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _check_member(
    member: tarfile.TarInfo,
    archive: Path,
    room: int,
    written: Iterable[str],
    expected: Callable[[str], bool],
) -> None:
    """Refuse a member that is no plain file of a plain name, too large, repeated or foreign."""
    name = member.name
    if not _PLAIN.fullmatch(name):
        raise UserError(
            f"its member {name[:80]!r} has no plain file name; nothing is unpacked from it",
            path=archive,
            fix=_AGAIN,
        )
    if not member.isreg() or member.issparse():
        raise UserError(
            f"its member {name!r} is a link, a folder or a device, not a plain file", path=archive, fix=_AGAIN
        )
    if member.size > room:
        raise UserError(
            f"its member {name!r} says to be larger than the archive itself", path=archive, fix=_AGAIN
        )
    if name in written:
        raise UserError(f"holds {name!r} twice", path=archive, fix=_AGAIN)
    if not expected(name):
        raise UserError(
            f"holds {name!r}, which this deposit is not known to have",
            path=archive,
            fix="compare it with the deposit's page: the deposit may have changed",
        )


def gunzip(path: Path, target: Path, *, limit: int) -> Path:
    """Unpack a gzip file as a stream into `target`; returns `target`.

    Parameters
    ----------
    limit
        Most bytes that may come out.

    Raises
    ------
    UserError
        If the file is no gzip file, is damaged or cut off, or holds more than `limit` bytes. Then there is no
        `target`.
    """
    _size(path)
    try:
        with gzip.open(path, "rb") as content:
            size = _write(content, target, limit=limit + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        target.unlink(missing_ok=True)
        text = " ".join(str(error).split())[:120]
        raise UserError(f"is a damaged or cut-off gzip file ({text})", path=path, fix=_AGAIN) from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    if size > limit:
        target.unlink()
        raise UserError(
            f"unpacks to more than {limit:,} bytes, which this deposit has not", path=path, fix=_AGAIN
        )
    return target


def _size(path: Path) -> int:
    if not path.is_file():
        raise UserError("no such file", path=path, fix="download the deposit first")
    return path.stat().st_size


def _write(content: IO[bytes] | gzip.GzipFile, target: Path, *, limit: int) -> int:
    """Write at most `limit` bytes of `content` into the new file `target`; how many there were."""
    size = 0
    with target.open("xb") as file:
        while size < limit and (piece := content.read(min(PIECE, limit - size))):
            file.write(piece)
            size += len(piece)
    return size
