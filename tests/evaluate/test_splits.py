"""Splits: no unit on two sides, nothing that depends on the order of rows, everything left out is counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cellformers.errors import UserError
from cellformers.evaluate.splitfile import read_split
from cellformers.evaluate.splits import make_cell_split, make_gene_split
from cellformers.folds import group_folds, hash_order, permuted, stratified_folds
from cellformers.io.files import stamp, write_table


def test_units_are_held_out_one_by_one_or_in_balanced_groups(atlas: Any, tmp_path: Path) -> None:
    for n_donors in (3, 12):
        data = atlas(n_donors=n_donors, name=f"a{n_donors}")
        split = make_cell_split(
            cells={"a": data.cells}, label="celltype", unit="donor", output=tmp_path / "split.json"
        )
        assert split.content["kind"] == "held-out"
        assert len(split.folds) == min(n_donors, 5)
        tested = [u for fold in split.folds for u in fold["test"]]
        assert sorted(tested) == sorted(set(data.donors))
        for fold, (train, test) in zip(split.folds, split.masks(data.donors), strict=True):
            assert not set(data.donors[train]) & set(data.donors[test])
            assert fold["n_test"] == len(test)
            assert len(train) + len(test) == len(data.ids)


def test_groups_are_balanced_in_cells_and_classes() -> None:
    rng = np.random.default_rng(1)
    size = rng.integers(20, 200, 23)
    units = np.repeat([f"u{i}" for i in range(23)], size).astype(object)
    labels = rng.choice(["a", "b"], len(units), p=[0.9, 0.1]).astype(object)
    fold_of = group_folds(units, labels, folds=5, seed=0)
    fold = np.array([fold_of[u] for u in units])
    for chosen in (labels == "a", labels == "b"):
        shares = np.bincount(fold[chosen], minlength=5) / chosen.sum()
        assert shares.min() > 0.12
        assert shares.max() < 0.28


def test_stratified_folds_are_even_overall_and_in_each_class() -> None:
    names = np.array([f"c{i}" for i in range(103)], dtype=object)
    labels = np.array(["x"] * 61 + ["y"] * 42, dtype=object)
    fold = stratified_folds(names, labels, folds=5, seed=3)
    for chosen in (labels == "x", labels == "y", labels != ""):
        sizes = np.bincount(fold[chosen], minlength=5)
        assert sizes.max() - sizes.min() <= 1
    assert not np.array_equal(fold, stratified_folds(names, labels, folds=5, seed=4))


def test_nothing_depends_on_the_order_of_rows() -> None:
    names = np.array([f"c{i}" for i in range(50)], dtype=object)
    labels = np.array(["x", "y"] * 25, dtype=object)
    shuffle = np.random.default_rng(0).permutation(50)
    assert np.array_equal(names[hash_order(names, seed=1, salt="s")],
                          names[shuffle][hash_order(names[shuffle], seed=1, salt="s")])  # fmt: skip
    fold = stratified_folds(names, labels, folds=5, seed=0)
    assert np.array_equal(fold[shuffle], stratified_folds(names[shuffle], labels[shuffle], folds=5, seed=0))
    mixed = permuted(labels, names, seed=0)
    assert sorted(mixed) == sorted(labels)
    assert 0.2 < (mixed == labels).mean() < 0.8


def test_without_units_the_split_is_stratified_and_says_so(atlas: Any, tmp_path: Path) -> None:
    data = atlas(n_donors=1)
    for unit in (None, "donor"):
        split = make_cell_split(
            cells={"a": data.cells},
            label="celltype",
            unit=unit,
            output=tmp_path / "split.json",
            note="sorts are lanes",
        )
        assert split.content["kind"] == "stratified"
        assert "sorts are lanes" in split.content["notes"]
        assert any("optimistic" in note for note in split.content["notes"])
        tested = [c for fold in split.folds for c in fold["test"]]
        assert sorted(tested) == sorted(data.ids)


def test_a_split_is_the_same_file_every_time(atlas: Any, tmp_path: Path) -> None:
    data = atlas()
    texts = []
    for name in ("one.json", "two.json"):
        make_cell_split(
            cells={"a": data.cells}, label="celltype", unit="donor", output=tmp_path / name, seed=5
        )
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1]
    assert str(tmp_path).encode() not in texts[0]


def test_missing_labels_units_and_failed_cells_are_left_out_and_counted(build: Any, tmp_path: Path) -> None:
    cells = build.cells(
        cell_id=[f"c{i}" for i in range(12)],
        kind=["a", None, "", "nan", "b", "a", "b", "a", "b", "a", "b", "a"],
        donor=["1", "1", "1", "1", "1", "1", None, "2", "2", "2", "2", "2"],
        qc_pass=[True] * 11 + [False],
    )
    split = make_cell_split(cells={"d": cells}, label="kind", unit="donor", output=tmp_path / "s.json")
    assert split.content["excluded"] == {"failed QC": 1, "no label": 3, "no unit": 1}
    assert split.content["n"] == 7


def test_numbers_are_labels_too(build: Any, tmp_path: Path) -> None:
    cells = build.cells(
        cell_id=list("abcdefgh"), day=[0.0, 7.0, None, 15.0, 0.0, 7.0, 15.0, 0.5], ok=[True] * 8
    )
    split = make_cell_split(cells={"d": cells}, label="day", output=tmp_path / "s.json", folds=2)
    assert split.classes == ["0", "0.5", "15", "7"]
    assert split.content["excluded"]["no label"] == 1


def test_a_column_of_numbers_or_names_is_no_label(build: Any, tmp_path: Path) -> None:
    cells = build.cells(cell_id=list("abc"), who=["x", "y", "z"])
    with pytest.raises(UserError, match="3 classes for 3 cells"):
        make_cell_split(cells={"d": cells}, label="who", output=tmp_path / "s.json")


def test_a_transfer_between_copies_is_refused(build: Any, tmp_path: Path) -> None:
    paths = {}
    for name, digest in (("a", "sha256:1"), ("b", "sha256:1"), ("c", "sha256:2")):
        path = build.cells(name, cell_id=["1", "2", "3", "4"], line=["x", "y", "x", "y"])
        made = stamp("qc", 1, parameters={}, inputs={"dataset": digest})
        write_table(pq.read_table(path), path, made)
        paths[name] = path
    sides = {"label": "line", "train": ["a"], "both_ways": False, "output": tmp_path / "s.json"}
    with pytest.raises(UserError, match="are one dataset"):
        make_cell_split(cells={k: paths[k] for k in "ab"}, test=["b"], **sides)
    assert make_cell_split(cells={k: paths[k] for k in "ac"}, test=["c"], **sides).folds


def test_transfer_goes_both_ways_and_reports_one_sided_classes(build: Any, tmp_path: Path) -> None:
    a = build.cells("a", cell_id=["1", "2", "3", "4"], line=["x", "y", "x", "y"])
    b = build.cells("b", cell_id=["1", "2", "3", "4"], line=["x", "y", "z", "y"])
    split = make_cell_split(
        cells={"a": a, "b": b}, label="line", train=["a"], test=["b"], output=tmp_path / "s.json"
    )
    assert [f["name"] for f in split.folds] == ["a to b", "b to a"]
    assert split.folds[0]["test_only"] == ["z"]
    assert split.folds[1]["train_only"] == ["z"]
    assert any("z only in test (1 cells)" in note for note in split.content["notes"])
    one = make_cell_split(
        cells={"a": a, "b": b},
        label="line",
        train=["a"],
        test=["b"],
        both_ways=False,
        output=tmp_path / "s.json",
    )
    assert len(one.folds) == 1


def test_a_donor_in_both_datasets_of_a_transfer_is_refused(build: Any, tmp_path: Path) -> None:
    columns = {"cell_id": ["1", "2", "3", "4"], "line": ["x", "y", "x", "y"]}
    paths = {
        "a": build.cells("a", donor=["p", "p", "q", "q"], **columns),
        "b": build.cells("b", donor=["q", "q", "r", "r"], **columns),
    }
    ask = {
        "cells": paths,
        "label": "line",
        "unit": "donor",
        "train": ["a"],
        "test": ["b"],
        "output": tmp_path / "s.json",
    }
    with pytest.raises(UserError, match="'q' has cells on both sides"):
        make_cell_split(**ask)
    assert not (tmp_path / "s.json").exists()
    split = make_cell_split(**ask, shared_units=True)
    assert any("both sides" in note for note in split.content["notes"])


@pytest.mark.parametrize("by_cell", [False, True])
def test_a_split_of_ones_own_is_used_and_a_leak_in_it_refused(
    atlas: Any, tmp_path: Path, by_cell: bool
) -> None:
    data = atlas(n_donors=4)
    units = data.ids if by_cell else np.array(sorted(set(data.donors)))
    own = tmp_path / "own.json"
    ask = {"cells": {"a": data.cells}, "label": "celltype", "given": own, "output": tmp_path / "s.json",
               "unit": None if by_cell else "donor"}  # fmt: skip
    fold = {"name": "paper", "train": units[:2].tolist(), "test": units[2:].tolist()}
    if by_cell:
        fold["train"] = units[:100].tolist()
        fold["test"] = units[100:200].tolist()
    own.write_text(json.dumps({"folds": [fold]}))
    assert make_cell_split(**ask).content["kind"] == "given"
    fold["train"].append(fold["test"][0])
    own.write_text(json.dumps({"folds": [fold]}))
    with pytest.raises(UserError, match="both sides of fold 'paper'"):
        make_cell_split(**ask)
    fold["train"][-1] = fold["train"][0] + "x"
    own.write_text(json.dumps({"folds": [fold]}))
    with pytest.raises(UserError, match="no labelled cell belongs to; did you mean"):
        make_cell_split(**ask)


def test_an_edited_split_that_leaks_is_refused(atlas: Any, tmp_path: Path) -> None:
    data = atlas()
    path = tmp_path / "s.json"
    make_cell_split(cells={"a": data.cells}, label="celltype", unit="donor", output=path)
    content = json.loads(path.read_text())
    content["folds"][0]["train"] += content["folds"][0]["test"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="on both sides"):
        read_split(path, task="cells")
    path.write_text("{}")
    with pytest.raises(UserError, match="is not a split"):
        read_split(path, task="cells")


def test_what_can_not_be_split_is_refused(build: Any, atlas: Any, tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    data = atlas()
    with pytest.raises(UserError, match="no column 'cell_type'; did you mean 'celltype'"):
        make_cell_split(cells={"a": data.cells}, label="cell_type", output=out)
    with pytest.raises(UserError, match="no column 'doner'; did you mean 'donor'"):
        make_cell_split(cells={"a": data.cells}, label="celltype", unit="doner", output=out)
    with pytest.raises(UserError, match="no cells of dataset 'c'"):
        make_cell_split(cells={"a": data.cells}, label="celltype", train=["a"], test=["c"], output=out)
    one = build.cells("one", cell_id=["1", "2"], kind=["x", "x"])
    with pytest.raises(UserError, match="one class"):
        make_cell_split(cells={"o": one}, label="kind", output=out)
    lanes = build.cells("lanes", cell_id=list("1234"), kind=["x", "x", "y", "y"], lane=["l", "l", "m", "m"])
    with pytest.raises(UserError, match="occurs in one 'lane' only"):
        make_cell_split(cells={"o": lanes}, label="kind", unit="lane", output=out)
    with pytest.raises(UserError, match="no such file"):
        make_cell_split(cells={"o": tmp_path / "none.parquet"}, label="kind", output=out)
    assert not out.exists()


def test_gene_split(build: Any, tmp_path: Path) -> None:
    genes = [f"ENSG{i:011d}" for i in range(40)]
    table = tmp_path / "labels.csv"
    lines = [f"{g}.{i},{'Yes' if i < 12 else ''}" for i, g in enumerate(genes)]
    table.write_text("\n".join(["ensembl_id,sensitive", *lines, lines[0]]) + "\n")
    full = build.vectors(genes, np.ones((40, 2)), name="full", key="gene_id")
    fewer = build.vectors(genes[2:], np.ones((38, 3)), name="fewer", key="gene_id")
    ask = {
        "labels": table,
        "label": "sensitive",
        "gene": "ensembl_id",
        "dataset": "d",
        "output": tmp_path / "s.json",
    }
    split = make_gene_split(positive="Yes", embeddings=[*full, *fewer], **ask)
    assert split.classes == ["not Yes", "Yes"]
    assert split.content["excluded"] == {"no label": 0, "no embedding": 2}
    assert split.content["class_sizes"] == {"not Yes": 28, "Yes": 10}
    assert set(split.content["genes"]) == set(genes[2:])
    for fold in split.folds:
        assert sum(split.content["genes"][g] == "Yes" for g in fold["test"]) == 2
    with pytest.raises(UserError, match=r"no gene is 'yes'.*did you mean 'Yes'"):
        make_gene_split(positive="yes", embeddings=full, **ask)
    with pytest.raises(UserError, match="too few labelled genes for 11 folds"):
        make_gene_split(positive="Yes", embeddings=fewer, folds=11, **ask)


def test_two_named_gene_classes_leave_the_unlabelled_out(build: Any, tmp_path: Path) -> None:
    genes = [f"g{i}" for i in range(30)]
    table = tmp_path / "labels.tsv"
    kinds = ["long", "short", ""]
    table.write_text("gene_id\trange\n" + "".join(f"{g}\t{kinds[i % 3]}\n" for i, g in enumerate(genes)))
    files = build.vectors(genes, np.ones((30, 2)), key="gene_id")
    split = make_gene_split(
        labels=table,
        label="range",
        positive="long",
        embeddings=files,
        dataset="d",
        output=tmp_path / "s.json",
    )
    assert split.classes == ["short", "long"]
    assert split.content["excluded"]["no label"] == 10
    table.write_text("gene_id\trange\ng1\tlong\ng1\tshort\n")
    with pytest.raises(UserError, match="gene g1 has two values"):
        make_gene_split(
            labels=table,
            label="range",
            positive="long",
            embeddings=files,
            dataset="d",
            output=tmp_path / "s.json",
        )


def test_matched_genes_stay_together(build: Any, tmp_path: Path) -> None:
    genes = [f"g{i:02d}" for i in range(40)]
    files = build.vectors(genes, np.ones((40, 2)), key="gene_id")
    rows = [f"{g},{'yes' if i % 2 else 'no'},{'' if i > 37 else i // 2}" for i, g in enumerate(genes)]
    (tmp_path / "labels.csv").write_text("\n".join(["gene_id,label,pair", *rows]) + "\n")
    split = make_gene_split(
        labels=tmp_path / "labels.csv", label="label", positive="yes", group="pair", embeddings=files, dataset="d",
        output=tmp_path / "s.json",
    )  # fmt: skip
    assert split.unit == "pair"
    assert split.content["groups"][-2:] == ["gene g38", "gene g39"]
    for fold in split.folds:
        numbers = [int(g[1:]) for g in fold["test"]]
        assert 6 <= len(numbers) <= 10
        assert {n // 2 for n in numbers if n % 2 and n < 38} == {
            n // 2 for n in numbers if n % 2 == 0 and n < 38
        }
    content = json.loads((tmp_path / "s.json").read_text())
    for fold, test in zip(content["folds"], (["g00"], ["g01"], ["g02"], ["g04"], ["g06"]), strict=True):
        fold["test"] = test
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="pair '0' is in the test of two folds"):
        read_split(tmp_path / "s.json", task="genes")
