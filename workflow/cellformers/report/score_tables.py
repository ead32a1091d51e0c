"""All numbers of a benchmark as a tsv file: one row a method, metric, and fold or unit."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cellformers.io.files import as_field, write_text
from cellformers.report import verdicts

COLUMNS = (
    "benchmark", "task", "dataset", "label", "method", "kind", "method_in_words", "metric", "of", "name", "value",
    "low", "high", "sd", "level", "resampled", "chance", "source", "protocol",
)  # fmt: skip
Score = Mapping[str, Any]


def write_scores(scores: Sequence[Score], path: Path) -> None:
    """Write every number of a benchmark.

    `of` says what a value is of: `all` (the score itself, with its interval), `fold` or `unit` (`name` says which), or
    `published` (once a benchmark, without a method). Empty: there is none.
    """
    rows = [row for score in scores for row in _rows(score)]
    rows += [
        {
            "metric": metric, "of": "published", "value": _text(p["value"]), "sd": _text(p.get("sd")),
            "source": p.get("source") or "", "protocol": p.get("protocol") or "",
        }
        for metric, entries in (scores[0]["published"] or {}).items()
        for p in entries
    ]  # fmt: skip
    shared = {key: scores[0][key] for key in ("benchmark", "task", "dataset", "label")}
    lines = ["\t".join(COLUMNS)]
    lines += ["\t".join(as_field(str((shared | row).get(c) or "")) for c in COLUMNS) for row in rows]
    write_text("\n".join(lines) + "\n", path)


def _rows(score: Score) -> list[dict[str, str]]:
    method = {
        "method": score["method"],
        "kind": score["kind"],
        "method_in_words": verdicts.row_name(score),
    }
    interval, chance = score["interval"] or {}, score["chance"] or {}
    names = (score["split"] or {}).get("names") or []
    rows = []
    for metric, entry in score["metrics"].items():
        if not isinstance(entry, dict) or entry.get("value") is None:
            continue
        drawn = entry.get("low") is not None
        rows.append(
            method
            | {
                "metric": metric, "of": "all", "value": _text(entry["value"]), "low": _text(entry.get("low")),
                "high": _text(entry.get("high")), "sd": _text(entry.get("sd")),
                "level": _text(interval.get("level")) if drawn else "",
                "resampled": interval.get("resampled") if drawn else "", "chance": _text(chance.get(metric)),
            }
        )  # fmt: skip
        for number, value in enumerate(entry.get("folds") or []):
            name = names[number] if number < len(names) else f"fold {number + 1}"
            rows.append(method | {"metric": metric, "of": "fold", "name": name, "value": _text(value)})
        for name, value in (entry.get("units") or {}).items():
            rows.append(method | {"metric": metric, "of": "unit", "name": name, "value": _text(value)})
    return rows


def _text(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.6g}"
