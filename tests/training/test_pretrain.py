"""Pretraining: it learns, the same input gives the same bytes, interrupted or not."""

import json
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from token_files import make_atlas, make_cells, make_vocabulary, write_shards, write_tokens

from cellformers.embedding import embed_cells
from cellformers.errors import UserError
from cellformers.models import checkpoints, layouts
from cellformers.models.directory import open_model
from cellformers.training.presets import PRESETS, resolve
from cellformers.training.pretrain import pretrain

TINY = {
    "layers": 2,
    "hidden_size": 32,
    "heads": 2,
    "intermediate_size": 64,
    "batch_tokens": 512,
    "threads": 1,
}


# children of a process that has torch already, and nothing else
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cellformers.training.pretrain"])


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


def test_special_tokens_keep_their_place(tmp_path):
    vocabulary = make_vocabulary(special="v2", context_length=64)
    vocabulary.save(tmp_path / "vocabulary")
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [20] * 50), vocabulary)
    result = pretrain([tokens], tmp_path / "vocabulary", tmp_path / "m", steps=3, **TINY)
    assert np.isfinite(result["heldout_loss"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate": 2, "batch_cells": 8}, "either accumulate or batch_cells"),
        ({"preset": "geneformer-v2-104"}, "did you mean 'geneformer-v2-104m'"),
        ({"preset": "geneformer-v2-104m-clcancer"}, "start from geneformer-v2-104m"),
        ({"precision": "fp16"}, "no training in float16"),
        ({"hidden_sise": 3}, "did you mean 'hidden_size'"),
        ({"checkpoint_every": "often"}, "number of steps"),
        ({"backend": "varlen"}, "backend varlen"),
        ({"warmup": 13}, "longer than the training of 12"),
        ({"epochs": 1}, "either steps or epochs"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"heldout_fraction": 0.0}, "heldout_fraction is 0"),
        ({"warmup": 1.5}, "warmup"),
        ({"heads": 3}, "no multiple"),
        ({"max_positions": 10}, "10 positions"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"learning_rate": 1e9, "clip": 1e9}, "loss is (nan|inf) at step"),
        ({"learning_rate": 1e38, "steps": 1, "warmup": 0}, "held-out loss is nan at step 1; lower"),
        ({"steps": None, "epochs": float("inf")}, "epochs is inf"),
        ({"steps": None, "epochs": 0.5, "warmup": 1000}, "warmup of 1000 steps is longer"),
        ({"accelerator": "gpu"}, "no accelerator"),
    ],
)
def test_settings_that_can_not_be(atlas, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        train(atlas, tmp_path / "m", **options)
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_vocabulary_and_no_cells_are_refused(atlas, tmp_path):
    folder, vocabulary, cells = atlas
    other = write_tokens(tmp_path / "t.parquet", cells, make_vocabulary(81, context_length=128))
    with pytest.raises(UserError, match="wrong vocabulary"):
        pretrain([other], folder / "vocabulary", tmp_path / "m", steps=1)
    empty = write_tokens(tmp_path / "t.parquet", [], vocabulary)
    with pytest.raises(UserError, match="no cells"):
        pretrain([empty], folder / "vocabulary", tmp_path / "m", steps=1)


# --- precision, batches, presets ------------------------------------------------------------------------


def losses(folder):
    rows = [line.split("\t") for line in (folder / "loss.tsv").read_text().splitlines()[1:]]
    return np.array([[float(row[3]), float(row[4] or "nan")] for row in rows])


def test_products_in_bfloat16_learn_as_well(atlas, tmp_path):
    options = {"steps": 20, "learning_rate": 4e-3, "initializer_range": 0.05}
    full = train(atlas, tmp_path / "a", **options)
    half = train(atlas, tmp_path / "b", precision="bf16", **options)
    assert half["parameters"]["precision"] == "bfloat16"
    assert half["heldout_loss"] != full["heldout_loss"]
    assert half["heldout_loss"] == pytest.approx(full["heldout_loss"], rel=2e-3)
    assert (
        checkpoints.read_weights(tmp_path / "b").tensors["bert.embeddings.LayerNorm.weight"].dtype
        == torch.float32
    )


def test_the_loss_does_not_depend_on_how_a_step_is_divided(atlas, tmp_path, monkeypatch):
    """With the masks of a whole step at once, micro-batches are the same numbers to rounding."""
    from cellformers.training import masking

    drawn = masking.mask

    def by_cell(tokens, **options):
        # where a token stands decides about it, not what is drawn before: any division gives the same masks
        whole = drawn(tokens, **{**options, "number": (0,)})
        chosen = np.flatnonzero(~np.isin(tokens, list(options["special"].values())) & (tokens % 6 == 0))
        corrupted = tokens.copy()
        corrupted[chosen] = options["special"]["<mask>"]
        return whole._replace(tokens=corrupted, positions=chosen, targets=tokens[chosen])

    monkeypatch.setattr(masking, "mask", by_cell)
    options = {"steps": 10, "measurements": 10, "batch_cells": 24}
    train(atlas, tmp_path / "a", **{**options, "batch_tokens": 100_000})
    train(atlas, tmp_path / "b", **{**options, "batch_tokens": 256})
    np.testing.assert_allclose(losses(tmp_path / "a"), losses(tmp_path / "b"), rtol=1e-5)


def test_a_step_of_cells_has_so_many(atlas, tmp_path):
    result = train(atlas, tmp_path / "m", steps=None, epochs=1.5, batch_cells=27)
    assert result["parameters"]["steps"] == 15
    assert "epochs" not in result["parameters"]


def test_cells_without_tokens_do_no_harm(tmp_path):
    vocabulary = make_vocabulary(context_length=64)
    vocabulary.save(tmp_path / "vocabulary")
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [0, 0, 12, 0, 7] * 8), vocabulary)
    result = pretrain(
        [tokens],
        tmp_path / "vocabulary",
        tmp_path / "m",
        steps=20,
        batch_cells=1,
        **{**TINY, "batch_tokens": 64},
    )
    assert np.isfinite(result["heldout_loss"])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_whole_and_give_way(name):
    settings = resolve(name, {"steps": None})
    assert (settings.steps is None) != (settings.epochs is None)
    assert settings.hidden_size % settings.heads == 0
    changed = resolve(name, {"steps": 20_000, "accumulate": 3, "learning_rate": 1.0})
    assert (changed.steps, changed.epochs) == (20_000, None)
    assert (changed.accumulate, changed.batch_cells, changed.learning_rate) == (3, None, 1.0)
    assert set(PRESETS[name].assumed) <= set(PRESETS[name].settings)


