"""Which cells make up a step."""

import numpy as np
import pytest

from cellformers.errors import UserError
from cellformers.training import order
from cellformers.training.corpus import TokenStore

LENGTHS = np.random.default_rng(0).integers(1, 50, 200)
STORE = TokenStore(np.zeros(LENGTHS.sum(), np.uint16), np.concatenate([[0], np.cumsum(LENGTHS)]))
CELLS = np.arange(0, 200, 2, dtype=np.int32)


def epoch(number=0, *, cells=CELLS, seed=3, **batch):
    return list(order.epoch(number, cells, STORE, batch=order.Batch(**{"tokens": 64, **batch}), seed=seed))


def by_hand(cells, lengths, most):
    """Batches of successive cells, one cell at a time."""
    batches, batch = [], []
    for cell, length in zip(cells.tolist(), lengths.tolist(), strict=True):
        if batch and sum(held for _, held in batch) + length > most:
            batches.append([c for c, _ in batch])
            batch = []
        batch.append((cell, length))
    return [*batches, [c for c, _ in batch]]


@pytest.mark.parametrize("most", [1, 40, 64, 1000, 10**6])
def test_batches_are_filled_one_cell_after_the_other(most):
    lengths = np.where(np.arange(200) % 7 == 0, 0, LENGTHS)  # some without any token
    filled = [batch.tolist() for batch in order.fill(CELLS, lengths[CELLS], most)]
    assert filled == by_hand(CELLS, lengths[CELLS], most)


def test_an_epoch_is_every_cell_once_within_the_budget():
    steps = epoch()
    assert all(len(step) == 1 for step in steps)
    batches = [batch for step in steps for batch in step]
    assert np.array_equal(np.sort(np.concatenate(batches)), CELLS)
    assert max(LENGTHS[batch].sum() for batch in batches) <= 64
    assert not np.array_equal(np.concatenate(batches), np.concatenate([s[0] for s in epoch(1)]))
    assert not np.array_equal(np.concatenate(batches), np.concatenate([s[0] for s in epoch(seed=4)]))


def test_several_micro_batches_make_a_step():
    single = [batch.tolist() for step in epoch() for batch in step]
    steps = epoch(micro_batches=4)
    assert [batch.tolist() for step in steps for batch in step] == single
    assert {len(step) for step in steps[:-1]} == {4}
    assert 1 <= len(steps[-1]) <= 4


def test_a_step_of_cells_is_cut_into_micro_batches():
    steps = epoch(cells=CELLS, tokens=100)
    by_cells = list(order.epoch(0, CELLS, STORE, batch=order.Batch(100, cells=16), seed=3))
    assert [sum(map(len, step)) for step in by_cells] == [16] * 6 + [4]
    assert max(LENGTHS[batch].sum() for step in by_cells for batch in step) <= 100
    same = np.concatenate([np.concatenate(step) for step in by_cells])
    assert np.array_equal(same, np.concatenate([np.concatenate(step) for step in steps]))


@pytest.mark.parametrize("batch", [order.Batch(64), order.Batch(64, 3), order.Batch(100, cells=16)])
def test_any_step_can_be_come_back_to(batch):
    whole = order.n_steps(1, CELLS, STORE, batch=batch, seed=3)
    every = list(order.steps(CELLS, STORE, first=1, last=2 * whole + 3, batch=batch, seed=3))
    assert len(every) == 2 * whole + 3
    for first in (2, whole, whole + 1, 2 * whole + 2):
        rest = list(order.steps(CELLS, STORE, first=first, last=2 * whole + 3, batch=batch, seed=3))
        assert len(rest) == len(every) - first + 1
        for a, b in zip(rest, every[first - 1 :], strict=True):
            assert [x.tolist() for x in a] == [x.tolist() for x in b]


def test_epochs_in_steps():
    def n_steps(epochs, **batch):
        return order.n_steps(epochs, CELLS, STORE, batch=order.Batch(**{"tokens": 64, **batch}), seed=3)

    assert n_steps(2) == len(epoch()) + len(epoch(1))
    assert n_steps(1.5) == len(epoch()) + round(0.5 * len(epoch(1)))
    assert n_steps(0) == 0
    assert n_steps(3, cells=16) == 3 * 7
    assert n_steps(0.5, cells=10) == 5


def test_the_split_is_a_partition():
    train, heldout = order.split(1000, 0.1, seed=0)
    assert len(heldout) == 100
    assert np.array_equal(np.sort(np.concatenate([train, heldout])), np.arange(1000))
    assert np.array_equal(train, np.sort(train))
    assert not np.array_equal(heldout, order.split(1000, 0.1, seed=1)[1])
    assert len(order.split(100_000, 0.1, seed=0)[1]) == order.MAX_HELDOUT
    with pytest.raises(UserError, match="too few"):
        order.split(1, 0.1, seed=0)
