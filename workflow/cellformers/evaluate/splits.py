"""Splits of cells and genes into training and test, written to disk once and read by every method.

Runs as `cellformers split`. Cells: whole donors or batches are held out where there are at least two (`held-out`),
whole datasets for a transfer (`transfer`), else single cells (`stratified`, marked as such). Genes: folds
stratified by class. A split depends on names, labels and the seed, never on the order of rows or files, and no
donor, cell or gene is on both sides of a fold: a split that would put one there is refused.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate.splitfile import Split, cells_digest, check_sides, check_units, row_names
from cellformers.evaluate.tables import Cells, read_cells, read_gene_table, read_vectors
from cellformers.folds import group_folds, stratified_folds
from cellformers.io.files import digest_arrays, read_json, read_metadata, stamp, write_json
from cellformers.revisions import REVISIONS

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


def _annotate(folds: list[dict[str, Any]], split: Split, cells: Cells, by: str, *, shared: bool) -> list[str]:
    """Add sizes and one-sided classes to the folds; return the notes about them."""
    notes = []
    for fold, (train, test) in zip(folds, split.masks(row_names(cells, by)), strict=True):
        if by != "cell" and not shared:
            check_units(cells, train, test, fold=fold["name"])
        trained, tested = set(cells.label[train]), set(cells.label[test])
        if len(trained) < 2:
            raise UserError(
                f"fold {fold['name']!r} has one class to train on ({', '.join(trained) or 'none'})",
                fix="a class must occur in two units at least: hold out other units, or leave unit out",
            )
        fold |= {"n_train": len(train), "n_test": len(test)}
        fold |= {"test_only": sorted(tested - trained), "train_only": sorted(trained - tested)}
        if fold["test_only"]:
            lost = int(np.isin(cells.label[test].astype(str), fold["test_only"]).sum())
            notes.append(
                f"fold {fold['name']}: {', '.join(fold['test_only'])} only in test ({lost} cells), can't be predicted"
            )
        if by == "dataset" and fold["train_only"]:
            notes.append(f"fold {fold['name']}: {', '.join(fold['train_only'])} only in training")
    return notes


def _choose(
    cells: Cells, train: Sequence[str] | None, test: Sequence[str] | None, given: Path | None
) -> tuple[Literal["held-out", "transfer", "stratified", "given"], str]:
    """Kind of split and what it is made by."""
    if given is not None:
        return "given", "unit" if cells.unit is not None else "cell"
    if test:
        datasets = set(cells.dataset)
        for name in (*(train or ()), *test):
            if name not in datasets:
                raise UserError(f"no cells of dataset {name!r}", fix=did_you_mean(name, sorted(datasets)))
        return "transfer", "dataset"
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
    both_ways: bool = True,
    shared_units: bool = False,
    given: Path | None = None,
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
        Dataset names for a transfer: train on the ones, test on the others (`both_ways`: and back).
    shared_units
        Accept that a unit of that name is on both sides of a transfer; noted in the split.
    given
        JSON file with a split of your own, {"folds": [{"train": [...], "test": [...]}]}, lists of units
        (of cells if `unit` is left out). Units in neither list are left out of the fold.
    note
        A caveat to carry to every score.

    Raises
    ------
    UserError
        If there is one class only, a unit would be on both sides, or every class is in one unit alone.
    """
    if folds < 2:
        raise UserError(f"{folds} folds are too few", fix="ask for 2 at least")
    table, excluded = read_cells(cells, label=label, unit=unit)
    classes = sorted(set(table.label))
    if len(classes) < 2:
        raise UserError(f"label {label!r} has one class ({classes[0]}), nothing to tell apart")
    if len(classes) == len(table) or len(classes) > max(20, len(table) / 2):
        raise UserError(
            f"label {label!r} has {len(classes)} classes for {len(table)} cells",
            fix="give a column of classes, each with several cells, not of numbers or names",
        )
    kind, by = _choose(table, train, test, given)
    if kind == "transfer":
        _check_apart(cells, train or (), test or ())
    notes = [note] if note else []
    if kind == "given":
        parts = _given(Path(str(given)), row_names(table, by))
    elif kind == "transfer":
        sides = [(sorted(train or ()), sorted(test or ()))]
        sides += [sides[0][::-1]] if both_ways else []
        parts = [{"name": f"{'+'.join(a)} to {'+'.join(b)}", "train": a, "test": b} for a, b in sides]
    elif kind == "held-out":
        spread = Counter(c for c, _ in set(zip(table.label, table.unit, strict=True)))  # type: ignore[arg-type]
        if max(spread.values()) < 2:
            raise UserError(
                f"every class of {label!r} occurs in one {unit!r} only, so held-out units can't be predicted",
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
        "shared_units": shared_units,
        "seed": seed,
        "classes": classes,
        "class_sizes": {c: int((table.label == c).sum()) for c in classes},
        "n": len(table),
        "excluded": excluded,
        "folds": parts,
        "notes": notes,
    }
    notes += _annotate(parts, Split(content), table, by, shared=shared_units)
    if shared_units and kind == "transfer":
        notes.append(f"the same {unit} may be on both sides: what is held out is the dataset")
    parameters = {"label": label, "unit": unit, "folds": folds, "seed": seed}
    content |= stamp(
        "split", REVISIONS["split"], parameters=parameters, inputs={"cells": cells_digest(table)}
    )
    write_json(content, output)
    return Split(content)


