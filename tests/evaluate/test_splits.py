"""Splits: no unit on two sides, nothing that depends on the order of rows, everything left out is counted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cellformers.errors import UserError
from cellformers.evaluate.cell_splits import make_cell_split
from cellformers.evaluate.gene_splits import make_gene_split
from cellformers.evaluate.matching import CALIPER, balance, match_pairs
from cellformers.evaluate.splitfile import cell_folds, read_split
from cellformers.evaluate.tables import read_cells
from cellformers.folds import group_folds, hash_order, permuted, redrawn, stratified_folds
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
    sides = {"label": "line", "train": ["a"], "output": tmp_path / "s.json"}
    with pytest.raises(UserError, match="are one dataset"):
        make_cell_split(cells={k: paths[k] for k in "ab"}, test=["b"], **sides)
    assert make_cell_split(cells={k: paths[k] for k in "ac"}, test=["c"], **sides).folds


def test_transfer_reports_one_sided_classes(build: Any, tmp_path: Path) -> None:
    a = build.cells("a", cell_id=["1", "2", "3", "4"], line=["x", "y", "x", "y"])
    b = build.cells("b", cell_id=["1", "2", "3", "4"], line=["x", "y", "z", "y"])
    ask = {"cells": {"a": a, "b": b}, "label": "line", "output": tmp_path / "s.json"}
    there = make_cell_split(train=["a"], test=["b"], **ask)
    assert [f["name"] for f in there.folds] == ["a to b"]
    assert there.folds[0]["test_only"] == ["z"]
    assert any("z only in test (1 cells)" in note for note in there.content["notes"])
    back = make_cell_split(train=["b"], test=["a"], **ask)
    assert back.folds[0]["train_only"] == ["z"]


def test_transfers_that_can_not_succeed_are_refused(build: Any, tmp_path: Path) -> None:
    a = build.cells("a", cell_id=["1", "2", "3", "4"], line=["x", "y", "x", "y"])
    b = build.cells("b", cell_id=["1", "2", "3", "4"], line=["X", "Y", "X", "Y"])
    ask = {"cells": {"a": a, "b": b}, "label": "line", "output": tmp_path / "s.json"}
    with pytest.raises(UserError, match="trains on x, y and tests X, Y; give both sides the same names"):
        make_cell_split(train=["a"], test=["b"], **ask)
    with pytest.raises(UserError, match="none to train on; give --train"):
        make_cell_split(test=["b"], **ask)
    with pytest.raises(UserError, match="dataset 'a' is on both sides; leave --test out"):
        make_cell_split(train=["a"], test=["a", "b"], **ask)
    assert not (tmp_path / "s.json").exists()


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


def two_platforms(build: Any) -> dict[str, Path]:
    """Two datasets that share the lines p and q; the second has r as well."""
    kinds = ["x", "y"] * 6
    return {
        "one": build.cells("one", cell_id=[f"c{i}" for i in range(8)], day=kinds[:8], line=list("ppppqqqq")),
        "two": build.cells("two", cell_id=[f"c{i}" for i in range(12)], day=kinds, line=list("ppppqqqqrrrr")),
    }


def test_a_transfer_across_datasets_that_share_units(build: Any, tmp_path: Path) -> None:
    cells = two_platforms(build)
    ask = {"cells": cells, "label": "day", "unit": "line", "train": ["one"], "test": ["two"],
           "across": True, "output": tmp_path / "s.json"}  # fmt: skip
    split = make_cell_split(**ask)
    assert (split.content["kind"], split.content["by"]) == ("transfer", "dataset unit")
    assert [(f["name"], f["train"], f["test"]) for f in split.folds] == [
        ("one to two: p", ["one:q"], ["two:p"]),
        ("one to two: q", ["one:p"], ["two:q"]),
        ("one to two: r", ["one:p", "one:q"], ["two:r"]),
    ]
    assert [(f["n_train"], f["n_test"]) for f in split.folds] == [(4, 4), (4, 4), (8, 4)]
    assert split.describe()["split"]["units"] == [["two:p"], ["two:q"], ["two:r"]]
    assert read_split(tmp_path / "s.json", task="cells").content == split.content
    back = make_cell_split(**(ask | {"train": ["two"], "test": ["one"]}))
    assert [f["name"] for f in back.folds] == ["two to one: p", "two to one: q"]
    assert back.folds[0]["train"] == ["two:q", "two:r"]
    fewer = make_cell_split(folds=2, **ask)  # groups of units, where there are more than folds
    assert sorted(u for f in fewer.folds for u in f["test"]) == ["two:p", "two:q", "two:r"]
    for fold in fewer.folds:
        assert not {u[-1] for u in fold["train"]} & {u[-1] for u in fold["test"]}


def test_what_can_not_be_transferred_across(build: Any, tmp_path: Path) -> None:
    cells = two_platforms(build)
    ask = {"cells": cells, "label": "day", "output": tmp_path / "s.json", "across": True, "unit": "line",
           "train": ["one"], "test": ["two"]}  # fmt: skip
    with pytest.raises(
        UserError, match=r"needs both datasets and the column of units; give --train, --test and"
    ):
        make_cell_split(**ask | {"unit": None})
    with pytest.raises(UserError, match="needs both datasets"):
        make_cell_split(**ask | {"test": None})
    with pytest.raises(UserError, match="--given and --across exclude each other"):
        make_cell_split(given=tmp_path / "own.json", **ask)
    with pytest.raises(UserError, match="no cells of dataset 'tow'; did you mean 'two'"):
        make_cell_split(**ask | {"test": ["tow"]})
    with pytest.raises(UserError, match="dataset 'two' is on both sides"):
        make_cell_split(**ask | {"train": ["one", "two"]})
    cells["one"] = build.cells("alone", cell_id=["1", "2"], day=["x", "y"], line=["p", "p"])
    with pytest.raises(UserError, match="one has no unit but p, so nothing is left to train on"):
        make_cell_split(**ask)
    copy = stamp("qc", 1, parameters={}, inputs={"dataset": "sha256:1"})
    for path in two_platforms(build).values():
        write_table(pq.read_table(path), path, copy)
    with pytest.raises(UserError, match="are one dataset"):
        make_cell_split(**ask | {"cells": {n: build.folder / n / "cells.parquet" for n in ("one", "two")}})
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("by", ["dataset unit", "dataset", "unit"])
def test_a_donor_put_on_both_sides_by_hand_is_refused(build: Any, tmp_path: Path, by: str) -> None:
    """Whatever an edited split calls its sides, by its names or by the donors of its cells."""
    cells = two_platforms(build)
    path = tmp_path / "s.json"
    make_cell_split(
        cells=cells, label="day", unit="line", train=["one"], test=["two"], across=True, output=path
    )
    content = json.loads(path.read_text())
    fold = content["folds"][0]
    sides = {
        "dataset unit": (["one:p", "one:q"], ["two:p"]), "dataset": (["one"], ["two"]), "unit": (["p", "q"], ["p"])
    }  # fmt: skip
    fold["train"], fold["test"] = sides[by]
    content |= {"by": by, "kind": "held-out" if by == "unit" else "transfer", "folds": [fold]}
    path.write_text(json.dumps(content))
    table, _ = read_cells(cells, label="day", unit="line")
    with pytest.raises(UserError, match="on both sides of fold"):
        cell_folds(read_split(path, task="cells"), table, path=path)


def test_folds_are_as_many_as_asked_for(atlas: Any, tmp_path: Path) -> None:
    data = atlas(n_donors=12)
    ask = {"cells": {"a": data.cells}, "label": "celltype", "output": tmp_path / "s.json"}
    assert len(make_cell_split(folds=3, unit="donor", **ask).folds) == 3
    assert len(make_cell_split(folds=12, unit="donor", **ask).folds) == 12
    assert len(make_cell_split(folds=4, **ask).folds) == 4
    with pytest.raises(UserError, match="1 folds are too few"):
        make_cell_split(folds=1, **ask)


def test_labels_drawn_for_whole_units_know_nothing_of_the_truth() -> None:
    units = np.repeat([f"d{i}" for i in range(12)], 3).astype(object)
    labels = np.repeat(["case", "control"], 18).astype(object)
    train = [np.flatnonzero(units != f"d{i}") for i in range(12)]
    agreement, left_out = [], []
    for seed in range(60):
        drawn = redrawn(labels, units, train=train, seed=seed)
        assert all(len(set(drawn[units == u])) == 1 for u in set(units))
        agreement.append((drawn == labels).mean())
        # a shuffle would make the label that is left out the rarer one: under half of the others
        for rows in train:
            out = np.setdiff1d(np.arange(36), rows)[0]
            left_out.append((drawn[rows] == drawn[out]).mean())
    assert abs(np.mean(agreement) - 0.5) < 0.05
    assert abs(np.mean(left_out) - 0.5) < 0.05
    assert max(agreement) < 0.8
    rows = np.random.default_rng(0).permutation(36)
    again = redrawn(
        labels[rows], units[rows], train=[np.flatnonzero(np.isin(rows, t)) for t in train], seed=59
    )
    assert np.array_equal(again, drawn[rows])
    two = [np.flatnonzero(np.isin(units, ["d0", "d1"]))]  # of one class: a shuffle gives it both
    assert len(set(redrawn(labels, units, train=two, seed=0)[two[0]])) == 2
    with pytest.raises(UserError, match="12 units can't be drawn anew with two classes in every fold"):
        redrawn(labels, units, train=[np.flatnonzero(units == "d0")], seed=0)


def _skewed(n: int = 150, n_up: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names, whether positive, and two correlated features in which positives are higher."""
    rng = np.random.default_rng(seed)
    up = rng.permutation(n) < n_up
    level = rng.normal(size=n) + 0.8 * up
    features = np.stack([level, 1 / (1 + np.exp(-level - 0.3 * rng.normal(size=n)))], axis=1)
    return np.array([f"g{i:03d}" for i in range(n)], dtype=object), up, features


