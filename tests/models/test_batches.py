"""Precisions, how cells are packed, and what happens when memory runs out."""

import numpy as np
import pytest
import torch

from cellformers.errors import UserError
from cellformers.models import batches
from cellformers.models.batches import (
    Budget,
    Precision,
    packed,
    pick_precision,
    precision_name,
    worker_pool,
)  # fmt: skip

CELLS = [np.arange(n, dtype=np.int32) for n in (5, 3, 8, 2, 2, 7)]
CPU = torch.device("cpu")


def run(budget, most, error=torch.OutOfMemoryError, words="planted"):
    """Pack the cells for a device that takes `most` tokens at a time; returns the batches that went through."""
    taken, released = [], []

    def step(tokens, cu_seqlens):
        if len(tokens) > most:
            raise error(words)
        taken.append(cu_seqlens.diff().tolist())
        return tokens

    results = list(packed(CELLS, step, device=CPU, budget=budget, release=lambda: released.append(1)))
    flat = torch.cat([result for _, result in results])
    assert flat.tolist() == [token for cell in CELLS for token in cell.tolist()]
    return sum(n for n, _ in results), taken, len(released)


def test_batches_fill_the_budget_in_order():
    n, taken, released = run(Budget(10), most=100)
    assert (n, released) == (6, 0)
    assert taken == [[5, 3], [8, 2], [2, 7]]


def test_a_batch_has_no_more_cells_than_the_kernels_are_prepared_for(monkeypatch):
    monkeypatch.setattr(batches, "MOST_CELLS", 4)
    n, taken, _ = run(Budget(1000), most=1000)
    assert n == 6
    assert taken == [[5, 3, 8, 2], [2, 7]]


def test_a_batch_is_handed_out_when_the_next_is_on_its_way():
    events = []

    def step(tokens, cu_seqlens):
        events.append("start")
        return tokens

    for n, _ in packed(CELLS, step, device=CPU, budget=Budget(10)):
        events.append(n)
    assert events == ["start", "start", 2, "start", 2, 2]
    assert list(packed([], step, device=CPU, budget=Budget(10))) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError, "planted"),
        (RuntimeError, "CUDA error: out of memory"),
        (RuntimeError, "cuBLAS Error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ],
)
def test_out_of_memory_halves_the_budget_says_so_and_goes_on(caplog, error, words):
    budget = Budget(1000)
    n, taken, released = run(budget, 10, error, words)
    assert n == 6
    assert [length for batch in taken for length in batch] == [5, 3, 8, 2, 2, 7]
    assert released == 2  # 27 tokens, 13, then 6: raised to the longest cell, 8
    assert budget.tokens == 8
    assert "out of device memory" in caplog.text


def test_memory_that_runs_out_later_on_loses_no_batch():
    left = [3]

    def step(tokens, cu_seqlens):
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("planted")
        return tokens

    results = packed(CELLS, step, device=CPU, budget=Budget(10), release=lambda: None)
    flat = torch.cat([result for _, result in results])
    assert flat.tolist() == [token for cell in CELLS for token in cell.tolist()]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="illegal"):
        run(Budget(10), 1, RuntimeError, "an illegal memory access was encountered")


def test_a_cell_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match="8 tokens does not fit"):
        run(Budget(), most=7)


def test_precisions():
    assert pick_precision("bf16") == pick_precision("bfloat16") == Precision(torch.bfloat16)
    assert pick_precision("fp16").dtype is torch.float16
    assert pick_precision("fp8") == Precision(torch.bfloat16, fp8=True)
    assert not pick_precision("float32").fp8
    assert (precision_name("fp32"), precision_name("fp8")) == ("float32", "fp8")
    with pytest.raises(UserError, match="float64"):
        pick_precision("float64")


def test_workers_compute_on_one_thread_each_and_the_setting_comes_back():
    before = torch.get_num_threads()
    with worker_pool(2) as pool:
        assert list(pool.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert torch.get_num_threads() == before
