"""Unpacking gzip chunks of HDF5 ourselves: quicker than through the library, and never to more than they should hold.

The library unpacks a chunk until its stream ends, were it gigabytes for a chunk of some kB.
"""

import importlib
import math
import zlib
from typing import Any

import h5py
import numpy as np

from cellformers.io.stretch import Array, ChunkedStretch

SHUFFLE, DEFLATE = 2, 1  # numbers of the filters in HDF5
_SLACK = 1024  # bytes that packing may add
_MOST_PACKED = 1100  # times smaller than what it holds: more than deflate can
MOST_BLIND = 3 << 19  # stored bytes; a thousand times as many are still bearable


def _inflater() -> Any:
    """zlib-ng's module, else zlib: the same functions and bytes, several times slower."""
    try:
        return importlib.import_module("zlib_ng.zlib_ng")
    except ImportError:
        return zlib


inflater = _inflater()


def inflate(source: bytes, size: int, name: str) -> bytes | None:
    """A chunk decompressed; None where it is no compressed one.

    Raises
    ------
    EOFError
        If it holds more or less than `size` bytes: the library would fill it up with whatever is in memory.
    """
    stream = inflater.decompressobj(zlib.MAX_WBITS)
    try:
        chunk: bytes = stream.decompress(source, size + 1)
    except inflater.error:
        return None
    if len(chunk) <= size and not stream.eof:
        return None
    if len(chunk) != size:
        raise EOFError(
            f"a chunk of {name} has {'more' if len(chunk) > size else len(chunk)} bytes, not {size}"
        )
    return chunk


def filters_of(dataset: h5py.Dataset) -> list[int]:
    """Numbers of the filters that chunks went through, in order."""
    plist = dataset.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


def check_packed(dataset: h5py.Dataset) -> None:
    """OSError where a gzipped dataset, about to be read by the library, has a chunk that unpacks to no end."""
    filters = filters_of(dataset)
    if DEFLATE not in filters:
        return
    if filters.count(DEFLATE) > 1:
        raise OSError(f"{dataset.name} is packed twice")
    if dataset.id.get_storage_size() <= MOST_BLIND:
        return
    size = math.prod(dataset.chunks) * dataset.dtype.itemsize
    large: dict[tuple[int, ...], int] = {}
    dataset.id.chunk_iter(
        lambda info: large.update({info.chunk_offset: info.size}) if info.size > MOST_BLIND else None
    )
    for corner, n_stored in large.items():
        if n_stored > 2 * size + _SLACK:
            raise OSError(f"a chunk of {dataset.name} is stored in more bytes than it holds")
        _, stored = dataset.id.read_direct_chunk(corner)
        if len(inflater.decompressobj(zlib.MAX_WBITS).decompress(stored, size + 1)) > size:
            raise OSError(f"a chunk of {dataset.name} unpacks to more than it should hold")


def check_names(array: Any) -> None:
    """OSError where an array of names declares many more than what is stored of them can hold, or unpacks to no end.

    For h5py's datasets and what `zarr` wraps. Where nothing is stored, every item is the same fill value: no names.
    """
    size = math.prod(array.shape) * array.dtype.itemsize
    stored = array.id.get_storage_size() if isinstance(array, h5py.Dataset) else array.stored_bytes()
    if size > _MOST_PACKED * (stored + 1024):
        raise OSError(f"{math.prod(array.shape):,} names are declared, {stored:,} bytes are stored of them")
    if isinstance(array, h5py.Dataset):
        check_packed(array)


def check_stored(dataset: h5py.Dataset) -> None:
    """OSError where a dataset declares many more numbers than what is stored of it can hold."""
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    stored = dataset.id.get_storage_size()
    others = set(filters_of(dataset)) - {SHUFFLE, DEFLATE}  # which may pack better
    if size > _MOST_PACKED * (stored + 1024) and not (others and stored):
        raise OSError(
            f"{math.prod(dataset.shape):,} numbers are declared, {stored:,} bytes are stored of them"
        )


class InflatedStretch(ChunkedStretch):
    """A one-dimensional dataset of gzipped, perhaps shuffled chunks."""

    def __init__(self, dataset: h5py.Dataset, *, shuffled: bool) -> None:
        super().__init__(dataset)
        self._shuffled, self._last, self._number = shuffled, np.empty(0, self.dtype), -1
        self._stored = np.empty(2 * self._chunk * self.dtype.itemsize + _SLACK, np.uint8)

    def read(self, lo: int, hi: int, scratch: Array | None = None) -> Array:
        """Items lo to hi."""
        out = np.empty(hi - lo, self.dtype) if scratch is None else scratch[: hi - lo]
        position = lo
        while position < hi:
            number = position // self._chunk
            if number != self._number:
                self._last, self._number = self._unpacked(number), number
            start = number * self._chunk
            stop = min(hi, start + self._chunk)
            out[position - lo : stop - lo] = self._last[position - start : stop - start]
            position = stop
        return out

    def _unpacked(self, number: int) -> Array:
        """All items of a chunk; by the library where it isn't there, or not stored like the others."""
        start = number * self._chunk
        try:
            mask, stored = self._array.id.read_direct_chunk((start,), out=self._stored)
            chunk = None if mask else inflate(stored, self._chunk * self.dtype.itemsize, self._array.name)
        except RuntimeError:
            chunk = None
        except ValueError:  # no room for it
            raise OSError(f"a chunk of {self._array.name} is stored in more bytes than it holds") from None
        if chunk is None:
            return np.asarray(self._array[start : start + self._chunk])
        if not self._shuffled:
            return np.frombuffer(chunk, self.dtype)
        planes = np.frombuffer(chunk, np.uint8).reshape(self.dtype.itemsize, self._chunk)
        return np.ascontiguousarray(planes.T).view(self.dtype).ravel()

    def close(self) -> None:
        """Let go of the chunk."""
        self._last, self._number = np.empty(0, self.dtype), -1
