"""Cell task: predict the label of cells of held-out donors, datasets or folds from frozen features.

Runs as `cellformers evaluate`, one benchmark and one method at a time; all methods read the same split. Features are
an embedding, a baseline computed from counts (`pca_hvg`, `log_counts`) or none (`majority`). With `permute` labels
are shuffled over all cells before anything else, training and test alike: whatever scores above chance then leaks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from cellformers import metrics
from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate import baselines
from cellformers.evaluate.classify import Features, FoldPrediction, predict_folds
from cellformers.evaluate.scores import check_kind, published_by_metric, write_score
from cellformers.evaluate.splitfile import Split, cells_digest, check_units, read_split, row_names
from cellformers.evaluate.tables import Cells, aligned_vectors, read_cells
from cellformers.folds import permuted
from cellformers.io.files import digest_arrays, digest_file, stamp, write_table
from cellformers.revisions import REVISIONS

CellFeatures = Literal["embedding", "pca_hvg", "log_counts", "majority"]


def _provider(
    features: str,
    inputs: Mapping[str, Sequence[Path]],
    cells: Cells,
    *,
    vocabulary: Path | None,
    seed: int,
) -> tuple[Features, str, list[str]]:
    """Features of a fold as a function of its rows, the digest of what they come from, and notes."""
    if features == "embedding":
        vectors = aligned_vectors(cells, inputs)
        return lambda a, b: (vectors[a], vectors[b]), digest_arrays(vectors), []
    counts = baselines.aligned_counts(cells, inputs, vocabulary=vocabulary)
    notes = [f"{len(counts.genes)} genes in common"] if len(set(cells.dataset)) > 1 else []
    if features == "pca_hvg":
        return lambda a, b: baselines.pca_hvg(counts, a, b, seed=seed), counts.digest(), notes
    return lambda a, b: baselines.log_counts(counts, a, b), counts.digest(), notes


def _majority(y: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], n: int) -> list[FoldPrediction]:
    """Predict the class shares of the training cells."""
    shares = [np.bincount(y[train], minlength=n) / len(train) for train, _ in folds]
    return [
        FoldPrediction(np.tile(s, (len(test), 1)), 0.0, True)
        for s, (_, test) in zip(shares, folds, strict=True)
    ]


def _checked_folds(split: Split, cells: Cells) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers of the folds; no cell and no unit is on both sides, whatever the split file says."""
    folds = split.masks(row_names(cells, split.content["by"]))
    for fold, (train, test) in zip(split.folds, folds, strict=True):
        if np.intersect1d(train, test).size:
            raise UserError(f"cells are on both sides of fold {fold['name']!r}")
        if split.content["kind"] != "stratified" and not split.content.get("shared_units"):
            check_units(cells, train, test, fold=fold["name"])
        if len(test) == 0 or len(set(cells.label[train])) < 2:
            raise UserError(
                f"fold {fold['name']!r} has nothing to test on, or fewer than two classes to learn"
            )
    return folds


def _predictions(
    cells: Cells, units: np.ndarray | None, y: np.ndarray, classes: list[str], split: Split,
    folds: list[tuple[np.ndarray, np.ndarray]], results: list[FoldPrediction],
) -> pa.Table:  # fmt: skip
    rows = np.concatenate([test for _, test in folds])
    probability = np.concatenate([r.probability for r in results])
    predicted = probability.argmax(axis=1)
    names = np.array(classes, dtype=object)
    fold = np.repeat([f["name"] for f in split.folds], [len(test) for _, test in folds])
    columns: dict[str, Any] = {
        "cell_id": pa.array(cells.cell_id[rows].tolist(), pa.string()),
        "dataset": pa.array(cells.dataset[rows].tolist(), pa.string()),
        "fold": pa.array(fold.tolist(), pa.string()),
        "unit": pa.array([None] * len(rows) if units is None else units[rows].tolist(), pa.string()),
        "label": pa.array(names[y[rows]].tolist(), pa.string()),
        "predicted": pa.array(names[predicted].tolist(), pa.string()),
        "probability": pa.array(probability.max(axis=1), pa.float32()),
    }
    for k, name in enumerate(classes):
        columns[f"probability:{name}"] = pa.array(probability[:, k], pa.float32())
    return pa.table(columns)


