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
    """What each cell is called in a split by unit, by dataset or by cell: object[n] of str."""
    if by == "unit":
        if cells.unit is None:
            raise UserError("the split holds out units, but names no column of units")
        return cells.unit
    return cells.dataset if by == "dataset" else cells.keys()


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
    check_sides(content["folds"], what=content["by"], path=path)
    if content.get("groups"):
        group_of = dict(zip(content["genes"], content["groups"], strict=True))
        by_group = [{**f, "test": sorted({group_of[g] for g in f["test"]})} for f in content["folds"]]
        check_sides(by_group, what=content["unit"], path=path)
    return Split(content)
