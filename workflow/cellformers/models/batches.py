"""Runs a network over many cells: in which precision, how many at once, what to do when memory runs out.

On the CPU every cell is a forward pass of its own, on one thread, and threads take different cells: as fast as
batches of packed cells, and no result can depend on the batch or on the number of threads. On CUDA cells are
packed up to a budget of tokens, in their order.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cellformers.errors import UserError, did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
TOKEN_BUDGET = 131_072  # tokens of a packed batch on CUDA, to begin with
MOST_CELLS = 512  # of a packed batch: beyond, TransformerEngine prepares a kernel for every number of cells

log = logging.getLogger(__name__)


class Step(Protocol):
    """Work on packed cells: tokens int64 [T] on the device, cumulative lengths int64 [n + 1] on the host."""

    def __call__(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One tensor for the batch."""


class Precision(NamedTuple):
    """How a network computes: dtype of its weights and activations, and whether matrix products are in fp8."""

    dtype: torch.dtype
    fp8: bool = False


def precision_name(name: str) -> str:
    """The full name of a precision ("bf16" is "bfloat16"); UserError for anything else."""
    full = SHORT.get(name, name)
    if full not in (*DTYPES, "fp8"):
        raise UserError(f"no dtype {name!r}", fix=did_you_mean(name, (*DTYPES, *SHORT, "fp8")))
    return full


def pick_precision(name: str) -> Precision:
    """What "float32" (fp32), "bfloat16" (bf16), "float16" (fp16) or "fp8" (bf16 with fp8 products) stand for."""
    full = precision_name(name)
    return Precision(torch.bfloat16, fp8=True) if full == "fp8" else Precision(DTYPES[full])


@contextmanager
def worker_pool(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """A pool of `threads` (default: as many as torch uses) in which each torch operation takes one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            max_workers=max(1, threads or before), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def one_by_one(
    cells: Sequence[np.ndarray], step: Step, *, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, Tensor]]:
    """`step` of every cell (int array of tokens) alone, on the CPU, in order: (1, result)."""

    def run(cell: np.ndarray) -> Tensor:
        with torch.inference_mode():
            return step(torch.from_numpy(cell.astype(np.int64)), torch.tensor([0, len(cell)]))

    return ((1, result) for result in pool.map(run, cells))


class Budget:
    """Tokens of a packed batch; halved, for good, when the device runs out of memory."""

    def __init__(self, tokens: int = TOKEN_BUDGET) -> None:
        self.tokens = tokens

    def halve(self, longest: int) -> None:
        """Halve the budget and say so; UserError where a single sequence no longer fits."""
        if self.tokens <= longest:
            raise UserError(
                f"a sequence of {longest} tokens does not fit into the memory of the device",
                fix="use a device with more memory, dtype bfloat16, or accelerator cpu",
            )
        self.tokens = max(longest, self.tokens // 2)
        log.warning("out of device memory: going on with batches of %d tokens", self.tokens)


def packed(
    cells: Sequence[np.ndarray],
    step: Step,
    *,
    device: torch.device,
    budget: Budget,
    release: Callable[[], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """`step` of as many successive cells at a time as the budget admits: (number of cells, result on the host).

    A batch is handed out when the next one is on its way, so the device computes while the host prepares tokens
    and writes results.
    """
    release = release or _release
    start = 0
    waiting: tuple[int, Callable[[], Tensor]] | None = None
    while start < len(cells):
        stop, total = start, 0
        while stop < min(len(cells), start + MOST_CELLS) and (
            stop == start or total + len(cells[stop]) <= budget.tokens
        ):
            total += len(cells[stop])
            stop += 1
        batch = cells[start:stop]
        fetch = _attempt(batch, step, device)
        if waiting is not None:
            yield waiting[0], waiting[1]()
            waiting = None
        if fetch is None:
            release()
            budget.tokens = min(budget.tokens, total)
            budget.halve(max(map(len, batch)))
            continue
        waiting = stop - start, fetch
        start = stop
    if waiting is not None:
        yield waiting[0], waiting[1]()


def _attempt(batch: Sequence[np.ndarray], step: Step, device: torch.device) -> Callable[[], Tensor] | None:
    """Start `step`: a function that waits for its result and brings it to the host, or None without enough memory.

    None rather than an exception, whose frames would keep their tensors alive.
    """
    flat = torch.from_numpy(np.concatenate(batch).astype(np.int64))
    bounds = torch.from_numpy(np.cumsum([0, *map(len, batch)], dtype=np.int64))
    try:
        with torch.inference_mode():
            if device.type != "cuda":
                result = step(flat.to(device), bounds)
                return lambda: result
            # from and to pinned memory, copies go on beside the computation
            found = step(flat.pin_memory().to(device, non_blocking=True), bounds).to("cpu", non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return None

    def fetch() -> Tensor:
        copied.synchronize()
        return found

    return fetch


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device's memory is full: torch's own, or a library's that allocates itself."""
    words = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def runner(
    device: torch.device, *, threads: int | None = None, batch_tokens: int | None = None
) -> Iterator[Callable[[Sequence[np.ndarray], Step], Iterator[tuple[int, Tensor]]]]:
    """The way to run a step over cells on this device: a function of cells and step, as `one_by_one` or `packed`."""
    if device.type == "cpu":
        with worker_pool(threads) as pool:
            yield lambda cells, step: one_by_one(cells, step, pool=pool)
    else:
        budget = Budget(batch_tokens or TOKEN_BUDGET)
        yield lambda cells, step: packed(cells, step, device=device, budget=budget)