def _measure(
    y: np.ndarray,
    predicted: list[np.ndarray],
    folds: list[tuple[np.ndarray, np.ndarray]],
    units: np.ndarray | None,
    *,
    split: Split,
) -> dict[str, Any]:
    """Metrics over all predictions, of each fold and each unit, with bootstrap intervals where they are earned."""
    k = len(split.classes)
    by_fold = np.array(
        [metrics.confusion(y[test], p, k) for (_, test), p in zip(folds, predicted, strict=True)]
    )
    total = by_fold.sum(axis=0)
    interval: dict[str, Any] = {
        "method": "percentile bootstrap",
        "level": metrics.LEVEL,
        "resamples": metrics.RESAMPLES,
        "resampled": None,
        "note": None,
    }
    by_unit: dict[str, np.ndarray] = {}
    resampled = None
    if units is None:
        resampled = metrics.resample_cells(total, seed=split.seed)
        interval |= {
            "resampled": "cells",
            "note": "cells resampled as if independent, which cells of one donor are not: too narrow",
        }
    else:
        rows = np.concatenate([test for _, test in folds])
        guess = np.concatenate(predicted)
        for name in sorted(set(units[rows])):
            chosen = units[rows] == name
            by_unit[name] = metrics.confusion(y[rows][chosen], guess[chosen], k)
        what = split.unit or "dataset"
        if len(by_unit) >= metrics.MIN_UNITS:
            resampled = metrics.resample_units(np.array(list(by_unit.values())), seed=split.seed)
            interval["resampled"] = what
        else:
            interval["note"] = (
                f"{len(by_unit)} units ({what}) are too few for an interval: see the value of each"
            )
    measured: dict[str, Any] = {}
    for name, measure in (("macro_f1", metrics.macro_f1), ("accuracy", metrics.accuracy)):
        measured[name] = metrics.metric(
            float(measure(total)),
            None if resampled is None else metrics.percentile_interval(measure(resampled)),
            measure(by_fold).tolist(),
            units={unit: float(measure(c)) for unit, c in by_unit.items()} or None,
        )
    present = total.sum(axis=1)
    return {
        "interval": interval,
        "metrics": measured,
        "chance": {
            "macro_f1": 1 / int((present > 0).sum()),
            "accuracy": float(present.max() / present.sum()),
        },
        "per_class": metrics.per_class(total, split.classes),
        "confusion": total.tolist(),
    }


def evaluate_cells(
    *,
    benchmark: str,
    method: str,
    kind: str,
    split: str | Path,
    cells: Mapping[str, Path],
    features: str,
    inputs: Mapping[str, Sequence[Path]],
    output: str | Path,
    predictions: str | Path,
    permute: bool = False,
    vocabulary: Path | None = None,
    published: Sequence[Mapping[str, Any]] = (),
    threads: int = 1,
) -> dict[str, Any]:
    """Score one method on one cell benchmark and write the score and its predictions.

    Parameters
    ----------
    benchmark, method, kind
        Names for the tables; kind is `model`, `baseline`, `control` or `oracle`.
    split
        What `make_cell_split` wrote.
    cells
        The `cells.parquet` by dataset that the split was made from.
    features, inputs
        What to predict from, and its files by dataset: embedding shards or one .h5ad for `embedding`, counts shards
        for `pca_hvg` and `log_counts`, none for `majority`.
    permute
        Shuffle the labels over all cells first: a control that must come out at chance.
    vocabulary
        Maps ids and symbols to genes where datasets name them differently.
    published
        Published numbers to show beside, {"metric", "value", "source"}.

    Returns
    -------
    The score as written. `chance` is the most a prediction without information can be expected to score: 1 / classes
    for macro F1 (the mean F1 of independent guesses is at most the mean of (p + q) / 2), the share of the largest
    class for accuracy.

    Raises
    ------
    UserError
        If the split was made from other cells, files lack cells, or a unit is on both sides of a fold.
    """
    check_kind(kind)
    if features not in get_args(CellFeatures):
        raise UserError(f"unknown features {features!r}", fix=did_you_mean(features, get_args(CellFeatures)))
    plan = read_split(split, task="cells")
    table, _ = read_cells(cells, label=plan.content["label"], unit=plan.unit)
    if cells_digest(table) != plan.content["inputs"].get("cells"):
        raise UserError("was made from other cells, labels or units", path=split, fix="make the split again")
    folds = _checked_folds(plan, table)
    labels = permuted(table.label, table.keys(), seed=plan.seed) if permute else table.label
    y = np.searchsorted(plan.classes, labels.astype(str))
    units = table.unit if plan.content["kind"] != "stratified" else None
    if units is None and plan.content["by"] == "dataset":
        units = table.dataset
    read = {"split": digest_file(split), "cells": cells_digest(table)}
    notes = list(plan.content["notes"])
    if features == "majority":
        results = _majority(y, folds, len(plan.classes))
    else:
        provider, read["features"], said = _provider(
            features, inputs, table, vocabulary=vocabulary, seed=plan.seed
        )
        notes += said
        results = predict_folds(
            provider, y, folds, names=table.keys(), units=units, n_classes=len(plan.classes), seed=plan.seed,
            threads=threads,
        )  # fmt: skip
    if not all(r.converged for r in results):
        notes.append("the logistic regression did not converge in every fold")
    if permute:
        notes.append("labels permuted: has to come out at chance")
    guesses = [r.probability.argmax(axis=1) for r in results]
    score: dict[str, Any] = {
        "benchmark": benchmark,
        "method": method,
        "kind": kind,
        **plan.describe(),
        "n": int(sum(len(test) for _, test in folds)),
        **_measure(y, guesses, folds, units, split=plan),
        "penalties": [r.penalty for r in results],
        "published": published_by_metric(published),
        "notes": notes,
    }
    parameters = {"features": features, "permute": permute, "seed": plan.seed}
    made = stamp("evaluate", REVISIONS["evaluate"], parameters=parameters, inputs=read)
    write_table(_predictions(table, units, y, plan.classes, plan, folds, results), predictions, metadata=made)
    write_score(score | made, output)
    return score | made
