"""The record of a run: the same bytes for the same run, nothing of the machine's whereabouts, no foreign code run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import run

from cellformers import config
from cellformers.errors import UserError
from cellformers.provenance import artefacts, inputs, record
from cellformers.provenance.checkout import checkout_state
from cellformers.provenance.surroundings import code_digest

PASSWORD = "hunter2"


def given() -> dict[str, Any]:
    return {
        "datasets": {"mine": {"path": "raw/mine.h5ad", "shards": 2}},
        "models": {"own": {"path": "raw/model"}},
        "embeddings": {"own": {"model": "own"}},
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a run has been made, all but its record."""
    monkeypatch.chdir(tmp_path)
    for name in ("raw/mine.h5ad", "raw/model/config.json", "raw/model/vocabulary/tokens.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given()))
    for name in artefacts(config.load(given())):
        path = tmp_path / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in ("figures", "tables"):
            path.mkdir()
            for file in ("umap.svg", "runtime.svg", "runtime.png") if name == "figures" else ("t.tsv",):
                (path / file).write_text(file)
        else:
            path.write_text(name)
    return tmp_path


def make(folder: Path, output: str = "record.json", *options: str) -> bytes:
    ended = run("provenance", "config.yaml", "--results", "results", "-o", output, "--quiet", *options)
    assert ended.code == 0, ended.err
    return (folder / output).read_bytes()


def test_the_same_run_gives_the_same_bytes_whatever_the_threads_and_leftovers(folder: Path) -> None:
    first = make(folder)
    (folder / "results" / "mine" / "tokens" / "own" / "0001-of-0009.parquet").write_text("of another run")
    (folder / "results" / "figures" / ".part-1-x.svg").write_text("half written")
    (folder / "results" / "logs").mkdir()
    (folder / "results" / "logs" / "x.log").write_text("a time")
    os.utime(folder / "results" / "mine" / "cells.parquet", (1, 1))
    assert make(folder, "results/provenance.json", "--threads", "4") == first
    assert make(folder) == first


def test_it_holds_versions_config_and_digests(folder: Path) -> None:
    found = json.loads(make(folder))
    assert found["versions"].keys() >= {"cellformers", "python", "snakemake", "numpy", "torch"}
    assert set(found["inputs"]) == {
        "raw/mine.h5ad", "raw/model/config.json", "raw/model/vocabulary/tokens.parquet",
    }  # fmt: skip
    assert found["config"]["given"] == given()
    assert found["config"]["validated"]["datasets"]["mine"]["qc"]["min_genes"] == 7
    names = set(found["artefacts"])
    assert {"mine/counts/0002-of-0002.h5ad", "figures/umap.svg", "tables/t.tsv", "report.html"} <= names
    assert not names & {"figures/runtime.svg", "figures/runtime.png", "config.yaml"}
    entry = found["artefacts"]["mine/cells.parquet"]
    done = subprocess.run(
        ["sha256sum", "results/mine/cells.parquet"], capture_output=True, text=True, check=True
    )
    assert entry == {"size": len("mine/cells.parquet"), "sha256": done.stdout.split()[0]}


def test_it_tells_nothing_of_where_it_was_made(folder: Path) -> None:
    text = make(folder).decode()
    for word in (str(folder), f'"{os.uname().nodename}"', str(Path.home()) + "/"):
        assert word not in text
    found = json.loads(text)
    assert not {"time", "date", "host", "user", "threads", "cores"} & set(found)


def test_the_config_is_read_from_stdin(folder: Path) -> None:
    done = subprocess.run(
        ["cellformers", "provenance", "-", "--results", "results", "-o", "piped.json", "--quiet"],
        input=yaml.safe_dump({**given(), "pathvars": {"results": "x"}}), text=True, check=False, timeout=60,
        capture_output=True, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "piped.json").read_bytes() == make(folder)


def test_the_folder_of_the_raw_files_is_not_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make(folder)
    monkeypatch.chdir(folder / "raw")
    paths = ["../config.yaml", "--results", "../results", "--root", "..", "-o", "../moved.json"]
    ended = run("provenance", *paths, "--quiet")
    assert ended.code == 0, ended.err
    assert (folder / "moved.json").read_bytes() == expected


def test_the_cost_of_a_run_does_not_change_the_digest_of_its_report(folder: Path) -> None:
    page = '<section id="data">{}</section>\n<section id="cost">{} s</section>\n<p>end</p>'
    digests = []
    for data, seconds in (("a", 1), ("a", 2), ("b", 1)):
        (folder / "results" / "report.html").write_text(page.format(data, seconds))
        digests.append(json.loads(make(folder))["artefacts"]["report.html"])
    assert digests[0] == digests[1] != digests[2]


def test_passwords_and_keys_of_addresses_are_left_out(folder: Path) -> None:
    values = given()
    values["benchmarks"] = {
        "b": {
            "task": "mixing", "datasets": ["mine"], "batch": "donor", "label": "type", "baselines": [],
            "note": f"see https://me:{PASSWORD}@example.org/x?token={PASSWORD}&page=2 and s3://{PASSWORD}@bucket/a",
        }
    }  # fmt: skip
    for name in artefacts(config.load(values)):
        path = folder / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(name)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    text = make(folder).decode()
    assert PASSWORD not in text
    assert text.count("see https://example.org/x?token=***&page=2 and s3://bucket/a") == 2


@pytest.mark.parametrize("gone", ["results/mine/tokens/own/0002-of-0002.parquet", "raw/mine.h5ad"])
def test_an_incomplete_run_has_no_record(folder: Path, gone: str) -> None:
    (folder / gone).unlink()
    ended = run("provenance", "config.yaml", "--results", "results", "-o", "record.json", "--quiet")
    assert ended.code == 2
    assert gone in ended.err
    assert ended.err.count("\n") == 1
    assert not (folder / "record.json").exists()


def test_a_wrong_config_is_one_line(folder: Path) -> None:
    for text in ("datasets: [", "- a", "!!python/object/apply:os.system ['touch ran']", "datasets: {}"):
        (folder / "config.yaml").write_text(text)
        ended = run("provenance", "config.yaml", "--results", "results", "-o", "record.json")
        assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert not (folder / "ran").exists()


def test_samples_and_their_table_are_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "samples.tsv").write_text("sample\tpath\na\tx.h5ad\nb\ty.h5ad\n")
    found = inputs(config.load({"datasets": {"m": {"samples": "t/samples.tsv"}}}))
    assert found == ["t/samples.tsv", "t/x.h5ad", "t/y.h5ad"]


