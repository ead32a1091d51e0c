"""Pretraining on CUDA: in half precision and with every backend it learns what the CPU does in single precision."""

import numpy as np
import pytest
import torch
from token_files import make_atlas, make_vocabulary, write_shards

from cellformers.models.attention import refusal
from cellformers.training.pretrain import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
OPTIONS = {
    "layers": 2, "hidden_size": 64, "heads": 2, "intermediate_size": 128, "batch_tokens": 2048, "steps": 60,
    "learning_rate": 4e-3, "initializer_range": 0.05, "measurements": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    vocabulary = make_vocabulary(80, context_length=128)
    vocabulary.save(folder / "vocabulary")
    return write_shards(folder, make_atlas(400, 80), vocabulary, 1), folder / "vocabulary"


def heldout(folder):
    rows = [line.split("\t") for line in (folder / "loss.tsv").read_text().splitlines()[1:]]
    return np.array([float(row[4]) for row in rows if row[4]])


@pytest.mark.parametrize(
    ("precision", "backend", "most"),
    [("fp32", "sdpa", 1e-3), ("bf16", "sdpa", 5e-3), ("bf16", "varlen", 5e-3), ("bf16", "te", 5e-3)],
)
def test_losses_are_those_of_the_cpu(atlas, tmp_path, precision, backend, most):
    if refusal(backend) is not None:
        pytest.skip(f"{backend}: {refusal(backend)}")
    pretrain(*atlas, tmp_path / "cpu", **OPTIONS)
    pretrain(*atlas, tmp_path / "cuda", accelerator="cuda", precision=precision, backend=backend, **OPTIONS)
    assert heldout(tmp_path / "cpu")[0] > heldout(tmp_path / "cpu")[-1] + 0.01
    np.testing.assert_allclose(heldout(tmp_path / "cuda"), heldout(tmp_path / "cpu"), rtol=most)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_an_interrupted_training_goes_on(atlas, tmp_path, dropout):
    options = {**OPTIONS, "accelerator": "cuda", "precision": "bf16", "dropout": dropout, "batch_cells": 40}
    pretrain(*atlas, tmp_path / "whole", **options)
    taken = []

    def stop(steps):
        taken.append(steps)
        if sum(taken) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(*atlas, tmp_path / "m", progress=stop, checkpoint_every="10", **options)
    pretrain(*atlas, tmp_path / "m", **options)
    np.testing.assert_allclose(heldout(tmp_path / "m"), heldout(tmp_path / "whole"), rtol=5e-3)
