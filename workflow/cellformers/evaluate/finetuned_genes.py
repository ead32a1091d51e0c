"""Predictions of models fine-tuned on the folds of a gene benchmark, checked to be of this very split.

`cellformers finetune --task genes --labels split.json --split-file split.json --fold k` writes one model a fold;
`cellformers evaluate --features finetuned --fold-model ...` takes their test predictions in the order of the folds.
Every gene has one score, the mean of its logits over its cells, and one a cell that it was seen in: the published
protocol (Theodoris et al. 2023) pools those, so that frequently seen genes count most. Both are scored here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from cellformers import metrics
from cellformers.errors import UserError
from cellformers.evaluate.splitfile import Split
from cellformers.io.arrow import as_numbers, as_strings
from cellformers.io.files import read_json, read_table, whole

FIX = (
    "fine-tune it with this split: cellformers finetune --labels split.json --split-file split.json --fold K"
)
LEVELS = 1024  # of token scores in resamples, so that a million tokens cost as much as a thousand


class FinetunedGenes(NamedTuple):
    """Scores of the split's genes, in their order, and of their tokens, fold after fold."""

    score: np.ndarray
    """float64[genes]: mean over its cells of logit(positive) - logit(negative); NaN where a gene is in no cell."""
    token_gene: np.ndarray
    """int64[tokens]: the row of the gene."""
    token_score: np.ndarray
    """float64[tokens]: logit(positive) - logit(negative)."""
    notes: list[str]


def read_finetuned(models: Sequence[str | Path], split: Split) -> FinetunedGenes:
    """Test predictions of one fine-tuned model a fold.

    Parameters
    ----------
    models
        Model directories that `finetune` wrote, in the order of the folds.
    split
        A split of genes.

    Raises
    ------
    UserError
        If there is not one model a fold, or a model was trained on genes that its fold does not train on, tested on
        others than its fold tests, or learnt other labels.
    """
    if len(models) != len(split.folds):
        raise UserError(
            f"{len(models)} fine-tuned models for {len(split.folds)} folds",
            fix="give --fold-model once a fold, in the order of the folds",
        )
    labels: dict[str, str] = split.content["genes"]
    rows = pd.Index(list(labels))
    score = np.full(len(rows), np.nan)
    genes, values, notes = [], [], []
    for path, fold in zip(map(Path, models), split.folds, strict=True):
        with whole(path, fix=FIX):
            notes += _check_trained(path, split, fold)
            names, own = _tested(path / "predictions.parquet", labels, fold, split.classes)
            score[rows.get_indexer(pd.Index(names))] = own
            names, own = _tested(path / "predictions_pooled.parquet", labels, fold, split.classes)
            place = rows.get_indexer(pd.Index(names))
            if not np.isin(place, np.flatnonzero(~np.isnan(score))).all():
                raise UserError("has tokens of genes that predictions.parquet lacks", path=path, fix=FIX)
            genes.append(place)
            values.append(own)
    return FinetunedGenes(score, np.concatenate(genes), np.concatenate(values), notes)


def _check_trained(path: Path, split: Split, fold: dict[str, Any]) -> list[str]:
    """Refuse a model of other labels, or one that has seen what its fold doesn't train on."""
    training, sides = read_json(path / "training.json"), read_json(path / "split.json")
    if not isinstance(training, dict) or training.get("task") != "genes" or not isinstance(sides, dict):
        raise UserError("holds no model fine-tuned to classify genes", path=path, fix=FIX)
    learnt = training["labels"][0]
    if learnt["name"] != split.content["label"] or set(learnt["classes"]) != set(split.classes):
        raise UserError(
            f"tells apart {' and '.join(learnt['classes'])} of {learnt['name']!r}, the split "
            f"{' and '.join(split.classes)} of {split.content['label']!r}", path=path, fix=FIX,
        )  # fmt: skip
    test = set(fold["test"])
    allowed = set(split.content["genes"]) - test
    seen = {str(name) for side in ("train", "heldout") for name in sides.get(side, [])}
    strange = sorted(seen & test) or sorted(seen - allowed)
    if strange:
        raise UserError(
            f"was trained on gene {strange[0]}, which fold {fold['name']!r} does not train on",
            path=path, fix=FIX,
        )  # fmt: skip
    tested = set(map(str, sides.get("test", [])))
    outside = set(training["genes"]["outside the vocabulary"])
    wrong = sorted(tested - test) or sorted(test - tested - outside)
    if wrong:
        raise UserError(
            f"{'tested' if wrong[0] in tested else 'did not test'} gene {wrong[0]}, unlike fold {fold['name']!r}",
            path=path, fix=FIX,
        )  # fmt: skip
    missing = len(allowed) - len(seen)
    return [f"{fold['name']}: fine-tuned with {len(seen)} of its {len(allowed)} genes"] if missing else []


