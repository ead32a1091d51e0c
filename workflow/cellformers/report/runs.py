"""Sections about the run: models and their training, time and memory of every step, versions."""

import csv
import json
import math
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cellformers import __version__, plots
from cellformers.errors import UserError
from cellformers.io.files import read_json
from cellformers.report import words
from cellformers.report.figures import Figures
from cellformers.report.spec import ReportSpec

# What a benchmark file is called, below the folder of all of them: the step, and whether its pace is cells a second
# of all cells or of those that passed QC. In the order of the workflow.
STEPS: tuple[tuple[str, str, str | None], ...] = (
    (r"download(/.*)?", "download", None),
    (r"simulate", "simulate", None),
    (r"[^/]+/ingest", "ingest", "cells"),
    (r"[^/]+/qc_metrics(/.*)?", "QC metrics", "cells"),
    (r"[^/]+/doublets", "doublets", "cells"),
    (r"[^/]+/qc", "QC", None),
    (r"[^/]+/sketch(/.*)?", "sketch of medians", "passed"),
    (r"corpora/[^/]+/medians", "medians", None),
    (r"vocabularies/.*", "vocabulary", None),
    (r"[^/]+/genes\..*", "gene mapping", None),
    (r"[^/]+/tokens/.*", "tokenize", "passed"),
    (r"models/[^/]+/import", "import model", None),
    (r"models/[^/]+/pretrain", "pretrain", None),
    (r"models/[^/]+/randomize", "random weights", None),
    (r"[^/]+/embeddings/[^/]+\.map", "map (UMAP)", "passed"),
    (r"[^/]+/embeddings/[^/]+/\d+-of-\d+", "embed cells", "passed"),
    (r"[^/]+/embeddings/[^/]+", "gather cells", None),
    (r"[^/]+/gene_embeddings/[^/]+/\d+-of-\d+", "embed genes", "passed"),
    (r"[^/]+/gene_embeddings/[^/]+", "gather genes", None),
    (r"benchmarks/[^/]+/split", "split", None),
    (r"benchmarks/.*", "evaluate", None),
    (r"summari[sz]e", "summarize", None),
)
SHARD = re.compile(r"/\d+-of-\d+$")
SHARED = ("benchmarks", "corpora", "models", "vocabularies")
PACKAGES = (
    "snakemake", "numpy", "scipy", "pandas", "pyarrow", "anndata", "scanpy", "scikit-learn", "umap-learn", "numba",
    "torch", "safetensors", "matplotlib",
)  # fmt: skip


def models(spec: ReportSpec, figures: Figures) -> list[dict[str, Any]]:
    """One entry a model: its shape, and its training where it was trained here."""
    return [_model(name, folder, figures) for name, folder in spec.models.items()]


def _model(name: str, folder: Path, figures: Figures) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    training_file, loss_file = folder / "training.json", folder / "loss.tsv"
    training = dict(read_json(training_file)) if training_file.is_file() else {}
    heldout, unigram = training.get("heldout_loss"), training.get("unigram_entropy")
    entry: dict[str, Any] = {
        "name": name,
        "layers": config.get("num_hidden_layers"),
        "width": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "context": config.get("max_position_embeddings"),
        "tokens": config.get("vocab_size"),
        "weights": _parameters(folder / "model.safetensors"),
        "trained": bool(training),
        "steps": training.get("parameters", {}).get("steps"),
        "cells": training.get("n_cells"),
        "seen": training.get("n_tokens"),
        "heldout": heldout,
        "unigram": unigram,
        "gain": None if heldout is None or unigram is None else unigram - heldout,
        "figure": None,
    }
    columns = _columns(loss_file, ("step", "train_loss", "heldout_loss")) if loss_file.is_file() else {}
    if not columns or not len(columns["step"]):
        return entry
    entry["figure"] = figures.add(
        f"model-{name}-loss",
        f"Loss of the model {name} over training, on training and on held-out cells",
        lambda stem: plots.loss_curve(
            columns["step"],
            columns["train_loss"],
            columns["heldout_loss"],
            stem,
            unigram_entropy=unigram,
            title=f"{words.title(name)}: loss of masked genes",
        ),
    )
    return entry


def _parameters(weights: Path) -> int | None:
    """Number of weights, from the header of a safetensors file."""
    if not weights.is_file():
        return None
    with open(weights, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > weights.stat().st_size:
            raise UserError("not a whole safetensors file", path=weights, fix="make it again")
        header = json.loads(file.read(length))
    return sum(math.prod(t["shape"]) for k, t in header.items() if k != "__metadata__")


def _read_tsv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def _columns(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of a tsv as float64, NaN where a value is empty, "-" or "NA"."""
    rows = _read_tsv(path)
    return {name: np.array([_float(row.get(name)) for row in rows], dtype=np.float64) for name in names}


def _float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def runtime(spec: ReportSpec, datasets: list[dict[str, Any]], figures: Figures) -> dict[str, Any] | None:
    """Time and memory of every step, from Snakemake's benchmark files; None where there are none."""
    if spec.runtime is None or not spec.runtime.is_dir():
        return None
    sizes = {d["name"]: d for d in datasets}
    order = [step for _, step, _ in STEPS]
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(spec.runtime.rglob("*.tsv")):
        relative = path.relative_to(spec.runtime).with_suffix("").as_posix()
        owner = relative.split("/")[0]
        if relative == "report" or ("/" in relative and owner not in sizes and owner not in SHARED):
            continue  # this report's own last run, or a dataset that is no longer there
        step, pace = _step(relative)
        entry = found.setdefault(
            step, {"step": step, "jobs": 0, "seconds": 0.0, "cpu": 0.0, "peak": math.nan, "work": {}}
        )
        for row in _read_tsv(path):
            entry["jobs"] += 1
            entry["seconds"] += np.nan_to_num(_float(row.get("s")))
            entry["cpu"] += np.nan_to_num(_float(row.get("cpu_time")))
            entry["peak"] = np.fmax(entry["peak"], _float(row.get("max_rss")))
        if pace is not None:
            entry["work"][SHARD.sub("", relative)] = sizes[owner][pace]
    steps = sorted(found.values(), key=lambda e: order.index(e["step"]) if e["step"] in order else len(order))
    if not steps:
        return None
    for entry in steps:
        cells = sum(entry.pop("work").values())
        entry["pace"] = cells / entry["seconds"] if cells and entry["seconds"] > 0 else None
    figure = figures.add(
        "runtime",
        "Time and peak memory of every step",
        lambda stem: plots.runtime_bars(
            [e["step"] for e in steps],
            [e["seconds"] for e in steps],
            [e["peak"] for e in steps],
            stem,
            title="Cost of the run",
        ),
    )
    return {
        "steps": steps,
        "seconds": sum(e["seconds"] for e in steps),
        "cpu": sum(e["cpu"] for e in steps),
        "peak": float(np.fmax.reduce([e["peak"] for e in steps])),
        "figure": figure,
    }


def _step(relative: str) -> tuple[str, str | None]:
    for pattern, step, pace in STEPS:
        if re.fullmatch(pattern, relative):
            return step, pace
    return SHARD.sub("", relative).split("/")[-1].replace("_", " "), None


def versions() -> list[tuple[str, str]]:
    """Versions of this package, of Python and of what the steps compute with; those that are not installed left out."""
    found = [("cellformers", __version__), ("Python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return [*found, ("system", f"{platform.system()} {platform.machine()}")]
