"""Scores as files, and the table of all of them.

A score is one method on one benchmark: metrics with intervals and values per fold, split, seed and what went in.
`cellformers summarize` puts scores into `benchmarks.tsv`, best first, and says where a baseline wins.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellformers.config import EXTRA_METRICS, MAIN_METRICS
from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import as_field, read_json, write_json, write_text

KINDS = ("model", "baseline", "control", "oracle")
REQUIRED = (
    "benchmark", "task", "dataset", "method", "kind", "label", "classes", "split", "n", "interval", "metrics",
    "chance", "published", "notes", "cellformers", "step", "revision", "parameters", "inputs",
)  # fmt: skip
SHAPE: dict[str, Any] = {
    "benchmark": str, "task": str, "dataset": str, "method": str, "kind": str, "label": str | None,
    "classes": list, "split": dict, "n": int, "interval": dict, "metrics": dict, "chance": dict | None,
    "published": dict | None, "notes": list,
    "inputs": dict, "parameters": dict,
}  # fmt: skip
COLUMNS = (
    "benchmark", "task", "dataset", "label", "split", "metric", "method", "kind", "value", "low", "high", "interval",
    "n", "folds", "units", "published", "published_source", "note",
)  # fmt: skip


def check_kind(kind: str) -> None:
    """UserError unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise UserError(f"{kind!r} is no kind of method", fix=did_you_mean(kind, KINDS))


def published_by_metric(
    published: Sequence[Mapping[str, Any]], *, task: str
) -> dict[str, list[dict[str, Any]]] | None:
    """Published numbers ({"metric", "value", "source"}) sorted under their metric; None where there are none.

    Raises
    ------
    UserError
        If no table of the task shows the metric, so that the number would never be seen.
    """
    result: dict[str, list[dict[str, Any]]] = {}
    known = (*MAIN_METRICS[task], *EXTRA_METRICS[task])
    for entry in published:
        if entry["metric"] not in known:
            raise UserError(
                f"published: no table of {task} shows {entry['metric']!r}",
                fix=did_you_mean(entry["metric"], known),
            )
        rest = {k: v for k, v in entry.items() if k != "metric"}
        result.setdefault(str(entry["metric"]), []).append(rest)
    return result or None


def _defects(score: Any) -> str | None:
    if not isinstance(score, dict):
        return "is not a JSON object"
    missing = [key for key in REQUIRED if key not in score]
    if missing:
        return f"lacks {missing[0]!r}"
    wrong = next((key for key, kind in SHAPE.items() if not isinstance(score[key], kind)), None)
    if wrong is not None:
        return f"has {wrong!r} of another type"
    if score["kind"] not in KINDS or score["task"] not in MAIN_METRICS:
        return f"has an unknown kind or task ({score['kind']}, {score['task']})"
    if not all(isinstance(note, str) for note in score["notes"]):
        return "has notes that are no texts"
    return _split_defect(score) or _published_defect(score) or _metric_defect(score)


def _split_defect(score: dict[str, Any]) -> str | None:
    split = score["split"]
    names = split.get("names")
    if not isinstance(split.get("kind"), str) or not isinstance(split.get("unit"), str | None):
        return "has a split without a kind"
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "has folds without names"
    if not isinstance(score["interval"].get("resampled", ...), str | None):
        return "does not say what its interval is of"
    return None


def _published_defect(score: dict[str, Any]) -> str | None:
    for entries in (score["published"] or {}).values():
        for entry in entries if isinstance(entries, list) else [None]:
            if not isinstance(entry, dict) or not _is_number(entry.get("value")):
                return "has a published number that is none"
            if entry.get("sd") is not None and not _is_number(entry["sd"]):
                return "has a published SD that is no number"
    return None


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and (value != value or abs(value) < 1e300)


def _metric_defect(score: dict[str, Any]) -> str | None:
    """What is wrong with the main metrics, and with the numbers of any."""
    for name, entry in score["metrics"].items():
        if not isinstance(entry, dict):
            continue
        folds, units = entry.get("folds") or [], entry.get("units") or {}
        if not isinstance(folds, list) or not isinstance(units, dict):
            return f"has folds or units of {name!r} of another type"
        if len(folds) > len(score["split"].get("names") or folds):
            return f"has more folds of {name!r} than names of folds"
        numbers = [*folds, *units.values(), *(entry.get(key) for key in ("value", "low", "high", "sd"))]
        if not all(number is None or _is_number(number) for number in numbers):
            return f"has something of {name!r} that is no number"
    for name in MAIN_METRICS[score["task"]]:
        entry = score["metrics"].get(name)
        if not isinstance(entry, dict) or any(k not in entry for k in ("value", "low", "high", "folds")):
            return f"has no complete metric {name!r}"
        value, low, high = entry["value"], entry["low"], entry["high"]
        if not (isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1):
            return f"has {name} = {value}, not within 0 to 1"
        if (low is None) != (high is None) or (low is not None and not low <= high):
            return f"has a broken interval of {name} ({low}, {high})"
    return None


