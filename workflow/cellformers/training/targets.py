"""What a fine-tuned model is to learn: labels of cells or of genes, read from tables.

    targets = read_cell_targets({"": "cells.parquet"}, ["cell_type"], unit="donor")
    targets = read_gene_targets("labels.csv", "dosage_sensitive", key="ensembl_id", positive="Yes")

Tables are csv, tsv or Parquet, gzipped or not. Rows without a label are left out and counted; labels stay text until
it is known which of them the tokens have, and are then numbered in sorted order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.genes import map_features
from cellformers.io.files import read_json
from cellformers.selection import as_text
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]

KINDS = ("cells", "genes", "tasks")
KEY_COLUMNS = (
    "cell_id",
    "gene_id",
    "",
)  # where the names are, unless said otherwise; R's row names have no header
SEPARATOR = ":"  # between dataset and cell_id, where there are several datasets


@dataclass(frozen=True, eq=False, kw_only=True)
class Targets:
    """Labelled cells or genes, one row each, in the order of their tables."""

    kind: str
    """A value of KINDS: one label a cell, one a gene, or several a cell."""
    names: tuple[str, ...]
    """The columns of labels; one unless `kind` is "tasks"."""
    keys: Array
    """object[n] of str: cell_id (behind `dataset:` where datasets have names), or gene id."""
    labels: Array
    """object[n, len(names)] of str, None where a row lacks a label."""
    unit: str | None = None
    """The column of donors, batches or groups that stay on one side of a split."""
    units: Array | None = None
    """object[n] of str: its values."""
    sides: Array | None = None
    """object[n] of str, None where a row has none: sides given by the table."""
    positive: str | None = None
    """The class whose probability is scored, where there are two; None: the second in sorted order."""
    excluded: Mapping[str, int]
    """How many rows of the tables were left out, by reason."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Array) -> "Targets":
        """Some of the rows, in the order given."""
        return replace(
            self, keys=self.keys[rows], labels=self.labels[rows],
            units=None if self.units is None else self.units[rows],
            sides=None if self.sides is None else self.sides[rows],
        )  # fmt: skip


def present(values: Array) -> Array:
    """Where an object array is not None: bool, of the same shape."""
    return np.asarray(values != np.array(None, dtype=object), dtype=bool)


def read_columns(path: str | Path, *columns: str, key: str | None = None) -> tuple[str, list[Array]]:
    """The key column of a table (None: cell_id or gene_id, else one without a name) and others, all as text.

    Raises
    ------
    UserError
        If the file is not a table or lacks a column; the nearest name is given.
    """
    from cellformers.io.labels import read_labels  # reads csv as well; not needed where labels are in memory

    # barcodes and ids may look like numbers
    table = read_labels(path, text_columns=[key] if key is not None else KEY_COLUMNS)
    names = table.column_names
    if key is None:
        key = next((name for name in KEY_COLUMNS if name in names), None)
    if key is None:
        raise UserError(
            "has no column cell_id", path=path,
            fix=f"name the column of cells or genes with --key: {', '.join(names)}",
        )  # fmt: skip
    for name in (key, *columns):
        if name not in names:
            raise UserError(f"has no column {name!r}", path=path, fix=did_you_mean(name, names))
    return key, [as_text(table.column(name)) for name in (key, *columns)]


def _unique(keys: Array, path: str | Path) -> None:
    twice = next((key for key, n in Counter(keys.tolist()).items() if n > 1), None)
    if twice is not None:
        raise UserError(
            f"{twice!r} is in more than one row", path=path,
            fix="keep one of them, or give each dataset its own table and name",
        )  # fmt: skip


