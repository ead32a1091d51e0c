"""Masks of masked-gene training: which positions of a batch, and what stands there instead.

Everything random comes from (seed, purpose, number), never from what was drawn before, so any batch can be made
again on its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellformers.training.order import HELDOUT_MASK, MASK

Array = np.ndarray[Any, Any]


class Masked(NamedTuple):
    """Corrupted tokens int64 [total], the positions to guess (ascending) and the tokens that were there."""

    tokens: Array
    positions: Array
    targets: Array


def mask(
    tokens: Array,
    *,
    genes: Array,
    special: Mapping[str, int],
    probability: float,
    seed: int,
    number: Sequence[int],
    heldout: bool = False,
) -> Masked:
    """Choose positions with `probability` each: 80 % become <mask>, 10 % a random gene, 10 % stay (BERT's rule).

    Special tokens are never chosen and never put in. `genes` holds the tokens that are genes; `number` is that of
    the step and, behind its first, of the micro-batch in it. A batch with genes has at least one position chosen.
    """
    rng = np.random.default_rng([seed, HELDOUT_MASK if heldout else MASK, *number])
    candidates = np.flatnonzero(~np.isin(tokens, list(special.values())))
    draw = rng.random(len(candidates))
    positions = candidates[draw < probability]
    if not len(positions) and len(candidates):
        positions = candidates[[int(draw.argmin())]]
    fate = rng.random(len(positions))
    corrupted = tokens.copy()
    corrupted[positions[fate < 0.8]] = special["<mask>"]
    swapped = positions[(fate >= 0.8) & (fate < 0.9)]
    corrupted[swapped] = rng.choice(genes, size=len(swapped))
    return Masked(corrupted, positions, tokens[positions])


def log_frequencies(counts: Array, genes: Array, *, smoothing: float = 1.0) -> Array:
    """log p of each of `genes`, float64 [n_genes], from the counts of all tokens; additive smoothing."""
    smoothed = counts[genes] + smoothing
    return np.asarray(np.log(smoothed / smoothed.sum()))


def cross_entropy(counts: Array, genes: Array, log_p: Array) -> float:
    """Nats per token, of those among `genes`, under their log-probabilities, from the counts of all tokens.

    With the frequencies of the cells trained on, and counts of held-out tokens, this is the loss of a model that
    knows how frequent each gene is and nothing else.
    """
    found = counts[genes]
    return float(-(found * log_p).sum() / found.sum())
