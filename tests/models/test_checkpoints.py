"""Reading weights of every kind of file and layout; what is wrong with a file is named."""

import json
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from published_models import SMALL, as_pickle, as_shards, pack, pad, publish, publish_te, sequences
from safetensors.torch import load_file, save_file

from cellformers.errors import UserError
from cellformers.models import checkpoints, weight_files

POSITION_IDS = {"bert.embeddings.position_ids": torch.arange(64)[None]}
QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    publish(tmp_path)
    return tmp_path


def rewrite(folder, change):
    """Change the tensors of a folder, whatever file they are in."""
    path = weight_files.weight_files(folder)[0]
    pickled = path.suffix == ".bin"
    tensors = torch.load(path) if pickled else load_file(path)
    change(tensors)
    (torch.save if pickled else save_file)(tensors, path)


def state_of(folder, **options):
    return checkpoints.load(folder, **options).state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- kinds of files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [publish, publish_te], ids=["hf", "te"])
@pytest.mark.parametrize(
    "kind", ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "Model"]
)
def test_every_kind_of_file_holds_the_same_network(make, kind, tmp_path):
    publish(tmp_path / "plain", kind=kind)
    wanted = state_of(tmp_path / "plain")
    changes = {
        "safetensors": lambda folder: None,
        "pickle": as_pickle,
        "shards": as_shards,
        "pickled shards": lambda folder: as_shards(folder, 2, pickled=True),
    }
    for name, change in changes.items():
        make(tmp_path / name, kind=kind)
        change(tmp_path / name)
        assert same(state_of(tmp_path / name), wanted), name


def test_a_file_as_transformers_4_6_wrote_it(tmp_path):
    """V1's: every buffer saved, the decoder's copies, storage shared by tied tensors; also before torch 1.6."""
    theirs = publish(tmp_path / "new")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    tensors = {**theirs.state_dict(), **POSITION_IDS}
    assert "cls.predictions.decoder.weight" in tensors
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save(tensors, tmp_path / "old" / "pytorch_model.bin", **options)
        assert same(state_of(tmp_path / "old"), state_of(tmp_path / "new"))


def test_a_cell_classifier_as_the_cardiomyopathy_model_is_published(tmp_path):
    theirs = publish(
        tmp_path, kind="ForSequenceClassification", num_labels=3, problem_type="single_label_classification"
    )
    as_pickle(tmp_path, POSITION_IDS)
    ours = checkpoints.load(tmp_path)
    assert ours.config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    parts = sequences((50, 7))
    flat, bounds = pack(parts)
    with torch.inference_mode():
        logits = ours.head(ours(flat, bounds, rows=bounds[:-1]))
        assert torch.allclose(logits, theirs(**pad(parts)).logits, atol=5e-6)


def test_the_state_of_fp8_modules_is_passed_over(tmp_path):
    publish_te(tmp_path)
    before = state_of(tmp_path)
    name = "bert.encoder.layer.0.self_attention.core_attention._extra_state"
    rewrite(tmp_path, lambda t: t.update({name: torch.zeros(4, dtype=torch.uint8)}))
    assert same(state_of(tmp_path), before)
    as_pickle(tmp_path, {name: None})
    assert same(state_of(tmp_path), before)


def test_safetensors_are_taken_before_pickles_and_one_file_before_shards(saved):
    publish(saved / "other", initializer_range=0.5)
    wanted = state_of(saved)
    as_pickle(saved / "other")
    (saved / "other" / "pytorch_model.bin").rename(saved / "pytorch_model.bin")
    publish(saved / "third", initializer_range=0.3)
    as_shards(saved / "third")
    for path in (saved / "third").glob("model*"):
        path.rename(saved / path.name)
    assert same(state_of(saved), wanted)
    (saved / "model.safetensors").unlink()
    sharded = state_of(saved)
    assert abs(float(sharded["words.weight"].std()) - 0.3) < 0.02
    (saved / "model.safetensors.index.json").unlink()
    assert abs(float(state_of(saved)["words.weight"].std()) - 0.5) < 0.02


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_another_precision_are_read_exactly(saved, stored):
    rewrite(saved, lambda t: t.update({name: tensor.to(stored) for name, tensor in t.items()}))
    weights = checkpoints.read_weights(saved)
    assert {tensor.dtype for tensor in weights.tensors.values()} == {stored}
    for name, tensor in checkpoints.read_weights(saved, dtype=torch.float32).tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights.tensors[name].float())


def test_a_bare_encoder_is_read_with_and_without_its_prefix(tmp_path):
    publish(tmp_path, kind="Model")
    before = checkpoints.read_weights(tmp_path)
    assert set(before.unused) == {"pooler.dense.weight", "pooler.dense.bias"}
    state = state_of(tmp_path)
    rewrite(tmp_path, lambda t: t.update({f"bert.{name}": t.pop(name) for name in list(t)}))
    assert same(state_of(tmp_path), state)


