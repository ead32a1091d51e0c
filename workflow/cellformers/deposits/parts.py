"""Parts of deposits: cells ready for `ingest`, genes with labels and gene ids.

cellformers ingest deposits/gse129096 --deposit gse129096 --part drop -o results/drop
cellformers gene-labels deposits/tf-range --deposit tf-range --vocabulary VOCABULARY -o labels.csv
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from cellformers.deposits.entries import FOLDER, CellPart, GenePart, read_deposit
from cellformers.deposits.readers import CELL_READERS, GENE_READERS
from cellformers.deposits.readers.common import AGAIN, LabelledGenes, Part
from cellformers.errors import UserError, did_you_mean
from cellformers.genes import Vocabulary, map_features
from cellformers.io.files import atomic_path
from cellformers.resources import resource

Reader = TypeVar("Reader", bound=Callable[..., object])


def open_part(name: str, part: str, folder: Path, work: Path) -> Part:
    """What to ingest of a deposit: its files, how they are read, what is known of their cells.

    Parameters
    ----------
    folder
        Holds the deposit's files, as `cellformers download` leaves them.
    work
        An empty folder for what has to be unpacked; the caller removes it after `ingest`.

    Raises
    ------
    UserError
        If there is no such deposit or part of cells, or its files are missing or not what is known of them.
    """
    entry = read_deposit(name).cell_part(part)
    with _about_entry(name):
        opened = _reader(CELL_READERS, entry)(entry, _files(entry, folder), work)
    return replace(opened, known=replace(opened.known, origin={"deposit": name, "part": part}))


@contextmanager
def naming_deposit(opened: Part, folder: Path) -> Iterator[None]:
    """Within it, an error in a part's counts names the file of the deposit, and says to get that again.

    What was unpacked is gone when the user reads the message, and how a deposit is read can't be chosen.
    """
    counts = {sample.path for sample in opened.samples}
    try:
        yield
    except UserError as error:
        if error.path is None or Path(error.path) not in counts:
            raise
        path, what = Path(error.path), error.what
        if path.parent != folder:
            packed = folder / f"{path.name}.gz"
            if not packed.is_file():
                packed, what = next(iter(sorted(folder.glob("*.tar"))), folder), f"{path.name} in it: {what}"
            path = packed
        raise UserError(what, path=path, fix=AGAIN) from error


def gene_labels(name: str, part: str, folder: Path, *, vocabulary: Path, output: Path) -> list[str]:
    """Write a csv of a deposit's labelled genes: gene_id, symbol, label and the source's scores; returns notes.

    Names become gene ids by the vocabulary's aliases, as counts do. Genes without a token are left out and counted,
    so are genes that stand in both classes.

    Raises
    ------
    UserError
        If there is no such deposit or part of genes, its files are missing or not what is known of them, or a class
        has no gene in the vocabulary.
    """
    entry = read_deposit(name).gene_part(part)
    with _about_entry(name):
        labelled = _reader(GENE_READERS, entry)(entry, _files(entry, folder))
    rows, notes = _rows(labelled, entry, Vocabulary.load(vocabulary))
    with atomic_path(output) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["gene_id", "symbol", "label", *labelled.columns])
        writer.writerows(rows)
    return [*labelled.notes, *notes]


@contextmanager
def _about_entry(name: str) -> Iterator[None]:
    """Within it, an error that names no file is about the deposit's entry, and gets its path."""
    try:
        yield
    except UserError as error:
        if error.path is not None:
            raise
        raise UserError(error.what, path=resource(f"{FOLDER}/{name}.yaml"), fix=error.fix) from error


def _reader(readers: Mapping[str, Reader], entry: CellPart | GenePart) -> Reader:
    if entry.reader not in readers:
        raise UserError(
            f"the part {entry.name} names an unknown reader {entry.reader!r}",
            fix=did_you_mean(entry.reader, readers),
        )
    return readers[entry.reader]


def _files(entry: CellPart | GenePart, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UserError("no such folder", path=folder, fix="get the deposit with `cellformers download`")
    return {name: folder / name for name in entry.files}


def _rows(
    labelled: LabelledGenes, entry: GenePart, vocabulary: Vocabulary
) -> tuple[list[list[str | float | None]], list[str]]:
    """One row a gene, in the order of the source, and what was left out."""
    other = next(name for name in entry.classes if name != entry.positive)
    mapped = map_features(labelled.names, None, vocabulary)
    symbol_of = dict(zip(vocabulary.gene_ids.tolist(), vocabulary.symbols.tolist(), strict=True))
    first: dict[str, int] = {}
    conflicts: set[str] = set()
    outside: set[str] = set()
    for i in range(len(labelled.names)):
        if mapped.token_of_feature[i] < 0:
            outside.add(labelled.names[i])
            continue
        gene = str(mapped.gene_of_feature[i])
        if labelled.positive[first.setdefault(gene, i)] != labelled.positive[i]:
            conflicts.add(gene)
    kept = [(gene, i) for gene, i in first.items() if gene not in conflicts]
    positive = np.array([labelled.positive[i] for _, i in kept], dtype=bool)
    absent = [name for name in entry.classes if (name == entry.positive) not in labelled.positive]
    if absent:
        raise UserError(f"has no gene that is {absent[0]}", path=labelled.path, fix=AGAIN)
    if len(conflicts) == len(first) > 0:
        raise UserError("has every gene in both classes", path=labelled.path, fix=AGAIN)
    if not positive.any() or positive.all():
        raise UserError(
            f"of its {len(set(labelled.names)):,} genes {len(kept):,} are in the vocabulary {vocabulary.name}, none "
            f"of them {other if positive.any() else entry.positive}",
            path=labelled.path,
            fix="use a vocabulary of human genes",
        )
    notes = [
        f"{int(positive.sum()):,} genes are {entry.positive}, {int((~positive).sum()):,} {other}; "
        f"{len(outside):,} names are of no gene in the vocabulary {vocabulary.name} and left out"
    ]
    if conflicts:
        notes.append(f"{len(conflicts):,} genes stand in both classes and are left out")
    return [
        [
            gene,
            symbol_of.get(gene) or ("" if labelled.names[i].startswith("ENSG") else labelled.names[i]),
            entry.positive if labelled.positive[i] else other,
            *(values[i] for values in labelled.columns.values()),
        ]
        for gene, i in kept
    ], notes