def read_cell_targets(
    tables: Mapping[str, str | Path] | str | Path,
    labels: Sequence[str],
    *,
    key: str | None = None,
    unit: str | None = None,
    side: str | None = None,
    several: bool = False,
) -> Targets:
    """Labels of cells.

    Parameters
    ----------
    tables
        A table with one row a cell, or one a dataset by the dataset's name.
    labels
        Columns of classes: one, or several tasks (`several`, or more than one column).
    key
        Column of cell ids; None: cell_id.
    unit, side
        Columns of donors or batches, and of given sides (train, heldout, test).

    Raises
    ------
    UserError
        If a column is missing or named twice, a cell is there twice, or no cell has a label (and a unit, where one is
        asked for).
    """
    if not labels:
        raise UserError("no column of labels", fix="name one with --label")
    twice = next((name for name, n in Counter(labels).items() if n > 1), None)
    if twice is not None:
        raise UserError(f"label {twice!r} is given twice", fix="give each --label once")
    if not isinstance(tables, Mapping):
        tables = {"": tables}
    extra = [name for name in (unit, side) if name is not None]
    excluded = {"no label": 0} | ({"no unit": 0} if unit else {})
    parts: list[list[Array]] = []
    for dataset, path in sorted(tables.items()):
        _, (ids, *columns) = read_columns(path, *labels, *extra, key=key)
        label = np.stack(columns[: len(labels)], axis=1)
        labelled = present(label).any(axis=1) & present(ids)
        placed = labelled & present(columns[len(labels)]) if unit else labelled
        excluded["no label"] += int((~labelled).sum())
        if unit:
            excluded["no unit"] += int((labelled & ~placed).sum())
        if not placed.any():
            wanted = " and ".join(map(repr, (*labels, *([unit] if unit else []))))
            raise UserError(f"no cell has {wanted}", path=path, fix="check the column")
        _unique(ids[placed], path)
        names = ids[placed]
        if dataset:
            names = np.array([f"{dataset}{SEPARATOR}{name}" for name in names], dtype=object)
        parts.append([names, label[placed], *(column[placed] for column in columns[len(labels) :])])
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Targets(
        kind="tasks" if several or len(labels) > 1 else "cells", names=tuple(labels), keys=joined[0],
        labels=joined[1], unit=unit, units=joined[2] if unit else None, sides=joined[-1] if side else None,
        excluded=excluded,
    )  # fmt: skip


def read_gene_targets(
    table: str | Path,
    label: str,
    *,
    key: str | None = None,
    group: str | None = None,
    side: str | None = None,
    positive: str | None = None,
) -> Targets:
    """Labels of genes, under the ids or symbols of the table.

    Parameters
    ----------
    table
        One row a gene, or a split of genes by `cellformers split`, which holds the labels as well.
    label, key
        Columns of classes and of gene ids (default: gene_id).
    group, side
        Columns of genes that stay together (such as matched pairs) and of given sides.
    positive
        The class to score; all others together are the negative one. Where the column holds nothing else, genes with
        an empty field are the negative class.

    Raises
    ------
    UserError
        If a column is missing, a gene has two labels, or the positive class does not occur.
    """
    extra = [name for name in (group, side) if name is not None]
    genes_of_split = _split_genes(table)
    if genes_of_split is not None:
        ids, values = (np.array([*part, None], object)[:-1] for part in zip(*genes_of_split, strict=True))
        columns: list[Array] = []
    else:
        _, (ids, values, *columns) = read_columns(table, label, *extra, key=key)
    named = present(ids)
    if positive is not None:
        values = _against(values, positive, table, label)
    labelled = named & present(values)
    if not labelled.any():
        raise UserError(f"no gene has a {label!r}", path=table, fix="check the column")
    units = None
    if group is not None:
        units = columns[0].copy()
        alone = ~present(units)
        units[alone] = [f"gene {name}" for name in ids[alone]]
    rows = _first_rows(ids, values, np.flatnonzero(labelled), table)
    return Targets(
        kind="genes", names=(label,), keys=ids[rows], labels=values[rows, None], unit=group,
        units=None if units is None else units[rows], sides=columns[-1][rows] if side else None,
        positive=positive, excluded={"no label": int((named & ~labelled).sum())},
    )  # fmt: skip


def _split_genes(path: str | Path) -> list[tuple[str, str]] | None:
    """Genes and classes of a split of genes; None where the file is no JSON."""
    if Path(path).suffix != ".json":
        return None
    content = read_json(path)
    genes = content.get("genes") if isinstance(content, dict) else None
    if not isinstance(genes, dict) or not genes:
        raise UserError(
            "holds no labels of genes",
            path=path,
            fix="give a table, or a split of genes by cellformers split",
        )
    return [(str(gene), str(label)) for gene, label in genes.items()]


