"""The entries of resources/datasets/*.yaml, validated: which deposit is where, and what it holds.

    read_deposit("gse129096").parts["drop"].files
    deposit_names()

A deposit is a set of files that somebody published: counts of cells, or labels of genes. Its parts are what a dataset
or a benchmark can ask for. Keys of an entry (null: not known, or not there):

    name, kind (cells | genes), title, citation, licence (SPDX name), organism, note
    access (open | manual), manual (what to do by hand), any_of (sets of files, one of which has to be complete)
    pretraining    by published corpus: contains (yes | no | unknown) its cells, and the source of that
    files          name as stored: url, size in bytes, sha256, needed (false: passed over where the server has none)
    parts          of cells: title, files, reader, ids (symbols | ensembl), label and unit (columns), columns (what they
                   mean and how they join), donors (facts of each that are in no file), excluded (cells left out, why)
                   of genes: title, files, reader, ids, classes, positive, threshold (column, at_least), columns,
                   source, excluded
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellformers.errors import UserError, did_you_mean
from cellformers.registry.fields import NAME, SHA256, maybe, one_of, positive, table, text
from cellformers.resources import listed, read_yaml, resource

FOLDER = "datasets"
KINDS, ACCESS, IDS = ("cells", "genes"), ("open", "manual"), ("symbols", "ensembl")
CONTAINS = ("yes", "no", "unknown")
_MEND = "mend the entry: docs/benchmarks.md explains its keys"
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_URL = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]+)?/[^\s#]*[^\s#/]")


@dataclass(frozen=True, kw_only=True)
class DepositFile:
    """A file of a deposit under the name it is stored with."""

    name: str
    url: str | None
    """None: it has to be fetched by hand."""
    size: int | None
    """Bytes."""
    sha256: str | None
    """64 digits."""
    needed: bool
    """Whether the deposit is incomplete without it."""


@dataclass(frozen=True)
class Pretraining:
    """Whether cells of a deposit are in a pretraining corpus ("yes", "no", "unknown"), and who says so."""

    contains: str
    source: str


@dataclass(frozen=True, kw_only=True)
class CellPart:
    """Cells of a deposit that are read together."""

    name: str
    title: str
    files: tuple[str, ...]
    reader: str
    ids: str
    """"symbols" or "ensembl"."""
    label: str | None
    """The column that benchmarks predict by default."""
    unit: str | None
    """The column of donors or lines."""
    columns: Mapping[str, str]
    donors: Mapping[str, Mapping[str, str]]
    """Facts of donors that no file states, by donor and column; empty where there are none."""
    excluded: tuple[str, ...]


@dataclass(frozen=True)
class Threshold:
    """A gene is of the positive class where `column` is at least `at_least`."""

    column: str
    at_least: float


@dataclass(frozen=True, kw_only=True)
class GenePart:
    """Two classes of genes."""

    name: str
    title: str
    files: tuple[str, ...]
    reader: str
    ids: str
    classes: tuple[str, ...]
    positive: str
    threshold: Threshold | None
    columns: Mapping[str, str]
    source: str
    excluded: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Deposit:
    """A registered deposit."""

    name: str
    kind: str
    """"cells" or "genes"."""
    title: str
    citation: str
    licence: str | None
    access: str
    """"open" or "manual"."""
    manual: str | None
    note: str | None
    organism: str
    pretraining: Mapping[str, Pretraining]
    """By published corpus."""
    files: Mapping[str, DepositFile]
    any_of: tuple[tuple[str, ...], ...] | None
    """Sets of files, one of which is enough; None: all that are needed."""
    parts: Mapping[str, CellPart | GenePart]

    def cell_part(self, name: str) -> CellPart:
        """A part of that name that holds cells; UserError where there is none."""
        part = self._part(name)
        if not isinstance(part, CellPart):
            raise UserError(
                f"the deposit {self.name} holds labels of genes, no cells", fix="cellformers gene-labels"
            )
        return part

    def gene_part(self, name: str) -> GenePart:
        """A part of that name that holds labels of genes; UserError where there is none."""
        part = self._part(name)
        if not isinstance(part, GenePart):
            raise UserError(
                f"the deposit {self.name} holds cells, no labels of genes", fix="cellformers ingest"
            )
        return part

    def _part(self, name: str) -> CellPart | GenePart:
        if name not in self.parts:
            raise UserError(
                f"the deposit {self.name} has no part {name!r}", fix=did_you_mean(name, self.parts)
            )
        return self.parts[name]


def deposit_names() -> list[str]:
    """Names of all registered deposits, those of CELLFORMERS_RESOURCES among them."""
    return list(listed(FOLDER, "*.yaml"))


def read_deposit(name: str) -> Deposit:
    """The deposit of that name.

    Raises
    ------
    UserError
        If there is none, or a key of its entry is missing, unknown or of the wrong kind.
    """
    if name not in deposit_names():
        raise UserError(
            f"no deposit {name!r} is registered",
            fix=f"{did_you_mean(name, deposit_names())} (cellformers download --list)",
        )
    return read_entry(resource(f"{FOLDER}/{name}.yaml"))


def read_entry(path: str | Path) -> Deposit:
    """Read and validate the file of a deposit; UserError names the file and the key."""
    path = Path(path)
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"not readable as YAML ({error})", path=path, fix=_MEND) from error
    try:
        return _deposit(content, path.stem)
    except ValueError as error:
        raise UserError(str(error), path=path, fix=_MEND) from error


_KEYS = (
    "name", "kind", "title", "citation", "licence", "access", "manual", "organism", "note", "pretraining", "files",
    "any_of", "parts",
)  # fmt: skip
_SHARED = ("title", "files", "reader", "ids", "columns", "excluded")
_CELL_KEYS = (*_SHARED, "label", "unit", "donors")
_GENE_KEYS = (*_SHARED, "classes", "positive", "threshold", "source")


def _deposit(content: Any, stem: str) -> Deposit:
    content = table(content, stem, _KEYS)
    name = text(content["name"], f"{stem}: name", NAME)
    if name != stem:
        raise ValueError(f"{stem}: name is {name!r}, and the file is {stem}.yaml")
    kind = one_of(content["kind"], f"{name}: kind", KINDS)
    access = one_of(content["access"], f"{name}: access", ACCESS)
    files = {
        file: _file(name, file, known, access) for file, known in _named(content["files"], f"{name}: files")
    }
    manual = maybe(content["manual"], f"{name}: manual")
    if (manual is None) != (access == "open"):
        raise ValueError(
            f"{name}: manual is what to do by hand, there where access is manual, and only there"
        )
    any_of = _any_of(content["any_of"], f"{name}: any_of", files, access)
    if any_of is None and not any(file.needed for file in files.values()):
        raise ValueError(f"{name}: no file is needed")
    read = _cell_part if kind == "cells" else _gene_part
    parts = {
        part: read(name, part, entry, files) for part, entry in _named(content["parts"], f"{name}: parts")
    }
    return Deposit(
        name=name, kind=kind, access=access, manual=manual, files=files, any_of=any_of, parts=parts,
        title=text(content["title"], f"{name}: title"),
        citation=text(content["citation"], f"{name}: citation"),
        licence=maybe(content["licence"], f"{name}: licence"),
        note=maybe(content["note"], f"{name}: note"),
        organism=text(content["organism"], f"{name}: organism"),
        pretraining={
            corpus: _pretraining(f"{name}: pretraining: {corpus}", known)
            for corpus, known in _named(content["pretraining"], f"{name}: pretraining")
        },
    )  # fmt: skip


def _named(value: Any, where: str) -> list[tuple[str, Any]]:
    """The entries of a mapping that has some, with names that are safe as names of files."""
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{where} is no mapping with entries")
    return [(text(key, f"{where}: {key}", NAME), entry) for key, entry in value.items()]


def _file(deposit: str, name: str, known: Any, access: str) -> DepositFile:
    where = f"{deposit}: {name}"
    known = table(known, where, ("url", "size", "sha256", "needed"))
    url = maybe(known["url"], f"{where}: url", _URL)
    if (url is None) != (access == "manual"):
        raise ValueError(f"{where}: url is {url!r}, and access {access}")
    if not isinstance(known["needed"], bool):
        raise ValueError(f"{where}: needed is {known['needed']!r}, not true or false")
    size = None if known["size"] is None else positive(known["size"], f"{where}: size")
    sha256 = maybe(known["sha256"], f"{where}: sha256", SHA256)
    return DepositFile(name=name, url=url, size=size, sha256=sha256, needed=known["needed"])


def _pretraining(where: str, known: Any) -> Pretraining:
    known = table(known, where, ("contains", "source"))
    contains = known["contains"]
    if isinstance(contains, bool):  # YAML reads a bare yes or no so
        contains = "yes" if contains else "no"
    return Pretraining(
        one_of(contains, f"{where}: contains", CONTAINS), text(known["source"], f"{where}: source")
    )


def _any_of(
    value: Any, where: str, files: Mapping[str, DepositFile], access: str
) -> tuple[tuple[str, ...], ...] | None:
    if value is None:
        return None
    if access != "manual":
        raise ValueError(f"{where} is for deposits that are fetched by hand")
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} is no list of lists of files")
    return tuple(_files(each, where, files) for each in value)


def _files(value: Any, where: str, files: Mapping[str, DepositFile]) -> tuple[str, ...]:
    names = _words(value, where)
    if not names:
        raise ValueError(f"{where} names no file")
    return tuple(one_of(name, where, tuple(files)) for name in names)


def _words(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts, none twice."""
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r}, not a list")
    words = tuple(text(each, where) for each in value)
    if len(set(words)) < len(words):
        raise ValueError(f"{where} names something twice")
    return words


