"""GSE156793, the human fetal atlas (Cao 2020): one dense loom file of 4,062,980 cells, and a table about them.

The loom is unpacked into the scratch folder, unless it is there unpacked, and read in whole columns of chunks. What
is known of the cells comes from S1, which has commas between its fields whatever its name says; the loom's own copy
of it is not read, because S1 fits into memory by columns.
"""

from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from cellformers.counts import Columns, Knowledge, Sample
from cellformers.deposits.archives import gunzip
from cellformers.deposits.entries import CellPart
from cellformers.deposits.readers.common import (
    AGAIN,
    Files,
    Part,
    pick,
    read_labels,
    rows_of,
    take,
    unlabelled,
)
from cellformers.errors import UserError
from cellformers.io.source import ReadOptions

# Columns of S1 and what they are called here.
LABELS = {
    "Fetus_id": "donor",
    "Assay": "batch",
    "Organ": "organ",
    "Main_cluster_name": "cell_type",
    "Organ_cell_lineage": "organ_lineage",
    "Development_day": "development_day",
    "Sex": "sex",
}
MAX_LOOM_BYTES = 64 << 30  # the published one has 21.4 GB


def read_all(part: CellPart, files: Files, work: Path) -> Part:
    """All organs; cells without Main_cluster_name or Fetus_id are excluded as "no label".

    Raises
    ------
    UserError
        If a file is missing or damaged, S1 lacks a column, or a cell of the loom is not in S1.
    """
    del part
    loom, cells = pick(files, r"\.loom"), pick(files, r"S1_metadata_cells")
    with loom.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        loom = gunzip(loom, work / loom.name.removesuffix(".gz"), limit=MAX_LOOM_BYTES)
    return Part(
        samples=[Sample(loom)],
        options=ReadOptions(gene_column="gene_id", cell_column="sample"),
        known=Knowledge(describe=partial(_describe, path=cells), own_columns=False),
    )


def _describe(
    barcodes: pa.Array, _: pa.Array | None, __: Columns, *, path: Path
) -> tuple[Columns, list[str]]:
    """The columns of S1 for the cells, joined on `sample`."""
    table = read_labels(path, text_columns=["sample"], categories=list(LABELS), columns=["sample", *LABELS])
    rows = rows_of(table["sample"], barcodes, path=path)
    absent = int((rows < 0).sum())
    if absent:
        first = barcodes[int((rows < 0).argmax())].as_py()
        raise UserError(
            f"lacks {absent:,} of the {len(rows):,} cells of the loom, e.g. {first}", path=path, fix=AGAIN
        )
    joined = take(table.select(list(LABELS)).unify_dictionaries().combine_chunks(), rows)
    del table  # four million names: the columns take their place
    columns: Columns = {name: joined[column].cast(pa.string()) for column, name in LABELS.items()}
    columns["development_day"] = _days(columns["development_day"], path)
    columns["excluded"], notes = unlabelled(columns["cell_type"], columns["donor"])
    return columns, notes


def _days(column: pa.ChunkedArray, path: Path) -> pa.ChunkedArray:
    """Days as whole numbers."""
    try:
        return pc.cast(pc.cast(column, pa.float64()), pa.int64())
    except pa.ArrowInvalid as error:
        raise UserError(
            f"column 'Development_day' is no whole number in every row ({error})", path=path, fix=AGAIN
        ) from error