def test_the_published_recipes():
    v1, v2 = resolve("geneformer-v1-10m", {}), resolve("geneformer-v2-104m", {})
    assert (v1.layers, v1.heads, v1.hidden_size, v1.intermediate_size, v1.max_positions) == (
        6,
        4,
        256,
        512,
        2048,
    )
    assert (v1.learning_rate, v1.schedule, v1.warmup, v1.epochs, v1.batch_cells) == (
        1e-3,
        "linear",
        10_000,
        3,
        144,
    )
    assert (v1.weight_decay, v1.beta2, v1.dropout, v1.mask_probability) == (0.001, 0.999, 0.02, 0.15)
    assert (v2.layers, v2.heads, v2.hidden_size, v2.intermediate_size, v2.max_positions) == (
        12,
        12,
        768,
        3072,
        4096,
    )
    assert (v2.learning_rate, v2.schedule, v2.warmup, v2.epochs, v2.dropout) == (
        2e-4,
        "cosine",
        0.007,
        3,
        0.1,
    )


def test_what_is_not_published_is_said(atlas, tmp_path):
    notes = []
    small = {**TINY, "max_positions": 128, "steps": 2, "warmup": 0, "batch_cells": 4}
    train(atlas, tmp_path / "m", preset="geneformer-v2-316m", note=notes.append, **small)
    said = [note for note in notes if "not published" in note]
    assert any(
        note.startswith("learning_rate 0.0002 is not published for geneformer-v2-316m") for note in said
    )
    assert not any(note.startswith(("batch_cells", "warmup")) for note in said)  # they were given


# --- going on from a model --------------------------------------------------------------------------------


