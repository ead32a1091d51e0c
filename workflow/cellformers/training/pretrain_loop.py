"""The loop of masked-gene training: steps, measurements, states to go on from.

A step is computed as micro-batches, each by one of the processes that train together. Its loss is the sum over all
its masked genes divided by their number, so how it was divided changes nothing but rounding. Dropout is seeded for
each micro-batch, so it depends neither on the number of processes nor on interruptions.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellformers.errors import UserError
from cellformers.models.batches import DTYPES
from cellformers.models.geneformer import Geneformer
from cellformers.training import masking, order
from cellformers.training.ahead import ahead, stopping
from cellformers.training.corpus import Array, Corpus
from cellformers.training.curves import Curve
from cellformers.training.distributed import GradientSum, World, refuse, total
from cellformers.training.masking import Masked
from cellformers.training.optimiser import adamw, rate_at, set_rate, warmup_steps
from cellformers.training.presets import Settings
from cellformers.training.state import State, restore_optimizer, save_state
from cellformers.vocabulary import Vocabulary

COLUMNS = ("step", "tokens", "learning_rate", "train_loss", "heldout_loss")
LOG_EVERY = 10  # steps between rows of the table; of a long training a thousandth of its steps
CHECK_EVERY = 10  # steps between looks at whether the loss is still a number: each waits for the GPU
SECONDS_BETWEEN_NOTES = 60.0


class MicroBatch(NamedTuple):
    """Part of a step, or of the held-out cells."""

    number: int  # in its step
    masked: Masked
    bounds: Array


class Data:
    """Cells to train on and held-out cells, as masked batches; those of any step can be made again."""

    def __init__(self, corpus: Corpus, vocabulary: Vocabulary, settings: Settings) -> None:
        self.corpus, self.settings = corpus, settings
        self.train, self.heldout = order.split(
            len(corpus.store.offsets) - 1, settings.heldout_fraction, seed=settings.seed
        )
        self.genes = vocabulary.token_ids
        self.special = vocabulary.special_tokens
        self.batch = order.Batch(settings.batch_tokens, settings.accumulate, settings.batch_cells)
        heldout = corpus.store.gather(self.heldout)[0]
        self.heldout_counts = np.bincount(heldout, minlength=len(corpus.counts))

    def n_steps(self) -> int:
        """Optimiser steps of the settings."""
        if self.settings.steps is not None:
            return self.settings.steps
        return order.n_steps(
            self.settings.epochs or 0, self.train, self.corpus.store, batch=self.batch,
            seed=self.settings.seed,
        )  # fmt: skip

    def steps(self, first: int, last: int, world: World) -> Iterator[list[MicroBatch]]:
        """What this process has to compute of each of some steps."""
        cells = order.steps(
            self.train, self.corpus.store, first=first, last=last, batch=self.batch, seed=self.settings.seed
        )
        for step, parts in enumerate(cells, first):
            yield [
                self._masked(part, (step, number) if number else (step,), number)
                for number, part in enumerate(parts)
                if number % world.size == world.rank
            ]

    def heldout_batches(self, world: World) -> Iterator[MicroBatch]:
        """What this process has to compute of the held-out cells; their masks are the same each time."""
        lengths = self.corpus.store.lengths_of(self.heldout)
        for number, cells in enumerate(order.fill(self.heldout, lengths, self.batch.tokens)):
            if number % world.size == world.rank:
                yield self._masked(cells, (number,), number, heldout=True)

    def _masked(
        self, cells: Array, key: tuple[int, ...], number: int, *, heldout: bool = False
    ) -> MicroBatch:
        tokens, bounds = self.corpus.store.gather(cells)
        masked = masking.mask(
            tokens, genes=self.genes, special=self.special, probability=self.settings.mask_probability,
            seed=self.settings.seed, number=key, heldout=heldout,
        )  # fmt: skip
        return MicroBatch(number, masked, bounds)

    def log_frequencies(self) -> Array:
        """log p of every gene in the cells to train on, float64 [n_genes], with one count added to each."""
        return masking.log_frequencies(self.corpus.counts - self.heldout_counts, self.genes)

    def unigram_entropy(self) -> float:
        """Cross-entropy, nats per gene, of the held-out cells under the frequencies of the others."""
        return masking.cross_entropy(self.heldout_counts, self.genes, self.log_frequencies())


def _autocast(world: World, settings: Settings) -> AbstractContextManager[Any]:
    dtype = DTYPES[settings.precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast(world.device.type, dtype)


def _moved(values: Array, world: World) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(world.device, non_blocking=True) if world.device.type == "cuda" else tensor


def summed_loss(model: Geneformer, batch: MicroBatch, world: World) -> Tensor:
    """Summed cross-entropy, in nats, of the genes at the chosen positions."""
    hidden = model(
        _moved(batch.masked.tokens, world), torch.from_numpy(batch.bounds),
        rows=torch.from_numpy(batch.masked.positions),
    )  # fmt: skip
    return F.cross_entropy(model.logits(hidden).float(), _moved(batch.masked.targets, world), reduction="sum")


def heldout_loss(model: Geneformer, data: Data, world: World) -> float:
    """Nats per masked gene of the held-out cells, over all processes."""
    summed, n = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.inference_mode(), _autocast(world, data.settings):
        for batch in data.heldout_batches(world):
            if len(batch.masked.targets):
                summed += float(summed_loss(model, batch, world))
                n += len(batch.masked.targets)
    model.train(was_training)
    summed, n_all = total(world, [summed, n])
    return summed / max(1.0, n_all)


def _seed_dropout(seed: int, step: int, number: int) -> None:
    """Dropout is the one thing that draws from torch's own generator."""
    key = np.random.SeedSequence([seed, order.DROPOUT, step, number])
    torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))


