"""Gene task: tell two classes of genes apart, such as dosage-sensitive and insensitive factors.

Runs as `cellformers evaluate --task genes`, one benchmark and one method at a time, on the genes of one split. A
method is a classifier on frozen features (gene embeddings, a baseline computed from counts or tokens, or `column` of a
table: an oracle, such as the true out-degree), or models that were fine-tuned on the folds of the split (`finetuned`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from cellformers import metrics
from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate.classify import Classifier, predict_folds
from cellformers.evaluate.finetuned_genes import LEVELS, auc_tokens, read_finetuned
from cellformers.evaluate.gene_features import MAX_CELLS, GeneFeatures, read_features
from cellformers.evaluate.scores import check_kind, published_by_metric, write_score
from cellformers.evaluate.splitfile import Split, read_split
from cellformers.folds import permuted
from cellformers.io.files import digest_arrays, digest_file, stamp, write_table
from cellformers.revisions import REVISIONS

TUNED = {"logistic": "penalties", "svm": "C", "forest": "max_depth"}
"""What the setting that each classifier chose in each fold is called in a score."""


class Task(NamedTuple):
    """The genes of a split: who they are, what they are and where they are tested."""

    plan: Split
    genes: np.ndarray
    """object[n] of str."""
    truth: np.ndarray
    """object[n] of str: the classes, shuffled for a control."""
    positive: np.ndarray
    """bool[n]."""
    fold: np.ndarray
    """int64[n]: the fold that tests each gene."""
    groups: np.ndarray | None
    """object[n]: genes that are drawn together in resamples."""

    def shares(self) -> np.ndarray:
        """Share of positives among the genes that the fold of each gene trains on, float64[n]."""
        other = self.fold != np.arange(len(self.plan.folds))[:, None]
        return np.array([self.positive[rows].mean() for rows in other])[self.fold]


class Prediction(NamedTuple):
    """What a method says about the genes of a task."""

    probability: np.ndarray
    """float64[n] of the positive class."""
    log_odds: np.ndarray
    """float64[n], less those of the training classes."""
    digest: str
    """Of what was predicted from."""
    raw: np.ndarray | None
    """float64[n]: the values of a single feature."""
    metrics: dict[str, Any]
    """Of this kind of method only."""
    about: dict[str, Any]
    """What the score says besides."""
    notes: list[str]


def _task(split: str | Path, *, permute: bool) -> Task:
    plan = read_split(split, task="genes")
    genes = np.array(list(plan.content["genes"]), dtype=object)
    truth = np.array(list(plan.content["genes"].values()), dtype=object)
    fold = np.full(len(genes), -1, dtype=np.int64)
    for number, (_, test) in enumerate(plan.masks(genes)):
        fold[test] = number
        if permute:  # within folds, so that they stay stratified
            truth[test] = permuted(truth[test], genes[test], seed=plan.seed)
    if (fold < 0).any():
        raise UserError(
            f"gene {genes[fold < 0][0]} is tested in no fold", path=split, fix="make the split again"
        )
    groups = None if plan.content["groups"] is None else np.array(plan.content["groups"], dtype=object)
    return Task(plan, genes, truth, truth == plan.classes[1], fold, groups)


def _classified(task: Task, X: np.ndarray, *, classifier: Classifier, threads: int) -> Prediction:
    """Train the classifier on the features of each fold's training genes."""
    folds = task.plan.masks(task.genes)
    results = predict_folds(
        lambda a, b: (X[a], X[b]), task.positive.astype(np.int64), folds, names=task.genes, units=task.groups,
        n_classes=2, seed=task.plan.seed, threads=threads, classifier=classifier,
    )  # fmt: skip
    probability = np.zeros(len(task.genes))
    for (_, test), result in zip(folds, results, strict=True):
        probability[test] = result.probability[:, 1]
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    log_odds = np.log(p / (1 - p))
    if classifier == "logistic":  # the others weigh both classes the same
        log_odds -= _logit(task.shares())
    notes = []
    if not all(r.converged for r in results):
        notes.append("the logistic regression did not converge in every fold")
    about = {"classifier": classifier, TUNED[classifier]: [r.penalty for r in results]}
    raw = X[:, 0] if X.shape[1] == 1 else None
    return Prediction(probability, log_odds, digest_arrays(X), raw, {}, about, notes)


def _logit(p: np.ndarray) -> np.ndarray:
    return np.asarray(np.log(p / (1 - p)))