def test_training_is_continued_from_a_model(atlas, tmp_path):
    first = train(atlas, tmp_path / "a", steps=60, learning_rate=4e-3, initializer_range=0.05)
    second = pretrain(
        write_shards(atlas[0], atlas[2], atlas[1], 1), None, tmp_path / "b", start=tmp_path / "a", steps=1,
        learning_rate=1e-6, batch_tokens=512, threads=1, dropout=0.1,
    )  # fmt: skip
    # one tiny step was taken, with the model's architecture
    assert second["heldout_loss"] == pytest.approx(first["heldout_loss"], abs=1e-4)
    assert second["heldout_loss"] != first["heldout_loss"]
    assert second["parameters"]["layers"] == 2
    assert second["parameters"]["dropout"] == 0.1
    assert second["inputs"]["model"] == open_model(tmp_path / "a").digest
    assert open_model(tmp_path / "b").network.config.hidden_dropout_prob == 0.1
    assert open_model(tmp_path / "b").vocabulary.digest == atlas[1].digest


def test_a_model_that_does_not_fit_is_refused(atlas, tmp_path):
    folder, _, cells = atlas
    train(atlas, tmp_path / "a", steps=0)
    with pytest.raises(UserError, match="layers of this model is 2, not 3"):
        train(atlas, tmp_path / "b", start=tmp_path / "a", layers=3)
    with pytest.raises(UserError, match="hidden_size of this model is 32, not 768"):
        pretrain(
            write_shards(folder, cells, atlas[1], 1), None, tmp_path / "b", start=tmp_path / "a",
            preset="geneformer-v2-104m-clcancer", layers=2,
        )  # fmt: skip
    other = make_vocabulary(81, context_length=128)
    other.save(tmp_path / "other")
    tokens = write_tokens(tmp_path / "t.parquet", cells, other)
    with pytest.raises(UserError, match="another vocabulary"):
        pretrain([tokens], tmp_path / "other", tmp_path / "b", start=tmp_path / "a", steps=1)


# --- interruptions ----------------------------------------------------------------------------------------


def steps_done(work):
    """Steps of the newest state."""
    return max((int(p.stem.split("-")[1]) for p in work.glob("states-*/step-*.safetensors")), default=0)


def test_killed_at_any_step_it_gives_the_same_bytes(atlas, tmp_path):
    folder, vocabulary, cells = atlas
    options = {**TINY, "steps": 60, "dropout": 0.1, "checkpoint_every": "7"}
    shards = write_shards(folder, cells, vocabulary, 1)
    pretrain(shards, folder / "vocabulary", tmp_path / "whole", **options)
    assert not list(tmp_path.glob(".*"))
    work, output = tmp_path / ".training-killed", tmp_path / "killed"
    rng = random.Random(0)
    for _ in range(3):
        process = PROCESSES.Process(
            target=pretrain, args=(shards, folder / "vocabulary", output), kwargs=options
        )
        process.start()
        deadline, wanted = time.monotonic() + 60, steps_done(work) + 7
        while process.is_alive() and steps_done(work) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert steps_done(work) >= wanted
        assert not output.exists()
    notes, done = [], steps_done(work)
    pretrain(shards, folder / "vocabulary", output, note=notes.append, **options)
    assert notes[0] == f"going on after step {done} of 60"
    assert files(tmp_path / "whole") == files(output)
    assert not list(tmp_path.glob(".*"))


