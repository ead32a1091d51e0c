"""What a training loop has around it: batches prepared in time, and signals that wait for the end of a step."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import torch

T = TypeVar("T")
DEPTH = 3  # batches waiting


def ahead(batches: Iterator[T], device: torch.device) -> Iterator[T]:
    """The same batches; while a GPU computes, another thread prepares the next ones. On the CPU none is to spare."""
    if device.type == "cpu":
        yield from batches
        return
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, batches, None) for _ in range(DEPTH))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(pool.submit(next, batches, None))
            yield batch


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """Within the block a first SIGTERM or SIGINT is only noted, a second one ends the process.

    Yields a function that tells the number of the signal, 0 for none, so that a step is done in full or not at all.
    """
    caught: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        if caught:
            raise SystemExit(128 + number)
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0  # only the main thread is told of signals
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
