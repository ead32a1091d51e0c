"""Labels of cells and genes, and which side of a split they are on."""

import json

import numpy as np
import pyarrow as pa
import pytest
from token_files import make_vocabulary

from cellformers.errors import UserError
from cellformers.evaluate.cell_splits import make_cell_split
from cellformers.evaluate.gene_splits import make_gene_split
from cellformers.io.files import write_table
from cellformers.training.finetune_presets import PRESETS, find_preset, resolve
from cellformers.training.sides import HELDOUT, OUT, TEST, TRAIN, SplitSpec, assign, draw_rows, draw_units
from cellformers.training.targets import drop_rare, encode, gene_rows, read_cell_targets, read_gene_targets


def write_cells(path, n=120, **columns):
    made = {"cell_id": [f"cell{i}" for i in range(n)], "type": ["abc"[i % 3] for i in range(n)]}
    made["donor"] = [f"d{i % 8}" for i in range(n)]
    write_table(pa.table(made | columns), path)
    return path


def sides_of(targets, spec):
    labels, _ = encode(targets)
    return assign(targets, labels, spec)


# --- labels of cells ------------------------------------------------------------------------------------------


def test_rows_without_a_label_are_left_out_and_counted(tmp_path):
    text = "cell_id,type,donor\nc1,a,x\nc2,,x\nc3,b,\nc4,NA,y\nc5,b,y\n"
    (tmp_path / "cells.csv").write_text(text)
    targets = read_cell_targets(tmp_path / "cells.csv", ["type"], unit="donor")
    assert targets.keys.tolist() == ["c1", "c5"]
    assert targets.labels[:, 0].tolist() == ["a", "b"]
    assert targets.units.tolist() == ["x", "y"]
    assert targets.excluded == {"no label": 2, "no unit": 1}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_classes_are_text_and_numbered_in_sorted_order(tmp_path, suffix):
    path = tmp_path / f"cells.{suffix}"
    values = ["10.0", "9.0", "", "10.0", "9.0", "10.0"]
    if suffix == "parquet":
        column = pa.array([float(v) if v else float("nan") for v in values])
        write_table(pa.table({"cell_id": list("uvwxyz"), "dose": column}), path)
    else:
        separator = "," if suffix == "csv" else "\t"
        lines = [separator.join(pair) for pair in zip(["cell_id", *"uvwxyz"], ["dose", *values], strict=True)]
        path.write_text("\n".join(lines) + "\n")
    targets = read_cell_targets(path, ["dose"])
    assert targets.keys.tolist() == list("uvxyz")
    labels, classes = encode(targets)
    assert classes == (("10", "9"),)  # in order of text
    assert labels[:, 0].tolist() == [0, 1, 0, 1, 0]


def test_several_tasks_may_lack_labels(tmp_path):
    path = write_cells(tmp_path / "c.parquet", n=60, sex=[["m", "f", None][i % 3] for i in range(60)])
    targets = read_cell_targets(path, ["type", "sex"])
    assert targets.kind == "tasks"
    labels, classes = encode(targets)
    assert classes == (("a", "b", "c"), ("f", "m"))
    assert labels[:3].tolist() == [[0, 1], [1, 0], [2, -1]]


def test_datasets_with_cells_of_one_name_stay_apart(tmp_path):
    tables = {name: write_cells(tmp_path / f"{name}.parquet", n=30) for name in ("x", "y")}
    targets = read_cell_targets(tables, ["type"])
    assert len(set(targets.keys)) == 60
    assert targets.keys[0] == "x:cell0"


def test_rare_classes_are_left_out_and_named(tmp_path):
    path = write_cells(tmp_path / "c.parquet", n=40, kind=["many"] * 37 + ["few"] * 2 + ["one"])
    kept, rows, lost = drop_rare(read_cell_targets(path, ["kind"]), 3)
    assert lost == {"kind": {"few": 2, "one": 1}}
    assert rows.tolist() == list(range(37))
    assert set(kept.labels[:, 0]) == {"many"}


