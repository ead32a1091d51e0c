"""Counts stored as compressed rows (a cell after the other) or compressed columns (a gene after the other)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError
from cellformers.io.source import Block, Head, Matrix
from cellformers.io.spill import Spill, row_ranges, split
from cellformers.io.stretch import Stretch
from cellformers.io.validate import Checker

Array = np.ndarray[Any, Any]
_HEAD = 1 << 16
_STRETCH = 1 << 20
_MOST_REPEATED = 1 << 20  # entries of a row; repeated ones are added up, but not without end


class _Compressed(Matrix):
    """What rows and columns have in common.

    Parameters
    ----------
    shape
        Cells, features.
    indptr
        One-dimensional array of h5py, zarr or numpy.
    position
        int32[features of the file]: number of each feature among those kept, -1 for the others; None keeps all.
        `shape` then counts those kept.
    """

    by_cell: bool

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        shape: tuple[int, int],
        indptr: Any,
        indices: Stretch,
        data: Stretch,
        position: Array | None = None,
    ) -> None:
        self.path, self.name = path, name
        self.n_cells, self.n_features = shape
        self._position = position
        self._stored_features = self.n_features if position is None else len(position)
        self._major = self.n_cells if self.by_cell else self._stored_features
        self._minor = self._stored_features if self.by_cell else self.n_cells
        self._indices, self._data = indices, data
        if data.dtype.kind not in "biuf" or indices.dtype.kind not in "iu" or indptr.dtype.kind not in "iu":
            raise self._damaged(f"data are {data.dtype}, indices {indices.dtype}, indptr {indptr.dtype}")
        if len(indptr) != self._major + 1:
            raise self._damaged(f"indptr has {len(indptr)} entries where {self._major + 1} belong")
        self._indptr = np.asarray(indptr[:]).astype(np.int64, copy=False)
        if self._indptr[0] != 0 or (self._indptr[1:] < self._indptr[:-1]).any():
            raise self._damaged("indptr does not start at 0 or decreases")
        most = int(np.diff(self._indptr).max(initial=0))  # a block has at least one row
        if most > max(self._minor, _MOST_REPEATED):
            raise self._damaged(
                f"a {'cell' if self.by_cell else 'gene'} has {most:,} entries for "
                f"{self._minor:,} {'genes' if self.by_cell else 'cells'}"
            )
        if not self._indptr[-1] == indices.size == data.size:
            raise self._damaged(
                f"indptr ends at {self._indptr[-1]}, but there are {indices.size} indices and {data.size} values"
            )

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.name} is damaged: {what}", path=self.path, fix="write or download the file again"
        )

    def _indices_of(self, lo: int, hi: int) -> Array:
        """int32 indices lo to hi, all in range."""
        from cellformers.io import kernels

        indices = self._indices.read(lo, hi)
        if indices.dtype == np.int32:
            wrong = kernels.outside(indices, self._minor)
            out = indices
        else:
            if not indices.dtype.isnative:
                indices = indices.astype(indices.dtype.newbyteorder("="))
            out = np.empty(hi - lo, dtype=np.int32)
            wrong = kernels.convert_indices(indices, self._minor, out)
        if wrong:
            bad = (indices < 0) | (indices >= self._minor)
            raise self._damaged(
                f"index {int(indices[np.argmax(bad)])} among {self._minor} {'genes' if self.by_cell else 'cells'}"
            )
        return out

    def head(self) -> Head:
        """The first values."""
        hi = min(_HEAD, self._data.size)
        values, minor = self._data.read(0, hi), self._indices_of(0, hi)

        def locate(k: int) -> tuple[int, int]:
            major = int(np.searchsorted(self._indptr, k, side="right")) - 1
            return (major, int(minor[k])) if self.by_cell else (int(minor[k]), major)

        return self._kept_head(Head(values, locate, self.by_cell))

    def _kept_head(self, head: Head) -> Head:
        if self._position is None:
            return head
        features = np.array([head.locate(k)[1] for k in range(len(head.values))], dtype=np.int64)
        position = self._position[features]
        kept = np.flatnonzero(position >= 0)
        return Head(
            head.values[kept], lambda k: (head.locate(int(kept[k]))[0], int(position[kept[k]])), head.by_cell
        )

    def close(self) -> None:
        """Close handles."""
        self._indices.close()
        self._data.close()


class CsrMatrix(_Compressed):
    """Rows are cells."""

    by_cell = True

    def blocks(self, max_bytes: int, check: Checker) -> Iterator[Block]:
        """All cells in order."""
        from cellformers.io import kernels

        narrow = self._data.dtype.kind in "bu" and self._data.dtype.itemsize <= 2
        # values that are converted pass through one buffer; those that are handed on get an array of their own
        hands_on = self._data.dtype == np.uint16
        scratch = np.empty(0, dtype=self._data.dtype)
        for lo, hi in row_ranges(self._indptr, 6 if narrow else 8, max_bytes):
            a, b = int(self._indptr[lo]), int(self._indptr[hi])
            if not hands_on and b - a > scratch.size:
                scratch = np.empty(b - a, dtype=self._data.dtype)
            indices = self._indices_of(a, b)
            values = self._data.read(a, b, None if hands_on else scratch)
            indptr = self._indptr[lo : hi + 1] - a
            if self._position is not None:
                kept = kernels.keep_features(indptr, indices, values, self._position)
                indices, values = indices[:kept].copy(), values[:kept].copy()

            def locate(
                k: int, lo: int = lo, indptr: Array = indptr, indices: Array = indices
            ) -> tuple[int, int]:
                return lo + int(np.searchsorted(indptr, k, side="right")) - 1, int(indices[k])

            data = check(values, locate)
            if data.nbytes + indices.nbytes + indptr.nbytes > max_bytes and data.dtype == np.int64:
                yield from split(Block(lo, indptr, indices, data), max_bytes)
            else:
                yield Block(lo, indptr, indices, data)


class CscMatrix(_Compressed):
    """Columns are cells' values of one gene: spilled on the first call of `blocks`."""

    by_cell = False
    _spill: Spill | None = None

    def blocks(self, max_bytes: int, check: Checker) -> Iterator[Block]:
        """All cells in order."""
        if self._spill is None:
            spill = Spill(self.n_cells)
            try:
                self._fill(spill, check)
            except BaseException:
                spill.close()
                raise
            self._spill = spill
        yield from self._spill.blocks(max_bytes)

    def _fill(self, spill: Spill, check: Checker) -> None:
        for a in range(0, self._data.size, _STRETCH):
            b = min(a + _STRETCH, self._data.size)
            first, last = np.searchsorted(self._indptr, [a, b - 1], side="right") - 1
            bounds = np.clip(self._indptr[first : last + 2], a, b)
            features = np.repeat(np.arange(first, last + 1, dtype=np.int32), np.diff(bounds))
            cells, values = self._indices_of(a, b), self._data.read(a, b)
            if self._position is not None:
                features = self._position[features]
                kept = features >= 0
                features, cells, values = features[kept], cells[kept], values[kept]

            def locate(k: int, cells: Array = cells, features: Array = features) -> tuple[int, int]:
                return int(cells[k]), int(features[k])

            spill.add(cells, features, check(values, locate, by_cell=False))

    def close(self) -> None:
        """Close handles, remove the temporary file."""
        super().close()
        if self._spill is not None:
            self._spill.close()
            self._spill = None
