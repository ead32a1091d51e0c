"""Commands in processes forked from one warm process, so that each costs little more than its own work.

    with Forks() as forks:
        ended = forks.run(["tokenize", ...], [("signal_at", {"moment": ("call", 7), "signum": 9, ...})])

The warm process comes from the fork server of `forked.py`, and imports once what the verbs import. Each command is
`cellformers.cli.main` in a fork of it, with the faults of `points.py` put in before.
"""

import atexit
import functools
import importlib
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NamedTuple, Self
from unittest import mock

import typer
from forked import _context

WARM = (
    "anndata.io", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
    "cellformers.cli", "cellformers.counts", "cellformers.doublets", "cellformers.embed_file", "cellformers.embedding",
    "cellformers.evaluate.cells", "cellformers.evaluate.genes", "cellformers.evaluate.mixing", "cellformers.gather",
    "cellformers.io.download", "cellformers.io.kernels", "cellformers.maps", "cellformers.occurrences",
    "cellformers.plots.quality", "cellformers.qc", "cellformers.report", "cellformers.simulate.deposits",
    "cellformers.summaries", "cellformers.tokens", "cellformers.training.finetune", "cellformers.training.pretrain",
    "cellformers.training.search", "cellformers.verify", "requests", "scanpy", "scipy.stats",
    "sklearn.ensemble", "sklearn.linear_model", "sklearn.svm", "torch._dynamo",
    "transformers.models.bert.modeling_bert", "umap",
)  # fmt: skip
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1",
    "NUMBA_THREADING_LAYER": "workqueue", "MPLBACKEND": "agg",
}  # fmt: skip

Fault = tuple[str, dict[str, Any]]


class Ended(NamedTuple):
    """How a command ended: exit status, or minus the number of the signal; what it wrote, both streams together."""

    code: int  # minus SIGALRM: it was killed after its time
    text: str


@functools.cache
def _command_line() -> Any:
    """What `cli.main` runs, built once: that takes longer than most commands here."""
    from cellformers import cli

    return typer.main.get_command(cli.app)


def _command(arguments: Sequence[str], faults: Sequence[Fault]) -> int:
    """Run a command with faults put in; its exit status."""
    from cellformers import cli

    built = _command_line()
    for name, values in faults:
        getattr(importlib.import_module("points"), name)(**values)
    with (
        mock.patch.object(sys, "argv", ["cellformers", *arguments]),
        mock.patch("typer.main.get_command", return_value=built),
    ):
        try:
            cli.main()
        except SystemExit as end:
            return 0 if end.code is None else int(end.code)
        except BaseException:  # noqa: BLE001 - as the interpreter does with what nobody caught
            traceback.print_exc()
            return 1
    return 0


def _child(out: int, arguments: Sequence[str], faults: Sequence[Fault]) -> None:
    os.dup2(out, 1)
    os.dup2(out, 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 70
    try:
        code = _command(arguments, faults)
        sys.setprofile(None)
        atexit._run_exitfuncs()  # as the interpreter does at its end
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    finally:
        os._exit(code)  # what libraries in C do at the end would take three times as long as most commands


def _fork(arguments: Sequence[str], faults: Sequence[Fault], seconds: float) -> Ended:
    reader, writer = os.pipe()
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(writer, arguments, faults)
    os.close(writer)
    content = bytearray()
    hung = False
    while select.select([reader], [], [], max(0.0, begun + seconds - time.monotonic()))[0]:
        piece = os.read(reader, 1 << 16)
        if not piece:
            break
        content += piece
    else:
        hung = True
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    code = -signal.SIGALRM if hung else os.waitstatus_to_exitcode(status)
    return Ended(code, content.decode(errors="replace"))


def _here(arguments: Sequence[str]) -> Ended:
    """Run a command in this process, so that whatever it loads and compiles is there for all that are forked later."""
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            code = _command(arguments, [])
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        finally:
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
        file.seek(0)
        return Ended(code, file.read().decode())


def _serve(channel: Connection, paths: list[str], environment: dict[str, str]) -> None:
    os.environ.update(ONE_THREAD | environment)
    sys.path[:0] = paths
    sys.dont_write_bytecode = True
    for name in WARM:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    channel.send("ready")
    while True:
        try:
            request = channel.recv()
        except EOFError:
            return
        arguments, faults, seconds = request
        channel.send(_here(arguments) if seconds is None else _fork(arguments, faults, seconds))


class Forks:
    """The warm process, and commands forked from it."""

    def __init__(self, **environment: str) -> None:
        self.channel, there = _context.Pipe()
        self.process = _context.Process(target=_serve, args=(there, list(sys.path), environment))
        self.process.start()
        there.close()

    def __enter__(self) -> Self:
        assert self.channel.recv() == "ready"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        self.process.join(5)
        self.process.kill()

    def run(
        self, arguments: Sequence[object], faults: Sequence[Fault] = (), *, seconds: float = 60.0
    ) -> Ended:
        """Run `cellformers ARGUMENTS...` in a fork; killed after so many seconds."""
        self.channel.send((list(map(str, arguments)), list(faults), seconds))
        ended: Ended = self.channel.recv()
        return ended

    def warm_up(self, arguments: Sequence[object]) -> Ended:
        """Run a command in the warm process itself; one that leaves no threads and computes no gradients."""
        self.channel.send((list(map(str, arguments)), [], None))
        ended: Ended = self.channel.recv()
        return ended
