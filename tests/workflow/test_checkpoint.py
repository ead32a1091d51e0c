"""A published checkpoint in the workflow: linked from the cache without a network, verified, fine-tuned, embedded."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import yaml
from hub_server import Hub
from test_registry import (
    ARCHITECTURE,
    COMMIT,
    FAST,
    dictionaries,
    entry_of_model,
    entry_of_vocabulary,
    known,
)

from cellformers.models import checkpoints, layouts
from cellformers.models.bert_config import Config
from cellformers.registry import download, home, read_registry
from cellformers.summaries import read_states

Run = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.workflow
NAME, GENES, MARKERS = "geneformer-v1-10m", 300, 20


def fill_cache(folder: Path) -> None:
    """A small model under a registered name, downloaded from a Hub that is gone afterwards."""
    architecture = ARCHITECTURE | {"max_position_embeddings": 512}
    config = Config.from_dict({"model_type": "bert", **architecture})
    checkpoints.save(
        layouts.random_model(replace(config, initializer_range=0.1), seed=0), folder / "published"
    )
    files = {path.name: path.read_bytes() for path in (folder / "published").iterdir()}
    content = json.loads(files["config.json"]) | {"initializer_range": 0.02}
    files["config.json"] = json.dumps(content).encode()
    known_files = {name: known(data) for name, data in files.items()}
    entry = entry_of_model(files=known_files, vocabulary="gc30M", architecture=architecture)
    words = {name.replace("tiny", "gc30M"): data for name, data in dictionaries(GENES).items()}
    registry = {"vocabularies": {"gc30M": entry_of_vocabulary(words)}, "models": {NAME: entry}}
    (folder / "registry.yaml").write_text(yaml.safe_dump(registry))
    with Hub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        hub.publish("lab/Model", COMMIT, "Small", files)
        hub.publish("lab/Model", COMMIT, "geneformer", words)
        download(NAME, registry=read_registry(folder / "registry.yaml"), patience=FAST)


def write_counts(path: Path, n: int, *, seed: int) -> None:
    """Cells of two types that differ in a few genes, from six donors."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, n)
    rate = np.full((n, GENES), 0.4)
    rate[kind == 0, :MARKERS] = 6
    rate[kind == 1, MARKERS : 2 * MARKERS] = 6
    obs = pd.DataFrame(
        {"type": np.array(["left", "right"])[kind], "donor": [f"d{i % 6}" for i in range(n)]},
        index=[f"cell{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(GENES)])
    anndata.AnnData(sp.csr_matrix(rng.poisson(rate).astype(np.float32)), obs=obs, var=var).write_h5ad(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELLFORMERS_HOME", str(tmp_path / "home"))
    fill_cache(tmp_path)
    monkeypatch.setenv("CELLFORMERS_OFFLINE", "1")
    write_counts(tmp_path / "mine.h5ad", 150, seed=1)
    write_counts(tmp_path / "other.h5ad", 60, seed=2)
    return tmp_path


CONFIG: dict[str, Any] = {
    "datasets": {
        "mine": {"path": "mine.h5ad", "shards": 2, "label": "type", "batch": "donor", "qc": {"method": "none"}},
        "other": {"path": "other.h5ad", "label": "type", "qc": {"method": "none"}},
    },
    "models": {
        "published": {"checkpoint": NAME, "verify": True},
        "types": {
            "finetune": {
                "model": "published", "datasets": ["mine"], "label": "type", "unit": "donor", "epochs": 8,
                "learning_rate": 1e-3, "batch_cells": 8, "patience": 0, "predict": ["other"],
            }
        },
        "adapted": {
            "finetune": {
                "model": "published", "datasets": ["mine"], "task": "tasks", "label": ["type", "donor"],
                "epochs": 1, "lora": {"rank": 4, "alpha": 8},
            }
        },
    },
    "embeddings": {"types": {"model": "types", "layer": 0, "datasets": ["other"], "states": "type"}},
}  # fmt: skip


def test_from_the_cache_to_predictions(snakemake: Run, folder: Path) -> None:
    done = snakemake(folder, CONFIG, "--quiet", "all")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = folder / "results"
    weights = "model.safetensors"
    assert (results / "models" / "published" / weights).samefile(home() / "models" / NAME / weights)
    verified = json.loads((results / "models" / "published.verify.json").read_text())
    assert verified["passed"]
    assert verified["backends"]["sdpa"]["layers"][-1]["layer"] == "logits"

    split = json.loads((results / "models" / "types" / "split.json").read_text())
    assert split["by"] == "unit"
    predictions = pq.read_table(results / "other" / "predictions" / "types.parquet").to_pandas()
    truth = pq.read_table(results / "other" / "cells.parquet").to_pandas()["type"]
    assert (predictions["predicted"] == truth).mean() > 0.9
    tasks = json.loads((results / "models" / "adapted" / "training.json").read_text())
    assert [task["name"] for task in tasks["labels"]] == ["type", "donor"]
    assert tasks["n_trained"] < tasks["n_parameters"] / 2
    adata = anndata.read_h5ad(results / "other" / "embeddings" / "types.h5ad")
    assert adata.obsm["X_types"].shape == (60, ARCHITECTURE["hidden_size"])
    states = read_states(results / "other" / "embeddings" / "types.states.parquet", statistic="mean")
    of_type = adata.obsm["X_types"][(truth == "left").to_numpy()].astype(np.float64)
    np.testing.assert_allclose(states["left"], of_type.mean(axis=0), rtol=1e-6, atol=1e-7)
    page = (results / "report.html").read_text()
    assert "Fine-tuned models" in page
    assert "Outputs beside those of transformers" in page


def test_what_the_cache_lacks_is_named(snakemake: Run, folder: Path) -> None:
    config = {**CONFIG, "models": {"large": {"checkpoint": "geneformer-v2-316m"}}, "embeddings": {}}
    done = snakemake(folder, config, "models")
    assert done.returncode != 0
    log = (folder / "results" / "logs" / "models" / "large" / "download.log").read_text()
    assert "geneformer-v2-316m" in log
    assert "CELLFORMERS_OFFLINE" in log
    assert not (folder / "results" / "models" / "large" / "config.json").exists()
