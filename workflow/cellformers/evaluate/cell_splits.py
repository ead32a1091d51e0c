"""Splits of cells into training and test, written to disk once and read by every method.

Runs as `cellformers split --task cells`. Whole donors or batches are held out where there are at least two
(`held-out`), whole datasets for a transfer (`transfer`), single donors of one dataset where the donors of another are
the same (`transfer` by `dataset unit`), else single cells (`stratified`, marked as such). A split depends on names,
labels and the seed, never on the order of rows or files, and no donor or cell is on both sides of a fold: a split that
would put one there is refused.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate.splitfile import (
    Split,
    cells_digest,
    check_sides,
    check_units,
    row_names,
)
from cellformers.evaluate.tables import Cells, read_cells, take_cells, tokenised
from cellformers.folds import group_folds, stratified_folds
from cellformers.io.files import read_json, read_metadata, stamp, write_json
from cellformers.revisions import REVISIONS
from cellformers.training.sides import DATASET_UNIT
from cellformers.training.targets import SEPARATOR

SHOWN = 3  # units spelt out in the name of a fold


def _name(members: Sequence[str], number: int) -> str:
    return ", ".join(members) if len(members) <= SHOWN else f"fold {number + 1}"


def _held_out(cells: Cells, units: np.ndarray, folds: int, seed: int) -> list[dict[str, Any]]:
    fold_of = group_folds(units, cells.label, folds=folds, seed=seed)
    result = []
    for number in range(max(fold_of.values()) + 1):
        test = sorted(u for u, f in fold_of.items() if f == number)
        train = sorted(u for u, f in fold_of.items() if f != number)
        result.append({"name": _name(test, number), "train": train, "test": test})
    return result


def _stratified(cells: Cells, folds: int, seed: int) -> list[dict[str, Any]]:
    keys = cells.keys()
    fold_of = stratified_folds(keys, cells.label, folds=folds, seed=seed)
    return [
        {"name": f"fold {f + 1}", "train": None, "test": sorted(keys[fold_of == f].tolist())}
        for f in range(folds)
    ]


def _across(
    cells: Cells, train: Sequence[str], test: Sequence[str], folds: int, seed: int
) -> list[dict[str, Any]]:
    """Folds that test on units of the test datasets and train on the other units of the training datasets.

    Units of the test datasets are tested one by one if there are at most `folds`, else in so many groups.
    """
    names = row_names(cells, DATASET_UNIT)
    known, tested = np.isin(cells.dataset, train), np.isin(cells.dataset, test)
    assert cells.unit is not None
    fold_of = group_folds(cells.unit[tested], cells.label[tested], folds=folds, seed=seed)
    result = []
    for number in range(max(fold_of.values()) + 1):
        held = sorted(u for u, f in fold_of.items() if f == number)
        out = np.isin(cells.unit.astype(str), held)
        if not (known & ~out).any():
            raise UserError(
                f"{', '.join(train)} has no unit but {', '.join(held)}, so nothing is left to train on",
                fix="give a dataset of two units at least, or leave --across out",
            )
        result.append(
            {
                "name": f"{'+'.join(train)} to {'+'.join(test)}: {_name(held, number)}",
                "train": sorted(set(names[known & ~out])),
                "test": sorted(set(names[tested & out])),
            }
        )
    return result


def _given(path: Path, names: np.ndarray) -> list[dict[str, Any]]:
    content = read_json(path)
    folds = content.get("folds") if isinstance(content, dict) else None
    if not isinstance(folds, list) or not folds:
        raise UserError(
            "has no list 'folds'", path=path, fix='write {"folds": [{"train": [...], "test": [...]}]}'
        )
    known = set(names)
    result = []
    for number, fold in enumerate(folds):
        for side in ("train", "test"):
            members = fold.get(side) if isinstance(fold, dict) else None
            if not isinstance(members, list) or not members:
                raise UserError(f"fold {number + 1} has no list {side!r}", path=path)
            for member in map(str, members):
                if member not in known:
                    raise UserError(
                        f"fold {number + 1}: {side} names {member!r}, which no labelled cell belongs to",
                        path=path,
                        fix=did_you_mean(member, sorted(known)),
                    )
        test = sorted(map(str, fold["test"]))
        result.append(
            {
                "name": str(fold.get("name", _name(test, number))),
                "train": sorted(map(str, fold["train"])),
                "test": test,
            }
        )
    return result


def _annotate(
    folds: list[dict[str, Any]], split: Split, cells: Cells, by: str, *, path: Path | None
) -> list[str]:
    """Add sizes and one-sided classes to the folds; return the notes about them."""
    notes = []
    for fold, (train, test) in zip(folds, split.masks(row_names(cells, by)), strict=True):
        if by != "cell":
            check_units(cells, train, test, fold=fold["name"], path=path)
        trained, tested = set(cells.label[train]), set(cells.label[test])
        if len(trained) < 2:
            raise UserError(
                f"fold {fold['name']!r} has one class to train on ({', '.join(trained) or 'none'})",
                path=path,
                fix="a class must occur in two units at least: hold out other units, or leave unit out",
            )
        if by == "dataset" and not trained & tested:
            raise UserError(
                f"fold {fold['name']!r} trains on {', '.join(sorted(trained))} and tests {', '.join(sorted(tested))}",
                path=path,
                fix="give both sides the same names of classes",
            )
        fold |= {"n_train": len(train), "n_test": len(test)}
        fold |= {"test_only": sorted(tested - trained), "train_only": sorted(trained - tested)}
        if fold["test_only"]:
            lost = int(np.isin(cells.label[test].astype(str), fold["test_only"]).sum())
            notes.append(
                f"fold {fold['name']}: {', '.join(fold['test_only'])} only in test ({lost} cells), can't be predicted"
            )
        if by in ("dataset", DATASET_UNIT) and fold["train_only"]:
            notes.append(f"fold {fold['name']}: {', '.join(fold['train_only'])} only in training")
    return notes


def _choose(
    cells: Cells, train: Sequence[str] | None, test: Sequence[str] | None, given: Path | None, *, across: bool
) -> tuple[Literal["held-out", "transfer", "stratified", "given"], str]:
    """Kind of split and what it is made by."""
    if across and (not train or not test or cells.unit is None):
        raise UserError(
            "a transfer across datasets that share units needs both datasets and the column of units",
            fix="give --train, --test and --unit",
        )
    if across and any(SEPARATOR in name for name in (*(train or ()), *(test or ()))):
        raise UserError(
            f"a dataset's name holds {SEPARATOR!r}, which stands before the unit", fix="choose another"
        )
    if across and given is not None:
        raise UserError("--given and --across exclude each other", fix="give one of them")
    if given is not None:
        return "given", "unit" if cells.unit is not None else "cell"
    if test:
        if not train:
            raise UserError("datasets to test on, but none to train on", fix="give --train as well")
        datasets = set(cells.dataset)
        for name in (*train, *test):
            if name not in datasets:
                raise UserError(f"no cells of dataset {name!r}", fix=did_you_mean(name, sorted(datasets)))
        both = set(train) & set(test)
        if both:
            raise UserError(
                f"dataset {min(both)!r} is on both sides", fix="leave --test out to hold out its units"
            )
        return "transfer", DATASET_UNIT if across else "dataset"
    if cells.unit is not None and len(set(cells.unit)) >= 2:
        return "held-out", "unit"
    return "stratified", "cell"


def _check_apart(cells: Mapping[str, Path], train: Sequence[str], test: Sequence[str]) -> None:
    """Refuse a transfer between two copies of one dataset, known by the digests of their counts."""
    digests = {name: read_metadata(cells[name]).get("inputs", {}).get("dataset") for name in (*train, *test)}
    for a in train:
        for b in test:
            if digests[a] is not None and digests[a] == digests[b]:
                raise UserError(
                    f"holds the same counts as {cells[a]}: {a!r} and {b!r} are one dataset",
                    path=cells[b],
                    fix="test on other cells than those trained on",
                )


def make_cell_split(
    *,
    cells: Mapping[str, Path],
    label: str,
    output: str | Path,
    unit: str | None = None,
    train: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    across: bool = False,
    given: Path | None = None,
    tokens: Mapping[str, Sequence[Path]] | None = None,
    folds: int = 5,
    seed: int = 0,
    note: str | None = None,
) -> Split:
    """Split labelled cells into folds and write the split.

    Parameters
    ----------
    cells
        `cells.parquet` by dataset name.
    label
        Column to predict. Cells without it, or that failed QC, are left out and counted.
    output
        JSON file to write.
    unit
        Column of donors or batches. With two or more of them whole units are held out, each alone if there are
        at most `folds`; with fewer, or without the column, the split is stratified over cells and says so.
    train, test
        Dataset names for a transfer: train on the ones, test on the others.
    across
        The datasets of a transfer share units: test on one unit of the test datasets (on groups of them, if there are
        more than `folds`), train on the other units of the training datasets. A unit that only the test datasets have
        is tested after training on all units of the others.
    folds
        Folds over units or cells, 2 at least.
    given
        JSON file with a split of your own, {"folds": [{"train": [...], "test": [...]}]}, lists of units
        (of cells if `unit` is left out). Units in neither list are left out of the fold.
    tokens
        Token shards by dataset, in all vocabularies of the benchmark: a cell without tokens in one has too few of its
        genes to be embedded, so no method is scored on it.
    note
        A caveat to carry to every score.

    Raises
    ------
    UserError
        If there is one class only, a unit would be on both sides, every class is in one unit alone, or what is tested
        has no class that is trained on.
    """
    if folds < 2:
        raise UserError(f"{folds} folds are too few", fix="ask for 2 at least")
    table, excluded = read_cells(cells, label=label, unit=unit)
    known = tokenised(table, tokens or {})
    untokenised = sorted(table.keys()[~known].tolist())
    excluded |= {"too few genes of a vocabulary": len(untokenised)} if untokenised else {}
    table = take_cells(table, known)
    source = next(iter(cells.values())) if len(cells) == 1 else None  # the file that errors name
    classes = sorted(set(table.label))
    if len(classes) < 2:
        raise UserError(
            f"label {label!r} has one class ({classes[0]}), nothing to tell apart",
            path=source,
            fix="name another column",
        )
    if len(classes) == len(table) or len(classes) > max(20, len(table) / 2):
        raise UserError(
            f"label {label!r} has {len(classes)} classes for {len(table)} cells",
            path=source,
            fix="give a column of classes, each with several cells, not of numbers or names",
        )
    kind, by = _choose(table, train, test, given, across=across)
    if kind == "transfer":
        _check_apart(cells, train or (), test or ())
    notes = [note] if note else []
    if kind == "given":
        parts = _given(Path(str(given)), row_names(table, by))
    elif kind == "transfer":
        a, b = sorted(train or ()), sorted(test or ())
        if by == DATASET_UNIT:
            parts = _across(table, a, b, folds, seed)
        else:
            parts = [{"name": f"{'+'.join(a)} to {'+'.join(b)}", "train": a, "test": b}]
    elif kind == "held-out":
        spread = Counter(c for c, _ in set(zip(table.label, table.unit, strict=True)))  # type: ignore[arg-type]
        if max(spread.values()) < 2:
            raise UserError(
                f"every class of {label!r} occurs in one {unit!r} only, so held-out units can't be predicted",
                path=source,
                fix="leave unit out for a stratified split, which says that label and unit are confounded",
            )
        parts = _held_out(table, row_names(table, by), folds, seed)
    else:
        parts = _stratified(table, folds, seed)
        notes.append(
            "stratified over cells: cells of one donor are on both sides, so the scores are optimistic"
        )
    check_sides(parts, what=by, path=given)
    content: dict[str, Any] = {
        "task": "cells",
        "kind": kind,
        "by": by,
        "dataset": "+".join(sorted(cells)),
        "label": label,
        "unit": unit,
        "seed": seed,
        "classes": classes,
        "class_sizes": {c: int((table.label == c).sum()) for c in classes},
        "n": len(table),
        "excluded": excluded,
        "untokenised": untokenised,
        "folds": parts,
        "notes": notes,
    }
    notes += _annotate(parts, Split(content), table, by, path=given or source)
    parameters = {"label": label, "unit": unit, "folds": folds, "seed": seed}
    content |= stamp(
        "split", REVISIONS["split"], parameters=parameters, inputs={"cells": cells_digest(table)}
    )
    write_json(content, output)
    return Split(content)
