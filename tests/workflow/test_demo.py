"""What the quickstart promises, checked on its results: those of `make demo` where they are there, else a new run."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellformers import config

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.workflow


CONFIG = ROOT / "config" / "config.yaml"


def is_demo(results: Path) -> bool:
    """Whether a folder holds the whole results of the quickstart, as it is configured now."""
    if not (results / "report.html").is_file():
        return False
    return config.load_file(results / "config.yaml") == config.load_file(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ROOT if is_demo(ROOT / "results") else tmp_path_factory.mktemp("demo")


@pytest.fixture
def demo(folder: Path, snakemake: Callable[..., subprocess.CompletedProcess[str]]) -> Path:
    """The results of the demo."""
    if not (folder / "results" / "report.html").is_file():
        done = snakemake(folder, None, "--configfile", str(CONFIG), "--quiet", "all")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "results"


def scores(results: Path, benchmark: str) -> dict[str, dict[str, Any]]:
    paths = (results / "benchmarks" / benchmark).glob("*.json")
    return {path.stem: json.loads(path.read_text()) for path in paths if path.stem != "split"}


def test_cell_types_are_found(demo: Path) -> None:
    found = scores(demo, "cell_types")
    value = {name: score["metrics"]["macro_f1"]["value"] for name, score in found.items()}
    chance = found["small"]["chance"]["macro_f1"]
    assert value["small"] > 3 * chance
    assert value["pca_hvg"] > 0.8
    assert value["permuted"] < chance + 0.05
    assert found["small"]["split"]["kind"] == "held-out"
    assert found["small"]["metrics"]["macro_f1"]["low"] is not None  # six donors are enough for an interval


def test_dosage_sensitivity_is_not_rigged(demo: Path) -> None:
    found = scores(demo, "dosage_sensitivity")
    auc = {name: score["metrics"]["auc"] for name, score in found.items()}
    assert auc["oracle"]["value"] >= 0.95
    for baseline in ("mean_expression", "detection"):
        assert 0.4 <= auc[baseline]["value"] <= 0.6
    assert auc["permuted"]["low"] < 0.5 < auc["permuted"]["high"]
    assert auc["small"]["low"] < auc["small"]["high"]  # shown with its interval, whatever it is
    assert len({score["n"] for score in found.values()}) == 1


def test_the_loss_falls(demo: Path) -> None:
    training = json.loads((demo / "models" / "small" / "training.json").read_text())
    assert training["unigram_entropy"] - training["heldout_loss"] >= 0.5


def test_the_report_holds_it_all(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    for heading in (
        "Summary",
        "Gene mapping",
        "Tokens per cell",
        "Models",
        "Maps of cells",
        "Scores",
        "Versions",
    ):
        assert heading in page
    assert not re.search(r"(?:src|href)=[\"']https?://", page), "it has to open offline"
    assert len(page) < 5_000_000
    assert (demo / "benchmarks.tsv").read_text().count("\n") > 20
    assert list((demo / "figures").rglob("*.svg"))


def test_nothing_is_left_to_do(
    demo: Path, snakemake: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = snakemake(demo.parent, None, "--configfile", str(CONFIG), "--dry-run")
    assert "Nothing to be done" in done.stdout + done.stderr
