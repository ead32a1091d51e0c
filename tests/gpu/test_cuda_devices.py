"""Picking a GPU on real hardware: what torch and the driver tell, and jobs that start at the same time."""

import json
import subprocess
import sys

import pytest
import torch
from token_files import make_atlas, make_vocabulary, write_shards

from cellformers.models.devices import free_memory, nvml_free_memory, visible_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
JOB = """
import sys, torch
from cellformers.models.devices import _claims, pick_device
device = pick_device("cuda")
held = torch.ones(8, device="cuda")
assert held.device == device, "what names no number lands there too"
print(device.index, *_claims, flush=True)
sys.stdin.read()
"""


def start():
    job = subprocess.Popen(
        [sys.executable, "-c", JOB], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    return job, job.stdout.readline().split()


def test_gpus_have_uuids_and_memory_as_the_driver_tells():
    gpus = visible_gpus()
    assert len({gpu.key for gpu in gpus}) == len(gpus) == torch.cuda.device_count()
    assert not any(gpu.key.startswith("number-") for gpu in gpus)
    told = nvml_free_memory()
    for gpu in gpus:
        free, total = torch.cuda.mem_get_info(gpu.number)
        assert gpu.total == pytest.approx(total, rel=0.05)
        if gpu.key in told:  # a part of a GPU (MIG) is not in the driver's list
            assert told[gpu.key] == pytest.approx(free, abs=2 << 30)
    assert set(free_memory(gpus)) == ({gpu.key for gpu in gpus} if len(gpus) > 1 else set())


def test_jobs_at_the_same_time_take_different_gpus_and_one_more_shares():
    jobs = [start() for _ in range(torch.cuda.device_count() + 1)]
    said = [job.communicate()[1] for job, _ in jobs]
    assert all(job.returncode == 0 for job, _ in jobs), said
    numbers = [int(words[0]) for _, words in jobs]
    claimed = [words[1] for _, words in jobs if len(words) > 1]
    # other jobs of this user may hold some
    assert len(set(claimed)) == len(claimed) <= torch.cuda.device_count()
    assert set(numbers) <= set(range(torch.cuda.device_count()))
    assert "other jobs have claimed all" in said[-1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_pretraining_on_two_gpus_is_that_on_one(tmp_path, precision):
    vocabulary = make_vocabulary(80, context_length=128)
    vocabulary.save(tmp_path / "vocabulary")
    tokens = write_shards(tmp_path, make_atlas(300, 80), vocabulary, 2)
    options = {
        "layers": 2, "hidden_size": 32, "heads": 2, "intermediate_size": 64, "batch_tokens": 256,
        "accumulate": 4, "steps": 30, "accelerator": "cuda", "precision": precision,
    }  # fmt: skip
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom cellformers.training.pretrain import pretrain\n"
        f"pretrain(sys.argv[3:], sys.argv[1], sys.argv[2], **{options!r})\n"
    )
    losses = []
    for n in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        output = tmp_path / f"m{n}"
        done = subprocess.run(
            [*command, script, tmp_path / "vocabulary", output, *tokens],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        losses.append(json.loads((output / "training.json").read_text())["heldout_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3 if precision == "float32" else 1e-2)
