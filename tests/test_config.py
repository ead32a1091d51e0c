"""The config: what it accepts, what it says of mistakes, and that its generated texts are current."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from cellformers import config, config_docs
from cellformers.config.finetuning import OF_ONE_TASK, Preset
from cellformers.errors import UserError
from cellformers.training.finetune_presets import PRESETS

ROOT = Path(__file__).parent.parent
MINIMAL = {"datasets": {"mine": {"path": "my.h5ad"}}}


def change(**sections: object) -> dict[str, object]:
    return {**MINIMAL, **sections}


def cells_of(**keys: object) -> dict[str, object]:
    """A config with one benchmark of cells."""
    return change(benchmarks={"b": {"task": "cells", "train": ["mine"], "label": "x"} | keys})


def genes_of(**keys: object) -> dict[str, object]:
    """A config with one benchmark of genes."""
    return change(benchmarks={"b": {"task": "genes", "dataset": "mine"} | keys})


PUBLISHED = {"metric": "macro_f1", "value": 0.8, "source": "a paper"}


def refusal(values: dict[str, object]) -> str:
    with pytest.raises(UserError) as caught:
        config.load(values, path="my.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_are_valid(path: Path) -> None:
    assert config.load_file(path).datasets


def test_minimal_config_gets_defaults() -> None:
    loaded = config.load(MINIMAL)
    assert loaded.accelerator == "cpu"
    assert loaded.datasets["mine"].qc.method == "sd"
    assert loaded.datasets["mine"].shards == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (change(acelerator="cpu"), "unknown key 'acelerator'; did you mean 'accelerator'?"),
        (
            {"datasets": {"m": {"path": "a", "shard": 2}}},
            "unknown key 'datasets.m.shard'; did you mean 'shards'?",
        ),
        ({"datasets": {"m": {"path": "a", "qc": {"metod": "sd"}}}}, "did you mean 'method'?"),
        (change(embeddings={"e": {"modell": "x", "model": "x"}}), "did you mean 'model'?"),
        (
            change(
                benchmarks={
                    "b": {"task": "genes", "dataset": "mine", "labels": {"path": "x", "positiv": "a"}}
                }
            ),
            "did you mean 'positive'?",
        ),
        (
            change(benchmarks={"b": {"task": "cells", "train": ["mine"], "lable": "x"}}),
            "did you mean 'label'?",
        ),
        (
            change(embeddings={"e": {"model": "genformer"}}, models={"geneformer": {"path": "x"}}),
            "'geneformer'",
        ),
        ({"datasets": {"m": {"path": "a", "simulated": "atlas"}}}, "exactly one of path, samples, simulated"),
        ({"datasets": {"models": {"path": "a"}}}, "taken by a results folder"),
        ({"datasets": {"a/b": {"path": "a"}}}, "names are made of letters"),
        ({"datasets": {"logs": {"path": "a"}}}, "taken by a results folder"),
        ({"datasets": {"m": {"path": "a", "qc": "mad"}}}, "datasets.m.qc: has to be a section"),
        ({"datasets": {"m": {"path": "a", "qc": {"min_counts": 5}}}}, "used by method: fixed only"),
        (change(embeddings={"permuted": {"model": "x"}}, models={"x": {"path": "y"}}), "taken by a method"),
        (
            change(benchmarks={"b": {"task": "cells", "train": "mine", "label": "x"}}),
            "b.train: has to be a list",
        ),
        (
            change(
                benchmarks={
                    "genes": {"task": "genes", "dataset": "mine", "labels": {"path": "x", "positive": True}}
                }
            ),
            "benchmarks.genes.labels.positive: has to be text; put it in quotes",
        ),
        (
            change(benchmarks={"b": {"task": "cells", "train": ["mine"], "test": ["mine"], "label": "x"}}),
            "in train and",
        ),
        (
            change(models={"m": {"path": "a", "checkpoint": "b"}}),
            "exactly one of checkpoint, path, pretrain, finetune",
        ),
        (change(models={"m": {"checkpoint": "geneformer-v2-104"}}), "did you mean 'geneformer-v2-104m'?"),
        (change(models={"m": {"path": "a", "revision": "main"}}), "revision is of a checkpoint"),
        (change(models={"m": {"pretrain": {"steps": 5}}}), "needs a vocabulary, or a model to continue from"),
        (
            change(
                models={
                    "m": {"path": "a"},
                    "f": {"finetune": {"model": "m", "datasets": ["mine"], "labl": "x"}},
                }
            ),
            "did you mean 'label'?",
        ),
        (
            change(
                models={
                    "a": {"pretrain": {"continue_from": "b"}},
                    "b": {"finetune": {"model": "a", "datasets": ["mine"], "label": "x"}},
                }
            ),
            "start from each other",
        ),
        (
            change(
                models={
                    "f": {"finetune": {"model": "f", "datasets": ["mine"], "label": "x", "task": "genes"}}
                }
            ),
            "needs a table of labels",
        ),
        (
            change(
                models={
                    "m": {"path": "a"},
                    "f": {"finetune": {"model": "m", "datasets": ["mine"], "label": "x"}},
                },
                embeddings={"e": {"model": "f"}},
                benchmarks={"b": {"task": "cells", "train": ["mine"], "label": "y", "embeddings": ["e"]}},
            ),
            "was fine-tuned on labels of mine",
        ),
        (change(datasets={"d": {"deposit": "gse12909"}}), "no deposit 'gse12909' is registered"),
        (change(datasets={"d": {"deposit": "gse129096", "part": "drp"}}), "did you mean 'drop'?"),
        (
            change(datasets={"d": {"path": "a", "where": {"day": []}}}),
            "datasets.d.where.day: List should have",
        ),
        (cells_of(baselines=["pca_hvg", "pca_hvg"]), "benchmarks.b.baselines: names 'pca_hvg' twice"),
        (cells_of(train=["mine", "mine"]), "benchmarks.b.train: names 'mine' twice"),
        (cells_of(baselines=["harmony"]), "harmony has one batch, the dataset: name a column as batch"),
        (cells_of(finetune={"preset": "paper"}), "benchmarks.b.finetune.models: is missing"),
        (
            cells_of(finetune={"models": ["m"], "preset": "papper"}),
            "benchmarks.b.finetune.preset: Input should",
        ),
        (
            cells_of(finetune={"models": ["m"], "preset": "dosage-sensitivity"}),
            "the preset dosage-sensitivity is not for the task cells",
        ),
        (cells_of(finetune={"models": ["m"], "max_cells": 9}), "leave max_cells out, every cell"),
        (cells_of(across=True), "across needs test and unit"),
        (cells_of(published=[PUBLISHED | {"source": "a|b"}]), "are without |"),
        (
            cells_of(published=[PUBLISHED | {"value": 86.4}]),
            "published.0.value: Input should be less than or equal",
        ),
        (
            cells_of(published=[PUBLISHED | {"metric": "makro_f1"}]),
            "benchmarks.b.published: no table shows 'makro_f1'; did you mean 'macro_f1'?",
        ),
        (
            genes_of(labels={"deposit": "tf-range", "part": "all", "positive": "long"}),
            "benchmarks.b.labels.positive: no class is 'long'; there is: short_range, long_range",
        ),
        (
            genes_of(labels={"deposit": "tf-range", "part": "all", "group": "family"}),
            "leave gene, label and group out",
        ),
        (
            genes_of(labels={"path": "x", "group": "pair"}, match="expression"),
            "match makes groups of its own",
        ),
        ({}, "datasets"),
        ({"datasets": {"m": {"path": "a", "shards": 0}}}, "greater than or equal to 1"),
    ],
)
def test_mistakes_are_named_in_one_line(values: dict[str, object], said: str) -> None:
    assert said in refusal(values)


def test_models_of_one_line_read_one_vocabulary() -> None:
    loaded = config.load(
        change(
            models={
                "v2": {"checkpoint": "geneformer-v2-104m"},
                "further": {"pretrain": {"continue_from": "v2"}},
                "tuned": {"finetune": {"model": "further", "datasets": ["mine"], "label": "x"}},
                "own": {"path": "folder"},
            }
        )
    )
    assert [loaded.vocabulary_of(name) for name in loaded.models] == ["gc104M"] * 3 + ["own"]


def test_presets_of_the_config_are_those_there_are() -> None:
    tasks = {name: preset.task for name, preset in PRESETS.items()}
    assert tasks == {name: OF_ONE_TASK.get(name) for name in get_args(Preset)}


def test_what_a_model_was_taught_is_told() -> None:
    tuned = {"model": "m", "datasets": ["mine"], "label": "x"}
    loaded = config.load(
        {
            "datasets": {name: {"path": f"{name}.h5ad"} for name in ("mine", "other")},
            "models": {
                "m": {"path": "m"},
                "cells": {"finetune": tuned},
                "genes": {"finetune": {**tuned, "task": "genes", "labels": "genes.csv"}},
                "later": {"pretrain": {"continue_from": "genes"}},
            },
            "benchmarks": {
                "same": {"task": "cells", "train": ["mine"], "label": "y"},
                "transfer": {"task": "cells", "train": ["other"], "test": ["mine"], "label": "y"},
                "elsewhere": {"task": "cells", "train": ["other"], "label": "x"},
                "dosage": {"task": "genes", "dataset": "other", "labels": {"path": "genes.csv"}},
            },
        }
    )
    seen = {
        model: [name for name, spec in loaded.benchmarks.items() if loaded.taught(model, spec)]
        for model in loaded.models
    }
    assert seen == {"m": [], "cells": ["same", "transfer"], "genes": ["dosage"], "later": ["dosage"]}


def test_config_that_is_not_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(UserError, match="not a YAML mapping"):
        config.load_file(path)
    path.write_text("a: [")
    with pytest.raises(UserError, match="is not YAML"):
        config.load_file(path)


def test_generated_texts_are_current() -> None:
    assert (ROOT / "config" / "README.md").read_text() == config_docs.readme(), (
        "run python -m cellformers.config_docs"
    )
    assert (ROOT / "workflow" / "schemas" / "config.schema.json").read_text() == config_docs.schema_text()


def test_every_key_is_explained() -> None:
    for model in (config.Config, config.Dataset, config.QC, config.Pretrain, config.CellBenchmark):
        assert all(field.description for field in model.model_fields.values())


def test_environment_pins_equal_the_constraints() -> None:
    constraints = (ROOT / "envs" / "constraints.txt").read_text().splitlines()
    pins = {line.lower() for line in constraints if "==" in line}
    for name in ("cpu", "gpu"):
        environment = yaml.safe_load((ROOT / "envs" / f"{name}.yaml").read_text())
        installed = next(entry for entry in environment["dependencies"] if isinstance(entry, dict))["pip"]
        pinned = [line for line in installed if "==" in line]
        assert len(pinned) > 15
        assert {line.lower() for line in pinned} <= pins
        assert any(line.startswith("cellformers @") for line in installed)
