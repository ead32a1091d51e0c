"""Metrics and their bootstrap intervals, computed from counts so that thousands of resamples cost nothing.

Macro F1 and accuracy come from confusion matrices (rows: label, columns: prediction), the area under the ROC curve
(AUC) from ranks with ties counted half (Mann-Whitney), average precision as in scikit-learn. Macro metrics are means
over the classes that occur among the test labels.
Intervals are percentile intervals; what is resampled (donors, cells, genes) is the caller's to say.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
MIN_UNITS = 6  # with fewer donors an interval would pretend to a precision that isn't there


def confusion(label: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts int64[n_classes, n_classes] of (label, predicted) from two int arrays of class numbers."""
    cells = np.bincount(label * n_classes + predicted, minlength=n_classes * n_classes)
    return cells.reshape(n_classes, n_classes).astype(np.int64)


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Share of right predictions, of confusion matrices [..., K, K]; float64[...]."""
    right = np.trace(counts, axis1=-2, axis2=-1)
    return np.asarray(right / np.maximum(counts.sum(axis=(-2, -1)), 1), dtype=np.float64)


def class_f1(counts: np.ndarray) -> np.ndarray:
    """F1 = 2 TP / (2 TP + FP + FN) of every class, of confusion matrices [..., K, K]; NaN without test labels."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    labels, predictions = counts.sum(axis=-1), counts.sum(axis=-2)
    f1 = 2 * hits / np.maximum(labels + predictions, 1)
    return np.where(labels > 0, f1, np.nan)


def _macro(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean of values [..., K] over the classes with test labels in confusion matrices [..., K, K]."""
    present = counts.sum(axis=-1) > 0
    return np.asarray(np.where(present, values, 0).sum(axis=-1) / np.maximum(present.sum(axis=-1), 1))


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur among the test labels, of confusion matrices [..., K, K]; float64[...].

    A class that the training data lack can't be predicted and counts with F1 = 0; a class that is predicted but
    absent from the test labels costs the others their recall and has no F1 of its own.
    """
    return _macro(class_f1(counts), counts)


def macro_precision(counts: np.ndarray) -> np.ndarray:
    """Mean precision, TP / (TP + FP), over the classes that occur among the test labels; one never predicted has 0."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return _macro(hits / np.maximum(counts.sum(axis=-2), 1), counts)


def macro_recall(counts: np.ndarray) -> np.ndarray:
    """Mean recall, TP / (TP + FN), over the classes that occur among the test labels (balanced accuracy)."""
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    return _macro(hits / np.maximum(counts.sum(axis=-1), 1), counts)


def per_class(counts: np.ndarray, classes: list[str]) -> dict[str, dict[str, float | int | None]]:
    """Precision, recall, F1 and number of test cells of every class; None where a quotient is 0/0."""
    f1 = class_f1(counts)
    result: dict[str, dict[str, float | int | None]] = {}
    for k, name in enumerate(classes):
        hits, labels, predictions = counts[k, k], counts[k].sum(), counts[:, k].sum()
        result[name] = {
            "precision": float(hits / predictions) if predictions else None,
            "recall": float(hits / labels) if labels else None,
            "f1": float(f1[k]) if labels else None,
            "n": int(labels),
        }
    return result


def percentile_interval(values: np.ndarray, *, level: float = LEVEL) -> tuple[float, float]:
    """Low and high end of the percentile interval of bootstrap values."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def unit_draws(units: int, *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each unit is drawn in each resample, with replacement: int64[resamples, units]."""
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)