def _finetuned(task: Task, models: Sequence[Path]) -> Prediction:
    """Take the predictions of fine-tuned models; a gene in no cell gets the share of positives among training genes."""
    found = read_finetuned(models, task.plan)
    prior = _logit(task.shares())
    seen = ~np.isnan(found.score)
    score = np.where(seen, found.score, prior)
    notes = list(found.notes)
    if not seen.all():
        notes.append(
            f"{int((~seen).sum())} of the {len(seen)} genes are in no cell: they get the share of positives among the "
            "training genes as their probability, and don't count in auc_tokens"
        )
    by_token = auc_tokens(found, task.positive, task.fold, groups=task.groups, seed=task.plan.seed)
    return Prediction(
        1 / (1 + np.exp(-np.clip(score, -500, 500))), score - prior,
        digest_arrays(found.score, found.token_gene, found.token_score), None, {"auc_tokens": by_token}, {}, notes,
    )  # fmt: skip


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

    def interval(statistic: Any, strata: np.ndarray) -> tuple[float, float] | None:
        if not metrics.enough_genes(within_folds, groups, positive):
            return None
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
    classifier: str = "logistic",
    max_cells: int = MAX_CELLS,
    fold_models: Sequence[Path] = (),
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
        What to predict from, and its files: gene embeddings for `embedding`, tokens for `ranks`, counts shards for
        the other baselines, one table for `column`, none for `finetuned`.
    cells
        `cells.parquet` of the counts: baselines use the cells that passed QC, as the embeddings do.
    column, gene
        Column of values and of gene ids of the table, for `column`.
    permute
        Shuffle the classes over the genes of each fold first: a control that must come out at chance.
    vocabulary
        Maps feature ids and symbols of the counts to genes; `ranks`: the one the tokens were made with.
    classifier
        `logistic`, `svm` or `forest`.
    max_cells
        Cells that describe a gene in `ranks` and `counts`.
    fold_models
        `finetuned`: what `finetune` wrote for each fold, in the order of the folds.

    Returns
    -------
    The score as written. `auc` is the mean of the folds' AUCs, in which only scores of one classifier are compared;
    `auc_pooled` compares log odds over all folds, less the log odds of the training classes, so that a fold's share
    of positives doesn't rank its genes; `auc_raw`, for a single feature, needs no classifier at all. A single
    feature without information scores somewhat under 0.5 as `auc`: what a test fold has more of, its training part
    has less of. Where the classes are matched pair by pair that bias is strong, unless the split groups the pairs.
    `auc_tokens`, of fine-tuned models, compares (cell, gene) tokens and is what was published.

    Raises
    ------
    UserError
        If the files lack genes of the split, a column is not numeric, or a model was fine-tuned on another split.
    """
    check_kind(kind)
    numbers = published_by_metric(published, task="genes")
    for what, value, known in (("features", features, GeneFeatures), ("classifier", classifier, Classifier)):
        if value not in get_args(known):
            raise UserError(f"unknown {what} {value!r}", fix=did_you_mean(value, get_args(known)))
    tuned = features == "finetuned"
    if tuned and permute:
        raise UserError(
            "the labels of fine-tuned models can't be permuted after training",
            fix="permute those of another method, or fine-tune on permuted labels",
        )
    task = _task(split, permute=permute)
    notes = list(task.plan.content["notes"])
    if tuned:
        found = _finetuned(task, [Path(p) for p in fold_models])
    else:
        read = read_features(
            features, inputs, task.genes, cells=cells, column=column, gene=gene, vocabulary=vocabulary,
            max_cells=max_cells, seed=task.plan.seed,
        )  # fmt: skip
        notes += read.notes
        found = _classified(task, read.X, classifier=classifier, threads=threads)  # type: ignore[arg-type]
    notes += found.notes
    if permute:
        notes.append("labels permuted: has to come out at chance")
    parameters: dict[str, Any] = {
        "features": features, "column": column, "permute": permute, "seed": task.plan.seed,
        "classifier": None if tuned else classifier,
        "max_cells": max_cells if features in ("ranks", "counts") else None,
    }  # fmt: skip
    inputs_read = {"split": digest_file(split), "features": found.digest}
    made = stamp("evaluate", REVISIONS["evaluate"], parameters=parameters, inputs=inputs_read)
    score = {
        "benchmark": benchmark,
        "method": method,
        "kind": kind,
        **_score(task, found),
        "published": numbers,
        "notes": notes,
    } | made
    write_table(_table(task, found), predictions, metadata=made)
    write_score(score, output)
    return score


def _score(task: Task, found: Prediction) -> dict[str, Any]:
    """What a score says of the split and of how well its genes are told apart."""
    measured = _measure(
        task.positive, found.log_odds, task.fold, raw=found.raw, groups=task.groups, seed=task.plan.seed
    )
    chance = dict.fromkeys(("auc", *found.metrics), 0.5)
    earned = measured["auc"]["low"] is not None
    note = "the classifiers are not trained again"
    if not earned:
        note = (
            f"no interval: needs two {task.plan.unit or 'genes'} of each class in every fold, and "
            f"{metrics.MIN_UNITS} in all"
        )
    elif "auc_tokens" in found.metrics:
        note = (
            "the networks are not trained again; genes are resampled with all their tokens, whose scores are put into "
            f"{LEVELS:,} levels: the ends for auc_tokens are exact to {1 / LEVELS:.3f}"
        )
    return {
        **task.plan.describe(),
        "n": len(task.genes),
        "class_sizes": task.plan.content["class_sizes"],
        "interval": {
            "method": "percentile bootstrap",
            "level": metrics.LEVEL,
            "resamples": metrics.RESAMPLES,
            "resampled": (task.plan.unit or "genes") if earned else None,
            "note": note,
        },
        "metrics": measured | found.metrics,
        "chance": chance | {"average_precision": float(task.positive.mean())},
        **found.about,
    }


def _table(task: Task, found: Prediction) -> pa.Table:
    """One row a gene."""
    names = np.array(task.plan.classes, dtype=object)
    return pa.table(
        {
            "gene_id": pa.array(task.genes.tolist(), pa.string()),
            "fold": pa.array([task.plan.folds[f]["name"] for f in task.fold], pa.string()),
            "label": pa.array(task.truth.tolist(), pa.string()),
            "predicted": pa.array(names[(found.probability > 0.5).astype(int)].tolist(), pa.string()),
            "probability": pa.array(found.probability, pa.float64()),
            "log_odds": pa.array(found.log_odds, pa.float64()),
        }
    )
