"""How right predictions are: cross-entropy, accuracy, macro F1, each class, area under the ROC curve, confusion."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cellformers import metrics
from cellformers.training.classify import softmax

Array = np.ndarray[Any, Any]
Classes = Sequence[Sequence[str]]


def by_task(logits: Array, classes: Classes) -> list[Array]:
    """Logits [n, classes of all tasks] cut into those of each task."""
    bounds = np.cumsum([len(names) for names in classes])[:-1]
    return np.split(logits, bounds, axis=1)


def cross_entropy(logits: Array, labels: Array) -> float:
    """Mean over rows of -log p of their class, in nats; logits [n, classes], labels int64 [n]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]).mean())


def summary(logits: Array, labels: Array, classes: Classes, shares: Sequence[float]) -> dict[str, float]:
    """Loss, accuracy and macro F1, means over the tasks weighted by `shares`.

    Parameters
    ----------
    logits
        float32 [n, classes of all tasks].
    labels
        int64 [n, tasks], -1 where there is none. A task without any label here is left out of the means.
    """
    figures: list[tuple[float, ...]] = []
    weights: list[float] = []
    for task, scores in enumerate(by_task(logits, classes)):
        rows = np.flatnonzero(labels[:, task] >= 0)
        if len(rows):
            y = labels[rows, task]
            counts = metrics.confusion(y, scores[rows].argmax(axis=1), scores.shape[1])
            figures.append(
                (
                    cross_entropy(scores[rows], y),
                    float(metrics.accuracy(counts)),
                    float(metrics.macro_f1(counts)),
                )
            )
            weights.append(shares[task])
    if not sum(weights):  # every task that is measured here has weight 0
        weights = [1.0] * len(figures)
    loss, accuracy, macro_f1 = np.average(figures, axis=0, weights=weights)
    return {"loss": float(loss), "accuracy": float(accuracy), "macro_f1": float(macro_f1)}


def scores(
    logits: Array, labels: Array, classes: Sequence[str], *, positive: int = 1
) -> dict[str, Any] | None:
    """Everything about one task; None where there is no row.

    Parameters
    ----------
    logits, labels
        float [n, classes] and int64 [n].
    positive
        The class of two that the AUC is of.
    """
    if not len(labels):
        return None
    counts = metrics.confusion(labels, logits.argmax(axis=1), len(classes))
    found: dict[str, Any] = {
        "n": len(labels),
        "loss": cross_entropy(logits, labels),
        "accuracy": float(metrics.accuracy(counts)),
        "macro_f1": float(metrics.macro_f1(counts)),
    }
    if len(classes) == 2:
        area = float(metrics.auc(labels == positive, softmax(logits)[:, positive]))
        found["auc"] = None if np.isnan(area) else area
        found["auc_of"] = classes[positive]
    found["per_class"] = metrics.per_class(counts, list(classes))
    found["confusion"] = {"classes": list(classes), "counts": counts.tolist()}
    return found
