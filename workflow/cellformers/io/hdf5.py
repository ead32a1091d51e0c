"""HDF5 without surprises: objects inside the file only, and fast reading of stretches of one-dimensional arrays.

Links and datasets that lead to other files are refused: a count file that was downloaded must not make us read
others. Stored-as-is arrays are read with `preadv` from where they lie, which is faster than through the library and
lets other Python threads run meanwhile.

The library reads all else through `_Checked`, because it loops for ever, unstoppably, where the part of a file that
holds texts has been overwritten with zeros (HDF5 2.0.0 and before). Tables of numbers it reads by itself (`plain`).
"""

import io
import os
import struct
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import h5py
import numpy as np

from cellformers.errors import UserError
from cellformers.io.inflate import DEFLATE, SHUFFLE, InflatedStretch, check_packed, check_stored, filters_of
from cellformers.io.stretch import ChunkedStretch, Stretch, check_chunk

Array = np.ndarray[Any, Any]
_SMALL_CHUNK = 1 << 16  # bytes; below, a call for each costs more than it saves
_MOST_LINKS = 16
_HEAP, _HEAP_OBJECT = b"GCOL\x01", struct.Struct("<H6xQ").unpack_from
_WINDOW = 1 << 13  # bytes of a heap that are looked at together
_MOST_AHEAD = 1 << 16  # bytes of a read in which a heap may begin


class _Checked(io.FileIO):
    """A file for HDF5 to read from; heaps of texts are looked at before it sees them. Its name is `quote(path)`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._quoted = quote(str(path))

    def __repr__(self) -> str:
        return self._quoted

    def __del__(self) -> None:
        self.close()  # HDF5 has no way of saying that it is done

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; OSError where a heap begins in it that would never be left."""
        n, start = 0, self.tell()
        with memoryview(buffer) as view:
            while n < len(view) and (got := super().readinto(view[n:])):
                n += got
            # the library reads a heap in parts, the first of them perhaps with what stands before it
            head = bytes(view[: min(n, _MOST_AHEAD)])
        at = head.find(_HEAP)
        while at >= 0:
            _check_heap(self.fileno(), start + at)
            at = head.find(_HEAP, at + 1)
        return n


def _check_heap(file: int, start: int) -> None:
    """OSError where a global heap has an object that takes no room or more than there is: the library may never end.

    After "GCOL", 4 bytes and the heap's size (8), objects follow: number (2 bytes; 0 is free space), 6 bytes, size (8),
    and the content, padded to 8 bytes (HDF5 File Format Specification 3.0, III.E).
    """
    first, window = 0, os.pread(file, _WINDOW, start)
    if len(window) < 16:
        return
    (end,) = struct.unpack_from("<Q", window, 8)
    at = 16
    while at <= end - 16:
        if at + 16 > first + len(window):
            first, window = at, os.pread(file, _WINDOW, start + at)
            if len(window) < 16:
                return  # the file is cut off, and the library says so
        number, size = _HEAP_OBJECT(window, at - first)
        at += 16 + (size + 7) // 8 * 8 if number else size
        if at > end or not (number or size):
            raise OSError("its texts have been overwritten")


def path_of(node: Any) -> str:
    """The path of the file that an object belongs to."""
    name = node.file.filename
    return unquote(name) if node.file.driver == "fileobj" else name


def plain(dataset: h5py.Dataset) -> h5py.Dataset:
    """The same table, read by the library alone: quicker, and as safe where there are no texts in it."""
    if dataset.file.driver != "fileobj":
        return dataset
    return h5py.File(path_of(dataset), "r")[dataset.name]


