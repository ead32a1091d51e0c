"""The command line run within the test's process, and small count files to run it on."""

import io
import signal
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from token_files import make_vocabulary

from cellformers import cli
from cellformers.vocabulary import Vocabulary

N_GENES = 60  # of `token_files.make_vocabulary`
QUIET = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, FutureWarning)


class Ran(NamedTuple):
    """How a command ended: exit code, what it wrote; `err` ends with the warnings a terminal would have shown."""

    code: int
    out: str
    err: str


def run(*arguments: str | Path) -> Ran:
    """Run `cellformers ARGUMENTS...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    hooks = sys.excepthook, sys.unraisablehook
    code = 0
    try:
        with (
            warnings.catch_warnings(record=True) as heard,
            mock.patch.object(sys, "argv", ["cellformers", *map(str, arguments)]),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            warnings.simplefilter("always")
            try:
                cli.main()
            except SystemExit as end:
                code = 0 if end.code is None else int(end.code)
    finally:
        signal.signal(signal.SIGTERM, before)
        sys.excepthook, sys.unraisablehook = hooks
    shown = [f"{w.filename}:{w.lineno}: {w.message}\n" for w in heard if not issubclass(w.category, QUIET)]
    return Ran(code, out.getvalue(), err.getvalue() + "".join(shown))


def files_in(folder: Path) -> list[Path]:
    """Whatever is under a folder except empty folders, and folders of intermediate files even if empty."""
    return [p for p in folder.rglob("*") if not p.is_dir() or ".part" in p.name or p.name.startswith(".old-")]


def make_counts(n_cells: int = 40, n_genes: int = N_GENES, *, seed: int = 0) -> np.ndarray:
    """Negative-binomial counts, float32[n_cells, n_genes], at least one count in every cell."""
    rng = np.random.default_rng(seed)
    counts = rng.negative_binomial(0.8, 0.1, (n_cells, n_genes)).astype(np.float32)
    counts[:, 0] += 1
    return counts


def make_adata(counts: np.ndarray | None = None, *, genes: list[str] | None = None) -> anndata.AnnData:
    """Counts (CSR) of the genes of a hand-made vocabulary, with some cell metadata."""
    counts = make_counts() if counts is None else counts
    genes = make_vocabulary().gene_ids.tolist()[: counts.shape[1]] if genes is None else genes
    cells = [f"cell{i}" for i in range(len(counts))]
    obs = pd.DataFrame(
        {"type": [*"ab"] * (len(cells) // 2) + ["a"] * (len(cells) % 2)}, index=pd.Index(cells)
    )
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=pd.Index(genes)))


def write_adata(path: Path, counts: np.ndarray | None = None, *, genes: list[str] | None = None) -> Path:
    make_adata(counts, genes=genes).write_h5ad(path)
    return path


def save_vocabulary(folder: Path, n_genes: int = N_GENES, *, special: str = "v2") -> Vocabulary:
    vocabulary = make_vocabulary(n_genes, special=special)
    vocabulary.save(folder)
    return vocabulary