def test_on_sigterm_the_state_is_saved(atlas, tmp_path):
    folder, vocabulary, cells = atlas
    shards = map(str, write_shards(folder, cells, vocabulary, 1))
    work, output = tmp_path / ".training-m", tmp_path / "m"
    command = [
        sys.executable, "-m", "cellformers.cli", "pretrain", *shards, "--vocabulary", str(folder / "vocabulary"),
        "--layers=1", "--hidden-size=32", "--batch-tokens=64", "--steps=9999", "-o", str(output),
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (work / "loss.tsv").is_file() or len((work / "loss.tsv").read_text().splitlines()) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert f"stopped after step {steps_done(work):,}; the same command goes on from there" in told
    assert steps_done(work) >= 10
    assert not list(work.rglob(".part-*"))


def stopped(atlas, output, at, **options):
    """Train until step `at`, and have it interrupted there by an exception of `progress`."""
    taken = []

    def progress(steps):
        taken.append(steps)
        if sum(taken) >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(atlas, output, progress=progress, checkpoint_every="1", **options)


@pytest.mark.parametrize("options", [{}, {"batch_cells": 16, "batch_tokens": 200, "dropout": 0.2}])
def test_from_every_step_on_it_gives_the_same_bytes(atlas, tmp_path, options):
    train(atlas, tmp_path / "whole", **options)
    for at in (1, 5, 9, 11):
        stopped(atlas, tmp_path / "m", at, **options)
        assert not (tmp_path / "m").exists()
        train(atlas, tmp_path / "m", **options)
        assert files(tmp_path / "m") == files(tmp_path / "whole")
        for path in (tmp_path / "m").rglob("*.*"):
            path.unlink()
        (tmp_path / "m" / "vocabulary").rmdir()
        (tmp_path / "m").rmdir()


def test_other_settings_start_anew_and_leave_the_state(atlas, tmp_path):
    train(atlas, tmp_path / "whole", seed=1)
    stopped(atlas, tmp_path / "m", 5)
    notes = []
    stopped(atlas, tmp_path / "m", 3, seed=1, note=notes.append)
    assert any("stopped at step 5 had other settings (parameters.seed)" in note for note in notes)
    assert len(list((tmp_path / ".training-m").glob("states-*"))) == 2
    train(atlas, tmp_path / "m", seed=1)
    assert files(tmp_path / "m") == files(tmp_path / "whole")
    assert not (tmp_path / ".training-m").exists()


def test_an_infinite_loss_keeps_the_last_good_state(atlas, tmp_path, monkeypatch):
    from cellformers.training import pretrain_loop

    compute = pretrain_loop.summed_loss
    calls = []

    def breaks(model, batch, world):
        calls.append(1)
        loss = compute(model, batch, world)
        return loss * float("inf") if len(calls) > 5 else loss

    monkeypatch.setattr(pretrain_loop, "summed_loss", breaks)
    with pytest.raises(UserError, match="the loss is inf at step 6; lower the learning rate"):
        train(atlas, tmp_path / "m", checkpoint_every="1", measurements=1)
    assert steps_done(tmp_path / ".training-m") == 5
    assert not (tmp_path / "m").exists()


def test_what_is_no_model_is_not_replaced(atlas, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "counts.h5ad").write_text("mine")
    for name, words in (("file", "is a file"), ("data", "other things in it .counts.h5ad")):
        with pytest.raises(UserError, match=words):
            train(atlas, tmp_path / name, steps=1)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {
        "file",
        "data",
        "data/counts.h5ad",
    }
    # a model is replaced, and so is what a workflow has left of one
    train(atlas, tmp_path / "m", steps=0)
    (tmp_path / "m" / "config.json").unlink()
    for steps in (1, 0):
        train(atlas, tmp_path / "m", steps=steps)
        assert open_model(tmp_path / "m").vocabulary.digest == atlas[1].digest


def test_a_full_disk_is_named(atlas, tmp_path):
    process = PROCESSES.Process(target=train_on_a_full_disk, args=(atlas, tmp_path / "m"))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []


def train_on_a_full_disk(atlas, output):
    folder, vocabulary, cells = atlas
    paths = write_shards(folder, cells, vocabulary, 1)
    for limit, words in (
        (2000, r"\.bin: can't be written"),
        (60_000, r"step-0*1\.safetensors: can't be written"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(UserError, match=words):
            pretrain(paths, folder / "vocabulary", output, **TINY, steps=12, checkpoint_every="1")


def test_two_trainings_of_one_model_are_refused(atlas, tmp_path):
    from cellformers.io.locks import exclusive

    with exclusive(tmp_path / ".training-m" / ".lock"), pytest.raises(UserError, match="another process"):
        train(atlas, tmp_path / "m")


def test_random_numbers_of_the_caller_stay(atlas, tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    train(atlas, tmp_path / "m", steps=2, dropout=0.1)
    assert torch.equal(torch.rand(3), wanted)
