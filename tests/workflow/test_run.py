"""The whole workflow on small data: any number of shards gives the same bytes, a killed run goes on, reports open."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import pyarrow.parquet as pq
import pytest
import yaml

from cellformers.provenance import is_measured

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.workflow


def small(shards: int) -> dict[str, object]:
    """The demo in little."""
    return {
        "simulate": {"seed": 5, "cells": 360},
        "datasets": {
            "atlas": {"simulated": "atlas", "shards": shards, "label": "cell_type", "batch": "donor"},
            "second": {"simulated": "second", "label": "cell_type"},
        },
        "corpora": {"both": {"datasets": ["atlas", "second"]}},
        "vocabularies": {"own": {"corpus": "both", "context_length": 256}},
        "models": {
            "tiny": {
                "vocabulary": "own",
                "pretrain": {
                    "layers": 2,
                    "hidden_size": 32,
                    "heads": 2,
                    "intermediate_size": 32,
                    "steps": 20,
                },
            },
            "further": {"pretrain": {"continue_from": "tiny", "datasets": ["second"], "steps": 6}},
            "typed": {
                "finetune": {
                    "model": "tiny",
                    "datasets": ["atlas"],
                    "label": "cell_type",
                    "unit": "donor",
                    "epochs": 0.3,
                    "predict": ["second"],
                }
            },
        },
        "embeddings": {"tiny": {"model": "tiny", "mode": "cell", "states": "cell_type"}},
        "benchmarks": {
            "types": {
                "task": "cells",
                "train": ["atlas"],
                "label": "cell_type",
                "unit": "donor",
                "folds": 2,
                "finetune": {"models": ["tiny"], "epochs": 0.3, "heldout": 0},
            },
            "dosage": {"task": "genes", "dataset": "atlas", "labels": {"simulated": True}},
        },
    }


TARGETS = (
    "results/benchmarks.tsv",
    "results/models/further/model.safetensors",
    "results/second/predictions/typed.parquet",
    "results/atlas/embeddings/tiny.states.parquet",
    "results/atlas/qc/columns.json",
    "results/second/qc/columns.json",
)
WHOLE = (1, 7)  # numbers of shards of the runs that go on to the report and the record


def merged(folder: Path) -> dict[str, str]:
    """Digests of every merged artefact; those of single shards and of times are left out."""
    results = folder / "results"
    paths = [
        path
        for path in results.rglob("*")
        if path.is_file() and "-of-" not in path.name and not {"runtime", "logs", "figures"} & set(path.parts)
    ]
    skipped = {"config.yaml", "provenance.json", "report.html"}
    return {
        str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.name not in skipped
    }


def rows(folder: Path, pattern: str) -> list[dict[str, object]]:
    """The rows of all shards, concatenated."""
    shards = sorted((folder / "results").glob(pattern))
    assert shards
    return [row for shard in shards for row in pq.read_table(shard).to_pylist()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("shards", WHOLE)
def test_shards_change_nothing(snakemake: Run, runs: Path, shards: int) -> None:
    cores = "1" if shards == 7 else "2"
    done = snakemake(runs / str(shards), small(shards), "--cores", cores, "--quiet", "all", "--", "all")
    assert done.returncode == 0, done.stderr[-4000:]
    if shards == 1:
        return
    one = runs / "1"
    if not (one / "results" / "benchmarks.tsv").exists():
        pytest.skip("the run with one shard did not complete")
    expected = merged(one)
    assert len(expected) > 40
    found = merged(runs / str(shards))
    assert {name for name in expected if found.get(name) != expected[name]} == set()
    assert set(found) == set(expected)
    for pattern in ("atlas/tokens/own/*.parquet", "atlas/embeddings/tiny/*.parquet"):
        assert rows(runs / str(shards), pattern) == rows(one, pattern)


def whole(runs: Path, shards: int) -> Path:
    """The results of a whole run."""
    results = runs / str(shards) / "results"
    if not (results / "provenance.json").exists():
        pytest.skip(f"the run with {shards} shards did not complete")
    return results


def test_compare_finds_whole_runs_equal_on_other_cores_with_other_shards(runs: Path) -> None:
    ended = command_line.run("compare", whole(runs, 1), whole(runs, 7))
    assert ended.code == 0, ended.out
    assert "circumstances (they decide nothing): 1\n  config.shards.atlas: 1 -> 7\n" in ended.out
    assert "Nothing differs" in ended.out


def test_compare_finds_a_changed_weight(runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "results"
    shutil.copytree(whole(runs, 1), other)
    with (other / "models" / "tiny" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    ended = command_line.run("compare", whole(runs, 1), other)
    assert ended.code == 1
    assert "models/tiny/model.safetensors\n      column " in ended.out
    assert " 1 differ." in ended.out


@pytest.mark.parametrize("shards", WHOLE)
def test_the_record_has_every_file_of_a_run(runs: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    results = whole(runs, shards)
    files = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    record = json.loads((results / "provenance.json").read_text())
    # beside its temporary weights, of no use without them and no output of a rule
    rest = re.compile(r".*/fold-\d+/(config\.json|vocabulary/.*)")
    assert set(record["artefacts"]) == {n for n in files if not is_measured(n) and not rest.fullmatch(n)}
    monkeypatch.chdir(results.parent)
    again = results.parent / "again.json"
    ended = command_line.run(
        "provenance", "config.yaml", "--results", "results", "-o", again, "--threads", "3"
    )
    assert ended.code == 0, ended.err
    assert json.loads(again.read_text())["artefacts"] == record["artefacts"]


def test_another_seed_draws_anew_and_changes_nothing_else(snakemake: Run, runs: Path) -> None:
    whole(runs, 1)
    other = runs / "seed.yaml"
    other.write_text(yaml.safe_dump(small(1) | {"seed": 1}))
    done = snakemake(runs / "1", None, "--configfile", str(other), "--dry-run", "--quiet", "host")
    assert done.returncode == 0, done.stdout + done.stderr
    planned = set(re.findall(r"^(\w+) +\d+$", done.stdout + done.stderr, flags=re.MULTILINE))
    assert {"split", "randomize", "map", "evaluate", "report", "provenance"} <= planned
    data = {"simulate", "ingest_atlas", "qc", "sketch", "medians", "vocabulary", "tokenize"}
    assert not planned & (data | {"pretrain_model", "finetune_model", "predict"})


def test_scores_stand_beside_their_controls(runs: Path) -> None:
    folder = runs / "1" / "results" / "benchmarks"
    if not folder.exists():
        pytest.skip("the run with one shard did not complete")
    dosage = {path.stem: json.loads(path.read_text()) for path in (folder / "dosage").glob("*.json")}
    assert dosage["oracle"]["metrics"]["auc"]["value"] >= 0.9
    for baseline in ("mean_expression", "detection"):
        assert 0.35 <= dosage[baseline]["metrics"]["auc"]["value"] <= 0.65
    types = {path.stem: json.loads(path.read_text()) for path in (folder / "types").glob("*.json")}
    baselines = {"pca_hvg", "log_counts", "rank_only", "permuted"}
    assert set(types) == {"split", "tiny", "tiny-random", "tiny-finetuned", *baselines}
    value = {name: score["metrics"]["macro_f1"]["value"] for name, score in types.items() if name != "split"}
    assert value["permuted"] < 0.3 < value["pca_hvg"]


@pytest.mark.parametrize(
    ("change", "first", "spared"),
    [
        (lambda c: None, None, "qc"),
        (lambda c: c["datasets"]["atlas"].update(qc={"method": "mad"}), "qc", "ingest_atlas"),
        (lambda c: c["datasets"]["atlas"].update(make_unique=True), "ingest_atlas", "ingest_second"),
        (lambda c: c["datasets"]["atlas"].update(label="batch"), "columns", "embed_cells"),
        (lambda c: c["benchmarks"]["types"].pop("unit"), "split", "embed_cells"),
        (lambda c: c["benchmarks"]["types"].update(note="a caveat"), "split", "embed_cells"),
        (lambda c: c["benchmarks"]["types"].update(question="What?"), None, "split"),
        (lambda c: c["benchmarks"]["types"]["finetune"].update(epochs=0.2), "finetune_fold", "split"),
        (lambda c: c["datasets"]["atlas"].update(max_cells=300), "qc", "ingest_atlas"),
        (lambda c: c["embeddings"]["tiny"].update(layer=0), "embed_cells", "pretrain_model"),
        (lambda c: c["models"]["tiny"]["pretrain"].update(steps=21), "pretrain_model", "tokenize"),
        (lambda c: c.update(seed=1), "split", "qc"),
        (lambda c: c["models"]["typed"]["finetune"].update(epochs=0.4), "finetune_model", "pretrain_model"),
        (lambda c: c["models"]["further"]["pretrain"].update(seed=2), "pretrain_model", "finetune_model"),
        (lambda c: c["embeddings"]["tiny"].update(states="donor"), "states", "embed_cells"),
        (lambda c: c["models"]["typed"]["finetune"].update(label="batch"), "finetune_model", "tokenize"),
    ],
)
def test_a_changed_key_reruns_what_depends_on_it(
    snakemake: Run, runs: Path, change: Callable[[Any], None], first: str | None, spared: str
) -> None:
    if not (runs / "1" / "results" / "benchmarks.tsv").exists():
        pytest.skip("the run with one shard did not complete")
    config = small(1)
    change(config)
    other = runs / "changed.yaml"
    other.write_text(yaml.safe_dump(config))
    target = ("--dry-run", "--quiet", "host", "--", *TARGETS)
    done = snakemake(runs / "1", None, "--configfile", str(other), *target)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = set(re.findall(r"^(\w+) +\d+$", done.stdout + done.stderr, flags=re.MULTILINE))
    assert spared not in planned
    assert first in planned if first else not planned


def test_killed_run_goes_on_to_the_same_bytes(snakemake: Run, runs: Path) -> None:
    one = runs / "1"
    if not (one / "results" / "benchmarks.tsv").exists():
        pytest.skip("the run with one shard did not complete")
    folder = runs / "killed"
    folder.mkdir()
    (folder / "config.yaml").write_text((one / "config.yaml").read_text())
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    command += ["--directory", str(folder), "--configfile", str(folder / "config.yaml"), "--quiet", "all"]
    target = ["--", "results/models/tiny/config.json"]
    with subprocess.Popen(command + target, start_new_session=True) as process:
        deadline = time.monotonic() + 300
        while not (folder / "results" / "atlas" / "cells.parquet").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGKILL)
    snakemake(folder, None, "--configfile", str(folder / "config.yaml"), "--unlock")
    done = snakemake(folder, None, "--configfile", str(folder / "config.yaml"), "--quiet", "all", *target)
    assert done.returncode == 0, done.stderr[-4000:]
    expected, found = merged(one), merged(folder)
    assert {name for name in found if found[name] != expected.get(name)} == set()
    assert not list(folder.rglob(".part-*"))