@pytest.mark.parametrize("n_up", [40, 110])
def test_matched_pairs_are_alike_and_as_many_as_possible(n_up: int) -> None:
    names, up, features = _skewed(n_up=n_up)
    pairs = match_pairs(features, up, names, seed=0)
    assert up[pairs[:, 0]].all()
    assert not up[pairs[:, 1]].any()
    assert len(np.unique(pairs)) == 2 * len(pairs)
    place = features.argsort(axis=0).argsort(axis=0) / len(names)
    assert np.linalg.norm(place[pairs[:, 0]] - place[pairs[:, 1]], axis=1).max() <= CALIPER + 1e-9
    assert min(n_up, 150 - n_up) * 0.5 < len(pairs) < min(n_up, 150 - n_up)
    left = np.setdiff1d(
        np.arange(len(names)), pairs
    )  # nobody left out could still be paired with another left out
    near = np.linalg.norm(place[left[up[left]], None] - place[left[~up[left]]], axis=2)
    assert (near > CALIPER).all()
    found = balance({"a": features[:, 0], "b": features[:, 1]}, up, pairs)
    for entry in found.values():
        assert entry["difference_before"] > 0.4
        assert abs(entry["difference_after"]) < 0.15
        assert entry["auc_before"] > 0.6
        assert abs(entry["auc_after"] - 0.5) < 0.03


