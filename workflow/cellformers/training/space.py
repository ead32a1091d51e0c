"""What a hyperparameter search may vary, and between which bounds.

A space is a mapping of fields of `settings.Settings` to what they may be; in a YAML file:

    learning_rate: {low: 1.0e-6, high: 1.0e-3, log: true}
    warmup: {low: 100, high: 2000}            # whole steps; below 1 a share of them
    schedule: [linear, cosine]
    task_weights: {low: 0.1, high: 2}         # one for each task
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cellformers.errors import UserError, did_you_mean
from cellformers.resources import read_yaml
from cellformers.training.optimiser import SCHEDULES
from cellformers.training.settings import Settings

# What decides which cells there are, how a model is measured or which weights are kept is not for a search to choose.
WHOLE = ("batch_cells", "freeze_layers", "seed")
NUMBERS = (
    "learning_rate", "weight_decay", "warmup", "epochs", "clip", "dropout", "classifier_dropout", "task_weights", *WHOLE
)  # fmt: skip
WORDS = ("schedule", "class_weights", "pooling", "freeze_embeddings")

TASK_WEIGHTS = "task_weights"


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones; evenly, or evenly in their logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Choice:
    """Any of these values, in no order."""

    values: tuple[str | float | bool, ...]


Space = Mapping[str, Range | Choice]

# Warm-up as a share of the steps: the published 100 to 2,000 of some 7,000 steps would be too many for few cells.
REFERENCE: Space = {
    "learning_rate": Range(1e-6, 1e-3, log=True),
    "weight_decay": Range(0.0, 0.3),
    "schedule": Choice(("linear", "cosine", "polynomial")),
    "warmup": Range(0.01, 0.3),
    "seed": Range(0, 100, whole=True),
}
REFERENCE_TASKS: Space = {
    "learning_rate": Range(1e-5, 1e-3, log=True),
    "weight_decay": Range(0.01, 0.1),
    "schedule": Choice(("linear", "cosine", "polynomial")),
    "warmup": Range(0.005, 0.01),
    "classifier_dropout": Range(0.0, 0.7),
    TASK_WEIGHTS: Range(0.1, 2.0),
}


def default_space(kind: str, *, n_layers: int, adapted: bool = False) -> Space:
    """The space that Geneformer's own searches have, for targets of this kind.

    For several tasks, layers are frozen as well (1 to all but one), where there is a choice and no adapter, which
    leaves the whole encoder frozen.
    """
    if kind != "tasks":
        return REFERENCE
    frozen: Space = {"freeze_layers": Range(1, n_layers - 1, whole=True)}
    return {**REFERENCE_TASKS, **(frozen if n_layers > 2 and not adapted else {})}


def read_space(path: str | Path) -> Space:
    """Read a space from YAML.

    Raises
    ------
    UserError
        If it is no mapping, a name is not one that can be searched, or bounds are no numbers, in the wrong order or
        out of what the setting allows.
    """
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise UserError("no such file", path=path) from None
    except (OSError, ValueError) as error:
        raise UserError(f"not readable as YAML ({error})", path=path) from error
    if not isinstance(content, Mapping) or not content:
        raise UserError(
            "is no mapping of settings to what they may be", path=path,
            fix="write lines such as learning_rate: {low: 1.0e-6, high: 1.0e-3, log: true}",
        )  # fmt: skip
    try:
        space = {str(name): _dimension(str(name), given) for name, given in content.items()}
        check_space(space)
    except UserError as error:
        raise UserError(str(error), path=path) from None
    return space


def _dimension(name: str, given: Any) -> Range | Choice:
    if name not in (*NUMBERS, *WORDS):
        raise UserError(f"{name!r} can't be searched", fix=did_you_mean(name, (*NUMBERS, *WORDS)))
    if isinstance(given, list):
        return Choice(tuple(given))
    if name in WORDS:
        raise UserError(f"{name} is {given!r}, not a list of values", fix=f"write {name}: [...]")
    if not isinstance(given, Mapping) or not {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
        raise UserError(
            f"{name} is neither a list of values nor bounds", fix=f"write {name}: {{low: ..., high: ...}}"
        )
    for bound in ("low", "high"):
        _check_number(name, given[bound])
    if not isinstance(given.get("log", False), bool):
        raise UserError(f"log of {name} is {given['log']!r}, not true or false")
    whole = name in WHOLE or (name == "warmup" and given["high"] >= 1)
    return Range(given["low"], given["high"], log=given.get("log", False), whole=whole)


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = "write powers of ten as 1.0e-4" if isinstance(value, str) else None
        raise UserError(f"{name} has {value!r} where a number belongs", fix=hint)


def check_space(space: Space) -> None:
    """UserError where a range is empty, or reaches values that the settings refuse."""
    for name, dimension in space.items():
        if isinstance(dimension, Choice):
            if not dimension.values or len(set(map(str, dimension.values))) < len(dimension.values):
                raise UserError(f"{name} names no value, or one twice")
            ends: tuple[Any, ...] = dimension.values
        else:
            if not dimension.low < dimension.high or (dimension.log and dimension.low <= 0):
                raise UserError(
                    f"{name} goes from {dimension.low:g} to {dimension.high:g}",
                    fix="low is below high, and above 0 where log is true",
                )
            ends = (dimension.low, dimension.high)
        for value in ends:
            _check_value(name, value, whole=isinstance(dimension, Range) and dimension.whole)


def _check_value(name: str, value: Any, *, whole: bool) -> None:
    if name in NUMBERS:
        _check_number(name, value)
        if (whole or name in WHOLE) and value != int(value):
            raise UserError(f"{name} has {value!r} where a whole number belongs")
        if name == TASK_WEIGHTS and value <= 0:
            raise UserError(f"{name} has {value:g}, not above 0")
    if name == "schedule" and value not in SCHEDULES:
        raise UserError(f"no schedule {value!r}", fix=did_you_mean(str(value), SCHEDULES))
    if name == "freeze_embeddings" and not isinstance(value, bool):
        raise UserError(f"freeze_embeddings has {value!r}, not true or false")
    if name != TASK_WEIGHTS:
        Settings(**{name: value})


def flatten(space: Space, tasks: tuple[str, ...]) -> dict[str, Range | Choice]:
    """One entry a number or word to be drawn: task weights are one for each task.

    Raises
    ------
    UserError
        If task weights are to be searched where there is one task.
    """
    flat: dict[str, Range | Choice] = {}
    for name, dimension in space.items():
        if name == TASK_WEIGHTS and len(tasks) < 2:
            raise UserError("there are no task weights where there is one task", fix="leave them out")
        keys = [f"{name}.{task}" for task in tasks] if name == TASK_WEIGHTS else [name]
        flat |= dict.fromkeys(keys, dimension)
    return flat


def apply(settings: Settings, drawn: Mapping[str, Any], tasks: tuple[str, ...]) -> Settings:
    """`settings` with the values that were drawn under the names of `flatten`."""
    plain = {name: value for name, value in drawn.items() if not name.startswith(f"{TASK_WEIGHTS}.")}
    if len(plain) < len(drawn):
        plain[TASK_WEIGHTS] = tuple(drawn[f"{TASK_WEIGHTS}.{task}"] for task in tasks)
    return replace(settings, **plain)


def describe(space: Space) -> dict[str, Any]:
    """The space as JSON has it."""
    return {name: asdict(dimension) for name, dimension in space.items()}
