"""The commit of the checkout that this package lies in, and whether its files still are those of the commit.

Git's files are read as they are: no `git` is needed, and no hook, filter or setting of a repository is run. Formats:
gitrepository-layout(5), gitformat-pack(5).
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

KINDS = {1: "commit", 2: "tree", 3: "blob", 4: "tag"}
_OFFSET_DELTA, _NAMED_DELTA = 6, 7
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_LINKS = 8


class UnreadableError(Exception):
    """The repository holds something that is not understood here, e.g. sha256 names; the text says what."""


def checkout_state(root: Path) -> dict[str, object]:
    """Commit (40 digits) and the changed files of a checkout; None and a reason for what can't be known.

    Parameters
    ----------
    root
        Folder of the checkout: holds `.git` and the Snakefile.

    Returns
    -------
    dict
        commit, dirty (whether a tracked file was changed or removed), and `reason` where one of both is None.
    """
    if not (root / ".git").exists() or not (root / "Snakefile").is_file():
        return {"commit": None, "dirty": None, "reason": "the package is not in a checkout"}
    commit = None
    try:
        repository = Repository(root / ".git")
        commit = repository.head()
        return {"commit": commit, "dirty": any(_changed(repository, root, commit))}
    except UnreadableError as error:
        return {"commit": commit, "dirty": None, "reason": str(error)}
    except (OSError, ValueError, IndexError, struct.error, zlib.error, RecursionError):
        return {"commit": commit, "dirty": None, "reason": "the repository can't be read"}


class Repository:
    """A git repository, opened for reading objects by their names."""

    def __init__(self, path: Path) -> None:
        if path.is_file():  # of a worktree or a submodule
            path = path.parent / path.read_text(encoding="utf-8").strip().removeprefix("gitdir:").strip()
        self.folder = path
        common = path / "commondir"
        self.common = path / common.read_text(encoding="utf-8").strip() if common.is_file() else path

    def head(self) -> str:
        """The commit that is checked out."""
        value = (self.folder / "HEAD").read_text(encoding="utf-8").strip()
        for _ in range(_MOST_LINKS):
            if not value.startswith("ref:"):
                break
            value = self._ref(value.removeprefix("ref:").strip())
        if not _COMMIT.fullmatch(value):
            raise UnreadableError("nothing is committed, or commits have other names than sha1")
        return value

    def _ref(self, name: str) -> str:
        if not name.startswith("refs/") or ".." in name:
            raise UnreadableError("HEAD is not a branch")
        for folder in (self.folder, self.common):
            if (folder / name).is_file():
                return (folder / name).read_text(encoding="utf-8").strip()
        packed = self.common / "packed-refs"
        for line in packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else ():
            if line.endswith(f" {name}"):
                return line.partition(" ")[0]
        raise UnreadableError("nothing is committed")

    def read(self, name: str) -> tuple[str, bytes]:
        """Kind and content of an object, by the 40 digits of its name."""
        loose = self.common / "objects" / name[:2] / name[2:]
        if loose.is_file():
            header, _, content = zlib.decompress(loose.read_bytes()).partition(b"\0")
            return header.split(b" ")[0].decode(), content
        for index in sorted((self.common / "objects" / "pack").glob("*.idx")):
            offset = _find(index, bytes.fromhex(name))
            if offset is not None:
                return self._packed(index.with_suffix(".pack"), offset)
        raise UnreadableError("objects of the commit are not here (a partial clone, or alternates)")

    def _packed(self, pack: Path, offset: int) -> tuple[str, bytes]:
        with pack.open("rb") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            kind = byte >> 4 & 7
            while byte & 128:
                byte = file.read(1)[0]  # the size, which zlib knows too
            if kind == _OFFSET_DELTA:
                byte = file.read(1)[0]
                back = byte & 127
                while byte & 128:
                    byte = file.read(1)[0]
                    back = (back + 1 << 7) | (byte & 127)
            elif kind == _NAMED_DELTA:
                base = file.read(20).hex()
            inflate = zlib.decompressobj()
            content = b""
            while not inflate.eof and (piece := file.read(1 << 16)):
                content += inflate.decompress(piece)
        if kind == _OFFSET_DELTA:
            of, start = self._packed(pack, offset - back)
            return of, _apply(content, start)
        if kind == _NAMED_DELTA:
            of, start = self.read(base)
            return of, _apply(content, start)
        return KINDS[kind], content


def _find(index: Path, name: bytes) -> int | None:
    """Where an object lies in the pack of an index of version 2; None: not there."""
    with index.open("rb") as file:
        if file.read(8) != b"\xfftOc\0\0\0\2":
            raise UnreadableError("a pack has an index of another version")
        fanout = struct.unpack(">256I", file.read(1024))
        lo, hi, total = (fanout[name[0] - 1] if name[0] else 0), fanout[name[0]], fanout[255]
        file.seek(1032 + lo * 20)
        names = file.read((hi - lo) * 20)
        at = next((i for i in range(hi - lo) if names[i * 20 : i * 20 + 20] == name), None)
        if at is None:
            return None
        file.seek(1032 + total * 24 + (lo + at) * 4)
        (offset,) = struct.unpack(">I", file.read(4))
        if offset & 1 << 31:  # beyond 2 GB
            file.seek(1032 + total * 28 + (offset & (1 << 31) - 1) * 8)
            (offset,) = struct.unpack(">Q", file.read(8))
        return int(offset)


def _apply(delta: bytes, base: bytes) -> bytes:
    """The content that a delta makes of its base."""
    at = 0
    for _ in range(2):  # the sizes of base and result
        while delta[at] & 128:
            at += 1
        at += 1
    parts = []
    while at < len(delta):
        order = delta[at]
        at += 1
        if not order & 128:
            parts.append(delta[at : at + order])
            at += order
            continue
        value = 0
        for bit in range(7):
            if order >> bit & 1:
                value |= delta[at] << 8 * bit
                at += 1
        offset, size = value & (1 << 32) - 1, (value >> 32) or 1 << 16
        parts.append(base[offset : offset + size])
    return b"".join(parts)


def _files(repository: Repository, tree: str, folder: str = "") -> Iterator[tuple[str, str]]:
    """(path, name of its blob) of all plain files of a tree; links and submodules are passed over."""
    _, content = repository.read(tree)
    while content:
        head, _, rest = content.partition(b"\0")
        mode, _, name = head.partition(b" ")
        blob, content = rest[:20].hex(), rest[20:]
        path = folder + name.decode("utf-8", "surrogateescape")
        if mode == b"40000":
            yield from _files(repository, blob, path + "/")
        elif mode.startswith(b"100"):
            yield path, blob


def _changed(repository: Repository, root: Path, commit: str) -> Iterator[str]:
    """Tracked files that are not as the commit has them."""
    kind, content = repository.read(commit)
    if kind != "commit":
        raise UnreadableError("HEAD is not a commit")
    tree = content.split(b"\n", 1)[0].split(b" ")[1].decode()
    for path, blob in _files(repository, tree):
        file = root / path
        if not file.is_file():
            yield path
            continue
        data = file.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() != blob:
            yield path