def test_matching_depends_on_names_and_seed_alone() -> None:
    names, up, features = _skewed()
    features = np.round(features, 1)  # many ties, so that the seed has something to decide
    order = np.random.default_rng(1).permutation(len(names))

    def named(rows: np.ndarray, seed: int) -> set[tuple[str, str]]:
        pairs = match_pairs(features[rows], up[rows], names[rows], seed=seed)
        return {(names[rows][a], names[rows][b]) for a, b in pairs}

    assert named(np.arange(len(names)), 0) == named(order, 0)
    assert named(order, 0) != named(order, 1)


def _expressed(build: Any, tmp_path: Path, *, gap: float) -> dict[str, Any]:
    """90 labelled genes of 60 cells; positives are expressed higher by `gap`."""
    rng = np.random.default_rng(0)
    genes = [f"g{i:02d}" for i in range(90)]
    up = rng.permutation(90) < 30
    rate = np.exp(rng.normal(size=90) + gap * up)
    X = rng.poisson(rate, (60, 90))
    junk = rng.poisson(50, (10, 90)) * up  # of cells that failed
    ids = [f"c{i}" for i in range(70)]
    rows = [f"{g},{'yes' if u else 'no'}" for g, u in zip(genes, up, strict=True)]
    (tmp_path / "labels.csv").write_text("\n".join(["gene_id,label", *rows]) + "\n")
    return {
        "labels": tmp_path / "labels.csv", "label": "label", "positive": "yes", "dataset": "d",
        "embeddings": build.vectors(genes, np.ones((90, 2)), key="gene_id"), "output": tmp_path / "s.json",
        "counts": build.counts(ids, genes, np.concatenate([X, junk])), "match": "expression",
        "cells": build.cells(cell_id=ids, qc_pass=[True] * 60 + [False] * 10),
    }  # fmt: skip


