"""The classifier every method shares: multinomial logistic regression with a nested choice of its penalty.

Features are standardised on the training fold. The penalty is chosen among `PENALTIES` by the log loss on inner
folds of the training data, which hold out whole units where the outer split does. Solver, precision (float64) and
number of BLAS threads (one) are fixed, so a score doesn't depend on the threads it was given; folds run in parallel.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from cellformers.folds import group_folds, stratified_folds

PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)  # L2 penalty relative to the mean loss: C = 1 / (penalty × rows)
INNER_FOLDS = 3
MAX_ITERATIONS = 1000

Features = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(train rows, test rows) -> float64 features of both, fitted on the training rows only."""


class FoldPrediction(NamedTuple):
    """What one fold predicts: probability float64[test rows, classes], the penalty chosen, and if it converged."""

    probability: np.ndarray
    penalty: float
    converged: bool


def standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centre and scale both by mean and standard deviation of `train`; constant features become 0."""
    train, test = np.asarray(train, dtype=np.float64), np.asarray(test, dtype=np.float64)
    mean, deviation = train.mean(axis=0), train.std(axis=0)
    constant = deviation <= 1e-12 * np.maximum(np.abs(mean), 1)
    scale = np.where(constant, np.inf, deviation)
    return (train - mean) / scale, (test - mean) / scale


def _model(tolerance: float) -> LogisticRegression:
    return LogisticRegression(solver="lbfgs", max_iter=MAX_ITERATIONS, tol=tolerance, warm_start=True)


def _fit(model: LogisticRegression, X: np.ndarray, y: np.ndarray, penalty: float) -> LogisticRegression:
    model.C = 1 / (penalty * len(y))
    return model.fit(X, y)


def _probability(model: LogisticRegression, X: np.ndarray, n_classes: int) -> np.ndarray:
    result = np.zeros((len(X), n_classes))
    result[:, model.classes_] = model.predict_proba(X)
    return result


def inner_folds(
    names: np.ndarray, y: np.ndarray, units: np.ndarray | None, *, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inner (train, validation) row numbers of the training data: by unit where there are two, else stratified."""
    labels = y.astype(str)
    if units is not None and len(set(units)) >= 2:
        fold_of = group_folds(units, labels, folds=INNER_FOLDS, seed=seed)
        fold = np.array([fold_of[u] for u in units])
    else:
        fold = stratified_folds(names, labels, folds=INNER_FOLDS, seed=seed + 1)
    pairs = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in np.unique(fold)]
    return [(a, b) for a, b in pairs if len(set(y[a])) >= 2]


def choose_penalty(
    X: np.ndarray, y: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]], n_classes: int
) -> float:
    """The penalty of least mean log loss over the inner folds; the strongest among equals.

    Penalties are tried from strong to weak, each fit starting where the last one ended, until the loss rises: weaker
    penalties would only fit the training data better still. A class missing from an inner training part costs every
    penalty the same.
    """
    if not folds:
        return PENALTIES[len(PENALTIES) // 2]
    parts = [(standardise(X[a], X[b]), y[a], y[b], _model(1e-3)) for a, b in folds]
    best, least = PENALTIES[0], np.inf
    for penalty in PENALTIES:
        loss = 0.0
        for (inside, outside), known, truth, model in parts:
            probability = _probability(_fit(model, inside, known, penalty), outside, n_classes)
            true = probability[np.arange(len(truth)), truth]
            loss -= float(np.log(np.maximum(true, 1e-6)).mean())
        if loss > least:
            break
        if loss < least:
            best, least = penalty, loss
    return best


def _predict_fold(
    features: Features,
    y: np.ndarray,
    names: np.ndarray,
    units: np.ndarray | None,
    train: np.ndarray,
    test: np.ndarray,
    *,
    n_classes: int,
    seed: int,
) -> FoldPrediction:
    X, X_test = features(train, test)
    inner = inner_folds(names[train], y[train], None if units is None else units[train], seed=seed)
    penalty = choose_penalty(X, y[train], inner, n_classes)
    X, X_test = standardise(X, X_test)
    model = _fit(_model(1e-4), X, y[train], penalty)
    converged = bool(np.max(model.n_iter_) < MAX_ITERATIONS)
    return FoldPrediction(_probability(model, X_test, n_classes), penalty, converged)


def predict_folds(
    features: Features,
    y: np.ndarray,
    folds: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    names: np.ndarray,
    units: np.ndarray | None,
    n_classes: int,
    seed: int,
    threads: int = 1,
) -> list[FoldPrediction]:
    """Train on each fold and predict its test rows.

    Parameters
    ----------
    features
        Gives the features of training and test rows of a fold.
    y
        int64[n], class numbers.
    folds
        Row numbers (train, test).
    names, units
        object[n] of str: what inner folds are dealt by; units that stay together, if any.
    threads
        Folds computed at a time; the result doesn't depend on it.
    """
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says it, and the score notes it
        with ThreadPoolExecutor(max(1, min(threads, len(folds)))) as pool:
            jobs = [
                pool.submit(
                    _predict_fold, features, y, names, units, train, test, n_classes=n_classes, seed=seed
                )
                for train, test in folds
            ]
            return [job.result() for job in jobs]
