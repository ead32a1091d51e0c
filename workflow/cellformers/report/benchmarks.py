"""Sections about scores: every method of a benchmark beside its baselines, and what that says in words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellformers import plots
from cellformers.evaluate.scores import KINDS, MAIN_METRICS, read_score
from cellformers.io.files import read_table
from cellformers.report import words
from cellformers.report.figures import Figures
from cellformers.report.spec import ReportSpec

EXTRA_METRICS = {"cells": (), "genes": ("average_precision",)}
MAX_CLASSES = 60  # of a confusion matrix on half a page
MAX_UNITS = 40  # columns of the table of units that a reader can still take in
Score = Mapping[str, Any]


def benchmarks(spec: ReportSpec, figures: Figures) -> list[dict[str, Any]]:
    """One entry a benchmark: table, verdict, split, notes and figures."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in spec.scores:
        score = read_score(path)
        score["path"] = Path(path)
        groups.setdefault(score["benchmark"], []).append(score)
    return [_benchmark(name, scores, figures) for name, scores in groups.items()]


def _benchmark(name: str, scores: list[dict[str, Any]], figures: Figures) -> dict[str, Any]:
    first = scores[0]
    task = first["task"]
    metrics = [*MAIN_METRICS[task], *EXTRA_METRICS[task]]
    main = metrics[0]
    scores = sorted(scores, key=lambda s: (max(KINDS.index(s["kind"]), 1), -_value(s, main), s["method"]))
    contest = [s for s in scores if s["kind"] in ("model", "baseline")]
    shared = [note for note in first["notes"] if all(note in s["notes"] for s in scores)]
    published = [
        {"metric": words.METRICS.get(metric, metric), **entry}
        for metric, entries in (first["published"] or {}).items()
        for entry in entries
    ]
    return {
        "name": name,
        "title": words.title(name),
        "task": task,
        "dataset": first["dataset"],
        "label": first["label"],
        "classes": first["classes"],
        "n": first["n"],
        "split": describe_split(first),
        "interval": describe_interval(first),
        "metrics": [words.METRICS.get(m, m) for m in metrics],
        "rows": [_row(s, metrics, best=s is contest[0] if contest else False) for s in scores],
        "units": _units(scores, main),
        "published": published,
        "verdict": verdict(scores, main),
        "notes": shared,
        "method_notes": [
            (words.method(s["method"], s["kind"]), [n for n in s["notes"] if n not in shared])
            for s in scores
            if set(s["notes"]) - set(shared)
        ],
        "figures": _figures(name, scores, main, figures),
    }


def _value(score: Score, metric: str) -> float:
    return float(score["metrics"][metric]["value"])


def _row(score: Score, metrics: Sequence[str], *, best: bool) -> dict[str, Any]:
    cells = []
    for metric in metrics:
        entry = score["metrics"].get(metric)
        if entry is None:
            cells.append({"value": "–", "interval": ""})
            continue
        low, high = entry["low"], entry["high"]
        interval = "" if low is None else f"{words.score(low)} to {words.score(high)}"
        cells.append({"value": words.score(entry["value"]), "interval": interval})
    return {
        "method": words.method(score["method"], score["kind"]),
        "id": score["method"],
        "kind": score["kind"],
        "best": best,
        "cells": cells,
    }


def _by_unit(score: Score, metric: str) -> dict[str, float]:
    """Values of a metric by unit, else by fold."""
    entry = score["metrics"][metric]
    if entry.get("units"):
        return dict(entry["units"])
    names = score["split"].get("names") or [f"fold {i + 1}" for i in range(len(entry["folds"]))]
    return dict(zip(names, entry["folds"], strict=False))


