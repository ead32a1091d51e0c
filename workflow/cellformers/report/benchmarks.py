"""Pages about scores: one a benchmark, every method beside its baselines and the published numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellformers.config import EXTRA_METRICS, MAIN_METRICS
from cellformers.evaluate.scores import KINDS, read_score
from cellformers.report import charts, verdicts, words
from cellformers.report.figures import Figures, file_stem
from cellformers.report.maps import Maps
from cellformers.report.score_tables import write_scores
from cellformers.report.spec import ReportSpec
from cellformers.report.verdicts import ranked, row_name, value

MAX_UNITS = 40  # columns of the table of units that a reader can still take in
TASKS = {"cells": "label of cells", "genes": "class of genes", "mixing": "mixing of batches"}
Score = Mapping[str, Any]


def benchmarks(spec: ReportSpec, figures: Figures, tables: Path) -> tuple[list[dict[str, Any]], Maps]:
    """One page a benchmark, and the maps, of which the pages have drawn what they need.

    Parameters
    ----------
    tables
        Folder of BENCHMARK.tsv, every number of a benchmark.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in spec.scores:
        score = read_score(path)
        score["path"] = Path(path)
        groups.setdefault(score["benchmark"], []).append(score)
    maps = Maps(spec, figures)
    maps.plan([column for scores in groups.values() for column in _columns(scores[0])])
    pages = [
        _page(name, number, scores, spec.statements.get(name, {}), figures, maps, tables)
        for number, (name, scores) in enumerate(groups.items(), start=1)
    ]
    return pages, maps


def _page(
    name: str, number: int, scores: list[dict[str, Any]], statement: Mapping[str, Any], figures: Figures, maps: Maps,
    tables: Path,
) -> dict[str, Any]:  # fmt: skip
    first, place = scores[0], f"benchmark-{number}"
    task = first["task"]
    main = MAIN_METRICS[task][0]
    scores = sorted(
        scores, key=lambda s: (max(KINDS.index(s["kind"]), 1), -value(s, main), s["method"])
    )  # models and baselines compete in one list
    first = scores[0]
    extra = [m for m in EXTRA_METRICS[task] if any(value(s, m) >= 0 for s in scores)]
    metrics = [*MAIN_METRICS[task], *extra]
    shown = metrics if task != "mixing" else [m for m in metrics if m in (main, "bio_conservation")]
    best = {kind: next(iter(ranked(scores, main, kind)), None) for kind in ("model", "baseline")}
    leader = next(iter(ranked(scores, main)), None)
    table = f"{file_stem(name)}.tsv"
    write_scores(scores, tables / table)
    shared = [note for note in first["notes"] if all(note in s["notes"] for s in scores)]
    units = _units(scores, main)
    roc, matrices = charts.of_classifiers(name, scores, main, figures) if task != "mixing" else ([], [])
    drawn = first["published"] or {}
    return {
        "name": name,
        "place": place,
        "title": words.title(name),
        "task": TASKS[task],
        "question": statement.get("question") or verdicts.question(first),
        "new": bool(statement.get("new")),
        "protocol": statement.get("protocol"),
        "citation": list(statement.get("citation") or []),
        "pretraining": list(statement.get("pretraining") or []),
        "dataset": str(first["dataset"]).replace("+", ", "),
        "label": first["label"],
        "classes": first["classes"] or [],
        "n": first["n"],
        "tested": "genes" if task == "genes" else "cells",
        "split": verdicts.describe_split(first),
        "interval": verdicts.describe_interval(first),
        "metrics": [words.metric(m) for m in shown],
        "rows": [_row(s, shown, best=s is leader) for s in scores],
        "singles": _singles(scores, metrics) if task == "mixing" else None,
        "units": units,
        "published": _published(scores, main),
        "verdict": verdicts.verdict(scores, main),
        "best": {kind: None if s is None else _leader(s, main) for kind, s in best.items()},
        "per_class": _per_class([s for s in best.values() if s is not None]),
        "votes": _votes([s for s in best.values() if s is not None]),
        "notes": shared,
        "method_notes": [
            (row_name(s), [n for n in s["notes"] if n not in shared])
            for s in scores if set(s["notes"]) - set(shared)
        ],
        "forests": charts.forests(name, scores, _to_draw(scores, main, drawn), figures),
        "mixing": charts.of_mixing(name, scores, figures) if task == "mixing" else [],
        "curves": roc,
        "matrices": matrices,
        "by_unit": None if units is None else charts.units(name, scores, main, figures, what=units["what"]),
        "maps": _maps(first, scores, maps, place),
        "files": _files(scores),
        "table": table,
    }  # fmt: skip


def _to_draw(scores: Sequence[Score], main: str, published: Mapping[str, Any]) -> list[str]:
    """The metrics that have a forest plot: the main one, and those with a published number or over tokens."""
    wanted = dict.fromkeys([main, *published, "auc_tokens"])
    return [m for m in wanted if m == main or any(value(s, m) >= 0 for s in scores)]


def _row(score: Score, metrics: Sequence[str], *, best: bool) -> dict[str, Any]:
    return {
        "method": row_name(score),
        "id": score["method"],
        "kind": score["kind"],
        "best": best,
        "cells": [_cell(score, metric) for metric in metrics],
    }


def _cell(score: Score, metric: str) -> dict[str, str]:
    entry = score["metrics"].get(metric)
    if entry is None or value(score, metric) < 0:
        return {"value": "–", "interval": ""}
    low, high, sd = entry.get("low"), entry.get("high"), entry.get("sd")
    interval = f"folds ± {words.score(sd)}" if sd is not None else ""
    if low is not None:
        interval = f"{words.score(low)} to {words.score(high)}"
    return {"value": words.score(entry["value"]), "interval": interval}


