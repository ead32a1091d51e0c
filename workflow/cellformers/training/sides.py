"""Which cells or genes are trained on, which are held out to know when to stop, and which are tested.

    side, record = assign(targets, labels, SplitSpec(heldout=0.1, test=0.2, seed=0))

Sides are drawn (whole donors where the targets name units, else stratified by class), one of several folds, or given:
as a column of the labels, as a file, as published. A draw depends on names, labels and the seed, never on the order of
rows. No unit, cell or gene is on two sides; what is in no list of a given split is left out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.folds import group_folds, hash_order, stratified_folds
from cellformers.io.files import read_json
from cellformers.training.targets import SEPARATOR, Targets, read_columns

Array = np.ndarray[Any, Any]

SIDES = ("train", "heldout", "test")
TRAIN, HELDOUT, TEST, OUT = 0, 1, 2, -1
SPELLINGS = {
    "train": TRAIN, "training": TRAIN, "heldout": HELDOUT, "held-out": HELDOUT, "held_out": HELDOUT, "eval": HELDOUT,
    "valid": HELDOUT, "validation": HELDOUT, "val": HELDOUT, "dev": HELDOUT, "test": TEST, "testing": TEST,
}  # fmt: skip
SIDE_COLUMNS = ("split", "side")
DATASET_UNIT = "dataset unit"  # what a benchmark by units of single datasets says it is by


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """How sides are made, where the table of labels has no column of them."""

    heldout: float = 0.1
    """Share held out for early stopping (of all; in a fold, of what is not tested); 0: none."""
    test: float = 0.2
    """Share to test on; 0: none. Folds and given splits say themselves what is tested."""
    folds: int | None = None
    """Deal out over so many folds and test on one of them."""
    fold: int | None = None
    """Which fold, from 1."""
    file: Path | None = None
    """A file of sides: {"train": [...], "heldout": [...], "test": [...]}, a table with a column `split`, or a split
    by `cellformers split`, of which `fold` is taken."""
    published: Mapping[str, str] | None = None
    """Side of each unit, as a publication has it."""
    seed: int = 0


def assign(targets: Targets, labels: Array, spec: SplitSpec) -> tuple[Array, dict[str, Any]]:
    """The side of each row, int8 [n] (-1: left out), and the content of split.json.

    Parameters
    ----------
    targets, labels
        The rows, and their classes, int64 [n, tasks] with -1 for none.

    Raises
    ------
    UserError
        If a unit would be on two sides, a fold does not exist, or under two classes are left to train on.
    """
    _check_spec(spec)
    if spec.file is not None:
        side, record = _from_file(targets, labels, spec, spec.file)
    elif spec.published is not None:
        if targets.units is None:
            raise UserError("a published split names units", fix="name their column with --unit")
        side, record = _listed(targets.units, spec.published, None), {"kind": "published", "by": "unit"}
    elif targets.sides is not None:
        side = np.array([OUT if v is None else _side_named(v, None) for v in targets.sides], dtype=np.int8)
        record = {"kind": "given", "by": _by(targets)}
    elif spec.folds is not None:
        side, record = _fold(targets, labels, spec)
    else:
        side, record = _drawn(targets, labels, spec)
    _check(targets, labels, side)
    return side, _described(targets, labels, side, record)


def _by(targets: Targets) -> str:
    if targets.units is not None:
        return "unit"
    return "gene" if targets.kind == "genes" else "cell"


def _check_spec(spec: SplitSpec) -> None:
    for name, value in (("held-out", spec.heldout), ("test", spec.test)):
        if not 0 <= value < 1:
            raise UserError(f"the {name} share is {value:g}, not from 0 to under 1")
    if spec.heldout + spec.test >= 1:
        raise UserError("held-out and test share leave nothing to train on", fix="lower one of them")
    if spec.folds is not None and spec.folds < 2:
        raise UserError(f"{spec.folds} folds are too few", fix="ask for 2 at least")
    if spec.folds is not None and spec.fold is None:
        raise UserError("folds were asked for, but not which is tested", fix="give --fold, from 1")
    if spec.fold is not None and spec.folds is None and spec.file is None:
        raise UserError("a fold of what?", fix="give --folds, or a --split-file by cellformers split")


# --- drawing ---------------------------------------------------------------------------------------------


def strata(labels: Array) -> Array:
    """What a stratified split is balanced by, object [n] of str: the class, or the combination of classes."""
    result = np.empty(len(labels), dtype=object)
    result[:] = [" ".join(map(str, row)) for row in labels.tolist()]
    return result


def draw_rows(names: Array, groups: Array, fraction: float, *, seed: int, salt: str) -> Array:
    """Rows of about `fraction` of every group, in hash order; one of a group at least stays undrawn."""
    order = hash_order(names, seed=seed, salt=salt)
    order = order[np.argsort(groups[order].astype(str), kind="stable")]
    starts = np.flatnonzero(np.append(True, groups[order][1:] != groups[order][:-1]))
    drawn = []
    carried = 0.0  # what rounding owes, so that many small groups together still make up the fraction
    for rows in np.split(order, starts[1:]):
        wanted = fraction * len(rows) + carried
        n = min(int(wanted + 0.5), len(rows) - 1)
        carried = wanted - n
        drawn.append(rows[: max(n, 0)])
    return np.sort(np.concatenate(drawn))


def draw_units(units: Array, labels: Array, fraction: float, *, seed: int, salt: str) -> list[str]:
    """Units with about `fraction` of every class: in hash order, those that bring the shares nearer to it.

    A unit stays undrawn where a class would otherwise have none left.

    Raises
    ------
    UserError
        If no unit can be drawn.
    """
    names = sorted(set(units.tolist()))
    number = {name: i for i, name in enumerate(names)}
    row_unit = np.array([number[name] for name in units])
    columns = [(task, c) for task in range(labels.shape[1]) for c in range(int(labels[:, task].max()) + 1)]
    counts = np.stack(
        [np.bincount(row_unit[labels[:, task] == c], minlength=len(names)) for task, c in columns], axis=1
    )
    share = counts / np.maximum(counts.sum(axis=0), 1)
    taken, drawn = np.zeros(len(columns)), []
    allowed = []
    for unit in hash_order(names, seed=seed, salt=salt).tolist():
        after = taken + share[unit]
        if ((after > 1 - 1e-9) & (share[unit] > 0)).any():
            continue
        allowed.append(unit)
        if ((after - fraction) ** 2).sum() < ((taken - fraction) ** 2).sum():
            taken = after
            drawn.append(unit)
    if not drawn and allowed:  # every unit is far larger than the fraction: the one nearest to it
        drawn = [min(allowed, key=lambda unit: ((share[unit] - fraction) ** 2).sum())]
    if not drawn:
        raise UserError(
            "no unit can be held out: each is the only one with some class",
            fix="hold nothing out (share 0), leave the unit out, or give a split of your own",
        )
    return sorted(names[unit] for unit in drawn)


def _draw(targets: Targets, labels: Array, rows: Array, fraction: float, *, seed: int, salt: str) -> Array:
    """Some of `rows`: of whole units where there are units, else stratified."""
    if not fraction:
        return rows[:0]
    if targets.units is not None:
        drawn = draw_units(targets.units[rows], labels[rows], fraction, seed=seed, salt=salt)
        return rows[np.isin(targets.units[rows].astype(str), drawn)]
    return rows[draw_rows(targets.keys[rows], strata(labels[rows]), fraction, seed=seed, salt=salt)]


def _kind(targets: Targets) -> str:
    return "held-out" if targets.units is not None else "stratified"


def _drawn(targets: Targets, labels: Array, spec: SplitSpec) -> tuple[Array, dict[str, Any]]:
    side = np.zeros(len(targets), dtype=np.int8)
    side[_draw(targets, labels, np.arange(len(targets)), spec.test, seed=spec.seed, salt="test")] = TEST
    _hold_out(targets, labels, side, spec.heldout / (1 - spec.test), seed=spec.seed)
    return side, {
        "kind": _kind(targets), "by": _by(targets), "seed": spec.seed,
        "fractions": {"heldout": spec.heldout, "test": spec.test},
    }  # fmt: skip


def _hold_out(targets: Targets, labels: Array, side: Array, fraction: float, *, seed: int) -> None:
    """Move some of the training rows to the held-out side."""
    rows = np.flatnonzero(side == TRAIN)
    side[_draw(targets, labels, rows, fraction, seed=seed, salt="heldout")] = HELDOUT


def _fold(targets: Targets, labels: Array, spec: SplitSpec) -> tuple[Array, dict[str, Any]]:
    assert spec.folds is not None
    assert spec.fold is not None
    if targets.units is not None:
        place = group_folds(targets.units, strata(labels), folds=spec.folds, seed=spec.seed)
        fold_of = np.array([place[unit] for unit in targets.units])
    else:
        fold_of = stratified_folds(targets.keys, strata(labels), folds=spec.folds, seed=spec.seed)
    n = int(fold_of.max()) + 1
    if not 1 <= spec.fold <= n:
        raise UserError(f"no fold {spec.fold}", fix=f"choose 1 to {n}")
    side = np.where(fold_of == spec.fold - 1, TEST, TRAIN).astype(np.int8)
    _hold_out(targets, labels, side, spec.heldout, seed=spec.seed)
    return side, {
        "kind": _kind(targets), "by": _by(targets), "seed": spec.seed, "folds": n, "fold": spec.fold,
        "fractions": {"heldout": spec.heldout},
    }  # fmt: skip


# --- given sides -----------------------------------------------------------------------------------------


def _side_named(word: str, path: Path | None) -> int:
    side = SPELLINGS.get(word.lower())
    if side is None:
        raise UserError(f"no side of a split is called {word!r}", path=path, fix=did_you_mean(word, SIDES))
    return side


def _listed(names: Array, side_of: Mapping[str, str], path: Path | None) -> Array:
    """Side of each row by its name; UserError where the list and the rows have no name in common."""
    known = {name: _side_named(side, path) for name, side in side_of.items()}
    side = np.array([known.get(name, OUT) for name in names], dtype=np.int8)
    if (side == OUT).all():
        raise UserError(
            f"names no labelled row (it names {next(iter(known), 'nothing')!r}, rows are called {names[0]!r})",
            path=path, fix="list the units, cells or genes of this data",
        )  # fmt: skip
    return side


def _from_lists(content: Mapping[str, Any], path: Path) -> dict[str, str]:
    """{name: side} of {"train": [...], "heldout": [...], "test": [...]}; UserError where a name is on two sides."""
    result: dict[str, str] = {}
    for word, names in content.items():
        if not isinstance(names, list) or word == "notes":  # split.json of a training holds more than sides
            continue
        for name in map(str, names):
            before = result.setdefault(name, word)
            if _side_named(before, path) != _side_named(word, path):
                raise UserError(f"{name!r} is on two sides: {before} and {word}", path=path, fix="keep one")
    if "train" not in {SIDES[_side_named(word, path)] for word in result.values()}:
        raise UserError(
            "has no list 'train'", path=path, fix='write {"train": [...], "heldout": [...], "test": [...]}'
        )
    return result


def _from_file(targets: Targets, labels: Array, spec: SplitSpec, path: Path) -> tuple[Array, dict[str, Any]]:
    """Sides from JSON (own lists, or a benchmark's folds) or from a table."""
    names = targets.keys if targets.units is None else targets.units
    if path.suffix != ".json":
        side_of = _from_table(path, targets)
        by = "unit" if targets.units is not None and set(side_of) & set(names) else None
        rows = names if by else targets.keys
        return _listed(rows, side_of, path), {"kind": "given", "by": by or _by(replace(targets, units=None))}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            "is not a split", path=path, fix="make one with cellformers split, or write lists of names"
        )
    if isinstance(content.get("folds"), list):
        return _benchmark_fold(targets, labels, spec, content, path)
    side_of = _from_lists(content, path)
    by_unit = targets.units is not None and bool(set(side_of) & set(names.tolist()))
    by = "unit" if by_unit else _by(replace(targets, units=None))
    return _listed(names if by_unit else targets.keys, side_of, path), {"kind": "given", "by": by}


