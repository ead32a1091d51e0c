"""Reading a stretch of a long one-dimensional array, whatever library holds it."""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]
_MOST_CHUNK = 512 << 20  # bytes; a chunk is unpacked whole


def check_chunk(chunks: Sequence[int] | None, itemsize: int) -> None:
    """OSError where an array is stored in chunks too large to be held."""
    size = math.prod(chunks) * itemsize if chunks else 0
    if size > _MOST_CHUNK:
        raise OSError(f"it is stored in chunks of {size / 2**30:.1f} GiB; write it with chunks under 0.5")


class Stretch(Protocol):
    """A one-dimensional array that is read a stretch at a time."""

    dtype: np.dtype[Any]
    size: int

    def read(self, lo: int, hi: int, scratch: Array | None = None) -> Array:
        """Items lo to hi: in `scratch` (same dtype, long enough) where given, in a new array otherwise."""

    def close(self) -> None:
        """Free what is held."""


class ChunkedStretch:
    """An h5py or wrapped zarr array read in whole chunks; the last is kept, so that none is decompressed twice."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.dtype = np.dtype(array.dtype)
        self.size = int(array.shape[0])
        chunks = array.chunks
        check_chunk(chunks, self.dtype.itemsize)
        self._chunk = max(1, int(chunks[0])) if chunks else 1
        self._kept = np.empty(0, self.dtype)
        self._kept_at = 0

    def read(self, lo: int, hi: int, scratch: Array | None = None) -> Array:
        """Items lo to hi."""
        out = np.empty(hi - lo, self.dtype) if scratch is None else scratch[: hi - lo]
        done = 0
        if self._kept_at <= lo < self._kept_at + len(self._kept):
            part = self._kept[lo - self._kept_at : hi - self._kept_at]
            done = len(part)
            out[:done] = part
        if lo + done < hi:
            start = lo + done
            stop = min(self.size, -(-hi // self._chunk) * self._chunk)
            part = np.asarray(self._array[start:stop])
            if len(part) != stop - start:
                raise EOFError("an array ends early")
            out[done:] = part[: hi - start]
            self._kept_at = max(start, (stop - 1) // self._chunk * self._chunk)
            self._kept = part[self._kept_at - start :].copy()
        return out

    def close(self) -> None:
        """Let go of the chunk."""
        self._kept = np.empty(0, self.dtype)