def _leader(score: Score, metric: str) -> dict[str, str]:
    return {"method": row_name(score), **_cell(score, metric)}


def _singles(scores: Sequence[Score], metrics: Sequence[str]) -> dict[str, Any]:
    """The single metrics of mixing, by method."""
    names = [m for m in metrics if m not in ("batch_correction", "bio_conservation")]
    return {
        "names": [words.metric(m) for m in names],
        "rows": [(row_name(s), [_cell(s, m)["value"] for m in names]) for s in scores],
    }


def _published(scores: Sequence[Score], main: str) -> list[dict[str, Any]]:
    """Published numbers, each with the best that any model has here in the same metric."""
    found = []
    for metric, entries in sorted((scores[0]["published"] or {}).items(), key=lambda item: item[0] != main):
        here = next(iter(ranked(scores, metric, "model")), None)
        for entry in entries:
            found.append(
                {
                    "metric": words.metric(metric),
                    "main": metric == main,
                    "value": words.plus_minus(entry["value"], entry.get("sd")),
                    "source": entry.get("source"),
                    "protocol": entry.get("protocol"),
                    "here": None if here is None else _leader(here, metric),
                }
            )
    return found


def _units(scores: Sequence[Score], metric: str) -> dict[str, Any] | None:
    """The table of values per unit (or fold) and method, where there are several."""
    values = [charts.by_unit(s, metric) for s in scores]
    names = list(dict.fromkeys(name for v in values for name in v))
    if not 2 <= len(names) <= MAX_UNITS:
        return None
    first = scores[0]
    by_unit = any(s["metrics"][metric].get("units") for s in scores)
    return {
        "what": ((first["split"] or {}).get("unit") or "dataset") if by_unit else "fold",
        "names": names,
        "rows": [
            (row_name(s), [words.score(v.get(name)) for name in names])
            for s, v in zip(scores, values, strict=True)
        ],
        "open": first["metrics"][metric]["low"] is None,
        "folds": _folds(scores, metric) if by_unit else None,
    }


def _folds(scores: Sequence[Score], metric: str) -> dict[str, Any] | None:
    """Values of each fold, where folds are not units one by one."""
    names = (scores[0]["split"] or {}).get("names") or []
    folds = [list(s["metrics"][metric].get("folds") or []) for s in scores]
    units = scores[0]["metrics"][metric].get("units") or {}
    if (
        not 2 <= len(names) <= MAX_UNITS
        or len(names) == len(units)
        or any(len(f) != len(names) for f in folds)
    ):
        return None
    return {
        "names": names,
        "rows": [
            (row_name(s), [words.score(v) for v in values]) for s, values in zip(scores, folds, strict=True)
        ],
    }


def _per_class(best: Sequence[Score]) -> dict[str, Any] | None:
    """Precision, recall and F1 of every class, of the best model beside the best baseline."""
    with_classes = [s for s in best if s.get("per_class")]
    if not with_classes:
        return None
    keys = ("precision", "recall", "f1")
    return {
        "methods": [row_name(s) for s in with_classes],
        "rows": [
            (name, entry["n"], [words.score(s["per_class"].get(name, {}).get(k)) for s in with_classes for k in keys])
            for name, entry in with_classes[0]["per_class"].items()
        ],
    }  # fmt: skip


def _votes(best: Sequence[Score]) -> dict[str, Any] | None:
    """What most cells of each unit are predicted to be, where each unit has one label."""
    voting = [s for s in best if s.get("votes")]
    if not voting:
        return None
    by_unit = [{vote["unit"]: vote for vote in s["votes"]} for s in voting]
    return {
        "what": (voting[0]["split"] or {}).get("unit") or "unit",
        "methods": [row_name(s) for s in voting],
        "rows": [
            {
                "unit": unit,
                "label": vote["label"],
                "cells": vote["cells"],
                "votes": [_vote(votes.get(unit)) for votes in by_unit],
            }
            for unit, vote in by_unit[0].items()
        ],
    }


def _vote(vote: Mapping[str, Any] | None) -> dict[str, Any]:
    if vote is None:
        return {"predicted": "–", "share": "", "right": True}
    share = words.share(vote["share"].get(vote["predicted"]), 0)
    return {"predicted": vote["predicted"], "share": share, "right": vote["predicted"] == vote["label"]}


def _columns(score: Score) -> list[str]:
    """Columns of the cells that a benchmark is about."""
    unit = (score["split"] or {}).get("unit") or score.get("batch")
    columns = [unit] if score["task"] == "genes" else [score["label"], unit]
    return [str(c) for c in columns if c and c != "dataset"]


def _maps(first: Score, scores: Sequence[Score], maps: Maps, place: str) -> list[dict[str, Any]]:
    """Maps of the benchmark's datasets by the embeddings scored in it."""
    methods = {s["method"].removesuffix(words.FINETUNED_SUFFIX) for s in scores if s["kind"] == "model"}
    datasets = set(str(first["dataset"]).split("+"))
    found = []
    for name, embedding in maps.files:
        if name in datasets and embedding in methods:
            columns = _columns(first) if first["task"] != "genes" else maps.own[name]
            found.append(maps.show(place, name, embedding, columns))
    return [entry for entry in found if entry is not None]


def _files(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The files of each method."""
    found = []
    for score in scores:
        path = Path(score["path"])
        beside = path.with_name(f"{path.stem}.predictions.parquet")
        paths = [("score", path), *([("predictions", beside)] if beside.is_file() else [])]
        found.append({"method": row_name(score), "paths": paths})
    return found