def resample_units(counts: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Confusion matrices of resampled units: int64[units, K, K] -> int64[resamples, K, K]."""
    draws = unit_draws(len(counts), seed=seed, resamples=resamples)
    return np.asarray(np.tensordot(draws, counts, axes=1), dtype=np.int64)


def resample_cells(counts: np.ndarray, *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Confusion matrices of resampled cells: int64[K, K] -> int64[resamples, K, K]."""
    flat = counts.ravel()
    draws = np.random.default_rng(seed).multinomial(flat.sum(), flat / flat.sum(), size=resamples)
    return np.asarray(draws.reshape(resamples, *counts.shape), dtype=np.int64)


def _by_level(score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of weights [..., n] over rows of equal score, in ascending order of the score: float64[..., levels]."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.nan) != 0)
    return np.add.reduceat(np.asarray(weights, dtype=np.float64)[..., order], starts, axis=-1)


def auc(positive: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counted half.

    Parameters
    ----------
    positive
        bool[n].
    score
        float64[n], higher means positive.
    weight
        int[..., n], how often each row counts (bootstrap resamples); all once by default.

    Returns
    -------
    float64[...]; NaN where a class is missing.
    """
    weight = np.ones(len(score)) if weight is None else weight
    return _level_auc(_by_level(score, weight * positive), _by_level(score, weight * ~positive))


def class_auc(label: np.ndarray, probability: np.ndarray) -> float:
    """Area under the ROC curve of class predictions; NaN where no class has both positives and negatives.

    Of two classes that of the second one, of more the mean over classes of each against the rest, where both occur.

    Parameters
    ----------
    label
        int[n], class numbers.
    probability
        float64[n, K].
    """
    classes = _scored_classes(probability.shape[1])
    values = np.array([float(auc(label == k, probability[:, k])) for k in classes])
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def _scored_classes(n_classes: int) -> list[int]:
    return [1] if n_classes == 2 else list(range(n_classes))


def resample_class_auc(
    label: np.ndarray,
    probability: np.ndarray,
    unit: np.ndarray,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    levels: int | None = None,
) -> np.ndarray:
    """Values of `class_auc` over resamples of units, drawn as `resample_units` draws them; NaN ones are left out.

    Probabilities are put into levels of about equal size, so that a resample costs as much for a million cells as
    for a thousand; pairs within a level count half. With as many levels as there are cells nothing is lost, else an
    AUC is off by less than half the share of pairs that meet in one level.

    Parameters
    ----------
    label, probability
        int[n] class numbers, float64[n, K].
    unit
        int[n], numbers of the units from 0.
    levels
        None: as many as keep the cost low, 512 to 4,096.
    """
    n, width = probability.shape
    n_units = int(unit.max()) + 1
    levels = min(n, levels or int(np.clip(1 << 16, 512 * width, 4096 * width) // width))
    draws = unit_draws(n_units, seed=seed, resamples=resamples).astype(np.float64)
    values = np.full((len(_scored_classes(width)), resamples), np.nan)
    for row, k in enumerate(_scored_classes(width)):
        rank = np.searchsorted(np.sort(probability[:, k]), probability[:, k], side="left")
        cell = unit * levels + rank * levels // n
        both = np.stack([np.bincount(cell[label == k], minlength=n_units * levels),
                         np.bincount(cell[label != k], minlength=n_units * levels)])  # fmt: skip
        up, down = both.reshape(2, n_units, levels).astype(np.float64)
        for start in range(0, resamples, 100):
            some = draws[start : start + 100]
            values[row, start : start + 100] = _level_auc(some @ up, some @ down)
    seen = ~np.isnan(values)
    found = seen.any(axis=0)
    return np.asarray(np.where(seen, values, 0).sum(axis=0)[found] / seen.sum(axis=0)[found])


def _level_auc(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """AUC of numbers of positives and negatives [..., levels] in ascending order of the score; NaN without pairs."""
    pairs = np.asarray(up.sum(axis=-1) * down.sum(axis=-1))
    wins = (up * (np.cumsum(down, axis=-1) - down / 2)).sum(axis=-1)
    return np.asarray(np.divide(wins, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0))


def fold_mean_auc(
    positive: np.ndarray, score: np.ndarray, fold: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Mean over folds of the AUC within the fold: only scores of one classifier are compared with each other."""
    weight = np.ones(len(score)) if weight is None else weight
    values = [
        auc(positive[rows], score[rows], weight[..., rows])
        for rows in (np.flatnonzero(fold == f) for f in np.unique(fold))
    ]
    return np.asarray(np.mean(values, axis=0))


def average_precision(
    positive: np.ndarray, score: np.ndarray, weight: np.ndarray | None = None
) -> np.ndarray:
    """Average precision: sum of (recall step) × precision over descending distinct scores; float64[...]."""
    weight = np.ones(len(score)) if weight is None else weight
    up, both = _by_level(-score, weight * positive), _by_level(-score, weight)
    found, taken = np.cumsum(up, axis=-1), np.cumsum(both, axis=-1)
    precision = np.divide(found, taken, out=np.zeros_like(found), where=taken > 0)
    return np.asarray((up * precision).sum(axis=-1) / found[..., -1])


def bootstrap_genes(
    statistic: Callable[[np.ndarray], np.ndarray],
    strata: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Values of `statistic(weights[k, n])` over resamples of rows, or of whole groups of rows, within strata.

    With class and fold as strata, every fold of every resample keeps both classes. Resamples of groups that don't
    have a value (NaN) are left out.
    """
    generator = np.random.default_rng(seed)
    groups = np.arange(len(strata)) if groups is None else groups
    weights = np.zeros((resamples, len(strata)), dtype=np.int32)
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        members, of_row = np.unique(groups[rows], return_inverse=True)
        chance = np.full(len(members), 1 / len(members))
        weights[:, rows] = generator.multinomial(len(members), chance, size=resamples)[:, of_row]
    values = np.concatenate([statistic(weights[i : i + 100]) for i in range(0, resamples, 100)])
    return values[~np.isnan(values)]


def enough_genes(strata: np.ndarray, groups: np.ndarray | None, classes: np.ndarray) -> bool:
    """Whether resamples of genes within strata can vary: 2 genes (or groups) a stratum, MIN_UNITS of each class.

    One that is alone in its stratum is drawn every time, so that the interval would leave out what it contributes.
    """
    members = np.arange(len(strata)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sizes = [len(np.unique(members[strata == stratum])) for stratum in np.unique(strata)]
    totals = [len(np.unique(members[classes == name])) for name in np.unique(classes)]
    return min(sizes) >= 2 and min(totals) >= MIN_UNITS


def metric(
    value: float, interval: tuple[float, float] | None, folds: list[float], **more: Any
) -> dict[str, Any]:
    """One entry of a score's metrics: value, ends of its interval (None without one), values per fold."""
    low, high = interval if interval is not None else (None, None)
    return {"value": value, "low": low, "high": high, "folds": folds, **more}
