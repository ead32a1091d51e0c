"""How large runs are driven: `--batch` makes a part, `--touch` accepts what is there, a stopped job runs again."""

import base64
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.workflow

CONFIG = {
    "simulate": {"cells": 300},
    "datasets": {"atlas": {"simulated": "atlas", "shards": 4, "label": "cell_type"}},
}
CELLS = "results/atlas/cells.parquet"
NOTHING = "Nothing to be done"


def planned(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Rule names and numbers of jobs from the table that Snakemake prints."""
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.findall(r"^(\w+)\s+(\d+)$", done.stdout + done.stderr, flags=re.MULTILINE)
    return {name: int(number) for name, number in table if name != "total"}


def times(folder: Path) -> dict[str, int]:
    """When each shard's measures and the table of cells were written."""
    paths = [
        *(folder / "results/atlas/qc/metrics").glob("*.parquet"),
        *(folder / "results/atlas").glob("c*.parquet"),
    ]
    return {path.name: path.stat().st_mtime_ns for path in paths}


def mark_incomplete(folder: Path, output: str) -> None:
    """What Snakemake leaves behind when it is killed while a job writes this output."""
    marks = folder / ".snakemake" / "incomplete"
    (marks / base64.b64encode(output.encode()).decode()).touch()


def test_batches_then_touch_then_a_stopped_job(snakemake: Run, tmp_path: Path) -> None:
    # a batch of an aggregation makes its share of the inputs, and the aggregation only when all are there
    first = planned(snakemake(tmp_path, CONFIG, "--batch", "qc=1/2", "--", CELLS))
    assert first["ingest_atlas"] == 1
    assert first["qc_metrics"] == 2
    assert "qc" not in first
    written = times(tmp_path)
    assert len(written) == 2
    second = planned(snakemake(tmp_path, CONFIG, "--batch", "qc=2/2", "--", CELLS))
    assert second == {"qc_metrics": 2, "qc": 1}
    assert len(times(tmp_path)) == 5
    assert times(tmp_path) | written == times(tmp_path), "what the first batch made stays"

    # an input that looks newer runs everything again, unless what is there is accepted as it is
    raw = tmp_path / "results" / "simulated" / "atlas.h5ad"
    later = time.time_ns() + 1_000_000_000
    os.utime(raw, ns=(later, later))
    shards = sorted((tmp_path / "results" / "atlas" / "counts").glob("*.h5ad"))
    before = {path: path.read_bytes() for path in shards}
    # else Snakemake compares so small a file by its content
    asked = ["--max-checksum-file-size", "0", "--", CELLS]
    assert planned(snakemake(tmp_path, CONFIG, "--dry-run", *asked)) == {
        "ingest_atlas": 1,
        "qc_metrics": 4,
        "qc": 1,
    }
    time.sleep(max(0, (later - time.time_ns()) / 1e9))
    touched = snakemake(tmp_path, CONFIG, "--touch", *asked)
    assert touched.returncode == 0, touched.stderr
    again = snakemake(tmp_path, CONFIG, "--dry-run", *asked)
    assert NOTHING in again.stdout + again.stderr
    assert {path: path.read_bytes() for path in shards} == before

    # a job that was stopped while it wrote runs again, with what reads it and nothing else; without the default
    # profile's rerun-incomplete Snakemake refuses
    mark_incomplete(tmp_path, "results/atlas/qc/metrics/0003-of-0004.parquet")
    refused = snakemake(tmp_path, CONFIG, "--dry-run", "--workflow-profile", "none", "--", CELLS)
    assert refused.returncode != 0
    assert "rerun-incomplete" in refused.stdout + refused.stderr
    there = times(tmp_path)
    assert planned(snakemake(tmp_path, CONFIG, "--", CELLS)) == {"qc_metrics": 1, "qc": 1}
    now = times(tmp_path)
    assert {name for name in now if now[name] != there[name]} == {"0003-of-0004.parquet", "cells.parquet"}
