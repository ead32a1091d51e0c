"""Every verb that writes x what may happen to it: nothing partial stands under a final name, the next run completes,
and its bytes are those of an undisturbed run.

`make test` takes a few moments of every verb; CELLFORMERS_FAULTS=all takes many, for a quarter of an hour.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chain import COMMANDS, Chain, contents, copies, leftovers
from forks import Ended, Fault, Forks

from cellformers.cli import GROUPS

ALL = os.environ.get("CELLFORMERS_FAULTS") == "all"
VERBS = list(COMMANDS)
SLOW = ("mixing",)  # jax starts and compiles in every process
DRAWING = ("qc", "report")  # too many calls to watch each
# what goes on from what it has; the rest of these names is for the next run
RESUMING = {
    "pretrain": (".training-model",), "finetune": (".training-model",), "search": ("search/.",),
    "embed-file": ("e.h5ad.parts",),
}  # fmt: skip
GROWING = {"search": ("search/",)}  # results that are extended, and whole after every trial
FOLDERS = ("vocabulary", "pretrain", "import-model", "randomize", "convert", "finetune")


ELSEWHERE = {
    "doctor",  # writes nothing
    "download",  # tests/io/test_download.py, tests/test_deposit_download.py
}  # fmt: skip


def test_every_verb_is_here() -> None:
    there = {name for group in GROUPS for name in group.VERBS}
    assert {words.split()[0] for words in COMMANDS.values()} == there - ELSEWHERE


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def check_whole(chain: Chain, verb: str, out: Path, *, clean: bool) -> None:
    """What has its final name is as it should be; `clean`: and nothing else is there."""
    expected, found = chain.expected(verb), contents(out)
    for name, checksum in found.items():
        if name.startswith(GROWING.get(verb, ())) or ".parts/" in name:
            continue
        assert expected.get(name) == checksum, f"{name} is not whole"
    if clean:
        kept = RESUMING.get(verb, ())
        assert [name for name in leftovers(out) if not name.startswith(kept)] == []


def check_rerun(chain: Chain, forks: Forks, verb: str, out: Path) -> None:
    """The same command again completes, to the same bytes, and leaves nothing else."""
    ended = forks.run(chain.words(verb, out))
    assert ended.code == 0, ended
    assert contents(out) == chain.expected(verb)
    assert leftovers(out) == leftovers(chain.folder / verb)


def check_line(ended: Ended, code: int, *says: str) -> None:
    """It ended with this code and one line about it, the last."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.text, ended
    lines = ended.text.splitlines()
    assert lines, ended
    assert [line.startswith("cellformers: ") for line in lines].count(True) == 1, ended
    assert lines[-1].startswith("cellformers: "), ended
    for word in says:
        assert word in lines[-1], ended


def check_struck(chain: Chain, verb: str, out: Path, ended: Ended) -> None:
    """The moment came; it may not where a run goes on from another, or has no folder to make any more."""
    if ended.code == 0:
        assert ALL or verb in RESUMING
        assert {name: contents(out).get(name) for name in chain.expected(verb)} == chain.expected(verb)


_tallies: dict[str, dict[str, int]] = {}


def tally(chain: Chain, forks: Forks, verb: str, folder: Path) -> dict[str, int]:
    """How many moments an undisturbed run has."""
    if verb not in _tallies:
        place = folder / "tally"
        options = {"out": str(folder / "tallied"), "to": str(place), "with_calls": ALL or verb not in DRAWING}
        fault: Fault = ("tally", options)
        ended = forks.run(chain.words(verb, folder / "tallied"), [fault])
        assert ended.code == 0, ended
        _tallies[verb] = json.loads(place.read_text())
    return _tallies[verb]


