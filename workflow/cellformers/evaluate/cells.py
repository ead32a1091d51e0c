"""Cell task: predict the label of cells of held-out donors, datasets or folds.

Runs as `cellformers evaluate`, one benchmark and one method at a time; all methods read the same split. Frozen features
(an embedding; `pca_hvg`, `log_counts` or `harmony` computed from counts; `rank_only` from tokens) go through one
logistic regression; `majority` has none; `finetuned` takes what models fine-tuned on the folds predicted. Of a fold of
more than 50,000 training cells so many are learnt from (`large`), but by `harmony` and `finetuned` all.

With `permute` labels are shuffled before anything else, training and test alike: whatever scores above chance then
leaks. Labels that are constant within donors (a disease) are drawn anew for whole donors: shuffled over single cells
they would no longer go with what a donor's cells share, so the control would come out at chance whatever leaks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa

from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate import baselines, integration, large, rank_features
from cellformers.evaluate.cell_metrics import measure
from cellformers.evaluate.classify import Features, FoldPrediction, predict_folds
from cellformers.evaluate.finetuned import finetuned_cells
from cellformers.evaluate.scores import check_kind, published_by_metric, write_score
from cellformers.evaluate.splitfile import Split, cell_folds, cells_digest, read_split
from cellformers.evaluate.tables import Cells, aligned_vectors, column_of, read_cells, take_cells
from cellformers.folds import permuted, redrawn
from cellformers.io.files import digest_arrays, digest_file, stamp, write_table
from cellformers.revisions import REVISIONS

Array = np.ndarray[Any, Any]
CellFeatures = Literal[
    "embedding", "pca_hvg", "log_counts", "rank_only", "harmony", "majority", "finetuned"
]  # fmt: skip
DRAWN = ("embedding", "pca_hvg", "log_counts", "rank_only")  # learn from 50,000 cells a fold at most
TRANSDUCTIVE = "transductive: sees the test cells' counts and batches, not their labels"


def _provider(
    features: str,
    inputs: Mapping[str, Sequence[Path]],
    cells: Cells,
    *,
    batch: Array | None,
    vocabulary: Path | None,
    seed: int,
    threads: int,
) -> tuple[Features, str, list[str]]:
    """Features of a fold as a function of its rows, the digest of what they come from, and notes."""
    if features == "embedding":
        vectors = aligned_vectors(cells, inputs)
        return lambda a, b: (vectors[a], vectors[b]), digest_arrays(vectors), []
    if features == "rank_only":
        ranks = rank_features.aligned_ranks(cells, inputs, vocabulary=vocabulary)
        digest = digest_arrays(ranks.indptr.astype(np.int64), ranks.indices.astype(np.int32), ranks.data)
        return lambda a, b: rank_features.rank_only(ranks, a, b), digest, []
    counts = baselines.aligned_counts(cells, inputs, vocabulary=vocabulary)
    notes = [f"{len(counts.genes)} genes in common"] if len(set(cells.dataset)) > 1 else []
    if features == "harmony":
        assert batch is not None
        pcs = integration.harmony(
            integration.uncorrected(counts, seed=seed), batch, seed=seed, threads=threads
        )
        return lambda a, b: (pcs[a], pcs[b]), digest_arrays([counts.digest()], batch), [*notes, TRANSDUCTIVE]
    if features == "pca_hvg":
        return lambda a, b: baselines.pca_hvg(counts, a, b, seed=seed), counts.digest(), notes
    return lambda a, b: baselines.log_counts(counts, a, b), counts.digest(), notes


def _majority(y: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]], n: int) -> list[FoldPrediction]:
    """Predict the class shares of the training cells."""
    shares = [np.bincount(y[train], minlength=n) / len(train) for train, _ in folds]
    return [
        FoldPrediction(np.tile(s, (len(test), 1)), 0.0, True)
        for s, (_, test) in zip(shares, folds, strict=True)
    ]


def _permuted(
    cells: Cells, folds: Sequence[tuple[Array, Array]], *, unit: str | None, seed: int
) -> tuple[Array, str]:
    """Labels without information and what to say about them: over units where each has one label, else over cells."""
    said = "has to come out at chance"
    units = set() if cells.unit is None else set(cells.unit)
    if (
        cells.unit is None
        or len(units) < 2
        or len(set(zip(cells.unit, cells.label, strict=True))) > len(units)
    ):
        return permuted(cells.label, cells.keys(), seed=seed), f"labels permuted over cells: {said}"
    labels = redrawn(cells.label, cells.unit, train=[train for train, _ in folds], seed=seed)
    return labels, f"labels permuted over {len(units)} units ({unit}), each of which has one label: {said}"


def _predictions(
    cells: Cells, units: Array | None, y: Array, classes: list[str], split: Split,
    folds: list[tuple[np.ndarray, np.ndarray]], results: list[FoldPrediction],
) -> pa.Table:  # fmt: skip
    rows = np.concatenate([test for _, test in folds])
    probability = np.concatenate([r.probability for r in results])
    predicted = probability.argmax(axis=1)
    names = np.array(classes, dtype=object)
    fold = np.repeat([f["name"] for f in split.folds], [len(test) for _, test in folds])
    columns: dict[str, Any] = {
        "cell_id": pa.array(cells.cell_id[rows].tolist(), pa.string()),
        "dataset": pa.array(cells.dataset[rows].tolist(), pa.string()),
        "fold": pa.array(fold.tolist(), pa.string()),
        "unit": pa.array([None] * len(rows) if units is None else units[rows].tolist(), pa.string()),
        "label": pa.array(names[y[rows]].tolist(), pa.string()),
        "predicted": pa.array(names[predicted].tolist(), pa.string()),
        "probability": pa.array(probability.max(axis=1), pa.float32()),
    }
    for k, name in enumerate(classes):
        columns[f"probability:{name}"] = pa.array(probability[:, k], pa.float32())
    return pa.table(columns)


def _units(split: Split, cells: Cells) -> tuple[Array | None, str]:
    """The units that inner folds hold out and intervals resample (None: single cells), and what they are called."""
    if split.content["kind"] == "stratified":
        return None, "cell"
    if cells.unit is None and split.content["by"] == "dataset":
        return cells.dataset, "dataset"
    return cells.unit, split.unit or "cell"


def _batches(features: str, batch: str | None, cells: Cells, tables: Mapping[str, Path]) -> Array | None:
    """The batch of each cell, object[n] of str, for what mixes batches; None for what does not."""
    if features != "harmony":
        return None
    if batch is None:
        raise UserError(
            "harmony has to know what to mix", fix="give --batch with a column, or --batch dataset"
        )
    return cells.dataset if batch == "dataset" else column_of(cells, tables, batch)


def evaluate_cells(
    *,
    benchmark: str,
    method: str,
    kind: str,
    split: str | Path,
    cells: Mapping[str, Path],
    features: str,
    inputs: Mapping[str, Sequence[Path]],
    output: str | Path,
    predictions: str | Path,
    permute: bool = False,
    batch: str | None = None,
    fold_models: Sequence[str | Path] = (),
    vocabulary: Path | None = None,
    published: Sequence[Mapping[str, Any]] = (),
    threads: int = 1,
) -> dict[str, Any]:
    """Score one method on one cell benchmark and write the score and its predictions.

    Parameters
    ----------
    benchmark, method, kind
        Names for the tables; kind is `model`, `baseline`, `control` or `oracle`.
    split
        What `make_cell_split` wrote.
    cells
        The `cells.parquet` by dataset that the split was made from.
    features, inputs
        What to predict from, and its files by dataset: embedding shards or one .h5ad for `embedding`, counts shards
        for `pca_hvg`, `log_counts` and `harmony`, tokens for `rank_only`, none for `majority` and `finetuned`.
    permute
        Shuffle the labels first, over donors where each has one label, else over cells: a control that must come out
        at chance.
    batch
        `harmony`: column of the batches to mix, or `dataset`.
    fold_models
        `finetuned`: the model directory of each fold, in their order.
    vocabulary
        Maps ids and symbols to genes where datasets name them differently; `rank_only`: that of the tokens.
    published
        Published numbers to show beside, {"metric", "value", "source"}.

    Returns
    -------
    The score as written. `chance` is the most a prediction without information can be expected to score: 1 / classes
    for macro F1 (the mean F1 of independent guesses is at most the mean of (p + q) / 2), precision and recall, the
    share of the largest class for accuracy and votes, 0.5 for the AUC.

    Raises
    ------
    UserError
        If the split was made from other cells, files lack cells, a unit is on both sides of a fold, or a fine-tuned
        model was trained on another split.
    """
    check_kind(kind)
    numbers = published_by_metric(published, task="cells")
    if features not in get_args(CellFeatures):
        raise UserError(f"unknown features {features!r}", fix=did_you_mean(features, get_args(CellFeatures)))
    if permute and features == "finetuned":
        raise UserError("a fine-tuned model has learnt the true labels", fix="leave --permute out")
    plan = read_split(split, task="cells")
    table, _ = read_cells(cells, label=plan.content["label"], unit=plan.unit)
    table = take_cells(table, ~np.isin(table.keys().astype(str), plan.content.get("untokenised", [])))
    folds = cell_folds(plan, table, path=split)
    units, unit = _units(plan, table)
    notes = list(plan.content["notes"])
    labels = table.label
    if permute:
        labels, said = _permuted(table, folds, unit=plan.unit, seed=plan.seed)
        notes.append(said)
    y = np.searchsorted(plan.classes, labels.astype(str))
    read = {"split": digest_file(split), "cells": cells_digest(table)}
    if features == "majority":
        results = _majority(y, folds, len(plan.classes))
    elif features == "finetuned":
        results, read["features"], said_of = finetuned_cells(fold_models, plan, table, folds)
        notes += said_of
    elif features in DRAWN and (chosen := large.drawn(table.keys(), folds, seed=plan.seed)) is not None:
        results, read["features"], said_of = large.predict_drawn(
            features, inputs, table, y=y, units=units, folds=folds, chosen=chosen, n_classes=len(plan.classes),
            vocabulary=vocabulary, seed=plan.seed, threads=threads,
        )  # fmt: skip
        notes += said_of
    else:
        provider, read["features"], said_of = _provider(
            features, inputs, table, batch=_batches(features, batch, table, cells), vocabulary=vocabulary,
            seed=plan.seed, threads=threads,
        )  # fmt: skip
        notes += said_of
        results = predict_folds(
            provider, y, folds, names=table.keys(), units=units, n_classes=len(plan.classes), seed=plan.seed,
            threads=threads,
        )  # fmt: skip
    if not all(r.converged for r in results):
        notes.append("the logistic regression did not converge in every fold")
    score: dict[str, Any] = {
        "benchmark": benchmark,
        "method": method,
        "kind": kind,
        **plan.describe(),
        "n": int(sum(len(test) for _, test in folds)),
        **measure(
            y, [r.probability for r in results], folds, units, classes=plan.classes, unit=unit, seed=plan.seed,
            vote=plan.unit is not None,
        ),
        "penalties": None if features == "finetuned" else [r.penalty for r in results],
        "published": numbers,
        "notes": notes,
    }  # fmt: skip
    parameters = {"features": features, "permute": permute, "batch": batch, "seed": plan.seed}
    made = stamp("evaluate", REVISIONS["evaluate"], parameters=parameters, inputs=read)
    write_table(_predictions(table, units, y, plan.classes, plan, folds, results), predictions, metadata=made)
    write_score(score | made, output)
    return score | made
