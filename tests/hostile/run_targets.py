"""Targets for `hostile_cases`: embeddings as h5ad, what a search goes on from, and runs that are compared."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
from hostile_cases import Anything, Target, register
from loader_targets import CELLS, N_CELLS, SMALL, fine, names_fault, odd_json, rounded
from result_targets import TYPES, twist
from token_files import make_model, make_vocabulary

from cellformers import maps
from cellformers.compare import compare
from cellformers.compare.listing import as_text
from cellformers.evaluate.tables import read_vectors
from cellformers.io.files import stamp, write_json, write_table
from cellformers.provenance import FORMAT, file_entry
from cellformers.training.space import Range
from cellformers.training.trials import run_trials
from cellformers.vectors import blocks, open_embeddings, read_obs

# --- embeddings as h5ad -----------------------------------------------------------------------------------


def make_embedding_h5ad(folder: Path) -> None:
    vectors = np.arange(N_CELLS * 4, dtype=np.float32).reshape(N_CELLS, 4)
    data = anndata.AnnData(obs=pd.DataFrame({"kind": TYPES}, index=CELLS))
    data.obsm["X_a"] = vectors
    data.uns["cellformers"] = json.dumps(stamp("gather", 1, parameters={}, inputs={"model": "sha256:0"}))
    data.write_h5ad(folder / "a.h5ad", compression="gzip")


def read_embedding_h5ad(folder: Path) -> Any:
    path = folder / "a.h5ad"
    found = open_embeddings([path])
    values = np.concatenate([*blocks(found, 5), np.zeros((0, found.dim), np.float32)])
    names, vectors = read_vectors([path])
    ids, mapped, n, _ = maps._drawn(path, "a", max_cells=100, seed=0)
    labels = read_obs(found, "kind").to_pylist()
    parts = [(found.cell_ids.to_pylist(), values), (names.tolist(), vectors), (ids.to_pylist(), mapped)]
    return n, labels, [(list(map(str, ids)), rounded(part)) for ids, part in parts]


def valid_embedding_h5ad(value: Any) -> str | None:
    n, labels, parts = value
    if any(part != parts[0] for part in parts) and all(np.isfinite(part[1]).all() for part in parts):
        return "three readers disagree"
    return names_fault(parts[0][0]) or (None if len(labels) == n == len(parts[0][0]) else "other rows")


register(lambda: Target("embedding-h5ad", make_embedding_h5ad, read_embedding_h5ad, valid_embedding_h5ad))


# --- what a search goes on from -------

ABOUT = {"inputs": {"tokens": "sha256:0"}}


def _search(folder: Path, n_trials: int) -> Any:
    def objective(params: dict[str, Any], report: Any) -> float:
        report(1, params["learning_rate"])
        return float(params["learning_rate"])

    space = {"learning_rate": Range(1e-6, 1e-3, log=True)}
    return run_trials(objective, space, folder, n_trials=n_trials, minimize=True, seed=0, about=ABOUT)


def make_trials(folder: Path) -> None:
    _search(folder, 2)
    (folder / "trials.tsv").unlink()


def read_trials(folder: Path) -> Any:
    return [(trial["number"], trial["state"], trial["value"]) for trial in _search(folder, 3)]


def build_trials(rng: random.Random, folder: Path) -> Any:
    make_trials(folder)
    odd_json(rng, folder / "trials.json")
    return Anything


register(lambda: Target("trials", make_trials, read_trials, fine, None, build_trials, "trials.json"))


# --- runs that are compared -------------------------------------------------------------------------------


def _make_run(folder: Path) -> None:
    """Results of every kind that is looked into, and their record."""
    folder.mkdir()
    (folder / "d" / "counts").mkdir(parents=True)
    data = anndata.AnnData(
        np.ones((3, 2), np.float32), obs=pd.DataFrame({"kind": list("aba")}, index=CELLS[:3])
    )
    data.write_h5ad(folder / "d" / "counts" / "0001-of-0001.h5ad")
    write_table(pa.table({"cell_id": CELLS[:3], "n": [1, 2, 3]}), folder / "d" / "cells.parquet")
    make_model(folder / "m", make_vocabulary(8), max_position_embeddings=8, **SMALL)
    write_json({"metrics": {"f1": {"value": 0.5}}}, folder / "e.json")
    (folder / "benchmarks.tsv").write_text("method\tvalue\ne\t0.5\n")
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    sections: dict[str, Any] = {
        name: {} for name in ("versions", "code", "machine", "config", "sources", "inputs")
    }
    entries = {name: file_entry(folder / name) for name in names}
    write_json({"format": FORMAT, **sections, "artefacts": entries}, folder / "provenance.json")


def make_runs(folder: Path) -> None:
    _make_run(folder / "a")
    shutil.copytree(folder / "a", folder / "b")


def compare_runs(folder: Path) -> Any:
    """As words; "A" is whole."""
    return as_text(compare(folder / "a", folder / "b", tolerance=0.5)).replace(str(folder), "")


def valid_comparison(value: str) -> str | None:
    shown = value.replace("\n", "")
    return None if shown.isprintable() else "characters that a terminal obeys"


def build_runs(rng: random.Random, folder: Path) -> Any:
    make_runs(folder)
    return twist(rng, folder / "b")


register(lambda: Target("runs", make_runs, compare_runs, valid_comparison, None, build_runs, "b/**/*"))
