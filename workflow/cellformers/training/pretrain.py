"""Masked-gene pretraining: tokens in, a model directory with weights, vocabulary and loss curve out.

    pretrain(["tokens/0.parquet"], "vocabulary", "models/own", steps=400)

The objective is BERT's (Devlin et al. 2019) on packed cells: 15 % of the genes of a cell are hidden or swapped
and guessed from the rest; logits are computed at those positions alone. On the CPU the same input, seed and
number of threads give the same weights to the bit.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import atomic_dir, digest_arrays, stamp, write_json, write_text
from cellformers.models import checkpoints, layouts
from cellformers.models.batches import pick_device
from cellformers.models.bert_config import Config
from cellformers.models.directory import VOCABULARY
from cellformers.models.geneformer import Geneformer
from cellformers.models.heads import MaskedHead
from cellformers.revisions import REVISIONS
from cellformers.tokens import check_vocabulary
from cellformers.training import masking
from cellformers.training.masking import Array, Masked, TokenStore
from cellformers.vocabulary import Vocabulary

SCHEDULES = ("cosine", "linear")
BETAS = (
    0.9,
    0.98,
)  # the second as RoBERTa (Liu et al. 2019): learns faster in a few hundred steps than 0.999
LOG_EVERY = 10  # steps between lines of loss.tsv
MEASUREMENTS = 5  # times the held-out loss is measured, evenly, the last after the last step


def rate_at(step: int, *, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Rate of optimiser step `step` (from 1): linear warm-up to `peak`, then down to 0 behind the last step."""
    if step <= warmup:
        return peak * step / warmup
    done = (step - 1 - warmup) / max(1, steps - warmup)
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done)


def masked_loss(model: Geneformer, batch: Masked, bounds: Array) -> Tensor:
    """Mean cross-entropy, in nats, of the genes at the chosen positions."""
    device = model.words.weight.device
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
        betas=BETAS, eps=1e-8, fused=True,
    )  # fmt: skip


class _Data:
    """Cells to train on and held-out cells, as masked batches; the batches of any step can be made again."""

    def __init__(
        self, store: TokenStore, vocabulary: Vocabulary, *, batch_tokens: int, probability: float,
        heldout_fraction: float, seed: int,
    ) -> None:  # fmt: skip
        self.store, self.batch_tokens, self.seed = store, batch_tokens, seed
        self.train, self.heldout = masking.split(len(store.lengths), heldout_fraction, seed=seed)
        self.genes = vocabulary.token_ids
        self.special = vocabulary.special_tokens
        self.probability = probability

    def epoch(self, number: int) -> list[Array]:
        """Cells of each batch of one pass."""
        return masking.epoch(
            number, self.train, self.store.lengths, batch_tokens=self.batch_tokens, seed=self.seed
        )

    def batch(self, cells: Array, number: int, *, heldout: bool = False) -> tuple[Masked, Array]:
        """The masked tokens of some cells and their cumulative lengths."""
        tokens, bounds = self.store.gather(cells)
        masked = masking.mask(
            tokens, genes=self.genes, special=self.special, probability=self.probability, seed=self.seed,
            number=number, heldout=heldout,
        )  # fmt: skip
        return masked, bounds

    def heldout_loss(self, model: Geneformer) -> float:
        """Nats per masked gene of the held-out cells; their masks are the same each time."""
        total, n = 0.0, 0
        model.eval()
        with torch.inference_mode():
            for number, cells in enumerate(masking.fill(self.heldout, self.store.lengths, self.batch_tokens)):
                masked, bounds = self.batch(cells, number, heldout=True)
                total += float(masked_loss(model, masked, bounds)) * len(masked.targets)
                n += len(masked.targets)
        model.train()
        return total / n

    def log_frequencies(self) -> Array:
        """log p of every gene in the cells to train on, float64 [n_genes], with one count added to each."""
        return masking.log_frequencies(self.store.gather(self.train)[0], self.genes)

    def unigram_entropy(self) -> float:
        """Cross-entropy, nats per gene, of the held-out cells under the frequencies of the others."""
        return masking.cross_entropy(self.store.gather(self.heldout)[0], self.genes, self.log_frequencies())


