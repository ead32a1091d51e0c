"""Metrics of a cell task: over all predictions, of each fold and each unit, with intervals where they are earned.

Intervals come from resampling units (donors, batches): from six of them on, below that the value of each unit is
given instead. Of a stratified split single cells are resampled, which is said to be too narrow.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cellformers import metrics

BY_CONFUSION = {
    "macro_f1": metrics.macro_f1,
    "accuracy": metrics.accuracy,
    "macro_precision": metrics.macro_precision,
    "macro_recall": metrics.macro_recall,
}
CELL_GROUPS = 200  # random groups of cells that are resampled for the AUC where no units are known
TOO_NARROW = "cells resampled as if independent, which cells of one donor are not: too narrow"

Array = np.ndarray[Any, Any]


def measure(
    y: Array,
    probability: Sequence[Array],
    folds: Sequence[tuple[Array, Array]],
    units: Array | None,
    *,
    classes: Sequence[str],
    unit: str,
    seed: int,
    vote: bool,
) -> dict[str, Any]:
    """What a score says about its predictions: interval, metrics, votes, chance, per_class and confusion.

    Parameters
    ----------
    y
        int64[n], class numbers of all cells.
    probability
        float64[test rows, K] of each fold.
    folds
        Row numbers (train, test).
    units
        object[n] of str; None for a stratified split.
    classes, unit
        Names of the classes and what a unit is called.
    vote
        Whether the majority of a unit's cells may stand for the unit, where each has one label.
    """
    rows = np.concatenate([test for _, test in folds])
    p = np.concatenate(probability)
    guess, truth, k = p.argmax(axis=1), y[rows], len(classes)
    by_fold = np.array(
        [
            metrics.confusion(y[test], q.argmax(axis=1), k)
            for (_, test), q in zip(folds, probability, strict=True)
        ]
    )
    names, of_row = _numbered(units, rows)
    by_unit = [metrics.confusion(truth[of_row == u], guess[of_row == u], k) for u in range(len(names))]
    total = by_fold.sum(axis=0)
    earned = units is None or len(names) >= metrics.MIN_UNITS
    interval = {
        "method": "percentile bootstrap",
        "level": metrics.LEVEL,
        "resamples": metrics.RESAMPLES,
    } | _said(None if units is None else len(names), unit)
    resampled = None
    if units is None:
        resampled = metrics.resample_cells(total, seed=seed)
    elif earned:
        resampled = metrics.resample_units(np.array(by_unit), seed=seed)
    measured = {
        name: metrics.metric(
            float(function(total)),
            None if resampled is None else metrics.percentile_interval(function(resampled)),
            function(by_fold).tolist(),
            units={u: float(function(c)) for u, c in zip(names, by_unit, strict=True)} or None,
        )
        for name, function in BY_CONFUSION.items()
    }
    found = _auc(truth, p, of_row, names, [y[t] for _, t in folds], probability, earned=earned, seed=seed)
    measured |= {} if found is None else {"auc": found}
    votes = _votes(names, by_unit, p, of_row, classes) if vote and len(names) else None
    if votes is not None:
        ends = np.cumsum([len(test) for _, test in folds])[:-1]
        tested = [np.unique(part) for part in np.split(of_row, ends)]
        measured["unit_vote"] = _unit_vote(votes, tested, earned=earned, seed=seed)
    present = total.sum(axis=1)
    share = 1 / int((present > 0).sum())
    return {
        "interval": interval,
        "metrics": measured,
        "votes": votes,
        "chance": {
            "macro_f1": share, "accuracy": float(present.max() / present.sum()), "macro_precision": share,
            "macro_recall": share, **({"auc": 0.5} if found is not None else {}),
            **({} if votes is None else {"unit_vote": _largest([v["label"] for v in votes])}),
        },
        "per_class": metrics.per_class(total, list(classes)),
        "confusion": total.tolist(),
    }  # fmt: skip


def _numbered(units: Array | None, rows: Array) -> tuple[list[str], Array]:
    """Names of the units of some rows, sorted, and the number of each row's unit; no names where there are no units."""
    if units is None:
        return [], np.zeros(len(rows), dtype=np.int64)
    names, of_row = np.unique(units[rows].astype(str), return_inverse=True)
    return names.tolist(), of_row


