"""Token batches for masked-gene training: which cells, which positions, what stands there instead.

Everything random comes from (seed, purpose, number), never from what was drawn before, so any batch can be made
again on its own, and none depends on how the tokens were divided into files.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellformers.errors import UserError
from cellformers.tokens import read_tokens

Array = np.ndarray[Any, Any]

MAX_HELDOUT = 5_000

# Purposes of random numbers: the second key of their generators.
_SPLIT, _ORDER, _MASK, _HELDOUT_MASK = range(4)


class TokenStore(NamedTuple):
    """All cells one after the other: tokens int32 [total], offsets int64 [n_cells + 1]."""

    tokens: Array
    offsets: Array

    @property
    def lengths(self) -> Array:
        """Tokens of each cell, int64 [n_cells]."""
        return np.diff(self.offsets)

    def gather(self, cells: Array) -> tuple[Array, Array]:
        """Flat tokens int64 and cumulative lengths int64 [n + 1] of some cells, in the order given."""
        parts = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in cells]
        bounds = np.zeros(len(cells) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=bounds[1:])
        return np.concatenate(parts).astype(np.int64), bounds


def read_store(paths: Sequence[str | Path]) -> TokenStore:
    """Read token shards, in the order given; UserError where there is no cell in them."""
    flats: list[Array] = []
    lengths = [np.zeros(1, dtype=np.int64)]
    for batch in read_tokens(paths):
        flats.append(batch.tokens)
        lengths.append(np.diff(batch.offsets))
    if not sum(map(len, flats)):
        raise UserError("no cells to train on", path=paths[0] if paths else None, fix="tokenize some first")
    return TokenStore(np.concatenate(flats), np.cumsum(np.concatenate(lengths)))


def split(n_cells: int, heldout_fraction: float, *, seed: int) -> tuple[Array, Array]:
    """Cells to train on and cells held out, each ascending.

    Held out is the fraction, rounded, at least one cell and at most `MAX_HELDOUT`: more would make the measurement
    no surer, only slower.
    """
    order = np.random.default_rng([seed, _SPLIT]).permutation(n_cells)
    n_heldout = min(max(1, round(heldout_fraction * n_cells)), MAX_HELDOUT)
    if n_heldout >= n_cells:
        raise UserError(
            f"{n_cells} cells are too few to hold out {heldout_fraction:g} of them and train on the rest",
            fix="use more cells or hold out less",
        )
    return np.sort(order[n_heldout:]), np.sort(order[:n_heldout])


def fill(cells: Array, lengths: Array, batch_tokens: int) -> Iterator[Array]:
    """Cut `cells` into successive batches of at most `batch_tokens` tokens, and of one cell at least."""
    start, total = 0, 0
    for position, length in enumerate(lengths[cells].tolist()):
        if position > start and total + length > batch_tokens:
            yield cells[start:position]
            start, total = position, 0
        total += length
    if start < len(cells):
        yield cells[start:]


def epoch(number: int, cells: Array, lengths: Array, *, batch_tokens: int, seed: int) -> list[Array]:
    """Batches of one pass over `cells` in a random order of its own."""
    order = np.random.default_rng([seed, _ORDER, number]).permutation(cells)
    return list(fill(order, lengths, batch_tokens))


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
    number: int,
    heldout: bool = False,
) -> Masked:
    """Choose positions with `probability` each: 80 % become <mask>, 10 % a random gene, 10 % stay (BERT's rule).

    Special tokens are never chosen and never put in. `genes` holds the tokens that are genes; `number` is that
    of the batch. A batch with genes has at least one position chosen.
    """
    rng = np.random.default_rng([seed, _HELDOUT_MASK if heldout else _MASK, number])
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


def log_frequencies(tokens: Array, genes: Array, *, smoothing: float = 1.0) -> Array:
    """log p of each of `genes` among `tokens`, float64 [n_genes], with additive smoothing; others don't count."""
    counts = np.bincount(tokens, minlength=int(genes.max()) + 1)[genes] + smoothing
    return np.asarray(np.log(counts / counts.sum()))


def cross_entropy(tokens: Array, genes: Array, log_p: Array) -> float:
    """Nats per token of those `tokens` that are among `genes`, under their log-probabilities.

    With the frequencies of the cells trained on, and held-out tokens, this is the loss of a model that knows how
    frequent each gene is and nothing else.
    """
    counts = np.bincount(tokens, minlength=int(genes.max()) + 1)[genes]
    return float(-(counts * log_p).sum() / counts.sum())
