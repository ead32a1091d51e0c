"""The optimiser steps of fine-tuning: batches of cells, early stopping on the held-out side, resumable.

Data order and dropout of a step come from (seed, number of the step), so a step can be made again on its own, and a
training that was interrupted goes on to the same bits. A batch is cut into micro-batches that fit the memory; its loss
is normalised over the whole batch, so the cut changes nothing but rounding. Of several processes each takes a part of
every batch, with draws of its own for dropout, and of the cells that are measured.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cellformers.errors import UserError
from cellformers.models.batches import DTYPES, Budget
from cellformers.models.geneformer import Geneformer
from cellformers.training.adapters import adapter_state, load_adapter_state
from cellformers.training.ahead import stopping
from cellformers.training.classify import evaluator, head_logits, precision
from cellformers.training.curves import Curve
from cellformers.training.distributed import (
    GradientSum,
    World,
    agreed,
    divided,
    equalise,
    refuse,
    together,
    total,
)
from cellformers.training.optimiser import adamw, rate_at, set_rate, warmup_steps
from cellformers.training.order import fill
from cellformers.training.problem import Batch, Problem, outputs
from cellformers.training.settings import Settings
from cellformers.training.sides import HELDOUT, TRAIN
from cellformers.training.state import load_state, restore_optimizer, save_state
from cellformers.training.verdict import summary

Array = np.ndarray[Any, Any]
Progress = Callable[[int], None]
TrialCallback = Callable[[int, Mapping[str, float]], None]

COLUMNS = (
    "step", "epoch", "learning_rate", "train_loss", "heldout_loss", "heldout_accuracy", "heldout_macro_f1"
)  # fmt: skip
LOG_EVERY = 10  # steps between lines of loss.tsv
SECONDS_BETWEEN_STATES = 900.0
_ORDER, _DROPOUT = 11, 12  # purposes of random numbers: the second key of their generators


@dataclass
class Course:
    """Where a training is; all of it survives an interruption."""

    step: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    """Of the steps since the last row, on the device."""
    measured: int = 0
    waited: int = 0
    """Measurements since the best one."""
    best: dict[str, Any] | None = None
    """Step and held-out figures of the best weights so far."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """These weights."""
    stopped: bool = False


def steps_per_epoch(problem: Problem, settings: Settings) -> int:
    """Optimiser steps of one pass; the last batch may be smaller."""
    return math.ceil(len(problem.cells(TRAIN)) / settings.batch_cells)


def count_steps(problem: Problem, settings: Settings) -> int:
    """Optimiser steps of the whole training, rounded up where epochs are no whole number."""
    return math.ceil(settings.epochs * steps_per_epoch(problem, settings) - 1e-9)


def loss_weights(problem: Problem, settings: Settings) -> list[Array]:
    """Weight of each class in the loss, float32 [classes] a task: 1, or "balanced" n / (classes · n of the class)."""
    result = []
    for sizes in problem.class_sizes(TRAIN):
        present = np.maximum(sizes, 1)
        balanced = sizes.sum() / (np.count_nonzero(sizes) * present)
        result.append(
            (balanced if settings.class_weights == "balanced" else np.ones(len(sizes))).astype(np.float32)
        )
    return result


def task_weights(problem: Problem, settings: Settings) -> list[float]:
    """Weight of each task in the loss, of sum 1."""
    given = settings.task_weights or (1.0,) * len(problem.names)
    if len(given) != len(problem.names) or not all(0 <= w < math.inf for w in given) or not sum(given):
        raise UserError(
            f"{len(given)} task weights for {len(problem.names)} tasks: {', '.join(f'{w:g}' for w in given)}",
            fix="give one for each, none below 0 and one above",
        )
    return [weight / sum(given) for weight in given]


def batch_loss(
    network: Geneformer, batch: Batch, *, weights: list[Tensor], shares: list[float], totals: list[float]
) -> Tensor:
    """Σ over tasks of share · Σ over labels of class weight · cross-entropy / total, in nats.

    `totals` are the class weights summed over the labels of the whole batch, of which `batch` may be a part.
    """
    device = network.words.weight.device
    rows = None if batch.rows is None else torch.from_numpy(batch.rows)
    labels = torch.from_numpy(batch.labels).to(device)
    logits = head_logits(
        network, torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.bounds), rows
    )
    loss = torch.zeros((), device=device)
    for task, (scores, weight) in enumerate(zip(logits, totals, strict=True)):
        if weight:
            summed = F.cross_entropy(
                scores, labels[:, task], weight=weights[task], ignore_index=-1, reduction="sum"
            )
            loss = loss + shares[task] * summed / weight
    return loss


class _Fit:
    """One training: the network, its optimiser, and what every step needs."""

    def __init__(
        self, network: Geneformer, problem: Problem, settings: Settings, *, batch_tokens: int, world: World
    ) -> None:
        self.network, self.problem, self.settings, self.world = network, problem, settings, world
        self.device = network.words.weight.device
        self.dtype = DTYPES[settings.precision]
        self.cells = problem.cells(TRAIN)
        self.per_epoch = steps_per_epoch(problem, settings)
        self.steps = count_steps(problem, settings)
        self.warmup = warmup_steps(settings.warmup, steps=self.steps)
        self.class_weights = loss_weights(problem, settings)
        self.weights = [torch.from_numpy(w).to(self.device) for w in self.class_weights]
        self.shares = task_weights(problem, settings)
        self.budget = Budget(batch_tokens)
        self.optimizer = adamw(network.named_parameters(), weight_decay=settings.weight_decay)
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.summed = GradientSum(self.trained, world)
        self._order: tuple[int, Array] = (-1, self.cells)

    def cells_of(self, step: int) -> Array:
        """The cells of a step, counted from 1."""
        epoch, place = divmod(step - 1, self.per_epoch)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.settings.seed, _ORDER, epoch]).permutation(self.cells)
            self._order = (epoch, order)
        return self._order[1][place * self.settings.batch_cells : (place + 1) * self.settings.batch_cells]

    def take(self, step: int) -> Tensor:
        """One optimiser step; its loss. A batch that exceeds the device's memory is cut into smaller parts."""
        cells = np.array_split(self.cells_of(step), self.world.size)[self.world.rank]
        totals = self._totals(cells)
        while True:
            too_large = False
            try:
                loss = self._gradient(cells, step, totals)
                break
            except torch.OutOfMemoryError:
                too_large = (
                    True  # handled outside: inside, the exception's frames would keep their tensors alive
                )
            if too_large:
                torch.cuda.empty_cache()
                lengths = self.problem.store.lengths(cells)
                self.budget.tokens = min(self.budget.tokens, int(lengths.sum()))
                self.budget.halve(int(lengths.max()))
        settings = self.settings
        loss = self._summed(loss)
        torch.nn.utils.clip_grad_norm_(self.trained, settings.clip)
        rate = self.rate(step)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        return loss

    def rate(self, step: int) -> float:
        settings = self.settings
        return rate_at(
            step,
            steps=self.steps,
            peak=settings.learning_rate,
            warmup=self.warmup,
            schedule=settings.schedule,
        )

    def _totals(self, cells: Array) -> list[float]:
        """For each task the class weights of the labels of these cells and of those of the other processes."""
        labels = self.problem.batch(cells, (TRAIN,)).labels if len(cells) else None
        own = [
            0.0 if labels is None else float(w[labels[labels[:, task] >= 0, task]].sum())
            for task, w in enumerate(self.class_weights)
        ]
        return total(self.world, own)

    def _summed(self, loss: Tensor) -> Tensor:
        """Put gradients summed over the processes in place; the sum of their losses."""
        found = total(self.world, [float(p.grad is not None) for p in self.trained])
        loss = self.summed.finish(loss)
        for parameter, n in zip(self.trained, found, strict=True):
            if not n:  # a task without labels in this batch: the optimiser leaves its head alone
                parameter.grad = None
        return loss

    def _gradient(self, cells: Array, step: int, totals: list[float]) -> Tensor:
        key = [self.settings.seed, _DROPOUT, step, *([self.world.rank] if self.world.rank else [])]
        seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(seed) >> 1)
        self.optimizer.zero_grad(set_to_none=True)
        parts = [
            self.problem.batch(part, (TRAIN,))
            for part in fill(cells, self.problem.store.lengths(cells), self.budget.tokens)
        ]
        whole = torch.zeros((), device=self.device)
        for part in parts:
            if not (part.labels >= 0).any():
                continue
            with precision(self.device, self.dtype):
                loss = batch_loss(self.network, part, weights=self.weights, shares=self.shares, totals=totals)
            loss.backward()  # type: ignore[no-untyped-call]
            whole += loss.detach()
        return whole

    def measure(self, side: int, *, threads: int | None) -> dict[str, float]:
        """Loss, accuracy and macro F1 of a side, averaged over tasks as their losses are."""
        cells = self.problem.cells(side)
        with evaluator(
            self.network, dtype=self.dtype, threads=threads, batch_tokens=self.budget.tokens,
            wanted=self.problem.wanted((side,)) if self.problem.kind == "genes" else None,
        ) as run:  # fmt: skip
            found = outputs(self.problem, divided(run, self.world), cells, (side,))
        return summary(found.logits, found.labels, self.problem.classes, self.shares)


