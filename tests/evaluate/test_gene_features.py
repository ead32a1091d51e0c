"""Features of genes by cell: ranks and counts, the same cells for both, nothing that depends on shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_files import make_cells, make_vocabulary, write_shards

from cellformers.errors import UserError
from cellformers.evaluate.gene_features import cell_counts, expression, ranks
from cellformers.folds import hash_order

N_CELLS, N_GENES = 40, 30


@pytest.fixture(params=["v1", "v2"])
def tokens(request: Any, tmp_path: Path) -> Any:
    """Token shards of 40 cells in both layouts, special tokens included, and the genes of each cell by rank."""
    vocabulary = make_vocabulary(N_GENES, special=request.param, context_length=64)
    vocabulary.save(tmp_path / "vocabulary")
    rng = np.random.default_rng(0)
    cells = make_cells(vocabulary, rng.integers(5, 20, N_CELLS))

    class Tokens:
        def shards(self, n: int) -> list[Path]:
            return write_shards(tmp_path, cells, vocabulary, n)

    row_of_token = {int(t): i for i, t in enumerate(vocabulary.token_ids)}
    Tokens.cells = [[row_of_token[t] for t in cell.tolist() if t in row_of_token] for cell in cells]
    Tokens.vocabulary, Tokens.folder = vocabulary, tmp_path / "vocabulary"
    return Tokens()


def test_ranks_count_down_from_the_context_length(tokens: Any) -> None:
    genes = tokens.vocabulary.gene_ids[[3, 17, 5]]
    X = ranks(tokens.shards(1), genes, vocabulary=tokens.folder)
    assert X.shape == (3, N_CELLS)
    names = sorted(f"cell{i}" for i in range(N_CELLS))
    for column, name in enumerate(names):
        cell = tokens.cells[int(name[4:])]
        expected = [64 - cell.index(g) if g in cell else 0 for g in (3, 17, 5)]
        assert X[:, column].tolist() == expected
    assert (X == 64).any(axis=1).sum() >= 1  # somewhere one of them comes first


def test_ranks_do_not_depend_on_shards_or_their_order(tokens: Any) -> None:
    genes = tokens.vocabulary.gene_ids[:10]
    whole = ranks(tokens.shards(1), genes, vocabulary=tokens.folder, max_cells=12, seed=3)
    assert whole.shape == (10, 12)
    parts = ranks(tokens.shards(3)[::-1], genes, vocabulary=tokens.folder, max_cells=12, seed=3)
    assert np.array_equal(whole, parts)
    other = ranks(tokens.shards(1), genes, vocabulary=tokens.folder, max_cells=12, seed=4)
    assert not np.array_equal(whole, other)


def test_ranks_need_the_vocabulary_of_the_tokens(tokens: Any, tmp_path: Path) -> None:
    genes = tokens.vocabulary.gene_ids[:2]
    with pytest.raises(UserError, match="need the vocabulary of the tokens; give --vocabulary"):
        ranks(tokens.shards(1), genes, vocabulary=None)
    make_vocabulary(N_GENES + 1, context_length=64).save(tmp_path / "other")
    with pytest.raises(UserError, match="was not made with the vocabulary"):
        ranks(tokens.shards(1), genes, vocabulary=tmp_path / "other")
    strange = np.array(["ENSG00000000001", "ENSG09999999999"], dtype=object)
    with pytest.raises(UserError, match=r"lacks 1 of the 2 genes of the split, e\.g\. ENSG09999999999"):
        ranks(tokens.shards(1), strange, vocabulary=tokens.folder)


def test_counts_are_log_counts_of_the_drawn_cells(build: Any) -> None:
    rng = np.random.default_rng(1)
    ids = np.array([f"c{i}" for i in range(25)], dtype=object)
    genes = [f"g{i}" for i in range(8)]
    X = rng.poisson(2.0, (25, 8))
    passed = [i % 4 != 0 for i in range(25)]
    table = build.cells(cell_id=ids, qc_pass=passed)
    wanted = np.array(["g5", "g0"], dtype=object)
    some = {"cells": table, "max_cells": 7, "seed": 2}
    found = {n: cell_counts(build.counts(ids, genes, X, shards=n), wanted, **some) for n in (1, 3)}
    assert np.array_equal(found[1], found[3])
    eligible = ids[passed]
    drawn = sorted(eligible[hash_order(eligible, seed=2, salt="cells")[:7]])
    rows = [int(name[1:]) for name in drawn]
    expected = np.log1p(10_000 * X[rows][:, [5, 0]] / X[rows].sum(axis=1, keepdims=True)).T
    np.testing.assert_allclose(found[1], expected)


def test_both_kinds_describe_genes_by_the_same_cells(build: Any, tokens: Any) -> None:
    """Where every gene of a cell has a token, a gene has a rank where it has a count."""
    ids = [f"cell{i}" for i in range(N_CELLS)]
    X = np.zeros((N_CELLS, N_GENES), dtype=int)
    for row, cell in enumerate(tokens.cells):
        X[row, cell] = np.arange(len(cell), 0, -1)
    genes = tokens.vocabulary.gene_ids
    table = build.cells(cell_id=ids[::-1], qc_pass=[i % 3 != 0 for i in range(N_CELLS)])
    some = {"cells": table, "max_cells": 9, "seed": 5}
    by_rank = ranks(tokens.shards(2), genes, vocabulary=tokens.folder, **some)
    by_count = cell_counts(build.counts(ids, genes, X), genes, **some)
    assert by_rank.shape == (N_GENES, 9)
    assert np.array_equal(by_rank > 0, by_count > 0)


def test_cells_that_are_not_there_are_refused(build: Any) -> None:
    counts = build.counts(["a", "b"], ["g0"], np.ones((2, 1), dtype=int))
    with pytest.raises(UserError, match="no cell that passed QC is in the files"):
        cell_counts(counts, np.array(["g0"], dtype=object), cells=build.cells(cell_id=["x", "y"]))


def test_expression_is_of_the_passing_cells(build: Any) -> None:
    X = np.array([[10, 0, 90], [0, 5, 5], [1, 1, 0]])
    counts = build.counts(["a", "b", "c"], ["g0", "g1", "g2"], X)
    table = build.cells(cell_id=["c", "b", "a"], qc_pass=[False, True, True])
    found = expression(counts, np.array(["g2", "g0"], dtype=object), cells=table, vocabulary=None)
    np.testing.assert_allclose(found["detection"], [1.0, 0.5])
    np.testing.assert_allclose(found["mean_expression"], np.log1p([7000, 500]))
