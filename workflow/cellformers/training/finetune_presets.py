"""Published settings of fine-tuning, by name: `cellformers finetune --preset cardiomyopathy`.

Numbers are those of Theodoris et al. 2023 (Nature 618, 616, Supplementary Table 2) and of the examples in the
Geneformer repository (cell_classification.ipynb, gene_classification.ipynb). Options given beside a preset override it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cellformers.errors import UserError, did_you_mean
from cellformers.training.settings import Settings

# Donors of the cardiomyopathy atlas (Chaffin et al. 2022) as the example notebook divides them.
_CARDIOMYOPATHY_DONORS = {
    "train": (
        1447, 1600, 1462, 1558, 1300, 1508, 1358, 1678, 1561, 1304, 1610, 1430, 1472, 1707, 1726, 1504, 1425,
        1617, 1631, 1735, 1582, 1722, 1622, 1630, 1290, 1479, 1371, 1549, 1515,
    ),
    "heldout": (1422, 1510, 1539, 1606, 1702),
    "test": (1437, 1516, 1602, 1685, 1718),
}  # fmt: skip

_PAPER = {
    "epochs": 1.0, "learning_rate": 5e-5, "schedule": "linear", "warmup": 500, "weight_decay": 0.001, "batch_cells": 12,
    "keep": "last",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What a published fine-tuning had set."""

    task: str | None
    """cells or genes; None: either."""
    settings: Mapping[str, Any]
    """Fields of `finetune.Settings`."""
    unit: str | None = None
    """The column of units for which `sides` holds."""
    sides: Mapping[str, str] | None = None
    """Side of each unit."""
    label: str | None = None
    """The published column of labels."""
    split: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `sides.SplitSpec`."""


PRESETS = {
    # examples/cell_classification.ipynb, V1-10M: 7,020 steps, test accuracy 0.864, macro F1 0.843
    "cardiomyopathy": Preset(
        task="cells", label="disease", unit="individual",
        settings={
            "epochs": 0.9, "learning_rate": 0.000804, "schedule": "polynomial", "warmup": 1812,
            "weight_decay": 0.258828, "batch_cells": 12, "seed": 73, "freeze_layers": 2, "keep": "last",
        },
        sides={str(d): side for side, donors in _CARDIOMYOPATHY_DONORS.items() for d in donors},
    ),
    # examples/gene_classification.ipynb, V1-10M: AUC 0.914 ± 0.032 over five folds
    "dosage-sensitivity": Preset(
        task="genes", settings={**_PAPER, "freeze_layers": 4, "max_cells": 10_000},
        split={"folds": 5, "heldout": 0.0},
    ),
    # Supplementary Table 2: the same for every task of the paper
    "paper": Preset(task=None, settings=dict(_PAPER)),
}  # fmt: skip


def find_preset(name: str, *, task: str) -> Preset:
    """The preset of that name; UserError where there is none, or it is one for another task."""
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}", fix=did_you_mean(name, PRESETS))
    preset = PRESETS[name]
    if preset.task not in (None, task):
        raise UserError(f"the preset {name} is for the task {preset.task}", fix=f"give --task {preset.task}")
    return preset


def resolve(preset: Preset | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a preset (None: the defaults), overridden by those given that are not None."""
    explicit = {name: value for name, value in given.items() if value is not None}
    published = preset.settings if preset is not None else {}
    long = "warmup" in published and "warmup" not in explicit
    return Settings(**{**published, "long_warmup": long, **explicit})
