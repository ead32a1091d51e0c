"""The rank-value kernel against numpy's lexsort, in ordinary and in hostile cases."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellformers.genes import Vocabulary
from cellformers.ranking import Ranked, rank_rows, rank_table
from cellformers.vocabulary import SPECIAL_TOKENS

Array = np.ndarray[Any, Any]


def make_vocabulary(
    medians: Sequence[float] | Array, *, special: str = "v1", context: int = 100_000
) -> Vocabulary:
    specials = SPECIAL_TOKENS[special]
    n = len(medians)
    return Vocabulary(
        name="test",
        gene_ids=np.array([f"g{i}" for i in range(n)], dtype=object),
        token_ids=np.arange(len(specials), len(specials) + n, dtype=np.int32),
        medians=np.array(medians, np.float64),
        symbols=np.array([None] * n, dtype=object),
        special_tokens=dict(specials),
        context_length=context,
        alias_source=None,
    )


def rank(
    rows: Sequence[Sequence[tuple[int, int]]],
    vocabulary: Vocabulary,
    tokens: Sequence[int] | Array | None = None,
    *,
    dtype: Any = np.int64,
    **options: Any,
) -> Ranked:
    """Rank cells given as (feature, count) pairs; feature i has the i-th token of the vocabulary by default."""
    token_of_feature = np.array(vocabulary.token_ids if tokens is None else tokens, np.int32)
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    indices = np.array([f for row in rows for f, _ in row], np.int32)
    data = np.array([c for row in rows for _, c in row], dtype)
    return rank_rows(indptr, indices, data, table=rank_table(token_of_feature, vocabulary), **options)


def expected(
    row: Sequence[tuple[int, int]], vocabulary: Vocabulary, tokens: Array | None = None
) -> list[int]:
    """By the definition, with Python's dict and numpy's lexsort."""
    token_of_feature = vocabulary.token_ids if tokens is None else tokens
    counts: dict[int, int] = {}
    for feature, count in row:
        if token_of_feature[feature] >= 0 and count:
            counts[int(token_of_feature[feature])] = counts.get(int(token_of_feature[feature]), 0) + count
    found = np.array(list(counts), np.int32)
    median = dict(zip(vocabulary.token_ids.tolist(), vocabulary.medians.tolist(), strict=True))
    scores = np.array([np.float64(counts[t]) / median[t] for t in found.tolist()])
    return found[np.lexsort((found, -scores))].tolist()


def cells(ranked: Ranked) -> list[list[int]]:
    kept = ranked.lengths[ranked.lengths >= 0]
    return [part.tolist() for part in np.split(ranked.tokens, np.cumsum(kept)[:-1])] if len(kept) else []


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_equals_lexsort(data: st.DataObject) -> None:
    """Few distinct medians and counts give ties; features share tokens, repeat and come in any order."""
    n_tokens = data.draw(st.integers(1, 60))
    # sums of eighths are exact, so ties of count / median are ties; the others only come near
    median = st.one_of(st.sampled_from([0.125, 0.5, 1.0, 1.5, 3.0]), st.floats(1e-7, 1e3))
    vocabulary = make_vocabulary(data.draw(st.lists(median, min_size=n_tokens, max_size=n_tokens)))
    n_features = data.draw(st.integers(1, 80))
    tokens = np.array(
        data.draw(st.lists(st.integers(-1, n_tokens - 1), min_size=n_features, max_size=n_features))
    )
    tokens = np.where(tokens < 0, -1, tokens + 2)
    entry = st.tuples(st.integers(0, n_features - 1), st.one_of(st.integers(0, 4), st.integers(0, 2**40)))
    rows = data.draw(st.lists(st.lists(entry, max_size=120), min_size=1, max_size=4))
    ranked = rank(rows, vocabulary, tokens)
    assert cells(ranked) == [expected(row, vocabulary, tokens) for row in rows]
    assert ranked.cell_totals.tolist() == [sum(c for _, c in row) for row in rows]
    totals = np.zeros(n_features, np.int64)
    for row in rows:
        for feature, count in row:
            totals[feature] += count
    assert ranked.feature_totals.tolist() == totals.tolist()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_many_genes(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    vocabulary = make_vocabulary(rng.lognormal(0.3, 1, 20_000))
    rows = []
    for n in (20_000, 5_000, 1, 0, 2_400):
        features = np.sort(rng.choice(20_000, n, replace=False))
        rows.append(list(zip(features.tolist(), rng.geometric(0.4, n).tolist(), strict=True)))
    assert cells(rank(rows, vocabulary, dtype=dtype)) == [expected(row, vocabulary) for row in rows]


def test_ties_are_broken_by_token() -> None:
    vocabulary = make_vocabulary([2.0, 1.0, 4.0, 1.0, 0.5])
    row = [(4, 1), (2, 8), (0, 4), (3, 2), (1, 2)]  # all scores are 2
    assert cells(rank([row, row[::-1]], vocabulary)) == [[2, 3, 4, 5, 6]] * 2


def test_scores_one_ulp_apart() -> None:
    """Neighbouring medians among others so far away that the keys can't tell them apart."""
    base = 1.4032
    near = [base]
    for _ in range(40):
        near.append(np.nextafter(near[-1], 2))
    rng = np.random.default_rng(1)
    for far in ([], [1e-290], [1e-290, 1e290]):
        medians = np.concatenate([rng.permutation(near), far])
        vocabulary = make_vocabulary(medians)
        row = [(i, 1) for i in range(len(medians))]
        assert cells(rank([row], vocabulary)) == [expected(row, vocabulary)]