def _from_table(path: Path, targets: Targets) -> dict[str, str]:
    key = targets.unit
    for column in SIDE_COLUMNS:
        try:
            _, (names, sides) = read_columns(path, column, key=key)
        except UserError:
            if column == SIDE_COLUMNS[-1]:
                raise
        else:
            break
    result: dict[str, str] = {}
    for name, side in zip(names, sides, strict=True):
        if name is None or side is None:
            continue
        if _side_named(result.setdefault(name, side), path) != _side_named(side, path):
            raise UserError(f"{name!r} is on two sides: {result[name]} and {side}", path=path, fix="keep one")
    return result


def _benchmark_fold(
    targets: Targets, labels: Array, spec: SplitSpec, content: dict[str, Any], path: Path
) -> tuple[Array, dict[str, Any]]:
    """The sides of one fold of a benchmark; the held-out rows are drawn from what it trains on."""
    folds: Sequence[dict[str, Any]] = content["folds"]
    if spec.fold is None:
        raise UserError(f"has {len(folds)} folds", path=path, fix="say which with --fold, from 1")
    if not 1 <= spec.fold <= len(folds):
        fix = f"choose 1 to {len(folds)}" if folds else "make the split again"
        raise UserError(f"has no fold {spec.fold}", path=path, fix=fix)
    fold, by = folds[spec.fold - 1], content.get("by")
    if not isinstance(fold, dict) or not isinstance(fold.get("test"), list):
        raise UserError(f"fold {spec.fold} has no list 'test'", path=path, fix="make the split again")
    if content.get("label") not in (*targets.names, None):
        raise UserError(
            f"is a split for the label {content['label']!r}, not {', '.join(targets.names)}", path=path,
            fix="train on the label of the benchmark",
        )  # fmt: skip
    names = _benchmark_names(targets, by, content, path)
    test = set(map(str, fold["test"]))
    if not isinstance(fold.get("train"), list | None):
        raise UserError(f"fold {spec.fold} has no list 'train'", path=path, fix="make the split again")
    train = None if fold.get("train") is None else set(map(str, fold["train"]))
    both = test & (train or set())
    if both:
        raise UserError(f"{by} {min(both)!r} is on both sides of fold {spec.fold}", path=path, fix="keep one")
    side_of = {name: "test" if name in test else "train" for name in names.tolist()}
    side_of = {name: side for name, side in side_of.items() if train is None or name in test | train}
    if not set(side_of) & test:
        raise UserError(f"fold {spec.fold} tests nothing that is labelled here", path=path)
    side = _listed(names, side_of, path)
    _hold_out(_grouped(targets, content, path), labels, side, spec.heldout, seed=spec.seed)
    return side, {
        "kind": "benchmark", "by": _by(targets) if by == "dataset" else by, "seed": spec.seed, "fold": spec.fold,
        "name": fold.get("name"), "fractions": {"heldout": spec.heldout},
    }  # fmt: skip


