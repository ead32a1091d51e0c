"""Metrics against scikit-learn and by hand; bootstrap intervals that cover."""

import numpy as np
import pytest
from sklearn import metrics as reference

from cellformers import metrics


def test_confusion_metrics_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    counts = metrics.confusion(label, predicted, 4)
    assert np.array_equal(counts, reference.confusion_matrix(label, predicted))
    assert metrics.macro_f1(counts) == pytest.approx(reference.f1_score(label, predicted, average="macro"))
    assert metrics.accuracy(counts) == pytest.approx(reference.accuracy_score(label, predicted))


def test_macro_f1_averages_over_the_classes_of_the_test_labels() -> None:
    # a: 8 of 10 right, 2 called c, which is in no test label; b: never predicted, its 5 cells called a
    counts = np.array([[8, 0, 2], [5, 0, 0], [0, 0, 0]])
    f1_a = 2 * 8 / (10 + 13)
    assert metrics.macro_f1(counts) == pytest.approx((f1_a + 0) / 2)
    table = metrics.per_class(counts, ["a", "b", "c"])
    assert table["a"] == {"precision": 8 / 13, "recall": 0.8, "f1": pytest.approx(f1_a), "n": 10}
    assert table["b"] == {"precision": None, "recall": 0.0, "f1": 0.0, "n": 5}
    assert table["c"] == {"precision": 0.0, "recall": None, "f1": None, "n": 0}


def test_auc_counts_ties_half() -> None:
    positive = np.array([True, True, False, False])
    assert metrics.auc(positive, np.array([1.0, 1.0, 1.0, 1.0])) == 0.5
    assert metrics.auc(positive, np.array([2.0, 1.0, 1.0, 0.0])) == 0.875
    rng = np.random.default_rng(0)
    positive, score = rng.random(300) < 0.3, rng.integers(0, 12, 300).astype(float)
    assert metrics.auc(positive, score) == pytest.approx(reference.roc_auc_score(positive, score))
    assert metrics.average_precision(positive, score) == pytest.approx(
        reference.average_precision_score(positive, score)
    )
    weight = rng.integers(0, 4, 300)
    rows = np.repeat(np.arange(300), weight)
    assert metrics.auc(positive, score, weight) == pytest.approx(
        reference.roc_auc_score(positive[rows], score[rows])
    )
    assert metrics.average_precision(positive, score, weight) == pytest.approx(
        reference.average_precision_score(positive[rows], score[rows])
    )


def test_many_resamples_at_once_equal_one_by_one() -> None:
    rng = np.random.default_rng(0)
    positive, score, fold = rng.random(60) < 0.4, rng.integers(0, 9, 60) / 3, np.arange(60) % 3
    weights = rng.integers(0, 3, (7, 60))
    for statistic in (metrics.auc, metrics.average_precision):
        one_by_one = [statistic(positive, score, w) for w in weights]
        assert np.allclose(statistic(positive, score, weights), one_by_one)
    one_by_one = [metrics.fold_mean_auc(positive, score, fold, w) for w in weights]
    assert np.allclose(metrics.fold_mean_auc(positive, score, fold, weights), one_by_one)
    assert np.isnan(metrics.auc(np.ones(3, dtype=bool), np.arange(3.0)))


def test_fold_mean_auc_compares_within_folds_only() -> None:
    positive = np.array([True, False, True, False])
    score = np.array([1.0, 0.0, 11.0, 10.0])
    assert metrics.auc(positive, score) == 0.75
    assert metrics.fold_mean_auc(positive, score, np.array([0, 0, 1, 1])) == 1.0


def test_resampled_units_keep_their_cells_together() -> None:
    counts = np.zeros((8, 2, 2), dtype=np.int64)
    counts[:, 0, 0] = np.arange(8) * 10
    resampled = metrics.resample_units(counts, seed=0, resamples=50)
    assert resampled.shape == (50, 2, 2)
    assert np.all(resampled[:, 0, 0] % 10 == 0)
    assert np.array_equal(resampled, metrics.resample_units(counts, seed=0, resamples=50))


