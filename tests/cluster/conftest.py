"""A Slurm for the tests of this folder, and runs of the workflow through it, each in a folder of its own."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import slurm
import yaml

ROOT = Path(__file__).parents[2]
SNAKEMAKE = Path(sys.executable).parent / "snakemake"
CELLFORMERS = Path(sys.executable).parent / "cellformers"

# What a site's own profile says. This machine's fake GPUs can't compute, so the config stays on the CPU and the site
# asks for the GPUs.
SITE = {
    "default-resources": {"slurm_partition": "cpu", "slurm_account": "ci"},
    "set-resources": {
        name: {"gpu": 1, "slurm_partition": "gpu"}
        for name in ("pretrain_model", "embed_cells", "embed_genes")
    },
}

# Stands before the real command on PATH, and misbehaves at the first call that has certain words in it.
WRAPPER = """#!{python}
import os, sys, time
from pathlib import Path

for number, (words, fault) in enumerate({faults!r}):
    if f" {{words}} " in " ".join(["", *sys.argv[1:], ""]):
        try:
            (Path(__file__).parent / f"happened-{{number}}").mkdir()
        except FileExistsError:
            continue
        if fault == "grow":
            held = []
            while True:  # until Slurm takes note, which looks once a second
                held.append(b"1" * 50_000_000)
                time.sleep(0.1)
        time.sleep(fault)
os.execv({command!r}, [{command!r}, *sys.argv[1:]])
"""

# As while slurmctld restarts: more failures in a row than the executor plugin puts up with by itself, which are 5.
SQUEUE = """#!/bin/sh
calls=$(cat {folder}/calls 2> /dev/null || echo 0)
echo $((calls + 1)) > {folder}/calls
[ "$calls" -ge 8 ] || exit 1
exec {squeue} "$@"
"""


class Run(NamedTuple):
    """A run of the workflow, in its folder."""

    folder: Path
    process: subprocess.Popen[bytes]

    def log(self) -> str:
        """What Snakemake said so far."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def ended(self, seconds: float = 900) -> int:
        """The exit code, after waiting for the end."""
        return self.process.wait(timeout=seconds)


Start = Callable[..., Run]


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Slurm, with nodes cpu1 and gpu1."""
    pytest.importorskip(
        "snakemake_executor_plugin_slurm", reason="snakemake-executor-plugin-slurm is not installed"
    )
    try:
        slurm.up()
    except slurm.SlurmError as error:
        pytest.skip(f"no Slurm here: {error}")
    yield
    slurm.down()


def write_wrappers(folder: Path, faults: dict[str, object]) -> None:
    """Commands that fail at first, to stand before the real ones on PATH."""
    folder.mkdir()
    texts = {
        "cellformers": WRAPPER.format(
            python=sys.executable, faults=list(faults.items()), command=str(CELLFORMERS)
        ),
        "squeue": SQUEUE.format(folder=folder, squeue=shutil.which("squeue")),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)


@pytest.fixture(scope="session")
def start(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """A function that starts Snakemake as a user would; of the same name again, in the same folder."""
    base = tmp_path_factory.mktemp("cluster")
    (base / "site").mkdir()
    (base / "site" / "profile.yaml").write_text(yaml.safe_dump(SITE), encoding="utf-8")
    (base / "config.yaml").write_text(yaml.safe_dump(little_demo()), encoding="utf-8")
    cluster_options = f"""
        --workflow-profile {ROOT / "profiles" / "slurm"} --profile {base / "site"} --jobs 6
        --slurm-init-seconds-before-status-checks 5
    """
    started: list[subprocess.Popen[bytes]] = []

    def run(name: str, *arguments: str, faults: dict[str, object] | None = None, local: bool = False) -> Run:
        folder = base / name
        folder.mkdir(exist_ok=True)
        if faults:
            write_wrappers(folder / "bin", faults)
        options = ["--cores", "2"] if local else shlex.split(cluster_options)
        files = ["--snakefile", ROOT / "Snakefile", "--configfile", base / "config.yaml"]
        # if these tests are killed, it must not go on submitting jobs; in the background of a shell, they ignore SIGINT
        ready = ["env", "--default-signal=INT", "setpriv", "--pdeathsig", "KILL"]
        command = [*ready, SNAKEMAKE, *files, *options]
        environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, *arguments],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started.append(process)
        return Run(folder, process)

    yield run
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()


def little_demo() -> dict[str, object]:
    """The demo with fewer cells, steps and methods: every rule of it runs, in fewer minutes."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text(encoding="utf-8"))
    config["simulate"]["cells"] = 600
    config["models"]["small"]["pretrain"]["steps"] = 20
    del config["benchmarks"]["platform_transfer"]
    for benchmark, baseline in (("cell_types", "log_counts"), ("dosage_sensitivity", "detection")):
        config["benchmarks"][benchmark]["baselines"] = [baseline]
    return config
