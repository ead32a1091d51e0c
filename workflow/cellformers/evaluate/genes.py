"""Gene task: tell two classes of genes apart, such as dosage-sensitive and insensitive factors, from frozen features.

Runs as `cellformers evaluate`, one benchmark and one method at a time, on the genes of one split. Features are gene
embeddings (mean over the cells that express the gene), a baseline computed from counts (`mean_expression`,
`detection`, `coexpression_pca`) or a column of a table (`column`: an oracle, such as the true out-degree).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from cellformers import metrics
from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate import baselines
from cellformers.evaluate.classify import predict_folds
from cellformers.evaluate.scores import check_kind, published_by_metric, write_score
from cellformers.evaluate.splitfile import read_split
from cellformers.evaluate.tables import locate, read_gene_table, read_vectors
from cellformers.folds import permuted
from cellformers.io.files import digest_arrays, digest_file, open_parquet, read_table, stamp, write_table
from cellformers.revisions import REVISIONS
from cellformers.selection import as_text

GeneFeatures = Literal["embedding", "mean_expression", "detection", "coexpression_pca", "column"]


def _passing(counts: baselines.Counts, ids: np.ndarray, cells: Path | None) -> baselines.Counts:
    """Counts of the cells that passed QC, as embeddings hold them, in the order of `cells`."""
    if cells is None:
        return counts
    with open_parquet(cells) as file:
        has_pass = "qc_pass" in file.schema_arrow.names
    table = read_table(cells, columns=["cell_id", "qc_pass"] if has_pass else ["cell_id"])
    wanted = as_text(table["cell_id"])
    if has_pass:
        wanted = wanted[table["qc_pass"].combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)]
    rows = locate(wanted, ids, what="cells", path=cells)
    return baselines.Counts(counts.X[rows], counts.genes, counts.totals[rows])


def _features(
    features: str,
    inputs: Sequence[Path],
    genes: np.ndarray,
    *,
    cells: Path | None,
    column: str | None,
    gene: str,
    vocabulary: Path | None,
    seed: int,
) -> np.ndarray:
    """Features of the split's genes, float64[genes, dim], in their order."""
    if not inputs:
        raise UserError(f"no files given for features {features!r}")
    first = Path(inputs[0])
    if features == "embedding":
        ids, values = read_vectors([Path(p) for p in inputs], key="gene_id")
        return values[locate(genes, ids, what="genes", path=first)].astype(np.float64)
    if features == "column":
        if column is None:
            raise UserError("features 'column' need the name of a column")
        ids, texts = read_gene_table(first, gene=gene, column=column)
        rows = locate(genes, ids, what="genes", path=first)
        try:
            numbers = np.array([float(v) for v in texts[rows]])[:, None]
        except (TypeError, ValueError):
            raise UserError(
                f"column {column!r} is not a number for every gene of the split", path=first
            ) from None
        if not np.isfinite(numbers).all():
            raise UserError(f"column {column!r} is not finite for every gene of the split", path=first)
        return numbers
    names, counts = baselines.read_counts([Path(p) for p in inputs], vocabulary=vocabulary)
    counts = _passing(counts, names, cells)
    rows = locate(genes, counts.genes, what="genes", path=first)
    if features == "mean_expression":
        return baselines.mean_expression(counts)[rows]
    if features == "detection":
        return baselines.detection(counts)[rows]
    return baselines.coexpression_pca(counts, seed=seed)[rows]


def _measure(
    positive: np.ndarray,
    score: np.ndarray,
    fold: np.ndarray,
    *,
    raw: np.ndarray | None,
    groups: np.ndarray | None,
    seed: int,
) -> dict[str, Any]:
    """AUC as the mean over folds and pooled, average precision, and the AUC of the raw values of one feature."""
    # within class and fold every fold keeps both classes; groups may hold both, so those are drawn within folds only
    within_folds = fold * 2 + positive if groups is None else fold
    within_classes = positive if groups is None else np.zeros(len(fold))
    per_fold = [float(metrics.auc(positive[fold == f], score[fold == f])) for f in np.unique(fold)]

    def interval(statistic: Any, strata: np.ndarray) -> tuple[float, float]:
        return metrics.percentile_interval(
            metrics.bootstrap_genes(statistic, strata, groups=groups, seed=seed)
        )

    measured = {
        "auc": metrics.metric(
            float(metrics.fold_mean_auc(positive, score, fold)),
            interval(lambda w: metrics.fold_mean_auc(positive, score, fold, w), within_folds),
            per_fold,
            sd=float(np.std(per_fold, ddof=1)),
        ),
        "auc_pooled": metrics.metric(
            float(metrics.auc(positive, score)),
            interval(lambda w: metrics.auc(positive, score, w), within_classes),
            [],
        ),
        "average_precision": metrics.metric(
            float(metrics.average_precision(positive, score)),
            interval(lambda w: metrics.average_precision(positive, score, w), within_classes),
            [],
        ),
    }
    if raw is not None:
        measured["auc_raw"] = metrics.metric(
            float(metrics.auc(positive, raw)),
            interval(lambda w: metrics.auc(positive, raw, w), within_classes),
            [],
        )
    return measured