def moments(chain: Chain, forks: Forks, verb: str, folder: Path) -> list[tuple[str, int]]:
    """When to strike: half-way, and before the last rename; of ALL many moments of each kind."""
    if verb in SLOW and not ALL:
        return [("rename", 1)]
    seen = tally(chain, forks, verb, folder)
    if not ALL:
        kind = "open" if verb in DRAWING else "call"
        return [(kind, -(-seen[kind] // 2)), ("rename", seen["rename"])]
    found = []
    for kind, most in {"call": 8, "open": 6, "rename": 12, "mkdir": 3, "remove": 3}.items():
        number = seen.get(kind, 0)
        few = min(number, most)
        found += [(kind, round(1 + (number - 1) * i / max(few - 1, 1))) for i in range(few)]
    return found


def sizes(chain: Chain, verb: str) -> list[int]:
    """Where the disk is full: in the middle of the largest file, and more."""
    largest = max(p.stat().st_size for p in (chain.folder / verb).rglob("*") if p.is_file())
    if ALL:
        return [0, 1, largest // 10, largest // 2, largest - 1]
    return [largest // 2]


@pytest.mark.parametrize("verb", VERBS)
def test_killed(chain: Chain, forks: Forks, verb: str, out: Path, tmp_path: Path) -> None:
    """At several moments, one after the other, so that each run finds what the one before it left."""
    words = chain.words(verb, out)
    for moment in moments(chain, forks, verb, tmp_path):
        ended = forks.run(
            words, [("signal_at", {"out": str(out), "moment": moment, "signum": signal.SIGKILL})]
        )
        assert ended.code in (-signal.SIGKILL, 0), (moment, ended)
        check_whole(chain, verb, out, clean=False)
        check_struck(chain, verb, out, ended)
    if verb not in SLOW:
        for size in sizes(chain, verb):
            ended = forks.run(words, [("file_size", {"limit": size, "deadly": True})])
            assert ended.code in (-signal.SIGXFSZ, 0), ended
            check_whole(chain, verb, out, clean=False)
    if ALL or verb not in SLOW:
        check_rerun(chain, forks, verb, out)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if ALL or verb not in SLOW])
def test_terminated(chain: Chain, forks: Forks, verb: str, out: Path, tmp_path: Path) -> None:
    """It cleans up, and says so in one line."""
    words = chain.words(verb, out)
    for moment in moments(chain, forks, verb, tmp_path)[: None if ALL else 1]:
        ended = forks.run(
            words, [("signal_at", {"out": str(out), "moment": moment, "signum": signal.SIGTERM})]
        )
        check_whole(chain, verb, out, clean=True)
        check_struck(chain, verb, out, ended)
        if ended.code:
            check_line(ended, 128 + signal.SIGTERM, "SIGTERM")
    if ALL or verb in RESUMING:
        check_rerun(chain, forks, verb, out)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if ALL or verb not in SLOW])
def test_terminated_as_it_replaces_a_result(
    chain: Chain, forks: Forks, verb: str, out: Path, tmp_path: Path
) -> None:
    """The old one is still there and whole, or the new one is; also between the two renames that replace a folder."""
    shutil.copytree(chain.folder / verb, out, dirs_exist_ok=True)
    last = tally(chain, forks, verb, tmp_path)["rename"]
    moment = ("rename", last + 1 if verb in FOLDERS else last)
    fault: Fault = ("signal_at", {"out": str(out), "moment": moment, "signum": signal.SIGTERM})
    ended = forks.run(chain.words(verb, out), [fault])
    assert ended.code == (0 if verb == "search" else 128 + signal.SIGTERM), ended
    expected, found = chain.expected(verb), contents(out)
    assert {name: found.get(name) for name in expected} == expected
    kept = {name for name in found if name not in expected}
    assert all(name.startswith(RESUMING.get(verb, ())) for name in [*kept, *leftovers(out)]), kept


@pytest.mark.parametrize("verb", [verb for verb in VERBS if ALL or verb not in SLOW])
def test_the_disk_is_full(chain: Chain, forks: Forks, verb: str, out: Path) -> None:
    for size in sizes(chain, verb):
        ended = forks.run(chain.words(verb, out), [("file_size", {"limit": size, "deadly": False})])
        check_line(ended, 2, "make room")  # or in TMPDIR, where counts by gene wait to be turned
        assert str(out) in ended.text or "TMPDIR" in ended.text
        check_whole(chain, verb, out, clean=True)
    if ALL or verb in RESUMING:
        check_rerun(chain, forks, verb, out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A function that makes a disk of so many bytes, or changes its size, and gives its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int) -> Path:
        options = ("remount," if os.path.ismount(folder) else "") + f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a disk takes root")
    yield resize
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "verb", ["ingest", "qc", "tokenize", "pretrain", "finetune", "gather", "embed-file", "report"]
)
def test_a_small_disk_is_full(
    chain: Chain, forks: Forks, verb: str, small_disk: Callable[[int], Path]
) -> None:
    """A real one, of half the size of the results; with more room the same command completes."""
    needed = sum(p.stat().st_size for p in (chain.folder / verb).rglob("*") if p.is_file())
    out = small_disk(max(needed // 2 // 4096, 1) * 4096) / "out"
    ended = forks.run(chain.words(verb, out))
    check_line(ended, 2, "No space left on device", "make room", str(out))
    check_whole(chain, verb, out, clean=True)
    small_disk(64 << 20)
    check_rerun(chain, forks, verb, out)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if ALL or verb not in SLOW])
