"""Cell benchmarks of many cells: trained on some cells of each fold, tested on all of them, in bounded memory.

From 20,000 training cells of a fold or 50,000 cells in all on, features are read in blocks. Of more than 50,000
training cells so many are drawn, by a hash of their names and the seed, so every method of a benchmark learns from the
same cells; the score says so. Test cells are all predicted, a block at a time while their files are read once. The
classifier is that of `classify`: logistic regression of standardised features, the penalty chosen on inner folds. It
minimises the same function by the same method (L-BFGS), but reads float32 features in blocks and standardises the
weights instead of the features, so that nothing is copied.

Memory: 8 bytes a count or token of the cells that any fold has drawn (62,500 cells of 2,400 genes: 1.2 GB), or their
vectors; for each fold computed at a time 0.4 GB of features; 8 bytes a cell and class of what is predicted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit
from threadpoolctl import threadpool_limits

from cellformers.errors import UserError
from cellformers.evaluate import baselines, rank_features
from cellformers.evaluate.classify import (
    MAX_ITERATIONS,
    PENALTIES,
    FoldPrediction,
    Inner,
    inner_folds,
    least_loss,
)
from cellformers.evaluate.rows import filled, split
from cellformers.evaluate.tables import Cells, aligned_vectors, lacking, take_cells, vector_blocks
from cellformers.folds import hash_order
from cellformers.io.files import digest_arrays

FEW_CELLS = 20_000  # to train on; `classify` takes up to 80 kB for each
TRAIN_CELLS = 50_000
BLOCK = 2048  # rows whose features are float64 at a time

Array = np.ndarray[Any, Any]
Transform = Callable[[Any], Array]
"""Features of a block of cells as it is read -> float[cells, width] of a fold."""


class Source(NamedTuple):
    """Features of a method."""

    fit: Callable[[Array], tuple[Array, Transform]]
    """Numbers of some of the drawn cells -> their features, and the same features of any block."""
    blocks: Iterator[tuple[str, Path, Array, Any]]
    """All cells of the files in turn: dataset, a file to name in errors, names, and what `Transform` takes."""
    digest: str
    """Of the features of the drawn cells."""
    notes: Sequence[str] = ()


def drawn(names: Array, folds: Sequence[tuple[Array, Array]], *, seed: int) -> list[Array] | None:
    """The rows to train each fold on, ascending, TRAIN_CELLS at most; None where there are few cells in all."""
    if max(len(train) for train, _ in folds) <= FEW_CELLS and len(names) <= TRAIN_CELLS:
        return None
    place = np.empty(len(names), np.int64)
    place[hash_order(names, seed=seed, salt="train")] = np.arange(len(names))
    return [np.sort(train[np.argsort(place[train])[:TRAIN_CELLS]]) for train, _ in folds]


def predict_drawn(
    features: str, inputs: Mapping[str, Sequence[Path]], cells: Cells, *, y: Array, units: Array | None,
    folds: Sequence[tuple[Array, Array]], chosen: Sequence[Array], n_classes: int, vocabulary: Path | None,
    seed: int, threads: int,
) -> tuple[list[FoldPrediction], str, list[str]]:  # fmt: skip
    """Train on the chosen rows of each fold and predict its test rows.

    Parameters
    ----------
    features
        embedding, pca_hvg, log_counts or rank_only.
    chosen
        What `drawn` gives; the others are as in `classify.predict_folds`.

    Returns
    -------
    Predictions of each fold, the digest of the features of the drawn cells, what has to be said.
    """
    used = np.unique(np.concatenate(chosen))
    source = _source(features, inputs, cells, used, vocabulary=vocabulary, seed=seed)
    names = cells.keys()

    def fit(rows: Array) -> tuple["Linear", Transform]:
        X, transform = source.fit(np.searchsorted(used, rows))
        inner = inner_folds(names[rows], y[rows], None if units is None else units[rows], seed=seed)
        return fit_logistic(X, y[rows], inner, n_classes=n_classes), transform

    with threadpool_limits(1), ThreadPoolExecutor(max(1, min(threads, len(folds)))) as pool:
        fitted = list(pool.map(fit, chosen))
        results = _predicted(source, cells, folds, fitted, n_classes=n_classes)
    predictions = [
        FoldPrediction(p, model.penalty, model.converged)
        for p, (model, _) in zip(results, fitted, strict=True)
    ]
    return predictions, source.digest, [*source.notes, *_said(chosen, folds)]


def _predicted(
    source: Source, cells: Cells, folds: Sequence[tuple[Array, Array]], fitted: Sequence[tuple["Linear", Transform]],
    *, n_classes: int,
) -> list[Array]:  # fmt: skip
    """Probabilities of the test cells of each fold, float64[test rows, n_classes], in one pass over the files."""
    fold_of, place = np.full(len(cells), -1), np.zeros(len(cells), np.int64)  # a cell is tested once at most
    for number, (_, test) in enumerate(folds):
        fold_of[test], place[test] = number, np.arange(len(test))
    results = [np.zeros((len(test), n_classes)) for _, test in folds]
    for rows, block in _located(cells, source.blocks):
        fold = np.where(rows >= 0, fold_of[rows], -1)
        for number, (model, transform) in enumerate(fitted):
            for part in split(np.flatnonzero(fold == number), BLOCK):
                results[number][place[rows[part]]] = model.probability(transform(block[part]), n_classes)
    return results


def _said(chosen: Sequence[Array], folds: Sequence[tuple[Array, Array]]) -> list[str]:
    """What the score has to say of the cells that were drawn, if any were."""
    sizes = [(len(rows), len(train)) for rows, (train, _) in zip(chosen, folds, strict=True)]
    if all(a == b for a, b in sizes):
        return []
    trained, there = (", ".join(f"{n:,}" for n in sorted(set(which))) for which in zip(*sizes, strict=True))
    return [f"trained on {trained} of the {there} training cells of a fold, drawn by their names"]


# --- where features come from -------------------------------------------------------------------------------------


FILES = {"embedding": "embedding files", "rank_only": "tokens"}


def _source(
    features: str, inputs: Mapping[str, Sequence[Path]], cells: Cells, used: Array, *, vocabulary: Path | None,
    seed: int,
) -> Source:  # fmt: skip
    """The features of a method; those of the cells `used` are in memory."""
    datasets = list(dict.fromkeys(cells.dataset))
    for dataset in datasets:
        if not inputs.get(dataset):
            raise UserError(f"no {FILES.get(features, 'counts shards')} given for dataset {dataset!r}")
    files = [(dataset, [Path(path) for path in inputs[dataset]]) for dataset in datasets]
    some = take_cells(cells, used)
    if features == "embedding":
        vectors = aligned_vectors(some, inputs)
        return Source(
            lambda rows: (vectors[rows], lambda block: block),
            _vectors(files, vectors.shape[1]),
            digest_arrays(vectors),
        )
    if features == "rank_only":
        ranks = rank_features.aligned_ranks(some, inputs, vocabulary=vocabulary)

        def fit_ranks(rows: Array) -> tuple[Array, Transform]:
            genes = rank_features.highest_ranks(ranks, rows)
            parts = (ranks[part][:, genes].toarray() for part in split(rows))
            return filled(parts, len(rows)), lambda block: block[:, genes].toarray()

        read = ((d, p[0], n, x) for d, p in files for n, x in rank_features.rank_blocks(p, vocabulary))
        digest = digest_arrays(ranks.indptr.astype(np.int64), ranks.indices.astype(np.int32), ranks.data)
        return Source(fit_ranks, read, digest)
    counts = baselines.aligned_counts(some, inputs, vocabulary=vocabulary, others=datasets)

    def fit_counts(rows: Array) -> tuple[Array, Transform]:
        if features == "pca_hvg":
            genes, transform = baselines.fit_pca_hvg(counts, rows, seed=seed)
        else:
            genes, transform = baselines.fit_log_counts(counts, rows), lambda logs: logs.toarray()
        names = counts.genes[genes].astype(str)
        parts = (transform(counts[part].log(genes)) for part in split(rows))
        return (
            filled(parts, len(rows)),
            lambda block: transform(block.log(np.searchsorted(block.genes.astype(str), names))),
        )

    notes = [f"{len(counts.genes)} genes in common"] if len(datasets) > 1 else []
    read = ((d, p[0], n, x) for d, p in files for n, x in baselines.count_blocks(p, vocabulary=vocabulary))
    return Source(fit_counts, read, counts.digest(), notes)


def _vectors(
    files: Sequence[tuple[str, Sequence[Path]]], width: int
) -> Iterator[tuple[str, Path, Array, Array]]:
    """Vectors of all cells, of this width."""
    for dataset, path in ((dataset, path) for dataset, paths in files for path in paths):
        for names, values in vector_blocks([path]):
            if values.shape[1] != width:
                raise UserError(
                    f"has {values.shape[1]} dimensions, the training cells have {width}",
                    path=path,
                    fix="embed all datasets with one model",
                )
            yield dataset, path, names, values.astype(np.float32, copy=False)


def _located(cells: Cells, blocks: Iterator[tuple[str, Path, Array, Any]]) -> Iterator[tuple[Array, Any]]:
    """Features with the rows of the cells in the benchmark, -1 where they aren't in it.

    Raises
    ------
    UserError
        If the files hold a cell of the benchmark twice, or at their end lack one.
    """
    known: dict[str, tuple[Array, pd.Index]] = {}
    for dataset in dict.fromkeys(cells.dataset):
        own = np.flatnonzero(cells.dataset == dataset)
        known[dataset] = own, pd.Index(cells.cell_id[own])
    seen = np.zeros(len(cells), bool)
    paths: dict[str, Path] = {}
    for dataset, path, names, block in blocks:
        paths.setdefault(dataset, path)
        own, index = known[dataset]
        found = index.get_indexer(pd.Index(names))
        rows = np.where(found >= 0, own[found], -1)
        mine = rows[rows >= 0]
        again = mine[seen[mine] | pd.Index(mine).duplicated()]
        if len(again):
            raise UserError(
                f"cell {cells.cell_id[again[0]]!r} is there twice", path=path, fix="give each file once"
            )
        seen[mine] = True
        yield rows, block
    for dataset, (own, _) in known.items():
        if not seen[own].all():
            missing = cells.cell_id[own[~seen[own]]]
            raise lacking(missing, len(own), what="cells", path=paths.get(dataset))


# --- logistic regression in blocks --------------------------------------------------------------------------------


class Linear(NamedTuple):
    """A fitted classifier of features as they are: weights float64[K or 1, width], intercepts, its classes."""

    weights: Array
    intercepts: Array
    classes: Array
    penalty: float
    converged: bool

    def probability(self, X: Array, n_classes: int) -> Array:
        """float64[rows, n_classes]; 0 for classes that were not in training."""
        scores = np.asarray(X, np.float64) @ self.weights.T + self.intercepts
        result = np.zeros((len(X), n_classes))
        if len(self.intercepts) == 1:
            up = expit(scores)
            result[:, self.classes] = np.concatenate([1 - up, up], axis=1)
        else:
            odds = np.exp(scores - scores.max(axis=1, keepdims=True))
            result[:, self.classes] = odds / odds.sum(axis=1, keepdims=True)
        return result


def fit_logistic(X: Array, y: Array, inner: Inner, *, n_classes: int) -> Linear:
    """What `classify` fits, without copies of the features.

    Parameters
    ----------
    X
        float32[rows, width].
    y
        int64[rows], class numbers.
    inner
        Rows (train, validation) to choose the penalty by.
    """
    penalty = PENALTIES[len(PENALTIES) // 2]
    if inner:
        fits = [(partial(_fit, X, y, a, tolerance=1e-3), b) for a, b in inner]
        starts: list[Array | None] = [None] * len(fits)

        def loss(strength: float) -> float:
            total = 0.0
            for number, (fit, outside) in enumerate(fits):
                model, starts[number] = fit(strength, start=starts[number])
                true = np.concatenate(
                    [
                        model.probability(X[part], n_classes)[np.arange(len(part)), y[part]]
                        for part in np.split(outside, range(BLOCK, len(outside), BLOCK))
                    ]
                )
                total -= float(np.log(np.maximum(true, 1e-6)).mean())
            return total

        penalty = least_loss(loss)
    return _fit(X, y, np.arange(len(y)), penalty, tolerance=1e-4)[0]


def _fit(
    X: Array, y: Array, rows: Array, penalty: float, *, tolerance: float, start: Array | None = None
) -> tuple[Linear, Array]:
    """The classifier of some rows, and where to start from for the next penalty."""
    classes, target = np.unique(y[rows], return_inverse=True)
    outputs = 1 if len(classes) == 2 else len(classes)
    mean, inverse = _moments(X, rows)
    if start is None:
        start = np.zeros(outputs * (X.shape[1] + 1))
    found = minimize(
        _loss, start, args=(X, rows, target, mean, inverse, penalty), jac=True, method="L-BFGS-B",
        options={"maxiter": MAX_ITERATIONS, "maxls": 50, "gtol": tolerance, "ftol": 64 * np.finfo(float).eps},
    )  # fmt: skip
    table = found.x.reshape(outputs, -1)
    weights = table[:, :-1] * inverse
    intercepts = table[:, -1] - weights @ mean
    return Linear(weights, intercepts, classes, penalty, bool(found.nit < MAX_ITERATIONS)), found.x


def _moments(X: Array, rows: Array) -> tuple[Array, Array]:
    """Mean and 1 / standard deviation of each feature over some rows; 0 for constant ones."""
    parts = np.split(rows, range(BLOCK, len(rows), BLOCK))
    mean = sum(X[part].sum(axis=0, dtype=np.float64) for part in parts) / len(rows)
    squares = sum(((X[part] - mean) ** 2).sum(axis=0) for part in parts)
    deviation = np.sqrt(squares / len(rows))
    constant = deviation <= 1e-12 * np.maximum(np.abs(mean), 1)
    return np.asarray(mean), np.where(constant, 0.0, 1 / np.where(constant, 1, deviation))


def _loss(
    w: Array, X: Array, rows: Array, target: Array, mean: Array, inverse: Array, penalty: float
) -> tuple[float, Array]:
    """Mean log loss + penalty / 2 × |weights of standardised features|², and its gradient."""
    table = w.reshape(-1, X.shape[1] + 1)
    weights = table[:, :-1] * inverse
    intercepts = table[:, -1] - weights @ mean
    total, slope, sums = 0.0, np.zeros(weights.shape), np.zeros(len(weights))
    for start in range(0, len(rows), BLOCK):
        x = X[rows[start : start + BLOCK]].astype(np.float64)
        truth = target[start : start + BLOCK]
        scores = x @ weights.T + intercepts
        each = np.arange(len(truth))
        if len(weights) == 1:
            total += float((np.logaddexp(0, scores[:, 0]) - truth * scores[:, 0]).sum())
            error = expit(scores) - truth[:, None]
        else:
            top = scores.max(axis=1, keepdims=True)
            error = np.exp(scores - top)
            size = error.sum(axis=1, keepdims=True)
            total += float((np.log(size) + top).sum() - scores[each, truth].sum())
            error /= size
            error[each, truth] -= 1
        slope += error.T @ x
        sums += error.sum(axis=0)
    slope = (slope - sums[:, None] * mean) * inverse / len(rows) + penalty * table[:, :-1]
    value = total / len(rows) + penalty / 2 * float((table[:, :-1] ** 2).sum())
    return value, np.concatenate([slope, sums[:, None] / len(rows)], axis=1).ravel()
