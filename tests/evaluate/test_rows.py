"""Rows of sparse matrices, some at a time: the same numbers as all at once."""

import numpy as np
import pytest
import scipy.sparse as sp

from cellformers.evaluate import rows


def matrix(n: int, dtype: type, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 9, (n, 30)) * (rng.random((n, 30)) < 0.3)
    return sp.csr_matrix(dense.astype(dtype))


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64])
def test_stacked_is_vstack(dtype: type) -> None:
    parts = [matrix(n, dtype, seed=n) for n in (5, 0, 17, 1)]
    found, known = rows.stacked(iter(parts), 30), sp.vstack(parts, format="csr")
    for name in ("data", "indices", "indptr"):
        assert getattr(found, name).dtype == getattr(known, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(known, name))
    assert found.shape == known.shape


def test_one_part_of_large_counts_makes_all_large() -> None:
    large = matrix(3, np.int64, seed=2) * 2**33
    found = rows.stacked(iter([matrix(4, np.int32), large, matrix(2, np.int32)]), 30)
    assert found.dtype == np.int64
    assert found.max() == large.max()


def test_nothing_stacked_is_an_empty_matrix() -> None:
    assert rows.stacked(iter([]), 30).shape == (0, 30)
    assert rows.filled(iter([]), 0).shape == (0, 0)


def test_sums_of_columns_round_as_those_of_all_rows_at_once() -> None:
    X = matrix(4000, np.float64)
    X.data = np.random.default_rng(1).lognormal(0, 3, X.nnz)
    total = np.zeros(30)
    for part in rows.split(np.arange(4000), 7):
        rows.add_columns(total, X[part], X[part].data)
    assert total.tolist() == np.bincount(X.indices, weights=X.data, minlength=30).tolist()