def _benchmark_names(targets: Targets, by: Any, content: Mapping[str, Any], path: Path) -> Array:
    """What each row is called in a benchmark's split; UserError where the rows don't show what it keeps apart."""
    unit = content.get("unit")
    # what is held out has to be known here too, or a donor on two sides would go unnoticed
    apart = targets.kind != "genes" and content.get("kind") != "stratified"
    named = by in ("unit", DATASET_UNIT) or (unit is not None and apart)
    if named and (targets.units is None or (unit is not None and unit != targets.unit)):
        raise UserError(f"holds out values of {unit!r}", path=path, fix=f"name the column with --unit {unit}")
    if by in ("dataset", DATASET_UNIT) and not all(SEPARATOR in key for key in targets.keys):
        what = "whole datasets" if by == "dataset" else "units of single datasets"
        raise UserError(f"holds out {what}", path=path, fix="give tokens and labels of each as NAME=PATH")
    if by == "dataset":
        return _datasets(targets)
    return _called(targets, by)


def _datasets(targets: Targets) -> Array:
    return np.array([key.split(SEPARATOR, 1)[0] for key in targets.keys], dtype=object)


def _called(targets: Targets, by: str | None) -> Array:
    """Names of the rows in a split by unit, by unit of a dataset, or by cell or gene."""
    if by == "unit":
        assert targets.units is not None
        return targets.units
    if by == DATASET_UNIT:
        assert targets.units is not None
        pairs = zip(_datasets(targets), targets.units, strict=True)
        return np.array([f"{dataset}{SEPARATOR}{unit}" for dataset, unit in pairs], dtype=object)
    return targets.keys


