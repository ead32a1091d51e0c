"""How far batches mix in an embedding while cell types stay apart: the metrics of Luecken et al. 2022.

    found = mixing_metrics.measure(X, batch, label, threads=2)
    found.values["ilisi"]

All are between 0 and 1, higher is better. Luecken et al., Nat Methods 19:41 (2022) define them:

- ilisi: median over cells of (LISI of the batches - 1) / (batches - 1), 90 neighbours (Korsunsky et al. 2019).
- kbet: share of cells among whose neighbours the batches are as frequent as among all cells of the label (chi-square
  test, p >= 0.05; Büttner et al. 2019), mean over labels.
- graph_connectivity: share of the cells of a label that its largest component holds in the graph of 15 neighbours,
  mean over labels.
- silhouette_batch: mean over labels of the mean over their cells of 1 - |silhouette width of the batches|.
- clisi: median over cells of (labels - LISI of the labels) / (labels - 1).
- silhouette_label: (1 + mean silhouette width of the labels) / 2.
- isolated_labels: the same of the labels that the fewest batches have, mean over these labels.
- nmi, ari: agreement of labels with Leiden clusters at the resolution, of ten, that has the highest NMI.

LISI, graph connectivity and clusters are computed by scib-metrics. kBET and the silhouette widths have the values
of scib-metrics, but come from scipy and scikit-learn: jax would compile anew for every size that a label has.
kBET takes the exact neighbours of a cell within its label, which needs no diffusion distance as a cut graph does.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import chi2
from sklearn import config_context
from sklearn.metrics import silhouette_samples
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from cellformers.evaluate.integration import EXTRA, optional_package

LISI_NEIGHBOURS, GRAPH_NEIGHBOURS = 90, 15
KBET_NEIGHBOURS, KBET_LEVEL = (10, 70), 0.05
MIN_LABEL_CELLS = 3 * KBET_NEIGHBOURS[0]  # with fewer, kBET compares a label with little but itself
BATCH_PARTS = ("silhouette_batch", "ilisi", "kbet", "graph_connectivity")
LABEL_PARTS = ("isolated_labels", "nmi", "ari", "silhouette_label", "clisi")
MEGABYTES = 256  # of distances at a time


@dataclass(frozen=True)
class Mixing:
    """`values` by metric; the iLISI of each cell (float64[n], scaled to 0..1), whose median is the iLISI; notes."""

    values: dict[str, float]
    ilisi: np.ndarray
    notes: list[str]


def neighbours(X: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact Euclidean nearest neighbours, itself among them: distances float64[n, k], rows int64[n, k]."""
    search = NearestNeighbors(n_neighbors=min(k, len(X)), algorithm="brute").fit(X)
    distance, index = search.kneighbors(X)
    return distance, index


def _scib() -> Any:
    package: Any = optional_package("scib_metrics", what="measuring how batches mix", install=EXTRA)
    package.settings.verbosity = "WARNING"
    return package


def _lisi(scib: Any, graph: Any, groups: np.ndarray) -> np.ndarray:
    """Effective number of groups around each cell, float64[n] between 1 and the number of groups."""
    lisi = np.asarray(scib.lisi_knn(graph, groups), dtype=np.float64)
    return np.clip(lisi, 1, len(np.unique(groups)))


def acceptance(around: np.ndarray, batch: np.ndarray) -> float:
    """kBET: share of cells whose neighbours' batches are not rejected to be drawn from all cells' batches.

    Parameters
    ----------
    around
        int64[n, k], the batch of each neighbour of each cell, as a number from 0.
    batch
        int64[n], the batch of each cell; every number from 0 to the largest occurs.
    """
    share = np.bincount(batch) / len(batch)
    n, k = around.shape
    cell = np.repeat(np.arange(n), k) * len(share)
    seen = np.bincount(cell + around.ravel(), minlength=n * len(share)).reshape(n, len(share))
    statistic = ((seen - k * share) ** 2 / (k * share)).sum(axis=1)
    return float((chi2.sf(statistic, len(share) - 1) >= KBET_LEVEL).mean())


