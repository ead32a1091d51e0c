"""How much memory a piece of work needs at most."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow as pa


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that tells, after the block, the most bytes that Python, numpy and Arrow held within it.

    The most of each are added up, so it may be too much, never too little. HDF5 counts for nothing.
    """
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    most = 0
    try:
        yield lambda: most
        most = tracemalloc.get_traced_memory()[1] + (pool.max_memory() or 0)
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
