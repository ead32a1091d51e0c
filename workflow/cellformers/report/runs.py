"""Sections about the run: time and memory of every step, versions."""

import csv
import math
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cellformers import __version__, plots
from cellformers.io.files import whole
from cellformers.report.fields import MOST
from cellformers.report.figures import Figures
from cellformers.report.spec import ReportSpec

# What a benchmark file is called, below the folder of all of them: the step, and whether its pace is cells a second
# of all cells or of those that passed QC. In the order of the workflow.
STEPS: tuple[tuple[str, str, str | None], ...] = (
    (r"download(/.*)?", "download", None),
    (r"deposits/.*", "download deposit", None),
    (r"labels/.*", "gene labels", None),
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
    (r"models/[^/]+/download", "download model", None),
    (r"models/[^/]+/import", "import model", None),
    (r"models/[^/]+/pretrain", "pretrain", None),
    (r"models/[^/]+/finetune", "fine-tune", None),
    (r"models/[^/]+/randomize", "random weights", None),
    (r"models/[^/]+/verify", "verify model", None),
    (r"[^/]+/embeddings/[^/]+\.map", "map (UMAP)", "passed"),
    (r"[^/]+/embeddings/[^/]+\.states", "mean of states", None),
    (r"[^/]+/embeddings/[^/]+/\d+-of-\d+", "embed cells", "passed"),
    (r"[^/]+/embeddings/[^/]+", "gather cells", None),
    (r"[^/]+/gene_embeddings/[^/]+/\d+-of-\d+", "embed genes", "passed"),
    (r"[^/]+/gene_embeddings/[^/]+", "gather genes", None),
    (r"[^/]+/predictions/[^/]+", "predict", "passed"),
    (r"benchmarks/[^/]+/split", "split", None),
    (r"benchmarks/[^/]+/finetuned/.*", "fine-tune folds", None),
    (r"benchmarks/.*", "evaluate", None),
    (r"summari[sz]e", "summarize", None),
)
SHARD = re.compile(r"/\d+-of-\d+$")
SHARED = ("benchmarks", "corpora", "deposits", "labels", "models", "vocabularies")
PACKAGES = (
    "snakemake", "numpy", "scipy", "pandas", "pyarrow", "anndata", "scanpy", "scikit-learn", "umap-learn", "numba",
    "torch", "safetensors", "matplotlib",
)  # fmt: skip


def columns(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Columns of a tsv as float64, NaN where a value is empty, "-" or "NA"; UserError where it is none."""
    with whole(path), open(path, newline="", encoding="utf-8") as file:
        try:
            rows = list(csv.DictReader(file, delimiter="\t"))
        except csv.Error as error:
            raise ValueError(error) from error
        return {name: np.array([_float(row.get(name)) for row in rows], dtype=np.float64) for name in names}


def _float(text: str | None) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    if abs(value) >= MOST:
        raise ValueError(f"it has the number {value:g}")
    return value


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
        jobs = columns(path, ("s", "cpu_time", "max_rss"))
        entry["jobs"] += len(jobs["s"])
        entry["seconds"] += float(np.nansum(jobs["s"]))
        entry["cpu"] += float(np.nansum(jobs["cpu_time"]))
        entry["peak"] = float(np.fmax.reduce(jobs["max_rss"], initial=entry["peak"]))
        if pace is not None and owner in sizes:
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