def test_unit_intervals_cover_where_cell_intervals_are_too_narrow() -> None:
    """200 cohorts of 15 donors, whose accuracy differs from donor to donor around 0.7."""
    rng = np.random.default_rng(0)
    covered = {"units": 0, "cells": 0}
    for trial in range(200):
        right = rng.binomial(200, rng.beta(7, 3, 15))
        counts = np.zeros((15, 2, 2), dtype=np.int64)
        counts[:, 0, 0], counts[:, 0, 1] = right, 200 - right
        for kind, resampled in (
            ("units", metrics.resample_units(counts, seed=trial, resamples=400)),
            ("cells", metrics.resample_cells(counts.sum(axis=0), seed=trial, resamples=400)),
        ):
            low, high = metrics.percentile_interval(metrics.accuracy(resampled))
            covered[kind] += low <= 0.7 <= high
    assert covered["units"] >= 175  # 95 % nominal; percentile intervals of 15 units fall a little short
    assert covered["cells"] <= 120


def test_gene_intervals_cover_the_true_auc() -> None:
    """Normal scores one standard deviation apart: AUC = Phi(1 / sqrt 2) = 0.760."""
    rng = np.random.default_rng(0)
    positive = np.arange(120) < 40
    covered = 0
    for trial in range(100):
        score = rng.normal(size=120) + positive
        values = metrics.bootstrap_genes(
            lambda w, s=score: metrics.auc(positive, s, w), positive, seed=trial, resamples=200
        )
        low, high = metrics.percentile_interval(values)
        covered += low <= 0.7602 <= high
    assert 86 <= covered <= 100


def test_macro_precision_and_recall_equal_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    label, predicted = rng.integers(0, 4, 200), rng.integers(0, 3, 200)  # class 3 is never predicted
    counts = metrics.confusion(label, predicted, 4)
    for own, name in ((metrics.macro_precision, "precision_score"), (metrics.macro_recall, "recall_score")):
        expected = getattr(reference, name)(label, predicted, average="macro", zero_division=0)
        assert own(counts) == pytest.approx(expected)
    both = np.stack([counts, counts.T])
    assert metrics.macro_precision(both)[0] == pytest.approx(float(metrics.macro_precision(counts)))
    absent = np.array([[8, 0, 2], [5, 0, 0], [0, 0, 0]])  # c is predicted, but no test label
    assert metrics.macro_precision(absent) == pytest.approx(8 / 13 / 2)
    assert metrics.macro_recall(absent) == pytest.approx(0.8 / 2)


def test_class_auc_equals_scikit_learn() -> None:
    rng = np.random.default_rng(2)
    label = rng.integers(0, 3, 300)
    probability = rng.dirichlet(np.ones(3), 300) + np.eye(3)[label] * 0.2
    probability /= probability.sum(axis=1, keepdims=True)
    expected = reference.roc_auc_score(label, probability, multi_class="ovr", average="macro")
    assert metrics.class_auc(label, probability) == pytest.approx(expected)
    two = probability[:, :2]
    assert metrics.class_auc(label == 1, two) == pytest.approx(reference.roc_auc_score(label == 1, two[:, 1]))
    assert np.isnan(metrics.class_auc(np.zeros(5, dtype=int), two[:5]))
    wider = np.concatenate(
        [probability, np.zeros((300, 1))], axis=1
    )  # a class without test labels counts nowhere
    assert metrics.class_auc(label, wider) == pytest.approx(expected)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_auc_of_resampled_units_is_that_of_their_cells(n_classes: int) -> None:
    rng = np.random.default_rng(3)
    unit = np.sort(rng.integers(0, 7, 400))
    label = rng.integers(0, n_classes, 400)
    probability = np.round(rng.dirichlet(np.ones(n_classes), 400), 2)  # with ties
    draws = metrics.unit_draws(7, seed=5, resamples=20)
    expected = [
        metrics.class_auc(np.repeat(label, d[unit]), np.repeat(probability, d[unit], axis=0)) for d in draws
    ]
    ask = {"unit": unit, "seed": 5, "resamples": 20}
    assert np.allclose(metrics.resample_class_auc(label, probability, **ask), expected, atol=1e-12)
    rough = metrics.resample_class_auc(label, probability, levels=64, **ask)
    assert np.abs(rough - expected).max() < 0.01
    if n_classes == 2:  # units of one label: resamples that draw one label only have no value
        alone = metrics.resample_class_auc((unit > 5).astype(int), probability, **ask)
        assert 0 < len(alone) < 20