def _units(scores: Sequence[Score], metric: str) -> dict[str, Any] | None:
    """The table of values per unit (or fold) and method, where there are several."""
    values = [_by_unit(s, metric) for s in scores]
    names = list(dict.fromkeys(name for v in values for name in v))
    if not 2 <= len(names) <= MAX_UNITS:
        return None
    first = scores[0]
    by_unit = bool(first["metrics"][metric].get("units"))
    return {
        "what": (first["split"].get("unit") or "dataset") if by_unit else "fold",
        "names": names,
        "rows": [
            (words.method(s["method"], s["kind"]), [words.score(v.get(name)) for name in names])
            for s, v in zip(scores, values, strict=True)
        ],
        "open": first["metrics"][metric]["low"] is None,
    }


def describe_split(score: Score) -> str:
    """How training and test were told apart, in a sentence or two."""
    split = score["split"]
    folds, unit = split["folds"], split.get("unit")
    what = "genes" if score["task"] == "genes" else "cells"
    if split["kind"] == "held-out":
        each = [u for fold in split.get("units") or [] for u in fold]
        alone = f", each of {len(each)} held out in turn" if len(each) == folds else ""
        held = f"{len(each)} in {folds} folds" if each and not alone else f"{folds} folds"
        text = f"Whole units held out: no {unit} is in training and in test ({held}{alone})."
    elif split["kind"] == "transfer":
        text = f"Trained on one dataset, tested on another: {words.listing(list(split.get('names') or []))}."
    elif split["kind"] == "given":
        text = f"A split given by the user, {folds} fold{'s' if folds > 1 else ''}."
    else:
        text = f"{folds} folds, stratified over {what}."
        if what == "cells":
            text += " No donor or batch is held out."
    excluded = [f"{n:,} {reason}" for reason, n in (split.get("excluded") or {}).items() if n]
    return text + (f" Left out: {words.listing(excluded)}." if excluded else "")


def describe_interval(score: Score) -> str:
    """What the intervals are, or why there are none."""
    interval = score["interval"]
    note = interval.get("note") or ""
    if interval.get("resampled") is None:
        return note[:1].upper() + note[1:] + "." if note else ""
    over = str(interval["resampled"])
    plural = over if over.endswith("s") else over + "s"
    text = f"Intervals: {interval['level']:.0%} percentile bootstrap over {plural}".replace("%", " %")
    return f"{text} ({note})." if note else f"{text}."


def verdict(scores: Sequence[Score], metric: str) -> dict[str, str]:
    """Who wins, in words: `tone` (model, baseline or tie) and `text`."""
    ranked = sorted(
        (s for s in scores if s["kind"] in ("model", "baseline")),
        key=lambda s: (-round(_value(s, metric), 3), s["kind"] != "model", s["method"]),
    )
    name = words.METRICS.get(metric, metric)
    models = [s for s in ranked if s["kind"] == "model"]
    baselines = [s for s in ranked if s["kind"] == "baseline"]
    if not ranked:
        return {"tone": "tie", "text": "No model or baseline was scored."}
    if not models or not baselines:
        best, other = (
            words.method(ranked[0]["method"], ranked[0]["kind"]),
            "model" if baselines else "baseline",
        )
        text = f"{name} {_said(ranked[0], metric)} by {best}; there is no {other} to compare it with."
        return {"tone": "tie", "text": text[:1].upper() + text[1:]}
    model, baseline = models[0], baselines[0]
    difference = round(_value(model, metric), 3) - round(_value(baseline, metric), 3)
    m, b = (words.method(s["method"], s["kind"]) for s in (model, baseline))
    if difference > 0:
        tone = "model"
        text = f"The model {m} is best: {name} {_said(model, metric)}. "
        text += f"The best baseline, {b}, has {_said(baseline, metric)}."
    elif difference == 0:
        tone = "tie"
        text = f"A baseline ties: the model {m} has {name} {_said(model, metric)}, "
        text += f"the baseline {b} {_said(baseline, metric)}."
    else:
        tone = "baseline"
        text = f"A baseline wins: {b}, {name} {_said(baseline, metric)}. "
        text += f"The best model, {m}, has {_said(model, metric)}."
    if difference and _overlap(model, baseline, metric):
        text += " Their intervals overlap."
    random = next((s for s in baselines if s["method"] == model["method"] + words.RANDOM_SUFFIX), None)
    if random is not None and random is not baseline:
        text += f" The same network with random weights: {words.score(_value(random, metric))}."
    for score in scores:
        low, chance = score["metrics"][metric]["low"], score["chance"].get(metric)
        if score["kind"] == "control" and low is not None and chance is not None and low > chance:
            text += f" Beware: {words.method(score['method'])} score above chance, which points to a leak."
    return {"tone": tone, "text": text}


