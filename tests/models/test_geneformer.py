"""The network against transformers, its file layout, and independence of the batch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from token_files import make_config, make_vocabulary

from cellformers.errors import UserError
from cellformers.models import checkpoints, layouts
from cellformers.models.bert_config import Config

transformers = pytest.importorskip("transformers")

COMMON = {"hidden_act": "relu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
V1 = {
    "vocab_size": 25426, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "intermediate_size": 512, "max_position_embeddings": 2048, **COMMON,
}  # fmt: skip
V2 = {
    "vocab_size": 20275, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 4096, **COMMON,
}  # fmt: skip
SMALL = {
    "vocab_size": 90, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 80, "max_position_embeddings": 64, **COMMON,
}  # fmt: skip


def reference(shape, folder, **changes):
    """A transformers model with random weights, none of them 0 or 1, saved as it saves itself."""
    torch.manual_seed(3)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.1)
    model.save_pretrained(folder)
    return model


def sequences(lengths, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (n,), generator=generator) for n in lengths]


def pack(parts):
    return torch.cat(parts), torch.tensor([0, *[len(p) for p in parts]]).cumsum(0)


@pytest.mark.parametrize(
    ("shape", "lengths"), [(V1, (2048, 7, 300)), (V2, (150, 31))], ids=["V1-10M", "V2-104M"]
)
def test_every_hidden_state_is_that_of_transformers(shape, lengths, tmp_path):
    theirs = reference(shape, tmp_path)
    ours = checkpoints.load(tmp_path)
    parts = sequences(lengths, shape["vocab_size"])
    flat, bounds = pack(parts)
    with torch.inference_mode():
        wanted = [theirs.bert(part[None], output_hidden_states=True).hidden_states for part in parts]
        for layer in range(-shape["num_hidden_layers"], 1):
            hidden = ours(flat, bounds, layer=layer).split(list(lengths))
            for mine, states in zip(hidden, wanted, strict=True):
                assert (mine - states[shape["num_hidden_layers"] + layer][0]).abs().max() <= 2e-5


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_logits_are_those_of_transformers(act, tmp_path):
    theirs = reference(SMALL, tmp_path, hidden_act=act)
    ours = checkpoints.load(tmp_path)
    (part,) = sequences((40,), 90)
    with torch.inference_mode():
        logits = ours.logits(ours(part, torch.tensor([0, 40])))
        assert torch.allclose(logits, theirs(part[None]).logits[0], atol=2e-5)


def test_a_cell_alone_equals_the_same_cell_in_a_batch():
    config = make_config(make_vocabulary(), hidden_size=64, max_position_embeddings=2048)
    model = layouts.random_model(config, seed=1).eval()
    parts = sequences((1, 5, 11, 16, 200, 0, 700), 60)
    flat, bounds = pack(parts)
    with torch.inference_mode():
        together = model(flat, bounds).split([len(part) for part in parts])
        for part, mine in zip(parts, together, strict=True):
            assert torch.equal(model(part, torch.tensor([0, len(part)])), mine)


def test_no_token_attends_beyond_its_cell():
    config = make_config(make_vocabulary(), initializer_range=0.5)
    model = layouts.random_model(config, seed=1).eval()
    first, second, other = sequences((20, 30, 30), 60)
    with torch.inference_mode():
        a, b = (model(*pack([first, part])) for part in (second, other))
    assert torch.equal(a[:20], b[:20])
    assert not torch.allclose(a[20:], b[20:])


@pytest.mark.parametrize("layer", [0, -1, -3])
def test_wanted_rows_equal_those_of_the_whole(layer):
    model = layouts.random_model(make_config(make_vocabulary()), seed=1).eval()
    flat, bounds = pack(sequences((20, 30, 3), 60))
    rows = torch.tensor([0, 4, 19, 20, 52])
    with torch.inference_mode():
        whole = model(flat, bounds, layer=layer)
        assert torch.allclose(model(flat, bounds, layer=layer, rows=rows), whole[rows], atol=2e-6)


def test_gradients_of_packed_cells_are_the_sum_over_cells_alone():
    model = layouts.random_model(make_config(make_vocabulary()), seed=1).train()
    model.config = make_config(make_vocabulary(), hidden_dropout_prob=0.0)
    for layer in model.layers:
        layer.dropout = layer.attention_dropout = 0.0
    parts = sequences((20, 30), 60)
    model.requires_grad_(True)
    model(*pack(parts)).square().sum().backward()
    packed = model.layers[0].qkv.weight.grad.clone()
    model.zero_grad()
    for part in parts:
        model(*pack([part])).square().sum().backward()
    assert torch.allclose(packed, model.layers[0].qkv.weight.grad, rtol=1e-3, atol=1e-4)


def test_what_we_save_transformers_loads(tmp_path):
    theirs = reference(SMALL, tmp_path / "theirs")
    checkpoints.save(checkpoints.load(tmp_path / "theirs"), tmp_path / "ours")
    loaded, info = transformers.BertForMaskedLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    again = load_file(tmp_path / "ours" / "model.safetensors")
    assert list(layouts.published_shapes(checkpoints.read_config(tmp_path / "ours"))) == [
        name
        for name in layouts.published_shapes(checkpoints.read_config(tmp_path / "theirs"))
        if name in again
    ]


def test_random_weights_depend_on_the_seed_alone(tmp_path):
    config = make_config(make_vocabulary())
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        checkpoints.save(layouts.random_model(config, seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    weights = load_file(tmp_path / "a" / "model.safetensors")
    query = weights["bert.encoder.layer.0.attention.self.query.weight"]
    assert abs(float(query.std()) - 0.1) < 0.01
    assert not weights["bert.embeddings.word_embeddings.weight"][0].any()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoints.save(layouts.random_model(make_config(make_vocabulary()), seed=0), tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_older_releases_leftovers_and_stored_ties_are_tolerated(saved):
    before = checkpoints.load(saved).state_dict()

    def add(tensors):
        tensors["bert.embeddings.position_ids"] = torch.arange(128)[None]
        tensors["bert.pooler.dense.weight"] = torch.zeros(32, 32)
        tensors["bert.pooler.dense.bias"] = torch.zeros(32)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()

    rewrite(saved, add)
    after = checkpoints.load(saved).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


KEY = "bert.encoder.layer.1.attention.self.key.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(KEY), ["lacks", KEY]),
        (
            lambda t: t.update({"bert.encoder.layer.3.output.dense.bias": torch.zeros(32)}),
            ["layer.3", "account"],
        ),
        (lambda t: t.update({KEY: torch.zeros(32, 16)}), [KEY, "[32, 16]", "[32, 32]"]),
        (lambda t: t.update({KEY + "s": t.pop(KEY)}), [f"lacks the tensor {KEY}", f"did you mean '{KEY}s'"]),
        (lambda t: t.update({"cls.predictions.decoder.weight": torch.ones(62, 32)}), ["decoder", "differs"]),
    ],
    ids=["missing", "extra", "misshapen", "renamed", "untied"],
)
def test_a_wrong_tensor_is_named(saved, change, words):
    rewrite(saved, change)
    with pytest.raises(UserError) as error:
        checkpoints.load(saved)
    assert all(word in str(error.value) for word in [*words, "model.safetensors"])


def test_truncated_and_missing_weights(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="not readable as safetensors"):
        checkpoints.load(saved)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        checkpoints.load(saved)
    with pytest.raises(UserError, match="no such model directory"):
        checkpoints.load(saved / "nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "not the config of a BERT encoder"),
        ({"hidden_size": 30}, "no multiple"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"intermediate_size": None}, "lacks intermediate_size"),
        ({"hidden_act": "swish"}, "relu and gelu"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
        ({"hidden_dropout_prob": True}, "hidden_dropout_prob"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"pad_token_id": 5000}, "pad_token_id"),
    ],
)
def test_a_config_that_can_not_be_is_refused(saved, changes, words):
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=words):
        checkpoints.load(saved)


def test_the_config_survives_writing_and_other_json_is_refused():
    config = make_config(make_vocabulary())
    assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(UserError, match="BERT"):
        Config.from_dict([1, 2])


def test_layers_that_do_not_exist(saved):
    model = checkpoints.load(saved)
    for layer in (1, -4):
        with pytest.raises(UserError, match=f"no layer {layer}"):
            model(torch.tensor([2, 3]), torch.tensor([0, 2]), layer=layer)
