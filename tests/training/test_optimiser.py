"""Learning rates and AdamW, against their published definitions."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from cellformers.errors import UserError
from cellformers.training.optimiser import SCHEDULES, adamw, check_schedule, rate_at, set_rate, warmup_steps

OPTIONS = {"steps": 100, "peak": 1.0, "warmup": 10}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "polynomial"])
def test_rates_rise_to_their_peak_and_fall(schedule):
    rates = [rate_at(step, schedule=schedule, **OPTIONS) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert all(a > b > 0 for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.5, abs=0.02)
    assert rates[-1] < 0.02


def test_a_constant_rate_stays():
    rates = [rate_at(step, schedule="constant", **OPTIONS) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert set(rates[9:]) == {1.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rates_after_the_warm_up_are_those_of_transformers(schedule):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=10, num_training_steps=100)
    for step in range(1, 101):
        if step > 10:  # theirs begins at 0, which would be a step without effect
            ours = rate_at(step, schedule=schedule, **OPTIONS)
            assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-9)
        optimizer.step()
        theirs.step()


def test_warm_up_is_a_share_or_a_number():
    assert warmup_steps(0.1, steps=200) == 20
    assert warmup_steps(0, steps=200) == 0
    assert warmup_steps(50, steps=200) == 50
    check_schedule(schedule="cosine", warmup=200.0, steps=200)
    for warmup, words in ((1.5, "neither a share"), (-0.1, "neither a share"), (201, "longer than")):
        with pytest.raises(UserError, match=words):
            check_schedule(schedule="cosine", warmup=warmup, steps=200)
    with pytest.raises(UserError, match="did you mean 'cosine'"):
        check_schedule(schedule="cosin", warmup=0)


def test_matrices_decay_and_biases_do_not():
    layer = nn.Linear(2, 2)
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimizer = adamw([*layer.named_parameters(), ("frozen", frozen)], weight_decay=0.5)
    set_rate(optimizer, 0.1)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


def test_a_step_is_that_of_the_paper():
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = adamw([("w", weight)], weight_decay=0.1, betas=(0.8, 0.9), eps=1e-3)
    gradients = [torch.tensor([[0.5, 1.0]]), torch.tensor([[-0.2, 3.0]])]
    wanted, m, v = weight.detach().clone().double(), 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        set_rate(optimizer, 0.01 * step)
        weight.grad = gradient.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient.double()
        v = 0.9 * v + 0.1 * gradient.double() ** 2
        wanted = wanted * (1 - 0.01 * step * 0.1)
        wanted = wanted - 0.01 * step * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-3)
    assert torch.allclose(weight.double(), wanted, rtol=1e-6)
