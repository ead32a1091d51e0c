"""Logits of fine-tuned heads: one forward pass for training, and all cells one after the other for prediction.

with evaluator(network, threads=1) as run:
    logits = run([tokens of a cell, ...])          # float32 [rows, classes of all tasks]
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellformers.models.batches import runner
from cellformers.models.geneformer import Geneformer
from cellformers.models.heads import CellHead, GeneHead, TaskHeads

Array = np.ndarray[Any, Any]


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """What a forward pass runs in: half precision where `dtype` is, with weights in fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def head_logits(
    network: Geneformer, tokens: Tensor, bounds: Tensor, rows: Tensor | None = None
) -> tuple[Tensor, ...]:
    """fp32 logits of each task, [cells, classes], or for a gene classifier [len(rows), classes].

    `tokens` int64 [T] on the device, `bounds` int64 [cells + 1] and `rows` int64, ascending, on the host.
    """
    head = network.head
    if isinstance(head, GeneHead):
        return (head(network(tokens, bounds, rows=rows)).float(),)
    if isinstance(head, CellHead):
        return (head(network(tokens, bounds, rows=bounds[:-1])).float(),)
    assert isinstance(head, TaskHeads)
    if head.attention is not None:
        pooled = head.pool(network(tokens, bounds), bounds)
    else:
        pooled = network(tokens, bounds, rows=bounds[:-1])
    return tuple(logits.float() for logits in head(pooled).values())


@contextmanager
def evaluator(
    network: Geneformer, *, wanted: Array | None = None, dtype: torch.dtype = torch.float32,
    threads: int | None = None, batch_tokens: int | None = None, progress: Callable[[int], None] | None = None,
) -> Iterator[Callable[[Sequence[Array]], Array]]:  # fmt: skip
    """A function from cells (int arrays of tokens, none empty) to logits, float32 [rows, classes of all tasks].

    Rows are the cells, or, for a gene classifier, their tokens for which `wanted`, bool [vocab_size], is true, of
    which each cell has one at least. On the CPU every cell is computed alone, so no result depends on its neighbours.
    """
    device = network.words.weight.device
    flags = None if wanted is None else torch.from_numpy(wanted).to(device)
    training = network.training

    def step(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        rows = None if flags is None else flags[tokens].nonzero()[:, 0].cpu()
        with precision(device, dtype):  # in each thread: autocast is a thread's own
            return torch.cat(head_logits(network, tokens, cu_seqlens, rows), dim=1)

    def run(cells: Sequence[Array]) -> Array:
        parts = []
        for n, logits in compute(cells, step):
            parts.append(logits.cpu().numpy())
            if progress is not None:
                progress(n)
        return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.float32)

    network.eval()
    try:
        with runner(device, threads=threads, batch_tokens=batch_tokens) as compute:
            yield run
    finally:
        network.train(training)


def softmax(logits: Array) -> Array:
    """Probabilities, float64 [n, classes], of logits [n, classes]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponents = np.exp(shifted)
    return np.asarray(exponents / exponents.sum(axis=1, keepdims=True))
