"""Dealing names out over folds: shuffled by a hash of name and seed, so that the order of rows and files is no input.

Used by the splits and by the inner folds of the classifier.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from cellformers.errors import UserError

DRAWS, MAX_DRAWS = 25, 2000  # draws of labels for whole units to choose among, and how many may be useless


def hash_order(names: Sequence[str] | np.ndarray, *, seed: int, salt: str) -> np.ndarray:
    """A shuffle of names that depends on the names and the seed only: int64[n], positions in shuffled order."""
    keys = [hashlib.blake2b(f"{seed}|{salt}|{n}".encode(), digest_size=8).digest() for n in names]
    return np.array(sorted(range(len(keys)), key=lambda i: (keys[i], str(names[i]))), dtype=np.int64)


def stratified_folds(names: np.ndarray, labels: np.ndarray, *, folds: int, seed: int) -> np.ndarray:
    """Deal every class out over the folds in shuffled order, each class going on where the last one stopped.

    Returns
    -------
    int64[n], the fold of each row; fold sizes differ by at most one, over all and within each class.
    """
    order = hash_order(names, seed=seed, salt="stratified")
    order = order[np.argsort(labels[order].astype(str), kind="stable")]
    result = np.empty(len(names), dtype=np.int64)
    result[order] = np.arange(len(names)) % folds
    return result


def group_folds(units: np.ndarray, labels: np.ndarray, *, folds: int, seed: int) -> dict[str, int]:
    """Assign whole units to folds: one each if there are few enough, else balanced in every class.

    Units go, largest first, to the fold where the sum over folds and classes of (share of the class)² grows least.
    """
    names = sorted(set(units))
    if len(names) <= folds:
        return {name: i for i, name in enumerate(names)}
    classes = sorted(set(labels))
    counts = np.zeros((len(names), len(classes)))
    np.add.at(counts, (np.searchsorted(names, units), np.searchsorted(classes, labels)), 1)
    share = counts / counts.sum(axis=0)
    shuffled = hash_order(names, seed=seed, salt="units")
    load, cells = np.zeros((folds, len(classes))), np.zeros(folds)
    result: dict[str, int] = {}
    for unit in shuffled[np.argsort(-counts.sum(axis=1)[shuffled], kind="stable")]:
        growth = load @ share[unit]
        fold = min(range(folds), key=lambda f: (round(float(growth[f]), 12), cells[f], f))
        result[names[unit]] = fold
        load[fold] += share[unit]
        cells[fold] += counts[unit].sum()
    return result


def permuted(labels: np.ndarray, names: np.ndarray, *, seed: int) -> np.ndarray:
    """Labels shuffled over rows, by names and seed alone, so that the order of the rows doesn't matter."""
    result = labels.copy()
    result[hash_order(names, seed=seed, salt="to")] = labels[hash_order(names, seed=seed, salt="from")]
    return result


def redrawn(labels: np.ndarray, units: np.ndarray, *, train: Sequence[np.ndarray], seed: int) -> np.ndarray:
    """Labels without information for whole units: each gets the label of a unit drawn at random, with replacement.

    What a donor's cells share beyond the label (its batch) stays with them. Shuffled labels would not do: the label of
    the donor that is left out is then rarer among the others, so a classifier scores below chance. Every fold keeps
    two classes to train on. With few donors a draw may by accident resemble the true labels or their opposite; of 25
    draws the one is taken whose association with the true labels (chi² over units) is the median.

    Parameters
    ----------
    labels, units
        object[n] of str; every unit has one label.
    train
        Row numbers of the training cells of each fold.

    Raises
    ------
    UserError
        If there are too few units for two classes in every fold.
    """
    names, first, of_row = np.unique(units.astype(str), return_index=True, return_inverse=True)
    classes, true = np.unique(labels[first].astype(str), return_inverse=True)
    trained = [np.unique(of_row[rows]) for rows in train]
    found: list[tuple[float, int, np.ndarray]] = []
    for number in range(MAX_DRAWS):
        drawn = true[np.random.default_rng([seed, number]).integers(0, len(names), len(names))]
        if all(len(np.unique(drawn[part])) >= 2 for part in trained):
            found.append((_chi_square(true, drawn, len(classes)), number, drawn))
        if len(found) == DRAWS:
            break
    if not found:
        raise UserError(
            f"the labels of {len(names)} units can't be drawn anew with two classes in every fold",
            fix="leave the permuted control out",
        )
    _, _, chosen = sorted(found, key=lambda draw: draw[:2])[len(found) // 2]
    return np.asarray(classes.astype(object)[chosen][of_row], dtype=object)


def _chi_square(a: np.ndarray, b: np.ndarray, n: int) -> float:
    """Association of two arrays of class numbers below n: sum of (observed - expected)² / expected."""
    table = np.bincount(a * n + b, minlength=n * n).reshape(n, n)
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / len(a)
    seen = expected > 0
    return round(float(((table - expected)[seen] ** 2 / expected[seen]).sum()), 9)
