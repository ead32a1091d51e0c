"""The rank-value kernel: the genes of a cell by count / median, highest first.

    table = rank_table(features.token_of_feature, vocabulary)
    ranked = rank_rows(block.indptr, block.indices, block.data, table=table)

Score of a gene: float64(count) / float64(median), one division. Order: descending score, then ascending token. The
factor 10,000 / n_counts of the published definition is the same for all genes of a cell and leaves the order alone.

How. Scores are positive, so their bits order as they do. A key holds the leading bits of (highest score - score) above
the position of the gene; a radix sort over its 20 leading bits leaves it nearly in order, and an insertion pass
compares neighbours, by the key alone where that decides and by the scores and tokens themselves where it doesn't: the
result is exact whatever the first sort did. Should many genes be out of place, a heapsort takes over, so no
input costs more than O(n log n). The kernel releases the GIL; threads may take blocks each.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]

DIGIT = 10  # bits of a radix digit: two histograms of 1,024 stay in the first-level cache
ABSENT = -1


class RankTable(NamedTuple):
    """What the kernel needs to know about features and tokens."""

    token_of_feature: Array
    """int32[n_features]; `len(medians) - 1` where a feature has no token."""
    medians: Array
    """float64[size + 1]: by token; 1 where there is no gene."""
    injective: bool
    """Whether no two features share a token."""
    first: int
    """Token put before the genes (<cls>), -1 for none."""
    last: int
    """Token put behind the genes (<eos>), -1 for none."""
    n_genes: int
    """Most genes of a cell: context length without special tokens."""


class Ranked(NamedTuple):
    """Tokens of consecutive cells."""

    tokens: Array
    """int32[sum of lengths]: of the cells that were kept, one after the other."""
    lengths: Array
    """int32[cells]: special tokens included; -1 for a cell that was not kept."""
    n_genes: Array
    """int32[cells]: genes with a token and a count, before truncation; 0 where not looked at."""
    cell_totals: Array
    """int64[cells]: counts over all features, of every cell."""
    feature_totals: Array
    """int64[n_features]: counts over all cells."""


def rank_table(token_of_feature: Array, vocabulary: Vocabulary) -> RankTable:
    """Prepare `rank_rows` for files with these features.

    Parameters
    ----------
    token_of_feature
        int32[n_features], -1 where there is no token.
    """
    none = vocabulary.size
    medians = np.ones(none + 1)
    medians[vocabulary.token_ids] = vocabulary.medians
    tokens = np.where(token_of_feature < 0, none, token_of_feature).astype(np.int32)
    used = tokens[tokens < none]
    special = vocabulary.special_tokens
    first, last = special.get("<cls>", ABSENT), special.get("<eos>", ABSENT)
    return RankTable(
        token_of_feature=tokens,
        medians=medians,
        injective=len(np.unique(used)) == len(used),
        first=first,
        last=last,
        n_genes=vocabulary.context_length - (first != ABSENT) - (last != ABSENT),
    )


def rank_rows(
    indptr: Array,
    indices: Array,
    data: Array,
    *,
    table: RankTable,
    keep: Array | None = None,
    min_genes: int = 0,
) -> Ranked:
    """Rank the genes of every cell of a CSR block.

    Counts of features that share a gene are summed, and so are repeated entries; zeros are no entries.

    Parameters
    ----------
    indptr, indices, data
        int64[cells + 1], int32[entries], integer[entries] >= 0.
    keep
        bool[cells]: which cells to rank; None: all. Totals are over all.
    min_genes
        Cells with fewer genes that have a token are not kept.

    Raises
    ------
    ValueError
        If a column is outside the matrix.
    """
    n_cells = len(indptr) - 1
    wanted = np.ones(n_cells, bool) if keep is None else np.ascontiguousarray(keep, dtype=bool)
    ranked = Ranked(
        tokens=np.empty(len(indices) + 2 * n_cells, np.int32),  # pages that are not needed are never touched
        lengths=np.full(n_cells, ABSENT, np.int32),
        n_genes=np.zeros(n_cells, np.int32),
        cell_totals=np.zeros(n_cells, np.int64),
        feature_totals=np.zeros(len(table.token_of_feature), np.int64),
    )
    written = _rank_rows(indptr, indices, data, wanted, table, min_genes, ranked)
    if written < 0:
        raise ValueError("a column index is outside the matrix")
    return ranked._replace(tokens=ranked.tokens[:written])


@njit(nogil=True, cache=True, error_model="numpy")
def _rank_rows(
    indptr: Array,
    indices: Array,
    data: Array,
    wanted: Array,
    table: RankTable,
    min_genes: int,
    ranked: Ranked,
) -> int:
    """Fill `ranked`; number of tokens written, or -1 where a column is outside the matrix."""
    size = len(table.medians)
    sums = np.zeros(size, np.int64)
    genes = np.empty(size, np.int32)
    counts = np.empty(size, np.int64)
    scores = np.empty(size, np.float64)
    keys = np.empty(size, np.uint64)
    spare = np.empty(size, np.uint64)
    low = np.empty(1 << DIGIT, np.int32)
    high = np.empty(1 << DIGIT, np.int32)
    tokens = ranked.tokens
    written = 0
    for row in range(len(indptr) - 1):
        # slices, as numba tests an index for being negative where it can't tell, and then nothing is vectorised
        columns, values = indices[indptr[row] : indptr[row + 1]], data[indptr[row] : indptr[row + 1]]
        ascending = _check_columns(columns, len(table.token_of_feature))
        if ascending < 0:
            return -1
        if table.injective and ascending == 1:
            n, total = _gather(columns, values, table.token_of_feature, size - 1, genes, counts, ranked)
        else:
            n, total = _sum(columns, values, table.token_of_feature, size - 1, genes, counts, sums, ranked)
        ranked.cell_totals[row] = total
        if not wanted[row]:
            continue
        ranked.n_genes[row] = n
        if n < min_genes:
            continue
        begin = written
        if table.first >= 0:
            tokens[written] = table.first
            written += 1
        if n:
            for i in range(n):
                scores[i] = table.medians[np.uint32(genes[i])]
            for i in range(n):  # apart from the look-up, this is vectorised
                scores[i] = np.float64(counts[i]) / scores[i]
            bits = _order(scores, genes, n, keys, spare, low, high)
            position = (np.uint64(1) << bits) - np.uint64(1)
            kept = tokens[written : written + min(n, table.n_genes)]
            for i in range(len(kept)):
                kept[i] = genes[np.uint32(keys[i] & position)]
            written += len(kept)
        if table.last >= 0:
            tokens[written] = table.last
            written += 1
        ranked.lengths[row] = written - begin
    return written


@njit(nogil=True, cache=True)
def _check_columns(columns: Array, n_features: int) -> int:
    """1 where the columns ascend strictly, 0 where they don't, -1 where one is outside [0, n_features)."""
    descents = np.int32(0)
    for i in range(1, len(columns)):
        descents += np.int32(columns[i] <= columns[i - 1])
    if descents == 0:
        return 1 if len(columns) == 0 or (columns[0] >= 0 and columns[-1] < n_features) else -1
    wrong = np.int32(0)
    for column in columns:
        wrong += np.int32((column < 0) | (column >= n_features))
    return -1 if wrong else 0