def _said(n_units: int | None, unit: str) -> dict[str, str | None]:
    """What was resampled, and what has to be said about it."""
    if n_units is None:
        return {"resampled": "cells", "note": TOO_NARROW}
    if n_units >= metrics.MIN_UNITS:
        return {"resampled": unit, "note": None}
    counted = f"1 unit ({unit}) is" if n_units == 1 else f"{n_units} units ({unit}) are"
    note = f"{counted} too few for an interval: see the value of each"
    return {"resampled": None, "note": note}


def _auc(
    truth: Array, p: Array, of_row: Array, names: Sequence[str], truths: Sequence[Array],
    by_fold: Sequence[Array], *, earned: bool, seed: int,
) -> dict[str, Any] | None:  # fmt: skip
    """The area under the ROC curve over the predictions of all folds; None where there is none.

    A fold may test one class only (a donor has one disease), so the classifiers of all folds are compared on one
    scale; values of folds and units are None where they have none.
    """
    value = metrics.class_auc(truth, p)
    if np.isnan(value):
        return None
    interval = None
    if earned:
        if not names:  # random groups of cells vary as single cells do, at the cost of few units
            n = len(truth)
            groups = (
                np.random.default_rng(seed).integers(0, CELL_GROUPS, n) if n > CELL_GROUPS else np.arange(n)
            )
        else:
            groups = of_row
        values = metrics.resample_class_auc(truth, p, groups, seed=seed)
        interval = metrics.percentile_interval(values) if len(values) else None
    folds = [metrics.class_auc(t, q) for t, q in zip(truths, by_fold, strict=True)]
    units = {u: metrics.class_auc(truth[of_row == i], p[of_row == i]) for i, u in enumerate(names)}
    present = {u: v for u, v in units.items() if not np.isnan(v)}
    numbers: list[Any] = [None if np.isnan(v) else v for v in folds]
    return metrics.metric(value, interval, numbers, units=present or None)


def _votes(
    names: Sequence[str], by_unit: Sequence[Array], p: Array, of_row: Array, classes: Sequence[str]
) -> list[dict[str, Any]] | None:
    """What most cells of each unit are predicted to be; None unless every unit has one label.

    Of classes with the same number of cells the one of higher mean probability wins.
    """
    if any((counts.sum(axis=1) > 0).sum() != 1 for counts in by_unit):
        return None
    votes = []
    for number, (name, counts) in enumerate(zip(names, by_unit, strict=True)):
        cells = counts.sum(axis=0)
        tied = np.flatnonzero(cells == cells.max())
        chosen = tied[p[of_row == number].mean(axis=0)[tied].argmax()]
        votes.append(
            {
                "unit": str(name),
                "label": classes[int(counts.sum(axis=1).argmax())],
                "predicted": classes[int(chosen)],
                "cells": int(cells.sum()),
                "share": {c: float(n / cells.sum()) for c, n in zip(classes, cells, strict=True)},
            }
        )
    return votes


def _unit_vote(
    votes: Sequence[dict[str, Any]], tested: Sequence[Array], *, earned: bool, seed: int
) -> dict[str, Any]:
    """Share of units whose vote is their label; `tested`: the numbers of the units of each fold."""
    right = np.array([v["label"] == v["predicted"] for v in votes], dtype=np.float64)
    interval = None
    if earned:
        interval = metrics.percentile_interval(metrics.unit_draws(len(right), seed=seed) @ right / len(right))
    units = {v["unit"]: float(r) for v, r in zip(votes, right, strict=True)}
    return metrics.metric(
        float(right.mean()), interval, [float(right[t].mean()) for t in tested], units=units
    )


def _largest(labels: Sequence[str]) -> float:
    return max(labels.count(label) for label in labels) / len(labels)
