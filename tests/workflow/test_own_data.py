"""The template config on real files: Ensembl ids, symbols and dense text, published dictionaries, transfer and back."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def folder(reference_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the paths of the template lead to real data."""
    made = tmp_path_factory.mktemp("own")
    (made / "data").symlink_to(reference_data.resolve())
    return made


def test_whole_workflow_on_real_files(
    folder: Path, snakemake: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    config = yaml.safe_load((ROOT / "config" / "example-own-data.yaml").read_text())
    # enough to go through every rule; scores of a model trained this shortly mean nothing
    config["models"]["small"]["pretrain"] = {
        "steps": 30, "layers": 1, "hidden_size": 64, "heads": 2, "intermediate_size": 64
    }  # fmt: skip
    done = snakemake(folder, config, "--quiet", "all")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = folder / "results"
    assert (results / "report.html").stat().st_size > 100_000

    mapping = {
        name: json.loads((results / name / "qc" / "genes.gc104M.json").read_text())
        for name in config["datasets"]
    }
    assert all(report["shares"]["known"] > 0.9 for report in mapping.values())
    assert mapping["pbmc"]["features"]["mapped"] > 10_000  # symbols, by the alias table

    scores = {
        (path.parent.name, path.stem): json.loads(path.read_text())
        for path in (results / "benchmarks").glob("*/*.json")
        if path.stem != "split"
    }
    blood = scores["blood_cell_types", "pca_hvg"]
    assert blood["split"]["kind"] == "stratified"
    assert any("confounded" in note for note in blood["notes"])
    assert blood["metrics"]["macro_f1"]["value"] > 0.65
    for direction in ("cell_lines_dropseq_to_celseq2", "cell_lines_celseq2_to_dropseq"):
        pca = scores[direction, "pca_hvg"]["metrics"]["macro_f1"]
        assert pca["value"] > 0.9
        assert pca["low"] is None, "two datasets are too few units for an interval"
    permuted = scores["blood_cell_types", "permuted"]
    assert permuted["metrics"]["accuracy"]["value"] < permuted["chance"]["accuracy"] + 0.05