def fit(
    network: Geneformer,
    problem: Problem,
    settings: Settings,
    *,
    batch_tokens: int,
    world: World,
    threads: int | None = None,
    work: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    save_every: int | None = None,
    tensorboard: Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    trial_callback: TrialCallback | None = None,
) -> Course:
    """Train `network` in place, and leave the weights in it that are kept: the best, or the last.

    Parameters
    ----------
    network
        In training mode; what asks for gradients is trained.
    batch_tokens
        Most tokens of a forward pass; no setting of the result.
    world
        The processes that train together; the first of them keeps states and writes the event log.
    work, identity, save_every
        Folder of states, what the training is known by there, and steps between states (None: a quarter of an hour).
    trial_callback
        Called after each measurement with its number, from 1, and the held-out figures; may raise.

    Raises
    ------
    UserError
        If the loss is no longer finite, or memory does not suffice for a single cell.
    SystemExit
        On SIGTERM or SIGINT, after the step is done and a state was saved.
    """
    made = _Fit(network, problem, settings, batch_tokens=batch_tokens, world=world)
    states = None if work is None else States(work, dict(identity or {}), save_every, note)
    course = _resumed(made, states)
    equalise([p.detach() for p in made.trained], world)
    if progress is not None and course.step:
        progress(course.step)
    has_heldout = len(problem.cells(HELDOUT)) > 0
    tensorboard = tensorboard if world.rank == 0 else None
    with Curve(None, COLUMNS, tensorboard=tensorboard, rows=course.rows) as curve, stopping() as signalled:
        while course.step < made.steps and not course.stopped:
            course.step += 1
            course.losses.append(made.take(course.step))
            measured = has_heldout and _is_measured(course.step, made)
            if course.step % LOG_EVERY == 0 or measured or course.step == made.steps:
                with together(world):
                    train_loss = _mean_loss(course)
                figures = made.measure(HELDOUT, threads=threads) if measured else {}
                if not math.isfinite(figures.get("loss", 0.0)):
                    refuse(world, _diverged(f"the held-out loss is {figures['loss']}", course))
                curve.add(_row(course, made, train_loss, figures))
                course.rows, course.losses = curve.rows, []
                if figures:
                    _judge(course, made, figures, trial_callback)
            stop = agreed(world, signalled())
            with together(world):
                if states is not None and world.rank == 0 and (states.due(course.step) or stop):
                    states.save(course, made)
            if stop:
                raise SystemExit(128 + stop)
            if progress is not None:
                progress(1)
    if course.weights:
        load_adapter_state(network, course.weights)
    return course


