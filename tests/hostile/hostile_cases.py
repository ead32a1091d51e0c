"""A small framework for damaged files: targets, mutations, cases that a seed reproduces, and their judgement.

    @register
    def labels_csv() -> Target: ...            # in count_targets.py, loader_targets.py

    python benchmarks/fuzz.py --cases 10000    # all of them, with a table

A target writes small valid files into a folder and reads a folder. A case damages the files (`mutate`), or has the
target write others (`build`), reads them in a watched process (tests/forked.py), and is judged:

equal      the result is the truth: that of the undamaged files; or, where the target has an `oracle` (another reader of
           the same format), what that reads in the damaged ones, too; or what `build` said
refused    one UserError of one line
sound      another result, which `valid` finds no fault with. Most formats have no checksums: a flipped byte of a number
           or a name gives another number or name, and nothing can tell. `valid` says what must hold even so (shapes
           agree, indices are in range, names are unique strings, counts are no negative). A target without `valid` has
           checksums over everything: there such a result is bad
bad        anything else: another exception, death by a signal, more than 10 s, more than 2 GB (also as a MemoryError
           that was turned into a UserError), a file changed outside the folder, a program started, a connection made
"""

import importlib
import importlib.util
import os
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forked

import cellformers
from cellformers.errors import UserError

SECONDS = 10.0  # of processor time for a case: a hang
PATIENCE = 60.0  # seconds on the clock, on a machine that does other things too
MEMORY_MB = 2048
PACKAGE = Path(cellformers.__file__).parent
COMPILED = [PACKAGE / "__pycache__", PACKAGE / "io" / "__pycache__"]  # numba keeps its machine code there
MODULES = (
    "count_targets",
    "loader_targets",
    "report_targets",
    "result_targets",
    "run_targets",
)  # of targets, beside this file


class Anything:
    """What `build` returns where any outcome but a bad one will do."""


class Refused:
    """What `build` returns where the reader must refuse."""


class Target(NamedTuple):
    """Something that reads files.

    All functions belong to a module (no lambdas), and results can be pickled and compared by ==.
    """

    name: str
    make: Callable[[Path], None] | None
    """Writes valid files into an empty folder."""
    read: Callable[[Path], Any]
    """Reads the files of a folder as users do; what it writes goes into that folder."""
    valid: Callable[[Any], str | None] | None = None
    """Says what is wrong with a result that isn't the truth; None where nothing is."""
    oracle: Callable[[Path, Any], bool] | None = None
    """Whether another reader gets the same from the files; an exception where it can't read them. Asked only where the
    result isn't the truth."""
    build: Callable[[random.Random, Path], Any] | None = None
    """Writes files of some odd structure; the result that they must give, `Refused` or `Anything`."""
    files: str = "**/*"
    """Which files are damaged, as a pattern."""


class Case(NamedTuple):
    """One attack on one target; `str(case)` names it in `benchmarks/fuzz.py --case`."""

    target: str
    kind: str  # "bytes" or "structure"
    seed: int

    def __str__(self) -> str:
        return f"{self.target}:{self.kind}:{self.seed}"


class Verdict(NamedTuple):
    """The judgement of a case: equal, refused, sound or bad, and why."""

    case: Case
    verdict: str
    text: str = ""


TARGETS: dict[str, Target] = {}


def register(make: Callable[[], Target]) -> Callable[[], Target]:
    """Decorator: put the target that a function returns into the list."""
    target = make()
    assert target.name not in TARGETS, target.name
    TARGETS[target.name] = target
    return make


def load_targets() -> dict[str, Target]:
    """All targets of this folder, by name."""
    for name in MODULES:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    return TARGETS


def some_cases(targets: Iterable[Target], n: int, *, seed: int = 0) -> Iterator[Case]:
    """`n` cases, the same number for every target give or take one; a third are structures where there are any."""
    chosen = list(targets)
    for number in range(n):
        target = chosen[number % len(chosen)]
        turn = number // len(chosen)
        kind = "structure" if target.build is not None and turn % 3 == 2 else "bytes"
        yield Case(target.name, kind, seed * 1_000_000 + turn)


