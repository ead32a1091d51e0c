"""AnnData zarr stores, of zarr format 2 and 3: a folder, or the same zipped.

zarr decodes chunks with whatever codec a store names, and one of numcodecs' is pickle, which runs code: only codecs
that compress, and those of texts, are let through. What zarr raises about a damaged store is of many kinds; here it
becomes an OSError, which `source.reading` turns into a line.
"""

import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cellformers.errors import UserError
from cellformers.io.h5ad import open_anndata
from cellformers.io.inflate import MOST_BLIND, inflater
from cellformers.io.source import CountSource, ReadOptions
from cellformers.io.stretch import ChunkedStretch, check_chunk

_CODECS = {
    "adler32", "astype", "bitround", "blosc", "bytes", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset",
    "fletcher32", "gzip", "jenkins_lookup3", "lz4", "lzma", "packbits", "sharding_indexed", "shuffle", "transpose",
    "vlen-bytes", "vlen-utf8", "zlib", "zstd",
}  # fmt: skip


def _guarded(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call zarr; OSError where it fails in whatever way."""
    try:
        return function(*arguments, **options)
    except (MemoryError, UserError):
        raise
    except Exception as error:
        raise OSError(f"zarr: {type(error).__name__}: {error}") from error


class _Group:
    """A zarr group that raises OSError only."""

    def __init__(self, group: Any, path: Path) -> None:
        self._group, self._path = group, path
        self.attrs: dict[str, Any] = _guarded(lambda: dict(group.attrs))

    def keys(self) -> list[str]:
        """Names of what is in it."""
        return _guarded(lambda: list(self._group.keys()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __contains__(self, name: str) -> bool:
        return _guarded(lambda: name in self._group)

    def __getitem__(self, name: str) -> "_Group | _Array":
        node = _guarded(lambda: self._group[name])
        return _Array(node, self._path) if hasattr(node, "shape") else _Group(node, self._path)


class _Array:
    """A zarr array that raises OSError only.

    Raises
    ------
    UserError
        If it names a codec that may do more than decompress, or its chunks are too large.
    """

    def __init__(self, array: Any, path: Path) -> None:
        names = _guarded(lambda: list(_codecs(array.metadata.to_dict())))
        for name in names:
            if name not in _CODECS:
                raise UserError(
                    f"an array is stored with the codec {name!r}, which is not known to be harmless",
                    path=path,
                    fix="write it again with anndata",
                )
        self._array, self._path, self._blosc = array, path, "blosc" in names
        self.attrs: dict[str, Any] = _guarded(lambda: dict(array.attrs))
        self.shape = _guarded(lambda: tuple(map(int, array.shape)))
        self.ndim = len(self.shape)
        self.dtype = _guarded(lambda: np.dtype(array.dtype))
        self.chunks = _guarded(lambda: tuple(map(int, getattr(array, "shards", None) or array.chunks)))
        self.size = int(np.prod(self.shape, dtype=object))
        check_chunk(self.chunks, self.dtype.itemsize)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        if self._blosc:
            self._check_blosc(key if isinstance(key, tuple) else (key,))
        return _guarded(lambda: self._array[key])

    def _check_blosc(self, key: tuple[Any, ...]) -> None:
        """OSError where a chunk says that it unpacks to more than is bearable: blosc gets room for that first.

        The size is in bytes 4 to 7 of a chunk (c-blosc, README_CHUNK_FORMAT).
        """
        ranges = []
        for n, chunk, item in zip_longest(self.shape, self.chunks, key):
            low, high, _ = (item if isinstance(item, slice) else slice(None)).indices(n)
            ranges.append(range(low // max(chunk, 1), -(-high // max(chunk, 1))))
        for corner in product(*ranges):
            name = _guarded(self._array.metadata.encode_chunk_key, corner)
            check_chunk((int.from_bytes(self._start_of(f"{self._array.path}/{name}")[4:8], "little"),), 1)

    def _start_of(self, name: str) -> bytes:
        """The first bytes of a chunk; none where it is not stored."""
        try:
            if self._path.is_dir():
                with (self._path / name).open("rb") as file:
                    return file.read(16)
            with zipfile.ZipFile(self._path) as archive, archive.open(name) as file:
                return file.read(16)
        except (FileNotFoundError, KeyError):
            return b""
        except zipfile.BadZipFile as error:
            raise OSError(f"zarr: {error}") from error

    def stored_bytes(self) -> int:
        """What its chunks take in the store."""
        return int(_guarded(self._array.nbytes_stored))


def _codecs(node: Any) -> Iterator[str]:
    """Names of the codecs in an array's metadata: `id` in format 2, `name` in format 3, nested in shards."""
    if isinstance(node, dict):
        for key in ("compressor", "filters", "codecs", "index_codecs"):
            for codec in node.get(key) or () if isinstance(node.get(key), list | tuple) else [node.get(key)]:
                if codec is not None:
                    yield from _codec(codec)


def _codec(codec: Any) -> Iterator[str]:
    described = (
        codec if isinstance(codec, dict) else codec.get_config() if hasattr(codec, "get_config") else {}
    )
    name = described.get("id", described.get("name"))
    yield str(name).removeprefix("numcodecs.")
    yield from _codecs(described.get("configuration"))


def _check_zip(path: Path) -> None:
    """Refuse a zip that is damaged or unpacks to pieces too large to be held.

    Python's reader unpacks all of a member, and only then cuts it to the size that the archive says.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            check_chunk((info.file_size,), 1)
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise OSError(
                    f"its {info.filename[:80]} is packed by method {info.compress_type}, not deflate"
                )
            if info.compress_type == zipfile.ZIP_DEFLATED and info.compress_size > MOST_BLIND:
                _check_deflated(file, info)


def _check_deflated(file: BinaryIO, info: zipfile.ZipInfo) -> None:
    """OSError where a member of a zip unpacks to more than the archive says, or has more bytes than the file."""
    if info.compress_size > os.fstat(file.fileno()).st_size:
        raise OSError(f"its {info.filename[:80]} is cut off")
    file.seek(info.header_offset)
    header = file.read(30)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    file.seek(name + extra, os.SEEK_CUR)
    packed = file.read(info.compress_size)
    if len(inflater.decompressobj(-zlib.MAX_WBITS).decompress(packed, info.file_size + 1)) > info.file_size:
        raise OSError(f"its {info.filename[:80]} unpacks to more than it should hold")


def _check_folder(path: Path) -> None:
    """Refuse a store that has links, which may lead anywhere, or pipes, which are waited for without end."""
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            mode = os.lstat(os.path.join(folder, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                inside = Path(folder, name).relative_to(path)
                raise UserError(f"{inside} in it is no plain file", path=path, fix="copy the store (cp -rL)")


def open_zarr(path: Path, options: ReadOptions) -> CountSource:
    """Open an AnnData zarr store."""
    import zarr

    with ExitStack() as stack:
        store: Any = str(path)
        try:
            if path.is_file():
                _check_zip(path)
                store = stack.enter_context(zarr.storage.ZipStore(path, mode="r"))
            else:
                _check_folder(path)
            group = zarr.open_group(store, mode="r")
        except UserError:
            raise
        except Exception as error:  # (zarr has errors of many kinds for a damaged store)
            text = " ".join(str(error).split())
            raise UserError(
                f"is no readable zarr group ({text[:120]})", path=path, fix="write it again"
            ) from error
        root = _Group(group, path)
        if "obs" not in root:
            raise UserError(
                "is a zarr store, but not of AnnData (no obs)", path=path, fix="give an AnnData store"
            )
        source = open_anndata(root, path, options, ChunkedStretch)
        source.resources = stack.pop_all()
    return source