def _mean_loss(course: Course) -> float:
    """Of the steps since the last row; UserError where it is not finite."""
    mean = float(torch.stack(course.losses).mean())
    if not math.isfinite(mean):
        raise _diverged(f"the loss is {mean}", course)
    return mean


def _diverged(what: str, course: Course) -> UserError:
    return UserError(f"{what} at step {course.step}", fix="lower the learning rate")


def _is_measured(step: int, made: _Fit) -> bool:
    every = made.settings.evaluate_every or made.per_epoch
    return step % every == 0 or step == made.steps


def _row(course: Course, made: _Fit, train_loss: float, figures: Mapping[str, float]) -> dict[str, Any]:
    return {
        "step": course.step, "epoch": course.step / made.per_epoch, "learning_rate": made.rate(course.step),
        "train_loss": train_loss,
        **{f"heldout_{name}": figures.get(name) for name in ("loss", "accuracy", "macro_f1")},
    }  # fmt: skip


def _judge(
    course: Course, made: _Fit, figures: dict[str, float], trial_callback: TrialCallback | None
) -> None:
    """Keep the weights if they are the best so far; stop where that has not happened for too long."""
    settings = made.settings
    course.measured += 1
    sign = -1.0 if settings.monitor == "loss" else 1.0
    better = course.best is None or sign * figures[settings.monitor] > sign * course.best[settings.monitor]
    if better:
        course.best = {"step": course.step, "epoch": course.step / made.per_epoch, **figures}
        if settings.keep == "best":
            course.weights = adapter_state(made.network)
    course.waited = 0 if better else course.waited + 1
    course.stopped = 0 < settings.patience <= course.waited
    if trial_callback is not None:
        trial_callback(course.measured, figures)


