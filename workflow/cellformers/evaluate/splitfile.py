"""A split as a file: reading it, naming its rows, and refusing one that puts something on both sides."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellformers.errors import UserError
from cellformers.evaluate.tables import Cells
from cellformers.io.files import digest_arrays, read_json
from cellformers.training.sides import DATASET_UNIT

CELL_KINDS = {
    "held-out": ("unit",),
    "transfer": ("dataset", DATASET_UNIT),
    "given": ("unit", "cell"),
    "stratified": ("cell",),
}


@dataclass(frozen=True)
class Split:
    """A split as read from disk; `content` is the whole JSON."""

    content: dict[str, Any]

    @property
    def classes(self) -> list[str]:
        """The classes of the benchmark, sorted; of a gene split the negative before the positive one."""
        return list(self.content["classes"])

    @property
    def folds(self) -> list[dict[str, Any]]:
        """Folds: name, train (null: all that isn't test) and test, names of units, datasets, cells or genes."""
        return list(self.content["folds"])

    @property
    def seed(self) -> int:
        """Seed of everything random in the benchmark."""
        return int(self.content["seed"])

    @property
    def unit(self) -> str | None:
        """Column of donors or batches, if any."""
        return self.content["unit"]

    def describe(self) -> dict[str, Any]:
        """What a score says of its split and its labels."""
        content = self.content
        held_out = content["by"] not in ("cell", "gene")
        return {
            "task": content["task"],
            "dataset": content["dataset"],
            "label": content["label"],
            "classes": self.classes,
            "split": {
                "kind": content["kind"],
                "unit": self.unit,
                "seed": self.seed,
                "folds": len(self.folds),
                "names": [fold["name"] for fold in self.folds],
                "units": [fold["test"] for fold in self.folds] if held_out else None,
                "excluded": content["excluded"],
            },
        }

    def masks(self, names: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Row numbers (train, test) of each fold, for rows that belong to `names` (units, datasets, cells or genes)."""
        result = []
        for fold in self.folds:
            test = np.isin(names.astype(str), fold["test"])
            train = ~test if fold["train"] is None else np.isin(names.astype(str), fold["train"])
            result.append((np.flatnonzero(train), np.flatnonzero(test)))
        return result


def check_sides(folds: Sequence[Mapping[str, Any]], *, what: str, path: str | Path | None = None) -> None:
    """UserError if a fold trains on what it tests on, or something is tested in two folds."""
    tested: Counter[str] = Counter()
    for fold in folds:
        both = set(fold["train"] or ()) & set(fold["test"])
        if both:
            raise UserError(
                f"{what} {min(both)!r} is on both sides of fold {fold['name']!r}",
                path=path,
                fix="a score from such a split is worthless: take it out of train or test",
            )
        tested.update(fold["test"])
    twice = sorted(name for name, n in tested.items() if n > 1)
    if twice:
        raise UserError(f"{what} {twice[0]!r} is in the test of two folds", path=path, fix="test it once")


def check_units(cells: Cells, train: np.ndarray, test: np.ndarray, *, fold: str) -> None:
    """UserError if a donor or batch has cells among both the training and the test rows of a fold."""
    if cells.unit is None:
        return
    both = set(cells.unit[train]) & set(cells.unit[test])
    if both:
        raise UserError(
            f"unit {min(both)!r} has cells on both sides of fold {fold!r}",
            fix="hold out whole units; if equal names mean different donors, rename them or leave unit out",
        )


def row_names(cells: Cells, by: str) -> np.ndarray:
    """What each cell is called in a split by unit, dataset, unit of a dataset, or cell: object[n] of str."""
    if by in ("unit", DATASET_UNIT):
        if cells.unit is None:
            raise UserError("the split holds out units, but names no column of units")
        if by == "unit":
            return cells.unit
        return np.array([f"{d}:{u}" for d, u in zip(cells.dataset, cells.unit, strict=True)], dtype=object)
    return cells.dataset if by == "dataset" else cells.keys()


def shared_note(unit: str | None) -> str:
    """What a transfer says that lets a donor or batch be on both sides."""
    return f"the same {unit} may be on both sides: what is held out is the dataset"


def cell_folds(split: Split, cells: Cells) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (train, test) of the folds of a split of cells, with a new look for leaks.

    Raises
    ------
    UserError
        If a cell or a unit is on both sides of a fold, whatever the file says, or a fold has nothing to learn or test.
    """
    content = split.content
    folds = split.masks(row_names(cells, content["by"]))
    shared = content["by"] == "dataset" and content.get("shared_units", False)
    for fold, (train, test) in zip(split.folds, folds, strict=True):
        if np.intersect1d(train, test).size:
            raise UserError(f"cells are on both sides of fold {fold['name']!r}")
        # a single unit is no reason to call single cells independent; it is what a stratified split is for
        if not shared and cells.unit is not None and len(set(cells.unit)) >= 2:
            check_units(cells, train, test, fold=fold["name"])
        if len(test) == 0 or len(set(cells.label[train])) < 2:
            raise UserError(
                f"fold {fold['name']!r} has nothing to test on, or fewer than two classes to learn"
            )
    return folds


def cells_digest(cells: Cells) -> str:
    """Digest of names, labels and units: a split and the evaluation that reads it must agree on it."""
    unit = cells.unit if cells.unit is not None else np.full(len(cells), "", dtype=object)
    return digest_arrays(cells.dataset, cells.cell_id, cells.label, unit)


def read_split(path: str | Path, *, task: Literal["cells", "genes"]) -> Split:
    """Read a split and check it again: it is a file that anybody may have edited.

    Raises
    ------
    UserError
        If it isn't a split of that task, or puts something on both sides of a fold.
    """
    content = read_json(path)
    keys = ("task", "kind", "by", "label", "unit", "seed", "classes", "folds", "n", "inputs")
    if not isinstance(content, dict) or any(key not in content for key in keys):
        raise UserError("is not a split", path=path, fix="make one with `cellformers split`")
    if content["task"] != task:
        raise UserError(f"is a split of {content['task']}, one of {task} is needed", path=path)
    if task == "cells" and content["by"] not in CELL_KINDS.get(content["kind"], ()):
        raise UserError(
            f"claims to be {content['kind']!r} by {content['by']!r}, which no split is", path=path,
            fix="make it again with `cellformers split`",
        )  # fmt: skip
    for number, fold in enumerate(content["folds"], start=1):
        sides = [fold.get(side) for side in ("train", "test")] if isinstance(fold, dict) else []
        if not sides or not isinstance(sides[1], list) or not isinstance(sides[0], list | None):
            raise UserError(f"fold {number} has no lists of names", path=path, fix="make the split again")
    check_sides(content["folds"], what=content["by"], path=path)
    if content.get("groups"):
        group_of = dict(zip(content["genes"], content["groups"], strict=True))
        by_group = [{**f, "test": sorted({group_of[g] for g in f["test"]})} for f in content["folds"]]
        check_sides(by_group, what=content["unit"], path=path)
    return Split(content)