def _against(values: Array, positive: str, path: str | Path, label: str) -> Array:
    """Two classes: `positive` and the rest, which is the empty fields where there is no other class."""
    found = sorted({v for v in values if v is not None})
    if positive not in found:
        raise UserError(
            f"no gene is {positive!r} in column {label!r}", path=path, fix=did_you_mean(positive, found)
        )
    others = [v for v in found if v != positive]
    negative = others[0] if len(others) == 1 else f"not {positive}"
    result = np.empty(len(values), dtype=object)
    result[:] = [positive if v == positive else None if v is None and others else negative for v in values]
    return result


def _first_rows(ids: Array, values: Array, rows: Array, path: str | Path) -> Array:
    """The first of `rows` of each gene; UserError where a later one says something else."""
    first: dict[str, int] = {}
    for row in rows.tolist():
        if values[first.setdefault(ids[row], row)] != values[row]:
            raise UserError(f"gene {ids[row]} has two labels", path=path, fix="keep one of them")
    return np.array(list(first.values()), dtype=np.int64)


def gene_rows(targets: Targets, vocabulary: Vocabulary) -> tuple[Targets, Array, dict[str, Any]]:
    """The genes that have a token: their targets under the vocabulary's ids, tokens int32, and a report.

    Names are mapped as features of a count file are: other spellings, former ids and versions stand for the gene.

    Raises
    ------
    UserError
        If no gene has a token, or two names of one gene have different labels.
    """
    features = map_features(targets.keys, None, vocabulary)
    tokens = features.token_of_feature
    inside = np.flatnonzero(tokens >= 0)
    if not len(inside):
        raise UserError(
            f"none of the {len(targets)} labelled genes is in the vocabulary {vocabulary.name!r}, "
            f"e.g. {targets.keys[0]!r}",
            fix="name the column of Ensembl ids or symbols with --key",
        )
    first: dict[int, int] = {}
    for row in inside.tolist():
        other = first.setdefault(int(tokens[row]), row)
        if targets.labels[other, 0] != targets.labels[row, 0]:
            raise UserError(
                f"{targets.keys[other]} and {targets.keys[row]} are one gene with two labels",
                fix="keep one of them",
            )
    rows = np.array(list(first.values()), dtype=np.int64)
    outside = sorted(targets.keys[tokens < 0].tolist())
    report = {
        "labelled": len(targets),
        "mapped": len(rows),
        "other names of one gene": len(inside) - len(rows),
        "outside the vocabulary": outside,
    }
    kept = replace(targets.take(rows), keys=features.gene_of_feature[rows])
    return kept, tokens[rows], report


def drop_rare(targets: Targets, min_cells: int) -> tuple[Targets, Array, dict[str, dict[str, int]]]:
    """Without labels of under `min_cells` rows; the rows that still have one, and {column: {class: rows lost}}."""
    labels = targets.labels.copy()
    lost: dict[str, dict[str, int]] = {}
    for number, name in enumerate(targets.names):
        sizes = Counter(label for label in labels[:, number] if label is not None)
        rare = {label: n for label, n in sorted(sizes.items()) if n < min_cells}
        labels[np.isin(labels[:, number].astype(str), list(rare)), number] = None
        if rare:
            lost[name] = rare
    rows = np.flatnonzero(present(labels).any(axis=1))
    return replace(targets, labels=labels).take(rows), rows, lost


def encode(targets: Targets) -> tuple[Array, tuple[tuple[str, ...], ...]]:
    """Numbers of classes, int64 [n, tasks] (-1 where there is no label), and the classes of each task, sorted.

    Raises
    ------
    UserError
        If a column has one class, or looks like numbers or names instead of classes.
    """
    ids = np.full(targets.labels.shape, -1, dtype=np.int64)
    classes = []
    for number, name in enumerate(targets.names):
        column = targets.labels[:, number]
        labelled = present(column)
        found = sorted(set(column[labelled].tolist()))
        if len(found) < 2:
            which = f"one class ({found[0]})" if found else "no class"
            raise UserError(f"label {name!r} has {which}, nothing to tell apart", fix="choose another column")
        if len(found) > max(20, int(labelled.sum()) / 2):
            raise UserError(
                f"label {name!r} has {len(found)} classes for {int(labelled.sum())} rows",
                fix="give a column of classes, each with several rows, not of numbers or names",
            )
        number_of = {label: i for i, label in enumerate(found)}
        ids[labelled, number] = [number_of[label] for label in column[labelled]]
        classes.append(tuple(found))
    return ids, tuple(classes)
