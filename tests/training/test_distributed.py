"""Training in two processes on the CPU: the same as in one."""

import json
import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch
from token_files import make_atlas, make_vocabulary, write_shards

from cellformers.errors import UserError
from cellformers.models import devices
from cellformers.training import distributed
from cellformers.training.pretrain import pretrain

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cellformers.training.pretrain"])
OPTIONS = {
    "layers": 2, "hidden_size": 32, "heads": 2, "intermediate_size": 64, "batch_tokens": 256, "threads": 1,
    "steps": 12, "measurements": 12, "dropout": 0.1, "learning_rate": 4e-3, "initializer_range": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    vocabulary = make_vocabulary(80, context_length=128)
    vocabulary.save(folder / "vocabulary")
    return write_shards(folder, make_atlas(300, 80), vocabulary, 2), folder / "vocabulary"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def process(rank, size, port, tell, arguments, options):
    """What torchrun does, and training behind it; errors go back as text."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        pretrain(*arguments, **options)
    except UserError as error:
        tell.put(str(error))
        raise SystemExit(2) from None


def start(atlas, output, *, size=2, **options):
    """Processes that train together, and where their errors arrive."""
    tell, port = PROCESSES.Queue(), free_port()
    made = [
        PROCESSES.Process(
            target=process, args=(rank, size, port, tell, (*atlas, output), {**OPTIONS, **options})
        )
        for rank in range(size)
    ]
    for one in made:
        one.start()
    return made, tell


def run(atlas, output, **options):
    made, tell = start(atlas, output, **options)
    for one in made:
        one.join(60)
    return [one.exitcode for one in made], [] if tell.empty() else [tell.get()]


def table(folder):
    return np.loadtxt(folder / "loss.tsv", skiprows=1)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("step", [{"accumulate": 4}, {"batch_cells": 30}])
def test_two_processes_learn_what_one_does(atlas, tmp_path, step):
    pretrain(*atlas, tmp_path / "one", **OPTIONS, **step)
    assert run(atlas, tmp_path / "two", **step) == ([0, 0], [])
    one, two = table(tmp_path / "one"), table(tmp_path / "two")
    assert one.shape == (12, 5)
    assert len(np.unique(one[:, 4])) == 12  # the weights did change
    np.testing.assert_allclose(two, one, rtol=1e-5)
    training = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("one", "two")]
    assert training[0]["parameters"] == training[1]["parameters"]
    assert training[0]["heldout_loss"] == pytest.approx(training[1]["heldout_loss"], rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_two_processes_go_on_after_being_killed(atlas, tmp_path):
    options = {"accumulate": 2, "steps": 40, "measurements": 2, "checkpoint_every": "5"}
    assert run(atlas, tmp_path / "whole", **options) == ([0, 0], [])
    work = tmp_path / ".training-killed"
    made, _ = start(atlas, tmp_path / "killed", **options)
    deadline = time.monotonic() + 60
    while not list(work.glob("states-*/step-*10.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.002)
    for one in made:
        one.kill()
        one.join()
    assert list(work.glob("states-*/step-*.safetensors"))
    assert not (tmp_path / "killed").exists()
    assert run(atlas, tmp_path / "killed", **options) == ([0, 0], [])
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_two_processes_stop_after_the_same_step(atlas, tmp_path):
    made, _ = start(atlas, tmp_path / "m", accumulate=2, steps=5000)
    work, deadline = tmp_path / ".training-m", time.monotonic() + 60
    while not (work / "loss.tsv").is_file() or (work / "loss.tsv").read_text().count("\n") < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for one in made:
        one.terminate()
        time.sleep(0.05)  # they do not hear of it in the same step
    for one in made:
        one.join(60)
    assert [one.exitcode for one in made] == [128 + signal.SIGTERM] * 2
    assert len(list(work.glob("states-*/step-*.safetensors"))) == 1


def test_all_processes_fail_together_and_one_tells(atlas, tmp_path):
    codes, errors = run(atlas, tmp_path / "m", accumulate=2, max_positions=10)
    assert codes == [2, 2]
    assert len(errors) == 1
    assert "10 positions" in errors[0]
    codes, errors = run(atlas, tmp_path / "m", accumulate=2, learning_rate=1e9, clip=1e9)
    assert codes == [2, 2]
    assert len(errors) == 1
    assert "lower the learning rate" in errors[0]
    assert list(tmp_path.iterdir()) == []


def test_a_step_has_work_for_every_process(atlas, tmp_path):
    codes, errors = run(atlas, tmp_path / "m")
    assert codes == [2, 2]
    assert "1 micro-batches for 2 processes; accumulate 2" in errors[0]


def pick(rank, port, folder, n_gpus, tell):
    """One of two processes on a machine with so many GPUs, the last of which is the freest; tells its GPU."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    gpus = [devices.Gpu(number, f"uuid-{number}") for number in range(n_gpus)]
    devices.visible_gpus, devices.FOLDER = lambda: gpus, folder
    devices.nvml_free_memory = lambda: {gpu.key: 10 + gpu.number for gpu in gpus}
    try:
        with distributed.join("cpu") as world:
            number = distributed.shared_gpu(world)
            holder = devices.claimed_by(gpus[number])
            tell.put((rank, number, holder))
            distributed.total(world, [0])  # the first one lives, and holds both, until the other has looked
    except UserError as error:
        tell.put(str(error))
        raise SystemExit(2) from None


@pytest.mark.parametrize(("n_gpus", "numbers"), [(4, [2, 1]), (1, None)])
def test_every_process_has_a_gpu_of_its_own(tmp_path, n_gpus, numbers):
    """GPU 3 is another job's; the first process claims for both."""
    claims, tell = tmp_path / "claims", PROCESSES.Queue()
    devices.claim([devices.Gpu(3, "uuid-3")], 1, {}, folder=claims)
    try:
        port = free_port()
        made = [PROCESSES.Process(target=pick, args=(rank, port, claims, n_gpus, tell)) for rank in range(2)]
        for one in made:
            one.start()
        said = [tell.get(timeout=60) for _ in range(2 if numbers else 1)]
        for one in made:
            one.join(60)
    finally:
        os.close(devices._claims.pop("uuid-3"))
    if numbers is None:
        assert said == [
            "2 processes on this machine, which has 1 visible GPUs; "
            "start one process a GPU (torchrun --nproc-per-node)"
        ]
        assert [one.exitcode for one in made] == [2, 2]
        return
    assert [one.exitcode for one in made] == [0, 0]
    assert sorted((rank, number) for rank, number, _ in said) == [(0, numbers[0]), (1, numbers[1])]
    assert {holder for _, _, holder in said} == {made[0].pid}


def test_alone_nothing_is_exchanged():
    with distributed.join("cpu") as world:
        assert world == (0, 1, torch.device("cpu"))
        assert distributed.total(world, [1.5, 2]) == [1.5, 2]
        with pytest.raises(UserError, match="mine"), distributed.together(world):
            raise UserError("mine")
        loss = torch.tensor(3.0)
        parameter = torch.nn.Parameter(torch.ones(2))
        assert distributed.GradientSum([parameter], world).finish(loss) is loss