def test_older_releases_leftovers_and_stored_ties_are_tolerated(saved):
    before = state_of(saved)

    def add(tensors):
        tensors |= POSITION_IDS
        tensors["bert.pooler.dense.weight"] = torch.zeros(48, 48)
        tensors["bert.pooler.dense.bias"] = torch.zeros(48)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()

    rewrite(saved, add)
    assert same(state_of(saved), before)


# --- what is wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [publish, publish_te], ids=["hf", "te"])
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
@pytest.mark.parametrize("seed", range(8))
def test_one_renamed_misshapen_or_missing_tensor_is_named(make, pickled, seed, tmp_path):
    make(tmp_path, kind=("ForMaskedLM", "ForSequenceClassification")[seed % 2])
    if pickled:
        as_pickle(tmp_path)
    draw = random.Random(seed)
    config = checkpoints.read_config(tmp_path)
    wanted = checkpoints.published_shapes(config, "te" if make is publish_te else "hf")
    name = draw.choice(list(wanted))
    file = "pytorch_model.bin" if pickled else "model.safetensors"
    original = (tmp_path / file).read_bytes()

    def refused(change):
        (tmp_path / file).write_bytes(original)
        rewrite(tmp_path, change)
        with pytest.raises(UserError) as error:
            checkpoints.load(tmp_path)
        assert file in str(error.value)
        return str(error.value)

    renamed = name.replace("e", "x", 1)
    assert f"lacks the tensor {name};" in refused(lambda t: t.pop(name))
    message = refused(lambda t: t.update({renamed: t.pop(name)}))
    assert f"lacks the tensor {name}; did you mean {renamed!r}" in message
    shape = [*wanted[name][:-1], wanted[name][-1] + 1]
    message = refused(lambda t: t.update({name: torch.zeros(shape)}))
    assert f"tensor {name} is {shape}" in message
    assert f"promises {list(wanted[name])}" in message
    assert "account for: surplus [2]" in refused(lambda t: t.update({"surplus": torch.zeros(2)}))
    message = refused(lambda t: t[name].view(-1)[-1:].fill_(draw.choice([torch.nan, torch.inf, -torch.inf])))
    assert f"tensor {name} has values that are no finite numbers" in message
    message = refused(lambda t: t.update({name: t[name].to(torch.int32)}))
    assert f"tensor {name} is of int32" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"bert.encoder.layer.3.output.dense.bias": torch.zeros(48)}), ["layer.3", "account"]),
        (lambda t: t.update({"cls.predictions.decoder.weight": torch.ones(90, 48)}), ["decoder", "differs"]),
        (lambda t: t.update({f"model.{n}": t.pop(n) for n in list(t)}), ["others", "take 'model.' off"]),
        (lambda t: t.update({f"bert.{n}": t.pop(n) for n in list(t)}), ["take 'bert.' off"]),
        (
            lambda t: t.update({n.removeprefix("bert."): t.pop(n) for n in list(t) if n.startswith("bert.")}),
            ["bare encoder", "BertModel"],
        ),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("cls.")], ["lacks", "without the masked-gene head"]),
        (
            lambda t: t.update({"bert.encoder.layer.0.self_attention.layernorm_qkv.weight": t.pop(QUERY)}),
            ["normalise before attention"],
        ),
    ],
    ids=["extra layer", "untied", "prefixed", "doubled", "bare", "headless", "pre-norm"],
)  # fmt: skip
def test_what_is_the_matter_with_a_file_is_said(saved, change, words):
    rewrite(saved, change)
    with pytest.raises(UserError) as error:
        checkpoints.load(saved)
    assert all(word in str(error.value) for word in [*words, "model.safetensors"])


def test_a_cell_classifier_without_its_pooler_is_refused(tmp_path):
    publish(tmp_path, kind="ForSequenceClassification")
    rewrite(tmp_path, lambda t: [t.pop(f"bert.pooler.dense.{kind}") for kind in ("weight", "bias")])
    with pytest.raises(UserError, match=r"lacks the tensor bert.pooler.dense.bias and 1 others"):
        checkpoints.load(tmp_path)


def test_a_weight_too_large_for_half_precision_is_named(saved):
    rewrite(saved, lambda t: t[QUERY].view(-1)[:1].fill_(1e6))
    checkpoints.load(saved, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=rf"{QUERY} has values that are no finite numbers in float16"):
        checkpoints.load(saved, dtype=torch.float16)