def _texts(value: Any, where: str) -> dict[str, str]:
    """A mapping of names to texts; may be empty."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is no mapping")
    return {text(key, where, _WORD): text(words, f"{where}: {key}") for key, words in value.items()}


def _common(
    where: str, name: str, entry: Mapping[str, Any], files: Mapping[str, DepositFile]
) -> dict[str, Any]:
    """What parts of both kinds have in common."""
    return {
        "name": name,
        "title": text(entry["title"], f"{where}: title"),
        "files": _files(entry["files"], f"{where}: files", files),
        "reader": text(entry["reader"], f"{where}: reader", _WORD),
        "ids": one_of(entry["ids"], f"{where}: ids", IDS),
        "columns": _texts(entry["columns"], f"{where}: columns"),
        "excluded": _words(entry["excluded"], f"{where}: excluded"),
    }


def _cell_part(deposit: str, name: str, entry: Any, files: Mapping[str, DepositFile]) -> CellPart:
    where = f"{deposit}: {name}"
    entry = table(entry, where, _CELL_KEYS)
    made = CellPart(
        **_common(where, name, entry, files),
        label=maybe(entry["label"], f"{where}: label"),
        unit=maybe(entry["unit"], f"{where}: unit"),
        donors={
            donor: _texts(facts, f"{where}: donors: {donor}")
            for donor, facts in _named(entry["donors"], f"{where}: donors")
        } if entry["donors"] is not None else {},
    )  # fmt: skip
    used = {"label": made.label, "unit": made.unit}
    used |= {f"donors: {donor}": key for donor, facts in made.donors.items() for key in facts}
    for key, column in used.items():
        if column is not None:
            one_of(column, f"{where}: {key}", tuple(made.columns))
    return made


def _gene_part(deposit: str, name: str, entry: Any, files: Mapping[str, DepositFile]) -> GenePart:
    where = f"{deposit}: {name}"
    entry = table(entry, where, _GENE_KEYS)
    classes = _words(entry["classes"], f"{where}: classes")
    if len(classes) != 2:
        raise ValueError(f"{where}: classes are {len(classes)}, not two")
    return GenePart(
        **_common(where, name, entry, files),
        classes=classes,
        positive=one_of(entry["positive"], f"{where}: positive", classes),
        threshold=_threshold(entry["threshold"], f"{where}: threshold"),
        source=text(entry["source"], f"{where}: source"),
    )


def _threshold(value: Any, where: str) -> Threshold | None:
    if value is None:
        return None
    value = table(value, where, ("column", "at_least"))
    if not isinstance(value["at_least"], int | float) or isinstance(value["at_least"], bool):
        raise ValueError(f"{where}: at_least is {value['at_least']!r}, not a number")
    return Threshold(text(value["column"], f"{where}: column", _WORD), float(value["at_least"]))