def test_registered_sources_are_named_with_their_digests() -> None:
    from cellformers.provenance.record import sources

    text = (Path(__file__).parents[1] / "config" / "benchmarks.yaml").read_text()
    found = sources(config.load(yaml.safe_load(text) | {"benchmarks": {}}))
    assert found["models"]["v1"]["checkpoint"] == "geneformer-v1-10m"
    assert all(len(digest) == 64 for digest in found["vocabularies"]["gc30M"]["files"].values())
    assert "gse129096" in found["deposits"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository with two commits that looks like a checkout; its hooks and filters would leave a trace."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed, so no repository can be made")
    root = tmp_path / "checkout"
    root.mkdir()

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)

    git("init", "--initial-branch", "main")
    (root / "Snakefile").write_text("rule all:\n" * 200)
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "file with space.txt").write_text("one\n")
    git("add", ".")
    git("commit", "-m", "first")
    (root / "Snakefile").write_text("rule all:\n" * 200 + "# more\n")
    git("commit", "-am", "second")
    for hook in ("fsmonitor", "post-index-change"):
        path = root / ".git" / "hooks" / hook
        path.write_text(f"#!/bin/sh\ntouch {root}/ran\n")
        path.chmod(0o755)
    git("config", "core.fsmonitor", str(root / ".git" / "hooks" / "fsmonitor"))
    git("config", "filter.evil.clean", f"touch {root}/ran")
    (root / ".git" / "info" / "attributes").write_text("* filter=evil\n")
    return root


def head_of(root: Path) -> str:
    options = ["-c", "core.fsmonitor=false"]
    done = subprocess.run(
        ["git", *options, "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("packed", [False, True])
def test_commit_and_changes_are_read_without_git(
    checkout: Path, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = head_of(checkout)
    if packed:  # objects as deltas in a pack, the branch in packed-refs
        subprocess.run(["git", "gc", "--quiet"], cwd=checkout, check=True)
        assert not (checkout / ".git" / "refs" / "heads" / "main").exists()
    (checkout / "ran").unlink(missing_ok=True)
    monkeypatch.setenv("PATH", "")
    assert checkout_state(checkout) == {"commit": commit, "dirty": False}
    (checkout / "untracked.txt").write_text("x")
    assert checkout_state(checkout)["dirty"] is False
    (checkout / "deep" / "er" / "file with space.txt").write_text("two\n")
    assert checkout_state(checkout) == {"commit": commit, "dirty": True}
    (checkout / "deep" / "er" / "file with space.txt").unlink()
    assert checkout_state(checkout)["dirty"] is True
    assert not (checkout / "ran").exists()


def test_a_worktree_has_its_own_commit(checkout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    command = ["git", "-c", "core.fsmonitor=false", "worktree", "add", "--detach", str(other), "HEAD~1"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    assert checkout_state(other) == {"commit": head_of(other), "dirty": False}


def test_what_is_no_checkout_has_no_commit_but_a_reason(tmp_path: Path) -> None:
    assert checkout_state(tmp_path)["commit"] is None
    assert "not in a checkout" in str(checkout_state(tmp_path)["reason"])
    (tmp_path / "Snakefile").touch()
    git = tmp_path / ".git"
    git.mkdir()
    for head in (None, "ref: ../../secret\n", "ref: refs/heads/main\n", "\xff"):
        if head is not None:
            (git / "HEAD").write_text(head)
        found = checkout_state(tmp_path)
        assert found["commit"] is None
        assert found["reason"]


def test_a_damaged_repository_is_a_reason(checkout: Path) -> None:
    for path in (checkout / ".git" / "objects").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:9])
    found = checkout_state(checkout)
    assert found["commit"] == head_of(checkout)
    assert found["dirty"] is None
    assert found["reason"]


def test_ten_thousand_files_are_recorded(folder: Path) -> None:
    values = given()
    values["datasets"]["mine"]["shards"] = 3000
    for name in artefacts(config.load(values)):
        path = folder / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch()
    found = record(values, results="results", threads=2, quiet=True)
    assert len(found["artefacts"]) > 12_000


def test_a_missing_results_folder_is_told() -> None:
    with pytest.raises(UserError, match="the run is not complete"):
        record({"datasets": {"mine": {"path": "x.h5ad"}}}, results="nowhere", quiet=True)


@pytest.mark.parametrize("name", ["a.py", "templates/page.html.j2", "resources/datasets/d.yaml"])
def test_the_digest_of_the_code_is_of_registries_too(tmp_path: Path, name: str) -> None:
    before = code_digest(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("one")
    first = code_digest(tmp_path)
    (tmp_path / name).write_text("two")
    (tmp_path / "left.pyc").write_text("no source")
    assert len({before, first, code_digest(tmp_path)}) == 3
    (tmp_path / name).write_text("one")
    assert code_digest(tmp_path) == first