def test_a_matched_split_holds_pairs_in_one_fold_and_says_how_alike_they_are(
    build: Any, tmp_path: Path
) -> None:
    ask = _expressed(build, tmp_path, gap=1.0)
    split = make_gene_split(**ask)
    content = split.content
    n = content["matched"]["pairs"]
    assert content["class_sizes"] == {"no": n, "yes": n}
    assert content["excluded"]["yes, no partner alike in expression"] == 30 - n
    assert content["excluded"]["no, not needed as a partner"] == 60 - n
    assert 10 < n < 30
    pair = dict(zip(content["genes"], content["groups"], strict=True))
    assert all(len({content["genes"][g] for g in pair if pair[g] == p}) == 2 for p in pair.values())
    for fold in split.folds:
        assert sum(content["genes"][g] == "yes" for g in fold["test"]) * 2 == len(fold["test"])
    spread = content["matched"]["balance"]["mean_expression"]
    assert spread["auc_before"] > 0.65
    assert abs(spread["auc_after"] - 0.5) < 0.05
    assert abs(spread["difference_after"]) < 0.15 < spread["difference_before"]
    assert any(f"{n} yes genes matched 1:1 to no ones" in note for note in content["notes"])
    assert read_split(tmp_path / "s.json", task="genes").unit == "pair alike in expression"
    first = (tmp_path / "s.json").read_bytes()
    make_gene_split(**ask)
    assert first == (tmp_path / "s.json").read_bytes()


def test_cells_that_failed_have_no_say_in_matching(build: Any, tmp_path: Path) -> None:
    ask = _expressed(build, tmp_path, gap=0.0)
    assert (
        abs(make_gene_split(**ask).content["matched"]["balance"]["mean_expression"]["auc_before"] - 0.5)
        < 0.12
    )
    everything = make_gene_split(**ask | {"cells": None})
    assert everything.content["matched"]["balance"]["mean_expression"]["auc_before"] > 0.7


def test_what_can_not_be_matched_is_refused(build: Any, tmp_path: Path) -> None:
    ask = _expressed(build, tmp_path, gap=0.0)
    with pytest.raises(UserError, match="matching by expression needs counts; give --counts"):
        make_gene_split(**ask | {"counts": ()})
    with pytest.raises(UserError, match="makes groups of its own"):
        make_gene_split(**ask, group="label")
    with pytest.raises(UserError, match="can't be matched by 'length'"):
        make_gene_split(**ask | {"match": "length"})
    with pytest.raises(UserError, match=r"pairs of a 'yes' and a 'no' gene .* too few for 5 folds"):
        make_gene_split(**_expressed(build, tmp_path, gap=12.0))
    with pytest.raises(UserError, match=r"too few labelled genes for 31 folds .*ask for fewer folds"):
        make_gene_split(**ask | {"match": None}, folds=31)


def test_small_classes_have_a_gene_in_every_fold(build: Any, tmp_path: Path) -> None:
    genes = [f"g{i:02d}" for i in range(56)]
    rows = [f"{g},{'bivalent' if i < 7 else 'other'}" for i, g in enumerate(genes)]
    (tmp_path / "labels.csv").write_text("\n".join(["gene_id,label", *rows]) + "\n")
    split = make_gene_split(
        labels=tmp_path / "labels.csv", label="label", positive="bivalent", dataset="d",
        embeddings=build.vectors(genes, np.ones((56, 2)), key="gene_id"), output=tmp_path / "s.json",
    )  # fmt: skip
    held = [sum(split.content["genes"][g] == "bivalent" for g in fold["test"]) for fold in split.folds]
    assert sorted(held) == [1, 1, 1, 2, 2]
