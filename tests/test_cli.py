"""The command line: help, exit codes, what goes to stdout and stderr, and ends that come from outside."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from command_line import files_in, make_adata, make_counts, run, save_vocabulary, write_adata
from token_files import make_model

from cellformers import __version__, cli
from cellformers.doctor import Finding
from cellformers.errors import UserError

VERBS = [name for group in cli.GROUPS for name in group.VERBS]
COMMAND = (sys.executable, "-m", "cellformers.cli")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary, a model and a small count file."""
    folder = tmp_path_factory.mktemp("house")
    make_model(folder / "model", save_vocabulary(folder / "vocabulary"))
    write_adata(folder / "good.h5ad")
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells enough for a second of work."""
    path = tmp_path_factory.mktemp("large") / "large.h5ad"
    adata = make_adata(make_counts(1000))
    adata = anndata.AnnData(sp.vstack([adata.X] * 400, format="csr"), var=adata.var)
    adata.write_h5ad(path)
    return path


# --- help --------------------------------------------------------------------------------------------------


def test_help_lists_every_verb() -> None:
    ran = run("--help")
    assert (ran.code, ran.err) == (0, "")
    listed = {line.split()[0] for line in ran.out.splitlines() if line.startswith("  ") and line.split()}
    assert set(VERBS) <= listed
    assert len(VERBS) == len(set(VERBS))


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    ran = run(verb, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert "Usage: " in ran.out
    text = " ".join(ran.out.split())
    assert f"Example: cellformers {verb} " in text
    example = text[text.index("Example: ") :].split(" Arguments: ")[0].split(" Options: ")[0]
    used = {word for word in example.split() if word.startswith("-")}
    assert used <= {word.strip(",") for word in ran.out.split() if word.startswith("-")}, used


def test_a_bare_call_shows_the_help() -> None:
    ran = run()
    assert ran.code in (0, 2)  # click 8.2 made it 2
    assert "Usage: " in ran.out + ran.err


def test_the_installed_command() -> None:
    command = Path(sys.executable).parent / "cellformers"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == run("--help").out
    assert done.stderr == ""


def test_help_is_quick() -> None:
    """A verb's step, and with it torch and scanpy, is imported only when the verb runs."""
    heavy = ["torch", "anndata", "scanpy", "pandas"]
    code = f"import sys, cellformers.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"


# --- exit codes and streams --------------------------------------------------------------------------------


def test_doctor_reports_on_stdout() -> None:
    ran = run("doctor")
    assert ran.err == ""
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].startswith(f"ok       cellformers {__version__} on Python 3")
    for what in ("torch", "scanpy", "CPU with", "attention backend", "working folder"):
        assert any(what in line for line in lines), what


def test_doctor_fails_where_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [Finding("ok", "numpy 2"), Finding("missing", "torch", "pip install torch")]
    monkeypatch.setattr("cellformers.doctor.examine", lambda: findings)
    ran = run("doctor")
    assert ran.code == 1
    assert ran.out.splitlines() == ["ok       numpy 2", "MISSING  torch", "         -> pip install torch"]


def test_doctor_checks_a_config() -> None:
    config = Path(__file__).parents[1] / "config" / "config.yaml"
    ran = run("doctor", "--config", config)
    assert ran.code == 0
    assert f"ok       {config}: " in ran.out


def test_doctor_names_the_files_of_a_config_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, here = Path("config.yaml"), Path("here.h5ad")
    config.write_text("datasets: {a: {path: here.h5ad}, b: {path: there.h5ad}}\n")
    here.touch()
    ran = run("doctor", "--config", config)
    assert ran.code == 0
    assert [line for line in ran.out.splitlines() if line.startswith("no file")] == [
        f"no file  there.h5ad in {tmp_path}: the run has to make it, or works in another --directory"
    ]


def test_progress_goes_to_stderr_only(tmp_path: Path, house: Path) -> None:
    command = ("tokenize", house / "good.h5ad", "--vocabulary", house / "vocabulary")
    ran = run(*command, "-o", tmp_path / "loud.parquet")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.startswith("tokenize: 40 cells in 0:0")
    assert ran.err.count("\n") == 1
    quiet = run(*command, "--quiet", "-o", tmp_path / "quiet.parquet")
    assert quiet == (0, "", "")
    assert (tmp_path / "loud.parquet").read_bytes() == (tmp_path / "quiet.parquet").read_bytes()


@pytest.mark.parametrize("verb", ["ingest", "embed-file", "sketch"])
def test_quiet_is_silent(tmp_path: Path, house: Path, verb: str) -> None:
    more = ("--model", house / "model") if verb == "embed-file" else ()
    ran = run(verb, house / "good.h5ad", *more, "--quiet", "-o", tmp_path / "result.h5ad")
    assert ran == (0, "", "")


