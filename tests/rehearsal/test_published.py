"""config/benchmarks.yaml, unchanged, on simulated deposits and checkpoints that a local server offers as the real ones.

    make rehearsal

Everything is fetched, verified, unpacked, read, joined, trained, scored and reported by the code that meets the real
files. It takes about a quarter of an hour on two cores, so `make test` leaves it out.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml

from cellformers.config import CellBenchmark, MixingBenchmark, load
from cellformers.simulate.deposits import simulate_deposits

ROOT = Path(__file__).parents[2]
CONFIG = load(yaml.safe_load((ROOT / "config" / "benchmarks.yaml").read_text()))
BIN = Path(sys.executable).parent


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Static files, without a line a request."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    simulate_deposits(["all"], folder / "simulated", seed=2026)
    (folder / "config").symlink_to(ROOT / "config")
    return folder


@pytest.fixture(scope="session")
def environment(stage: Path) -> Iterator[dict[str, str]]:
    handler = partial(Quiet, directory=str(stage / "simulated" / "www"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **os.environ,
        "CELLFORMERS_MIRROR": f"http://127.0.0.1:{server.server_address[1]}",
        "CELLFORMERS_RESOURCES": str(stage / "simulated" / "resources"),
        "CELLFORMERS_HOME": str(stage / "simulated" / "home"),
        "NO_PROXY": "127.0.0.1",
        "XDG_CACHE_HOME": str(stage / "cache"),
    }
    server.shutdown()


def snakemake(stage: Path, environment: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            str(BIN / "snakemake"), "--snakefile", str(ROOT / "Snakefile"), "--cores", os.environ.get("CORES", "2"),
            # jobs so small are mostly start-up, which has one thread, and Snakemake's looking at all that are ready
            "--scheduler-subsample", "12",
            "--set-threads", *(f"{rule}=1" for rule in ("tokenize", "embed_cells", "embed_genes", "verify")),
            "--configfile", "config/benchmarks.yaml", *more,
        ],
        cwd=stage, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def results(stage: Path, environment: dict[str, str]) -> Path:
    done = snakemake(stage, environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return stage / "results"


@pytest.fixture(scope="session")
def table(results: Path) -> pd.DataFrame:
    return pd.read_csv(results / "benchmarks.tsv", sep="\t")


def test_every_benchmark_has_all_its_methods(table: pd.DataFrame) -> None:
    for name, spec in CONFIG.benchmarks.items():
        methods = set(table.loc[table["benchmark"] == name, "method"])
        wanted = {"v1", "v1-random", "v2", "v2-random", "permuted", *spec.baselines}
        if not isinstance(spec, MixingBenchmark) and spec.finetune is not None:
            wanted.add("v1-finetuned")
        assert wanted <= methods, name


def test_published_numbers_stand_beside_with_their_sources(table: pd.DataFrame) -> None:
    rows = table[(table["benchmark"] == "dosage_sensitivity") & (table["metric"] == "auc_tokens")]
    assert "0.9100" in rows["published"].iloc[0]
    assert "0.8900" in rows["published"].iloc[0]
    assert "brief of this project" in rows["published_source"].iloc[0]


def test_what_is_planted_is_found(table: pd.DataFrame) -> None:
    def value(benchmark: str, method: str, metric: str = "macro_f1") -> float:
        chosen = (table["benchmark"] == benchmark) & (table["method"] == method) & (table["metric"] == metric)
        return float(table.loc[chosen, "value"].iloc[0])

    for benchmark in ("aorta_cell_types", "fetal_organs"):
        assert value(benchmark, "log_counts") > value(benchmark, "permuted") + 0.3, benchmark
    assert value("cardiomyopathy", "log_counts", "accuracy") > 0.5


def test_permuted_labels_come_out_at_chance(table: pd.DataFrame) -> None:
    """No control's interval lies above what guessing scores."""
    notes = table.loc[(table["method"] == "permuted") & table["note"].notna(), "note"]
    assert not notes.str.contains("above chance").any(), notes.tolist()


def test_what_the_deposits_say_to_leave_out_is_left_out(results: Path, stage: Path) -> None:
    def cells(name: str) -> pd.DataFrame:
        return pq.read_table(results / name / "cells.parquet").to_pandas()

    drop = cells("drop")
    chimpanzees = drop[drop["excluded"] == "chimpanzee"]
    assert len(chimpanzees) > 0
    assert not chimpanzees["qc_pass"].any()
    hearts = cells("hearts")
    assert set(hearts.loc[hearts["qc_pass"], "cell_type"]) <= {
        f"Cardiomyocyte_{i}" for i in ("I", "II", "III")
    }
    assert (~hearts["qc_pass"]).any()
    aorta = cells("aorta")
    assert aorta.loc[aorta["cell_type"].isna(), "excluded"].eq("no label").all()
    assert set(aorta["donor"]) == {f"Con{i}" for i in (4, 6, 9)} | {f"TAA{i}" for i in range(1, 9)}
    fetal = cells("fetal")
    assert fetal.loc[fetal["qc_pass"], "organ"].nunique() == 15


def test_no_donor_is_on_two_sides(results: Path) -> None:
    checked = 0
    for name, spec in CONFIG.benchmarks.items():
        if not isinstance(spec, CellBenchmark) or spec.unit is None:
            continue
        split = json.loads((results / "benchmarks" / name / "split.json").read_text())
        for fold in split["folds"]:
            units = [{unit.rpartition(":")[2] for unit in fold[side]} for side in ("train", "test")]
            assert units[0], name
            assert not units[0] & units[1], name
            checked += 1
    assert checked > 10


def test_intervals_are_there_where_they_are_earned(table: pd.DataFrame) -> None:
    few = table[(table["benchmark"] == "cardiomyopathy_notebook") & (table["metric"] == "accuracy")]
    assert few["low"].isna().all()
    assert few["units"].str.count("=").eq(5).all()
    many = table[(table["benchmark"] == "cardiomyopathy") & (table["metric"] == "accuracy")]
    assert many["low"].notna().all()
    assert (many["low"] <= many["value"]).all()


def test_the_report_is_one_small_page_about_all_of_them(results: Path) -> None:
    page = (results / "report.html").read_text(encoding="utf-8")
    assert len(page) < 10_000_000
    assert not re.findall(r"(?:src|href)=.https?://[^\"']+\.(?:js|css|png|svg)", page)
    for name, spec in CONFIG.benchmarks.items():
        assert spec.question is not None
        assert spec.question.split("(")[0][:40] in page.replace("&#39;", "'"), name
        assert (results / "tables" / f"{name}.tsv").stat().st_size > 200
    assert page.count("<html") == 1


def test_a_second_run_has_nothing_to_do(results: Path, stage: Path, environment: dict[str, str]) -> None:
    assert results.is_dir()
    done = snakemake(stage, environment, "--dry-run")
    assert "Nothing to be done" in done.stdout + done.stderr


def test_snakemake_makes_its_own_report(results: Path, stage: Path, environment: dict[str, str]) -> None:
    """With the page, its figures and its tables, each in its category."""
    done = snakemake(stage, environment, "--report", "snakemake-report.html")
    assert done.returncode == 0, done.stderr[-3000:]
    page = (stage / "snakemake-report.html").read_text(encoding="utf-8")
    for name in ("Scores", "Figures", "dosage_sensitivity", "cardiomyopathy-scores"):
        assert name in page, name
    assert results.is_dir()
