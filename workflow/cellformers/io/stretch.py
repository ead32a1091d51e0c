"""Reading a stretch of a long one-dimensional array, whatever library holds it."""

from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, Any]


class Stretch(Protocol):
    """A one-dimensional array that is read a stretch at a time."""

    dtype: np.dtype[Any]
    size: int

    def read(self, lo: int, hi: int, scratch: Array | None = None) -> Array:
        """Items lo to hi: in `scratch` (same dtype, long enough) where given, in a new array otherwise."""

    def close(self) -> None:
        """Free what is held."""


class ChunkedStretch:
    """An h5py or zarr array read in whole chunks; the last chunk is kept, so that none is decompressed twice."""

    def __init__(self, array: Any) -> None:
        self._array = array
        self.dtype = np.dtype(array.dtype)
        self.size = int(array.shape[0])
        chunks = getattr(array, "shards", None) or array.chunks
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