@pytest.mark.parametrize(
    ("labels", "options", "words"),
    [
        (["typ"], {}, "no column 'typ'; did you mean 'type'"),
        (["type"], {"unit": "doner"}, "did you mean 'donor'"),
        (["type"], {"key": "barcode"}, "no column 'barcode'"),
        (["nothing"], {}, "no cell has 'nothing'"),
        ([], {}, "--label"),
    ],
)
def test_tables_that_do_not_have_it(tmp_path, labels, options, words):
    path = write_cells(tmp_path / "c.parquet", nothing=pa.array([None] * 120, pa.string()))
    with pytest.raises(UserError, match=words):
        read_cell_targets(path, labels, **options)


def test_a_label_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="label 'type' is given twice"):
        read_cell_targets(write_cells(tmp_path / "c.parquet"), ["type", "type"])


def test_a_cell_twice_one_class_and_numbers_are_refused(tmp_path):
    path = write_cells(tmp_path / "c.parquet", n=30, one=["x"] * 30, count=[float(i) for i in range(30)])
    with pytest.raises(UserError, match="one class"):
        encode(read_cell_targets(path, ["one"]))
    with pytest.raises(UserError, match="30 classes for 30 rows"):
        encode(read_cell_targets(path, ["count"]))
    (tmp_path / "twice.csv").write_text("cell_id,type\nc1,a\nc1,b\n")
    with pytest.raises(UserError, match="'c1' is in more than one row"):
        read_cell_targets(tmp_path / "twice.csv", ["type"])


# --- labels of genes ------------------------------------------------------------------------------------------


def test_genes_are_found_by_other_spellings_and_the_others_are_reported(tmp_path):
    vocabulary = make_vocabulary(20)
    ids = vocabulary.gene_ids
    rows = [
        (ids[3], "x"),
        (f"{ids[1]}.7", "y"),
        ("ENSG99999999999", "x"),
        (ids[5].lower(), "y"),
        (ids[3], "x"),
    ]
    (tmp_path / "g.csv").write_text("gene_id,kind\n" + "".join(f"{gene},{kind}\n" for gene, kind in rows))
    targets, tokens, report = gene_rows(read_gene_targets(tmp_path / "g.csv", "kind"), vocabulary)
    assert targets.keys.tolist() == [ids[3], ids[1], ids[5]]
    assert tokens.tolist() == vocabulary.token_ids[[3, 1, 5]].tolist()
    assert report["outside the vocabulary"] == ["ENSG99999999999"]
    assert (report["labelled"], report["mapped"]) == (4, 3)


def test_one_class_against_empty_fields_or_against_all_others(tmp_path):
    (tmp_path / "g.csv").write_text("gene_id,sensitive,kind\na,Yes,x\nb,,y\nc,,z\nd,Yes,\n")
    targets = read_gene_targets(tmp_path / "g.csv", "sensitive", positive="Yes")
    assert targets.labels[:, 0].tolist() == ["Yes", "not Yes", "not Yes", "Yes"]
    targets = read_gene_targets(tmp_path / "g.csv", "kind", positive="x")
    assert targets.keys.tolist() == ["a", "b", "c"]  # an empty field is no class where there are others
    assert targets.labels[:, 0].tolist() == ["x", "not x", "not x"]
    with pytest.raises(UserError, match="did you mean 'Yes'"):
        read_gene_targets(tmp_path / "g.csv", "sensitive", positive="yes")


def test_genes_that_contradict_themselves_or_are_unknown(tmp_path):
    vocabulary = make_vocabulary(20)
    gene = vocabulary.gene_ids[0]
    (tmp_path / "g.csv").write_text(f"gene_id,kind\n{gene},x\n{gene},y\n")
    with pytest.raises(UserError, match="has two labels"):
        read_gene_targets(tmp_path / "g.csv", "kind")
    (tmp_path / "g.csv").write_text(f"gene_id,kind\n{gene},x\n{gene}.2,y\n")
    with pytest.raises(UserError, match="one gene with two labels"):
        gene_rows(read_gene_targets(tmp_path / "g.csv", "kind"), vocabulary)
    (tmp_path / "g.csv").write_text("gene_id,kind\nFOO,x\nBAR,y\n")
    with pytest.raises(UserError, match="none of the 2 labelled genes"):
        gene_rows(read_gene_targets(tmp_path / "g.csv", "kind"), vocabulary)


