"""Integration of batches without a model: what the mixing of an embedding has to be compared with.

Harmony, ComBat and scVI are told the batch of every cell and never a label. They are transductive: what they are
fitted on are the very cells that are compared. `uncorrected` is where Harmony starts from.

    pcs = integration.uncorrected(counts, seed=0)
    mixed = integration.harmony(pcs, batch, seed=0)
"""

import importlib
import logging
import warnings
from types import ModuleType
from typing import Any

import numpy as np
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from cellformers.errors import UserError
from cellformers.evaluate import baselines
from cellformers.evaluate.baselines import Counts

EXTRA = "'cellformers[benchmarks]'"
CELLS_PER_CLUSTER, MAX_CLUSTERS = 30, 100  # of Harmony, as its authors choose them
LATENT, LAYERS = 30, 2  # of scVI, as Luecken et al. 2022 ran it


def _batches(batch: np.ndarray, n: int, method: str) -> list[str]:
    """Names of the batches, sorted; UserError where there is nothing to correct."""
    if len(batch) != n:
        raise ValueError(f"{len(batch)} batches for {n} cells")
    names = sorted(set(batch))
    if len(names) < 2:
        raise UserError(
            f"{method} needs cells of two batches or more, all are of {names[0]!r}",
            fix="name another column of batches",
        )
    return names


def optional_package(name: str, *, what: str, install: str) -> ModuleType:
    """The module `name`, imported now; UserError says that `what` needs it and how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on import: optional parts that nothing here needs
            return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{what} needs a package that can't be imported here ({error})", fix=f"pip install {install}"
        ) from error


def uncorrected(counts: Counts, *, seed: int) -> np.ndarray:
    """Principal components of the highly variable genes over all cells, float64[n, up to 50]: no correction."""
    everything = np.arange(counts.X.shape[0])
    with threadpool_limits(1):  # sums in one order, whatever the number of threads
        return baselines.pca_hvg(counts, everything, everything[:1], seed=seed)[0]


def harmony(pcs: np.ndarray, batch: np.ndarray, *, seed: int, threads: int = 1) -> np.ndarray:
    """Principal components with batches mixed by Harmony (Korsunsky et al. 2019), float64[n, d].

    Parameters
    ----------
    pcs
        float64[n, d] of all cells, as `uncorrected` gives them.
    batch
        Batch of each cell, object[n] of str.
    seed
        Of the soft clusters that Harmony starts from.
    threads
        Don't change the result.

    Raises
    ------
    UserError
        If harmonypy is not installed or there is one batch only.
    """
    _batches(batch, len(pcs), "Harmony")
    harmonypy = optional_package("harmonypy", what="Harmony", install=EXTRA)
    clusters = min(max(round(len(pcs) / CELLS_PER_CLUSTER), 1), MAX_CLUSTERS)
    # components in rows, cells in columns: the one orientation that can't be mistaken where n = d
    result = harmonypy.run_harmony(
        np.asarray(pcs, dtype=np.float64).T, {"batch": np.asarray(batch, dtype=object)}, "batch", nclust=clusters,
        random_state=seed, ncores=threads, verbose=False,
    )  # fmt: skip
    return np.asarray(result.Z_corr, dtype=np.float64)


def combat(counts: Counts, batch: np.ndarray, *, seed: int) -> np.ndarray:
    """Principal components of log counts after ComBat (Johnson et al. 2007), float64[n, up to 50].

    Highly variable genes are corrected by scanpy's ComBat without covariates; it needs about ten dense matrices of
    cells × 2,000 genes in memory.

    Raises
    ------
    UserError
        If there is one batch only, a batch of one cell, or no gene left.
    """
    names = _batches(batch, counts.X.shape[0], "ComBat")
    for name in names:
        if np.count_nonzero(batch == name) < 2:
            raise UserError(
                f"ComBat can't scale batch {name!r}, which has one cell", fix="leave that batch out"
            )
    logs = counts.log()
    X = logs[:, baselines.highly_variable(logs)].toarray()
    if min(X.shape) < 2:
        raise UserError(f"{X.shape[0]} cells × {X.shape[1]} genes that vary are too few for ComBat")
    with threadpool_limits(1):
        corrected = _scanpy_combat(X, batch)
        n = min(baselines.COMPONENTS, *(side - 1 for side in corrected.shape))
        model = PCA(n_components=n, svd_solver="arpack", random_state=seed)
        return np.asarray(model.fit_transform(corrected), dtype=np.float64)


def _scanpy_combat(X: np.ndarray, batch: np.ndarray) -> np.ndarray:
    import anndata
    import pandas as pd
    import scanpy

    obs = pd.DataFrame({"batch": pd.Categorical(batch)}, index=[str(i) for i in range(len(X))])
    data = anndata.AnnData(X, obs=obs)
    with warnings.catch_warnings():
        # the first step of its iteration divides by the variance of genes that are constant within one batch
        warnings.simplefilter("ignore", RuntimeWarning)
        corrected = scanpy.pp.combat(data, key="batch", inplace=False)
    if not np.isfinite(corrected).all():
        raise UserError("ComBat found no finite correction", fix="leave out batches of few cells")
    return np.asarray(corrected, dtype=np.float64)


def scvi(counts: Counts, batch: np.ndarray, *, seed: int, epochs: int | None = None) -> np.ndarray:
    """Latent means of scVI (Lopez et al. 2018) with the batch as covariate, float64[n, 30].

    Two layers, 30 latent dimensions and a negative binomial of the counts of highly variable genes, as Luecken et al.
    2022 ran it; scvi-tools chooses the number of epochs by the number of cells. Uses a GPU where torch sees one;
    the result then depends on it.

    Raises
    ------
    UserError
        If scvi-tools is not installed or there is one batch only.
    """
    _batches(batch, counts.X.shape[0], "scVI")
    package: Any = optional_package("scvi", what="scVI", install="scvi-tools")
    import anndata
    import pandas as pd

    genes = baselines.highly_variable(counts.log())
    obs = pd.DataFrame({"batch": pd.Categorical(batch)}, index=[str(i) for i in range(len(batch))])
    data = anndata.AnnData(counts.X[:, genes].astype(np.float32), obs=obs)
    for part in ("lightning.fabric", "lightning.pytorch"):  # they name seed and hardware, and advertise
        logging.getLogger(part).setLevel(logging.ERROR)
    package.settings.seed = seed
    package.model.SCVI.setup_anndata(data, batch_key="batch")
    model = package.model.SCVI(data, n_latent=LATENT, n_layers=LAYERS, gene_likelihood="nb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning: how often it would log, how it reads the data
        model.train(max_epochs=epochs, enable_progress_bar=False)
    return np.asarray(model.get_latent_representation(), dtype=np.float64)
