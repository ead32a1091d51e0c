"""Scores on disk and the table of all of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from cellformers.errors import UserError
from cellformers.evaluate.scores import published_by_metric, read_score, summarise, write_score
from cellformers.io.files import stamp


def score(
    benchmark: str,
    method: str,
    kind: str,
    value: float,
    *,
    task: str = "cells",
    low: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    entry = {"value": value, "low": low, "high": None if low is None else value, "folds": [value, value]}
    names = ("macro_f1", "accuracy") if task == "cells" else ("auc",)
    return {
        "benchmark": benchmark, "task": task, "dataset": "d", "method": method, "kind": kind, "label": "celltype",
        "classes": ["a", "b"],
        "split": {"kind": "held-out", "unit": "donor", "seed": 0, "folds": 2, "names": ["d1", "d2"], "units": None},
        "n": 10, "interval": {"resampled": "donor", "note": None},
        "metrics": {name: dict(entry, units={"d1": value, "d2": value}) for name in names},
        "chance": dict.fromkeys(names, 0.5), "published": None, "notes": [],
        **stamp("evaluate", 1, parameters={}, inputs={"split": "sha256:1"}),
    } | more  # fmt: skip


def table(tmp_path: Path, *scores: dict[str, Any]) -> list[dict[str, str]]:
    paths = []
    for i, one in enumerate(scores):
        paths.append(tmp_path / f"{i}.json")
        write_score(one, paths[-1])
    rows = summarise(paths, tmp_path / "benchmarks.tsv")
    once = (tmp_path / "benchmarks.tsv").read_bytes()
    assert summarise(paths[::-1], tmp_path / "benchmarks.tsv") == rows
    assert (tmp_path / "benchmarks.tsv").read_bytes() == once
    lines = once.decode().splitlines()
    assert [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]] == rows
    return rows


def test_best_first_controls_last(tmp_path: Path) -> None:
    published = published_by_metric(
        [{"metric": "macro_f1", "value": 0.864, "source": "paper, fine-tuned"}], task="cells"
    )
    rows = table(
        tmp_path,
        score("types", "small", "model", 0.9, low=0.8, published=published),
        score("types", "oracle", "oracle", 1.0),
        score("types", "permuted", "control", 0.45, low=0.4),
        score("types", "pca_hvg", "baseline", 0.7, notes=["sorts are lanes"]),
    )
    macro = [r for r in rows if r["metric"] == "macro_f1"]
    assert [r["method"] for r in macro] == ["small", "pca_hvg", "permuted", "oracle"]
    assert [r["note"] for r in macro] == ["best", "sorts are lanes", "", ""]
    assert macro[0]["published"] == "0.8640"
    assert macro[0]["published_source"] == "paper, fine-tuned"
    assert (macro[0]["low"], macro[1]["low"]) == ("0.8000", "")
    assert macro[0]["split"] == "held-out donor"
    assert macro[0]["folds"] == "d1=0.9000; d2=0.9000"
    assert [r["metric"] for r in rows] == ["macro_f1"] * 4 + ["accuracy"] * 4


def test_a_baseline_that_wins_is_named(tmp_path: Path) -> None:
    rows = table(
        tmp_path,
        score("genes", "mean_expression", "baseline", 0.8, task="genes"),
        score("genes", "small", "model", 0.7, task="genes"),
        score("genes", "large", "model", 0.75, task="genes"),
    )
    assert [(r["method"], r["note"]) for r in rows] == [
        ("mean_expression", "best; baseline wins"), ("large", ""), ("small", ""),
    ]  # fmt: skip


def test_a_tie_is_a_tie_and_a_leaking_control_is_named(tmp_path: Path) -> None:
    rows = table(
        tmp_path,
        score("genes", "a", "baseline", 0.80001, task="genes"),
        score("genes", "b", "model", 0.8, task="genes"),
        score("genes", "permuted", "control", 0.7, task="genes", low=0.6),
    )
    assert [r["note"] for r in rows] == ["best (tie)", "best (tie)", "control above chance: look for a leak"]


def test_only_whole_scores_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    whole = score("b", "m", "model", 0.5)
    for broken, match in (
        ({k: v for k, v in whole.items() if k != "notes"}, "lacks 'notes'"),
        (whole | {"metrics": {}}, "no complete metric"),
        (score("b", "m", "model", float("nan")), "not within 0 to 1"),
        (score("b", "m", "model", 0.5, low=0.6), "broken interval"),
        (whole | {"kind": "modell"}, "unknown kind"),
    ):
        with pytest.raises(ValueError, match=match):
            write_score(broken, path)
        assert not path.exists()
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=match):
            read_score(path)
        path.unlink()
    with pytest.raises(UserError, match="no such file"):
        read_score(path)


def test_scores_that_do_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="m on b is scored in"):
        table(tmp_path, score("b", "m", "model", 0.5), score("b", "m", "model", 0.6))
    other = score("b", "n", "model", 0.5) | {"inputs": {"split": "sha256:2"}}
    with pytest.raises(UserError, match="different splits"):
        table(tmp_path, score("b", "m", "model", 0.5), other)


def test_a_published_number_stands_beside_the_metric_it_is_of(tmp_path: Path) -> None:
    """The token AUC of a fine-tuned model has rows of its own; methods without it have none there."""
    published = published_by_metric(
        [
            {"metric": "auc_tokens", "value": 0.91, "sd": 0.02, "source": "a paper"},
            {"metric": "auc_tokens", "value": 0.89, "sd": None, "source": "a brief"},
        ],
        task="genes",
    )
    tuned = score("dosage", "v1-finetuned", "model", 0.8, task="genes", published=published)
    tuned["metrics"]["auc_tokens"] = {"value": 0.85, "low": 0.8, "high": 0.9, "folds": [0.84, 0.86]}
    tuned["metrics"]["average_precision"] = {"value": 0.7, "low": None, "high": None, "folds": []}
    rows = table(
        tmp_path, tuned, score("dosage", "detection", "baseline", 0.6, task="genes", published=published)
    )
    assert [(r["metric"], r["method"]) for r in rows] == [
        ("auc", "v1-finetuned"), ("auc", "detection"), ("auc_tokens", "v1-finetuned"),
        ("average_precision", "v1-finetuned"),
    ]  # fmt: skip
    assert [r["published"] for r in rows] == ["", "", "0.9100 ± 0.0200; 0.8900", ""]
    assert rows[2]["published_source"] == "a paper; a brief"
    assert (rows[2]["folds"], rows[3]["folds"]) == ("d1=0.8400; d2=0.8600", "")
