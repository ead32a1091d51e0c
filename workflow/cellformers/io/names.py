"""Names of cells and features: which column holds the ids, which the symbols, are the cells unique.

Feature ids keep the name they have in the file; only the version of an Ensembl id goes (`ENSG00000123456.4` and
`ENSG00000123456.4_PAR_Y` both become `ENSG00000123456`; the two stay separate features, whose counts a vocabulary
sums). Symbols with a dot, such as AC012345.1, and pre-2016 `ENSGR...` ids are left as they are.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cellformers.errors import UserError, did_you_mean
from cellformers.io.arrow import strings
from cellformers.io.lines import various

Strings = np.ndarray[Any, np.dtype[np.object_]]

_VERSIONED = re.compile(r"(ENS[A-Z]*\d{6,})(?:\.\d+)?(?:_PAR_Y)?")
_ENSEMBL = re.compile(r"ENS[A-Z]*G[A-Z]?\d{6,}(?:\.\d+)?(?:_PAR_Y)?")

ID_COLUMNS = (
    "ensembl_id", "ensembl_ids", "ensemblid", "ensembl", "ensembl_gene_id", "gene_ids", "gene_id", "geneid",
    "feature_id", "feature_ids", "accession", "gene_stable_id", "id",
)  # fmt: skip
SYMBOL_COLUMNS = (
    "gene_symbols", "gene_symbol", "feature_name", "gene_name", "gene_names", "gene_short_name", "symbol", "symbols",
    "hgnc_symbol", "genesymbol", "gene", "genes", "genename", "feature_names", "name",
)  # fmt: skip
_ROWS_AT_A_TIME = 1 << 16
_LONGEST_NAME = 4096


def strip_version(name: str) -> str:
    """An Ensembl id without its version and `_PAR_Y`; any other name as it is."""
    match = _VERSIONED.fullmatch(name)
    return match.group(1) if match else name


def looks_ensembl(names: Iterable[str]) -> bool:
    """Whether at least half of `names` are Ensembl gene ids."""
    hits = total = 0
    for name in names:
        total += 1
        hits += _ENSEMBL.fullmatch(name) is not None
    return total > 0 and 2 * hits >= total


def choose_features(
    index: Sequence[str] | Strings,
    columns: Sequence[str],
    read: Callable[[str], Strings],
    *,
    requested: str | None,
    path: Path,
    index_name: str = "",
    notes: list[str],
) -> tuple[Strings, Strings | None]:
    """Feature ids and, where known, symbols.

    Parameters
    ----------
    index
        The names the features go by in the file.
    columns
        Names of the other columns there are; `read(column)` gives one as strings, "" where missing.
    requested
        The column the user named (`gene_column`), or None: then the index if it looks like Ensembl, else a column
        with an Ensembl-like name and Ensembl-like values, else the index.
    index_name
        The index's own name, accepted as `requested` like "index".
    notes
        Gets a line when a column is preferred to the index.

    Raises
    ------
    UserError
        If the requested column does not exist.
    """
    index = as_strings(index)
    source: str | None = None
    if requested is not None:
        if requested in columns:
            source = requested
        elif requested not in {"index", "_index", index_name}:
            raise UserError(
                f"has no gene column {requested!r}",
                path=path,
                fix="gene_column: " + did_you_mean(requested, columns),
            )
    elif not looks_ensembl(index):
        for column in _by_name(columns, ID_COLUMNS):
            if looks_ensembl(read(column)):
                source = column
                notes.append(f"gene ids from column {column!r}")
                break
    ids = index
    if source is not None:
        values = read(source)
        ids = as_strings([v or i for v, i in zip(values, index, strict=True)])
    symbols: Strings | None = None
    for column in _by_name(columns, SYMBOL_COLUMNS):
        if column != source and not (source is None and column == index_name):
            values = read(column)
            if any(values) and not looks_ensembl(values):
                symbols = values
                break
    if symbols is None and source is not None and not looks_ensembl(index) and not _are_numbers(index):
        symbols = index
    return as_strings([strip_version(name) for name in ids]), symbols


def _are_numbers(names: Strings) -> bool:
    return all(name.isdigit() for name in names)


def _by_name(columns: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """The columns called as in `wanted`, in that order, whatever their case."""
    return [column for name in wanted for column in columns if column.lower() == name]


def as_strings(values: Iterable[Any]) -> Strings:
    """A one-dimensional object array of str."""
    items = list(values)
    out = np.empty(len(items), dtype=object)
    out[:] = items
    return out


def check_texts(names: Sequence[str] | Strings, what: str, path: Path) -> None:
    """Refuse names that files can't hold or that no one gives: with a zero byte, over 4,096 characters.

    Raises
    ------
    UserError
        If there is one; `what` says of what: "cell", "gene".
    """
    if len(names) == 0 or (max(map(len, names)) <= _LONGEST_NAME and "\0" not in "".join(names)):
        return
    bad = next(name for name in names if len(name) > _LONGEST_NAME or "\0" in name)
    what = f"a {what} is called {bad[:30]!r}"
    raise UserError(
        what + (" (with a zero byte)" if "\0" in bad else f"... ({len(bad):,} characters)"),
        path=path,
        fix="give it another name",
    )


def cell_names(
    n_cells: int,
    read: Callable[[int, int], Iterable[str]],
    *,
    make_unique: bool,
    path: Path,
    notes: list[str],
) -> pa.StringArray:
    """Cell names as a compact Arrow array, read `read(lo, hi)` at a time and checked to be unique.

    Raises
    ------
    UserError
        If a name occurs twice and `make_unique` is not set.
    """
    parts, chunks = [np.empty(0, dtype=np.int64)], []
    for lo in range(0, n_cells, _ROWS_AT_A_TIME):
        hi = min(lo + _ROWS_AT_A_TIME, n_cells)
        names = list(various(read(lo, hi)))
        check_texts(names, "cell", path)
        parts.append(np.array([hash(name) for name in names], dtype=np.int64))
        chunks.append(strings(names))
    hashes = np.concatenate(parts)
    try:
        array = pa.concat_arrays(chunks) if chunks else strings([])
    except pa.ArrowInvalid as error:
        raise UserError("names of cells take more than 2 GiB", path=path, fix="split the file") from error
    # 8 bytes a cell instead of a set of strings; equal hashes are looked at again
    hashes.sort()
    if not (hashes[1:] == hashes[:-1]).any():
        return array
    seen: set[str] = set()
    for position, name in enumerate(array.to_pylist()):
        if name in seen:
            if not make_unique:
                raise UserError(
                    f"cell name {name!r} occurs more than once (again at cell {position + 1})",
                    path=path,
                    fix="set make_unique: true to number the later ones, or give each sample its own file",
                )
            notes.append("duplicate cell names were numbered (make_unique)")
            return strings(make_names_unique(array.to_pylist()))
        seen.add(name)
    return array


def make_names_unique(names: Sequence[str]) -> list[str]:
    """`names` with "-1", "-2", ... put behind the second, third, ... of each, never hitting a name there is."""
    taken = set(names)
    used: set[str] = set()
    next_number: dict[str, int] = {}
    out = []
    for name in names:
        unique = name
        if name in used:
            number = next_number.get(name, 1)
            while (unique := f"{name}-{number}") in taken:
                number += 1
            next_number[name] = number + 1
            taken.add(unique)
        used.add(unique)
        out.append(unique)
    return out


def as_pass(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """A `filter_pass` column as bool: 1, 1.0, True, "1" and "true" pass, anything else (also missing) does not."""
    if values.dtype.kind in "biuf":
        return np.asarray(values == 1, dtype=bool)
    return np.array([str(v).strip().lower() in {"1", "1.0", "true"} for v in values], dtype=bool)
