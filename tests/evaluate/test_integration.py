"""Harmony, ComBat and scVI mix batches that a planted shift holds apart, and keep kinds of cells apart."""

import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from cellformers.errors import UserError
from cellformers.evaluate import integration
from cellformers.evaluate.baselines import Counts

N_BATCHES, N_LABELS = 2, 3


@pytest.fixture(scope="module")
def planted() -> dict[str, Any]:
    """Three kinds of cells in two batches; in the second, genes are measured with other efficiencies."""
    rng = np.random.default_rng(0)
    n, width = 400, 150
    label, batch = rng.integers(0, N_LABELS, n), np.arange(n) % N_BATCHES
    rate = rng.gamma(2.0, 1.5, width) * np.ones((N_LABELS, width))
    for k in range(N_LABELS):
        rate[k, 15 * k : 15 * (k + 1)] *= 4
    efficiency = np.ones((N_BATCHES, width))
    efficiency[1] = np.exp(rng.normal(0, 0.4, width))
    X = rng.poisson(rate[label] * efficiency[batch] * rng.gamma(20.0, 0.05, n)[:, None])
    X[:, 100] = 0
    matrix = sp.csr_matrix(X.astype(np.int64))
    counts = Counts(matrix, np.array([f"g{i:03d}" for i in range(width)], dtype=object), X.sum(axis=1))
    names = np.array(["drop", "dronc"], dtype=object)[batch]
    return {"counts": counts, "batch": names, "label": label, "X": X}


def same_neighbours(X: np.ndarray, groups: np.ndarray) -> float:
    """Share of the 10 nearest neighbours that are of the cell's own group."""
    squared = (X**2).sum(axis=1)
    distance = squared[:, None] - 2 * X @ X.T + squared
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1)[:, :10]
    return float((groups[near] == groups[:, None]).mean())


def test_uncorrected_batches_are_apart(planted: Any) -> None:
    X = integration.uncorrected(planted["counts"], seed=0)
    assert X.shape == (400, 50)
    assert X.dtype == np.float64
    assert same_neighbours(X, planted["batch"]) > 0.75


@pytest.mark.parametrize("method", ["harmony", "combat"])
def test_integration_mixes_batches_and_keeps_labels(planted: Any, method: str) -> None:
    counts, batch = planted["counts"], planted["batch"]
    if method == "harmony":
        X = integration.harmony(integration.uncorrected(counts, seed=0), batch, seed=0)
    else:
        X = integration.combat(counts, batch, seed=0)
    assert X.shape == (400, 50)
    assert X.dtype == np.float64
    assert np.isfinite(X).all()
    assert same_neighbours(X, batch) < 0.6
    assert same_neighbours(X, planted["label"]) > 0.9


def test_integration_repeats_itself_whatever_the_threads(planted: Any) -> None:
    counts, batch = planted["counts"], planted["batch"]
    pcs = integration.uncorrected(counts, seed=3)
    assert np.array_equal(pcs, integration.uncorrected(counts, seed=3))
    one = integration.harmony(pcs, batch, seed=3)
    assert np.array_equal(one, integration.harmony(pcs, batch, seed=3, threads=2))
    assert np.array_equal(
        integration.combat(counts, batch, seed=3), integration.combat(counts, batch, seed=3)
    )


def test_names_of_batches_do_not_matter(planted: Any) -> None:
    pcs = integration.uncorrected(planted["counts"], seed=0)
    renamed = np.where(planted["batch"] == "drop", "1", "0").astype(object)  # and sort the other way round
    one, other = (integration.harmony(pcs, batch, seed=0) for batch in (planted["batch"], renamed))
    assert np.abs(one - other).max() < 0.05 * np.abs(one).max()


@pytest.mark.parametrize("n", [2, 5, 20, 50])
def test_harmony_takes_few_cells_and_as_many_components(n: int) -> None:
    pcs = np.random.default_rng(0).normal(size=(n, n))
    batch = np.array(["a", "b"], dtype=object)[np.arange(n) % 2]
    assert integration.harmony(pcs, batch, seed=0).shape == (n, n)


def test_combat_takes_genes_that_are_constant_within_a_batch(planted: Any) -> None:
    X = planted["X"].copy()
    X[planted["batch"] == "dronc", 50:70] = 0  # as genes are that a platform can't see
    counts = Counts(sp.csr_matrix(X), planted["counts"].genes, X.sum(axis=1))
    assert same_neighbours(integration.uncorrected(counts, seed=0), planted["batch"]) > 0.95
    assert same_neighbours(integration.combat(counts, planted["batch"], seed=0), planted["batch"]) < 0.6


def test_one_batch_is_refused(planted: Any) -> None:
    batch = np.full(400, "only", dtype=object)
    pcs = np.zeros((400, 5))
    with pytest.raises(UserError, match="Harmony needs cells of two batches or more, all are of 'only'"):
        integration.harmony(pcs, batch, seed=0)
    with pytest.raises(UserError, match="ComBat needs cells of two batches"):
        integration.combat(planted["counts"], batch, seed=0)
    batch[7] = "lone"
    with pytest.raises(UserError, match="ComBat can't scale batch 'lone', which has one cell"):
        integration.combat(planted["counts"], batch, seed=0)


def test_packages_that_are_missing_are_named(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("harmonypy", "scvi"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python takes for a failed import
    with pytest.raises(
        UserError, match=r"Harmony needs .*harmonypy.*pip install 'cellformers\[benchmarks\]'"
    ):
        integration.harmony(np.zeros((400, 5)), planted["batch"], seed=0)
    with pytest.raises(UserError, match=r"scVI needs .*scvi.*pip install scvi-tools"):
        integration.scvi(planted["counts"], planted["batch"], seed=0)


@pytest.mark.skipif(importlib.util.find_spec("scvi") is None, reason="scvi-tools is not installed")
def test_scvi_mixes_batches(planted: Any) -> None:
    X = integration.scvi(planted["counts"], planted["batch"], seed=0, epochs=200)
    assert X.shape == (400, 30)
    assert same_neighbours(X, planted["batch"]) < 0.65
    assert same_neighbours(X, planted["label"]) > 0.9