def _initial(config: Config, data: _Data, *, seed: int, device: torch.device) -> Geneformer:
    """Random weights, with an output bias that already knows how frequent each gene is."""
    model = layouts.random_model(config, seed=seed)
    assert isinstance(model.head, MaskedHead)
    with torch.no_grad():
        model.head.bias.fill_(float(data.log_frequencies().min()))
        model.head.bias[torch.from_numpy(data.genes.astype(np.int64))] = torch.from_numpy(
            data.log_frequencies().astype(np.float32)
        )
    return model.to(device).train().requires_grad_(True)


def _train(
    model: Geneformer, data: _Data, *, steps: int, peak: float, warmup: float, schedule: str,
    weight_decay: float, clip: float, progress: Callable[[int], None] | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Take the steps; the rows of loss.tsv."""
    optimizer = _optimizer(model, weight_decay)
    measured = {math.ceil(steps * (i + 1) / MEASUREMENTS) for i in range(MEASUREMENTS)}
    rows: list[dict[str, Any]] = []
    losses: list[Tensor] = []
    seen, number, batches = 0, 0, iter(data.epoch(0))
    for step in range(1, steps + 1):
        cells = next(batches, None)
        if cells is None:
            number += 1
            batches = iter(data.epoch(number))
            cells = next(batches)
        rate = rate_at(step, steps=steps, peak=peak, warmup=round(warmup * steps), schedule=schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        masked, bounds = data.batch(cells, step)
        loss = masked_loss(model, masked, bounds)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        seen += len(masked.tokens)
        losses.append(loss.detach())
        if step % LOG_EVERY == 0 or step in measured:
            train_loss = float(torch.stack(losses).mean())
            if not math.isfinite(train_loss):
                raise UserError(f"the loss is {train_loss} at step {step}", fix="lower the learning rate")
            heldout = data.heldout_loss(model) if step in measured else None
            rows.append(
                {"step": step, "tokens": seen, "learning_rate": rate, "train_loss": train_loss,
                 "heldout_loss": heldout}
            )  # fmt: skip
            losses = []
        if progress is not None:
            progress(1)
    return rows


COLUMNS = ("step", "tokens", "learning_rate", "train_loss", "heldout_loss")


def _tsv(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["\t".join(COLUMNS)]
    for row in rows:
        values = [row[name] for name in COLUMNS]
        cells = ["" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in values]
        lines.append("\t".join(cells))
    return "\n".join(lines) + "\n"


def pretrain(
    tokens: Sequence[str | Path],
    vocabulary_dir: str | Path,
    output: str | Path,
    *,
    layers: int = 2,
    hidden_size: int = 128,
    heads: int = 4,
    intermediate_size: int = 256,
    max_positions: int | None = None,
    dropout: float = 0.0,
    initializer_range: float = 0.02,
    steps: int | None = None,
    epochs: int | None = None,
    batch_tokens: int = 4096,
    learning_rate: float = 2e-3,
    warmup: float = 0.1,
    schedule: str = "cosine",
    weight_decay: float = 0.01,
    clip: float = 1.0,
    mask_probability: float = 0.15,
    heldout_fraction: float = 0.1,
    seed: int = 0,
    threads: int | None = None,
    accelerator: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train a Geneformer from scratch and write its model directory.

    Parameters
    ----------
    tokens, vocabulary_dir, output
        Token shards (how the cells are divided among them makes no difference, their order does), the
        vocabulary they were made with, the model directory to write.
    layers, hidden_size, heads, intermediate_size, max_positions, dropout, initializer_range
        The architecture; positions default to the vocabulary's context length. `initializer_range` is the SD of
        the initial weights.
    steps, epochs
        Optimiser steps, or passes over the training cells: one of the two. 0 steps write the random network.
    batch_tokens
        Most tokens of a batch.
    learning_rate, warmup, schedule
        Peak rate, share of the steps over which it rises, and how it falls to 0: "cosine" or "linear".
    weight_decay, clip
        AdamW's decay of matrices; largest norm of the gradient.
    mask_probability, heldout_fraction
        Share of genes to guess; share of cells that are not trained on.
    progress
        Called with 1 after each step.

    Returns
    -------
    dict
        What training.json holds; among it heldout_loss, unigram_entropy and improvement (their difference), in
        nats per gene.

    Raises
    ------
    UserError
        If the tokens are of another vocabulary, don't fit the positions, or the settings are out of range.
    """
    _check_settings(
        steps=steps, epochs=epochs, schedule=schedule, warmup=warmup,
        mask_probability=mask_probability, heldout_fraction=heldout_fraction,
    )  # fmt: skip
    device = pick_device(accelerator)
    vocabulary = Vocabulary.load(vocabulary_dir)
    for path in tokens:
        check_vocabulary(path, vocabulary)
    config = Config.from_dict(
        {
            "model_type": "bert", "vocab_size": vocabulary.size, "hidden_size": hidden_size,
            "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": intermediate_size,
            "max_position_embeddings": max_positions or vocabulary.context_length, "hidden_act": "relu",
            "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
            "initializer_range": initializer_range, "pad_token_id": vocabulary.special_tokens["<pad>"],
        }
    )  # fmt: skip
    store = masking.read_store(tokens)
    _check_store(store, vocabulary, config)
    data = _Data(
        store, vocabulary, batch_tokens=batch_tokens, probability=mask_probability,
        heldout_fraction=heldout_fraction, seed=seed,
    )  # fmt: skip
    if steps is None:
        steps = sum(len(data.epoch(number)) for number in range(epochs or 0))
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    torch.manual_seed(seed)  # dropout is the one thing that draws from the global generator
    try:
        model = _initial(config, data, seed=seed, device=device)
        rows = _train(
            model, data, steps=steps, peak=learning_rate, warmup=warmup, schedule=schedule,
            weight_decay=weight_decay, clip=clip, progress=progress,
        )  # fmt: skip
        heldout_loss = rows[-1]["heldout_loss"] if rows else data.heldout_loss(model)
    finally:
        torch.set_num_threads(threads_before)
    unigram = data.unigram_entropy()
    hyperparameters = {
        "layers": layers, "hidden_size": hidden_size, "heads": heads, "intermediate_size": intermediate_size,
        "max_positions": config.max_position_embeddings, "dropout": dropout,
        "initializer_range": initializer_range, "steps": steps, "batch_tokens": batch_tokens,
        "learning_rate": learning_rate, "warmup": warmup, "schedule": schedule, "weight_decay": weight_decay,
        "clip": clip, "mask_probability": mask_probability, "heldout_fraction": heldout_fraction, "seed": seed,
    }  # fmt: skip
    inputs = {"tokens": digest_arrays(store.tokens, store.offsets), "vocabulary": vocabulary.digest}
    training = {
        **stamp("pretrain", REVISIONS["pretrain"], parameters=hyperparameters, inputs=inputs),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_cells": len(data.train),
        "n_heldout": len(data.heldout),
        "n_tokens": rows[-1]["tokens"] if rows else 0,
        "heldout_loss": heldout_loss,
        "unigram_entropy": unigram,
        "improvement": unigram - heldout_loss,
    }
    with atomic_dir(output) as temporary:
        checkpoints.save(model, temporary)
        shutil.copytree(vocabulary_dir, temporary / VOCABULARY)
        write_json(training, temporary / "training.json")
        write_text(_tsv(rows), temporary / "loss.tsv")
    return training


def _check_settings(
    *, steps: int | None, epochs: int | None, schedule: str, warmup: float, mask_probability: float,
    heldout_fraction: float,
) -> None:  # fmt: skip
    if (steps is None) == (epochs is None):
        raise UserError("how long to train: give either steps or epochs")
    if (steps if steps is not None else epochs or 0) < 0:
        raise UserError("steps and epochs can't be negative")
    if schedule not in SCHEDULES:
        raise UserError(f"no schedule {schedule!r}", fix=did_you_mean(schedule, SCHEDULES))
    shares = {"mask_probability": mask_probability, "heldout_fraction": heldout_fraction}
    for name, value in shares.items():
        if not 0 < value < 1:
            raise UserError(f"{name} is {value:g}, not between 0 and 1")
    if not 0 <= warmup < 1:
        raise UserError(f"warmup is {warmup:g}, not a share of the steps from 0 to under 1")


def _check_store(store: TokenStore, vocabulary: Vocabulary, config: Config) -> None:
    longest = int(store.lengths.max())
    if longest > config.max_position_embeddings:
        raise UserError(
            f"a cell has {longest} tokens, the model {config.max_position_embeddings} positions",
            fix="raise max_positions, or tokenize with a shorter context",
        )
    if not 0 <= int(store.tokens.min()) <= int(store.tokens.max()) < vocabulary.size:
        raise UserError(f"a token is outside 0 to {vocabulary.size - 1}", fix="tokenize again")
