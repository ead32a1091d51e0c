"""The classifiers: logistic regression, which every method shares, and two of published baselines.

Logistic regression is multinomial, on features standardised on the training fold; its penalty is chosen among
`PENALTIES` by the log loss on inner folds of the training data, which hold out whole units where the outer split does.
`svm` (radial kernel) and `forest` tell two classes apart, weighted so that both count the same, and are tuned by the
AUC on the same inner folds. Solver, precision (float64), seed and number of BLAS threads (one) are fixed, so a score
doesn't depend on the threads it was given; folds run in parallel.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from cellformers import metrics
from cellformers.errors import UserError
from cellformers.folds import group_folds, stratified_folds

Classifier = Literal["logistic", "svm", "forest"]

PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)  # L2 penalty relative to the mean loss: C = 1 / (penalty × rows)
INNER_FOLDS = 3
MAX_ITERATIONS = 1000
SVM_COSTS = (0.1, 1.0, 10.0, 100.0)
SVM_ROWS = 10_000  # the kernel of more would not fit into the memory of a laptop
FOREST_DEPTHS = (2, 4, 8)
TREES = 300

Features = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(train rows, test rows) -> float64 features of both, fitted on the training rows only."""
Inner = Sequence[tuple[np.ndarray, np.ndarray]]
"""Row numbers (train, validation) within the training rows."""


class FoldPrediction(NamedTuple):
    """What one fold predicts: probability float64[test rows, classes], the penalty chosen, and if it converged.

    Of `svm` the penalty is its C and the probability the logistic function of its decision value, which orders rows
    but isn't calibrated; of `forest` the penalty is its depth and the probability the mean of its trees.
    """

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


def choose_penalty(X: np.ndarray, y: np.ndarray, folds: Inner, n_classes: int) -> float:
    """The penalty of least mean log loss over the inner folds; the strongest among equals.

    Penalties are tried from strong to weak, each fit starting where the last one ended, until the loss rises: weaker
    penalties would only fit the training data better still. A class missing from an inner training part costs every
    penalty the same.
    """
    if not folds:
        return PENALTIES[len(PENALTIES) // 2]
    parts = [(standardise(X[a], X[b]), y[a], y[b], _model(1e-3)) for a, b in folds]

    def loss(penalty: float) -> float:
        total = 0.0
        for (inside, outside), known, truth, model in parts:
            probability = _probability(_fit(model, inside, known, penalty), outside, n_classes)
            true = probability[np.arange(len(truth)), truth]
            total -= float(np.log(np.maximum(true, 1e-6)).mean())
        return total

    return least_loss(loss)


def least_loss(loss: Callable[[float], float]) -> float:
    """The penalty of least loss, tried from strong to weak until the loss rises; the strongest among equals."""
    best, least = PENALTIES[0], np.inf
    for penalty in PENALTIES:
        found = loss(penalty)
        if found > least:
            break
        if found < least:
            best, least = penalty, found
    return best


def _logistic(
    X: np.ndarray, y: np.ndarray, X_test: np.ndarray, inner: Inner, *, n_classes: int
) -> FoldPrediction:
    penalty = choose_penalty(X, y, inner, n_classes)
    X, X_test = standardise(X, X_test)
    model = _fit(_model(1e-4), X, y, penalty)
    converged = bool(np.max(model.n_iter_) < MAX_ITERATIONS)
    return FoldPrediction(_probability(model, X_test, n_classes), penalty, converged)


def _tuned(settings: Sequence[float], score: Callable[[float, np.ndarray, np.ndarray], np.ndarray],
           y: np.ndarray, inner: Inner) -> float:  # fmt: skip
    """The setting of highest mean AUC over inner folds, the first (simplest) among equals.

    `score(setting, train rows, validation rows)` gives float64[validation rows], higher for class 1.
    """
    whole = [(a, b) for a, b in inner if len(set(y[b])) == 2]
    if not whole:
        return settings[len(settings) // 2]
    means = [
        np.mean([float(metrics.auc(y[b] == 1, score(setting, a, b))) for a, b in whole])
        for setting in settings
    ]
    return settings[int(np.argmax(np.round(means, 9)))]


def _svm(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, inner: Inner) -> FoldPrediction:
    """Radial kernel exp(-|x - z|² / features) of standardised features, computed once for all settings."""
    X, X_test = standardise(X, X_test)
    kernel, kernel_test = _radial(X, X), _radial(X_test, X)

    def fitted(cost: float, rows: np.ndarray) -> SVC:
        model = SVC(C=cost, kernel="precomputed", class_weight="balanced", cache_size=500)
        return model.fit(kernel[np.ix_(rows, rows)], y[rows])

    cost = _tuned(SVM_COSTS, lambda c, a, b: fitted(c, a).decision_function(kernel[np.ix_(b, a)]), y, inner)
    up = 1 / (1 + np.exp(-fitted(cost, np.arange(len(y))).decision_function(kernel_test)))
    return FoldPrediction(np.stack([1 - up, up], axis=1), cost, True)


def _radial(X: np.ndarray, Z: np.ndarray) -> np.ndarray:
    squares = (X**2).sum(axis=1)[:, None] + (Z**2).sum(axis=1) - 2 * X @ Z.T
    return np.asarray(np.exp(-np.maximum(squares, 0) / X.shape[1]))


def _forest(X: np.ndarray, y: np.ndarray, X_test: np.ndarray, inner: Inner, *, seed: int) -> FoldPrediction:
    X = X.astype(np.float32)  # the precision of its trees

    def fitted(depth: float, rows: np.ndarray) -> RandomForestClassifier:
        model = RandomForestClassifier(
            TREES, max_depth=int(depth), class_weight="balanced", random_state=seed, n_jobs=1
        )
        return model.fit(X[rows], y[rows])

    depth = _tuned(FOREST_DEPTHS, lambda d, a, b: fitted(d, a).predict_proba(X[b])[:, 1], y, inner)
    return FoldPrediction(
        fitted(depth, np.arange(len(y))).predict_proba(X_test.astype(np.float32)), depth, True
    )


def _predict_fold(
    features: Features,
    y: np.ndarray,
    names: np.ndarray,
    units: np.ndarray | None,
    train: np.ndarray,
    test: np.ndarray,
    *,
    classify: Callable[..., FoldPrediction],
    seed: int,
) -> FoldPrediction:
    X, X_test = features(train, test)
    inner = inner_folds(names[train], y[train], None if units is None else units[train], seed=seed)
    return classify(X, y[train], X_test, inner)


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
    classifier: Classifier = "logistic",
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
    classifier
        `svm` and `forest` are for two classes.

    Raises
    ------
    UserError
        If there are too many rows for the kernel of `svm`.
    """
    rows = max(len(train) for train, _ in folds)
    if classifier == "svm" and rows > SVM_ROWS:
        raise UserError(f"{rows:,} training rows are too many for svm", fix="take logistic or forest")
    kinds: dict[str, Callable[..., FoldPrediction]] = {
        "logistic": partial(_logistic, n_classes=n_classes),
        "svm": _svm,
        "forest": partial(_forest, seed=seed),
    }
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says it, and the score notes it
        with ThreadPoolExecutor(max(1, min(threads, len(folds)))) as pool:
            jobs = [
                pool.submit(
                    _predict_fold,
                    features,
                    y,
                    names,
                    units,
                    train,
                    test,
                    classify=kinds[classifier],
                    seed=seed,
                )
                for train, test in folds
            ]
            return [job.result() for job in jobs]
