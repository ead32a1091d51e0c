"""Settings of pretraining, and named sets of them: the published recipes.

    settings = resolve("geneformer-v2-104m", {"epochs": 1})

Architectures are those of the published config.json files. Hyperparameters of the older models are those of their
training_args.bin, those of V2-104M the ones its run was named after; what is published of no run is listed in
`Preset.assumed`, with what it follows. Batches are given in cells, as they were published (cells a GPU
times GPUs). Seeds are not part of a preset: other code draws other numbers from the same seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cellformers.errors import UserError, did_you_mean
from cellformers.models.batches import precision_name
from cellformers.training.optimiser import check_schedule

PRECISIONS = ("float32", "bfloat16")
ARCHITECTURE = ("layers", "hidden_size", "heads", "intermediate_size", "max_positions")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what pretraining gives, apart from tokens and vocabulary.

    The defaults are the preset "small", for a few thousand cells and a minute.
    """

    layers: int = 2
    hidden_size: int = 128
    heads: int = 4
    intermediate_size: int = 256
    max_positions: int | None = None
    """Longest cell; None: the context length of the vocabulary."""
    dropout: float = 0.0
    """Of hidden states and attention weights."""
    initializer_range: float = 0.02
    """SD of the initial weights."""
    steps: int | None = None
    """Optimiser steps; 0 writes the random network."""
    epochs: float | None = None
    """Passes over the training cells, instead of steps."""
    batch_tokens: int = 4096
    """Most tokens of a micro-batch."""
    batch_cells: int | None = None
    """Cells of a step, over all processes; None: a step is `accumulate` full micro-batches."""
    accumulate: int = 1
    """Micro-batches of a step, over all processes."""
    learning_rate: float = 2e-3
    """At its peak."""
    warmup: float = 0.1
    """Share of the steps (under 1), or number of steps, over which the rate rises."""
    schedule: str = "cosine"
    """How it falls then: see `optimiser.SCHEDULES`."""
    weight_decay: float = 0.01
    """Of matrices, not of biases or norms."""
    beta1: float = 0.9
    """Of AdamW, as are the next two."""
    beta2: float = 0.98  # as RoBERTa (Liu et al. 2019): learns faster in a few hundred steps than 0.999
    eps: float = 1e-8
    clip: float = 1.0
    """Largest norm of the gradient."""
    mask_probability: float = 0.15
    """Share of the genes to guess."""
    heldout_fraction: float = 0.1
    """Share of cells that are not trained on, at most 5,000 cells."""
    measurements: int = 5
    """Times the held-out loss is measured, evenly, the last after the last step."""
    precision: str = "float32"
    """Of matrix products; weights and their updates are float32 in any case."""
    seed: int = 0


@dataclass(frozen=True)
class Preset:
    """A named set of settings."""

    settings: Mapping[str, Any]
    assumed: Mapping[str, str] = field(default_factory=dict)
    """Settings that are published nowhere, and what they follow."""
    continues: str | None = None
    """The model whose weights it starts from."""


_COMMON = {
    "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "clip": 1.0, "weight_decay": 0.001, "epochs": 3.0,
    "mask_probability": 0.15, "initializer_range": 0.02, "precision": "float32", "batch_tokens": 16_384,
}  # fmt: skip
_V1_6 = {
    "layers": 6, "hidden_size": 256, "heads": 4, "intermediate_size": 512, "max_positions": 2048, "dropout": 0.02,
    "batch_cells": 144, "learning_rate": 1e-3, "schedule": "linear", "warmup": 10_000,
}  # fmt: skip
_V1_12 = {
    **_V1_6, "layers": 12, "hidden_size": 512, "heads": 8, "intermediate_size": 1024, "batch_cells": 48,
    "learning_rate": 5e-4,
}  # fmt: skip
_95M_12 = {
    **_V1_12, "max_positions": 4096, "batch_cells": 32, "schedule": "cosine", "warmup": 5000
}  # fmt: skip
_V2_104M = {
    "layers": 12, "hidden_size": 768, "heads": 12, "intermediate_size": 3072, "max_positions": 4096, "dropout": 0.1,
    "batch_cells": 144, "learning_rate": 2e-4, "schedule": "cosine", "warmup": 0.007,
}  # fmt: skip
_V2_316M = {**_V2_104M, "layers": 18, "hidden_size": 1152, "heads": 18, "intermediate_size": 4608}

_UNNAMED = {
    "batch_cells": "18 cells a GPU are, times 8 GPUs as for gf-12L-95M",
    **dict.fromkeys(("weight_decay", "beta1", "beta2", "eps", "clip", "precision"), "as for gf-12L-95M"),
}
_UNPUBLISHED = {
    **_UNNAMED,
    "batch_cells": "as for geneformer-v2-104m",
    **dict.fromkeys(("learning_rate", "schedule", "warmup", "epochs"), "as for geneformer-v2-104m"),
}

PRESETS: dict[str, Preset] = {
    "small": Preset({"steps": 2000}),
    "geneformer-v1-10m": Preset(_COMMON | _V1_6),
    "gf-12L-30M": Preset(_COMMON | _V1_12),
    "gf-12L-95M": Preset(_COMMON | _95M_12),
    "geneformer-v2-104m": Preset(_COMMON | _V2_104M, _UNNAMED),
    "geneformer-v2-104m-clcancer": Preset(_COMMON | _V2_104M, _UNPUBLISHED, "geneformer-v2-104m"),
    "geneformer-v2-316m": Preset(_COMMON | _V2_316M, _UNPUBLISHED),
}


def resolve(preset: str, options: Mapping[str, Any]) -> Settings:
    """The settings of a preset with some given otherwise; None stands for "as in the preset".

    Raises
    ------
    UserError
        If there is no such preset or option, or a value is out of range.
    """
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}", fix=did_you_mean(preset, PRESETS))
    known = [f.name for f in fields(Settings)]
    for name in options:
        if name not in known:
            raise UserError(f"no setting {name!r}", fix=did_you_mean(name, known))
    given = {name: value for name, value in options.items() if value is not None}
    if "steps" in given and "epochs" in given:
        raise UserError("how long to train: give either steps or epochs")
    if "accumulate" in given and "batch_cells" in given:
        raise UserError("how large a step is: give either accumulate or batch_cells")
    settings = Settings(**PRESETS[preset].settings)
    # a length or size that is given stands in for the preset's, in whichever way that is put
    if "steps" in given or "epochs" in given:
        settings = replace(settings, steps=None, epochs=None)
    if "accumulate" in given:
        settings = replace(settings, batch_cells=None)
    settings = replace(settings, **given)
    settings = replace(settings, precision=precision_name(settings.precision))
    _check(settings)
    return settings


def assumptions(preset: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Of a preset's settings those in use that are published nowhere, and what they follow."""
    return {name: source for name, source in PRESETS[preset].assumed.items() if options.get(name) is None}


def _check(settings: Settings) -> None:
    for name in ("mask_probability", "heldout_fraction"):
        value = getattr(settings, name)
        if not 0 < value < 1:
            raise UserError(f"{name} is {value:g}, not between 0 and 1")
    for name in ("batch_tokens", "batch_cells", "accumulate", "measurements", "clip", "eps"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value:g}, not above 0")
    for name in ("steps", "epochs", "learning_rate", "weight_decay", "seed"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{name} is {value:g}, not a number from 0")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name):g}, not from 0 to under 1")
    if settings.precision not in PRECISIONS:
        raise UserError(f"no training in {settings.precision}", fix=f"choose {' or '.join(PRECISIONS)}")
    check_schedule(schedule=settings.schedule, warmup=settings.warmup, steps=settings.steps)
