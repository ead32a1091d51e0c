"""Faults put into a process that is about to run a command; each is a function that `forks.py` calls in the child.

A moment is (kind, number): the so-many-th time that the command, once it has begun to write, "call"s a function of the
package, or is about to "open" a file to write, "rename", "mkdir", or "remove" under its folder of outputs.
"""

import atexit
import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import cellformers

PACKAGE = os.path.dirname(cellformers.__file__) + os.sep
WRITING = os.O_WRONLY | os.O_RDWR
KINDS = {"os.rename": "rename", "os.mkdir": "mkdir", "os.remove": "remove", "os.rmdir": "remove"}
Moment = tuple[str, int]
Act = Callable[[Moment], None]


def _watch(out: str, act: Act, *, early: Callable[[], None] | None = None, with_calls: bool = True) -> None:
    """Call `act` at every moment of this process from now on, and `early` at calls before anything is written."""
    counts: Counter[str] = Counter()
    state = {"begun": False, "busy": False}
    root = os.path.realpath(out)

    def count(kind: str) -> None:
        if state["busy"]:
            return
        counts[kind] += 1
        state["busy"] = True
        try:
            act((kind, counts[kind]))
        finally:
            state["busy"] = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        kind = KINDS.get(event)
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            kind = "open"
        if kind is None or isinstance(arguments[0], int):
            return
        if os.path.realpath(os.fsdecode(arguments[0])).startswith(root):
            state["begun"] = True
            count(kind)

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if state["begun"]:
            count("call")
        elif early is not None:
            early()

    sys.addaudithook(hook)
    if with_calls:
        sys.setprofile(profile)


def tally(out: str, to: str, *, with_calls: bool) -> None:
    """Write to a file, as JSON, how many moments of each kind there were, and as "all calls" those before as well."""
    seen: dict[str, int] = {}
    before = {"calls": 0}

    def act(moment: Moment) -> None:
        seen[moment[0]] = moment[1]

    def count() -> None:
        before["calls"] += 1

    _watch(out, act, early=count, with_calls=with_calls)

    def write() -> None:
        with open(to, "w", encoding="utf-8") as file:
            json.dump(seen | {"all calls": before["calls"] + seen.get("call", 0)}, file)

    atexit.register(write)


def signal_at(out: str, moment: Moment, signum: int) -> None:
    """The process gets a signal at a moment."""

    def act(now: Moment) -> None:
        if now == tuple(moment):
            os.kill(os.getpid(), signum)

    _watch(out, act, with_calls=moment[0] == "call")


def file_size(limit: int, *, deadly: bool) -> None:
    """No file may grow beyond `limit` bytes: writing fails as on a full disk, or (deadly) kills the process there."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def inputs_at(out: str, number: int, paths: list[str], what: str) -> None:
    """At the so-many-th call of the package the inputs are gone ("vanish"), or cut to half ("truncate")."""
    files = [
        os.path.join(folder, name) for path in paths for folder, _, names in os.walk(path) for name in names
    ] + [path for path in paths if os.path.isfile(path)]

    made = {"calls": 0}

    def act(now: Moment) -> None:
        if now[0] == "call":
            call()

    def call() -> None:
        made["calls"] += 1
        if made["calls"] != number:
            return
        for path in dict.fromkeys(files):  # one of the paths may be within another
            if what == "truncate":
                os.truncate(path, os.path.getsize(path) // 2)
            else:
                os.unlink(path)
        for path in paths if what == "vanish" else ():
            shutil.rmtree(path, ignore_errors=True)

    _watch(out, act, early=call)


def powerless() -> None:
    """Root keeps to permissions as others do (without capabilities)."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def clocks() -> None:
    """Every look at a clock finds it a day behind the look before, or a year ahead."""
    jumps = {"n": 0}

    def jumping(real: Callable[[], float]) -> Callable[[], float]:
        def now() -> float:
            jumps["n"] += 1
            return real() + (-86_400.0 if jumps["n"] % 2 else 365 * 86_400.0)

        return now

    for name in ("time", "monotonic", "perf_counter"):
        setattr(time, name, jumping(getattr(time, name)))


def broken_threads(after: int) -> None:
    """The so-many-th piece of work given to a pool of threads fails there, as where memory or a disk gives out."""
    from concurrent.futures import thread

    given = {"n": 0}
    real = thread._WorkItem.run  # there is no other way into a worker

    def run(self: Any) -> None:
        given["n"] += 1
        if given["n"] == after:

            def fail(*_: object, **__: object) -> None:
                raise OSError(5, "Input/output error")

            self.fn = fail
        real(self)

    thread._WorkItem.run = run  # type: ignore[method-assign]


def processes(to: str) -> None:
    """Write down every process that is started."""
    handle = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    events = ("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen")
    sys.addaudithook(lambda event, _: os.write(handle, event.encode() + b"\n") if event in events else None)
