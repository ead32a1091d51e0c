"""Labels of genes: dosage sensitivity, promoters, the NOTCH1 network, regulatory range.

Each reader gives the names of the genes as the source has them and which are of the positive class; mapping them to
gene ids is `deposits.parts`' task.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cellformers.deposits.entries import GenePart
from cellformers.deposits.readers.common import AGAIN, Files, LabelledGenes, pick, read_labels
from cellformers.errors import UserError
from cellformers.io.lines import open_bytes
from cellformers.io.pickles import read_lists
from cellformers.io.source import reading

_ENSEMBL = re.compile(r"ENSG\d{11}")
_RANGE = re.compile(r"(long|short)[- _]range(\s+TF)?", re.IGNORECASE)


def read_collins(part: GenePart, files: Files) -> LabelledGenes:
    """Scores of dosage sensitivity (Collins 2022): positive from the part's threshold up.

    Raises
    ------
    UserError
        If the file or a column is missing, or a score is no probability.
    """
    path = pick(files, r"dosage_sensitivity_scores")
    if part.threshold is None:
        raise UserError(f"the part {part.name} has no threshold", fix="mend the entry")
    scores = list(dict.fromkeys([part.threshold.column, *part.columns]))
    table = read_labels(path, text_columns=["#gene"], columns=["#gene", *scores])
    for column in scores:
        if not (pa.types.is_floating(table[column].type) or pa.types.is_integer(table[column].type)):
            raise UserError(f"column {column!r} is no number in every row", path=path, fix=AGAIN)
        least, most = pc.min_max(table[column]).values()
        if least.is_valid and not 0 <= least.as_py() <= most.as_py() <= 1:
            raise UserError(f"column {column!r} is no probability in every row", path=path, fix=AGAIN)
    rows = [row for row in table.to_pylist() if row["#gene"] and row[part.threshold.column] is not None]
    positive = [row[part.threshold.column] >= part.threshold.at_least for row in rows]
    return LabelledGenes(
        path=path,
        names=[row["#gene"].strip() for row in rows],
        positive=positive,
        columns={column: [row[column] for row in rows] for column in scores},
        notes=[
            f"{sum(positive):,} of {len(rows):,} genes have {part.threshold.column} of at least "
            f"{part.threshold.at_least:g}"
        ],
    )


def read_dosage(part: GenePart, files: Files) -> LabelledGenes:
    """Two columns of Ensembl ids, one a class, the shorter one padded with blanks; perhaps a byte-order mark.

    Raises
    ------
    UserError
        If the file or a column is missing, or a field holds no Ensembl id.
    """
    path = pick(files, r"\.csv")
    negative, positive = _classes(part)
    columns = [positive, negative]
    table = read_labels(path, text_columns=columns, columns=columns)
    lists = {}
    for column in columns:
        fields = [str(field).strip() for field in table[column].to_pylist() if field is not None]
        lists[column] = [field for field in fields if field]
        odd = next((name for name in lists[column] if not _ENSEMBL.fullmatch(name)), None)
        if odd is not None:
            raise UserError(
                f"column {column!r} holds {odd[:40]!r}, which is no Ensembl id", path=path, fix=AGAIN
            )
    return _of_two(path, lists[negative], lists[positive])


def read_bivalent(part: GenePart, files: Files) -> LabelledGenes:
    """Two texts with Ensembl ids, whose names begin with those of the classes.

    Raises
    ------
    UserError
        If a file is missing or holds no Ensembl id.
    """
    negative, positive = (pick(files, f"^{re.escape(name)}") for name in _classes(part))
    return _of_two(positive, _ids(negative), _ids(positive))


def read_notch1(part: GenePart, files: Files) -> LabelledGenes:
    """A pickled dict of class to Ensembl ids, opened by the restricted unpickler.

    The names of its classes have not been seen: each of the part's classes has to be in one of them, whatever the
    case.

    Raises
    ------
    UserError
        If the file is missing, asks for anything but containers and texts, or has other classes.
    """
    path = pick(files, r"n1_network")
    lists = read_lists(path)
    chosen = []
    for name in _classes(part):
        fits = [key for key in lists if name in re.sub(r"[^a-z0-9]+", "_", key.lower())]
        if len(fits) != 1:
            raise UserError(
                f"holds the classes {', '.join(map(repr, lists)) or 'none'}, where one called {name} is expected",
                path=path,
                fix="write gene_id and label into a csv and name it as the benchmark's labels",
            )
        chosen.append(fits[0])
    for key in chosen:
        odd = next((gene for gene in lists[key] if not _ENSEMBL.match(gene)), None)
        if odd is not None:
            raise UserError(f"class {key!r} holds {odd[:40]!r}, which is no Ensembl id", path=path, fix=AGAIN)
    made = _of_two(path, *(lists[key] for key in chosen))
    others = [key for key in lists if key not in chosen]
    made.notes.extend([f"classes that are not used: {', '.join(others)}"] if others else [])
    return made


def read_range(part: GenePart, files: Files) -> LabelledGenes:
    """Symbols in the first, unnamed column, `assignment` is long-range or short-range TF; others are left out.

    Raises
    ------
    UserError
        If the file or a column is missing, or nothing is assigned so.
    """
    del part
    path = pick(files, r"\.csv")
    table = read_labels(path, text_columns=["", "assignment"], columns=["", "assignment"])
    names, positive, others = [], [], 0
    for row in table.to_pylist():
        match = _RANGE.fullmatch((row["assignment"] or "").strip())
        if match is None or not row[""]:
            others += 1
            continue
        names.append(row[""].strip())
        positive.append(match.group(1).lower() == "long")
    if not names:
        raise UserError(
            "column 'assignment' holds neither long-range TF nor short-range TF", path=path, fix=AGAIN
        )
    notes = [f"{others:,} of {len(table):,} rows have another assignment and are left out"] if others else []
    return LabelledGenes(path=path, names=names, positive=positive, notes=notes)


def _classes(part: GenePart) -> tuple[str, str]:
    """(negative, positive) of a part."""
    return next(name for name in part.classes if name != part.positive), part.positive


def _of_two(path: Path, negative: Sequence[str], positive: Sequence[str]) -> LabelledGenes:
    return LabelledGenes(
        path=path,
        names=[*negative, *positive],
        positive=[False] * len(negative) + [True] * len(positive),
    )


def _ids(path: Path) -> list[str]:
    """The Ensembl ids in a text, in order; they may repeat."""
    with reading(path), open_bytes(path) as file:
        found = [name for line in file for name in _ENSEMBL.findall(line.decode(errors="replace"))]
    if not found:
        raise UserError("holds no Ensembl ids", path=path, fix=AGAIN)
    return found