# --- drawn sides ----------------------------------------------------------------------------------------------


def test_whole_donors_are_held_out_whatever_the_order_of_rows(tmp_path):
    targets = read_cell_targets(write_cells(tmp_path / "c.parquet"), ["type"], unit="donor")
    side, record = sides_of(targets, SplitSpec(heldout=0.15, test=0.25))
    units = {s: set(targets.units[side == s]) for s in (TRAIN, HELDOUT, TEST)}
    assert all(units.values())
    assert not units[TRAIN] & units[TEST] | units[TRAIN] & units[HELDOUT] | units[HELDOUT] & units[TEST]
    assert record["train"] == sorted(units[TRAIN])
    assert record["test"] == sorted(units[TEST])
    assert (record["kind"], record["by"], record["unit"]) == ("held-out", "unit", "donor")
    order = np.random.default_rng(0).permutation(len(targets))
    again, other = sides_of(targets.take(order), SplitSpec(heldout=0.15, test=0.25))
    assert (again == side[order]).all()
    assert other == record
    seeds = [sides_of(targets, SplitSpec(seed=seed))[1]["test"] for seed in range(6)]
    assert len({tuple(test) for test in seeds}) > 1


def test_without_units_every_class_is_divided_and_the_record_says_so(tmp_path):
    targets = read_cell_targets(write_cells(tmp_path / "c.parquet"), ["type"])
    side, record = sides_of(targets, SplitSpec(heldout=0.1, test=0.2))
    for kind in "abc":
        rows = targets.labels[:, 0] == kind
        assert [(side[rows] == s).sum() for s in (TRAIN, HELDOUT, TEST)] == [28, 4, 8]
    assert record["kind"] == "stratified"
    assert "optimistic" in record["notes"][0]
    assert len(record["train"]) == 84
    none, _ = sides_of(targets, SplitSpec(heldout=0, test=0))
    assert (none == TRAIN).all()


def test_draws_keep_something_to_train_on():
    names = np.array([f"n{i}" for i in range(11)], dtype=object)
    groups = np.array(["big"] * 10 + ["one"], dtype=object)
    drawn = draw_rows(names, groups, 0.5, seed=0, salt="test")
    assert len(drawn) == 5
    assert 10 not in drawn
    units = np.array(["u", "u", "v", "v", "w"], dtype=object)
    labels = np.array([[0], [1], [0], [1], [2]])
    for seed in range(5):
        assert draw_units(units, labels, 0.3, seed=seed, salt="test") in (["u"], ["v"])
    with pytest.raises(UserError, match="no unit can be held out"):
        draw_units(units[1:3], np.array([[0], [1]]), 0.3, seed=0, salt="test")


def test_folds_test_everything_once(tmp_path):
    path = write_cells(tmp_path / "c.parquet")
    for unit in (None, "donor"):
        targets = read_cell_targets(path, ["type"], unit=unit)
        tested = np.zeros(len(targets), dtype=int)
        for fold in range(1, 5):
            side, record = sides_of(targets, SplitSpec(folds=4, fold=fold, heldout=0.2))
            tested += side == TEST
            assert (side == HELDOUT).any()
            assert record["fold"] == fold
        assert (tested == 1).all()
    with pytest.raises(UserError, match="choose 1 to 4"):
        sides_of(targets, SplitSpec(folds=4, fold=5))
    with pytest.raises(UserError, match="give --fold"):
        sides_of(targets, SplitSpec(folds=4))


# --- given sides ----------------------------------------------------------------------------------------------