def close_plain(dataset: h5py.Dataset | None) -> None:
    """Close the file that `plain` opened."""
    if dataset and dataset.file.driver != "fileobj":
        dataset.file.close()


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file read-only.

    Raises
    ------
    UserError
        If it is truncated or damaged.
    """
    try:
        with h5py.File(path, "r"):  # what is wrong, or locks it, is told best so
            pass
        return h5py.File(_Checked(path), "r")
    except OSError as error:
        text = " ".join(str(error).split())
        if error.errno == 13:
            raise UserError("may not be read (permission denied)", path=path) from error
        if error.errno == 11 or "unable to lock" in text:
            raise UserError(
                "is locked by another program",
                path=path,
                fix="close it there, or set HDF5_USE_FILE_LOCKING=FALSE",
            ) from error
        what = "is truncated" if "truncated" in text else f"is not a readable HDF5 file ({text[:120]})"
        raise UserError(what, path=path, fix="copy or download it again") from error


def names_in(group: Any) -> list[str]:
    """Names of what is in a group of h5py or zarr, but those that are no Unicode, which h5py gives as bytes."""
    return [name for name in group if isinstance(name, str)]


def child(node: Any, name: str, *, depth: int = 0) -> Any:
    """The object `name` ("a/b/c") under an HDF5 group, None where there is none.

    Raises
    ------
    UserError
        If the way leads out of the file.
    """
    for part in name.strip("/").split("/"):
        if not isinstance(node, h5py.Group):
            return None
        link = node.get(part, getlink=True)
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise UserError(
                f"{part!r} is a link to another file ({link.filename})",
                path=path_of(node),
                fix="copy the data into one file (h5repack, or read and write it with anndata)",
            )
        if isinstance(link, h5py.SoftLink):
            if depth > _MOST_LINKS:
                return None
            start = node.file if link.path.startswith("/") else node
            node = child(start, link.path, depth=depth + 1)
        else:
            node = node[part]
    if isinstance(node, h5py.Dataset):
        _refuse_outside(node)
        try:
            check_chunk(node.chunks, node.dtype.itemsize)
        except TypeError as error:  # a type that numpy doesn't have
            raise OSError(f"{node.name} can't be read: {error}") from error
    return node


def _refuse_outside(dataset: h5py.Dataset) -> None:
    outside = [entry[0] for entry in dataset.external or ()]
    if dataset.is_virtual:
        outside += [source.file_name for source in dataset.virtual_sources() if source.file_name != "."]
    if outside:
        raise UserError(
            f"{dataset.name} is stored in another file ({outside[0]})",
            path=path_of(dataset),
            fix="copy the data into one file",
        )
    if dataset.is_virtual:  # its sources may lead in a circle, in which the library overflows its stack
        raise UserError(
            f"{dataset.name} is a virtual dataset",
            path=path_of(dataset),
            fix="write the file again with anndata",
        )


class StoredStretch:
    """A one-dimensional dataset that is stored as it is, read from where it lies."""

    def __init__(self, dataset: h5py.Dataset, offsets: Array) -> None:
        self.dtype = np.dtype(dataset.dtype)
        self.size = int(dataset.shape[0])
        self._name, self._path = dataset.name, path_of(dataset)
        self._offsets = offsets
        self._chunk = int(dataset.chunks[0]) if dataset.chunks else self.size
        self._descriptor: int | None = None

    def read(self, lo: int, hi: int, scratch: Array | None = None) -> Array:
        """Items lo to hi, in `scratch` (same dtype, long enough) where given and in a new array otherwise."""
        out = np.empty(hi - lo, self.dtype) if scratch is None else scratch[: hi - lo]
        if hi <= lo:
            return out
        if self._descriptor is None:
            self._descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        item = self.dtype.itemsize
        view = memoryview(out.view(np.uint8))  # type: ignore[arg-type]
        position = lo
        while position < hi:
            chunk, within = divmod(position, self._chunk)
            stop = min(hi, (chunk + 1) * self._chunk)
            at = int(self._offsets[chunk]) + within * item
            todo = view[(position - lo) * item : (stop - lo) * item]
            while len(todo):
                got = os.preadv(self._descriptor, [todo], at)
                if got <= 0:
                    raise EOFError(f"{self._name} ends early")
                todo, at = todo[got:], at + got
            position = stop
        return out

    def close(self) -> None:
        """Close the second handle on the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Opened:
    """Mixed into the ways through the library: the dataset is opened for it when it is read first."""

    _array: Any
    _plain: Any = None

    def read(self, lo: int, hi: int, scratch: Array | None = None) -> Array:
        """Items lo to hi."""
        if self._plain is None:
            self._plain = self._array = plain(self._array)
        return super().read(lo, hi, scratch)  # type: ignore[misc]

    def close(self) -> None:
        """Close the second handle on the file."""
        super().close()  # type: ignore[misc]
        close_plain(self._plain)


class _InflatedStretch(_Opened, InflatedStretch):
    """Gzipped chunks."""


class _ChunkedStretch(_Opened, ChunkedStretch):
    """The library's way into a dataset."""


def stretch(dataset: h5py.Dataset) -> Stretch:
    """The quickest way to read stretches of a one-dimensional dataset."""
    check_stored(dataset)
    offsets = _offsets(dataset)
    if offsets is not None:
        return StoredStretch(dataset, offsets)
    filters = filters_of(dataset)
    if filters in ([DEFLATE], [SHUFFLE, DEFLATE]) and stored_as_is(dataset):
        return _InflatedStretch(dataset, shuffled=len(filters) == 2)
    check_packed(dataset)
    return _ChunkedStretch(dataset)


def stored_as_is(dataset: h5py.Dataset) -> bool:
    """Whether the bytes that a type stores (once filters are undone) are those that numpy has in memory."""
    dtype = dataset.dtype
    if dtype.kind not in "iuf" or not dtype.isnative or dataset.is_virtual or dataset.external:
        return False
    # no padding or odd offsets within the bytes
    return bool(dataset.id.get_type() == h5py.h5t.py_create(dtype))


def _offsets(dataset: h5py.Dataset) -> Array | None:
    """Where the chunks (one, if contiguous) of an unfiltered dataset lie in the file; None: read by the library."""
    dtype = dataset.dtype
    plist = dataset.id.get_create_plist()
    if (
        dataset.ndim != 1
        or not stored_as_is(dataset)
        or dataset.size == 0
        or plist.get_nfilters()
        or dataset.file.userblock_size
        or dataset.file.driver not in ("sec2", "stdio", "fileobj")
    ):
        return None
    layout = plist.get_layout()
    if layout == h5py.h5d.CONTIGUOUS:
        offset = dataset.id.get_offset()
        return None if offset is None else np.array([offset], dtype=np.int64)
    if layout != h5py.h5d.CHUNKED or dataset.chunks[0] * dtype.itemsize < _SMALL_CHUNK:
        return None
    chunk = dataset.chunks[0]
    n_chunks = -(-dataset.shape[0] // chunk)
    if dataset.id.get_num_chunks() != n_chunks:
        return None  # some were never written: the library fills them in
    offsets = np.full(n_chunks, -1, dtype=np.int64)

    def note(info: Any) -> None:
        offsets[info.chunk_offset[0] // chunk] = info.byte_offset

    dataset.id.chunk_iter(note)
    return None if (offsets < 0).any() else offsets
