"""Devices, and what happens when memory runs out."""

import numpy as np
import pytest
import torch

from cellformers.errors import UserError
from cellformers.models.batches import Budget, packed, pick_device, pick_dtype, worker_pool

CELLS = [np.arange(n, dtype=np.int32) for n in (5, 3, 8, 2, 2, 7)]


def run(budget, most):
    """Pack the cells for a device that takes `most` tokens at a time; returns the batches that went through."""
    taken, released = [], []

    def step(tokens, cu_seqlens):
        if len(tokens) > most:
            raise torch.OutOfMemoryError("planted")
        taken.append(cu_seqlens.diff().tolist())
        return tokens

    results = packed(
        CELLS, step, device=torch.device("cpu"), budget=budget, release=lambda: released.append(1)
    )
    return sum(n for n, _ in results), taken, len(released)


def test_batches_fill_the_budget_in_order():
    n, taken, released = run(Budget(10), most=100)
    assert (n, released) == (6, 0)
    assert taken == [[5, 3], [8, 2], [2, 7]]


def test_out_of_memory_halves_the_budget_says_so_and_goes_on(caplog):
    budget = Budget(1000)
    n, taken, released = run(budget, most=10)
    assert n == 6
    assert [length for batch in taken for length in batch] == [5, 3, 8, 2, 2, 7]
    assert released == 2  # 27 tokens, 13, then 6: raised to the longest cell, 8
    assert budget.tokens == 8
    assert "out of device memory" in caplog.text


def test_a_cell_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="8 tokens does not fit"):
        run(Budget(), most=7)


def test_devices_and_dtypes():
    assert pick_device("cpu").type == "cpu"
    assert pick_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(UserError, match="give cpu or cuda"):
        pick_device("cud")
    with pytest.raises(UserError, match="float64"):
        pick_dtype("float64")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            pick_device("cuda")


def test_workers_compute_on_one_thread_each_and_the_setting_comes_back():
    before = torch.get_num_threads()
    with worker_pool(2) as pool:
        assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert torch.get_num_threads() == before
