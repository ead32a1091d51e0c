"""Search spaces: what a YAML file may say, and how values drawn become settings."""

import pytest

from cellformers.errors import UserError
from cellformers.training.settings import Settings
from cellformers.training.space import (
    Choice,
    Range,
    apply,
    check_space,
    default_space,
    describe,
    flatten,
    read_space,
)  # fmt: skip

TEXT = """
learning_rate: {low: 1.0e-6, high: 1.0e-3, log: true}
weight_decay: {low: 0, high: 0.3}
warmup: {low: 100, high: 2000}
freeze_layers: {low: 0, high: 5}
schedule: [linear, cosine]
batch_cells: [8, 16]
freeze_embeddings: [true, false]
"""


def write(folder, text):
    path = folder / "space.yaml"
    path.write_text(text)
    return path


def test_a_file_is_read_with_types(tmp_path):
    assert read_space(write(tmp_path, TEXT)) == {
        "learning_rate": Range(1e-6, 1e-3, log=True),
        "weight_decay": Range(0, 0.3),
        "warmup": Range(100, 2000, whole=True),
        "freeze_layers": Range(0, 5, whole=True),
        "schedule": Choice(("linear", "cosine")),
        "batch_cells": Choice((8, 16)),
        "freeze_embeddings": Choice((True, False)),
    }


def test_warmup_below_one_is_a_share(tmp_path):
    assert read_space(write(tmp_path, "warmup: {low: 0.0, high: 0.3}"))["warmup"] == Range(0.0, 0.3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no mapping"),
        ("[1, 2]", "no mapping"),
        ("a: [", "not readable as YAML"),
        ("learningrate: {low: 0, high: 1}", "did you mean 'learning_rate'"),
        ("max_cells: [100, 200]", "'max_cells' can't be searched"),
        ("monitor: [loss]", "can't be searched"),
        ("learning_rate: 0.1", "neither a list of values nor bounds"),
        ("learning_rate: {low: 0.1}", "neither"),
        ("learning_rate: {low: 0.1, high: 1, step: 2}", "neither"),
        ("learning_rate: {low: 1e-6, high: 1.0e-3}", "'1e-6' where a number belongs; write powers of ten"),
        ("learning_rate: {low: true, high: 2}", "True where a number"),
        ("learning_rate: {low: 0.1, high: 0.01}", "goes from 0.1 to 0.01"),
        ("learning_rate: {low: 0, high: 0.1, log: true}", "above 0 where log"),
        ("learning_rate: {low: 0.01, high: 0.1, log: 1}", "log of learning_rate is 1"),
        ("learning_rate: {low: -1, high: 0.1}", "learning_rate is -1"),
        ("learning_rate: {low: 0.1, high: .inf}", "learning_rate is inf"),
        ("weight_decay: {low: .nan, high: 1}", "goes from nan"),
        ("warmup: {low: 0.5, high: 100}", "0.5 where a whole number"),
        ("freeze_layers: {low: 0, high: 1.5}", "1.5 where a whole number"),
        ("batch_cells: [8, 8]", "one twice"),
        ("batch_cells: []", "no value"),
        ("batch_cells: [0]", "batch_cells is 0"),
        ("batch_cells: [eight]", "'eight' where a number belongs"),
        ("dropout: {low: 0, high: 1}", "dropout is 1"),
        ("schedule: {low: 0, high: 1}", "not a list of values"),
        ("schedule: [linear, cosin]", "did you mean 'cosine'"),
        ("class_weights: [balance]", "did you mean 'balanced'"),
        ("freeze_embeddings: ['yes']", "not true or false"),
        ("task_weights: {low: 0, high: 1}", "not above 0"),
        ("pooling: [mean]", "no pooling 'mean'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_name_of_the_file(tmp_path, text, words):
    with pytest.raises(UserError, match=words) as caught:
        read_space(write(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path / 'space.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        read_space(tmp_path / "none.yaml")


@pytest.mark.parametrize("kind", ["cells", "genes", "tasks"])
@pytest.mark.parametrize("n_layers", [1, 2, 6])
def test_the_defaults_are_possible(kind, n_layers):
    space = default_space(kind, n_layers=n_layers)
    check_space(space)
    assert {"learning_rate", "weight_decay", "schedule", "warmup"} <= space.keys()
    if kind == "tasks":
        frozen = space.get("freeze_layers")
        assert (frozen is None) == (n_layers < 3)
        assert frozen is None or (frozen.low, frozen.high) == (1, n_layers - 1)
        assert "freeze_layers" not in default_space(kind, n_layers=n_layers, adapted=True)


def test_values_drawn_become_settings():
    settings = apply(Settings(epochs=2), {"learning_rate": 1e-5, "schedule": "cosine", "warmup": 100}, ("a",))
    assert settings == Settings(epochs=2, learning_rate=1e-5, schedule="cosine", warmup=100)


def test_each_task_gets_a_weight():
    space = {"task_weights": Range(0.1, 2.0), "clip": Range(0.5, 1.0)}
    assert list(flatten(space, ("a", "b"))) == ["task_weights.a", "task_weights.b", "clip"]
    drawn = {"task_weights.b": 2.0, "task_weights.a": 0.5, "clip": 0.7}
    assert apply(Settings(), drawn, ("a", "b")) == Settings(task_weights=(0.5, 2.0), clip=0.7)
    with pytest.raises(UserError, match="one task"):
        flatten(space, ("a",))


def test_a_space_can_be_written_down():
    described = describe({"clip": Range(0.5, 1.0), "schedule": Choice(("linear",))})
    assert described["clip"] == {"low": 0.5, "high": 1.0, "log": False, "whole": False}
    assert list(described["schedule"]["values"]) == ["linear"]
