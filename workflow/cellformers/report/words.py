"""Names and numbers as the report says them."""

import math
from typing import Any

from cellformers.plots.style import duration

METHODS = {
    "pca_hvg": "PCA of highly variable genes",
    "log_counts": "log counts",
    "rank_only": "ranks only",
    "harmony": "Harmony",
    "combat": "ComBat",
    "scvi": "scVI",
    "majority": "most frequent class",
    "mean_expression": "mean expression",
    "detection": "detection rate",
    "detection_rate": "detection rate",
    "coexpression_pca": "PCA of co-expression",
    "svm_ranks": "SVM on ranks",
    "forest_ranks": "random forest on ranks",
    "logistic_ranks": "logistic regression on ranks",
    "svm_counts": "SVM on counts",
    "forest_counts": "random forest on counts",
    "logistic_counts": "logistic regression on counts",
    "permuted": "permuted labels",
    "oracle": "oracle (simulated truth)",
}
METRICS = {
    "macro_f1": "macro F1",
    "accuracy": "accuracy",
    "auc": "AUC",
    "auc_tokens": "AUC over tokens",
    "auc_pooled": "pooled AUC",
    "auc_raw": "AUC of the raw value",
    "average_precision": "average precision",
    "macro_precision": "macro precision",
    "macro_recall": "macro recall",
    "unit_vote": "majority vote",
    "batch_correction": "batch correction",
    "bio_conservation": "bio conservation",
    "ilisi": "iLISI",
    "kbet": "kBET",
    "graph_connectivity": "graph connectivity",
    "silhouette_batch": "silhouette of batches",
    "clisi": "cLISI",
    "silhouette_label": "silhouette of labels",
    "nmi": "NMI",
    "ari": "ARI",
    "isolated_labels": "isolated labels",
}
KINDS = {
    "model": "a network trained on cells: its frozen embeddings, or itself after fine-tuning",
    "baseline": "needs no trained network: statistics of counts, or the same network with random weights",
    "control": "labels shuffled: has to come out at chance, or something leaks; of mixing: a perfect mix",
    "oracle": "the truth that simulated data were drawn from: about the best that can be reached",
}
CRITERIA = {
    "n_counts": "total counts",
    "n_genes": "detected genes",
    "mito_fraction": "mitochondrial fraction",
    "doublet_score": "doublet score",
    "doublets": "predicted doublets",
    "filter_pass": "filter_pass of the input",
    "where": "not selected by its metadata",
    "max_cells": "drawn out: more cells than asked for",
}
RANDOM_SUFFIX = "-random"
FINETUNED_SUFFIX = "-finetuned"


def method(name: str, kind: str = "", task: str = "") -> str:
    """A method in words; the network with random weights, and what was fine-tuned, are named after their model."""
    if name.endswith(FINETUNED_SUFFIX):
        start = name.removesuffix(FINETUNED_SUFFIX)
        untrained = start.endswith(RANDOM_SUFFIX)
        return f"{start.removesuffix(RANDOM_SUFFIX)}, {'untrained, ' if untrained else ''}fine-tuned"
    if name.endswith(RANDOM_SUFFIX) and kind != "model":
        return f"{name.removesuffix(RANDOM_SUFFIX)}, random weights"
    if name == "permuted" and task == "mixing":
        return "permuted batches"
    return METHODS.get(name, name)


def method_row(name: str, kind: str = "", task: str = "") -> str:
    """The same at the head of a row: words begin with a capital, names of the config stay as they are."""
    text = method(name, kind, task)
    return text if name not in METHODS else text[:1].upper() + text[1:]


def metric(name: str) -> str:
    """A metric in words, as within a sentence."""
    return METRICS.get(name, name.replace("_", " "))


def criterion(name: str) -> str:
    """A criterion of QC in words; one that is not known by its own name."""
    return CRITERIA.get(name, name.replace("_", " "))


def plus_minus(value: float, sd: float | None) -> str:
    """A published number as it was printed: 0.91 ± 0.02."""
    return f"{value:g}" if sd is None else f"{value:g} ± {sd:g}"


def title(name: str) -> str:
    """A name of the config as a heading: cell_types as Cell types."""
    text = " ".join(name.replace("_", " ").split())
    return text[:1].upper() + text[1:]


def count(value: Any) -> str:
    """1234567 as 1,234,567; a dash for what is not there."""
    return "–" if value is None else f"{int(value):,}"


def share(value: float | None, digits: int = 1) -> str:
    """0.956 as 95.6 %; never rounded up to 100 % or down to 0 %."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}%}"
    least = 10.0**-digits
    if value < 1 and float(text[:-1]) >= 100:
        text = f"{100 - least:.{digits}f}%"
    if value > 0 and float(text[:-1]) <= 0:
        text = f"< {least:.{digits}f}%"
    return text.replace("%", " %")


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, in full up to millions; a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def score(value: float | None) -> str:
    """A score with three decimals."""
    return "–" if value is None else f"{value:.3f}"


def power(value: float | None) -> str:
    """A very small number, as 1.2e-06."""
    return "–" if value is None else f"{value:.1e}"


def seconds(value: float | None) -> str:
    """72.4 as 1 min 12 s."""
    return "–" if value is None or not math.isfinite(value) else duration(value)


def megabytes(value: float | None) -> str:
    """1430 as 1.4 GB."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value / 1000:.1f} GB" if value >= 1000 else f"{value:.0f} MB"


def listing(items: list[str], limit: int = 8) -> str:
    """a, b and c; the first ones and a number where there are many."""
    if len(items) > limit:
        return ", ".join(items[:limit]) + f" and {len(items) - limit} more"
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
