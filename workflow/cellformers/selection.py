"""Which cells of a dataset to take: those with certain labels, or so many drawn at random.

    where = read_where(["cell_type=T cell,B cell", "donor=d1"], "cells.parquet")
    choice = choose_cells("tokens/0.parquet", cells="cells.parquet", where=where, max_cells=1000, seed=0)
    choice.keep          # bool, one a cell of the tokens file, in its order

Labels are compared as text and as a whole: `T cell` is not found in `NK T cell`. Cells are drawn from the table of
the whole dataset by a hash of their names, so that neither shards nor the order of rows matter.
"""

import csv
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellformers.errors import UserError, did_you_mean
from cellformers.folds import hash_order
from cellformers.io.arrow import as_numbers, numbers
from cellformers.io.files import digest_arrays, open_parquet, read_table

Array = np.ndarray[Any, Any]

MISSING = ("", "nan", "NaN", "NA", "<NA>")  # what a missing label looks like once it has been text


class Labels(NamedTuple):
    """A column of labels."""

    codes: Array
    """int32[n]: which of `names` each row has, -1 where the label is missing."""
    names: list[str]
    """Ascending, each in at least one row."""


class Choice(NamedTuple):
    """The cells of a tokens file that were chosen."""

    keep: Array
    """bool[cells of the file], in its order."""
    parameters: dict[str, Any]
    """How they were chosen, for the metadata of what is made of them."""
    digest: str
    """sha256 of the names of all cells chosen, those of other shards included."""


def _text(value: Any) -> str | None:
    """A label as text, None where it is missing; whole floats lose their `.0`."""
    if isinstance(value, float):
        value = None if value != value else int(value) if value.is_integer() else value
    return None if value is None or str(value).strip() in MISSING else str(value)


def as_text(column: pa.ChunkedArray) -> Array:
    """A column of labels as an object array of str, None where missing; whole floats lose their `.0`."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    texts = [_text(value) for value in column.to_pylist()]
    return np.array([*texts, None], dtype=object)[:-1]  # the None more keeps numpy from guessing another type


def encode(column: pa.ChunkedArray, *, name: str, path: str | Path) -> Labels:
    """A column of texts, numbers, booleans or categories as labels; UserError for one of lists and the like."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        encoded = pc.dictionary_encode(column.combine_chunks())
    except pa.ArrowNotImplementedError:
        raise UserError(
            f"column {name!r} holds {column.type}, no labels", path=path, fix="name a column of labels"
        ) from None
    texts = [_text(value) for value in encoded.dictionary.to_pylist()]
    names = sorted({text for text in texts if text is not None})
    code = {text: number for number, text in enumerate(names)}
    code_of = np.array([*(-1 if text is None else code[text] for text in texts), -1], np.int32)
    return Labels(code_of[as_numbers(encoded.indices, missing=-1)], names)


def flags(table: pa.Table, name: str) -> Array:
    """A column of booleans as bool[n], False where missing; ValueError where it holds anything else."""
    column = table.column(name)
    if not (pa.types.is_boolean(column.type) or pa.types.is_null(column.type)):
        raise ValueError(f"its column {name!r} holds {column.type}, no flags")
    return as_numbers(column.cast(pa.bool_()), missing=0)


def read_column(cells: str | Path, column: str) -> Labels:
    """One column of a table of cells; UserError, with the nearest name, where it has none of that name."""
    with open_parquet(cells) as file:
        names = file.schema_arrow.names
    if column not in names:
        raise UserError(f"has no column {column!r}", path=cells, fix=did_you_mean(column, names))
    return encode(read_table(cells, [column])[column], name=column, path=cells)


def read_where(conditions: Sequence[str], cells: str | Path) -> dict[str, list[str]]:
    """Conditions as they are written on a command line, by column: `COLUMN=VALUE` or `COLUMN=VALUE,VALUE`.

    Several conditions on one column allow all of their values. A value with a comma is taken as it is where the
    column has it, and can always be quoted as in a csv file.

    Raises
    ------
    UserError
        If a condition is not of this form, or the table has no such column or value.
    """
    with open_parquet(cells) as file:
        columns = file.schema_arrow.names
    found: dict[str, list[str]] = {}
    for condition in conditions:
        column, equals, rest = condition.partition("=")
        if not equals:
            raise UserError(f"condition {condition!r} is not COLUMN=VALUE", fix="write --where cell_type=B,T")
        named = [name for name in columns if condition.startswith(f"{name}=")]
        if named:  # the name itself may contain "="
            column = max(named, key=len)
            rest = condition[len(column) + 1 :]
        known = read_column(cells, column).names
        values = [rest] if rest in known else next(csv.reader([rest], skipinitialspace=True)) or [""]
        found[column] = list(dict.fromkeys([*found.get(column, []), *values]))
    for column, values in found.items():
        _codes(values, read_column(cells, column).names, column=column, path=cells)
    return found


