"""Training in several processes, as torchrun starts them: one a GPU, or some on the CPU.

    torchrun --nproc-per-node 2 -m cellformers.cli pretrain ...

Each process computes some of the micro-batches of a step; their gradients are summed, over NCCL between GPUs and
gloo between CPUs. Small numbers about a step go over gloo in any case, so that no process waits for its GPU. All
processes need to see the same files.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellformers.errors import UserError
from cellformers.models.batches import pick_device

PATIENCE = timedelta(hours=3)  # the others wait while the first process lays out a corpus
BUCKET_BYTES = 25 << 20


class World(NamedTuple):
    """This process among those that train together; the one of rank 0 writes."""

    rank: int
    size: int
    device: torch.device


def rank() -> int:
    """Number of this process among those that torchrun has started; 0 for one on its own."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def join(accelerator: str) -> Iterator[World]:
    """Meet the other processes, if torchrun has started any; UserError where the accelerator is not there."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        device = pick_device(accelerator)
        if device.type == "cuda" and size > 1:
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"process {local} of this machine finds {torch.cuda.device_count()} GPUs",
                    fix="start one process a GPU (torchrun --nproc-per-node)",
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
    except UserError as error:
        refuse(World(rank(), size, torch.device("cpu")), error)
    world = World(rank(), size, device)
    if size == 1:
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def total(world: World, values: Sequence[float]) -> list[float]:
    """Sum of each value over the processes, in float64."""
    if world.size == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed)
    found: list[float] = summed.tolist()
    return found


def refuse(world: World, error: UserError) -> NoReturn:
    """End all processes with an error that each of them has found; only the first one tells."""
    if world.rank == 0:
        raise error
    raise SystemExit(2) from None


@contextmanager
def together(world: World) -> Iterator[None]:
    """A block that all processes leave at the same time, and in which a UserError of one is the end of all."""
    error: UserError | None = None
    try:
        yield
    except UserError as found:
        error = found
    if world.size == 1:
        if error is not None:
            raise error
        return
    failed = torch.tensor(world.size if error is None else world.rank)
    dist.all_reduce(failed, dist.ReduceOp.MIN)
    first = int(failed)
    if error is not None and first == world.rank:
        raise error
    if first < world.size:
        raise SystemExit(2)


def equalise(model: nn.Module, world: World) -> None:
    """Give every process the weights of the first."""
    if world.size > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


class GradientSum:
    """Sums gradients over the processes, a bucket of them as soon as the last backward pass of a step has it ready.

        summed = GradientSum(model.parameters(), world)
        first.backward(); summed.last_is_next(); last.backward(); summed.finish()

    Buckets go out in the same order everywhere, whatever was ready first; a process without a micro-batch in this
    step adds zeros.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], world: World, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.active = world.size > 1
        self._buckets: list[list[nn.Parameter]] = []
        self._number: dict[int, int] = {}
        if not self.active:
            return
        room = 0
        # the backward pass comes to the last layers first
        for parameter in reversed([p for p in parameters if p.requires_grad]):
            size = parameter.numel() * parameter.element_size()
            if size > room:
                self._buckets.append([])
                room = max(bucket_bytes, size)
            room -= size
            self._buckets[-1].append(parameter)
            self._number[id(parameter)] = len(self._buckets) - 1
            parameter.register_post_accumulate_grad_hook(self._ready)  # type: ignore[no-untyped-call]
        self._reset()

    def _reset(self) -> None:
        self._armed = False
        self._missing = [len(bucket) for bucket in self._buckets]
        self._sent: list[tuple[Tensor, Any]] = []

    def last_is_next(self) -> None:
        """The next backward pass is the last of this step here."""
        self._armed = self.active

    def _ready(self, parameter: Tensor) -> None:
        if self._armed:
            self._missing[self._number[id(parameter)]] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send(self._buckets[len(self._sent)])

    def _send(self, bucket: list[nn.Parameter]) -> None:
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self, loss: Tensor) -> Tensor:
        """Put the sums in place; the sum of `loss` over the processes."""
        if not self.active:
            return loss
        for bucket in self._buckets[len(self._sent) :]:
            self._send(bucket)
        dist.all_reduce(loss)
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            parts = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, summed in zip(bucket, parts, strict=True):
                parameter.grad = summed.view_as(parameter)
        self._reset()
        return loss
