"""Pretraining: it learns, and the same input gives the same bytes."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from token_files import make_atlas, make_cells, make_vocabulary, write_shards, write_tokens

from cellformers.embedding import embed_cells
from cellformers.errors import UserError
from cellformers.models import checkpoints, layouts
from cellformers.models.directory import open_model
from cellformers.training.pretrain import pretrain, rate_at

TINY = {
    "layers": 2,
    "hidden_size": 32,
    "heads": 2,
    "intermediate_size": 64,
    "batch_tokens": 512,
    "threads": 1,
}


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    vocabulary = make_vocabulary(80, context_length=128)
    vocabulary.save(folder / "vocabulary")
    return folder, vocabulary, make_atlas(300, 80)


def train(atlas, output, *, shards=1, **options):
    folder, vocabulary, cells = atlas
    paths = write_shards(folder, cells, vocabulary, shards)
    return pretrain(paths, folder / "vocabulary", output, **{**TINY, "steps": 12, **options})


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_bytes_twice_and_for_any_number_of_shards(atlas, tmp_path):
    for name, shards in (("a", 1), ("b", 1), ("c", 3)):
        train(atlas, tmp_path / name, shards=shards, dropout=0.1)
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")
    train(atlas, tmp_path / "d", seed=1, dropout=0.1)
    assert files(tmp_path / "a")["model.safetensors"] != files(tmp_path / "d")["model.safetensors"]


def test_the_loss_falls_below_that_of_gene_frequencies(atlas, tmp_path):
    done = []
    result = train(
        atlas, tmp_path / "m", steps=400, learning_rate=4e-3, initializer_range=0.05, progress=done.append
    )
    assert sum(done) == 400
    assert result["improvement"] > 0.2
    assert result["improvement"] == pytest.approx(result["unigram_entropy"] - result["heldout_loss"])
    assert json.loads((tmp_path / "m" / "training.json").read_text()) == result
    header, *lines = (tmp_path / "m" / "loss.tsv").read_text().splitlines()
    assert header.split("\t") == ["step", "tokens", "learning_rate", "train_loss", "heldout_loss"]
    rows = [line.split("\t") for line in lines]
    assert [int(row[0]) for row in rows] == list(range(10, 401, 10))
    assert float(rows[0][3]) > float(rows[-1][3])
    measured = [float(row[4]) for row in rows if row[4]]
    assert len(measured) == 5
    assert measured[-1] == pytest.approx(result["heldout_loss"], abs=1e-4)


def test_the_result_is_a_model_like_any_other(atlas, tmp_path):
    _, vocabulary, cells = atlas
    train(atlas, tmp_path / "m")
    model = open_model(tmp_path / "m")
    assert model.vocabulary.digest == vocabulary.digest
    assert model.network.config.hidden_act == "relu"
    tokens = write_tokens(tmp_path / "t.parquet", cells, vocabulary)
    assert embed_cells(tokens, tmp_path / "m", tmp_path / "e.parquet", mode="cell").n_cells == len(cells)


def test_no_steps_give_the_random_network(atlas, tmp_path):
    result = train(atlas, tmp_path / "m", steps=0)
    network = checkpoints.load(tmp_path / "m")
    random = layouts.random_model(network.config, seed=0)
    for name, tensor in network.state_dict().items():
        if name != "head.bias":  # which starts at the frequencies of genes
            assert torch.equal(tensor, random.state_dict()[name]), name
    assert result["improvement"] == pytest.approx(0, abs=0.1)
    assert result["n_tokens"] == 0


def test_epochs_are_passes_over_the_training_cells(atlas, tmp_path):
    result = train(atlas, tmp_path / "m", steps=None, epochs=2)
    _, _, cells = atlas
    assert result["n_cells"] == 270
    assert result["n_tokens"] == pytest.approx(2 * 270 * np.mean([len(c) for c in cells]), rel=0.03)


def test_learning_rates():
    options = {"steps": 100, "peak": 1.0, "warmup": 10}
    for schedule in ("cosine", "linear"):
        rates = [rate_at(step, schedule=schedule, **options) for step in range(1, 101)]
        assert rates[0] == pytest.approx(0.1)
        assert rates[9] == rates[10] == 1.0
        assert all(a > b > 0 for a, b in pairwise(rates[10:]))
        assert rates[55] == pytest.approx(0.5, abs=0.02)
        assert rates[-1] < 0.02


def test_special_tokens_keep_their_place(tmp_path):
    vocabulary = make_vocabulary(special="v2", context_length=64)
    vocabulary.save(tmp_path / "vocabulary")
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [20] * 50), vocabulary)
    result = pretrain([tokens], tmp_path / "vocabulary", tmp_path / "m", steps=3, **TINY)
    assert np.isfinite(result["heldout_loss"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": None}, "either steps or epochs"),
        ({"epochs": 1}, "either steps or epochs"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"heldout_fraction": 0.0}, "heldout_fraction is 0"),
        ({"warmup": 1.5}, "warmup"),
        ({"heads": 3}, "no multiple"),
        ({"max_positions": 10}, "10 positions"),
        ({"learning_rate": float("nan")}, "lower the learning rate"),
        ({"accelerator": "gpu"}, "no accelerator"),
    ],
)
def test_settings_that_can_not_be(atlas, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        train(atlas, tmp_path / "m", **options)
    assert not (tmp_path / "m").exists()


def test_tokens_of_another_vocabulary_and_no_cells_are_refused(atlas, tmp_path):
    folder, vocabulary, cells = atlas
    other = write_tokens(tmp_path / "t.parquet", cells, make_vocabulary(81, context_length=128))
    with pytest.raises(UserError, match="wrong vocabulary"):
        pretrain([other], folder / "vocabulary", tmp_path / "m", steps=1)
    empty = write_tokens(tmp_path / "t.parquet", [], vocabulary)
    with pytest.raises(UserError, match="no cells"):
        pretrain([empty], folder / "vocabulary", tmp_path / "m", steps=1)
