"""Fine-tuning in two processes on the CPU: the same as in one."""

import json
import multiprocessing
import os
import socket

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from planted import Planted

from cellformers.errors import UserError
from cellformers.training import distributed
from cellformers.training.distributed import World
from cellformers.training.finetune import Settings, SplitSpec, finetune
from cellformers.training.targets import read_cell_targets, read_gene_targets

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cellformers.training.finetune"])
# without dropout, whose draws are each process's own; so few cells a batch that some have no label of a task
SETTINGS = {
    "learning_rate": 3e-3, "epochs": 1, "batch_cells": 3, "dropout": 0.0, "classifier_dropout": 0.0,
    "evaluate_every": 20, "weight_decay": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted(tmp_path_factory.mktemp("planted"))


def train(planted, output, task, given):
    targets = (
        read_gene_targets(planted.gene_labels, "kind")
        if task == "genes"
        else read_cell_targets(planted.labels, ["type", "sex"], unit="donor")
    )
    options = {key: given.pop(key) for key in list(given) if key not in Settings.__dataclass_fields__}
    return finetune(
        [planted.tokens], planted.model, output, targets=targets, split=SplitSpec(), threads=1,
        settings=Settings(**{**SETTINGS, **given}), **options,
    )  # fmt: skip


def process(rank, size, port, tell, arguments):
    """What torchrun does, and fine-tuning behind it; errors go back as text."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    try:
        train(*arguments)
    except UserError as error:
        tell.put(str(error))
        raise SystemExit(2) from None


def run(planted, output, task="cells", **given):
    """Exit statuses of two processes that train together, and their errors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tell = PROCESSES.Queue()
    made = [
        PROCESSES.Process(target=process, args=(rank, 2, port, tell, (planted, output, task, dict(given))))
        for rank in range(2)
    ]
    for one in made:
        one.start()
    for one in made:
        one.join(120)
    return [one.exitcode for one in made], [] if tell.empty() else [tell.get()]


@pytest.mark.parametrize("task", ["cells", "genes"])
def test_two_processes_learn_what_one_does(planted, tmp_path, task):
    one = train(planted, tmp_path / "one", task, {})
    assert run(planted, tmp_path / "two", task) == ([0, 0], [])
    two = json.loads((tmp_path / "two" / "training.json").read_text())
    assert {key: one[key] for key in ("parameters", "inputs", "split", "n_trained", "steps", "epochs")} == {
        key: two[key] for key in ("parameters", "inputs", "split", "n_trained", "steps", "epochs")
    }
    curves = [pd.read_csv(tmp_path / name / "loss.tsv", sep="\t") for name in ("one", "two")]
    assert curves[0].heldout_loss.dropna().is_monotonic_decreasing, "it does learn"
    for column in ("train_loss", "heldout_loss"):
        np.testing.assert_allclose(curves[1][column], curves[0][column], rtol=2e-4)
    tables = [pq.read_table(tmp_path / name / "predictions.parquet").to_pandas() for name in ("one", "two")]
    assert tables[0].iloc[:, 0].tolist() == tables[1].iloc[:, 0].tolist()
    numbers = [table.filter(like="probability").to_numpy() for table in tables]
    assert numbers[0].size
    np.testing.assert_allclose(numbers[1], numbers[0], atol=2e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_all_processes_fail_together_and_one_tells(planted, tmp_path):
    codes, errors = run(planted, tmp_path / "m", learning_rate=1e12, clip=1e12)
    assert codes == [2, 2]
    assert len(errors) == 1
    assert "lower the learning rate" in errors[0]
    codes, errors = run(planted, tmp_path / "m", batch_cells=1)
    assert codes == [2, 2]
    assert errors == ["a batch has 1 cells for 2 processes; start 1 at most, or raise batch_cells"]
    assert list(tmp_path.iterdir()) == []


def test_rows_of_all_processes_are_put_together_in_order(monkeypatch):
    """Three processes: cells with several rows, with none, and no cells at all."""
    cells = [np.arange(3), np.zeros(0, int)]
    wanted = np.arange(3, dtype=np.float32)[:, None] * [1, -1]

    def rows(share):
        found = [np.stack([cell, -cell], axis=1).astype(np.float32) for cell in share]
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    for own in range(3):
        sent = []  # what the others add: shapes, then rows

        def add(tensor, sent=sent, own=own):
            for other in {0, 1, 2} - {own}:
                first, last = (len(cells) * r // 3 for r in (other, other + 1))
                theirs = rows(cells[first:last])
                if not sent:
                    tensor[other] = tensor.new_tensor(theirs.shape)
                elif len(theirs):
                    tensor[: len(theirs)] += tensor.new_tensor(theirs)
            sent.append(tensor.shape)

        monkeypatch.setattr(distributed.dist, "all_reduce", add)
        np.testing.assert_array_equal(distributed.divided(rows, World(own, 3, "cpu"))(cells), wanted)
    assert distributed.divided(rows, World(0, 1, "cpu")) is rows
