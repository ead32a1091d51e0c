"""The workflow when a job or Snakemake itself is killed, a lock is left, an input is from the future.

Its jobs call a stand-in for `cellformers`, first on the PATH, which does as it is told once and is the real command
after that.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_line import make_adata, make_counts, run

ROOT = Path(__file__).parents[2]
METRICS = "results/a/qc/metrics/0001-of-0001.parquet"
pytestmark = pytest.mark.workflow

STAND_IN = """#!{python}
import os, pathlib, signal, sys, time
told = pathlib.Path({told!r})
if sys.argv[1] == "qc-metrics" and told.exists():
    what = told.read_text()
    told.unlink()
    output = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
    output.write_bytes(b"PAR1 half of a file")  # under its final name, as only a crash of a file system could
    pathlib.Path({begun!r}).touch()
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
os.execv({real!r}, [{real!r}, *sys.argv[1:]])
"""


class Lab:
    """A folder with a small dataset and its config, and the stand-in."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.told, self.begun = folder, folder / "told", folder / "begun"
        make_adata(make_counts(60)).write_h5ad(folder / "raw.h5ad")
        (folder / "config.yaml").write_text(yaml.safe_dump({"datasets": {"a": {"path": "raw.h5ad"}}}))
        stand_in = folder / "bin" / "cellformers"
        stand_in.parent.mkdir()
        real = str(Path(sys.executable).parent / "cellformers")
        text = STAND_IN.format(python=sys.executable, told=str(self.told), begun=str(self.begun), real=real)
        stand_in.write_text(text)
        stand_in.chmod(0o755)

    def start(self, *options: str) -> "subprocess.Popen[str]":
        """Start Snakemake in a session of its own."""
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1"]
        command += [
            "--directory",
            str(self.folder),
            "--configfile",
            str(self.folder / "config.yaml"),
            *options,
        ]
        return subprocess.Popen(
            [*command, "--", METRICS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
            env=os.environ | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def run(self, *options: str) -> tuple[int, str]:
        """Run Snakemake; its exit status and what it wrote."""
        process = self.start(*options)
        try:
            text, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        return process.returncode, text


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


def test_a_job_is_killed(lab: Lab) -> None:
    """What it left under the final name goes, and the rule and its log are named."""
    lab.told.write_text("die")
    code, text = lab.run()
    assert code == 1
    assert "Error in rule qc_metrics" in text
    assert "results/logs/a/qc_metrics/0001-of-0001.log" in text
    assert not (lab.folder / METRICS).exists()
    assert (lab.folder / "results/a/counts/0001-of-0001.h5ad").exists()


def test_snakemake_is_killed_with_its_job(lab: Lab, tmp_path: Path) -> None:
    """The folder is locked, and says how to unlock it; the half-written file is made again, what was whole is not."""
    lab.begun.unlink()
    lab.told.write_text("hang")
    process = lab.start()
    deadline = time.monotonic() + 300
    while not lab.begun.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (lab.folder / METRICS).read_bytes().startswith(b"PAR1 half")
    counts = lab.folder / "results/a/counts/0001-of-0001.h5ad"
    made_at = counts.stat().st_mtime_ns

    code, text = lab.run()
    assert code == 1
    assert "--unlock" in text
    assert (lab.folder / METRICS).read_bytes().startswith(b"PAR1 half")
    assert lab.run("--unlock")[0] == 0
    code, text = lab.run()
    assert code == 0, text
    assert counts.stat().st_mtime_ns == made_at
    assert run("qc-metrics", counts, "-o", tmp_path / "m.parquet").code == 0
    assert (lab.folder / METRICS).read_bytes() == (tmp_path / "m.parquet").read_bytes()
    assert "Nothing to be done" in lab.run("--dry-run")[1]


def test_an_input_from_the_future(lab: Lab) -> None:
    """The clock of another machine is ahead: nothing fails for it, nor is made again and again."""
    if not (lab.folder / METRICS).exists():
        pytest.skip("the run did not complete")
    ahead = time.time() + 1e6
    os.utime(lab.folder / "raw.h5ad", (ahead, ahead))
    code, text = lab.run()
    assert code == 0, text
    code, text = lab.run("--dry-run")
    assert code == 0
    assert "Nothing to be done" in text, text
