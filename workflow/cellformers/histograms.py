"""Histograms of positive numbers over their leading bits, one for each gene: how medians are found in one pass.

    histogram = Histogram(gene_ids, symbols, bits=mantissa_bits(0.001))
    histogram.add(block, gene_of, keep, spill=...)
    write_sketch(histogram.drain(), "sketch.parquet", metadata)
    for chunk in read_sketches(["sketch.parquet", ...]):
        medians, n_values = medians_of(chunk, bits)

The error bound. A positive float64 is 2^e x 1.f; keeping its exponent and the m leading bits of f puts it into a
bucket [a, b) with b - a = 2^(e - m) <= a x 2^-m. The bucket stands for all its values by its midpoint c = (a + b) / 2,
and for any v in it |c - v| <= (b - a) / 2 <= a x 2^-(m + 1) <= v x 2^-(m + 1). Buckets are ordered as their values
are, so the bucket of the middle value is known exactly and its midpoint is within a relative 2^-(m + 1) of the median
of an odd number of values. Of an even number, the median is the mean of the two middle values; the mean of two
numbers, each within a relative error of its own, is within that error of their mean. With m = 9 that is 2^-10 < 0.1 %.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba as nb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellformers.errors import UserError
from cellformers.io.files import METADATA_KEY, atomic_path, open_parquet, whole
from cellformers.io.source import Array, Block

TARGET = 10_000.0
# 10,000 / 2^63 <= value <= 10,000: the exponents there can be
LOWEST_EXPONENT, N_EXPONENTS = -50, 64
ERRORS = (1e-4, 0.1)
POOL_BYTES = 256 << 20
MERGE_BYTES = 96 << 20  # of counters; were all of them filled, what is made of them would take 8 times that
ROWS_PER_GROUP = 1 << 17
MAX_BUCKETS = 64 << 14  # of the exponents there can be and the least error

SCHEMA = pa.schema(
    [
        ("gene_id", pa.dictionary(pa.int32(), pa.string())),
        ("symbol", pa.dictionary(pa.int32(), pa.string())),
        ("bucket", pa.int32()),
        ("count", pa.int64()),
    ]
)


def mantissa_bits(relative_error: float) -> int:
    """The number m of mantissa bits to keep so that 2^-(m + 1) <= relative_error.

    Raises
    ------
    UserError
        If the error is not within 0.0001 to 0.1.
    """
    if not ERRORS[0] <= relative_error <= ERRORS[1]:
        raise UserError(f"relative error {relative_error} is not within {ERRORS[0]} to {ERRORS[1]}")
    return max(math.ceil(-math.log2(relative_error)) - 1, 0)


def bucket_of(values: Array, bits: int) -> Array:
    """The bucket of each positive float64, int64: its number counts from the lowest value there can be."""
    leading = np.asarray(values, np.float64).view(np.int64) >> (52 - bits)
    return leading - _first_bucket(bits)


def value_of(buckets: Array, bits: int) -> Array:
    """The midpoint of each bucket, float64."""
    shift = 52 - bits
    edges = [
        ((np.asarray(buckets, np.int64) + _first_bucket(bits) + i) << shift).view(np.float64) for i in (0, 1)
    ]
    return (edges[0] + edges[1]) / 2


def _first_bucket(bits: int) -> int:
    return (1023 + LOWEST_EXPONENT) << bits


class Chunk(NamedTuple):
    """Histograms of some genes: entries ordered by gene, then bucket, counts positive."""

    gene_ids: Array
    """object[genes] of str, ascending."""
    symbols: Array
    """object[genes] of str or None."""
    genes: Array
    """int64[entries]: index into gene_ids."""
    buckets: Array
    """int64[entries]."""
    counts: Array
    """int64[entries]."""


def medians_of(chunk: Chunk, bits: int) -> tuple[Array, Array]:
    """Each gene's median, float64, and number of values, int64: of an even number the midpoint of the middle two."""
    n = np.bincount(chunk.genes, weights=chunk.counts, minlength=len(chunk.gene_ids)).astype(np.int64)
    before = np.cumsum(n) - n
    reached = np.cumsum(chunk.counts)
    lower = np.searchsorted(reached, before + (n - 1) // 2, side="right")
    upper = np.searchsorted(reached, before + n // 2, side="right")
    return (value_of(chunk.buckets[lower], bits) + value_of(chunk.buckets[upper], bits)) / 2, n


class Histogram:
    """Counts of (gene, bucket), held in pages of a quarter octave that are handed out when first needed."""

    def __init__(self, gene_ids: Array, symbols: Array, *, bits: int) -> None:
        self.gene_ids, self.symbols, self.bits = gene_ids, symbols, bits
        self.page_bits = max(bits - 2, 0)
        self.table = np.zeros(
            (len(gene_ids), (N_EXPONENTS << bits) >> self.page_bits), np.int32
        )  # 0: no page
        # At least what one gene can need. zeros: memory is only taken by pages in use.
        n_pages = 1 + max(POOL_BYTES >> (self.page_bits + 2), self.table.shape[1])
        self.pool = np.zeros((n_pages, 1 << self.page_bits), np.uint32)
        self.used = 1
        self.sums = np.zeros(len(gene_ids), np.int64)

    def add(self, block: Block, gene_of: Array, keep: Array, *, spill: Callable[[], None]) -> None:
        """Count the values of a block's kept cells; `spill` has to drain the histogram whenever it is full."""
        starts, buckets = _by_gene(
            block.indptr,
            block.indices,
            block.data,
            gene_of,
            keep,
            52 - self.bits,
            _first_bucket(self.bits),
            self.sums,
        )
        gene = 0
        while True:
            gene, self.used = _count(starts, buckets, gene, self.page_bits, self.table, self.pool, self.used)
            if gene == len(self.gene_ids):
                return
            spill()

    def drain(self) -> Iterator[Chunk]:
        """All entries, some genes at a time; empties the histogram."""
        sizes = _entries_of_genes(self.table, self.pool)
        low = 0
        while low < len(sizes):
            reach = np.searchsorted(np.cumsum(sizes[low:]), ROWS_PER_GROUP) + 1
            high = min(low + int(reach), len(sizes))
            genes, buckets, counts = _entries(self.table[low:high], self.pool, int(sizes[low:high].sum()))
            yield _chunk(self.gene_ids[low:high], self.symbols[low:high], genes, buckets, counts)
            low = high
        self.pool[: self.used] = 0
        self.table[:] = 0
        self.used = 1

    def free(self) -> None:
        """Give its memory back; nothing can be counted any more."""
        self.pool, self.table = self.pool[:0].copy(), self.table[:0].copy()


def _chunk(gene_ids: Array, symbols: Array, genes: Array, buckets: Array, counts: Array) -> Chunk:
    """A chunk of the genes that have entries."""
    present, numbers = np.unique(genes, return_inverse=True)
    return Chunk(gene_ids[present], symbols[present], numbers, buckets, counts)


@nb.njit(cache=True, nogil=True)
def _by_gene(
    indptr: Array,
    indices: Array,
    data: Array,
    gene_of: Array,
    keep: Array,
    shift: int,
    first: int,
    sums: Array,
) -> tuple[Array, Array]:
    """The buckets of the kept cells' values, gene by gene: where each gene's begin, int64[genes + 1], and buckets.

    `sums` (int64[genes], zero before and after) adds up the counts of features that are one gene. Sorted by gene, the
    counters that `_count` touches stay in the cache, which is faster than counting cell by cell.
    """
    touched = np.empty(len(sums), np.int32)
    value = np.empty(1, np.float64)
    leading = value.view(np.int64)
    genes, buckets = np.empty(len(data), np.int32), np.empty(len(data), np.int32)
    starts = np.zeros(len(sums) + 1, np.int64)
    n = 0
    for i in range(len(indptr) - 1):
        if not keep[i]:
            continue
        n_counts = np.int64(0)
        n_touched = 0
        for entry in range(indptr[i], indptr[i + 1]):
            count = np.int64(data[entry])
            n_counts += count
            gene = gene_of[indices[entry]]
            if gene >= 0 and count > 0:
                if sums[gene] == 0:
                    touched[n_touched] = gene
                    n_touched += 1
                sums[gene] += count
        for k in range(n_touched):
            gene = touched[k]
            value[0] = np.float64(sums[gene]) / np.float64(n_counts) * 10_000.0
            sums[gene] = 0
            genes[n] = gene
            buckets[n] = (leading[0] >> shift) - first
            starts[gene + 1] += 1
            n += 1
    starts = np.cumsum(starts)
    place = starts[:-1].copy()
    ordered = np.empty(n, np.int32)
    for k in range(n):
        ordered[place[genes[k]]] = buckets[k]
        place[genes[k]] += 1
    return starts, ordered


@nb.njit(cache=True, nogil=True)
def _count(
    starts: Array, buckets: Array, gene: int, page_bits: int, table: Array, pool: Array, used: int
) -> tuple[int, int]:
    """Count from `gene` on, until the pool might not suffice for one; returns that gene and the pages used."""
    in_page = (1 << page_bits) - 1
    while gene < len(table):
        if used + min(starts[gene + 1] - starts[gene], table.shape[1]) > len(pool):
            break
        for k in range(starts[gene], starts[gene + 1]):
            page = table[gene, buckets[k] >> page_bits]
            if page == 0:
                page = used
                table[gene, buckets[k] >> page_bits] = page
                used += 1
            pool[page, buckets[k] & in_page] += np.uint32(1)
        gene += 1
    return gene, used


@nb.njit(cache=True, nogil=True)
def _entries_of_genes(table: Array, pool: Array) -> Array:
    """How many buckets of each gene are filled."""
    sizes = np.zeros(len(table), np.int64)
    for gene in range(len(table)):
        for page in table[gene]:
            if page > 0:
                for count in pool[page]:
                    sizes[gene] += count > 0
    return sizes


@nb.njit(cache=True, nogil=True)
def _entries(table: Array, pool: Array, size: int) -> tuple[Array, Array, Array]:
    """The filled buckets by gene, then bucket: gene, bucket, count."""
    genes, buckets, counts = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    filled = 0
    for gene in range(len(table)):
        for k in range(table.shape[1]):
            page = table[gene, k]
            if page > 0:
                for j in range(pool.shape[1]):
                    if pool[page, j] > 0:
                        genes[filled] = gene
                        buckets[filled] = k * pool.shape[1] + j
                        counts[filled] = pool[page, j]
                        filled += 1
    return genes, buckets, counts


def write_sketch(chunks: Iterable[Chunk], path: str | Path, metadata: Mapping[str, Any]) -> None:
    """Write histograms as Parquet (`SCHEMA`): ordered by gene id, then bucket; a row group holds whole genes.

    Where row groups begin depends on the entries only, not on how they come in chunks.
    """
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(dict(metadata)).encode()})
    with (
        atomic_path(path) as part,
        pq.ParquetWriter(
            part,
            schema,
            compression="zstd",
            use_dictionary=["gene_id", "symbol"],
            column_encoding={"bucket": "DELTA_BINARY_PACKED", "count": "DELTA_BINARY_PACKED"},
        ) as writer,
    ):
        for group in _regroup(chunks):
            writer.write_table(_to_table(group).cast(schema), row_group_size=len(group.genes))