def _codes(values: Collection[str], names: list[str], *, column: str, path: str | Path) -> list[int]:
    unknown = next((value for value in values if value not in names), None)
    if unknown is not None:
        raise UserError(f"no cell has {column} {unknown!r}", path=path, fix=did_you_mean(unknown, names))
    return [names.index(value) for value in values]


def choose_cells(
    tokens: str | Path,
    *,
    cells: str | Path | None = None,
    where: Mapping[str, Collection[str]] | None = None,
    max_cells: int | None = None,
    seed: int = 0,
) -> Choice | None:
    """Choose cells of a tokens file; None where nothing is asked for, so that all are taken.

    Parameters
    ----------
    tokens
        A tokens shard.
    cells
        The dataset's cells.parquet: cell_id and labels, all cells of all shards. `where` needs it.
    where
        Labels to take, by column: a cell needs one of the labels in every column. Missing labels never match.
    max_cells
        Draw so many of the cells that `where` leaves: without replacement, each set as likely as any other, the same
        for the same names and seed. With `cells` they are drawn from the dataset (those that passed QC), so shards
        agree on them; a drawn cell that has no tokens is not replaced. Without, they are drawn from this file alone.
    seed
        Of the draw.

    Raises
    ------
    UserError
        If a column or label does not exist, no cell is left, or the tokens are of cells that the table lacks.
    """
    where = dict(where or {})
    if not where and max_cells is None:
        return None
    if where and cells is None:
        raise UserError(
            "labels to choose cells by are in the table of cells", fix="give --cells cells.parquet"
        )
    if max_cells is not None and max_cells < 1:
        raise UserError(f"can't draw {max_cells} cells", fix="give 1 or more")
    present = read_table(tokens, ["cell_id"])["cell_id"].cast(pa.string())
    names, eligible = (present, np.ones(len(present), bool)) if cells is None else _eligible(cells, where)
    if max_cells is not None:
        if cells is not None:
            eligible &= _passed(cells, len(eligible))
        rows = np.flatnonzero(eligible)
        some = names.take(numbers(rows)).to_pylist()
        drawn = rows[hash_order(some, seed=seed, salt="cells")[:max_cells]]
        eligible = np.zeros(len(eligible), bool)
        eligible[drawn] = True
    if cells is not None and not eligible.any():
        raise UserError("no cell has all the labels asked for", path=cells, fix="ask for fewer at once")
    parameters: dict[str, Any] = {}
    if where:
        parameters["where"] = {column: sorted(set(where[column])) for column in sorted(where)}
    if max_cells is not None:
        parameters |= {"max_cells": max_cells, "seed": seed}
    chosen = names.take(numbers(np.flatnonzero(eligible))).combine_chunks()
    keep = eligible if cells is None else eligible[rows_of(present, names, path=tokens, cells=cells)]
    return Choice(keep, parameters, digest_arrays(chosen.take(pc.sort_indices(chosen))))


def _eligible(cells: str | Path, where: Mapping[str, Collection[str]]) -> tuple[pa.ChunkedArray, Array]:
    """Names of all cells of the table, and bool[n] whether they have the labels."""
    names = read_table(cells, ["cell_id"])["cell_id"].cast(pa.string())
    eligible = np.ones(len(names), bool)
    for column, values in where.items():
        labels = read_column(cells, column)
        eligible &= np.isin(labels.codes, _codes(values, labels.names, column=column, path=cells))
    return names, eligible


def _passed(cells: str | Path, n: int) -> Array:
    """bool[n]: whether the cells of a table passed QC; all where it does not say."""
    with open_parquet(cells) as file:
        if "qc_pass" not in file.schema_arrow.names:
            return np.ones(n, bool)
    return as_numbers(read_table(cells, ["qc_pass"])["qc_pass"], missing=0).astype(bool)


def rows_of(
    present: pa.ChunkedArray, names: pa.ChunkedArray, *, path: str | Path, cells: str | Path
) -> Array:
    """int64[n]: the rows of a table of cells that hold the cells of another file.

    Parameters
    ----------
    present, names
        Names of the cells of the file and of the table.
    path, cells
        The two, for the error.

    Raises
    ------
    UserError
        If the table lacks a cell.
    """
    rows = pc.index_in(present, value_set=names)
    if rows.null_count:
        stranger = present.filter(pc.is_null(rows))[0].as_py()
        raise UserError(
            f"has no cell {stranger!r}, which {path} holds",
            path=cells,
            fix="give the table of the same dataset",
        )
    return as_numbers(rows).astype(np.int64)
