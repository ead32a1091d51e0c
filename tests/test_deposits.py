"""The registry of deposits: the entries of the package, their validation, and where they are looked for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from cellformers.deposits import CellPart, Deposit, GenePart, deposit_names, read_deposit
from cellformers.deposits.entries import read_entry
from cellformers.errors import UserError
from cellformers.io.files import digest_file
from cellformers.resources import listed, resource

NAMES = ["collins2022", "geneformer-labels", "gse129096", "gse155468", "gse156793", "scp1303", "tf-range"]


@pytest.fixture(autouse=True)
def no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CELLFORMERS_RESOURCES", raising=False)


# --- the entries of the package -------------------------------------------------------------------------


def test_what_is_registered() -> None:
    assert deposit_names() == NAMES
    parts = {name: list(read_deposit(name).parts) for name in NAMES}
    assert parts == {
        "collins2022": ["haploinsufficient", "triplosensitive"],
        "geneformer-labels": ["dosage_sensitive_tfs", "bivalent_vs_lys4", "bivalent_vs_no_methyl", "notch1"],
        "gse129096": ["drop", "dronc", "heart"], "gse155468": ["all"], "gse156793": ["all"], "scp1303": ["all"],
        "tf-range": ["all"],
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_entry(name: str) -> None:
    deposit = read_deposit(name)
    assert deposit.organism == "Homo sapiens"
    assert "doi:10." in deposit.citation
    assert set(deposit.pretraining) == {"gc30M", "gc104M"}
    cells = deposit.kind == "cells"
    for known in deposit.pretraining.values():
        assert known.contains == ("unknown" if cells else "no")
        assert len(known.source) > 20
    used = {file for part in deposit.parts.values() for file in part.files}
    assert used == set(deposit.files)
    for part in deposit.parts.values():
        assert isinstance(part, CellPart if cells else GenePart)
    hosts = {urlsplit(file.url).hostname for file in deposit.files.values() if file.url}
    assert hosts <= {
        "ftp.ncbi.nlm.nih.gov", "raw.githubusercontent.com", "zenodo.org", "huggingface.co",
        "static-content.springer.com",
    }  # fmt: skip
    for file in deposit.files.values():
        if file.url and file.sha256 is None:
            assert any(word in deposit.note for word in ("recorded", "not verified")), (
                "says what is not known"
            )


def test_columns_have_the_names_of_the_field() -> None:
    columns = {
        name: read_deposit(name).cell_part("all").columns for name in ("gse155468", "gse156793", "scp1303")
    }
    assert {"donor", "condition", "cell_type", "cell_subtype", "sex", "age"} <= set(columns["gse155468"])
    assert {"donor", "organ", "cell_type", "development_day", "sex"} <= set(columns["gse156793"])
    assert {"donor", "disease", "cell_type", "sex", "age"} <= set(columns["scp1303"])
    for part in ("drop", "dronc"):
        entry = read_deposit("gse129096").cell_part(part)
        assert {"day", "line", "platform"} <= set(entry.columns)
        assert (entry.label, entry.unit) == ("day", "line")
    assert "chimpanzee" in read_deposit("gse129096").cell_part("drop").excluded[0]


def test_donors_of_gse155468() -> None:
    donors = read_deposit("gse155468").cell_part("all").donors
    assert list(donors) == ["Con4", "Con6", "Con9", *(f"TAA{n}" for n in range(1, 9))]
    assert [facts["condition"] for facts in donors.values()] == ["control"] * 3 + ["aneurysm"] * 8
    assert "".join(facts["sex"][0] for facts in donors.values()) == "fmfffmmffmm"
    assert " ".join(facts["age"] for facts in donors.values()) == "63 61 62 75 78 59 62 75 67 69 56"


def test_thresholds_of_collins2022() -> None:
    deposit = read_deposit("collins2022")
    found = {name: deposit.gene_part(name).threshold for name in deposit.parts}
    assert {name: (known.column, known.at_least) for name, known in found.items() if known} == {
        "haploinsufficient": ("pHaplo", 0.86), "triplosensitive": ("pTriplo", 0.94),
    }  # fmt: skip
    assert deposit.gene_part("haploinsufficient").positive == "haploinsufficient"


def test_digests_of_the_label_files(reference_data: Path) -> None:
    """Copies of two of the files are at hand."""
    for name, file, copy in (
        ("gse155468", "meta_addsubcluster_cellcycle.csv", "GSE155468_cell_labels.csv"),
        ("gse129096", "species_assign_matrix.txt", "GSE129096_species_assign_matrix.txt"),
    ):
        known, path = read_deposit(name).files[file], reference_data / "labels" / copy
        assert path.stat().st_size == known.size
        assert digest_file(path) == f"sha256:{known.sha256}"


def test_what_is_fetched_by_hand() -> None:
    deposit = read_deposit("scp1303")
    assert deposit.manual
    assert deposit.any_of
    for files in deposit.any_of:
        for file in files:
            assert file in deposit.manual, "the words name every file"
    assert "singlecell.broadinstitute.org" in deposit.manual


def test_nothing_is_registered_twice() -> None:
    """YAML takes the last of two equal keys without a word."""

    def keys(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            assert len(names) == len(set(names)), names
            for _, value in node.value:
                keys(value)

    for path in listed("datasets", "*.yaml").values():
        keys(yaml.compose(path.read_text()))


def test_the_folder_is_found_in_the_config() -> None:
    link = Path(__file__).parents[1] / "config" / "datasets"
    assert link.is_symlink()
    assert not os.readlink(link).startswith("/")
    assert (link / "scp1303.yaml").samefile(resource("datasets/scp1303.yaml"))


# --- where registries are looked for --------------------------------------------------------------------


def small(**changes: Any) -> dict[str, Any]:
    """A deposit of cells."""
    return {
        "name": "small", "kind": "cells", "title": "A few cells", "citation": "Lab (2026)", "licence": None,
        "access": "open", "manual": None, "organism": "Homo sapiens", "note": None,
        "pretraining": {"gc30M": {"contains": "no", "source": "made up"}},
        "files": {
            "a.tsv": {"url": "https://lab.org/data/a.tsv", "size": 3, "sha256": None, "needed": True},
            "b.tsv": {"url": "https://lab.org/data/b.tsv", "size": None, "sha256": "ab" * 32, "needed": False},
        },
        "any_of": None,
        "parts": {"all": dict(PART)},
        **changes,
    }  # fmt: skip


PART: dict[str, Any] = {
    "title": "All", "files": ["a.tsv", "b.tsv"], "reader": "small", "ids": "symbols", "label": "type",
    "unit": "donor", "columns": {"type": "its type", "donor": "who gave it"}, "donors": None, "excluded": [],
}  # fmt: skip


def genes(**changes: Any) -> dict[str, Any]:
    """The same deposit with labels of genes."""
    part = {key: PART[key] for key in ("title", "files", "reader", "ids", "columns", "excluded")}
    part |= {"classes": ["off", "on"], "positive": "on", "threshold": None, "source": "Lab (2026)", **changes}
    return small(kind="genes", parts={"all": part})


def write(path: Path, entry: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(entry, sort_keys=False))
    return path


def test_a_registry_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    write(own / "datasets" / "small.yaml", small())
    write(own / "datasets" / "tf-range.yaml", small(name="tf-range"))
    (own / "datasets" / "notes.txt").write_text("nothing")
    monkeypatch.setenv("CELLFORMERS_RESOURCES", str(own))
    assert deposit_names() == sorted([*NAMES, "small"])
    assert read_deposit("small").title == read_deposit("tf-range").title == "A few cells"
    assert read_deposit("gse155468").kind == "cells"  # the others are the package's
    assert resource("datasets/small.yaml") == own / "datasets" / "small.yaml"
    assert resource("checkpoints.yaml").parent.name == "resources"
    (own / "checkpoints.yaml").write_text("models: {}")
    assert resource("checkpoints.yaml") == own / "checkpoints.yaml"
    monkeypatch.delenv("CELLFORMERS_RESOURCES")
    with pytest.raises(FileNotFoundError, match=r"datasets/small\.yaml"):
        resource("datasets/small.yaml")


def test_a_folder_of_registries_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLFORMERS_RESOURCES", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"none: is no folder, but CELLFORMERS_RESOURCES names it; correct"):
        resource("checkpoints.yaml")


@pytest.mark.parametrize("name", ["../errors.py", "datasets/../../errors.py", "/etc/passwd"])
def test_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="is no name of a registry"):
        resource(name)


def test_names_that_are_not_registered() -> None:
    for name in ("gse129906", "../datasets/gse129096", ""):
        with pytest.raises(UserError, match=r"no deposit .* is registered; .*cellformers download --list"):
            read_deposit(name)
    with pytest.raises(UserError, match="did you mean 'gse129096'"):
        read_deposit("GSE129096".lower()[:-1])


# --- validation -----------------------------------------------------------------------------------------


def files_with(**changes: Any) -> dict[str, Any]:
    files = small()["files"]
    return {"files": {**files, "a.tsv": {**files["a.tsv"], **changes}}}


def part_with(**changes: Any) -> dict[str, Any]:
    return {"parts": {"all": {**PART, **changes}}}


BY_HAND = {
    "access": "manual", "manual": "ask the lab", "any_of": [["a.tsv"], ["b.tsv"]],
    "files": {
        name: {"url": None, "size": None, "sha256": None, "needed": False} for name in ("a.tsv", "b.tsv")
    },
}  # fmt: skip


def test_entries_that_are_right(tmp_path: Path) -> None:
    deposit = read_entry(write(tmp_path / "small.yaml", small()))
    assert isinstance(deposit, Deposit)
    assert deposit.files["a.tsv"].size == 3
    assert deposit.cell_part("all").donors == {}
    by_hand = read_entry(write(tmp_path / "small.yaml", small(**BY_HAND)))
    assert by_hand.any_of == (("a.tsv",), ("b.tsv",))
    labels = read_entry(write(tmp_path / "small.yaml", genes(threshold={"column": "score", "at_least": 1})))
    threshold = labels.gene_part("all").threshold
    assert threshold is not None
    assert threshold.at_least == 1.0
    with pytest.raises(UserError, match="the deposit small holds labels of genes, no cells"):
        labels.cell_part("all")
    with pytest.raises(UserError, match="the deposit small holds cells, no labels of genes"):
        deposit.gene_part("all")
    with pytest.raises(UserError, match=r"the deposit small has no part 'al'; did you mean 'all'\?"):
        deposit.cell_part("al")


def test_yes_and_no_without_quotes(tmp_path: Path) -> None:
    for bare, meant in (("yes", "yes"), ("no", "no"), ("unknown", "unknown")):
        text = yaml.safe_dump(small()).replace("contains: 'no'", f"contains: {bare}")
        (tmp_path / "small.yaml").write_text(text)
        assert read_entry(tmp_path / "small.yaml").pretraining["gc30M"].contains == meant


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"licens": "MIT"}, "small: unknown key 'licens'; did you mean 'licence'?"),
        ({"name": "large"}, "small: name is 'large', and the file is small.yaml"),
        ({"kind": "cell"}, "small: kind is 'cell'; did you mean 'cells'?"),
        ({"access": "closed"}, "small: access is 'closed'; there is: open, manual"),
        ({"manual": "ask"}, "small: manual is what to do by hand"),
        ({**BY_HAND, "manual": None}, "small: manual is what to do by hand"),
        ({**BY_HAND, "files": small()["files"]}, "small: a.tsv: url is 'https://lab.org/data/a.tsv', and"),
        ({**BY_HAND, "any_of": None}, "small: no file is needed"),
        ({**BY_HAND, "any_of": [["c.tsv"]]}, "small: any_of is 'c.tsv'; did you mean"),
        ({**BY_HAND, "any_of": [[]]}, "small: any_of names no file"),
        ({**BY_HAND, "any_of": "a.tsv"}, "small: any_of is no list of lists of files"),
        ({"any_of": [["a.tsv"]]}, "small: any_of is for deposits that are fetched by hand"),
        ({"title": " "}, "small: title is ' '"),
        ({"citation": None}, "small: citation is None"),
        ({"pretraining": {}}, "small: pretraining is no mapping with entries"),
        ({"pretraining": {"gc30M": {"contains": "maybe", "source": "x"}}},
         "small: pretraining: gc30M: contains is 'maybe'; there is: yes, no, unknown"),
        ({"pretraining": {"gc30M": {"contains": "yes", "source": ""}}}, "small: pretraining: gc30M: source is ''"),
        ({"files": []}, "small: files is no mapping with entries"),
        (files_with(url=None), "small: a.tsv: url is None, and access open"),
        (files_with(url="ftp://lab.org/a.tsv"), "small: a.tsv: url is 'ftp://lab.org/a.tsv'"),
        (files_with(url="https://me:secret@lab.org/a.tsv"), "small: a.tsv: url is 'https://me:secret@lab.org"),
        (files_with(url="https://lab.org/a b.tsv"), "small: a.tsv: url is 'https://lab.org/a b.tsv'"),
        (files_with(size=0), "small: a.tsv: size is 0, not a positive whole number"),
        (files_with(size="3"), "small: a.tsv: size is '3', not a positive whole number"),
        (files_with(sha256="AB" * 32), "small: a.tsv: sha256 is 'ABAB"),
        (files_with(needed="yes"), "small: a.tsv: needed is 'yes', not true or false"),
        (files_with(needed=False), "small: no file is needed"),
        (files_with(md5="x"), "small: a.tsv: unknown key 'md5'"),
        (part_with(files=["c.tsv"]), "small: all: files is 'c.tsv'"),
        (part_with(files=["a.tsv", "a.tsv"]), "small: all: files names something twice"),
        (part_with(files="a.tsv"), "small: all: files is 'a.tsv', not a list"),
        (part_with(reader="os.system"), "small: all: reader is 'os.system'"),
        (part_with(ids="names"), "small: all: ids is 'names'; there is: symbols, ensembl"),
        (part_with(label="typ"), "small: all: label is 'typ'; did you mean 'type'?"),
        (part_with(unit="line"), "small: all: unit is 'line'"),
        (part_with(columns={"a b": "x"}), "small: all: columns is 'a b'"),
        (part_with(donors={"P1": {"age": "3"}}), "small: all: donors: P1 is 'age'; there is: type, donor"),
        (part_with(donors={"P1": {"type": 3}}), "small: all: donors: P1: type is 3"),
        (part_with(classes=["a"]), "small: all: unknown key 'classes'"),
        ({"parts": {"../up": PART}}, "small: parts: ../up is '../up'"),
        (genes(classes=["on"]), "small: all: classes are 1, not two"),
        (genes(classes=["on", "off", "both"]), "small: all: classes are 3, not two"),
        (genes(positive="of"), "small: all: positive is 'of'; did you mean 'off'?"),
        (genes(threshold={"column": "score", "at_least": "1"}), "small: all: threshold: at_least is '1', not a number"),
        (genes(threshold={"column": "score"}), "small: all: threshold lacks at_least"),
    ],
)  # fmt: skip
def test_entries_that_are_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "small.yaml", small(**changes))
    with pytest.raises(UserError) as caught:
        read_entry(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; mend the entry: docs/benchmarks.md explains its keys")


@pytest.mark.parametrize(
    "name", ["../up.tsv", "sub/a.tsv", ".hidden", "/etc/passwd", "a\nb", "", "..", "-rf"]
)
def test_names_of_files_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    files = {name: small()["files"]["a.tsv"]}
    path = write(tmp_path / "small.yaml", small(files=files, **part_with(files=[name])))
    with pytest.raises(UserError, match=r"small\.yaml: small: files: "):
        read_entry(path)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "name: small", "\0"])
def test_files_that_are_no_entry(tmp_path: Path, text: str) -> None:
    (tmp_path / "small.yaml").write_text(text)
    with pytest.raises(UserError, match=r"small\.yaml: "):
        read_entry(tmp_path / "small.yaml")