def write_score(score: Mapping[str, Any], path: str | Path) -> None:
    """Write a score; ValueError if it isn't whole, which is a defect of the caller and not of the user."""
    defect = _defects(dict(score))
    if defect:
        raise ValueError(f"the score {defect}")
    write_json(dict(score), path)


def read_score(path: str | Path) -> dict[str, Any]:
    """Read a score; UserError if the file isn't one."""
    score = read_json(path)
    defect = _defects(score)
    if defect:
        raise UserError(f"is not a score: {defect}", path=path, fix="make it with `cellformers evaluate`")
    return dict(score)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _row(score: Mapping[str, Any], metric: str) -> dict[str, str]:
    entry, split = score["metrics"][metric], score["split"]
    published = (score["published"] or {}).get(metric, [])
    held = f" {split['unit']}" if split.get("unit") and split["kind"] == "held-out" else ""
    folds = entry["folds"]  # none, where all predictions are pooled
    names = (split.get("names") or [f"fold {i + 1}" for i in range(len(folds))])[: len(folds)]
    return {
        "benchmark": score["benchmark"],
        "task": score["task"],
        "dataset": score["dataset"],
        "label": score["label"],
        "split": split["kind"] + held,
        "metric": metric,
        "method": score["method"],
        "kind": score["kind"],
        "value": _number(entry["value"]),
        "low": _number(entry["low"]),
        "high": _number(entry["high"]),
        "interval": score["interval"]["resampled"] or "",
        "n": str(score["n"]),
        "folds": "; ".join(f"{k}={_number(v)}" for k, v in zip(names, folds, strict=True)),
        "units": "; ".join(f"{k}={_number(v)}" for k, v in (entry.get("units") or {}).items()),
        "published": "; ".join(
            _number(p["value"]) + (f" ± {_number(p['sd'])}" if p.get("sd") else "") for p in published
        ),
        "published_source": "; ".join(str(p.get("source", "")) for p in published),
    }


def _verdicts(group: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """A note for every score of one benchmark: which is best among models and baselines, and where that surprises."""
    values = [round(s["metrics"][metric]["value"], 4) for s in group]  # what the table shows decides
    real = [v for v, s in zip(values, group, strict=True) if s["kind"] in ("model", "baseline")]
    models = [v for v, s in zip(values, group, strict=True) if s["kind"] == "model"]
    notes = []
    for value, score in zip(values, group, strict=True):
        said = []
        if score["kind"] in ("model", "baseline") and value == max(real):
            said.append("best" if real.count(value) == 1 else "best (tie)")
            if score["kind"] == "baseline" and models and value > max(models):
                said.append("baseline wins")
        low, chance = score["metrics"][metric]["low"], score["chance"].get(metric)
        if score["kind"] == "control" and low is not None and chance is not None and low > chance:
            said.append("control above chance: look for a leak")
        notes.append("; ".join([*said, *score["notes"]]))
    return notes


def summarise(scores: Sequence[str | Path], output: str | Path) -> list[dict[str, str]]:
    """Write one row a benchmark, metric and method, and return the rows; the main metrics of a task come first.

    Rows are sorted by benchmark and metric, models and baselines by value, then controls and oracles. `note` says
    which method is best, whether a baseline beats every model, and what the split has to be told about.

    Raises
    ------
    UserError
        If a file isn't a score, one method has two scores on a benchmark, or methods were scored on different splits.
    """
    read = [read_score(path) for path in scores]
    seen: dict[tuple[str, str], str | Path] = {}
    for score, path in zip(read, scores, strict=True):
        key = (score["benchmark"], score["method"])
        if key in seen:
            raise UserError(f"{key[1]} on {key[0]} is scored in {seen[key]} as well", path=path)
        seen[key] = path
    rows: list[dict[str, str]] = []
    for benchmark in sorted({s["benchmark"] for s in read}):
        group = [s for s in read if s["benchmark"] == benchmark]
        if len({s["inputs"].get("split") for s in group}) > 1:
            raise UserError(
                f"the scores of {benchmark} come from different splits", fix="evaluate every method again"
            )
        task = group[0]["task"]
        for metric in (*MAIN_METRICS[task], *EXTRA_METRICS[task]):
            having = [s for s in group if s["metrics"].get(metric) is not None]
            having.sort(
                key=lambda s: (
                    max(KINDS.index(s["kind"]), 1),  # models and baselines compete in one list
                    -round(s["metrics"][metric]["value"], 4),
                    s["method"],
                )
            )
            for score, note in zip(having, _verdicts(having, metric), strict=True):
                rows.append(_row(score, metric) | {"note": note})
    lines = ["\t".join(COLUMNS)]
    lines += ["\t".join(as_field(row[column] or "") for column in COLUMNS) for row in rows]
    write_text("\n".join(lines) + "\n", output)
    return rows