def _check_finite(step: int, *tensors: Tensor) -> None:
    for tensor in tensors:
        if not bool(torch.isfinite(tensor).all()):
            found = f"the loss is {float(tensor)}" if tensor.ndim == 0 else "a weight is no longer finite"
            raise UserError(f"{found} at step {step}", fix="lower the learning rate")


# --- the loop ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoints:
    """Where the states of a training are kept, what they are of, and how often one is written."""

    folder: Path
    settings: Mapping[str, Any]
    every_steps: int | None = None
    every_seconds: float | None = None


class Training:
    """A network, its optimiser, and how far they are.

    Parameters
    ----------
    model
        With the weights to start from, on the device of `world`, its parameters requiring gradients.
    steps
        Of the whole training.
    curve
        Takes the rows of `COLUMNS`.
    state
        Of an interrupted training with the same settings, to go on from.
    note
        Told how it goes, in lines for people.
    """

    def __init__(
        self, model: Geneformer, data: Data, *, steps: int, world: World, curve: Curve,
        checkpoints: Checkpoints, state: State | None = None, note: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.data, self.steps, self.world = model, data, steps, world
        self.curve, self.checkpoints, self.note = curve, checkpoints, note or (lambda _: None)
        settings = self.settings = data.settings
        self.optimizer = adamw(
            model.named_parameters(), weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2), eps=settings.eps,
        )  # fmt: skip
        self.done, self.tokens = 0, 0
        self.losses: list[Tensor] = []  # since the last row, on the device
        if state is not None:
            self.done, self.tokens = state.step, state.extra["tokens"]
            self.losses = [torch.tensor(loss, device=world.device) for loss in state.extra["losses"]]
            model.load_state_dict(state.network)
            restore_optimizer(self.optimizer, state)
        self.summed = GradientSum(model.parameters(), world)
        self.rows_every = max(LOG_EVERY, steps // 1000)
        n = settings.measurements
        self.measured = {math.ceil(steps * (i + 1) / n) for i in range(n)}
        self.saved_at = self.told_at = time.monotonic()
        self.tokens_told = self.tokens

    def run(self, progress: Callable[[int], None] | None = None) -> None:
        """Take all steps that are left.

        Raises
        ------
        UserError
            If the loss or a weight is no longer finite, or the device runs out of memory.
        SystemExit
            On SIGTERM or SIGINT, after a state was saved; a second signal does not wait for that.
        """
        if progress is not None:
            progress(self.done)
        with stopping() as signalled:
            batches = self.data.steps(self.done + 1, self.steps, self.world)
            for parts in ahead(batches, self.world.device):
                if not self._step(parts, signalled):
                    self._leave(signalled())
                self._look_after()
                if progress is not None:
                    progress(1)

    def _step(self, parts: list[MicroBatch], signalled: Callable[[], int]) -> bool:
        """Take one step, unless there was a signal before its gradient was complete."""
        step = self.done + 1
        n_targets, n_tokens, stop = total(
            self.world,
            [
                sum(len(p.masked.targets) for p in parts),
                sum(len(p.masked.tokens) for p in parts),
                signalled(),
            ],
        )
        loss = None if stop else self._gradient(parts, step, n_targets, signalled)
        if loss is None:
            return False
        set_rate(self.optimizer, self._rate(step))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.losses.append(loss)
        self.tokens += int(n_tokens)
        self.done = step
        return True

    def _rate(self, step: int) -> float:
        return rate_at(
            step, steps=self.steps, peak=self.settings.learning_rate, schedule=self.settings.schedule,
            warmup=warmup_steps(self.settings.warmup, steps=self.steps),
        )  # fmt: skip

    def _gradient(
        self, parts: list[MicroBatch], step: int, n_targets: float, signalled: Callable[[], int]
    ) -> Tensor | None:
        """Leave the gradient of a step in the parameters; its loss, or None if a signal came in between."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.world.device)
        parts = [part for part in parts if len(part.masked.targets)]
        for number, part in enumerate(parts):
            if self.world.size == 1 and signalled():
                return None
            if number == len(parts) - 1:
                self.summed.last_is_next()
            _seed_dropout(self.settings.seed, step, part.number)
            try:
                with _autocast(self.world, self.settings):
                    mean = summed_loss(self.model, part, self.world) / n_targets
                mean.backward()  # type: ignore[no-untyped-call]
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"out of device memory in a micro-batch of {len(part.masked.tokens)} tokens",
                    fix="lower batch_tokens (and give accumulate or batch_cells), or choose precision bfloat16",
                ) from error
            loss = loss + mean.detach()
        return self.summed.finish(loss)

    def _look_after(self) -> None:
        """Look whether the loss is finite, add a row to the curve, save a state: what is due after this step."""
        step = self.done
        if step % CHECK_EVERY == 0 or step in self.measured:
            try:
                _check_finite(step, *self.losses)
            except UserError as error:
                refuse(self.world, error)
        if step % self.rows_every == 0 or step in self.measured:
            self._add_row(step)
        if self.world.rank == 0 and step < self.steps and self._is_due(step):
            self._save()
            self.saved_at = time.monotonic()

    def _add_row(self, step: int) -> None:
        held = heldout_loss(self.model, self.data, self.world) if step in self.measured else None
        if held is not None and not math.isfinite(held):
            error = UserError(f"the held-out loss is {held} at step {step}", fix="lower the learning rate")
            refuse(self.world, error)
        mean = float(torch.stack(self.losses).mean())
        self.losses = []
        values = (step, self.tokens, self._rate(step), mean, held)
        self.curve.add(dict(zip(COLUMNS, values, strict=True)))
        now = time.monotonic()
        waited = now - self.told_at
        if held is None and waited < SECONDS_BETWEEN_NOTES:
            return
        pace = (self.tokens - self.tokens_told) / max(waited, 1e-9)
        also = "" if held is None else f", held-out {held:.3f}"
        self.note(f"step {step:,} of {self.steps:,}: loss {mean:.3f}{also} nats, {pace:,.0f} tokens/s")
        self.told_at, self.tokens_told = now, self.tokens

    def _is_due(self, step: int) -> bool:
        every = self.checkpoints
        by_step = every.every_steps is not None and step % every.every_steps == 0
        waited = time.monotonic() - self.saved_at
        return by_step or (every.every_seconds is not None and waited >= every.every_seconds)

    def _save(self) -> None:
        """Write a state; UserError, and the last good one stays, where the loss or a weight is not finite."""
        _check_finite(self.done, *self.losses, *self.model.parameters())
        extra = {
            "rows": self.curve.rows, "tokens": self.tokens, "losses": [float(loss) for loss in self.losses]
        }  # fmt: skip
        save_state(
            self.checkpoints.folder, step=self.done, network_state=self.model.state_dict(),
            optimizer=self.optimizer, extra=extra, settings=self.checkpoints.settings,
        )  # fmt: skip

    def _leave(self, signalled: int) -> NoReturn:
        """Save a state and end as the signal would have it."""
        if self.world.rank == 0 and self.done:
            self._save()
            self.note(f"stopped after step {self.done:,}; the same command goes on from there")
        raise SystemExit(128 + (signalled or signal.SIGTERM))
