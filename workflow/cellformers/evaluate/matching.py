"""Pairs of genes of two classes that are alike in expression: the control for what expression alone tells.

    pairs = match_pairs(features, positive, names, seed=0)
    features[pairs[:, 0]], features[pairs[:, 1]]       # positives, and the negatives matched to them

Used by `cellformers split --task genes --match expression`. Genes are compared by their percentile ranks among all
labelled genes, so that lowly expressed genes are told apart as finely as highly expressed ones.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from scipy.spatial import KDTree
from scipy.stats import rankdata

from cellformers import metrics
from cellformers.folds import hash_order

CALIPER = 0.05  # most distance within a pair, of percentile ranks (0 to 1)


def match_pairs(
    features: np.ndarray, positive: np.ndarray, names: np.ndarray, *, seed: int, caliper: float = CALIPER
) -> np.ndarray:
    """Match the genes of the smaller class one to one to genes of the larger, without replacement.

    As many genes as possible find a partner, and of all such matchings the one of least total distance is taken
    (minimum-weight bipartite matching; Rosenbaum 1989). The distance is that of the percentile ranks, Euclidean.

    Parameters
    ----------
    features
        float64[n, k], what the classes shall not differ in.
    positive
        bool[n].
    names
        object[n] of str: with the seed they decide between matchings that are equally good, not the order of rows.
    caliper
        Genes farther apart than this are no pair.

    Returns
    -------
    int64[pairs, 2]: rows of the positive and of the negative gene of each pair, ascending.
    """
    place = rankdata(features, axis=0) / len(features)
    order = hash_order(names, seed=seed, salt="match")
    sides = [order[positive[order]], order[~positive[order]]]
    swapped = len(sides[0]) > len(sides[1])
    few, many = sides[::-1] if swapped else sides
    near = KDTree(place[few]).sparse_distance_matrix(KDTree(place[many]), caliper, output_type="coo_matrix")
    # a stand-in for each gene makes a full matching possible; it costs more than all pairs together could
    alone = sp.diags(np.full(len(few), caliper * (len(few) + 1)))
    weights = sp.coo_matrix((np.maximum(near.data, 1e-12), (near.row, near.col)), shape=near.shape)
    rows, columns = min_weight_full_bipartite_matching(sp.hstack([weights, alone]).tocsr())
    paired = columns < len(many)
    pairs = np.stack([few[rows[paired]], many[columns[paired]]], axis=1)
    pairs = pairs[:, ::-1] if swapped else pairs
    return np.asarray(pairs[np.argsort(pairs[:, 0])], dtype=np.int64)


def _difference(values: np.ndarray, positive: np.ndarray) -> float:
    """Standardised mean difference: that of the means over the root of the mean of the variances (0 if constant)."""
    a, b = values[positive], values[~positive]
    spread = np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    return float((a.mean() - b.mean()) / spread) if spread > 0 else 0.0


def balance(
    features: Mapping[str, np.ndarray], positive: np.ndarray, pairs: np.ndarray
) -> dict[str, dict[str, Any]]:
    """How far the classes differ in each feature before and after: standardised mean difference and AUC of it.

    Matched classes have differences near 0 and AUCs near 0.5.
    """
    kept = pairs.ravel()
    result = {}
    for name, values in features.items():
        result[name] = {
            f"{what}_{when}": round(value, 4)
            for when, rows in (("before", np.arange(len(values))), ("after", kept))
            for what, value in (
                ("difference", _difference(values[rows], positive[rows])),
                ("auc", float(metrics.auc(positive[rows], values[rows]))),
            )
        }
    return result