def test_the_folder_may_not_be_written(chain: Chain, forks: Forks, verb: str, out: Path) -> None:
    out.chmod(0o555)
    try:
        ended = forks.run(chain.words(verb, out), [("powerless", {})])
    finally:
        out.chmod(0o755)
    check_line(ended, 2, str(out))
    assert list(out.iterdir()) == []


NAMING = ("compare",)  # its result names the folders that it read
READING = [
    verb
    for verb, words in COMMANDS.items()
    if not words.startswith("simulate") and (ALL or verb not in SLOW) and verb not in NAMING
]


@pytest.mark.parametrize("what", ["vanish", "truncate"])
@pytest.mark.parametrize("verb", READING)
def test_the_inputs_do_not_stay(
    chain: Chain, forks: Forks, verb: str, out: Path, tmp_path: Path, what: str
) -> None:
    """They go, or are cut to half, while they are read: the result is right, or there is one line about it.

    Where a file is cut that is mapped into memory (weights, Parquet), the system ends the process: SIGBUS.
    """
    number = tally(chain, forks, verb, tmp_path)["all calls"] or 200
    for at in sorted({1, number // 10, number // 4, number // 2, number} if ALL else {1 + number // 4}):
        paths = [str(path) for path in copies(chain, verb, tmp_path / f"inputs-{at}")]
        words = chain.words(verb, out, inputs=tmp_path / f"inputs-{at}")
        fault: Fault = ("inputs_at", {"out": str(out), "number": max(1, at), "paths": paths, "what": what})
        ended = forks.run(words, [fault])
        mapped = what == "truncate" and ended.code == -signal.SIGBUS
        if ended.code == 0:  # a search counts a file that it can't read as a trial that failed, and says so
            assert contents(out) == chain.expected(verb) or (verb == "search" and ": failed (" in ended.text)
        elif not mapped:
            check_line(ended, 2, str(tmp_path))
        check_whole(chain, verb, out, clean=not mapped)


@pytest.mark.parametrize("what", ["vanish", "truncate"])
def test_runs_that_do_not_stay_differ(
    chain: Chain, forks: Forks, out: Path, tmp_path: Path, what: str
) -> None:
    """While they are compared, what is there no more is a difference, or there is one line about it."""
    number = tally(chain, forks, "compare", tmp_path)["all calls"]
    for at in (1, number // 2, number - 5):
        paths = [str(path) for path in copies(chain, "compare", tmp_path / f"inputs-{at}")]
        words = chain.words("compare", out, inputs=tmp_path / f"inputs-{at}")
        ended = forks.run(
            words, [("inputs_at", {"out": str(out), "number": at, "paths": paths[:1], "what": what})]
        )
        if ended.code == 2:
            check_line(ended, 2, str(tmp_path))
        else:
            found = json.loads((out / "c.json").read_text())
            assert ended.code == int(found["differs"]), ended
            assert found["differs"] == ("The runs differ" in ended.text), ended
        assert leftovers(out) == []


@pytest.mark.parametrize("verb", [verb for verb in VERBS if (ALL or verb not in SLOW) and verb not in NAMING])
def test_the_clock_jumps(chain: Chain, forks: Forks, verb: str, out: Path, tmp_path: Path) -> None:
    """Back and forth with every look at it, and the inputs come from the future; nor does it start a process that
    could die."""
    for path in copies(chain, verb, tmp_path / "inputs"):
        os.utime(path, (time.time() + 1e7, time.time() + 1e7))
    faults: list[Fault] = [("clocks", {}), ("processes", {"to": str(tmp_path / "processes")})]
    ended = forks.run(chain.words(verb, out, inputs=tmp_path / "inputs"), faults)
    assert ended.code == 0, ended
    assert contents(out) == chain.expected(verb)
    assert leftovers(out) == leftovers(chain.folder / verb)
    assert (tmp_path / "processes").read_text() == ""


@pytest.mark.parametrize("verb", ["tokenize", "embed", "predict", "evaluate"])
def test_a_worker_dies(chain: Chain, forks: Forks, verb: str, out: Path) -> None:
    """Of the threads of a pool; the command ends in time, with one line."""
    words = [*chain.words(verb, out), "--threads", "2"]
    for after in (1, 2):
        ended = forks.run(words, [("broken_threads", {"after": after})])
        check_line(ended, 2, "Input/output error")
        check_whole(chain, verb, out, clean=True)
    check_rerun(chain, forks, verb, out)