def test_a_column_of_sides_in_any_spelling(tmp_path):
    words = ["train", "training", "eval", "valid", "test", None]
    path = write_cells(tmp_path / "c.parquet", split=[words[i // 20] for i in range(120)])
    targets = read_cell_targets(path, ["type"], side="split")
    side, record = sides_of(targets, SplitSpec())
    assert [(side == s).sum() for s in (TRAIN, HELDOUT, TEST, OUT)] == [40, 40, 20, 20]
    assert record["notes"] == ["20 labelled rows are on no side and left out"]
    with pytest.raises(UserError, match="donor 'd0' is on two sides of the split: train and heldout"):
        sides_of(read_cell_targets(path, ["type"], side="split", unit="donor"), SplitSpec())
    path = write_cells(tmp_path / "c.parquet", split=["trian"] * 120)
    with pytest.raises(UserError, match="did you mean 'train'"):
        sides_of(read_cell_targets(path, ["type"], side="split"), SplitSpec())


def test_a_file_of_donors_as_lists_or_as_a_table(tmp_path):
    targets = read_cell_targets(write_cells(tmp_path / "c.parquet"), ["type"], unit="donor")
    lists = {"train": ["d0", "d1", "d2", "d3"], "eval": ["d4"], "test": ["d5", "d6", "stranger"]}
    (tmp_path / "s.json").write_text(json.dumps(lists))
    side, record = sides_of(targets, SplitSpec(file=tmp_path / "s.json"))
    rows = [f"{unit},{name}" for name, units in lists.items() for unit in units]
    (tmp_path / "s.csv").write_text("\n".join(["donor,split", *rows]) + "\n")
    same, _ = sides_of(targets, SplitSpec(file=tmp_path / "s.csv"))
    assert (side == same).all()
    assert set(targets.units[side == TEST]) == {"d5", "d6"}
    assert set(targets.units[side == OUT]) == {"d7"}
    assert (record["kind"], record["by"]) == ("given", "unit")
    # what was written down can be given again
    (tmp_path / "again.json").write_text(json.dumps(record))
    again, _ = sides_of(targets, SplitSpec(file=tmp_path / "again.json"))
    assert (again == side).all()


def test_files_that_put_something_on_two_sides_or_nothing_anywhere(tmp_path):
    targets = read_cell_targets(write_cells(tmp_path / "c.parquet"), ["type"], unit="donor")
    file = tmp_path / "s.json"
    for content, words in (
        ({"train": ["d0", "d1"], "test": ["d1"]}, "'d1' is on two sides: train and test"),
        ({"test": ["d1"]}, "no list 'train'"),
        ({"train": ["x"], "test": ["y"]}, "names no labelled row"),
        ([1], "is not a split"),
        ({"train": ["d0"], "tset": ["d1"]}, "no side of a split is called 'tset'; did you mean 'test'"),
        ({"folds": []}, "has no fold 1; make the split again"),
        ({"folds": [{"train": ["d0"]}]}, "fold 1 has no list 'test'"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(UserError, match=words):
            sides_of(targets, SplitSpec(file=file, fold=1))
    one = read_cell_targets(write_cells(tmp_path / "c.parquet", type=["a"] * 119 + ["b"]), ["type"])
    file.write_text(json.dumps({"train": [f"cell{i}" for i in range(100)], "test": ["cell119"]}))
    with pytest.raises(UserError, match="1 classes of 'type' are left to train on"):
        sides_of(one, SplitSpec(file=file))


def test_the_folds_of_a_benchmark(tmp_path):
    path = write_cells(tmp_path / "c.parquet")
    split = make_cell_split(
        cells={"x": path}, label="type", unit="donor", output=tmp_path / "s.json", folds=4
    )
    targets = read_cell_targets(path, ["type"], unit="donor")
    for number, fold in enumerate(split.folds, start=1):
        side, record = sides_of(targets, SplitSpec(file=tmp_path / "s.json", fold=number))
        assert sorted(set(targets.units[side == TEST])) == fold["test"]
        assert set(targets.units[side == TRAIN]) | set(targets.units[side == HELDOUT]) == set(fold["train"])
        assert (side == HELDOUT).any()
        assert record["name"] == fold["name"]
    with pytest.raises(UserError, match="has 4 folds; say which"):
        sides_of(targets, SplitSpec(file=tmp_path / "s.json"))
    with pytest.raises(UserError, match="with --unit donor"):
        sides_of(read_cell_targets(path, ["type"]), SplitSpec(file=tmp_path / "s.json", fold=1))


def test_a_benchmark_of_a_transfer_between_datasets(tmp_path):
    tables = {name: write_cells(tmp_path / f"{name}.parquet", n=60) for name in ("x", "y")}
    make_cell_split(cells=tables, label="type", train=["y"], test=["x"], output=tmp_path / "s.json")
    targets = read_cell_targets(tables, ["type"])
    side, record = sides_of(targets, SplitSpec(file=tmp_path / "s.json", fold=1, heldout=0.2))
    of = np.array([key.split(":")[0] for key in targets.keys])
    assert set(of[side == TEST]) == {"x"}
    assert set(of[side != TEST]) == {"y"}
    assert (side == HELDOUT).sum() == 12
    assert not set(record["train"]) & set(record["heldout"])


def test_a_benchmark_of_genes_holds_labels_and_groups(tmp_path):
    vocabulary = make_vocabulary(40)
    lines = [f"{gene},{'yn'[i % 2]},{i // 2}" for i, gene in enumerate(vocabulary.gene_ids)]
    (tmp_path / "g.csv").write_text("\n".join(["gene_id,kind,pair", *lines]) + "\n")
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(80, np.float32)), 2)
    write_table(
        pa.table({"gene_id": vocabulary.gene_ids.tolist(), "embedding": vectors}), tmp_path / "e.parquet"
    )
    split = make_gene_split(
        labels=tmp_path / "g.csv", label="kind", positive="y", embeddings=[tmp_path / "e.parquet"],
        output=tmp_path / "s.json", dataset="x", group="pair", folds=5,
    )  # fmt: skip
    targets, _, _ = gene_rows(read_gene_targets(tmp_path / "s.json", "kind"), vocabulary)
    assert len(targets) == 40
    side, _ = sides_of(targets, SplitSpec(file=tmp_path / "s.json", fold=1, heldout=0.2))
    assert sorted(targets.keys[side == TEST]) == sorted(split.folds[0]["test"])
    pair = {line.split(",")[0]: line.split(",")[2] for line in lines}
    held = {pair[key] for key in targets.keys[side == HELDOUT]}
    assert held
    assert not held & {pair[key] for key in targets.keys[side == TRAIN]}


# --- presets --------------------------------------------------------------------------------------------------


def test_published_settings_and_donors(tmp_path):
    heart = find_preset("cardiomyopathy", task="cells")
    settings = resolve(heart, {"epochs": 2.0, "seed": None})
    assert (settings.epochs, settings.seed, settings.freeze_layers) == (2.0, 73, 2)
    assert (settings.schedule, settings.warmup, settings.learning_rate) == ("polynomial", 1812, 0.000804)
    assert [list(heart.sides.values()).count(side) for side in ("train", "heldout", "test")] == [29, 5, 5]
    donors = [list(heart.sides)[i % 39] for i in range(390)]
    path = write_cells(tmp_path / "c.parquet", n=390, individual=donors)
    targets = read_cell_targets(path, ["type"], unit="individual")
    side, record = sides_of(targets, SplitSpec(published=heart.sides))
    assert set(targets.units[side == TEST]) == {"1437", "1516", "1602", "1685", "1718"}
    assert record["kind"] == "published"
    dosage = resolve(PRESETS["dosage-sensitivity"], {})
    assert (dosage.max_cells, dosage.epochs, dosage.warmup, dosage.weight_decay) == (10_000, 1.0, 500, 0.001)
    with pytest.raises(UserError, match="give --task genes"):
        find_preset("dosage-sensitivity", task="cells")
    with pytest.raises(UserError, match="did you mean 'cardiomyopathy'"):
        find_preset("cardiomiopathy", task="cells")