# --- damage -----------------------------------------------------------------------------------------------

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def _flip_bit(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_byte(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] = rng.choice((*INTERESTING, rng.randrange(256)))


def _set_word(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((2, 4, 8))
    at = rng.randrange(len(data))
    value = rng.choice((0, 1, -1, 2 ** (8 * size - 1) - 1, 2 ** (8 * size - 1), 1 << 30, 1_000_000_000_000))
    word = (value % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
    data[at : at + size] = word[: len(data) - at]


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _piece(data: bytearray, rng: random.Random) -> tuple[int, int]:
    at = rng.randrange(len(data))
    return at, min(len(data), at + rng.choice((1, 2, 8, 64, 512, 4096)))


def _drop(data: bytearray, rng: random.Random) -> None:
    lo, hi = _piece(data, rng)
    del data[lo:hi]


def _repeat(data: bytearray, rng: random.Random) -> None:
    lo, hi = _piece(data, rng)
    data[hi:hi] = data[lo:hi] * rng.choice((1, 1, 2, 100))


def _zero(data: bytearray, rng: random.Random) -> None:
    lo, hi = _piece(data, rng)
    data[lo:hi] = bytes(hi - lo)


def _move(data: bytearray, rng: random.Random) -> None:
    lo, hi = _piece(data, rng)
    to = rng.randrange(len(data))
    data[to : to + hi - lo] = data[lo:hi]


def _noise(data: bytearray, rng: random.Random) -> None:
    lo, hi = _piece(data, rng)
    data[lo:hi] = rng.randbytes(hi - lo)


DAMAGES = (
    _flip_bit, _flip_bit, _flip_bit, _set_byte, _set_byte, _set_word, _set_word, _truncate, _drop, _repeat, _zero,
    _move, _noise,
)  # fmt: skip


def damage(data: bytes, rng: random.Random) -> bytes:
    """A file's bytes with one to four small damages."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not out:
            break
        rng.choice(DAMAGES)(out, rng)
    return bytes(out)


def mutate(folder: Path, rng: random.Random, pattern: str = "**/*") -> None:
    """Damage one of the files of a folder: most often its bytes; or take it away, or put another one in its place."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    path = rng.choice(files)
    how = rng.random()
    if how < 0.02 and len(files) > 1:
        path.unlink()
    elif how < 0.04 and len(files) > 1:
        shutil.copyfile(rng.choice([other for other in files if other != path]), path)
    elif how < 0.10:  # the beginning of one file, the end of another
        other = rng.choice(files).read_bytes()
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :])
    else:
        path.write_bytes(damage(path.read_bytes(), rng))


# --- running ----------------------------------------------------------------------------------------------


def prepare(case: Case, made: Path, folder: Path, rng: random.Random | None = None) -> Any:
    """Write the files of a case into `folder`, which is not there yet; what they must give, None for the truth.

    Parameters
    ----------
    made
        Folder of the target's valid files.
    rng
        What is drawn from; None: of the case's seed.
    """
    target = load_targets()[case.target]
    rng = rng or random.Random(str(case))
    if case.kind == "structure":
        assert target.build is not None
        folder.mkdir(parents=True)
        return target.build(rng, folder)
    shutil.copytree(made, folder)
    mutate(folder, rng, target.files)
    return None


def _one(target: Target, folder: Path, truth: Any, expected: Any) -> tuple[str, str]:
    """Verdict and reason on one folder, in the watched process."""
    tempfile.tempdir = str(folder)
    started = time.process_time()
    refusal, value = None, None
    try:
        value = target.read(folder)
    except UserError as error:
        refusal = error
    except BaseException:  # noqa: BLE001  (that is what is looked for)
        return "bad", traceback.format_exc()
    taken = time.process_time() - started
    if taken > SECONDS:
        return "bad", f"took {taken:.0f} s of processor time"
    if refusal is not None:
        return _judge_refusal(refusal, expected)
    if value == (truth if expected is None else expected):
        return "equal", ""
    if expected is Refused:
        return "bad", f"was to be refused, gave {value!r:.300}"
    if expected is not None and expected is not Anything:
        return "bad", f"gave {value!r:.300} for {expected!r:.300}"
    return _judge_value(target, value, folder)


def _judge_refusal(error: UserError, expected: Any) -> tuple[str, str]:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "bad", f"took more than {MEMORY_MB} MB: {error}"
        cause = cause.__cause__ or cause.__context__
    if "\n" in str(error) or not str(error):
        return "bad", f"not one line: {error}"
    if expected is not None and expected is not Refused and expected is not Anything:
        return "bad", f"refused what is well: {error}"
    return "refused", str(error)


def _judge_value(target: Target, value: Any, folder: Path) -> tuple[str, str]:
    if target.valid is None:
        return "bad", f"another result, though the format has checksums: {value!r:.300}"
    fault = target.valid(value)
    if fault:
        return "bad", f"unsound result: {fault}"
    if target.oracle is not None:
        try:
            agrees = target.oracle(folder, value)
        except Exception:  # noqa: BLE001  (the other reader can't, so it doesn't know)
            return "sound", ""
        if agrees:
            return "equal", ""
        return "bad", f"another reader disagrees with {value!r:.300}"
    return "sound", ""


def _batch(jobs: list[tuple[Target, Path, Any, Any]]) -> list[tuple[str, str]]:
    return [_one(*job) for job in jobs]


def _start_server() -> None:
    """Start the server of forked.py, where none runs yet, with the targets loaded already: that takes seconds."""
    from multiprocessing import forkserver

    here = Path(__file__).parent
    modules = [name for name in MODULES if importlib.util.find_spec(name) is not None]
    forked._context.set_forkserver_preload([*forked.PRELOADED, "cellformers.io.kernels", *modules])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class Runner:
    """Runs cases, many in one watched process; alone again where that ended badly.

    Parameters
    ----------
    root
        Scratch folder.
    keep
        Where the files of bad cases are copied to; None: nowhere.
    """

    def __init__(self, root: Path, *, keep: Path | None = None) -> None:
        self.root, self.keep = root, keep
        _start_server()
        self._made: dict[str, tuple[Path, Any]] = {}

    def truth(self, name: str) -> tuple[Path, Any]:
        """The folder of a target's valid files, and what they give."""
        if name not in self._made:
            target = load_targets()[name]
            assert target.make is not None
            folder = self.root / "made" / name
            folder.mkdir(parents=True)
            target.make(folder)
            outcome = forked.run(target.read, folder, writable=[folder, *COMPILED], seconds=60)
            assert outcome.kind == "value", f"{name}: the valid files are not read: {outcome.text}"
            if target.valid is not None:
                assert target.valid(outcome.value) is None, f"{name}: {target.valid(outcome.value)}"
            self._made[name] = folder, outcome.value
            made = folder.with_name(name + "-clean")
            made.mkdir()
            target.make(made)  # what reading left beside them is not damaged
            self._made[name] = made, outcome.value
        return self._made[name]

    def run(self, cases: list[Case], drawn: random.Random | None = None) -> list[Verdict]:
        """Run some cases in one process, in order; of one, what its seed decides may be drawn from elsewhere."""
        jobs, folders = [], []
        root = Path(tempfile.mkdtemp(prefix="batch-", dir=self.root))
        for number, case in enumerate(cases):
            made, truth = self.truth(case.target)
            folder = root / str(number) / "in"
            expected = prepare(case, made, folder, drawn)
            reading = load_targets()[case.target]._replace(make=None, build=None)  # these stay here
            jobs.append((reading, folder, truth, expected))
            folders.append(folder)
        outcome = forked.run(
            _batch, jobs, writable=[*folders, *COMPILED], seconds=PATIENCE, memory_mb=MEMORY_MB
        )
        escaped = [path for folder in folders for path in folder.parent.iterdir() if path.name != "in"]
        if outcome.kind == "value" and not outcome.deeds and not escaped and outcome.peak_mb < MEMORY_MB:
            verdicts = [Verdict(case, *found) for case, found in zip(cases, outcome.value, strict=True)]
        elif len(cases) > 1:
            verdicts = [verdict for case in cases for verdict in self.run([case])]
        else:
            text = (
                f"{outcome.kind} {outcome.text}" if outcome.kind != "value" else f"{outcome.peak_mb:.0f} MB"
            )
            text = "; ".join([text, *outcome.deeds, *(f"wrote {path.name}" for path in escaped)])
            verdicts = [Verdict(cases[0], "bad", text)]
        if self.keep is not None and (outcome.kind == "value" or len(cases) == 1):
            self._save(verdicts, cases)
        shutil.rmtree(root, ignore_errors=True)
        return verdicts

    def _save(self, verdicts: list[Verdict], cases: list[Case]) -> None:
        assert self.keep is not None
        for verdict, case in zip(verdicts, cases, strict=True):
            target = self.keep / str(case).replace(":", "-")
            if verdict.verdict == "bad" and not target.exists():
                prepare(case, self.truth(case.target)[0], target)
                (target / "WHY").write_text(verdict.text + "\n", encoding="utf-8")


def short(verdict: Verdict) -> str:
    """One line on a bad case, with what reproduces it."""
    lines = [line for line in verdict.text.splitlines() if line.strip()]
    where = [line.strip() for line in lines if "cellformers" in line and line.strip().startswith("File")]
    last = lines[-1] if lines else ""
    return f"{verdict.case}: {last:.300}" + (f" at {where[-1]}" if where else "")
