"""Gzipped chunks of an HDF5 table straight to sparse counts: the library is asked for the stored bytes only.

    reader = open_chunks(file["matrix"], cells_in_rows=False)
    indptr, indices, values = reader.read(0)        # the cells of the first column of chunks

Slicing a table of 64 x 64 chunks costs far more than decompressing them: every chunk goes through the library's
filters, cache and copying, and 99 % of what comes out is zeros that are then searched once more. Here a chunk is
decompressed (by zlib-ng where it is installed, else by zlib) and its non-zeros are picked while it is in the
processor's cache. Whatever is unusual about a chunk is left to the library, so that what is read is always the same.
"""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import h5py
import numpy as np

from cellformers.io import hdf5, inflate
from cellformers.io.inflate import DEFLATE, SHUFFLE, filters_of

Array = np.ndarray[Any, Any]
Corner = tuple[int, int]
_MOST_BYTES = 64 << 20  # of a column of chunks, were it dense
_NOT_STORED, _BY_LIBRARY = None, b""


def _processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


class ChunkReader:
    """Reads columns of chunks (rows of chunks where cells are in rows), whatever lies in them.

    Parameters
    ----------
    dataset
        A table that `open_chunks` found to be readable so.
    cells_in_rows
        False for loom, whose rows are genes.
    shuffled
        Bytes of the same significance are stored together (HDF5's filter `shuffle`).
    threads
        Threads that decompress; the result is the same for any number.
    """

    def __init__(self, dataset: h5py.Dataset, *, cells_in_rows: bool, shuffled: bool, threads: int) -> None:
        self._dataset, self._rows, self._shuffled, self._threads = dataset, cells_in_rows, shuffled, threads
        self._chunk = tuple(map(int, dataset.chunks))
        cells, genes = (0, 1) if cells_in_rows else (1, 0)
        self._n_cells, self._n_genes = int(dataset.shape[cells]), int(dataset.shape[genes])
        self._width, self._step = self._chunk[cells], self._chunk[genes]
        self._bytes = self._chunk[0] * self._chunk[1] * dataset.dtype.itemsize
        self.n_bands = -(-self._n_cells // self._width)
        """Columns of chunks."""

    def read(self, number: int) -> tuple[Array, Array, Array]:
        """The cells of one column of chunks: indptr (int64), indices (int32, ascending in a cell), values not 0.

        Raises
        ------
        OSError, EOFError, RuntimeError
            Where the file is damaged.
        """
        from cellformers.io import picking

        start = number * self._width
        genes = range(0, self._n_genes, self._step)
        corners = [(start, gene) if self._rows else (gene, start) for gene in genes]
        # one thread reads, then all decompress: the library lets only one in, and takes the interpreter along
        stored = [self._stored(corner) for corner in corners]
        share = -(-len(corners) // self._threads)
        jobs = [(corners[lo : lo + share], stored[lo : lo + share]) for lo in range(0, len(corners), share)]
        if len(jobs) == 1:
            ends, positions, values = self._pick(*jobs[0])
        else:
            with ThreadPoolExecutor(len(jobs)) as pool:
                picked = list(pool.map(lambda job: self._pick(*job), jobs))
            sizes = np.concatenate([np.diff(part[0], prepend=0) for part in picked])
            ends = np.cumsum(sizes)
            positions, values = (np.concatenate([part[i] for part in picked]) for i in (1, 2))
        indptr = np.empty(min(self._width, self._n_cells - start) + 1, np.int64)
        indices, kept = np.empty_like(positions), np.empty_like(values)
        picking.chunks_to_csr(
            ends, positions, values, self._chunk[1], self._step, self._n_genes, self._rows, indptr, indices, kept
        )  # fmt: skip
        return indptr, indices[: indptr[-1]], kept[: indptr[-1]]

    def _stored(self, corner: Corner) -> bytes | None:
        """The bytes of a chunk as they are in the file, or what stands for them."""
        try:
            mask, stored = self._dataset.id.read_direct_chunk(corner)
        except RuntimeError as error:
            return _NOT_STORED if "not allocated" in str(error) else _BY_LIBRARY
        except (OSError, MemoryError):  # where no chunk at all was written, the library makes up a size
            return _BY_LIBRARY
        # a mask: some filter was left out, as deflate is where it would gain nothing
        return _BY_LIBRARY if mask else stored

    def _pick(self, corners: Sequence[Corner], stored: Sequence[bytes | None]) -> tuple[Array, Array, Array]:
        """Non-zeros of chunks: int64[chunks], entries up to the end of each; int32 places in the chunk; values."""
        from cellformers.io import picking

        size = self._chunk[0] * self._chunk[1]
        ends = np.empty(len(corners), np.int64)
        positions = np.empty(4 * size, np.int32)
        values = np.empty(4 * size, self._dataset.dtype)
        n = 0
        for number, (corner, source) in enumerate(zip(corners, stored, strict=True)):
            if source is not _NOT_STORED:
                if n + size > len(values):
                    positions, values = (np.resize(array, 2 * len(array)) for array in (positions, values))
                chunk = inflate.inflate(source, self._bytes, self._dataset.name)
                if chunk is not None and self._shuffled:
                    n = picking.pick_shuffled(chunk, positions, values, n)
                else:
                    n = picking.pick(chunk or self._by_library(corner), positions, values, n)
            ends[number] = n
        return ends, positions[:n], values[:n]

    def _by_library(self, corner: Corner) -> bytes:
        """A chunk through all of the library's filters; a damaged one fails here."""
        whole = np.zeros(self._chunk, self._dataset.dtype)
        (top, left), (height, width) = corner, self._chunk
        part = self._dataset[top : top + height, left : left + width]
        whole[: part.shape[0], : part.shape[1]] = part
        return whole.tobytes()


def open_chunks(table: Any, *, cells_in_rows: bool, threads: int | None = None) -> ChunkReader | None:
    """The direct way into a two-dimensional table; None where it has to be sliced.

    It is open to numbers of the machine's byte order in chunks that are compressed by gzip, shuffled or not, and where
    a column of chunks would not be large even if it held no zeros.
    """
    if not isinstance(table, h5py.Dataset) or table.chunks is None or table.ndim != 2:
        return None
    dtype = table.dtype
    filters = filters_of(table)
    across = table.shape[1] if cells_in_rows else table.shape[0]
    band = int(across) * int(table.chunks[0 if cells_in_rows else 1]) * dtype.itemsize
    if (
        filters not in ([DEFLATE], [SHUFFLE, DEFLATE])
        or not hdf5.stored_as_is(table)
        or dtype.str == "<f2"
        or table.fillvalue != 0
        or band > _MOST_BYTES
    ):
        return None
    if threads is None:  # zlib-ng is so quick that handing chunks to threads costs what it gains (measured)
        threads = min(2, _processors()) if inflate.inflater is zlib else 1
    return ChunkReader(table, cells_in_rows=cells_in_rows, shuffled=len(filters) == 2, threads=threads)
