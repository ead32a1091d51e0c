"""AdamW and learning-rate schedules, as pretraining and fine-tuning share them.

optimizer = adamw(network.named_parameters(), weight_decay=0.01)
set_rate(optimizer, rate_at(1, steps=100, peak=1e-3, warmup=10, schedule="cosine"))
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from cellformers.errors import UserError, did_you_mean

SCHEDULES = ("cosine", "linear", "polynomial", "constant")
POLYNOMIAL_END = 1e-7  # where transformers' polynomial decay, of power 1, ends


def rate_at(step: int, *, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Learning rate of optimiser step `step`, counted from 1.

    It rises linearly over `warmup` steps, the last of which has `peak`, then falls so that it would reach 0
    (polynomial: 1e-7) one step behind the last; "constant" stays.
    """
    if step <= warmup:
        return peak * step / warmup
    if schedule == "constant":
        return peak
    done = (step - 1 - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * (0.5 * (1 + math.cos(math.pi * done)))
    end = POLYNOMIAL_END if schedule == "polynomial" else 0.0
    return end + (peak - end) * (1 - done)


def warmup_steps(warmup: float, *, steps: int) -> int:
    """Steps of warm-up, given as a share of the steps (under 1) or as their number."""
    return round(warmup * steps) if warmup < 1 else int(warmup)


def check_schedule(*, schedule: str, warmup: float, steps: int | None = None) -> None:
    """UserError for a schedule that is not there, or a warm-up that is neither a share nor a number of steps."""
    if schedule not in SCHEDULES:
        raise UserError(f"no schedule {schedule!r}", fix=did_you_mean(schedule, SCHEDULES))
    if not warmup >= 0 or (warmup >= 1 and warmup != round(warmup)):
        raise UserError(
            f"warmup is {warmup:g}, neither a share of the steps from 0 to under 1 nor a number of steps"
        )
    if steps and warmup_steps(warmup, steps=steps) > steps:
        raise UserError(f"warmup of {warmup:g} steps is longer than the training of {steps}", fix="lower it")


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    learning_rate: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices, but neither biases nor norms.

    Parameters without `requires_grad` are left out; at least one has to have it.
    """
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=learning_rate, betas=betas, eps=eps, fused=fused,
    )  # fmt: skip


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate
