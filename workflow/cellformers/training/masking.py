"""Token batches for masked-gene training: which cells, which positions, what stands there instead.

Everything random comes from (seed, purpose, number), never from what was drawn before, so any batch can be made
again on its own, and none depends on how the tokens were divided into files.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cellformers.embed import read_blocks
from cellformers.errors import UserError

# Purposes of random numbers: the second key of their generators.
_SPLIT, _ORDER, _MASK, _HELDOUT_MASK = range(4)


class TokenStore(NamedTuple):
    """All cells one after the other: tokens int32 [total], offsets int64 [n_cells + 1]."""

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each cell, int64 [n_cells]."""
        return np.diff(self.offsets)

    def gather(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Flat tokens int64 and cumulative lengths int64 [n + 1] of some cells, in the order given."""
        parts = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in cells]
        bounds = np.zeros(len(cells) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=bounds[1:])
        return np.concatenate(parts).astype(np.int64), bounds


def read_store(paths: Sequence[str | Path]) -> TokenStore:
    """Read token shards, in the order given; UserError where there is no cell in them."""
    flats, lengths = [], [np.zeros(1, dtype=np.int64)]
    for path in paths:
        for block in read_blocks(path):
            flats += block.cells
            lengths.append(np.array([len(cell) for cell in block.cells], dtype=np.int64))
    if not flats:
        raise UserError("no cells to train on", path=paths[0] if paths else None, fix="tokenize some first")
    return TokenStore(np.concatenate(flats), np.cumsum(np.concatenate(lengths)))


def split(n_cells: int, heldout_fraction: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells to train on and cells held out, each ascending; the latter the fraction, rounded, at least one."""
    order = np.random.default_rng([seed, _SPLIT]).permutation(n_cells)
    n_heldout = max(1, round(heldout_fraction * n_cells))
    if n_heldout >= n_cells:
        raise UserError(
            f"{n_cells} cells are too few to hold out {heldout_fraction:g} of them and train on the rest",
            fix="use more cells or hold out less",
        )
    return np.sort(order[n_heldout:]), np.sort(order[:n_heldout])


def fill(cells: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Cut `cells` into successive batches of at most `batch_tokens` tokens, and of one cell at least."""
    start, total = 0, 0
    for position, length in enumerate(lengths[cells].tolist()):
        if position > start and total + length > batch_tokens:
            yield cells[start:position]
            start, total = position, 0
        total += length
    if start < len(cells):
        yield cells[start:]


def epoch(
    number: int, cells: np.ndarray, lengths: np.ndarray, *, batch_tokens: int, seed: int
) -> list[np.ndarray]:
    """Batches of one pass over `cells` in a random order of its own."""
    order = np.random.default_rng([seed, _ORDER, number]).permutation(cells)
    return list(fill(order, lengths, batch_tokens))


class Masked(NamedTuple):
    """Corrupted tokens int64 [total], the positions to guess (ascending) and the tokens that were there."""

    tokens: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


def mask(
    tokens: np.ndarray,
    *,
    genes: np.ndarray,
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


def unigram_cross_entropy(
    train: np.ndarray, heldout: np.ndarray, *, genes: np.ndarray, smoothing: float = 1.0
) -> float:
    """Nats per token of `heldout` genes under the frequencies of genes in `train`, with additive smoothing.

    The loss of a model that knows how frequent each gene is and nothing else. Special tokens are left out.
    """
    size = int(genes.max()) + 1
    counts = np.bincount(train, minlength=size)[genes] + smoothing
    log_p = np.zeros(max(size, int(heldout.max()) + 1))
    log_p[genes] = np.log(counts / counts.sum())
    return float(-log_p[heldout[np.isin(heldout, genes)]].mean())