def evaluate_genes(
    *,
    benchmark: str,
    method: str,
    kind: str,
    split: str | Path,
    features: str,
    inputs: Sequence[Path],
    output: str | Path,
    predictions: str | Path,
    cells: Path | None = None,
    column: str | None = None,
    gene: str = "gene_id",
    permute: bool = False,
    vocabulary: Path | None = None,
    published: Sequence[dict[str, Any]] = (),
    threads: int = 1,
) -> dict[str, Any]:
    """Score one method on one gene benchmark and write the score and its predictions.

    Parameters
    ----------
    benchmark, method, kind
        Names for the tables; kind is `model`, `baseline`, `control` or `oracle`.
    split
        What `make_gene_split` wrote; it holds the genes and their classes.
    features, inputs
        What to predict from, and its files: gene embeddings for `embedding`, counts shards for the baselines, one
        table for `column`.
    cells
        `cells.parquet` of the counts: baselines use the cells that passed QC, as the embeddings do.
    column, gene
        Column of values and of gene ids of the table, for `column`.
    permute
        Shuffle the classes over the genes of each fold first: a control that must come out at chance.
    vocabulary
        Maps feature ids and symbols of the counts to genes.

    Returns
    -------
    The score as written. `auc` is the mean of the folds' AUCs, in which only scores of one classifier are compared;
    `auc_pooled` compares log odds over all folds, less the log odds of the training classes, so that a fold's share
    of positives doesn't rank its genes; `auc_raw`, for a single feature, needs no classifier at all. A single
    feature without information scores somewhat under 0.5 as `auc`: what a test fold has more of, its training part
    has less of. Where the classes are matched pair by pair that bias is strong, unless the split groups the pairs.

    Raises
    ------
    UserError
        If the files lack genes of the split, or a column is not numeric.
    """
    check_kind(kind)
    if features not in get_args(GeneFeatures):
        raise UserError(f"unknown features {features!r}", fix=did_you_mean(features, get_args(GeneFeatures)))
    plan = read_split(split, task="genes")
    genes = np.array(list(plan.content["genes"]), dtype=object)
    truth = np.array(list(plan.content["genes"].values()), dtype=object)
    folds = plan.masks(genes)
    if permute:
        for _, test in folds:  # within folds, so that they stay stratified
            truth[test] = permuted(truth[test], genes[test], seed=plan.seed)
    groups = None if plan.content["groups"] is None else np.array(plan.content["groups"], dtype=object)
    y = (truth == plan.classes[1]).astype(np.int64)
    X = _features(
        features, inputs, genes, cells=cells, column=column, gene=gene, vocabulary=vocabulary, seed=plan.seed
    )
    results = predict_folds(
        lambda a, b: (X[a], X[b]),
        y,
        folds,
        names=genes,
        units=None,
        n_classes=2,
        seed=plan.seed,
        threads=threads,
    )
    probability, log_odds = np.zeros(len(genes)), np.zeros(len(genes))
    fold = np.zeros(len(genes), dtype=np.int64)
    for number, ((train, test), result) in enumerate(zip(folds, results, strict=True)):
        p = np.clip(result.probability[:, 1], 1e-12, 1 - 1e-12)
        share = y[train].mean()
        probability[test], fold[test] = result.probability[:, 1], number
        log_odds[test] = np.log(p / (1 - p)) - np.log(share / (1 - share))
    notes = list(plan.content["notes"])
    if not all(r.converged for r in results):
        notes.append("the logistic regression did not converge in every fold")
    if permute:
        notes.append("labels permuted: has to come out at chance")
    positive = y.astype(bool)
    score: dict[str, Any] = {
        "benchmark": benchmark,
        "method": method,
        "kind": kind,
        **plan.describe(),
        "n": len(genes),
        "class_sizes": plan.content["class_sizes"],
        "interval": {
            "method": "percentile bootstrap",
            "level": metrics.LEVEL,
            "resamples": metrics.RESAMPLES,
            "resampled": plan.unit or "genes",
            "note": "the classifiers are not trained again",
        },
        "metrics": _measure(
            positive,
            log_odds,
            fold,
            raw=X[:, 0] if X.shape[1] == 1 else None,
            groups=groups,
            seed=plan.seed,
        ),
        "chance": {"auc": 0.5},
        "penalties": [r.penalty for r in results],
        "published": published_by_metric(published),
        "notes": notes,
    }
    parameters = {"features": features, "column": column, "permute": permute, "seed": plan.seed}
    read = {"split": digest_file(split), "features": digest_arrays(X)}
    made = stamp("evaluate", REVISIONS["evaluate"], parameters=parameters, inputs=read)
    names = np.array(plan.classes, dtype=object)
    table = pa.table(
        {
            "gene_id": pa.array(genes.tolist(), pa.string()),
            "fold": pa.array([plan.folds[f]["name"] for f in fold], pa.string()),
            "label": pa.array(truth.tolist(), pa.string()),
            "predicted": pa.array(names[(probability > 0.5).astype(int)].tolist(), pa.string()),
            "probability": pa.array(probability, pa.float64()),
            "log_odds": pa.array(log_odds, pa.float64()),
        }
    )
    write_table(table, predictions, metadata=made)
    write_score(score | made, output)
    return score | made
