"""A task in a process of its own, watched: how it ended, the memory it took, and what it did that it must not do.

    outcome = forked.run(read_counts, path, writable=tmp_path)
    assert outcome.kind in ("value", "user_error") and not outcome.deeds

The processes are forked from a server that has imported the package and computed nothing, so that one costs some
hundredths of a second and no threads of this process are copied. A task is a function of a module (no lambda), its
arguments and its result can be pickled.
"""

import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from cellformers.errors import UserError

PRELOADED = (
    "anndata", "h5py", "numpy", "pandas", "pyarrow.parquet", "scipy.sparse", "torch", "yaml", "zarr",
    "cellformers.cli", "cellformers.counts", "cellformers.io.source", "cellformers.models.checkpoints",
    "cellformers.tokens", "cellformers.training.pretrain", "cellformers.training.finetune",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = (
    "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate",
)  # fmt: skip
FORBIDDEN = (
    "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn", "socket.bind", "socket.connect",
    "subprocess.Popen",
)  # fmt: skip
HARMLESS = ("/dev/", "/proc/self/")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(list(PRELOADED))


class Outcome(NamedTuple):
    """How a task ended.

    kind is "value" (it returned), "user_error" (the one line that users see), "error" (any other exception), "exit"
    (SystemExit), "signal" (it died) or "hang" (it was still running after its time).
    """

    kind: str
    value: Any = None
    text: str = ""  # message, or traceback
    peak_mb: float = 0.0  # of resident memory, above what the process began with
    deeds: tuple[str, ...] = ()  # what it did outside `writable`, programs started, connections made


def _status(field: str) -> int:
    """A line of /proc/self/status, in kB."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in text.splitlines() if line.startswith(field)).split()[1])


def _watch(writable: Sequence[str], deeds: list[str]) -> None:
    """Note from now on, for good, whatever this process changes outside some folders, starts, or connects to."""

    def outside(path: object) -> bool:
        if isinstance(path, int) or path is None:
            return False
        name = (
            os.path.realpath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else str(path)
        )
        return not name.startswith((*writable, *HARMLESS))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            deeds.append(f"{event} {arguments!r}"[:200])
        elif event == "open":
            path, mode, flags = arguments
            writes = bool((flags or 0) & WRITING) or (isinstance(mode, str) and set(mode) & set("wax+"))
            if writes and outside(path):
                deeds.append(f"open {path!r} to write")
        elif event in CHANGES and any(outside(path) for path in arguments if isinstance(path, str | bytes)):
            deeds.append(f"{event} {arguments!r}"[:200])

    sys.addaudithook(hook)


def _work(
    channel: Connection,
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    writable: tuple[str, ...],
    memory_mb: int,
) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = _status("VmSize") * 1024 + memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.dont_write_bytecode = True
    deeds: list[str] = []
    before = _status("VmRSS")
    _watch(writable, deeds)
    value = None
    try:
        value, kind, text = task(*arguments, **options), "value", ""
    except UserError as error:
        kind, text = "user_error", str(error)
    except SystemExit as end:
        value, kind, text = end.code, "exit", str(end)
    except BaseException:  # noqa: BLE001 - whatever it was, the test is to know it
        kind, text = "error", traceback.format_exc()
    found = tuple(deeds)
    peak = max(0, _status("VmHWM") - before) / 1024
    try:
        channel.send(Outcome(kind, value, text, peak, found))
    except Exception:  # noqa: BLE001 - a result that can't be sent
        channel.send(Outcome("error", None, traceback.format_exc(), peak, found))
    channel.close()


def run(
    task: Callable[..., Any],
    *arguments: Any,
    writable: str | Path | Sequence[str | Path] = (),
    seconds: float = 10.0,
    memory_mb: int = 2048,
    **options: Any,
) -> Outcome:
    """Call `task(*arguments, **options)` in a process of its own and tell how it ended.

    Parameters
    ----------
    writable
        Folders that it may change; what it changes elsewhere stands in `deeds`. Code in C (HDF5, Arrow) is not seen.
    seconds
        After these it is killed: a hang.
    memory_mb
        Address space that it may take besides what it begins with; more is a MemoryError.
    """
    folders = [writable] if isinstance(writable, str | Path) else list(writable)
    allowed = tuple(os.path.realpath(folder) for folder in folders)
    here, there = _context.Pipe(duplex=False)
    process = _context.Process(target=_work, args=(there, task, arguments, options, allowed, memory_mb))
    process.start()
    there.close()
    try:
        if not here.poll(seconds):
            return Outcome("hang", text=f"still running after {seconds} s")
        try:
            outcome: Outcome = here.recv()
        except EOFError:
            process.join()
            code = process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            return Outcome("signal", text=name)
        return outcome
    finally:
        process.kill()
        process.join()
        here.close()