@njit(nogil=True, cache=True)
def _gather(
    columns: Array, values: Array, token_of_feature: Array, none: int, genes: Array, counts: Array, ranked: Ranked
) -> tuple[Any, Any]:  # fmt: skip
    """Tokens and counts of a row in which no token comes twice; their number, and the row's total.

    Every entry is written, and the next one over it where it has no token: a branch would be mispredicted half of
    the time. Unsigned positions spare the test for a negative one.
    """
    n = np.uint64(0)
    total = np.int64(0)
    for i in range(len(columns)):
        feature = np.uint32(columns[i])
        count = np.int64(values[i])
        total += count
        ranked.feature_totals[feature] += count
        token = token_of_feature[feature]
        genes[n] = token
        counts[n] = count
        n += np.uint64((token != none) & (count > 0))
    return np.int64(n), total


@njit(nogil=True, cache=True)
def _sum(
    columns: Array, values: Array, token_of_feature: Array, none: int, genes: Array, counts: Array, sums: Array,
    ranked: Ranked,
) -> tuple[Any, Any]:  # fmt: skip
    """The same for any row; `sums` is all zeros before and after."""
    n = np.uint64(0)
    total = np.int64(0)
    for i in range(len(columns)):
        feature = np.uint32(columns[i])
        count = np.int64(values[i])
        total += count
        ranked.feature_totals[feature] += count
        token = np.uint32(token_of_feature[feature])
        so_far = sums[token]
        genes[n] = token
        sums[token] = so_far + count
        n += np.uint64((token != none) & (count > 0) & (so_far == 0))
    for i in range(n):
        counts[i] = sums[np.uint32(genes[i])]
        sums[np.uint32(genes[i])] = 0
    sums[none] = 0
    return np.int64(n), total