def _tested(
    path: Path, labels: dict[str, str], fold: dict[str, Any], classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Genes, object[rows] of str, and logit(positive) - logit(negative), float64[rows], of the tested rows."""
    columns = [f"probability_{name}" for name in classes]
    table = read_table(path, ["gene_id", "side", "label", *columns])
    table = table.filter(pa.array(as_strings(table["side"]) == "test"))
    names, said = as_strings(table["gene_id"]), as_strings(table["label"])
    test = set(fold["test"])
    kinds, first = np.unique(names.astype(str), return_index=True)
    for name, row in zip(kinds.tolist(), first.tolist(), strict=True):
        if name not in test or labels[name] != said[row]:
            raise UserError(
                f"predicts gene {name} as tested {said[row]!r}, which fold {fold['name']!r} does not have",
                path=path, fix=FIX,
            )  # fmt: skip
    # probabilities are float32 and may be 0; the least that is not stands for that
    negative, positive = (
        np.log(np.maximum(as_numbers(table[column]).astype(np.float64), 1e-45)) for column in columns
    )
    return names, positive - negative


def _levels(positive: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Scores as levels of equal order, int64: each holds at most 2 / LEVELS of either class, ties aside."""
    shares = np.linspace(0, 1, LEVELS // 2 + 1)[1:-1]
    edges = [np.quantile(score[rows], shares, method="lower") for rows in (positive, ~positive) if rows.any()]
    return np.searchsorted(np.unique(np.concatenate(edges)), score, side="left")


def auc_tokens(
    found: FinetunedGenes,
    positive: np.ndarray,
    fold: np.ndarray,
    *,
    groups: np.ndarray | None,
    seed: int,
    resamples: int = metrics.RESAMPLES,
) -> dict[str, Any]:
    """AUC over pooled (cell, gene) tokens: mean over folds, values per fold, SD, and interval.

    The interval is of resampled genes, each with all of its tokens, within class and fold (groups: within the fold,
    all genes of a group together); there is none where there are too few (`metrics.enough_genes`). In resamples, not
    in the value, scores are put into levels, and pairs within a level count half: an AUC is off by half the share of
    pairs that meet in one level, about 1 / LEVELS at most.

    Parameters
    ----------
    positive, fold
        bool and int64 [genes], the truth and the fold of each gene.
    groups
        object[genes]: groups of genes that are drawn together, or None.

    Raises
    ------
    UserError
        If the tested genes of a fold are seen in no cell, or those of one class only.
    """
    exact, tables = [], []
    for number in np.unique(fold):
        rows = np.flatnonzero(fold == number)
        tokens = np.isin(found.token_gene, rows)
        gene, score = np.searchsorted(rows, found.token_gene[tokens]), found.token_score[tokens]
        value = float(metrics.auc(positive[rows][gene], score))
        if np.isnan(value):
            raise UserError(
                f"no cell holds tested genes of both classes in fold {number + 1}",
                fix="give more cells, or fewer folds",
            )
        exact.append(value)
        level = _levels(positive[rows][gene], score)
        width = int(level.max()) + 1
        counts = np.bincount(gene * width + level, minlength=len(rows) * width)
        tables.append((rows, counts.reshape(len(rows), width).astype(np.float64)))

    def statistic(weights: np.ndarray) -> np.ndarray:
        values = []
        for rows, counts in tables:
            up, drawn = positive[rows], weights[:, rows].astype(np.float64)
            sums = np.concatenate([drawn[:, up] @ counts[up], drawn[:, ~up] @ counts[~up]], axis=1)
            width = counts.shape[1]
            values.append(metrics.auc(np.repeat([True, False], width), np.tile(np.arange(width), 2), sums))
        return np.asarray(np.mean(values, axis=0))

    strata = fold * 2 + positive if groups is None else fold
    interval = None
    if metrics.enough_genes(strata, groups, positive):
        draws = metrics.bootstrap_genes(statistic, strata, groups=groups, seed=seed, resamples=resamples)
        interval = metrics.percentile_interval(draws)
    return metrics.metric(
        float(np.mean(exact)), interval, exact,
        sd=float(np.std(exact, ddof=1)), n_tokens=len(found.token_gene),
    )  # fmt: skip
