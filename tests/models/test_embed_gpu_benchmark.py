"""The GPU benchmark runs through on the CPU with small models, so that on a GPU only the numbers are new."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import fake_engine
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cellformers.models import layouts

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "embed_gpu.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # it takes its own folder off
    spec = importlib.util.spec_from_file_location("embed_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "embed_gpu", module)
    spec.loader.exec_module(module)
    return module


def test_every_model_and_contender_goes_through(script, monkeypatch, tmp_path, capsys):
    te = fake_engine.install(monkeypatch)
    monkeypatch.setattr("cellformers.models.checkpoints.choose", lambda requested, *_, **__: requested)
    pq.write_table(pa.table({"length": [20, 60, 33, 64, 100, 5]}), tmp_path / "lengths.parquet")
    code = script.main([
        "--tiny", "--device", "cpu", "--repeats", "1", "--lengths", str(tmp_path / "lengths.parquet"),
        "--date", "2020-01-02", "--output", str(tmp_path / "out" / "gpu"),
    ])  # fmt: skip
    assert code == 0
    written = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert written["about"]["date"] == "2020-01-02"
    figures = written["figures"]
    assert len(figures) == 3 * 2 * 6
    assert {row["contender"] for row in figures} == {"reference", "best", *script.PLANS}
    assert all(row["cells_per_s"] > 0 and row["bound_bytes_s"] > 0 for row in figures)
    fp8 = [row["relative_error"] for row in figures if row["contender"] == "te fp8"]
    assert te.RECIPE is not None
    assert all(0 < error <= 0.2 for error in fp8)
    report = (tmp_path / "out" / "gpu.md").read_text()
    assert report.count("\n| v") == len(figures)
    assert report in capsys.readouterr().out


def test_a_backend_that_is_not_there_is_left_out_with_the_reason(script, capsys):
    code = script.main(
        ["--tiny", "--device", "cpu", "--repeats", "1", "--models", "v1-10m", "--cells", "real"]
    )
    told = capsys.readouterr()
    assert code == 0
    assert "te bf16 is left out: backend te does not work here" in told.err
    assert "sdpa bf16" in told.out


def test_without_a_gpu_it_says_so(script, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert script.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["v1-10m", "v2-104m"])
def test_arithmetic_is_what_torch_counts(script, name):
    """The matrix products of the network itself, counted by torch, which leaves attention on the CPU out."""
    setup = script.shrink(script.MODELS[name])
    setup = replace(setup, config=replace(setup.config, num_hidden_layers=4))
    network = layouts.random_model(setup.config, seed=0).eval()
    L, d, f, first = 60, setup.config.hidden_size, setup.config.intermediate_size, setup.mode == "cls"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        rows = torch.tensor([0]) if first else None
        network(torch.arange(4, 4 + L), torch.tensor([0, L]), layer=script.LAYER, rows=rows)
    attention = 4 * L * d * (2 * L + 1) if first else 4 * L * d * 3 * L
    # what the last layer computes beside what one row needs: queries of all, and padding to 16 rows
    spare = (L - 1) * 2 * d * d + 15 * (2 * d * d + 4 * d * f) if first else 0
    assert counter.get_total_flops() == pytest.approx(script.arithmetic(setup, [L]) - attention + spare)


def test_verdicts(script):
    def row(contender, rate, error=0.01):
        return {"model": "v1-10m", "cells": "full", "contender": contender, "cells_per_s": rate,
                "relative_error": error}  # fmt: skip

    met = script.verdicts([row("reference", 100.0), row("te bf16", 7000.0)], tiny=False)
    assert [ok for ok, _ in met] == [True, True, True]
    missed = script.verdicts([row("reference", 700.0), row("te bf16", 5000.0, 0.05)], tiny=False)
    assert [ok for ok, _ in missed] == [False, False, False]


def test_lengths(script, tmp_path):
    assert set(script.draw_lengths("full", 5, 2048, None)) == {2048}
    drawn = script.draw_lengths("real", 2000, 4096, None)
    assert 1300 < np.median(drawn) < 1700
    assert drawn.max() <= 4096
    (tmp_path / "lengths.txt").write_text("7\n5000\n30\n")
    assert set(script.draw_lengths("real", 100, 2048, tmp_path / "lengths.txt")) == {16, 30, 2048}
