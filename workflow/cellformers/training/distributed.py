"""Training in several processes, as torchrun starts them: one a GPU, or some on the CPU.

    torchrun --nproc-per-node 2 -m cellformers.cli pretrain ...

Each process computes some of the micro-batches, or cells, of a step; their gradients are summed, over NCCL between
GPUs and gloo between CPUs. Small numbers about a step go over gloo in any case, so that no process waits for its GPU.
All processes need to see the same files.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cellformers.errors import UserError
from cellformers.models.devices import check_accelerator, pick_device, pick_gpus, use

Array = np.ndarray[Any, Any]
PATIENCE = timedelta(hours=3)  # the others wait while the first process lays out a corpus
BUCKET_BYTES = 25 << 20
LOST = ("gloo/transport", "Connection reset by peer", "Connection closed by peer", "NCCL error")


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
    """Meet the other processes, if torchrun has started any; each has a GPU of its own.

    UserError where the accelerator is not there, a machine has fewer GPUs than processes, or another process dies.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, pick_device(accelerator))
        return
    world = World(rank(), size, torch.device("cpu"))
    try:
        check_accelerator(accelerator)
    except UserError as error:
        refuse(world, error)
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, **_meeting_place(world))
    try:
        with _telling_of_a_loss(world):
            if accelerator == "cuda":
                world = world._replace(device=use(shared_gpu(world)))
            yield world
    finally:
        dist.destroy_process_group()


def _is_loss(error: BaseException | None) -> bool:
    """Whether an error says so, or torchrun's SIGTERM came while one that does was on its way."""
    while error is not None:
        words = isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
        if words or isinstance(error, dist.DistError):
            return True
        error = error.__context__
    return False


def _meeting_place(world: World) -> dict[str, Any]:
    """How processes find each other: on one machine by a private file and the loopback device, heard by nobody else.

    By default torch's store listens on all networks of the machine, and asks for no password. torchrun gives its
    processes a folder of this user's, in which each has one of its own.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != str(world.size) or "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return {}
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    path = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1] / "store"
    store = dist.FileStore(str(path), world.size)  # type: ignore[attr-defined]
    return {"store": store, "rank": world.rank, "world_size": world.size}


def shared_gpu(world: World) -> int:
    """Number of the GPU for this process: the first one of a machine claims one for each and tells the others."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world.size)))
    own = torch.full((world.size,), -1)
    with together(world):
        if local == 0:
            own[:n_local] = torch.tensor([gpu.number for gpu in pick_gpus(n_local)])
    picked = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(picked, own)
    return int(picked[world.rank - local][local])  # torchrun numbers the processes of a machine in a row


@contextmanager
def _telling_of_a_loss(world: World) -> Iterator[None]:
    """A process that dies takes its connections with it: one line in place of what gloo and NCCL say about them."""
    try:
        yield
    except (RuntimeError, SystemExit) as error:
        if not _is_loss(error):
            raise
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would cut this end short
        if world.rank > 1:  # one line is enough, and the first process may be the one that died
            raise SystemExit(2) from None
        raise UserError(
            f"process {world.rank} of {world.size} lost another one, which has ended or was killed",
            fix="see whether the machine ran out of memory; the same command goes on from the last saved state",
        ) from error


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


def agreed(world: World, signalled: int) -> int:
    """The number of a signal that any process has caught, 0 where none has."""
    if world.size == 1:
        return signalled
    largest = torch.tensor(signalled)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def equalise(tensors: Iterable[Tensor], world: World) -> None:
    """Give every process the weights of the first."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def divided(run: Callable[[Sequence[Array]], Array], world: World) -> Callable[[Sequence[Array]], Array]:
    """`run`, from cells to float32 [rows, columns], with the cells divided among the processes; all get all rows."""
    if world.size == 1:
        return run

    def run_share(cells: Sequence[Array]) -> Array:
        first, last = (len(cells) * r // world.size for r in (world.rank, world.rank + 1))
        rows = run(cells[first:last])
        shapes = torch.zeros(world.size, 2, dtype=torch.int64)
        shapes[world.rank] = torch.tensor(rows.shape)
        dist.all_reduce(shapes)
        ends = shapes[:, 0].cumsum(0).tolist()
        whole = torch.zeros(ends[-1], int(shapes[:, 1].max()))  # without cells there are no columns
        if len(rows):
            whole[ends[world.rank] - len(rows) : ends[world.rank]] = torch.from_numpy(rows)
        dist.all_reduce(whole)
        return np.asarray(whole.numpy())

    return run_share


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