def test_a_missing_tensor_is_no_question_of_spelling(saved):
    rewrite(saved, lambda t: t.pop(QUERY))
    with pytest.raises(UserError, match=rf"lacks the tensor {QUERY}; the file is not complete"):
        checkpoints.load(saved)


def test_truncated_and_missing_weights(saved):
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    for part in (whole[:500], whole[:-10], b"", b"\0" * 100, b"\xff" * 100):
        weights.write_bytes(part)
        with pytest.raises(UserError, match="not readable as safetensors"):
            checkpoints.load(saved)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 10\n")
    with pytest.raises(UserError, match="pointer of git-lfs"):
        checkpoints.load(saved)
    weights.unlink()
    with pytest.raises(UserError, match=r"no such file; .*pytorch_model.bin"):
        checkpoints.load(saved)
    with pytest.raises(UserError, match="no such model directory"):
        checkpoints.load(saved / "nowhere")


class Runs:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_of_another_program(saved):
    (saved / "model.safetensors").unlink()
    (saved / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Runs(saved / "harm")}, protocol=4))
    with pytest.raises(UserError, match=r"damaged, or written by another program\); fetch it again"):
        checkpoints.load(saved)
    assert not (saved / "harm").exists()


def test_no_code_in_a_pickle_is_run(saved):
    as_pickle(saved, {"surplus": Runs(saved / "harm")})
    with pytest.raises(UserError, match=r"could run code: refused") as error:
        checkpoints.load(saved)
    assert "posix.mkdir" in str(error.value)
    assert not (saved / "harm").exists()
    with (saved / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"a": Runs(saved / "harm")}, file)
    with pytest.raises(UserError, match=r"pytorch_model.bin"):
        checkpoints.load(saved)
    assert not (saved / "harm").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({"state_dict": {"a": torch.zeros(2)}, "epoch": 3}, "'state_dict' holds a dict"),
        ({"a": 3.5}, "'a' holds a float"),
        ({3: torch.zeros(2)}, "3 holds a Tensor"),
        ({"a": torch.zeros(2).to_sparse()}, "'a' holds a Tensor"),
        ({"a": torch.zeros(2, device="meta")}, "'a' holds a Tensor"),
        ({"a": np.zeros(2)}, "could run code"),
    ],
)
def test_a_pickle_of_anything_but_named_tensors_is_refused(content, words, saved):
    (saved / "model.safetensors").unlink()
    torch.save(content, saved / "pytorch_model.bin")
    with pytest.raises(UserError, match=words):
        checkpoints.load(saved)


@pytest.mark.parametrize("old", [False, True])
def test_damaged_pickles_end_in_one_line(old, saved):
    as_pickle(saved)
    path = saved / "pytorch_model.bin"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=not old)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    # tensors' bytes make up most of the file: the damage is done to what describes them
    ends = [slice(0, 1500), slice(len(whole) - 3000, len(whole))]
    messages = []
    for number in range(60):
        damaged = bytearray(whole)
        where = ends[number % 2]
        for place in rng.integers(where.start, where.stop, 8):
            damaged[place] = int(rng.integers(256))
        path.write_bytes(damaged if number % 3 else whole[: int(rng.integers(len(whole)))])
        try:
            checkpoints.load(saved)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update({QUERY: "../model-00001-of-00003.safetensors"}), "no file of this folder"),
        (lambda m: m.update({QUERY: "/etc/passwd"}), "no file of this folder"),
        (lambda m: m.update({QUERY: ".."}), "no file of this folder"),
        (lambda m: m.update({QUERY: 3}), "no file of this folder"),
        (lambda m: m.update({QUERY: "model-9.safetensors"}), "model-9.safetensors: no such file"),
        (lambda m: m.clear(), "no index of shards"),
        (lambda m: m.pop(QUERY), f"holds {QUERY}, which"),
        (lambda m: m.update({"surplus": m[QUERY]}), "lacks surplus, which"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(change, words, saved):
    as_shards(saved)
    index = saved / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        checkpoints.load(saved)
    index.write_text("[1]")
    with pytest.raises(UserError, match="no index of shards"):
        checkpoints.load(saved)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(saved):
    wanted = state_of(saved)
    as_shards(saved)
    (saved / "blobs").mkdir()
    for number, shard in enumerate(sorted(saved.glob("model-*.safetensors"))):
        shard.rename(saved / "blobs" / str(number))
        shard.symlink_to(Path("blobs") / str(number))
    assert same(state_of(saved), wanted)


def test_nothing_half_written_is_left_of_a_model_that_can_not_be_saved(saved):
    model = checkpoints.load(saved)
    (saved / "taken").write_text("")
    with pytest.raises(UserError, match="can't write here"):
        checkpoints.save(model, saved / "taken")
    assert SMALL["hidden_size"] == model.config.hidden_size
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors", "taken"]
