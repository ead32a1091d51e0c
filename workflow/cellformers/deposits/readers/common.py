"""What the readers of deposits share: finding a part's files, joining its tables to cells."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellformers.counts import Knowledge, Sample
from cellformers.errors import UserError
from cellformers.io import labels
from cellformers.io.source import Array, ReadOptions

MIN_MATCHED = 0.5
NO_LABEL = "no label"
AGAIN = "get the deposit again with `cellformers download --verify`"

Files = Mapping[str, Path]
"""The files of a part: paths by the names they are registered with, there or not."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a deposit, ready for `counts.ingest`."""

    samples: list[Sample]
    options: ReadOptions
    known: Knowledge


@dataclass(frozen=True, kw_only=True)
class LabelledGenes:
    """Genes of two classes as a deposit names them; all lists have one entry a gene."""

    path: Path
    """The file to name in messages."""
    names: list[str]
    """Ensembl ids or symbols; may repeat."""
    positive: list[bool]
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    """Scores of the source."""
    notes: list[str] = field(default_factory=list)


def pick(files: Files, pattern: str) -> Path:
    """The file of a part whose registered name the regular expression finds, packed or unpacked.

    Raises
    ------
    UserError
        If it is not there.
    """
    path = pick_if_there(files, pattern)
    if path is None:
        wanted = next((p for name, p in files.items() if re.search(pattern, name)), None)
        if wanted is None:
            raise UserError(
                f"{', '.join(files)} is no file that the reader looks for ({pattern})", fix="mend the entry"
            )
        raise UserError("no such file", path=wanted, fix="get the deposit with `cellformers download`")
    return path


def pick_if_there(files: Files, pattern: str) -> Path | None:
    """As `pick`; None where the file is not there."""
    for name, path in files.items():
        if not re.search(pattern, name):
            continue
        for candidate in (path, path.with_name(path.name.removesuffix(".gz")), Path(f"{path}.gz")):
            if candidate.is_file():
                return candidate
    return None


def read_labels(path: Path, **options: Sequence[str]) -> pa.Table:
    """`io.labels.read_labels` of a file of a deposit: what to do is to get it again, unless there is better advice."""
    try:
        return labels.read_labels(path, **options)
    except UserError as error:
        if error.fix and error.fix != labels.MAKE_AGAIN:
            raise
        raise UserError(error.what, path=error.path, fix=AGAIN) from error


def numbers(column: pa.ChunkedArray | pa.Array, *, name: str, path: Path) -> Array:
    """A column of a table as float64[n], NaN where it has no value.

    Raises
    ------
    UserError
        If it holds anything but numbers.
    """
    try:
        found = pc.cast(column, pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        text = " ".join(str(error).split())[:120]
        raise UserError(
            f"column {name!r} is no number in every row ({text})", path=path, fix=AGAIN
        ) from error
    return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.float64)


def rows_of(keys: pa.ChunkedArray | pa.Array, names: pa.Array, *, path: Path) -> Array:
    """For each name the row whose key it is, else -1; int64[n].

    Raises
    ------
    UserError
        If a key stands in more than one row of the table `path`.
    """
    distinct = pc.unique(keys)
    if len(distinct) != len(keys):
        counts = pc.value_counts(keys)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        key = repeated[0]["values"].as_py()
        what = (
            "has more than one row without a name" if key is None else f"names {key!r} in more than one row"
        )
        raise UserError(what, path=path, fix=AGAIN)
    found = pc.index_in(names, value_set=distinct)
    return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)


def take(table: pa.Table, rows: Array) -> pa.Table:
    """The rows of a table in this order, nulls for -1."""
    return table.take(pa.array(rows, mask=rows < 0))


def require_matched(
    rows: Array, *, path: Path, what: str, keys: Sequence[str] | pa.ChunkedArray, names: pa.Array
) -> None:
    """Refuse labels that plainly belong to other cells: under half of `what` are named in the table `path`.

    Raises
    ------
    UserError
        With an example of a key of the table and of a cell's name.
    """
    matched = int((rows >= 0).sum())
    if matched < MIN_MATCHED * len(rows):
        raise UserError(
            f"names only {matched:,} of the {len(rows):,} {what} (it holds {str(keys[0])!r}, they are called "
            f"{str(names[0])!r})",
            path=path,
            fix="the labels belong to other files: get both again with `cellformers download --verify`",
        )


def reason_where(mask: Array, reason: str) -> pa.Array:
    """The column `excluded`: `reason` where `mask` (bool[n]) is set, null elsewhere; string[n]."""
    return pc.if_else(pa.array(mask), pa.scalar(reason, pa.string()), pa.scalar(None, pa.string()))


def is_null(column: pa.ChunkedArray | pa.Array) -> Array:
    """bool[n]: where a column has no value."""
    return np.asarray(pc.is_null(column).to_numpy(zero_copy_only=False), dtype=bool)


def unlabelled(*columns: pa.ChunkedArray | pa.Array) -> tuple[pa.Array, list[str]]:
    """The column `excluded` for cells without a label in one of `columns`, and a note on how many there are."""
    mask = np.logical_or.reduce([is_null(column) for column in columns])
    note = f"{int(mask.sum()):,} of {len(mask):,} cells have no label and are excluded"
    return reason_where(mask, NO_LABEL), [note]
