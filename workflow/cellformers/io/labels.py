"""Label tables: csv, tsv or Parquet, gzipped or not, joined to cells by name.

    labels: {path: labels.csv.gz, key: barcode}

Tables as R writes them (a header without a name for the row names, or one field shorter than the rows) are read as
well: their first column is called `""`.
"""

import csv
import io
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import read_table
from cellformers.io.lines import open_bytes
from cellformers.io.source import Array

_MOST_COLUMNS = 20_000
_LONGEST = 1 << 20  # characters of a header
MAKE_AGAIN = "make it again, or give another file"


@dataclass(frozen=True)
class LabelTable:
    """A table with one row a cell.

    `key` names the column that holds the cell names; `columns` maps those to join to the names they get, None joins
    all of them under their own names.
    """

    path: Path
    key: str
    columns: Mapping[str, str] | None = None


def read_labels(
    path: str | Path,
    *,
    text_columns: Sequence[str] = (),
    categories: Sequence[str] = (),
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Read a csv, tsv or Parquet table, gzipped or not.

    The separator of text is the most frequent of tab, comma and semicolon in the first line. Column types are found
    out, except that `text_columns` stay text (a barcode may look like a number); empty fields and `NA` are null.
    Columns of text named in `categories` come as dictionaries, 4 bytes a row. Where `columns` are given, only these
    are read and kept.

    Raises
    ------
    UserError
        If the file is missing, empty or not such a table, or lacks one of `columns`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", path=path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        table = _plain(read_table(path))
        _require(columns or (), table.column_names, path)
        return table if columns is None else table.select(list(columns))
    types = dict.fromkeys(text_columns, pa.string())
    types |= dict.fromkeys(categories, pa.dictionary(pa.int32(), pa.string()))
    return _read_text(path, types=types, columns=columns)


def _require(columns: Sequence[str], there: Sequence[str], path: Path) -> None:
    for column in columns:
        if column not in there:
            raise UserError(f"has no column {column!r}", path=path, fix=did_you_mean(column, there))


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionary types and an index that pandas left."""
    columns = {}
    for name in table.column_names:
        array = table.column(name)
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        columns["" if name.startswith("__index_level_") else name] = array
    return pa.table(columns)


def _read_text(path: Path, *, types: Mapping[str, pa.DataType], columns: Sequence[str] | None) -> pa.Table:
    from pyarrow import csv as pacsv

    try:
        with open_bytes(path) as binary, io.TextIOWrapper(binary, encoding="utf-8", newline="") as file:
            first = file.readline(_LONGEST)
            separator = max("\t,;", key=first.count)
            header = next(csv.reader([first], delimiter=separator), [])
            rest = iter(lambda: file.readline(_LONGEST), "")
            row = next(csv.reader(rest, delimiter=separator), [])
        header = [name.strip().removeprefix("\ufeff") for name in header]
        if len(row) == len(header) + 1:
            header = ["", *header]
        if not header or not row:
            raise UserError(
                "holds no rows: not the right file, or not a whole one", path=path, fix=MAKE_AGAIN
            )
        if len(header) > _MOST_COLUMNS:
            raise UserError(f"has {len(header):,} columns, is no table of labels", path=path)
        repeated = next((name for name, n in Counter(header).items() if n > 1), None)
        if repeated is not None:
            raise UserError(f"has two columns called {repeated!r}", path=path, fix="rename one of them")
        _require(columns or (), header, path)
        # read_csv finds types out and holds the whole text for that: twice the table, or more
        known = all(name in types for name in columns or header)
        with open_bytes(path) as stream:
            read = pacsv.open_csv if known else pacsv.read_csv
            found = read(
                stream,
                read_options=pacsv.ReadOptions(column_names=header, skip_rows=1, use_threads=False),
                parse_options=pacsv.ParseOptions(delimiter=separator, newlines_in_values=True),
                convert_options=pacsv.ConvertOptions(
                    column_types=dict(types),
                    strings_can_be_null=True,
                    include_columns=list(columns or ()),
                ),
            )
            return found.read_all() if known else found
    except (pa.ArrowException, UnicodeDecodeError, csv.Error, OSError, EOFError, zlib.error) as error:
        raise UserError(f"not readable as a csv, tsv or Parquet table ({error})", path=path) from error


def join_labels(
    labels: LabelTable,
    cell_ids: pa.Array,
    *,
    barcodes: pa.Array | None = None,
    samples: pa.Array | None = None,
) -> tuple[dict[str, pa.ChunkedArray], str]:
    """The table's columns for the cells in order, null for those it lacks, and a line on how many it knew.

    The key is compared with the cell ids; where the table has a column `sample`, `{sample}:{key}` is; if nothing
    matches, the key is compared with the barcodes, as long as samples don't share them.

    Parameters
    ----------
    cell_ids
        string[n_cells].
    barcodes
        The cells' names within their files, where the cell ids aren't just these.
    samples
        The cells' samples, where there are several.

    Raises
    ------
    UserError
        If a column is missing, a key stands twice, or no cell is matched.
    """
    path = labels.path
    table = read_labels(path, text_columns=[labels.key])
    used = {labels.key} if samples is None else {labels.key, "sample"}
    wanted = labels.columns
    if wanted is None:
        wanted = {column: column for column in table.column_names if column not in used}
    _require([labels.key, *wanted], table.column_names, path)
    keys = table.column(labels.key).cast(pa.string()).to_numpy(zero_copy_only=False)
    rows = np.full(len(cell_ids), -1)
    if samples is not None and "sample" in table.column_names:
        given = table.column("sample").cast(pa.string()).to_pylist()
        rows = _match(
            np.array([f"{s}:{k}" for s, k in zip(given, keys, strict=True)], object), cell_ids, path
        )
    if (rows < 0).all():
        rows = _match(keys, cell_ids, path)
    if (rows < 0).all() and barcodes is not None:
        rows = _match(keys, barcodes, path)
        hit = rows[rows >= 0]
        if len(np.unique(hit)) < len(hit):
            raise UserError(
                f"column {labels.key!r} holds barcodes that several samples share",
                path=path,
                fix="write {sample}:{barcode} into it, or add a column 'sample'",
            )
    matched = int((rows >= 0).sum())
    if not matched:
        raise UserError(
            f"column {labels.key!r} matches no cell (it holds {str(keys[0])!r}, cells are called "
            f"{cell_ids[0].as_py()!r})",
            path=path,
            fix="give the column that holds the cell names as key",
        )
    found = pa.array(rows, mask=rows < 0)
    note = f"the label table knows {matched:,} of {len(rows):,} cells ({len(keys):,} rows)"
    return {name: table.column(column).take(found) for column, name in wanted.items()}, note


def _match(keys: Array, names: pa.Array, path: Path) -> Array:
    """For each name the row whose key it is, else -1."""
    import pandas as pd

    index = pd.Index(keys)
    if not index.is_unique:
        known = index[index.notna() & index.duplicated()]
        if len(known):
            raise UserError(
                f"key {str(known[0])!r} stands in more than one row", path=path, fix="keep one of them"
            )
        keep = np.flatnonzero(index.notna())
        return np.append(keep, -1)[pd.Index(keys[keep]).get_indexer(names.to_pylist())]
    return np.asarray(index.get_indexer(names.to_pylist()))
