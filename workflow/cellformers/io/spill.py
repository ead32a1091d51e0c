"""From storage by gene to blocks of cells in one sequential pass.

Entries come in any order of cells. A buffer of them is sorted by cell, in buckets of a few cells, and appended to a
temporary file as one run; a block of cells is then one stretch of every run. The temporary file lies in TMPDIR and
has no name there: the system removes it when it is closed, also when the process is killed. Where it finds no
room, a DiskFullError names TMPDIR.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cellformers.errors import DiskFullError, full_disk
from cellformers.io.source import Block

Array = np.ndarray[Any, Any]
_BUCKETS = 4096
_ENTRIES = 1 << 20  # in the buffer: 12 MB, and as much again while it is sorted


class _Run(NamedTuple):
    position: int
    """Where it starts in the file."""
    dtype: np.dtype[Any]
    """int32, or int64 where a count needs it."""
    offsets: Array
    """int64[buckets + 1]: entries before each bucket."""


class Spill:
    """Entries (cell, feature, count) in, blocks of cells out.

    Parameters
    ----------
    n_cells
        Number of cells.
    """

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells
        self._divisor = max(1, -(-n_cells // _BUCKETS))
        self._n_buckets = -(-n_cells // self._divisor)
        self._file = tempfile.TemporaryFile(prefix="cellformers-", buffering=0)  # noqa: SIM115  (close() closes)
        self._runs: list[_Run] = []
        self._waiting: list[tuple[Array, Array, Array]] = []
        self._n_waiting = 0
        self._dtype: np.dtype[Any] | None = None
        self._end = 0

    def add(self, cells: Array, features: Array, counts: Array) -> None:
        """Take entries; cells must be in [0, n_cells). Within a cell their order is kept."""
        if len(cells) == 0:
            return
        self._dtype = counts.dtype if self._dtype is None else np.promote_types(self._dtype, counts.dtype)
        for lo in range(0, len(cells), _ENTRIES):
            part = slice(lo, lo + _ENTRIES)
            self._waiting.append((cells[part], features[part], counts[part]))
            self._n_waiting += len(cells[part])
            if self._n_waiting >= _ENTRIES:
                self._write()

    def _write(self) -> None:
        from cellformers.io import kernels

        if not self._n_waiting:
            return
        cells, features, counts = (np.concatenate(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        dtype = np.dtype(np.int64 if counts.dtype.itemsize == 8 else np.int32)
        offsets = np.empty(self._n_buckets + 1, dtype=np.int64)
        out = np.empty((len(cells), 3), dtype=dtype)
        kernels.sort_entries(cells, self._divisor, offsets, cells, features, counts, out)
        self._runs.append(_Run(self._end, dtype, offsets))
        todo = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        try:
            while len(todo):
                todo = todo[os.write(self._file.fileno(), todo) :]
        except OSError as error:
            if not full_disk(error):
                raise
            raise DiskFullError(
                "no space left for temporary files", path=tempfile.gettempdir(),
                fix="make room, or set TMPDIR to a folder with space",
            ) from error  # fmt: skip
        self._end += out.nbytes

    def blocks(self, max_bytes: int) -> Iterator[Block]:
        """All cells in order, in blocks of at most `max_bytes` (but at least one cell). May be called again."""
        self._write()
        totals = np.zeros(self._n_buckets + 1, dtype=np.int64)
        for run in self._runs:
            totals += run.offsets
        item = 4 + (self._dtype or np.dtype(np.int32)).itemsize
        lo = 0
        while lo < self._n_buckets:
            hi = lo + 1
            while (
                hi < self._n_buckets
                and (totals[hi + 1] - totals[lo]) * item + 8 * ((hi + 1 - lo) * self._divisor + 1)
                <= max_bytes
            ):
                hi += 1
            yield from split(self._load(lo, hi), max_bytes)
            lo = hi

    def _load(self, lo: int, hi: int) -> Block:
        """The cells of buckets lo to hi."""
        from cellformers.io import kernels

        sizes = [int(run.offsets[hi] - run.offsets[lo]) for run in self._runs]
        wide = any(run.dtype.itemsize == 8 and size for run, size in zip(self._runs, sizes, strict=True))
        entries = np.empty((sum(sizes), 3), dtype=np.int64 if wide else np.int32)
        at = 0
        for run, size in zip(self._runs, sizes, strict=True):
            if size:
                part = (
                    entries[at : at + size] if run.dtype == entries.dtype else np.empty((size, 3), run.dtype)
                )
                self._read(part, run.position + int(run.offsets[lo]) * 3 * run.dtype.itemsize)
                if part.dtype != entries.dtype:
                    entries[at : at + size] = part
            at += size
        first = lo * self._divisor
        n_cells = min(hi * self._divisor, self.n_cells) - first
        narrow = self._dtype is not None and self._dtype == np.uint16
        indptr = np.empty(n_cells + 1, dtype=np.int64)
        indices = np.empty(len(entries), dtype=np.int32)
        data = np.empty(len(entries), dtype=np.uint16 if narrow else entries.dtype)
        kernels.entries_to_csr(entries, first, indptr, indices, data)
        return Block(first, indptr, indices, data)

    def _read(self, out: Array, position: int) -> None:
        todo = memoryview(out.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        while len(todo):
            got = os.preadv(self._file.fileno(), [todo], position)
            if got <= 0:
                raise EOFError("the temporary file ends early")
            todo, position = todo[got:], position + got

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()
        self._waiting, self._runs, self._n_waiting = [], [], 0


def split(block: Block, max_bytes: int) -> Iterator[Block]:
    """A block as blocks of at most `max_bytes` (but at least one cell)."""
    if block.nbytes <= max_bytes or block.n_cells <= 1:
        yield block
        return
    item = block.indices.itemsize + block.data.itemsize
    for lo, hi in row_ranges(block.indptr, item, max_bytes):
        a, b = int(block.indptr[lo]), int(block.indptr[hi])
        yield Block(
            block.start + lo, block.indptr[lo : hi + 1] - a, block.indices[a:b].copy(), block.data[a:b].copy()
        )


def row_ranges(indptr: Array, item: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows whose entries of `item` bytes, with their indptr, fit into `max_bytes`."""
    n_rows = len(indptr) - 1
    lo = 0
    while lo < n_rows:
        low, high = lo + 1, n_rows
        while low < high:
            middle = (low + high + 1) // 2
            if int(indptr[middle] - indptr[lo]) * item + 8 * (middle - lo + 1) <= max_bytes:
                low = middle
            else:
                high = middle - 1
        yield lo, low
        lo = low