def _regroup(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """The same entries, cut after the gene with which `ROWS_PER_GROUP` entries are reached."""
    held: list[Chunk] = []
    size = 0
    for chunk in chunks:
        ends = np.cumsum(np.bincount(chunk.genes, minlength=len(chunk.gene_ids)))
        low = 0
        while low < len(ends):
            done = int(ends[low - 1]) if low else 0
            high = int(np.searchsorted(ends, done + ROWS_PER_GROUP - size)) + 1
            part = _genes_of(chunk, low, min(high, len(ends)))
            held.append(part)
            size += len(part.genes)
            if size >= ROWS_PER_GROUP:
                yield _join(held)
                held, size = [], 0
            low = high
    if held:
        yield _join(held)


def _genes_of(chunk: Chunk, low: int, high: int) -> Chunk:
    first, last = np.searchsorted(chunk.genes, (low, high))
    entries = slice(first, last)
    return Chunk(
        chunk.gene_ids[low:high],
        chunk.symbols[low:high],
        chunk.genes[entries] - low,
        chunk.buckets[entries],
        chunk.counts[entries],
    )


def _join(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of successive genes as one."""
    starts = np.cumsum([0, *(len(chunk.gene_ids) for chunk in chunks)])
    genes = [chunk.genes + start for chunk, start in zip(chunks, starts, strict=False)]
    ids, symbols, _, buckets, counts = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return Chunk(ids, symbols, np.concatenate(genes), buckets, counts)


def _to_table(chunk: Chunk) -> pa.Table:
    genes = pa.array(chunk.genes)
    names = {}
    for name, values in (("gene_id", chunk.gene_ids), ("symbol", chunk.symbols)):
        # Parquet has no null in a dictionary: encoding makes it an entry without a code
        words = pa.array(values, pa.string()).dictionary_encode()
        names[name] = pa.DictionaryArray.from_arrays(words.indices.take(genes), words.dictionary)
    return pa.table({**names, "bucket": chunk.buckets, "count": chunk.counts})


class _RowGroup(NamedTuple):
    """Where some genes' entries are: a row group, its first and last gene."""

    path: Path
    number: int
    first: str
    last: str


def read_sketches(paths: Sequence[str | Path]) -> Iterator[Chunk]:
    """Add up sketches, `MERGE_BYTES` of counters at a time, whatever the number of sketches; genes ascending.

    Raises
    ------
    UserError
        If a file is missing or broken.
    """
    groups: list[_RowGroup] = []
    symbols: dict[str, str | None] = {}
    buckets = [math.inf, -math.inf]
    for path in map(Path, paths):
        with open_parquet(path) as file, whole(path):
            if not file.schema_arrow.equals(SCHEMA):
                raise ValueError("it is no sketch")
            for number in range(file.num_row_groups):
                table = _read_group(file, number, ["gene_id", "symbol", "bucket"])
                ids, names = _distinct(table)
                groups.append(_RowGroup(path, number, ids[0], ids[-1]))
                for gene, symbol in zip(ids, names, strict=True):
                    known = symbols.get(gene)
                    # the first by the alphabet, whatever the order of the sketches
                    symbols[gene] = (
                        symbol if known is None else known if symbol is None else min(known, symbol)
                    )
                # not from the file's statistics: pyarrow ends the process over some that are damaged
                span = pc.min_max(table["bucket"])
                buckets = [min(buckets[0], span["min"].as_py()), max(buckets[1], span["max"].as_py())]
                if not 0 <= buckets[0] <= buckets[1] < MAX_BUCKETS:
                    raise ValueError("buckets that no value has")
    if not groups:
        return
    lowest, n_buckets = int(buckets[0]), int(buckets[1] - buckets[0]) + 1
    genes = sorted(symbols)
    at_once = max(1, MERGE_BYTES // (8 * n_buckets))
    for low in range(0, len(genes), at_once):
        those = genes[low : low + at_once]
        dense = np.zeros(len(those) * n_buckets, np.int64)
        for group in groups:
            if group.first <= those[-1] and those[0] <= group.last:
                with whole(group.path):
                    _add_group(dense, group, np.array(those, object), lowest=lowest)
        filled = np.flatnonzero(dense)
        yield Chunk(
            np.array(those, object),
            np.array([symbols[gene] for gene in those], object),
            filled // n_buckets,
            filled % n_buckets + lowest,
            dense[filled],
        )


def _read_group(file: pq.ParquetFile, number: int, columns: list[str]) -> pa.Table:
    """Some columns of a row group; ValueError where it has no rows, or a row lacks more than a symbol."""
    table = file.read_row_group(number, columns=columns)
    table.validate(full=True)
    if not len(table) or any(table.column(name).null_count for name in columns if name != "symbol"):
        raise ValueError("a row group without entries")
    return table


def _distinct(table: pa.Table) -> tuple[list[str], list[str | None]]:
    """The gene ids of a row group in order, and their symbols."""
    table = table.unify_dictionaries().combine_chunks()
    codes = table.column("gene_id").chunk(0).indices.to_numpy()
    table = table.take(np.flatnonzero(np.diff(codes, prepend=-1)))
    return table.column("gene_id").to_pylist(), table.column("symbol").to_pylist()


def _add_group(dense: Array, group: _RowGroup, names: Array, *, lowest: int) -> None:
    """Add the entries of a row group that are of the genes `names` to dense[genes x buckets], flat."""
    n_buckets = len(dense) // len(names)
    with open_parquet(group.path) as file:
        table = _read_group(file, group.number, ["gene_id", "bucket", "count"])
    column = table.column("gene_id").unify_dictionaries().combine_chunks()
    known = np.array(column.dictionary.to_pylist(), object)
    place = np.searchsorted(names, known)
    there = place < len(names)
    there[there] = names[place[there]] == known[there]
    gene = np.where(there, place, -1)[column.indices.to_numpy()]
    mine = gene >= 0
    bucket = table.column("bucket").to_numpy()[mine] - lowest
    if len(bucket) and not 0 <= bucket.min() <= bucket.max() < n_buckets:
        raise ValueError("a bucket outside those that it says to have")
    cells = gene[mine] * n_buckets + bucket
    dense[cells] += table.column("count").to_numpy()[mine]  # each (gene, bucket) stands in a sketch once
