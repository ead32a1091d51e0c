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

AGAIN = "make it again with `cellformers split`"
SHAPE: dict[str, type] = {
    "task": str, "kind": str, "by": str, "dataset": str, "label": str, "seed": int, "classes": list, "n": int,
    "excluded": dict, "folds": list, "notes": list, "inputs": dict,
}  # fmt: skip
"""What every split holds; `unit` is a name or null."""
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


def check_units(
    cells: Cells, train: np.ndarray, test: np.ndarray, *, fold: str, path: str | Path | None = None
) -> None:
    """UserError if a donor or batch has cells among both the training and the test rows of a fold."""
    if cells.unit is None:
        return
    both = set(cells.unit[train]) & set(cells.unit[test])
    if both:
        raise UserError(
            f"unit {min(both)!r} has cells on both sides of fold {fold!r}",
            path=path,
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


def cell_folds(split: Split, cells: Cells, *, path: str | Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Row numbers (train, test) of the folds of a split of cells, read from `path`, with a new look for leaks.

    Raises
    ------
    UserError
        If the split was made from other cells, a cell or a unit is on both sides of a fold, whatever the file says, or
        a fold has nothing to learn or test.
    """
    same = cells_digest(cells) == split.content["inputs"].get("cells")
    if not same or split.classes != sorted(set(cells.label)):
        raise UserError("was made from other cells, labels or units", path=path, fix=AGAIN)
    names = row_names(cells, split.content["by"])
    folds, known = split.masks(names), set(names)
    for fold, (train, test) in zip(split.folds, folds, strict=True):
        strange = sorted({*fold["test"], *(fold["train"] or ())} - known)
        if strange:
            raise UserError(
                f"fold {fold['name']!r} names {strange[0]!r}, which is no {split.content['by']} of its cells",
                path=path,
                fix=AGAIN,
            )
        if np.intersect1d(train, test).size:
            raise UserError(f"cells are on both sides of fold {fold['name']!r}", path=path, fix=AGAIN)
        # a single unit is no reason to call single cells independent; it is what a stratified split is for
        if cells.unit is not None and len(set(cells.unit)) >= 2:
            check_units(cells, train, test, fold=fold["name"], path=path)
        if len(test) == 0 or len(set(cells.label[train])) < 2:
            raise UserError(
                f"fold {fold['name']!r} has nothing to test on, or fewer than two classes to learn",
                path=path,
                fix=AGAIN,
            )
    return folds


def cells_digest(cells: Cells) -> str:
    """Digest of names, labels and units: a split and the evaluation that reads it must agree on it."""
    unit = cells.unit if cells.unit is not None else np.full(len(cells), "", dtype=object)
    return digest_arrays(cells.dataset, cells.cell_id, cells.label, unit)


def _defect(content: Any) -> str | None:
    """What of the content of a file no split has; None where it is whole."""
    if not isinstance(content, dict):
        return "no JSON object"
    for key, kind in SHAPE.items():
        if not isinstance(content.get(key), kind):
            return f"{key!r} is missing or of the wrong type"
    if "unit" not in content or not isinstance(content["unit"], str | None) or content["seed"] < 0:
        return "'unit' is missing or of the wrong type, or 'seed' below 0"
    if not content["folds"]:
        return "it has no fold"
    for number, fold in enumerate(content["folds"], start=1):
        if not isinstance(fold, dict) or not isinstance(fold.get("name"), str) or "train" not in fold:
            return f"fold {number} has no name, train and test"
        if not _names(fold.get("test")) or (fold["train"] is not None and not _names(fold["train"])):
            return f"fold {number} has no lists of names"
    return _gene_defect(content) if content["task"] == "genes" else None


def _names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _gene_defect(content: dict[str, Any]) -> str | None:
    """What of a split of genes does not fit together; the digest knows its genes and their classes."""
    genes, groups = content.get("genes"), content.get("groups", "")
    if not isinstance(genes, dict) or not isinstance(content.get("class_sizes"), dict):
        return "'genes' or 'class_sizes' is missing or of the wrong type"
    if groups is not None and (not _names(groups) or len(groups) != len(genes)):
        return "it has not one group a gene"
    names, truth = (np.array(list(values), dtype=object) for values in (genes, genes.values()))
    if digest_arrays(names, truth) != content["inputs"].get("genes") or set(truth) != set(content["classes"]):
        return "its genes or their classes have been changed"
    if len(content["folds"]) < 2:
        return "it has one fold"
    for fold in content["folds"]:
        strange = sorted({*fold["test"], *(fold["train"] or ())} - set(genes))
        if strange:
            return f"fold {fold['name']!r} names {strange[0]!r}, which is none of its genes"
    return None


def _check_genes(content: dict[str, Any], path: str | Path) -> None:
    """UserError if genes of one group are on both sides of a fold, or a side lacks a class."""
    genes = content["genes"]
    if content["groups"]:
        group_of = dict(zip(genes, content["groups"], strict=True))
        by_group = [{**f, "test": sorted({group_of[g] for g in f["test"]})} for f in content["folds"]]
        check_sides(by_group, what=content["unit"], path=path)
    for fold in content["folds"]:
        test = set(fold["test"])
        train = set(genes) - test if fold["train"] is None else set(fold["train"])
        if any({genes[gene] for gene in side} != set(content["classes"]) for side in (test, train)):
            raise UserError(f"fold {fold['name']!r} lacks a class in train or test", path=path, fix=AGAIN)


def read_split(path: str | Path, *, task: Literal["cells", "genes"]) -> Split:
    """Read a split and check it again: it is a file that anybody may have edited.

    Raises
    ------
    UserError
        If it isn't a whole split of that task, or puts something on both sides of a fold.
    """
    content = read_json(path)
    defect = _defect(content)
    if defect:
        raise UserError(f"is not a split: {defect}", path=path, fix=AGAIN)
    if content["task"] != task:
        raise UserError(f"is a split of {content['task']}, one of {task} is needed", path=path)
    if task == "cells" and content["by"] not in CELL_KINDS.get(content["kind"], ()):
        raise UserError(
            f"claims to be {content['kind']!r} by {content['by']!r}, which no split is", path=path, fix=AGAIN,
        )  # fmt: skip
    check_sides(content["folds"], what=content["by"], path=path)
    if task == "genes":
        _check_genes(content, path)
    return Split(content)
