"""Counts stored as a full table in HDF5 or zarr, cells in rows (AnnData) or in columns (loom).

Chunks are read whole and once each, gzipped ones without the library's detours (`chunks`). Where one column of chunks
holds more cells than a block may (genes stored one after the other, or a contiguous loom), the table is read in one
pass along its storage and spilled.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellformers.errors import UserError
from cellformers.io.chunks import ChunkReader, open_chunks
from cellformers.io.hdf5 import close_plain, plain
from cellformers.io.source import Block, Head, Matrix
from cellformers.io.spill import Spill, split
from cellformers.io.validate import Checker

Array = np.ndarray[Any, Any]
_HEAD_BYTES = 1 << 20
_GENEROUS = 4  # a column of chunks may be that many times a block before the table is spilled instead


class DenseMatrix(Matrix):
    """A full table.

    Parameters
    ----------
    table
        h5py or zarr array: two-dimensional, sliced like numpy's.
    cells_in_rows
        False for loom, whose rows are genes.
    """

    def __init__(self, path: Path, table: Any, *, name: str, cells_in_rows: bool) -> None:
        self.path, self.name, self._table, self._rows = path, name, table, cells_in_rows
        shape = tuple(map(int, getattr(table, "shape", None) or ()))
        self._dtype = np.dtype(table.dtype)
        if len(shape) != 2 or self._dtype.kind not in "biuf":
            raise UserError(
                f"{name} is no table of numbers (shape {shape}, {self._dtype})",
                path=path,
                fix="give a count matrix",
            )
        self.n_cells, self.n_features = shape if cells_in_rows else shape[::-1]
        chunks = table.chunks or (1, max(shape[1], 1))
        self._chunks = tuple(max(1, min(int(c), n)) for c, n in zip(chunks, shape, strict=True))
        self._spill: Spill | None = None
        self._direct: ChunkReader | None = None
        self._opened = False

    def _open(self) -> None:
        """Get hold of the table in the quickest way there is."""
        if self._opened:
            return
        self._opened = True
        if isinstance(self._table, h5py.Dataset):
            self._table = plain(self._table)
        self._direct = open_chunks(self._table, cells_in_rows=self._rows)

    def _cell_bytes(self) -> int:
        return max(1, self.n_features * self._dtype.itemsize)

    def _width(self, max_bytes: int) -> int | None:
        """Cells to read at once: whole chunks; None where that is too much and the table must be spilled."""
        chunk = self._chunks[0 if self._rows else 1]
        fit = max_bytes // self._cell_bytes()
        if fit >= self.n_cells:
            return self.n_cells
        if chunk * self._cell_bytes() > _GENEROUS * max_bytes:
            # one chunk this large can't be avoided, but then it is read once
            return None
        return max(chunk, fit // chunk * chunk)

    def _cells(self, lo: int, hi: int) -> Array:
        part = self._table[lo:hi] if self._rows else self._table[:, lo:hi]
        return _native(part)

    def head(self) -> Head:
        """The values of the first cells, or of the first genes where those are cheaper to read."""
        self._open()
        if self._direct is not None:
            indptr, indices, values = self._direct.read(0)
            return Head(values, _locator(0, indptr, indices), True)
        width = self._width(_HEAD_BYTES)
        if width is not None:
            n = min(max(1, _HEAD_BYTES // self._cell_bytes()), self.n_cells)
            part = self._cells(0, n)
            part = part if self._rows else part.T
            cells, features = np.nonzero(part)
            return Head(part[cells, features], lambda k: (int(cells[k]), int(features[k])), True)
        height = self._chunks[0] if len(self._table) else 0
        part = _native(self._table[:height, : max(self._chunks[1], 1)])
        first, second = np.nonzero(part)
        cells, features = (first, second) if self._rows else (second, first)
        return Head(part[first, second], lambda k: (int(cells[k]), int(features[k])), False)

    def blocks(self, max_bytes: int, check: Checker) -> Iterator[Block]:
        """All cells in order."""
        self._open()
        if self._direct is not None:
            for lo, indptr, indices, values in _gathered(self._direct, max_bytes):
                yield from _checked(lo, indptr, indices, values, check, max_bytes)
            return
        width = self._width(max_bytes)
        if width is None:
            if self._spill is None:
                spill = Spill(self.n_cells)
                try:
                    self._fill(spill, max_bytes, check)
                except BaseException:
                    spill.close()
                    raise
                self._spill = spill
            yield from self._spill.blocks(max_bytes)
            return
        for lo in range(0, self.n_cells, width):
            dense = self._cells(lo, min(lo + width, self.n_cells))
            indptr, indices, values = compress(dense, cells_in_rows=self._rows)
            del dense
            yield from _checked(lo, indptr, indices, values, check, max_bytes)

    def _fill(self, spill: Spill, max_bytes: int, check: Checker) -> None:
        """Read the table in tiles of whole chunks, along its rows."""
        n_rows, n_columns = self._table.shape
        height, width = self._chunks
        fit = max(1, max_bytes // self._dtype.itemsize)
        width = min(n_columns, max(width, fit // height // width * width))
        height = max(height, fit // width // height * height)
        for top in range(0, n_rows, height):
            for left in range(0, n_columns, width):
                tile = _native(self._table[top : top + height, left : left + width])
                indptr, minor, values = compress(tile, cells_in_rows=True)
                minor += np.int32(left)
                major = np.repeat(np.arange(top, top + len(tile), dtype=np.int32), np.diff(indptr))
                cells, features = (major, minor) if self._rows else (minor, major)

                def locate(k: int, cells: Array = cells, features: Array = features) -> tuple[int, int]:
                    return int(cells[k]), int(features[k])

                spill.add(cells, features, check(values, locate, by_cell=False))

    def close(self) -> None:
        """Close the second handle on the file, remove the temporary file."""
        if isinstance(self._table, h5py.Dataset):
            close_plain(self._table)
        if self._spill is not None:
            self._spill.close()
            self._spill = None


def _checked(
    start: int, indptr: Array, indices: Array, values: Array, check: Checker, max_bytes: int
) -> Iterator[Block]:
    """Cells from `start` on as blocks of counts."""
    return split(Block(start, indptr, indices, check(values, _locator(start, indptr, indices))), max_bytes)


def _locator(start: int, indptr: Array, indices: Array) -> Callable[[int], tuple[int, int]]:
    """What tells the cell and the feature of an entry of CSR that begins with cell `start`."""
    return lambda k: (start + int(np.searchsorted(indptr, k, side="right")) - 1, int(indices[k]))


def _gathered(reader: ChunkReader, max_bytes: int) -> Iterator[tuple[int, Array, Array, Array]]:
    """Columns of chunks, as many together as fit into `max_bytes`: first cell, indptr, indices, values."""
    start, held = 0, 0
    waiting: list[tuple[Array, Array, Array]] = []
    for number in range(reader.n_bands):
        part = reader.read(number)
        size = sum(array.nbytes for array in part)
        if waiting and held + size > max_bytes:
            yield start, *_joined(waiting)
            start += sum(len(indptr) - 1 for indptr, _, _ in waiting)
            waiting, held = [], 0
        waiting.append(part)
        held += size
    if waiting:
        yield start, *_joined(waiting)


def _joined(parts: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Array]:
    """CSR of consecutive cells, one below the other."""
    sizes = np.concatenate([np.diff(indptr) for indptr, _, _ in parts])
    indptr = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=indptr[1:])
    indices, values = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    return indptr, indices, values


def _native(part: Any) -> Array:
    array = np.asarray(part)
    if array.dtype.kind == "f" and array.dtype.itemsize == 2:
        array = array.astype(np.float32)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def compress(dense: Array, *, cells_in_rows: bool) -> tuple[Array, Array, Array]:
    """indptr (int64), indices (int32) and non-zero values, cell by cell, of a table of cells in rows or columns."""
    from cellformers.io import kernels

    n_cells = dense.shape[0 if cells_in_rows else 1]
    indptr = np.zeros(n_cells + 1, dtype=np.int64)
    (kernels.count_rows if cells_in_rows else kernels.count_columns)(dense, indptr)
    indices = np.empty(int(indptr[-1]), dtype=np.int32)
    values = np.empty(int(indptr[-1]), dtype=dense.dtype)
    if cells_in_rows:
        kernels.fill_rows(dense, indices, values)
    else:
        kernels.fill_columns(dense, indptr, indices, values)
    return indptr, indices, values
