"""Adapters: what they train, what they leave alone, and that the merged model is what was trained."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from token_files import make_config, make_vocabulary

from cellformers.errors import UserError
from cellformers.models import checkpoints, layouts
from cellformers.models.geneformer import Geneformer
from cellformers.training.adapters import (
    Adapter,
    adapter_state,
    attach,
    load_adapter_state,
    merged_state,
    quantize_layers,
    trainable_share,
    write_adapter,
)  # fmt: skip

pytest.importorskip("peft", reason="adapters need peft")

LABELS = ("a", "b", "c")
SMALL = Adapter(rank=4, alpha=8, dropout=0.1)


STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # learns the signal in a few steps


def make_network(config=None, **head) -> Geneformer:
    base = layouts.random_model(config or make_config(make_vocabulary()), seed=0)
    return layouts.replace_head(base, seed=0, **(head or {"head": "cell", "labels": LABELS})).eval()


def make_learner() -> Geneformer:
    return make_network(make_config(make_vocabulary(), initializer_range=0.3, **STILL))


def make_batch(lengths=(20, 7, 30), *, seed=0):
    rng = np.random.default_rng(seed)
    cells = [rng.permutation(np.arange(2, 62))[:length] for length in lengths]
    bounds = torch.tensor([0, *np.cumsum(lengths)])
    return torch.from_numpy(np.concatenate(cells)), bounds


def logits(network, tokens, bounds):
    if network.config.head == "gene":
        return network.head(network(tokens, bounds))
    return network.head(network(tokens, bounds, rows=bounds[:-1]))


def plain(network) -> Geneformer:
    return layouts.assemble(network.config, merged_state(network)).eval()


def learn_planted(network, *, steps=90, judged=lambda network: network.eval()):
    """Train on cells whose class is which of three genes stands in them; the accuracy of `judged` on other cells.

    The gene is at a random place behind the first, which alone the head reads: attention has to find it.
    """
    rng = np.random.default_rng(7)

    def draw(n, length=8):
        cells = np.stack([rng.permutation(np.arange(5, 62))[:length] for _ in range(n)])
        classes = rng.integers(3, size=n)
        cells[np.arange(n), rng.integers(1, length, size=n)] = 2 + classes
        return torch.from_numpy(cells.ravel()), torch.arange(n + 1) * length, torch.from_numpy(classes)

    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    network.train()
    for _ in range(steps):
        tokens, bounds, classes = draw(32)
        loss = F.cross_entropy(logits(network, tokens, bounds), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network = judged(network)
    tokens, bounds, classes = draw(300)
    with torch.no_grad():
        return float((logits(network, tokens, bounds).argmax(1) == classes).float().mean())


def test_a_fresh_adapter_changes_nothing():
    network = make_network()
    tokens, bounds = make_batch()
    before = logits(network, tokens, bounds)
    assert torch.equal(logits(attach(network, SMALL, seed=0), tokens, bounds), before)


def test_the_same_seed_gives_the_same_bits_and_no_other_does():
    states = [adapter_state(attach(make_network(), SMALL, seed=seed)) for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    first = next(name for name in states[0] if "lora_A" in name)
    assert not torch.equal(states[0][first], states[2][first])


def test_the_generator_of_the_caller_is_left_as_it_was():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    attach(make_network(), SMALL, seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("targets", [("qkv", "attention_out", "up", "down"), ("qkv",), ("up", "down")])
def test_gradients_reach_the_adapters_and_the_head_alone(targets):
    network = attach(make_network(), Adapter(rank=4, alpha=8, targets=targets), seed=0)
    load_adapter_state(network, {n: torch.randn_like(t) for n, t in adapter_state(network).items()})
    tokens, bounds = make_batch()
    logits(network, tokens, bounds).square().sum().backward()
    with_gradient = {
        n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0
    }
    expected = {
        f"layers.{i}.{target}.{part}.default.weight"
        for i in range(3) for target in targets for part in ("lora_A", "lora_B")
    } | {f"head.{part}.{kind}" for part in ("pooler", "classifier") for kind in ("weight", "bias")}  # fmt: skip
    assert with_gradient == expected == set(adapter_state(network))


def test_a_planted_signal_is_learnt_and_the_base_stays_equal_to_the_bit():
    network = make_learner()
    base = {name: value.clone() for name, value in network.state_dict().items() if "head." not in name}
    accuracy = learn_planted(attach(network, Adapter(rank=4, alpha=8, dropout=0), seed=0))
    now = network.state_dict()
    for name, value in base.items():
        stem, kind = name.rsplit(".", 1)
        assert torch.equal(now.get(name, now.get(f"{stem}.base_layer.{kind}")), value), name
    assert accuracy > 0.9


def test_the_head_alone_does_not_learn_it():
    """So what the planted signal shows is the adapters."""
    network = make_learner().requires_grad_(False)
    network.head.requires_grad_(True)
    assert learn_planted(network) < 0.7


@pytest.mark.parametrize(
    "head",
    [
        {"head": "cell", "labels": LABELS},
        {"head": "gene", "labels": LABELS},
        {"head": "tasks", "tasks": (("t", LABELS), ("u", ("x", "y")))},
    ],
    ids=["cell", "gene", "tasks"],
)
def test_the_merged_network_computes_what_the_adapted_one_does(tmp_path, head):
    network = attach(make_network(**head), SMALL, seed=0)
    load_adapter_state(network, {n: 0.2 * torch.randn_like(t) for n, t in adapter_state(network).items()})
    base = make_network(**head)
    assert merged_state(network).keys() == base.state_dict().keys()
    checkpoints.save(plain(network), tmp_path / "m")
    loaded = checkpoints.load(tmp_path / "m")
    tokens, bounds = make_batch()
    with torch.no_grad():
        adapted, merged, before = (n(tokens, bounds) for n in (network, loaded, base))
        assert (adapted - merged).abs().max() < 2e-5
        assert (adapted - before).abs().max() > 0.1
        assert torch.equal(loaded.head.state_dict().popitem()[1], network.head.state_dict().popitem()[1])


def test_merging_leaves_the_network_as_it_is():
    network = attach(make_network(), SMALL, seed=0)
    load_adapter_state(network, {n: torch.randn_like(t) for n, t in adapter_state(network).items()})
    before = {name: value.clone() for name, value in network.state_dict().items()}
    merged_state(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_training_goes_on_from_a_saved_state(tmp_path):
    network = attach(make_network(), SMALL, seed=0)
    learn_planted(network, steps=3)
    save_file(adapter_state(network), tmp_path / "a.safetensors")
    again = attach(make_network(), SMALL, seed=5)
    load_adapter_state(again, load_file(tmp_path / "a.safetensors"))
    tokens, bounds = make_batch()
    assert torch.equal(logits(again, tokens, bounds), logits(network, tokens, bounds))


@pytest.mark.parametrize("other", [Adapter(rank=8, alpha=8), Adapter(rank=4, alpha=8, targets=("qkv",))])
def test_the_state_of_another_adapter_is_refused(other):
    state = adapter_state(attach(make_network(), other, seed=0))
    with pytest.raises(UserError, match="of another network: layers"):
        load_adapter_state(attach(make_network(), SMALL, seed=0), state)


def test_the_share_of_what_is_trained():
    network = make_network()
    n = sum(p.numel() for p in network.parameters())
    head = sum(p.numel() for p in network.head.parameters())
    attach(network, Adapter(rank=4, alpha=8, targets=("qkv",)), seed=0)
    added = 3 * 4 * (32 + 96)
    assert trainable_share(network) == pytest.approx((head + added) / (n + added))


@pytest.mark.parametrize(
    ("head", "kind"), [("cell", "SequenceClassification"), ("gene", "TokenClassification")]
)
@pytest.mark.parametrize("targets", [("qkv", "attention_out", "up", "down"), ("qkv", "down")])
def test_peft_puts_the_written_adapter_on_a_transformers_model(tmp_path, head, kind, targets):
    transformers = pytest.importorskip("transformers")
    from peft import PeftModel

    adapter = Adapter(rank=4, alpha=8, targets=targets)
    network = make_network(head=head, labels=LABELS)
    checkpoints.save(network, tmp_path / "base")
    attach(network, adapter, seed=0)
    load_adapter_state(network, {n: 0.2 * torch.randn_like(t) for n, t in adapter_state(network).items()})
    write_adapter(network, adapter, tmp_path / "adapter")
    base = getattr(transformers, f"BertFor{kind}").from_pretrained(
        tmp_path / "base", attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokens, bounds = make_batch((25,))
    with torch.no_grad():
        found = theirs(input_ids=tokens[None], attention_mask=torch.ones(1, 25)).logits
        expected = logits(network, tokens, bounds)
    assert (found.reshape(expected.shape) - expected).abs().max() < 2e-5


def test_a_written_adapter_is_small_and_names_no_place(tmp_path):
    network = attach(make_network(head="tasks", tasks=(("t", LABELS),)), SMALL, seed=0)
    write_adapter(network, SMALL, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert config["modules_to_save"] is None
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rank": 0}, "rank 0"),
        ({"alpha": 0}, "alpha 0"),
        ({"dropout": 1.0}, "dropout 1"),
        ({"targets": ("qvk",)}, "did you mean 'qkv'"),
        ({"targets": ()}, "one at least"),
        ({"targets": ("up", "up")}, "once"),
        ({"quantize": "int4"}, "no quantisation 'int4'"),
    ],
)
def test_an_impossible_adapter_is_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        Adapter(**wrong)


@pytest.mark.parametrize(
    ("package", "adapter"), [("peft", SMALL), ("bitsandbytes", Adapter(rank=4, alpha=8, quantize="nf4"))]
)
def test_a_missing_package_is_named(monkeypatch, package, adapter):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs the package {package} .*; pip install {package}"):
        attach(make_network(), adapter, seed=0)


def test_transformer_engine_modules_are_refused():
    network = make_network()
    network.backend = "te"
    with pytest.raises(UserError, match="backend te; choose the backend varlen or sdpa"):
        attach(network, SMALL, seed=0)


def test_four_bits_need_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    with pytest.raises(UserError, match="quantize nf4 needs a CUDA device; choose the accelerator cuda"):
        attach(make_network(), Adapter(quantize="nf4"), seed=0)


# Four bits with the kernels that bitsandbytes has for the CPU. They train and merge as those for CUDA do; what they
# can't do is to train after they have predicted, so the networks below stay in training mode, without dropout.


@pytest.fixture
def quantised():
    """A quantised network, of rows that are whole blocks of 64 numbers, and its original."""
    pytest.importorskip("bitsandbytes", reason="four bits need bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}
    config = make_config(make_vocabulary(), **sizes, **STILL)
    network = make_network(config).train()
    quantize_layers(network)
    return network, make_network(config)


def test_a_quantised_network_is_near_the_original_and_not_it(quantised):
    network, original = quantised
    tokens, bounds = make_batch()
    with torch.no_grad():
        found, expected = network(tokens, bounds), original(tokens, bounds)
    assert 0.01 < (found - expected).norm() / expected.norm() < 0.5
    assert all(layer.qkv.weight.dtype == torch.uint8 for layer in network.layers)


def test_a_quantised_base_learns_and_merges_into_what_was_trained(quantised):
    network, original = quantised
    attach(network, Adapter(rank=4, alpha=8, dropout=0), seed=0)
    packed = {n: p.clone() for n, p in network.named_parameters() if p.dtype == torch.uint8}
    assert len(packed) == 3 * 4
    assert learn_planted(network, judged=plain) > 0.9
    now = dict(network.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in packed.items())
    assert merged_state(network).keys() == original.state_dict().keys()
    tokens, bounds = make_batch()
    with torch.no_grad():
        adapted, merged = network(tokens, bounds), plain(network)(tokens, bounds)
    assert (adapted - merged).norm() / merged.norm() < 2e-2  # the products of training are in bfloat16


def test_the_share_of_what_is_trained_counts_numbers_not_bytes(quantised):
    network, original = quantised
    shares = [trainable_share(attach(n, SMALL, seed=0)) for n in (network, original)]
    assert shares[0] == shares[1]
