"""GPUs as the rules ask for them: one each, several for training; and the command that trains on several."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from token_files import make_atlas, make_vocabulary, write_shards

ROOT = Path(__file__).parents[2]
DEMO = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
BENCHMARKS = yaml.safe_load((ROOT / "config" / "benchmarks.yaml").read_text())
Run = Callable[..., subprocess.CompletedProcess[str]]
TRAINING = "cellformers (?:pretrain|finetune) "


def config(accelerator: str, **pretrain: Any) -> dict[str, Any]:
    """Two shards, a model pretrained on them, another fine-tuned from that."""
    return {
        "accelerator": accelerator,
        "datasets": {"atlas": DEMO["datasets"]["atlas"]},
        "corpora": DEMO["corpora"],
        "vocabularies": DEMO["vocabularies"],
        "models": {
            "small": {"vocabulary": "atlas", "pretrain": pretrain},
            "types": {
                "finetune": {"model": "small", "datasets": ["atlas"], "label": "cell_type", "unit": "donor"}
            },
        },
    }  # fmt: skip


def jobs(plan: str) -> dict[str, list[str]]:
    """What a dry run prints of each rule's jobs."""
    found: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=\[|(?:local)?rule )", plan):
        if named := re.search(r"^(?:local)?rule (\w+):", block, re.MULTILINE):
            found.setdefault(named[1], []).append(block)
    return found


def commands(plan: str) -> list[str]:
    """The commands that train, as planned."""
    lines = (line.removeprefix("Shell command: ").strip() for line in plan.splitlines())
    return [line for line in lines if re.search(TRAINING, line)]