# --- states ----------------------------------------------------------------------------------------------

_NOW, _BEST = "now/", "best/"


class States:
    """Where a training is saved to go on from, and when."""

    def __init__(
        self, folder: Path, identity: dict[str, Any], every: int | None, note: Callable[[str], None] | None
    ) -> None:
        self.folder, self.identity, self.every, self.note = folder, identity, every, note or (lambda _: None)
        self.saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether it is time."""
        if self.every is not None:
            return step % self.every == 0
        return time.monotonic() - self.saved > SECONDS_BETWEEN_STATES

    def save(self, course: Course, made: _Fit) -> None:
        """Write the state; UserError, and the last good one stays, where the loss or a weight is not finite."""
        if course.losses:
            _mean_loss(course)
        if not all(bool(torch.isfinite(parameter).all()) for parameter in made.trained):
            raise _diverged("a weight is no longer finite", course)
        now = {_NOW + name: tensor for name, tensor in adapter_state(made.network).items()}
        best = {_BEST + name: tensor for name, tensor in course.weights.items()}
        extra = {
            "rows": course.rows, "losses": [float(loss) for loss in course.losses], "measured": course.measured,
            "waited": course.waited, "best": course.best, "stopped": course.stopped,
        }  # fmt: skip
        save_state(
            self.folder, step=course.step, network_state=now | best, optimizer=made.optimizer, extra=extra,
            settings=self.identity,
        )  # fmt: skip
        self.saved = time.monotonic()


def _resumed(made: _Fit, states: States | None) -> Course:
    """Where an interrupted training with the same settings was, with its weights and moments in place."""
    state = None if states is None else load_state(states.folder, settings=states.identity, note=states.note)
    if states is None or state is None:
        return Course()
    weights = {name.removeprefix(_NOW): t for name, t in state.network.items() if name.startswith(_NOW)}
    best = {name.removeprefix(_BEST): t for name, t in state.network.items() if name.startswith(_BEST)}
    load_adapter_state(made.network, weights)
    restore_optimizer(made.optimizer, state)
    states.note(f"going on behind step {state.step}")
    losses = [torch.tensor(loss, device=made.device) for loss in state.extra["losses"]]
    return Course(step=state.step, weights=best, **{**state.extra, "losses": losses})
