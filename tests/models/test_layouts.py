"""Names and order of the weights in both layouts, random weights, new heads."""

import pytest
import torch
from published_models import as_te, pack, pad, publish, sequences
from safetensors.torch import load_file
from token_files import make_config, make_vocabulary

from cellformers.errors import UserError
from cellformers.models import checkpoints, layouts

KINDS = ("ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "Model")
HEADS = {
    "masked": {},
    "cell": {"labels": ("a", "b", "c")},
    "gene": {"labels": ("a", "b")},
    "tasks": {"tasks": (("type", ("a", "b")), ("state", ("x", "y", "z"))), "pooling": "attention"},
    "none": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_order_are_those_of_both_publishers(kind, tmp_path):
    publish(tmp_path, kind=kind)
    config = checkpoints.read_config(tmp_path)
    hf = load_file(tmp_path / "model.safetensors")
    te = as_te(hf, config.num_attention_heads)
    for layout, published in (("hf", hf), ("te", te)):
        shapes = {name: tuple(tensor.shape) for name, tensor in published.items()}
        used = {
            name: s
            for name, s in shapes.items()
            if "decoder" not in name and not layouts.is_ignored(name, config)
        }
        assert layouts.published_shapes(config, layout) == used
        assert layouts.detect(shapes) == layout
    states = [layouts.from_published(t, config, layout=name) for name, t in (("hf", hf), ("te", te))]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for layout, published in (("hf", hf), ("te", te)):
        back = layouts.to_published(states[0], config, layout=layout)
        assert all(torch.equal(back[name], published[name]) for name in back)
        assert all(tensor.is_contiguous() for tensor in back.values())


def test_query_and_key_of_several_dtypes_are_not_rounded_silently(tmp_path):
    publish(tmp_path)
    config = checkpoints.read_config(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.1.attention.self.key.weight"
    tensors[name] = tensors[name].bfloat16()
    with pytest.raises(UserError, match=r"layer.1.attention.self.query.weight and its key and value differ"):
        layouts.from_published(tensors, config)


def test_what_we_save_transformers_loads(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = publish(tmp_path / "theirs")
    checkpoints.save(checkpoints.load(tmp_path / "theirs"), tmp_path / "ours")
    loaded, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("head", HEADS)
def test_random_weights_depend_on_the_seed_alone(head, tmp_path):
    config = make_config(make_vocabulary(), head=head, **HEADS[head])
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        checkpoints.save(layouts.random_model(config, seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    prefix = "" if head == "none" else "bert."
    weights = load_file(tmp_path / "a" / "model.safetensors")
    query = weights[f"{prefix}encoder.layer.0.attention.self.query.weight"]
    assert abs(float(query.std()) - 0.1) < 0.01
    assert not weights[f"{prefix}embeddings.word_embeddings.weight"][0].any()
    assert checkpoints.load(tmp_path / "a").config == config


@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_shares_the_encoder(head):
    model = layouts.random_model(make_config(make_vocabulary()), seed=0)
    new, same, other = (
        layouts.replace_head(model, seed=seed, head=head, **HEADS[head]) for seed in (1, 1, 2)
    )
    assert (new.config.head, new.backend) == (head, model.backend)
    assert new.words.weight.data_ptr() == model.words.weight.data_ptr()
    for name, value in new.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, model.state_dict()[name])
            continue
        assert torch.equal(value, same.state_dict()[name])
        if value.ndim == 2:
            assert not torch.equal(value, other.state_dict()[name])
    assert all(parameter.requires_grad for parameter in new.parameters())


def test_a_new_cell_head_is_read_by_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = layouts.random_model(make_config(make_vocabulary()), seed=0)
    new = layouts.replace_head(model, seed=1, head="cell", labels=("nf", "hcm", "dcm")).eval()
    checkpoints.save(new, tmp_path)
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == {0: "nf", 1: "hcm", 2: "dcm"}
    parts = sequences((20, 9), 60)
    flat, bounds = pack(parts)
    with torch.inference_mode():
        mine = new.head(new(flat, bounds, rows=bounds[:-1]))
        assert torch.allclose(mine, theirs.eval()(**pad(parts)).logits, atol=5e-6)
