"""GSE129096, iPSC to cardiomyocyte (Selewa 2020): Drop-seq and DroNc-seq of two cell lines, and a heart.

Each is one gzipped table, genes x cells, read in blocks. What is known of a cell of the two lines is in its name,
`<barcode>_<day>_<Rep>`. The Drop-seq run was mixed with chimpanzee cells: the authors leave out barcodes, whatever
the day, whose hg_specificity_score in species_assign_matrix.txt is under 0.5, and so does this reader.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellformers.counts import Columns, Knowledge, Sample
from cellformers.deposits.entries import CellPart
from cellformers.deposits.readers.common import (
    AGAIN,
    Files,
    Part,
    pick,
    read_labels,
    reason_where,
    rows_of,
    take,
)
from cellformers.errors import UserError
from cellformers.io.source import ReadOptions

CHIMPANZEE = "chimpanzee"
LEAST_SPECIFIC = 0.5
# What was sequenced: days of each line.
LIBRARIES = {
    "drop": {"Rep1": ("0", "1", "3", "7"), "Rep2": ("0", "1", "3", "7", "15")},
    "dronc": {"Rep1": ("0", "3", "7"), "Rep2": ("0", "1", "3", "7", "15")},
}
_NAME = r"^(?P<barcode>[ACGTN]+)_(?P<day>[0-9]+)_(?P<line>Rep[0-9]+)$"


def read_drop(part: CellPart, files: Files, work: Path) -> Part:
    """Drop-seq; chimpanzee barcodes are excluded.

    Raises
    ------
    UserError
        If a file is missing, a cell has another name than expected, or a library is missing or unknown.
    """
    del part, work  # nothing is stated of the lines, and the table is read as it is
    path, species = pick(files, r"DROP.*\.tsv"), pick(files, r"species_assign")
    return _part(path, Knowledge(describe=partial(_describe, platform="drop", path=path, species=species)))


def read_dronc(part: CellPart, files: Files, work: Path) -> Part:
    """DroNc-seq.

    Raises
    ------
    UserError
        As `read_drop`.
    """
    del part, work
    path = pick(files, r"DRONC.*\.tsv")
    return _part(path, Knowledge(describe=partial(_describe, platform="dronc", path=path, species=None)))


def read_heart(part: CellPart, files: Files, work: Path) -> Part:
    """DroNc-seq of a heart: one sample without labels.

    Raises
    ------
    UserError
        If the file is missing or holds cells of the lines.
    """
    del part, work
    path = pick(files, r"Heart.*\.tsv")
    return _part(path, Knowledge(describe=partial(_describe_heart, path=path)))


def _part(path: Path, known: Knowledge) -> Part:
    return Part(samples=[Sample(path)], options=ReadOptions(genes_in_rows=True), known=known)


def _describe_heart(
    barcodes: pa.Array, _: pa.Array | None, __: Columns, *, path: Path
) -> tuple[Columns, list[str]]:
    foreign = pc.index(pc.match_substring_regex(barcodes, _NAME), True).as_py()
    if foreign >= 0:
        raise UserError(
            f"names a cell {barcodes[foreign].as_py()!r}, as the files of the two lines do",
            path=path,
            fix=AGAIN,
        )
    return {"platform": pa.repeat("dronc", len(barcodes))}, []


def _describe(
    barcodes: pa.Array, _: pa.Array | None, __: Columns, *, platform: str, path: Path, species: Path | None
) -> tuple[Columns, list[str]]:
    """Day and line from the cells' names; the lines are the donors, a day of a line is a batch."""
    parts = pc.extract_regex(barcodes, pattern=_NAME)
    odd = pc.index(pc.is_null(parts), True).as_py()
    if odd >= 0:
        raise UserError(
            f"names a cell {barcodes[odd].as_py()!r}, where <barcode>_<day>_<Rep> is expected",
            path=path,
            fix=AGAIN,
        )
    barcode, day, line = (pc.struct_field(parts, name) for name in ("barcode", "day", "line"))
    batch = pc.binary_join_element_wise(line, day, "_")
    _check_libraries(set(pc.unique(batch).to_pylist()), platform, path)
    columns: Columns = {
        "donor": line,
        "line": line,
        "day": day,
        "platform": pa.repeat(platform, len(line)),
        "batch": batch,
    }
    if species is None:
        return columns, []
    more, notes = _species(barcode, species)
    return columns | more, notes


def _check_libraries(found: set[str], platform: str, path: Path) -> None:
    """Refuse a table that lacks a library or has one too many."""
    expected = {f"{line}_{day}" for line, days in LIBRARIES[platform].items() for day in days}
    for names, what in ((expected - found, "lacks cells of"), (found - expected, "has cells of the unknown")):
        if names:
            shown = ", ".join(name.replace("_", " day ") for name in sorted(names)[:4])
            raise UserError(f"{what} {shown}", path=path, fix=AGAIN)


def _species(barcode: pa.Array, path: Path) -> tuple[Columns, list[str]]:
    """Score and exclusion of each cell; the table knows bare barcodes only, so all cells of a barcode share them."""
    table = read_labels(path, text_columns=["CB"], columns=["CB", "hg_specificity_score"])
    column = table["hg_specificity_score"]
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)) or column.null_count:
        raise UserError("has a hg_specificity_score that is no number", path=path, fix=AGAIN)
    rows = rows_of(table["CB"], barcode, path=path)
    if (rows < 0).all():
        raise UserError(
            f"knows none of the barcodes (it holds {str(table['CB'][0])!r}, cells have {str(barcode[0])!r})",
            path=path,
            fix=AGAIN,
        )
    scores = take(table, rows)["hg_specificity_score"].cast(pa.float64())
    chimpanzee = pc.less(scores, LEAST_SPECIFIC).fill_null(False).to_numpy()
    n_cells = np.asarray(pc.value_counts(barcode.filter(pa.array(chimpanzee))).field("counts"))
    shared = int((n_cells > 1).sum())
    notes = [
        f"{int(chimpanzee.sum()):,} of {len(rows):,} cells are chimpanzee's by their barcodes and excluded; "
        f"{int((rows < 0).sum()):,} cells are not in {path.name} and kept"
    ]
    if shared:
        notes.append(
            f"{shared:,} chimpanzee barcodes occur on several days or lines; all their cells are excluded, as the "
            "authors do"
        )
    return {"hg_specificity_score": scores, "excluded": reason_where(chimpanzee, CHIMPANZEE)}, notes