@njit(nogil=True, cache=True)
def _order(scores: Array, genes: Array, n: int, keys: Array, spare: Array, low: Array, high: Array) -> Any:
    """Sort keys[:n] by descending score, then ascending gene; number of low bits of a key that are the position."""
    score_bits = scores.view(np.int64)
    least = most = score_bits[0]
    for i in range(1, n):
        least = min(least, score_bits[i])
        most = max(most, score_bits[i])
    position_bits = _bit_length(np.uint64(n - 1))
    span_bits = _bit_length(np.uint64(most - least))
    drop = max(0, span_bits - (64 - position_bits))
    key_bits = position_bits + span_bits - drop
    high_shift = np.uint64(max(0, key_bits - DIGIT))
    low_shift = np.uint64(max(0, key_bits - 2 * DIGIT))
    shift, dropped = np.uint64(position_bits), np.uint64(drop)
    digit = np.uint64((1 << DIGIT) - 1)

    low[:] = 0
    high[:] = 0
    for i in range(n):
        key = ((np.uint64(most - score_bits[i]) >> dropped) << shift) | np.uint64(i)
        keys[i] = key
        low[(key >> low_shift) & digit] += 1
        high[key >> high_shift] += 1
    below_low = below_high = np.int32(0)
    for i in range(len(low)):
        n_low, n_high = low[i], high[i]
        low[i], high[i] = below_low, below_high
        below_low += n_low
        below_high += n_high
    for i in range(n):
        key = keys[i]
        place = low[(key >> low_shift) & digit]
        low[(key >> low_shift) & digit] = place + np.int32(1)
        spare[np.uint32(place)] = key
    for i in range(n):
        key = spare[i]
        place = high[key >> high_shift]
        high[key >> high_shift] = place + np.int32(1)
        keys[np.uint32(place)] = key

    moves = 0
    for i in range(1, n):
        key = keys[i]
        if key >> shift > keys[i - 1] >> shift:
            continue
        place = i
        while place > 0 and _before(key, keys[place - 1], shift, scores, genes):
            keys[place] = keys[place - 1]
            place -= 1
        keys[place] = key
        moves += i - place
        if moves > 4 * n:
            _heapsort(keys, n, shift, scores, genes)
            break
    return shift


@njit(nogil=True, cache=True)
def _bit_length(value: Any) -> int:
    bits = 0
    while value:
        value >>= np.uint64(1)
        bits += 1
    return bits


@njit(nogil=True, cache=True)
def _before(one: Any, other: Any, shift: Any, scores: Array, genes: Array) -> bool:
    """The exact order: descending score, then ascending gene."""
    if one >> shift != other >> shift:
        return one >> shift < other >> shift
    position = (np.uint64(1) << shift) - np.uint64(1)
    a, b = np.uint32(one & position), np.uint32(other & position)
    if scores[a] != scores[b]:
        return scores[a] > scores[b]
    return genes[a] < genes[b]


@njit(nogil=True, cache=True)
def _heapsort(keys: Array, n: int, shift: Any, scores: Array, genes: Array) -> None:
    """Sort keys[:n] in the exact order."""
    for unsorted in range(n + n // 2 - 1, 0, -1):
        if unsorted >= n:  # build the heap: the last in order on top
            root, end = unsorted - n, n
        else:
            root, end = 0, unsorted
            keys[0], keys[end] = keys[end], keys[0]
        while 2 * root + 1 < end:
            child = 2 * root + 1
            if child + 1 < end and _before(keys[child], keys[child + 1], shift, scores, genes):
                child += 1
            if not _before(keys[root], keys[child], shift, scores, genes):
                break
            keys[root], keys[child] = keys[child], keys[root]
            root = child
