"""Masked-gene pretraining: tokens in, a model directory with weights, vocabulary and loss curve out.

    pretrain(["tokens/0.parquet"], "vocabulary", "models/own", steps=400)

The objective is BERT's (Devlin et al. 2019) on packed cells: 15 % of the genes of a cell are hidden or swapped
and guessed from the rest; logits are computed at those positions alone. On the CPU the same input, seed and
number of threads give the same weights to the bit.
"""

import csv
import io
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellformers.errors import UserError, did_you_mean
from cellformers.genes import Vocabulary
from cellformers.io.files import atomic_dir, digest_arrays, read_metadata, stamp, write_json, write_text
from cellformers.models import geneformer
from cellformers.models.batches import pick_device
from cellformers.models.bert_config import Config
from cellformers.models.directory import VOCABULARY, check_tokens
from cellformers.models.geneformer import Geneformer
from cellformers.revisions import REVISIONS
from cellformers.training import masking

SCHEDULES = ("cosine", "linear")
LOG_EVERY = 10  # steps between lines of loss.tsv
MEASUREMENTS = 10  # times the held-out loss is measured, the last after the last step


class Progress(NamedTuple):
    """What the progress callback is told after each step."""

    step: int
    steps: int
    loss: float


def learning_rate(step: int, *, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Rate of optimiser step `step` (from 1): linear warm-up to `peak`, then down to 0 behind the last step."""
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


def masked_loss(model: Geneformer, batch: masking.Masked, bounds: np.ndarray) -> Tensor:
    """Mean cross-entropy, in nats, of the genes at the chosen positions."""
    device = model.head_bias.device
    hidden = model(
        torch.from_numpy(batch.tokens).to(device),
        torch.from_numpy(bounds),
        rows=torch.from_numpy(batch.positions),
    )
    return F.cross_entropy(model.logits(hidden).float(), torch.from_numpy(batch.targets).to(device))


def _optimizer(model: Geneformer, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices, not biases or norms."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.999), eps=1e-8, fused=True,
    )  # fmt: skip


def _batches(
    train: np.ndarray, lengths: np.ndarray, *, batch_tokens: int, seed: int
) -> Iterator[np.ndarray]:
    number = 0
    while True:
        yield from masking.epoch(number, train, lengths, batch_tokens=batch_tokens, seed=seed)
        number += 1


def pretrain(
    tokens: Sequence[str | Path],
    vocabulary_dir: str | Path,
    output: str | Path,
    *,
    layers: int = 3,
    hidden_size: int = 128,
    heads: int = 4,
    intermediate_size: int = 256,
    max_positions: int | None = None,
    dropout: float = 0.0,
    steps: int | None = None,
    epochs: int | None = None,
    batch_tokens: int = 8192,
    learning_rate_peak: float = 2e-3,
    warmup: float = 0.1,
    schedule: str = "cosine",
    weight_decay: float = 0.01,
    clip: float = 1.0,
    mask_probability: float = 0.15,
    heldout_fraction: float = 0.1,
    seed: int = 0,
    threads: int | None = None,
    accelerator: str = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    raise NotImplementedError
