"""Figures of one benchmark."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellformers import plots
from cellformers.config import EXTRA_METRICS
from cellformers.report import verdicts, words
from cellformers.report.curves import curves
from cellformers.report.figures import Figure, Figures

MAX_CLASSES = 100  # of a confusion matrix that a reader can still zoom into
MAX_UNITS = 60  # columns of a figure of methods by units
Score = Mapping[str, Any]


def by_unit(score: Score, metric: str) -> dict[str, float]:
    """Values of a metric by unit, else by fold; those that are missing are left out."""
    entry = score["metrics"].get(metric) or {}
    values = dict(entry.get("units") or {})
    if not values:
        folds = entry.get("folds") or []
        names = (score["split"] or {}).get("names") or [f"fold {i + 1}" for i in range(len(folds))]
        values = dict(zip(names, folds, strict=False))
    return {name: value for name, value in values.items() if value is not None and value == value}


def forests(name: str, scores: Sequence[Score], metrics: Sequence[str], figures: Figures) -> list[Figure]:
    """A forest plot for each metric, of the methods that have it, with what was published of this very metric."""
    return [_forest(name, scores, metric, figures, first=n == 0) for n, metric in enumerate(metrics)]


def _forest(name: str, scores: Sequence[Score], metric: str, figures: Figures, *, first: bool) -> Figure:
    heading, axis = words.title(name), words.title(words.metric(metric))
    rows = [
        plots.Score(
            verdicts.row_name(s), s["kind"], verdicts.value(s, metric), s["metrics"][metric]["low"],
            s["metrics"][metric]["high"], list(by_unit(s, metric).values()),
        )
        for s in scores if verdicts.value(s, metric) >= 0
    ]  # fmt: skip
    published = [
        plots.Published(
            f"published {words.plus_minus(p['value'], p.get('sd'))}", float(p["value"]), p.get("sd")
        )
        for p in (scores[0]["published"] or {}).get(metric, [])
    ]
    # Permuted labels are what chance looks like on these data; the line is drawn where theory knows it.
    chance = (scores[0]["chance"] or {}).get(metric)
    return figures.add(
        f"{name}-scores" if first else f"{name}-{metric}",
        f"{heading}: {words.metric(metric)} of every method with its interval",
        lambda stem: plots.forest(rows, stem, title=heading, xlabel=axis, published=published, chance=chance),
    )


def of_classifiers(
    name: str, scores: Sequence[Score], metric: str, figures: Figures
) -> tuple[list[Figure], list[Figure]]:
    """ROC and precision-recall curves; confusion matrices of the best model and the best baseline."""
    heading = words.title(name)
    roc, recall, share = curves(scores, metric)
    drawn = []
    if roc:
        several = scores[0]["task"] == "cells" and len(scores[0]["classes"]) > 2
        how = "each class against the rest, mean" if several else "mean of the folds"
        how = "all folds" if scores[0]["task"] == "cells" and not several else how
        drawn = [
            figures.add(
                f"{name}-roc",
                f"{heading}: receiver operating characteristic of the best methods and the checks",
                lambda stem: plots.roc(roc, stem, title=f"ROC, {how}"),
            ),
            figures.add(
                f"{name}-precision-recall",
                f"{heading}: precision against recall of the best methods and the checks",
                lambda stem: plots.precision_recall(
                    recall, stem, title=f"Precision and recall{', mean of the classes' if several else ''}", share=share
                ),
            ),
        ]  # fmt: skip
    matrices = []
    for kind in ("model", "baseline"):  # the best of each, side by side
        best = next(iter(verdicts.ranked(scores, metric, kind)), None)
        if best is None or not best.get("confusion") or len(best["classes"]) > MAX_CLASSES:
            continue
        label = verdicts.row_name(best)

        def draw(stem: Path, best: Score = best, label: str = label) -> None:
            plots.confusion(best["confusion"], best["classes"], stem, title=f"Confusion: {label}")

        text = f"{heading}: confusion matrix of {label}"
        matrices.append(figures.add(f"{name}-confusion-{best['method']}", text, draw))
    return drawn, matrices


def units(name: str, scores: Sequence[Score], metric: str, figures: Figures, *, what: str) -> Figure | None:
    """Every method in every unit (donor, line, batch), where the scores tell units apart and there are several."""
    with_units = [s for s in scores if (s["metrics"].get(metric) or {}).get("units")]
    names = list(dict.fromkeys(u for s in with_units for u in by_unit(s, metric)))
    if not 2 <= len(names) <= MAX_UNITS:
        return None
    values = [[by_unit(s, metric).get(u, np.nan) for u in names] for s in with_units]
    said = words.metric(metric)
    return figures.add(
        f"{name}-units",
        f"{words.title(name)}: {said} of every method by {what}",
        lambda stem: plots.grid(
            values, [verdicts.row_name(s) for s in with_units], names, stem, dots=True,
            title=f"{words.title(said)} by {what}", bold=[s["kind"] == "model" for s in with_units],
        ),
    )  # fmt: skip


def of_mixing(name: str, scores: Sequence[Score], figures: Figures) -> list[Figure]:
    """Single metrics as a table of colours; batch correction against conservation of biology."""
    names = [m for m in EXTRA_METRICS["mixing"] if any(verdicts.value(s, m) >= 0 for s in scores)]
    drawn = []
    singles = [m for m in names if m != "bio_conservation"]
    if singles:
        values = [[_or_nan(s, m) for m in singles] for s in scores]
        drawn.append(
            figures.add(
                f"{name}-metrics",
                f"{words.title(name)}: single metrics of every method",
                lambda stem: plots.grid(
                    values, [verdicts.row_name(s) for s in scores], [words.metric(m) for m in singles], stem,
                    title="Single metrics, 1 is best", bold=[s["kind"] == "model" for s in scores],
                ),
            )
        )  # fmt: skip
    both = [s for s in scores if verdicts.value(s, "bio_conservation") >= 0]
    if both:
        pairs = [
            plots.Pair(
                verdicts.row_name(s),
                s["kind"],
                verdicts.value(s, "batch_correction"),
                verdicts.value(s, "bio_conservation"),
            )
            for s in both
        ]
        drawn.append(
            figures.add(
                f"{name}-plane",
                f"{words.title(name)}: batch correction of every method against its conservation of biology",
                lambda stem: plots.plane(
                    pairs, stem, title="Mixing against biology", xlabel="Batch correction",
                    ylabel="Bio conservation", note="better ↗",
                ),
            )
        )  # fmt: skip
    return drawn


def _or_nan(score: Score, metric: str) -> float:
    value = verdicts.value(score, metric)
    return value if value >= 0 else float("nan")
