"""SCP1303, left ventricles in cardiomyopathy (Chaffin 2022): the portal's h5ad, or its text form.

In the h5ad X holds counts corrected by CellBender; the uncorrected ones, in the layer cellranger_raw, are read. The
text form is an mtx of genes x cells beside names of genes (Ensembl, symbol) and barcodes, and a table about the cells
whose second line names the portal's types of columns.
"""

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from cellformers.counts import Columns, Knowledge, Sample
from cellformers.deposits.entries import CellPart
from cellformers.deposits.readers.common import (
    AGAIN,
    Files,
    Part,
    numbers,
    pick,
    pick_if_there,
    read_labels,
    require_matched,
    rows_of,
    take,
    unlabelled,
)
from cellformers.errors import UserError, did_you_mean
from cellformers.io.source import Array, ReadOptions

LAYER = "cellranger_raw"
DISEASES = {
    "nf": "NF",
    "hcm": "HCM",
    "dcm": "DCM",
    "normal": "NF",
    "hypertrophic cardiomyopathy": "HCM",
    "dilated cardiomyopathy": "DCM",
}
FINE_TYPE, COARSE_TYPE = "cell_type_leiden0.6", "cell_type__ontology_label"


def read_all(part: CellPart, files: Files, work: Path) -> Part:
    """All hearts; the h5ad is taken where both forms are there. Nuclei without a type, a disease or
    a donor are excluded as "no label".

    Raises
    ------
    UserError
        If files or columns are missing, a disease is not known, or the table belongs to other cells.
    """
    del part, work  # nothing is stated of the donors, nothing has to be unpacked
    h5ad = pick_if_there(files, r"\.h5ad$")
    if h5ad is not None:
        return Part(
            samples=[Sample(h5ad)],
            options=ReadOptions(layer=LAYER, gene_column="gene_ids"),
            known=Knowledge(
                describe=partial(_describe_h5ad, path=h5ad), check=partial(_compare_corrected, path=h5ad)
            ),
        )
    mtx = pick_if_there(files, r"\.mtx")
    if mtx is None:
        folder = next(iter(files.values())).parent
        raise UserError(
            f"holds neither {' nor '.join(name for name in files if name.endswith(('.h5ad', '.mtx')))}",
            path=folder,
            fix="`cellformers download scp1303` says what to fetch by hand",
        )
    for pattern in ("genes", "barcodes"):
        if pick(files, pattern).parent != mtx.parent:
            raise UserError("has no names of genes and cells beside it", path=mtx, fix=AGAIN)
    table = pick(files, r"MetaData")
    return Part(
        samples=[Sample(mtx)],
        options=ReadOptions(),
        known=Knowledge(describe=partial(_describe_text, path=table)),
    )


def _describe_h5ad(
    _: pa.Array, __: pa.Array | None, columns: Columns, *, path: Path
) -> tuple[Columns, list[str]]:
    """Standard names for what the h5ad says itself."""
    _require(("donor_id", "disease", FINE_TYPE), columns, path)
    excluded, notes = unlabelled(columns[FINE_TYPE], columns["disease"], columns["donor_id"])
    more: Columns = {
        "donor": columns["donor_id"],
        "cell_type": columns[FINE_TYPE],
        "excluded": excluded,
    }
    disease = _diseases(columns["disease"], path)
    if disease.to_pylist() != columns["disease"].to_pylist():
        more["disease"] = disease
    if "biosample_id" in columns:
        more["sample"] = columns["biosample_id"]
    return more, notes


def _describe_text(
    barcodes: pa.Array, _: pa.Array | None, __: Columns, *, path: Path
) -> tuple[Columns, list[str]]:
    """All columns of the table under their own names, and the standard ones."""
    table = _without_types(read_labels(path, text_columns=["NAME"]), path)
    _require(("donor_id", "disease__ontology_label", COARSE_TYPE), table.column_names, path)
    rows = rows_of(table["NAME"], barcodes, path=path)
    require_matched(rows, path=path, what="nuclei", keys=table["NAME"], names=barcodes)
    joined = take(table, rows)
    fine = FINE_TYPE in joined.column_names
    columns: Columns = {name: joined[name] for name in joined.column_names if name != "NAME"}
    columns["donor"] = joined["donor_id"]
    columns["disease"] = _diseases(joined["disease__ontology_label"], path)
    columns["cell_type"] = joined[FINE_TYPE if fine else COARSE_TYPE]
    columns["excluded"], notes = unlabelled(columns["cell_type"], columns["disease"], columns["donor"])
    if "biosample_id" in columns:
        columns["sample"] = columns["biosample_id"]
    if not fine:
        notes.append(f"cell_type is {COARSE_TYPE}; the h5ad has {FINE_TYPE} instead, whose types differ")
    return columns, notes


def _without_types(table: pa.Table, path: Path) -> pa.Table:
    """The table without the line of the portal's types (NAME is TYPE); numeric columns become numbers."""
    _require(("NAME",), table.column_names, path)
    if str(table["NAME"][0]) != "TYPE":
        raise UserError(
            "its second line does not name the types of the columns (TYPE), as the portal's tables do",
            path=path,
            fix="use the file as the portal has it",
        )
    kinds = {name: str(table[name][0]).lower() for name in table.column_names}
    table = table.slice(1)
    for number, name in enumerate(table.column_names):
        if kinds[name] != "numeric" or not pa.types.is_string(table[name].type):
            continue
        try:
            table = table.set_column(number, name, table[name].cast(pa.float64()))
        except pa.ArrowInvalid as error:
            raise UserError(f"column {name!r} is no number in every row ({error})", path=path) from error
    return table


def _require(wanted: tuple[str, ...], there: Columns | list[str], path: Path) -> None:
    for column in wanted:
        if column not in there:
            raise UserError(f"has no column {column!r}", path=path, fix=did_you_mean(column, there))


def _diseases(column: pa.ChunkedArray | pa.Array, path: Path) -> pa.Array:
    """NF, HCM or DCM for each cell."""
    texts = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    coded = texts.cast(pa.string()).dictionary_encode()
    names = []
    for name in coded.dictionary.to_pylist():
        if str(name).strip().lower() not in DISEASES:
            known = ", ".join(dict.fromkeys(DISEASES.values()))
            raise UserError(f"has the disease {name!r}, known are {known}", path=path, fix=AGAIN)
        names.append(DISEASES[str(name).strip().lower()])
    return pa.array(names, pa.string()).take(coded.indices)


def _compare_corrected(totals: Array, columns: Columns, *, path: Path) -> list[str]:
    """How far the counts read are above those that CellBender left, where the file states these."""
    if "cellbender_ncount" not in columns:
        return []
    corrected = numbers(columns["cellbender_ncount"], name="cellbender_ncount", path=path)
    known = corrected > 0
    if not known.any():
        return []
    ratio = float(np.median(totals[known] / corrected[known]))
    return [f"uncorrected total counts are {ratio:.3f} times those that CellBender left, in the median"]
