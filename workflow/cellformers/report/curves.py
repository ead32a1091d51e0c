"""Curves of a benchmark from the predictions of its methods: ROC, and precision against recall.

Genes: the ROC is the mean over folds of the true positive rate, as the AUC is the mean of the folds' AUCs; precision
and recall are those of all folds together. Cells: of all folds together, with more than two classes the mean over
classes of one against the rest.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cellformers import metrics, plots
from cellformers.io.arrow import as_strings
from cellformers.io.files import open_parquet, read_table, whole
from cellformers.report import fields, verdicts

GRID = np.linspace(0, 1, 101)
Score = Mapping[str, Any]


class Answers(NamedTuple):
    """Predictions of a method: positive, bool[n, classes]; score, float64[n, classes], higher is likelier; fold[n]."""

    positive: np.ndarray
    score: np.ndarray
    fold: np.ndarray


def chosen(scores: Sequence[Score], metric: str) -> list[Score]:
    """Methods whose curves are drawn: best model, frozen and fine-tuned, its random twin, best baseline, the checks."""
    models = verdicts.ranked(scores, metric, "model")
    baselines = verdicts.ranked(scores, metric, "baseline")
    tuned = [s for s in models if s["method"].endswith("-finetuned")]
    frozen = [s for s in models if s not in tuned]
    picked = [*models[:1], *tuned[:1], *frozen[:1], *baselines[:1]]
    picked += [t for t in (verdicts.twin(s, scores) for s in models[:1]) if t is not None]
    picked += [s for s in scores if s["kind"] in ("control", "oracle")]
    return [s for n, s in enumerate(picked) if all(s is not other for other in picked[:n])]


def read_answers(score: Score) -> Answers | None:
    """The predictions beside a score file; None where there are none, or none with probabilities."""
    path = Path(score["path"])
    path = path.with_name(f"{path.stem}.predictions.parquet")
    classes = list(score["classes"] or [])
    if not path.is_file() or len(classes) < 2:
        return None
    with open_parquet(path) as file:
        names = file.schema_arrow.names
    if score["task"] == "genes":
        given = ["log_odds"] if "log_odds" in names else ["probability"]
        classes = classes[1:]
    else:
        given = [f"probability:{name}" for name in classes]
        if len(classes) == 2:
            given, classes = given[1:], classes[1:]
    if not {"fold", "label", *given} <= set(names):
        return None
    table = read_table(path, ["fold", "label", *given])
    with whole(path):
        values = np.column_stack([fields.numbers(table, name) for name in given])
        label, fold = (as_strings(table[name].cast(pa.string())) for name in ("label", "fold"))
    usable = np.isfinite(values).all(axis=1) & (fold != None)  # noqa: E711  (of each)
    positive = np.column_stack([label == name for name in classes])
    return Answers(positive[usable], values[usable], fold[usable])


def roc_points(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates at every distinct score, from (0, 0) to (1, 1)."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(positive, score)
    return fpr, tpr


def precision_at(positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Precision at each recall of GRID: that of the strictest threshold which reaches it."""
    from sklearn.metrics import precision_recall_curve

    precision, recall, _ = precision_recall_curve(positive, score)
    # both come from the loosest threshold to the strictest; the last point (0, 1) belongs to none
    precision, recall = precision[-2::-1], recall[-2::-1]
    return np.asarray(precision[np.searchsorted(recall, GRID - 1e-12).clip(0, len(recall) - 1)])


def curves(scores: Sequence[Score], metric: str) -> tuple[list[plots.Curve], list[plots.Curve], float]:
    """ROC and precision-recall curves of the chosen methods, and the share of positives."""
    roc, recall, share = [], [], 0.5
    for score in chosen(scores, metric):
        answers = read_answers(score)
        if answers is None:
            continue
        both = [k for k, p in enumerate(answers.positive.T) if p.any() and not p.all()]
        if not both:
            continue
        name, kind = verdicts.row_name(score), score["kind"]
        tpr, area = _roc(answers, both, by_fold=score["task"] == "genes")
        reported = verdicts.value(score, "auc")
        area = reported if reported >= 0 else area
        roc.append(plots.Curve(name, kind, np.concatenate([[0.0], GRID]), np.concatenate([[0.0], tpr]), area))
        precision = np.mean([precision_at(answers.positive[:, k], answers.score[:, k]) for k in both], axis=0)
        means = [float(metrics.average_precision(answers.positive[:, k], answers.score[:, k])) for k in both]
        reported = verdicts.value(score, "average_precision")
        recall.append(
            plots.Curve(name, kind, GRID, precision, reported if reported >= 0 else float(np.mean(means)))
        )
        share = float(answers.positive[:, both].mean())
    return roc, recall, share


def _roc(answers: Answers, classes: Sequence[int], *, by_fold: bool) -> tuple[np.ndarray, float]:
    """Mean true positive rate at each false positive rate of GRID, over folds (genes) or classes (cells)."""
    parts = [answers.fold == f for f in np.unique(answers.fold)] if by_fold else [slice(None)]
    rates, areas = [], []
    for rows in parts:
        for k in classes:
            positive, score = answers.positive[rows, k], answers.score[rows, k]
            if positive.any() and not positive.all():
                fpr, tpr = roc_points(positive, score)
                rates.append(np.interp(GRID, fpr, tpr))
                areas.append(float(metrics.auc(positive, score)))
    return (np.mean(rates, axis=0), float(np.mean(areas))) if rates else (GRID, 0.5)