def test_a_note_says_where_the_counts_were(tmp_path: Path, house: Path) -> None:
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    adata.write_h5ad(tmp_path / "logged.h5ad")
    for name in ("good", "logged"):
        path = house / "good.h5ad" if name == "good" else tmp_path / "logged.h5ad"
        ran = run("tokenize", path, "--vocabulary", house / "vocabulary", "-o", tmp_path / f"{name}.parquet")
        assert ran.code == 0
        assert ("X holds no counts; layers['counts'] does and is used" in ran.err) == (name == "logged")
    assert (tmp_path / "good.parquet").read_bytes() == (tmp_path / "logged.parquet").read_bytes()


def test_a_defect_keeps_its_traceback(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cellformers.tokens.tokenize", broken)
    with pytest.raises(ZeroDivisionError):
        run("tokenize", house / "good.h5ad", "--vocabulary", house / "vocabulary", "-o", tmp_path / "t")


# --- ends that come from outside ---------------------------------------------------------------------------


def start(*arguments: str | Path, limit: int | None = None) -> subprocess.Popen[str]:
    """Start a command; `limit`: most bytes of a file it may write, as if the disk were full."""

    def before() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_a_part(folder: Path, process: subprocess.Popen[str], *, least: int = 1) -> None:
    """Until a temporary file of the running command holds something."""
    for _ in range(3000):
        if any(p.stat().st_size >= least for p in folder.glob(".part-*") if p.is_file()):
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("nothing was written")


@pytest.mark.parametrize(
    "after", [UserError("damaged", fix="make it again"), SystemError("cut off"), OSError(5, "")]
)
def test_stopped_whatever_becomes_of_the_exception(monkeypatch: pytest.MonkeyPatch, after: Exception) -> None:
    """A SIGTERM in the middle of an import comes out of some libraries as another exception."""

    def examine() -> list[Finding]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except SystemExit:
            raise after from None
        return []

    monkeypatch.setattr("cellformers.doctor.examine", examine)
    assert run("doctor") == (128 + signal.SIGTERM, "", "cellformers: stopped (SIGTERM)\n")
    monkeypatch.setattr("cellformers.doctor.examine", list)
    assert run("doctor").code == 0


def test_out_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def examine() -> list[Finding]:
        np.empty(1 << 60, np.uint8)
        return []

    monkeypatch.setattr("cellformers.doctor.examine", examine)
    ended = run("doctor")
    assert ended == (2, "", "cellformers: error: out of memory; give the job more, or the file more shards\n")


def test_stopped_in_the_middle(tmp_path: Path, house: Path, large: Path) -> None:
    """SIGTERM removes what was begun; SIGKILL can't, but the next run does, and gives the same bytes."""
    out = tmp_path / "out"
    command = ("tokenize", large, "--vocabulary", house / "vocabulary", "-o", out / "t.parquet")
    process = start(*command)
    wait_for_a_part(out, process)
    process.terminate()
    text = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, text
    assert "Traceback" not in text[1]
    assert files_in(out) == []

    process = start(*command)
    wait_for_a_part(out, process)
    process.kill()
    process.communicate(timeout=60)
    left = files_in(out)
    assert len(left) == 1
    assert left[0].name.startswith(".part-")

    assert run(*command).code == 0
    assert files_in(out) == [out / "t.parquet"]
    assert run(*command[:-1], tmp_path / "undisturbed.parquet").code == 0
    assert (out / "t.parquet").read_bytes() == (tmp_path / "undisturbed.parquet").read_bytes()


@pytest.mark.parametrize("verb", ["tokenize", "ingest", "sketch", "embed-file", "randomize"])
def test_the_disk_is_full(tmp_path: Path, house: Path, large: Path, verb: str) -> None:
    out = tmp_path / "out"
    arguments: dict[str, tuple[str | Path, ...]] = {
        "tokenize": (large, "--vocabulary", house / "vocabulary", "-o", out / "t.parquet"),
        "ingest": (large, "-o", out / "set"),
        "sketch": (large, "-o", out / "s.parquet"),
        "embed-file": (house / "good.h5ad", "--model", house / "model", "--no-umap", "-o", out / "e.h5ad"),
        "randomize": (house / "model", "-o", out / "model"),
    }
    process = start(verb, *arguments[verb], limit=4096)
    text = process.communicate(timeout=60)
    assert process.returncode == 2, text
    assert text[0] == ""
    errors = [line for line in text[1].splitlines() if line.startswith("cellformers: error: ")]
    assert len(errors) == 1, text[1]
    assert "Traceback" not in text[1]
    assert text[1].endswith(errors[0] + "\n")
    assert f"{out}/" in errors[0]
    assert "File too large" in errors[0]
    assert "make room" in errors[0]
    assert files_in(out) == []


def test_errors_of_a_process_of_its_own(tmp_path: Path, house: Path) -> None:
    """What a terminal shows, warnings of libraries included, is the one line."""
    counts = make_counts()
    counts[7, 3] = np.nan
    path = write_adata(tmp_path / "wrong.h5ad", counts)
    process = start("embed-file", path, "--model", house / "model", "-o", tmp_path / "out" / "e.h5ad")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"cellformers: error: {path}: X holds missing values (NaN)")
    assert err.count("\n") == 1
    assert files_in(tmp_path / "out") == []