def kbet(X: np.ndarray, batch: np.ndarray) -> float:
    """kBET acceptance of cells that all have one label, with a quarter of the mean batch as neighbours (10 to 70)."""
    names, number = np.unique(batch, return_inverse=True)
    low, high = KBET_NEIGHBOURS
    k = min(high, max(low, len(batch) // len(names) // 4))
    _, index = neighbours(X, k + 1)  # the cell itself and k others, as in scib-metrics
    return acceptance(number[index], number)


def _silhouettes(X: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Silhouette width of each cell, float64[n]; 0 for all where every cell is a group of its own."""
    if len(np.unique(groups)) == len(groups):
        return np.zeros(len(groups))
    with config_context(working_memory=MEGABYTES):
        return np.asarray(silhouette_samples(X, groups), dtype=np.float64)


def _isolated(widths: np.ndarray, batch: np.ndarray, label: np.ndarray) -> float:
    """Mean over the labels that the fewest batches have of their mean silhouette width, scaled to 0..1."""
    names = np.unique(label)
    n_batches = np.array([len(np.unique(batch[label == name])) for name in names])
    isolated = names[n_batches == n_batches.min()]
    return float(np.mean([(1 + widths[label == name].mean()) / 2 for name in isolated]))


def _within_labels(
    X: np.ndarray, batch: np.ndarray, label: np.ndarray
) -> tuple[dict[str, list[float]], list[str]]:
    """kBET and batch silhouettes of each label that has several batches, and what was left out."""
    found: dict[str, list[float]] = {"kbet": [], "silhouette_batch": []}
    alone, few = [], []
    for name in np.unique(label):
        rows = np.flatnonzero(label == name)
        if len(np.unique(batch[rows])) < 2:
            alone.append(str(name))
            continue
        found["silhouette_batch"].append(float((1 - np.abs(_silhouettes(X[rows], batch[rows]))).mean()))
        if len(rows) >= MIN_LABEL_CELLS:
            found["kbet"].append(kbet(X[rows], batch[rows]))
        else:
            few.append(str(name))
    notes = []
    if alone:
        notes.append(f"in one batch only, so that their mixing can't be measured: {', '.join(alone)}")
    if few:
        notes.append(f"under {MIN_LABEL_CELLS} cells, too few for kBET: {', '.join(few)}")
    return found, notes


def _of_labels(
    scib: Any, graph: Any, X: np.ndarray, batch: np.ndarray, label: np.ndarray
) -> tuple[dict[str, float], list[str]]:
    """The metrics that need labels."""
    n_labels = len(np.unique(label))
    widths = _silhouettes(X, label)
    small = graph.subset_neighbors(min(GRAPH_NEIGHBOURS, graph.n_neighbors))
    agreement = scib.nmi_ari_cluster_labels_leiden(small, label)
    within, notes = _within_labels(X, batch, label)
    values = {name: float(np.mean(each)) for name, each in within.items() if each}
    values |= {
        "graph_connectivity": float(scib.graph_connectivity(small, label)),
        "clisi": float((n_labels - np.median(_lisi(scib, graph, label))) / (n_labels - 1)),
        "silhouette_label": float((1 + widths.mean()) / 2),
        "isolated_labels": _isolated(widths, batch, label),
        "nmi": float(agreement["nmi"]),
        "ari": max(float(agreement["ari"]), 0.0),  # below 0: agrees less than clusters drawn at random
    }
    return values, notes


def measure(X: np.ndarray, batch: np.ndarray, label: np.ndarray | None, *, threads: int = 1) -> Mixing:
    """All metrics of one embedding, and their two means.

    batch_correction is the mean of silhouette_batch, ilisi, kbet and graph_connectivity; bio_conservation that of
    isolated_labels, nmi, ari, silhouette_label and clisi. These are the sections of Luecken et al. 2022 without
    those that need counts (principal component regression, cell cycle, genes, trajectories), and without scaling
    each metric to the methods compared, so that a score doesn't depend on which others there are. Without labels
    batch_correction is the mean of ilisi and of the kBET of all cells, and there is no bio_conservation.

    Parameters
    ----------
    X
        float[n, dim], finite.
    batch, label
        object[n] of str; two batches at least, two labels at least.
    threads
        Don't change the result.

    Raises
    ------
    UserError
        If scib-metrics is not installed.
    """
    scib = _scib()
    import jax

    X = np.asarray(X, dtype=np.float64)
    with (
        warnings.catch_warnings(),
        threadpool_limits(1, user_api="blas"),  # sums in one order, whatever the number of threads
        threadpool_limits(threads, user_api="openmp"),
        jax.default_device(jax.devices("cpu")[0]),
    ):
        warnings.filterwarnings("ignore", category=UserWarning, module="umap")
        distance, index = neighbours(X, LISI_NEIGHBOURS)
        graph = scib.nearest_neighbors.NeighborsResults(indices=index, distances=distance)
        ilisi = (_lisi(scib, graph, batch) - 1) / (len(np.unique(batch)) - 1)
        values = {"ilisi": float(np.median(ilisi))}
        if label is None:
            values["kbet"] = kbet(X, batch)
            notes = ["without labels: batch_correction is the mean of ilisi and kbet of all cells"]
        else:
            found, notes = _of_labels(scib, graph, X, batch, label)
            values |= found
    for mean, parts in (("batch_correction", BATCH_PARTS), ("bio_conservation", LABEL_PARTS)):
        there = [values[part] for part in parts if part in values]
        if there:
            values[mean] = float(np.mean(there))
    missing = [part for part in BATCH_PARTS if part not in values]
    if label is not None and missing:
        notes.append(f"batch_correction lacks {', '.join(missing)}: no label has enough cells of two batches")
    return Mixing(values, ilisi, notes)