def hostile(n: int) -> dict[str, tuple[Array, list[tuple[int, int]]]]:
    """Medians and a row that the first, coarse sort leaves in the worst order."""
    ulps = np.full(n, 0x3FF8 << 48, np.uint64) + np.arange(n, dtype=np.uint64)
    near = ulps.view(np.float64)  # ascending medians: ascending tokens are already in order
    forwards = [(i, 1) for i in range(n)]
    spread = np.concatenate([near, [1e-300, 1e300]])  # makes the coarse keys of the others equal
    ends = [(n, 1), (n + 1, 1)]
    return {
        "equal": (np.ones(n), forwards),
        "equal, backwards": (np.ones(n), forwards[::-1]),
        "near": (near, forwards[::-1]),
        "equal keys": (spread, forwards + ends),
        "equal keys, backwards": (spread, ends + forwards[::-1]),
        "equal keys, descending": (np.concatenate([near[::-1], [1e-300, 1e300]]), forwards + ends),
    }


@pytest.mark.parametrize("case", list(hostile(4)))
def test_no_input_is_quadratic(case: str) -> None:
    medians, row = hostile(20_000)[case]
    vocabulary = make_vocabulary(medians)
    assert cells(rank([row], vocabulary)) == [expected(row, vocabulary)]
    started = time.thread_time()
    rank([row] * 10, vocabulary)
    assert time.thread_time() - started < 1.0  # quadratic: 10 x 2e8 steps, some 5 s; measured: 0.1 s


def test_special_tokens_and_truncation() -> None:
    vocabulary = make_vocabulary([1.0] * 10, special="v2", context=6)
    rows = [[(i, 10 - i) for i in range(10)], [(3, 1)], [], [(0, 0)]]
    ranked = rank(rows, vocabulary)
    assert cells(ranked) == [[2, 4, 5, 6, 7, 3], [2, 7, 3], [2, 3], [2, 3]]
    assert ranked.lengths.tolist() == [6, 3, 2, 2]
    assert ranked.n_genes.tolist() == [10, 1, 0, 0]
    assert cells(rank(rows, make_vocabulary([1.0] * 10, context=3))) == [[2, 3, 4], [5], [], []]


def test_cells_left_out_are_counted() -> None:
    vocabulary = make_vocabulary([1.0, 1.0])
    rows = [[(0, 1), (1, 5)], [(0, 2)], [(1, 3), (0, 1)]]
    ranked = rank(rows, vocabulary, keep=np.array([False, True, True]), min_genes=2)
    assert ranked.lengths.tolist() == [-1, -1, 2]
    assert ranked.n_genes.tolist() == [0, 1, 2]
    assert cells(ranked) == [[3, 2]]
    assert ranked.cell_totals.tolist() == [6, 2, 4]
    assert ranked.feature_totals.tolist() == [4, 8]


@pytest.mark.parametrize("feature", [-1, 2, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("rest", [[], [(0, 1)], [(1, 1), (0, 1)]])
def test_columns_outside_the_matrix_are_refused(feature: int, rest: list[tuple[int, int]]) -> None:
    for row in ([(feature, 1), *rest], [*rest, (feature, 1)]):
        with pytest.raises(ValueError, match="outside"):
            rank([row], make_vocabulary([1.0, 1.0]))