def _grouped(targets: Targets, content: Mapping[str, Any], path: Path) -> Targets:
    """The targets with the groups of a split of genes, which stay together in the held-out side too."""
    genes, groups = content.get("genes"), content.get("groups")
    if not groups:
        return targets
    if not isinstance(genes, dict) or not isinstance(groups, list) or len(genes) != len(groups):
        raise UserError("has not one group a gene", path=path, fix="make the split again")
    group_of = dict(zip(genes, groups, strict=True))
    units = np.array([group_of.get(key, f"gene {key}") for key in targets.keys], dtype=object)
    return replace(targets, unit=content.get("unit"), units=units)


# --- checks and description --------------------------------------------------------------------------------


def _check(targets: Targets, labels: Array, side: Array) -> None:
    if targets.units is not None:
        first: dict[str, int] = {}
        for unit, where in zip(targets.units.tolist(), side.tolist(), strict=True):
            if where != OUT and first.setdefault(unit, where) != where:
                raise UserError(
                    f"{targets.unit} {unit!r} is on two sides of the split: {SIDES[first[unit]]} and {SIDES[where]}",
                    fix="hold out whole units, or leave --unit out",
                )
    for number, name in enumerate(targets.names):
        column = labels[:, number]
        trained = set(column[(side == TRAIN) & (column >= 0)].tolist())
        if len(trained) < 2:
            raise UserError(
                f"{len(trained)} classes of {name!r} are left to train on",
                fix="each class must occur in two units at least: hold out others or less, or leave --unit out",
            )


def _described(targets: Targets, labels: Array, side: Array, record: dict[str, Any]) -> dict[str, Any]:
    names = _called(targets, record["by"])
    notes = []
    if record["kind"] == "stratified" and targets.kind != "genes":
        notes.append(
            "stratified over cells: cells of one donor are on several sides, so the scores are optimistic"
        )
    for number, name in enumerate(targets.names):
        column = labels[:, number]
        trained = set(column[side == TRAIN].tolist())
        unseen = Counter(targets.labels[(side >= HELDOUT) & ~np.isin(column, list(trained)), number].tolist())
        notes += [
            f"{name}: {c} is never trained on ({n} rows), so it can't be predicted" for c, n in unseen.items()
        ]
    if (side == OUT).any():
        notes.append(f"{int((side == OUT).sum())} labelled rows are on no side and left out")
    return {
        **record,
        "unit": targets.unit,
        **{
            word: sorted(set(names[side == number].tolist())) for number, word in enumerate(SIDES)
        },
        "n": {word: int((side == number).sum()) for number, word in enumerate(SIDES)},
        "notes": notes,
    }  # fmt: skip
