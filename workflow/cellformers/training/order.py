"""Which cells are trained on, and in which order: held-out cells, steps, and the micro-batches of a step.

A step is either so many cells (`Batch.cells`, as published recipes count), cut into micro-batches of at most
`Batch.tokens` tokens, or so many full micro-batches (`Batch.micro_batches`). Cells are packed without padding, so
there is nothing to be gained by putting cells of one length together: each epoch has a random order of its own.
The order depends on the seed and the number of the epoch alone.
"""

from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Any, NamedTuple

import numpy as np

from cellformers.errors import UserError
from cellformers.training.corpus import TokenStore

Array = np.ndarray[Any, Any]

MAX_HELDOUT = 5_000

# Purposes of random numbers: the second key of their generators.
SPLIT, ORDER, MASK, HELDOUT_MASK, DROPOUT = range(5)


class Batch(NamedTuple):
    """What makes a step."""

    tokens: int
    """Most tokens of a micro-batch; a longer cell is one of its own."""
    micro_batches: int = 1
    """Of a step, where `cells` is None; the last step of an epoch may have fewer."""
    cells: int | None = None
    """Of a step; the last step of an epoch may have fewer."""


def split(n_cells: int, heldout_fraction: float, *, seed: int) -> tuple[Array, Array]:
    """Cells to train on and cells held out, int32, each ascending.

    Held out is the fraction, rounded, at least one cell and at most `MAX_HELDOUT`: more would make the measurement
    no surer, only slower.
    """
    order = np.random.default_rng([seed, SPLIT]).permutation(n_cells).astype(np.int32)
    n_heldout = min(max(1, round(heldout_fraction * n_cells)), MAX_HELDOUT)
    if n_heldout >= n_cells:
        raise UserError(
            f"{n_cells} cells are too few to hold out {heldout_fraction:g} of them and train on the rest",
            fix="use more cells or hold out less",
        )
    return np.sort(order[n_heldout:]), np.sort(order[:n_heldout])


def fill(cells: Array, lengths: Array, batch_tokens: int) -> Iterator[Array]:
    """Cut `cells`, of these `lengths`, into successive batches of at most `batch_tokens` tokens or of one cell."""
    bounds = np.zeros(len(cells) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    start = 0
    while start < len(cells):
        stop = int(np.searchsorted(bounds, bounds[start] + batch_tokens, side="right")) - 1
        yield cells[start : max(stop, start + 1)]
        start = max(stop, start + 1)


def epoch(number: int, cells: Array, store: TokenStore, *, batch: Batch, seed: int) -> Iterator[list[Array]]:
    """The steps of one pass over `cells`: the cells of each of their micro-batches."""
    order = np.random.default_rng([seed, ORDER, number]).permutation(cells)
    if batch.cells is None:
        filled = fill(order, store.lengths_of(order), batch.tokens)
        while step := list(islice(filled, batch.micro_batches)):
            yield step
        return
    for start in range(0, len(order), batch.cells):
        chosen = order[start : start + batch.cells]
        yield list(fill(chosen, store.lengths_of(chosen), batch.tokens))


def n_steps(epochs: float, cells: Array, store: TokenStore, *, batch: Batch, seed: int) -> int:
    """Steps of so many passes over `cells`; of a part of a pass as many as round to it."""

    def of(number: int) -> int:
        if batch.cells is not None:
            return -(-len(cells) // batch.cells)
        return sum(1 for _ in epoch(number, cells, store, batch=batch, seed=seed))

    whole = int(epochs)
    rest = epochs - whole
    return sum(map(of, range(whole))) + (round(rest * of(whole)) if rest else 0)


def steps(
    cells: Array, store: TokenStore, *, first: int, last: int, batch: Batch, seed: int
) -> Iterator[list[Array]]:
    """The steps `first` to `last`, counted from 1, of as many passes as that takes."""
    passes = (epoch(number, cells, store, batch=batch, seed=seed) for number in count())
    return islice(chain.from_iterable(passes), first - 1, last)
