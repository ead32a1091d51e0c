"""The network against transformers at the published sizes, and independence of the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from published_models import SMALL, V1_10M, V2_104M, V2_316M, pack, pad, publish, sequences
from token_files import make_config, make_vocabulary

from cellformers.errors import UserError
from cellformers.models import checkpoints, layouts
from cellformers.models.bert_config import Config
from cellformers.verify import our_states


def compare(theirs, ours, parts):
    """Every hidden state of every layer within 5e-5 of transformers' of the cell alone."""
    with torch.inference_mode():
        mine = our_states(ours, [part.numpy() for part in parts])
        wanted = [theirs.bert(part[None], output_hidden_states=True).hidden_states for part in parts]
    assert len(mine) == ours.config.num_hidden_layers + 2  # embedding layer, encoder layers, logits
    for layer, states in enumerate(zip(*wanted, strict=True)):
        assert (mine[layer] - torch.cat([state[0] for state in states])).abs().max() <= 5e-5
    assert mine[-2].std() > 0.1


@pytest.mark.parametrize(
    ("shape", "lengths"), [(V1_10M, (2048, 7, 300)), (V2_104M, (150, 31))], ids=["V1-10M", "V2-104M"]
)
def test_every_hidden_state_at_the_published_sizes_is_that_of_transformers(shape, lengths, tmp_path):
    theirs = publish(tmp_path, shape)
    compare(theirs, checkpoints.load(tmp_path), sequences(lengths, shape["vocab_size"]))


def test_every_hidden_state_of_the_largest_model_is_that_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    # made by us and loaded by transformers, which takes half as long as the other way round
    ours = layouts.random_model(Config(**V2_316M), seed=0).eval().requires_grad_(False)
    for name, parameter in ours.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.1)
    checkpoints.save(ours, tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    compare(theirs, ours, sequences((90, 12), V2_316M["vocab_size"]))


def test_layers_are_counted_from_the_last(tmp_path):
    theirs = publish(tmp_path)
    ours = checkpoints.load(tmp_path)
    flat, bounds = pack(sequences((20, 33)))
    with torch.inference_mode():
        states = our_states(ours, [part.numpy() for part in flat.split([20, 33])])
        for layer in range(-3, 1):
            assert torch.equal(ours(flat, bounds, layer=layer), states[3 + layer])
        assert torch.allclose(states[0][:20], theirs.bert.embeddings(flat[None, :20])[0], atol=1e-6)
    for layer in (1, -4):
        with pytest.raises(UserError, match=f"no layer {layer}"):
            ours(flat, bounds, layer=layer)


@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_logits_are_those_of_transformers(act, tmp_path):
    theirs = publish(tmp_path, hidden_act=act)
    ours = checkpoints.load(tmp_path)
    (part,) = sequences((40,))
    with torch.inference_mode():
        logits = ours.logits(ours(part, torch.tensor([0, 40])))
        assert torch.allclose(logits, theirs(part[None]).logits[0], atol=2e-5)


@pytest.mark.parametrize("labels", [2, 5])
def test_cell_classifiers_give_the_logits_of_transformers(labels, tmp_path):
    theirs = publish(tmp_path, kind="ForSequenceClassification", num_labels=labels)
    ours = checkpoints.load(tmp_path)
    parts = sequences((40, 3, 64))
    flat, bounds = pack(parts)
    with torch.inference_mode():
        logits = ours.head(ours(flat, bounds, rows=bounds[:-1]))
        wanted = theirs(**pad(parts)).logits
    assert logits.shape == (3, labels)
    assert torch.allclose(logits, wanted, atol=5e-6)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2


def test_gene_classifiers_give_the_logits_of_transformers(tmp_path):
    theirs = publish(tmp_path, kind="ForTokenClassification", num_labels=3)
    ours = checkpoints.load(tmp_path)
    parts = sequences((40, 3, 64))
    batch = pad(parts)
    with torch.inference_mode():
        logits = ours.head(ours(*pack(parts)))
        wanted = theirs(**batch).logits[batch["attention_mask"].bool()]
    assert logits.shape == (107, 3)
    assert torch.allclose(logits, wanted, atol=5e-6)


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


def test_half_precision_is_near(tmp_path):
    publish(tmp_path)
    cells = [part.numpy() for part in sequences((40, 9))]
    with torch.inference_mode():
        exact = our_states(checkpoints.load(tmp_path), cells)
        for dtype in (torch.bfloat16, torch.float16):
            rounded = our_states(checkpoints.load(tmp_path, dtype=dtype), cells)
            assert rounded[-1].dtype == dtype
            for mine, wanted in zip(rounded, exact, strict=True):
                assert (mine.float() - wanted).norm() <= 2e-2 * wanted.norm()


def test_the_config_of_a_model_is_that_of_its_folder(tmp_path):
    publish(tmp_path)
    config = checkpoints.read_config(tmp_path)
    assert {name: getattr(config, name) for name in SMALL} == SMALL
    assert checkpoints.load(tmp_path).config == config
    assert replace(config, hidden_act="gelu") != config
    assert np.isclose(config.layer_norm_eps, 1e-12)
