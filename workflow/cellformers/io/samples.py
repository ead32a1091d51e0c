"""Sample tables: several raw files that make one dataset.

A csv or tsv table with the columns `sample` and `path`; every further column is written for each cell of the
sample. Paths are relative to the folder of the table, so that table and files travel together.
"""

import csv
from pathlib import Path

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import check_plain

NEEDED = ("sample", "path")
_LARGEST = 64 << 20  # bytes


def read_sample_table(path: str | Path) -> list[dict[str, str]]:
    """The rows of a sample table in order, `path` resolved against the table's folder.

    Raises
    ------
    UserError
        If the table is missing, empty, ragged, lacks a needed column, or names a sample twice or a file not there.
    """
    path = Path(path)
    if path.exists() and check_plain(path).stat().st_size > _LARGEST:
        raise UserError("is too large for a sample table", path=path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            reader = csv.DictReader(file, delimiter="\t" if first.count("\t") >= first.count(",") else ",")
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
            names = [name or "" for name in reader.fieldnames or []]
    except FileNotFoundError:
        raise UserError("no such sample table", path=path) from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"not readable as a table ({error})", path=path) from None
    for column in NEEDED:
        if column not in names:
            raise UserError(f"has no column {column!r}", path=path, fix=did_you_mean(column, names))
    if not rows:
        raise UserError("has no rows", path=path, fix="list at least one sample")
    seen: set[str] = set()
    for number, row in enumerate(rows, start=2):
        if not row["sample"] or not row["path"]:
            raise UserError(f"line {number}: sample or path is empty", path=path)
        if row["sample"] in seen:
            raise UserError(f"line {number}: sample {row['sample']!r} is there twice", path=path)
        seen.add(row["sample"])
        row["path"] = str(path.parent / row["path"])
    return rows