def _groups(labels: str | Path, *, gene: str, group: str, names: np.ndarray) -> np.ndarray:
    """The group of each gene, object[n] of str; a gene without one is a group of its own."""
    ids, values = read_gene_table(labels, gene=gene, column=group)
    known = dict(zip(ids, values, strict=True))
    return np.array([f"gene {name}" if known[name] is None else known[name] for name in names], dtype=object)


def make_gene_split(
    *,
    labels: str | Path,
    label: str,
    positive: str,
    embeddings: Sequence[Path],
    output: str | Path,
    dataset: str,
    gene: str = "gene_id",
    group: str | None = None,
    folds: int = 5,
    seed: int = 0,
    note: str | None = None,
) -> Split:
    """Split labelled genes into stratified folds and write the split, which holds the labels as well.

    Parameters
    ----------
    labels, label, gene
        csv or tsv table, its column of classes and its column of gene ids (an Ensembl version is ignored).
    positive
        The class whose probability is scored; all others together are the negative class. Where the column holds
        the positive class only, genes with an empty field are the negative class, else they are left out.
    group
        Column of groups that stay together, such as pairs matched in expression or gene families. A gene whose
        matched partner, of the other class, is in training is predicted worse than by chance.
    embeddings
        Gene embeddings of every model of the benchmark: only genes that all of them have are kept, so that every
        method is scored on the same genes.

    Raises
    ------
    UserError
        If the positive class is missing (the nearest is named) or a class has fewer genes than there are folds.
    """
    ids, values = read_gene_table(labels, gene=gene, column=label)
    present = sorted({v for v in values if v is not None})
    if positive not in present:
        raise UserError(
            f"no gene is {positive!r} in column {label!r}", path=labels, fix=did_you_mean(positive, present)
        )
    others = [v for v in present if v != positive]
    negative = others[0] if len(others) == 1 else f"not {positive}"
    labelled = np.array([v is not None or not others for v in values], dtype=bool)
    covered = np.ones(len(ids), dtype=bool)
    for path in embeddings:
        covered &= np.isin(ids.astype(str), read_vectors([Path(path)], key="gene_id")[0].astype(str))
    keep = labelled & covered
    order = np.argsort(ids[keep].astype(str))
    names = ids[keep][order]
    truth = np.array([positive if v == positive else negative for v in values[keep][order]], dtype=object)
    sizes = {c: int((truth == c).sum()) for c in (negative, positive)}
    if folds < 2 or min(sizes.values()) < folds:
        counts = ", ".join(f"{n} {c}" for c, n in sizes.items())
        raise UserError(f"too few labelled genes for {folds} folds ({counts})", path=labels)
    groups = None if group is None else _groups(labels, gene=gene, group=group, names=names)
    if groups is None:
        fold_of = stratified_folds(names, truth, folds=folds, seed=seed)
    else:
        place = group_folds(groups, truth, folds=folds, seed=seed)
        fold_of = np.array([place[g] for g in groups])
        if any(len(set(truth[fold_of == f])) < 2 for f in range(folds)):
            raise UserError(
                f"the groups of column {group!r} leave a fold with one class",
                path=labels,
                fix="leave group out",
            )
    content: dict[str, Any] = {
        "task": "genes",
        "kind": "stratified" if groups is None else "held-out",
        "by": "gene",
        "dataset": dataset,
        "label": label,
        "unit": group,
        "seed": seed,
        "classes": [negative, positive],
        "class_sizes": sizes,
        "n": len(names),
        "excluded": {
            "no label": int((~labelled).sum()),
            "no embedding": int((labelled & ~covered).sum()),
        },
        "genes": dict(zip(names.tolist(), truth.tolist(), strict=True)),
        "groups": None if groups is None else groups.tolist(),
        "folds": [
            {"name": f"fold {f + 1}", "train": None, "test": names[fold_of == f].tolist()}
            for f in range(folds)
        ],
        "notes": [note] if note else [],
    }
    parameters = {"label": label, "positive": positive, "group": group, "folds": folds, "seed": seed}
    content |= stamp(
        "split", REVISIONS["split"], parameters=parameters, inputs={"genes": digest_arrays(names, truth)}
    )
    write_json(content, output)
    return Split(content)
