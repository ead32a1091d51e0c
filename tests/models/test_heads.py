"""Heads of classifiers: the numbers of transformers' heads, and pooling that never leaves its cell."""

import numpy as np
import pytest
import torch
from token_files import make_config, make_vocabulary

from cellformers.models import layouts
from cellformers.models.heads import CellHead, GeneHead, MaskedHead, TaskHeads, make_head
from cellformers.training.classify import head_logits

TASKS = (("type", ("a", "b", "c")), ("sex", ("f", "m")))


def make_network(**head):
    base = layouts.random_model(make_config(make_vocabulary()), seed=0)
    return layouts.replace_head(base, seed=1, **head).eval()


def pack(cells):
    bounds = np.cumsum([0, *map(len, cells)])
    return torch.from_numpy(np.concatenate(cells)), torch.from_numpy(bounds)


def draw(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.arange(2, 62))[:n] for n in lengths]


def test_the_config_says_which_head():
    config = make_config(make_vocabulary())
    assert isinstance(make_head(config), MaskedHead)
    labels = ("a", "b", "c")
    assert isinstance(make_network(head="cell", labels=labels).head, CellHead)
    assert isinstance(make_network(head="gene", labels=labels).head, GeneHead)
    assert isinstance(make_network(head="tasks", tasks=TASKS).head, TaskHeads)
    assert make_network(head="none").head is None


@pytest.mark.parametrize(
    "head", [{"head": "cell", "labels": ("a", "b", "c")}, {"head": "tasks", "tasks": TASKS},
             {"head": "tasks", "tasks": TASKS, "pooling": "attention"}],
    ids=["cell", "tasks-first", "tasks-attention"],
)  # fmt: skip
def test_a_cell_has_the_same_logits_alone_and_among_others(head):
    network = make_network(**head)
    cells = draw((5, 30, 1, 17))
    with torch.no_grad():
        together = head_logits(network, *pack(cells))
        for i, cell in enumerate(cells):
            for whole, alone in zip(together, head_logits(network, *pack([cell])), strict=True):
                torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-5, atol=1e-6)
    assert [len(t[0]) for t in together] == ([3] if head["head"] == "cell" else [3, 2])


def test_attention_pooling_is_a_softmax_weighted_mean_of_each_cell():
    head = make_network(head="tasks", tasks=TASKS, pooling="attention").head
    hidden = torch.randn(30, 32, generator=torch.Generator().manual_seed(0)) * 20  # scores far apart
    bounds = torch.tensor([0, 4, 5, 30])
    with torch.no_grad():
        pooled = head.pool(hidden, bounds)
        for i, (a, b) in enumerate([(0, 4), (4, 5), (5, 30)]):
            weights = torch.softmax(head.attention(hidden[a:b])[:, 0], dim=0)
            torch.testing.assert_close(pooled[i], weights @ hidden[a:b], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(pooled).all()


def test_attention_pooling_learns_what_to_look_at():
    head = make_network(head="tasks", tasks=TASKS, pooling="attention").head
    hidden = torch.randn(12, 32)
    head.pool(hidden, torch.tensor([0, 5, 12])).square().sum().backward()
    assert head.attention.weight.grad.abs().max() > 0


def test_dropout_only_in_training():
    network = make_network(head="cell", labels=("a", "b"), classifier_dropout=0.9)
    batch = pack(draw((10, 10)))
    with torch.no_grad():
        assert torch.equal(head_logits(network, *batch)[0], head_logits(network, *batch)[0])
        network.train()
        assert not torch.equal(head_logits(network, *batch)[0], head_logits(network, *batch)[0])


def test_logits_of_genes_where_they_are_wanted():
    network = make_network(head="gene", labels=("a", "b", "c"))
    tokens, bounds = pack(draw((20, 6)))
    rows = torch.tensor([0, 7, 21, 25])
    with torch.no_grad():
        (all_rows,) = head_logits(network, tokens, bounds, torch.arange(26))
        (some,) = head_logits(network, tokens, bounds, rows)
    torch.testing.assert_close(some, all_rows[rows], rtol=1e-5, atol=1e-6)