def _said(score: Score, metric: str) -> str:
    """A value and its interval."""
    entry = score["metrics"][metric]
    low, high = entry["low"], entry["high"]
    interval = "" if low is None else f" ({words.score(low)} to {words.score(high)})"
    return words.score(entry["value"]) + interval


def _overlap(a: Score, b: Score, metric: str) -> bool:
    first, second = a["metrics"][metric], b["metrics"][metric]
    if first["low"] is None or second["low"] is None:
        return False
    return bool(first["low"] <= second["high"] and second["low"] <= first["high"])


def _figures(name: str, scores: Sequence[Score], metric: str, figures: Figures) -> list[Any]:
    heading = words.title(name)
    rows = [
        plots.Score(
            words.method(s["method"], s["kind"]), s["kind"], _value(s, metric), s["metrics"][metric]["low"],
            s["metrics"][metric]["high"], [v for v in _by_unit(s, metric).values() if v is not None],
        )
        for s in scores
    ]  # fmt: skip
    published = [
        (f"published {p['value']:g}", float(p["value"]))
        for p in (scores[0]["published"] or {}).get(metric, [])
    ]
    # Permuted labels are what chance looks like on these data; the line is drawn where theory knows it.
    chance = scores[0]["chance"].get(metric)
    drawn = [
        figures.add(
            f"{name}-scores",
            f"{heading}: {words.METRICS.get(metric, metric)} of every method with its interval",
            lambda stem: plots.forest(
                rows, stem, title=heading, xlabel=words.title(words.METRICS.get(metric, metric)),
                published=published, chance=chance,
            ),
        )
    ]  # fmt: skip
    for kind in ("model", "baseline"):  # the best of each, side by side
        best = next((s for s in scores if s["kind"] == kind), None)
        if best is None or not best.get("confusion") or len(best["classes"]) > MAX_CLASSES:
            continue
        label = words.method(best["method"], best["kind"])

        def draw(stem: Path, best: Score = best, label: str = label) -> None:
            plots.confusion(best["confusion"], best["classes"], stem, title=f"Confusion: {label}")

        text = f"{heading}: confusion matrix of {label}"
        drawn.append(figures.add(f"{name}-confusion-{best['method']}", text, draw))
    curves = [c for c in (_curve(s) for s in scores) if c is not None] if scores[0]["task"] == "genes" else []
    if curves:
        drawn.append(
            figures.add(
                f"{name}-roc",
                f"{heading}: receiver operating characteristic of every method",
                lambda stem: plots.roc(curves, stem, title="ROC, mean of the folds"),
            )
        )
    return drawn


def _curve(score: Score) -> plots.Curve | None:
    """Mean over folds of the true positive rate at each false positive rate; None without predictions."""
    from sklearn.metrics import roc_curve

    path = score["path"].with_name(f"{score['path'].stem}.predictions.parquet")
    if not path.is_file():
        return None
    table = read_table(path, ["fold", "label", "probability"]).to_pandas()
    grid = np.linspace(0, 1, 101)
    means = []
    for _, fold in table.groupby("fold", sort=True):
        positive = (fold["label"] == score["classes"][1]).to_numpy()
        if positive.all() or not positive.any():
            continue
        fpr, tpr, _ = roc_curve(positive, fold["probability"])
        means.append(np.interp(grid, fpr, tpr))
    if not means:
        return None
    tpr = np.concatenate([[0.0], np.mean(means, axis=0)])
    name = words.method(score["method"], score["kind"])
    return plots.Curve(name, score["kind"], np.concatenate([[0.0], grid]), tpr, _value(score, "auc"))
