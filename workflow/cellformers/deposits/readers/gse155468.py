"""GSE155468, ascending thoracic aortic aneurysm (Li 2020): 11 tables of text in a tar, labels from the authors' code.

Each table is genes x cells, with symbols; its header has one field fewer than its rows, or an empty first field. The
label table calls a cell `<barcode>.1_<n>`, where n numbers the samples, and calls TAA1 to TAA8 ATAA1 to ATAA8.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellformers.counts import Columns, Knowledge, Sample
from cellformers.deposits.archives import unpack_tar
from cellformers.deposits.entries import CellPart
from cellformers.deposits.readers.common import (
    AGAIN,
    Files,
    Part,
    numbers,
    pick,
    read_labels,
    require_matched,
    rows_of,
    take,
    unlabelled,
)
from cellformers.errors import UserError
from cellformers.io.source import Array, ReadOptions

# In the order in which the labels number them.
SAMPLES = ("Con4", "Con6", "Con9", *(f"TAA{i}" for i in range(1, 9)))
# Columns of the label table and what they are called here.
LABELS = {
    "celltype": "cell_type",
    "celltype2": "cell_subtype",
    "cellcycle": "cellcycle",
    "seurat_clusters": "seurat_clusters",
    "nCount_RNA": "nCount_RNA",
    "nFeature_RNA": "nFeature_RNA",
}
NUMBERS = ("nCount_RNA", "nFeature_RNA")
# Sums of the files include the rare genes that the authors' objects lack, so they are the same or slightly above.
MOST_BELOW = 0.01
HIGHEST_RATIO = 1.5
_MEMBER = re.compile(r"GSM\d+_(\w+)\.txt\.gz")
_KEY = r"^(?P<barcode>.+?)(?:[-.]1)?_(?P<number>\d+)$"
_SUFFIX = r"[-.]1$"


def read_all(part: CellPart, files: Files, work: Path) -> Part:
    """All donors; cells that the authors did not label are excluded as "no label".

    Raises
    ------
    UserError
        If a file is missing or damaged, a sample is missing or unknown, or the labels are not those of these cells.
    """
    archive, labels = pick(files, r"\.tar$"), pick(files, r"\.csv")
    members = unpack_tar(archive, work, expected=lambda name: _sample(name) in SAMPLES)
    paths = {_sample(name): path for name, path in members.items()}
    missing = [name for name in SAMPLES if name not in paths]
    if missing:
        raise UserError(f"lacks the samples {', '.join(missing)}", path=archive, fix=AGAIN)
    columns = dict.fromkeys(column for facts in part.donors.values() for column in facts)
    samples = [
        Sample(paths[name], name, {"donor": name, **columns, **_facts(part, name)}) for name in SAMPLES
    ]
    return Part(
        samples=samples,
        options=ReadOptions(genes_in_rows=True),
        known=Knowledge(
            describe=partial(_describe, labels=labels), check=partial(_check_sums, labels=labels)
        ),
    )


def _sample(member: str) -> str:
    """Con4 of GSM4704931_Con4.txt.gz; "" for a name of another form."""
    match = _MEMBER.fullmatch(member)
    return match.group(1) if match else ""


def _facts(part: CellPart, donor: str) -> dict[str, str | int]:
    """What the entry states of a donor; ages as numbers."""
    return {k: int(v) if v.isdigit() else v for k, v in part.donors.get(donor, {}).items()}


def _describe(
    barcodes: pa.Array, samples: pa.Array | None, _: Columns, *, labels: Path
) -> tuple[Columns, list[str]]:
    """The labels of each cell, joined on (sample, barcode)."""
    table = read_labels(
        labels,
        text_columns=["", "celltype", "celltype2", "cellcycle", "seurat_clusters"],
        columns=["", "orig.ident", *LABELS],
    )
    plain = pc.replace_substring_regex(barcodes, pattern=_SUFFIX, replacement="")
    rows = rows_of(_keys(table, labels), pc.binary_join_element_wise(samples, plain, ":"), path=labels)
    for donor in SAMPLES:
        here = pc.equal(samples, donor)
        require_matched(
            rows[here.to_numpy(zero_copy_only=False)],
            path=labels,
            what=f"cells of {donor}",
            keys=table[""],
            names=barcodes.filter(here),
        )
    joined = take(table, rows)
    columns: Columns = {name: joined[column] for column, name in LABELS.items()}
    for name in NUMBERS:
        numbers(columns[name], name=name, path=labels)
    columns["excluded"], notes = unlabelled(joined["celltype"])
    absent = len(table) - int((rows >= 0).sum())
    if absent:
        notes.append(f"{absent:,} labels are of cells that the files don't have")
    return columns, notes


def _keys(table: pa.Table, path: Path) -> pa.Array:
    """`{sample}:{barcode}` of each label, the sample from the key's number; it has to agree with orig.ident."""
    parts = pc.extract_regex(table[""].combine_chunks(), pattern=_KEY)
    samples: list[str] = []
    for key, part, ident in zip(table[""].to_pylist(), parts.to_pylist(), table["orig.ident"], strict=True):
        number = int(part["number"]) if part else 0
        if not 0 < number <= len(SAMPLES):
            raise UserError(
                f"names a cell {key!r}, where <barcode>.1_<number of the sample> is expected",
                path=path,
                fix=AGAIN,
            )
        samples.append(SAMPLES[number - 1])
        stated = str(ident).replace("ATAA", "TAA")
        if stated != samples[-1]:
            raise UserError(
                f"says that {key!r} is of {stated}, by its number it is of {samples[-1]}",
                path=path,
                fix=AGAIN,
            )
    return pc.binary_join_element_wise(pa.array(samples, pa.string()), pc.struct_field(parts, "barcode"), ":")


def _check_sums(totals: Array, columns: Columns, *, labels: Path) -> list[str]:
    """Compare the cells' sums with those that the authors state.

    Raises
    ------
    UserError
        If none is stated, more than 1 % of the labelled cells have less, or half of them 1.5 times as much.
    """
    stated = numbers(columns["nCount_RNA"], name="nCount_RNA", path=labels)
    known = stated > 0  # NaN, where there is no label, is not
    if not known.any():
        raise UserError("states no total counts (nCount_RNA)", path=labels, fix=AGAIN)
    ratio = totals[known] / stated[known]
    median, below = float(np.median(ratio)), int((ratio < 1).sum())
    if below > MOST_BELOW * len(ratio) or median > HIGHEST_RATIO:
        raise UserError(
            f"states other total counts (nCount_RNA) than the cells have: {below:,} of {len(ratio):,} cells have "
            f"less, the median ratio is {median:.3f}",
            path=labels,
            fix="labels and counts don't belong together: get both again with `cellformers download --verify`",
        )
    return [
        f"total counts are {median:.4f} times the authors' nCount_RNA in the median; {below:,} of {len(ratio):,} "
        "labelled cells have less than stated"
    ]
