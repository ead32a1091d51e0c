"""Dealing names out over folds: shuffled by a hash of name and seed, so that the order of rows and files is no input.

Used by the splits and by the inner folds of the classifier.
"""

import hashlib
from collections.abc import Sequence

import numpy as np


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