def planned(snakemake: Run, folder: Path, settings: dict[str, Any], *arguments: str) -> str:
    done = snakemake(folder, settings, "--dry-run", "--printshellcmds", "--verbose", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_gpu_rule_asks_for_one_and_trains_in_one_process(snakemake: Run, tmp_path: Path) -> None:
    plan = planned(snakemake, tmp_path, config("cuda"), "finetune")
    for rule in ("pretrain_model", "finetune_model"):
        (job,) = jobs(plan)[rule]
        assert re.findall(r"\bgpu=(\d+)", job) == ["1"]
        assert "threads: 2" in job
    assert len(commands(plan)) == 2
    assert all(command.startswith("cellformers ") for command in commands(plan))


def test_training_on_several_gpus_is_started_by_torchrun(snakemake: Run, tmp_path: Path) -> None:
    asked = ("--set-resources", "pretrain_model:gpu=4", "finetune_model:gpu=2", "--resources", "gpu=4")
    pretrain, finetune = commands(planned(snakemake, tmp_path, config("cuda"), *asked, "--", "finetune"))
    assert re.match(r"\S+=1 torchrun .* --no-python --nproc-per-node 4 cellformers pretrain ", pretrain)
    assert re.match(r"\S+=1 torchrun .* --no-python --nproc-per-node 2 cellformers finetune ", finetune)
    plan = planned(snakemake, tmp_path, config("cpu"), *asked, "--", "finetune")
    assert "torchrun" not in plan, "on a CPU another number of processes would give other weights"
    assert all("--threads 1 " in line for line in commands(plan)), "as would threads"


def test_folds_of_benchmarks_may_have_several_gpus_too(snakemake: Run, tmp_path: Path) -> None:
    (tmp_path / "config").symlink_to(ROOT / "config")
    asked = ("--set-resources", "finetune_fold:gpu=2", "finetune_fold_genes:gpu=3")
    plan = planned(snakemake, tmp_path, {**BENCHMARKS, "accelerator": "cuda"}, *asked)
    found = [re.search(r" torchrun .* --nproc-per-node (\d) cellformers ", line) for line in commands(plan)]
    assert {match[1] for match in found if match} == {"2", "3"}
    assert all(found)


def test_another_number_of_gpus_runs_nothing_again(snakemake: Run, tmp_path: Path) -> None:
    settings = config("cuda")
    listed = snakemake(tmp_path, settings, "--summary", "pretrain").stdout.splitlines()
    files = [line.partition("\t")[0] for line in listed if line.startswith("results/")]
    assert "results/models/small/model.safetensors" in files
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    touched = snakemake(tmp_path, settings, "--touch", "pretrain")
    assert touched.returncode == 0, touched.stderr
    plan = planned(snakemake, tmp_path, settings, "--set-resources", "pretrain_model:gpu=4", "--", "pretrain")
    assert "Nothing to be done" in plan
    plan = planned(snakemake, tmp_path, config("cuda", steps=7), "--", "pretrain")
    assert "pretrain_model" in jobs(plan), "what does change the model is seen"


# --- the command itself, on two CPU processes ---------------------------------------------------------------


@pytest.fixture
def command(snakemake: Run, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start what the rule would run on two GPUs, on the CPU, over tiny tokens; processes end with the test."""
    small = {
        "layers": 1, "hidden_size": 32, "heads": 2, "intermediate_size": 64, "batch_tokens": 256, "accumulate": 2
    }  # fmt: skip
    plan = planned(
        snakemake,
        tmp_path,
        config("cuda", **small),
        "--set-resources",
        "pretrain_model:gpu=2",
        "--",
        "pretrain",
    )
    (line,) = commands(plan)
    line = line.replace("--accelerator cuda", "--accelerator cpu").replace("--threads 2", "--threads 1")
    vocabulary = make_vocabulary(80, context_length=128)
    vocabulary.save(tmp_path / "results/vocabularies/atlas")
    tokens = tmp_path / "results/atlas/tokens/atlas"
    tokens.mkdir(parents=True)
    for number, shard in enumerate(write_shards(tmp_path, make_atlas(200, 80), vocabulary, 2), 1):
        shard.rename(tokens / f"{number:04d}-of-0002.parquet")
    (tmp_path / "results/logs/models/small").mkdir(parents=True)
    started = []

    def start(more: str) -> subprocess.Popen[bytes]:
        prefix = (
            f"export PATH=$PATH:{shlex.quote(str(Path(sys.executable).parent))} OMP_NUM_THREADS=1; exec env "
        )
        text = prefix + line.replace(" 2> ", f" {more} 2> ")
        started.append(subprocess.Popen(["bash", "-c", text], cwd=tmp_path, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank(pid: int) -> int:
    found = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    assert found
    return int(found[1])


def heard_by_others(pids: list[int]) -> list[str]:
    """Addresses other than loopback (in hexadecimal, as the kernel has them) that these processes listen on."""
    sockets = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                sockets.add(os.readlink(handle))
    found = []
    for table in ("tcp", "tcp6"):
        for row in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = row.split()
            listening, loopback = words[3] == "0A", words[1].startswith("0100007F")
            if listening and not loopback and f"socket:[{words[9]}]" in sockets:
                found.append(words[1])
    return found


def kill_one(job: subprocess.Popen[bytes], killed: int, folder: Path) -> str:
    """Kill the process of this rank once there is a state to go on from; what the job said by its end."""
    log = folder / "results/logs/models/small/pretrain.log"
    states = folder / "results/models/.training-small"
    known, deadline = set(states.glob("states-*/step-*.safetensors")), time.monotonic() + 200
    while set(states.glob("states-*/step-*.safetensors")) <= known:
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert heard_by_others([job.pid, *children(job.pid)]) == [], "nothing listens on a network"
    (victim,) = [pid for pid in children(job.pid) if rank(pid) == killed]
    os.kill(victim, signal.SIGKILL)
    assert job.wait(100) != 0
    return log.read_text()


def test_a_killed_process_ends_the_job_in_one_line_and_the_next_run_goes_on(
    command: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """The command that the rule makes: one of its two processes dies, then the other; at last one whole model."""
    model, options = tmp_path / "results/models/small", "--steps 60 --checkpoint-every 5"
    for killed in (0, 1):
        said = kill_one(command(options), killed, tmp_path)
        assert len(re.findall(r"^cellformers: error: .*$", said, re.MULTILINE)) == 1, said
        assert f"cellformers: error: process {1 - killed} of 2 lost another one" in said
        assert [p.name for p in model.parent.iterdir()] == [".training-small"]
    job = command(options)
    assert job.wait(200) == 0
    assert "going on after step" in (tmp_path / "results/logs/models/small/pretrain.log").read_text()
    assert [p.name for p in model.parent.iterdir()] == ["small"]
    assert {p.name for p in model.iterdir()} == {
        "config.json", "model.safetensors", "training.json", "loss.tsv", "vocabulary"
    }  # fmt: skip
