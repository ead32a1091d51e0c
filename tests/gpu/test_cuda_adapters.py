"""Adapters on a CUDA device, on a base in 4 bits as well: they learn, resume and merge."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from token_files import make_config, make_vocabulary

from cellformers.models import layouts
from cellformers.training.adapters import (
    Adapter,
    adapter_state,
    attach,
    load_adapter_state,
    merged_state,
)  # fmt: skip

pytest.importorskip("peft", reason="adapters need peft")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

KINDS = ["none", "nf4"]


def make_network():
    config = make_config(
        make_vocabulary(), hidden_size=64, intermediate_size=128, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    base = layouts.random_model(config, seed=0)
    return layouts.replace_head(base, seed=0, head="cell", labels=("a", "b", "c")).to("cuda").eval()


def attached(quantize, *, seed=0):
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes", reason="4 bits need bitsandbytes")
    return attach(make_network(), Adapter(rank=4, alpha=8, dropout=0.0, quantize=quantize), seed=seed)


def logits(network, tokens, bounds):
    return network.head(network(tokens, bounds, rows=bounds[:-1])).float()


def draw(rng, n, length=8):
    """Cells whose class is which of three genes stands in them, at a random place behind the first."""
    cells = np.stack([rng.permutation(np.arange(5, 62))[:length] for _ in range(n)])
    classes = rng.integers(3, size=n)
    cells[np.arange(n), rng.integers(1, length, size=n)] = 2 + classes
    bounds = torch.arange(n + 1) * length
    return torch.from_numpy(cells.ravel()).cuda(), bounds, torch.from_numpy(classes).cuda()


def learn(network, *, steps=90, dtype=torch.float32):
    rng = np.random.default_rng(7)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=3e-3)
    for step in range(steps):
        network.train()
        tokens, bounds, classes = draw(rng, 32)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(logits(network, tokens, bounds), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 30 == 0:  # a measurement on the way must not disturb what follows
            network.eval()
            with torch.no_grad():
                logits(network, tokens, bounds)
    network.eval()
    return draw(rng, 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("quantize", KINDS)
def test_adapters_learn_and_merge_into_what_was_trained(quantize, dtype):
    network = attached(quantize)
    frozen = {n: p.clone() for n, p in network.named_parameters() if not p.requires_grad and p.ndim > 1}
    tokens, bounds, classes = learn(network, dtype=dtype)
    now = dict(network.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    merged = layouts.assemble(network.config, merged_state(network)).to("cuda").eval()
    with torch.inference_mode():
        adapted, plain = logits(network, tokens, bounds), logits(merged, tokens, bounds)
    assert (plain.argmax(1) == classes).float().mean() > 0.9
    off = (adapted - plain).norm() / plain.norm()
    assert off < (2e-2 if quantize == "nf4" else 5e-3)


@pytest.mark.parametrize("quantize", KINDS)
def test_the_first_adapters_are_those_of_the_cpu(quantize):
    found = adapter_state(attached(quantize, seed=3))
    network = attach(make_network().to("cpu"), Adapter(rank=4, alpha=8, dropout=0.0), seed=3)
    expected = adapter_state(network)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("quantize", KINDS)
def test_training_goes_on_from_a_state_taken_to_the_host(quantize):
    network = attached(quantize)
    tokens, bounds, _ = learn(network, steps=3)
    again = attached(quantize, seed=8)
    load_adapter_state(again, adapter_state(network))
    with torch.inference_mode():
        assert torch.equal(logits(again, tokens, bounds), logits(network, tokens, bounds))


def test_four_bits_take_less_memory_than_half_precision():
    network = attached("nf4")
    matrices = [p for p in network.parameters() if p.dtype == torch.uint8]
    taken = sum(p.numel() for p in matrices)
    held = sum(p.quant_state.shape.numel() for p in matrices)
    assert len(matrices) == 3 * 4
    assert taken == held / 2  # bytes: half of one a number
    assert all(p.quant_state.nested and p.quant_state.quant_type == "nf4" for p in matrices)
