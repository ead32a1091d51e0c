"""The order of the modules: data flows down the list, and no module knows one below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "workflow" / "cellformers"
ORDER = [
    "errors", "revisions", "progress", "resources", "config", "config_docs", "io", "vocabulary", "genes", "counts",
    "folds", "selection", "qc", "doublets", "histograms", "medians", "ranking", "tokens", "metrics", "vectors",
    "models", "registry", "deposits", "embedding", "gene_embedding", "occurrences", "summaries", "gather", "embed_file",
    "api", "training", "verify", "evaluate", "simulate", "maps", "plots", "report", "provenance", "compare",
    "doctor", "commands", "cli",
]  # fmt: skip


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """First parts of the cellformers modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("cellformers.") and name.count(".")}
    return {name for name in found if name != "__version__"}


FILES = [
    path for path in sorted(PACKAGE.rglob("*.py")) if path.parent != PACKAGE or path.name != "__init__.py"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_knows_one_below_it(path: Path) -> None:
    own = module_of(path)
    assert own in ORDER, f"give {own} its place in the order"
    below = {name for name in imported(path) if ORDER.index(name) > ORDER.index(own)}
    assert not below, f"{own} imports {below}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450
    assert ast.get_docstring(ast.parse(path.read_text())), "says what it does"


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        ("cellformers.cli", ("torch", "pandas", "numba", "anndata", "scanpy", "matplotlib", "sklearn")),
        ("cellformers.tokens", ("torch", "pandas", "anndata", "scanpy")),
        ("cellformers.embedding", ("anndata", "scanpy", "pydantic", "pandas", "typer", "h5py", "matplotlib")),
        ("cellformers.models.devices", ("anndata", "scanpy", "pydantic", "pandas", "typer", "h5py")),
        ("cellformers.registry", ("torch", "requests", "yaml", "pandas", "anndata")),
        ("cellformers.deposits", ("torch", "requests", "yaml", "pandas", "anndata")),
        (
            "cellformers.training.search",
            ("optuna", "peft", "transformers", "pydantic", "pandas", "sklearn", "yaml"),
        ),
        (
            "cellformers.training.finetune",
            ("peft", "anndata", "scanpy", "pydantic", "pandas", "typer", "sklearn"),
        ),
        ("cellformers.training.pretrain", ("anndata", "scanpy", "pydantic", "pandas", "typer", "h5py")),
    ],
)
def test_heavy_packages_come_in_late(module: str, spared: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*[name for name in {spared!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
