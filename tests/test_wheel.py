"""The wheel, installed somewhere else: it has all it needs and does not look back at the checkout."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
from command_line import save_vocabulary, write_adata
from token_files import make_model

ROOT = Path(__file__).parents[1]
NEEDED = ("pyproject.toml", "README.md", "LICENSE")


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel; built from a copy, so that the checkout stays as it is."""
    for module in ("setuptools", "pip"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed, so no wheel can be built")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "workflow" / "cellformers",
        source / "workflow" / "cellformers",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in NEEDED:
        shutil.copy(ROOT / name, source / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("cellformers-*.whl")
    pip("install", "--no-deps", "--no-compile", "--target", folder / "site", wheel)
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str | Path) -> str:
    """Run Python in a folder of its own, with the installed wheel in front of everything else."""
    environment = {
        **os.environ, "PYTHONPATH": str(installed), "CELLFORMERS_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1",
        "NUMBA_DISABLE_JIT": "1",  # kernels of a new folder are compiled anew, which takes longer than all the rest
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False, cwd=folder, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_the_installed_one(installed: Path, tmp_path: Path) -> None:
    code = "import cellformers, cellformers.registry as r; print(cellformers.__file__, len(r.read_registry().models))"
    where, n_models = run(installed, tmp_path, "-c", code).split()
    assert Path(where) == installed / "cellformers" / "__init__.py"
    assert int(n_models) > 4


def test_every_file_of_the_package_is_there(installed: Path) -> None:
    package = installed.parent / "source" / "workflow" / "cellformers"
    wanted = {path.relative_to(package) for path in package.rglob("*") if path.is_file()}
    there = {path.relative_to(installed / "cellformers") for path in (installed / "cellformers").rglob("*")}
    assert len(wanted) > 100
    assert wanted <= there, wanted - there


def test_the_commands(installed: Path, tmp_path: Path) -> None:
    assert "cellformers" in run(installed, tmp_path, "-m", "cellformers.cli", "doctor").splitlines()[0]
    listed = run(installed, tmp_path, "-m", "cellformers.cli", "download", "--list")
    assert "geneformer-v2-104m " in listed
    assert str(tmp_path / "home") in listed


def test_a_file_is_embedded(installed: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", save_vocabulary(tmp_path / "vocabulary"))
    counts = write_adata(tmp_path / "counts.h5ad")
    output = tmp_path / "embedded.h5ad"
    run(
        installed, tmp_path, "-m", "cellformers.cli", "embed-file", counts, "--model", model, "--name", "small",
        "--no-umap", "--quiet", "-o", output,
    )  # fmt: skip
    embedded = anndata.read_h5ad(output)
    assert embedded.obsm["X_small"].shape == (40, 32)
    assert np.isfinite(embedded.obsm["X_small"]).all()
