"""The cell task: finds what is there, finds nothing where labels are shuffled, refuses what doesn't fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics as reference
from token_files import make_vocabulary

from cellformers.errors import UserError
from cellformers.evaluate.cell_splits import make_cell_split
from cellformers.evaluate.cells import evaluate_cells
from cellformers.io.files import read_metadata, stamp, write_table


def run(tmp_path: Path, name: str = "score", **more: Any) -> dict[str, Any]:
    ask = {
        "benchmark": "b", "method": "m", "kind": "model", "split": tmp_path / "split.json", "features": "embedding",
        "output": tmp_path / f"{name}.json", "predictions": tmp_path / f"{name}.parquet",
    }  # fmt: skip
    score = evaluate_cells(**(ask | more))
    assert json.loads((tmp_path / f"{name}.json").read_text()) == json.loads(json.dumps(score))
    return score


def split_of(tmp_path: Path, data: Any, unit: str | None = "donor", **more: Any) -> None:
    make_cell_split(
        cells={"a": data.cells}, label="celltype", unit=unit, output=tmp_path / "split.json", **more
    )


@pytest.mark.parametrize("features", ["embedding", "pca_hvg", "log_counts"])
def test_separable_types_are_found_in_held_out_donors(
    atlas: Any, build: Any, tmp_path: Path, features: str
) -> None:
    data = atlas(n_donors=8)
    split_of(tmp_path, data)
    files = (
        build.vectors(data.ids, data.vectors)
        if features == "embedding"
        else build.counts(data.ids, data.genes, data.counts)
    )
    score = run(tmp_path, cells={"a": data.cells}, features=features, inputs={"a": files})
    entry = score["metrics"]["macro_f1"]
    assert entry["value"] > 0.95
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert score["interval"]["resampled"] == "donor"
    assert set(entry["units"]) == set(data.donors)
    assert len(entry["folds"]) == 5
    table = pq.read_table(tmp_path / "score.parquet").to_pandas()
    assert sorted(table["cell_id"]) == sorted(data.ids)
    assert table.columns[0] == "cell_id"
    assert (table["label"] == table["predicted"]).mean() == pytest.approx(
        score["metrics"]["accuracy"]["value"]
    )
    columns = [c for c in table if c.startswith("probability:")]
    assert columns == [f"probability:{c}" for c in ("B cell", "NK", "T cell")]
    assert np.allclose(table[columns].sum(axis=1), 1, atol=1e-5)
    assert np.allclose(table[columns].max(axis=1), table["probability"])
    donor = dict(zip(data.ids, data.donors, strict=True))
    assert all(donor[c] == u for c, u in zip(table["cell_id"], table["unit"], strict=True))
    assert read_metadata(tmp_path / "score.parquet")["inputs"] == score["inputs"]
    assert np.sum(score["confusion"]) == score["n"] == 360


def test_permuted_labels_come_out_at_chance(atlas: Any, build: Any, tmp_path: Path) -> None:
    data = atlas(n=900, n_donors=9)
    files = {"a": build.vectors(data.ids, data.vectors)}
    for unit in ("donor", None):
        split_of(tmp_path, data, unit)
        score = run(tmp_path, cells={"a": data.cells}, inputs=files, permute=True, kind="control")
        assert score["chance"]["macro_f1"] == pytest.approx(1 / 3)
        assert score["metrics"]["macro_f1"]["value"] < 1 / 3 + 0.05
        assert score["metrics"]["accuracy"]["value"] < score["chance"]["accuracy"] + 0.05
        assert any("permuted" in note for note in score["notes"])


def test_majority_is_the_largest_class(atlas: Any, tmp_path: Path) -> None:
    data = atlas()
    split_of(tmp_path, data)
    score = run(tmp_path, cells={"a": data.cells}, inputs={}, features="majority", kind="baseline")
    assert score["metrics"]["accuracy"]["value"] <= score["chance"]["accuracy"] + 1e-12
    assert score["metrics"]["macro_f1"]["value"] < 1 / 3


def test_few_units_get_values_and_no_interval(atlas: Any, build: Any, tmp_path: Path) -> None:
    data = atlas(n_donors=4)
    split_of(tmp_path, data)
    score = run(tmp_path, cells={"a": data.cells}, inputs={"a": build.vectors(data.ids, data.vectors)})
    entry = score["metrics"]["macro_f1"]
    assert entry["low"] is None
    assert entry["high"] is None
    assert len(entry["units"]) == 4
    assert "too few" in score["interval"]["note"]


def test_a_stratified_split_resamples_cells_and_says_so(atlas: Any, build: Any, tmp_path: Path) -> None:
    data = atlas(n_donors=1)
    split_of(tmp_path, data)
    score = run(tmp_path, cells={"a": data.cells}, inputs={"a": build.vectors(data.ids, data.vectors)})
    assert score["split"]["kind"] == "stratified"
    assert score["interval"]["resampled"] == "cells"
    assert "as if independent" in score["interval"]["note"]
    assert score["metrics"]["macro_f1"]["units"] is None


def test_shards_file_order_and_threads_do_not_matter(atlas: Any, build: Any, tmp_path: Path) -> None:
    data = atlas()
    split_of(tmp_path, data)
    written = []
    for shards, turn, threads in ((1, 1, 1), (3, 1, 2), (3, -1, 1)):
        for features, files in (
            ("embedding", build.vectors(data.ids, data.vectors, shards=shards)),
            ("pca_hvg", build.counts(data.ids, data.genes, data.counts, shards=shards)),
        ):
            run(tmp_path, features, cells={"a": data.cells}, features=features, inputs={"a": files[::turn]},
                threads=threads)  # fmt: skip
        written.append([(tmp_path / f"{n}.{s}").read_bytes() for n in ("embedding", "pca_hvg")
                        for s in ("json", "parquet")])  # fmt: skip
    assert written[0] == written[1] == written[2]
    assert str(tmp_path).encode() not in written[0][0]


def test_embeddings_as_h5ad_score_the_same(atlas: Any, build: Any, tmp_path: Path) -> None:
    import anndata
    import pandas as pd

    data = atlas()
    split_of(tmp_path, data)
    merged = anndata.AnnData(obs=pd.DataFrame(index=pd.Index(data.ids)))
    merged.obsm["X_mini"] = data.vectors.astype(np.float32)
    merged.obsm["X_umap"] = data.vectors[:, :2]
    merged.write_h5ad(tmp_path / "mini.h5ad")
    a = run(tmp_path, cells={"a": data.cells}, inputs={"a": [tmp_path / "mini.h5ad"]})
    b = run(tmp_path, cells={"a": data.cells}, inputs={"a": build.vectors(data.ids, data.vectors)})
    assert a == b


def test_transfer_between_datasets(atlas: Any, build: Any, tmp_path: Path) -> None:
    one, two = atlas(name="one", n_donors=2), atlas(name="two", n_donors=3, seed=1, n=240)
    cells = {"two": two.cells, "one": one.cells}
    make_cell_split(
        cells=cells, label="celltype", train=["one"], test=["two"], output=tmp_path / "split.json"
    )
    genes = two.genes[::-1]
    inputs = {
        "one": build.counts(one.ids, one.genes, one.counts, name="one"),
        "two": build.counts(two.ids, genes, two.counts[:, ::-1], name="two"),
    }
    score = run(tmp_path, cells=cells, features="pca_hvg", inputs=inputs, published=[
        {"metric": "accuracy", "value": 0.9, "source": "a paper"}])  # fmt: skip
    assert score["split"]["names"] == ["one to two"]
    assert score["metrics"]["macro_f1"]["value"] > 0.9
    assert score["metrics"]["macro_f1"]["units"].keys() == {"two"}
    assert score["interval"]["note"] == "1 unit (dataset) is too few for an interval: see the value of each"
    assert score["metrics"]["macro_f1"]["low"] is None
    assert score["published"] == {"accuracy": [{"value": 0.9, "source": "a paper"}]}
    assert "120 genes in common" in score["notes"]


def test_a_class_unseen_in_training_costs_macro_f1(build: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kind = np.repeat(["x", "y", "x", "y", "z"], 30)
    a = build.cells("a", cell_id=[f"c{i}" for i in range(60)], line=kind[:60].tolist())
    b = build.cells("b", cell_id=[f"c{i}" for i in range(90)], line=kind[60:].tolist())
    make_cell_split(
        cells={"a": a, "b": b},
        label="line",
        train=["a"],
        test=["b"],
        output=tmp_path / "split.json",
    )
    vectors = 8 * np.eye(3)[np.array([{"x": 0, "y": 1, "z": 2}[k] for k in kind])] + rng.normal(size=(150, 3))
    inputs = {
        "a": build.vectors([f"c{i}" for i in range(60)], vectors[:60], name="a"),
        "b": build.vectors([f"c{i}" for i in range(90)], vectors[60:], name="b"),
    }
    score = run(tmp_path, cells={"a": a, "b": b}, inputs=inputs)
    assert score["per_class"]["z"]["f1"] == 0
    assert score["metrics"]["macro_f1"]["value"] < 2 / 3
    assert score["classes"] == ["x", "y", "z"]


def test_what_does_not_fit_is_refused_and_nothing_is_left(atlas: Any, build: Any, tmp_path: Path) -> None:
    data = atlas()
    split_of(tmp_path, data)
    cells = {"a": data.cells}
    good = build.vectors(data.ids, data.vectors)

    def refused(match: str, **more: Any) -> None:
        with pytest.raises(UserError, match=match):
            run(tmp_path, **({"cells": cells, "inputs": {"a": good}} | more))
        assert not (tmp_path / "score.json").exists()
        assert not (tmp_path / "score.parquet").exists()

    few = build.vectors(data.ids[3:], data.vectors[3:], name="few")
    refused("lacks 3 of the 360 cells of the split", inputs={"a": few})
    refused("no embedding files given for dataset 'a'", inputs={"b": good})
    refused("is there twice", inputs={"a": [*good, *good]})
    refused(r"none\.h5ad: no such file", inputs={"a": [tmp_path / "none.h5ad"]})
    broken = data.vectors.copy()
    broken[5, 2] = np.nan
    refused(
        f"embedding of {data.ids[5]} is not finite", inputs={"a": build.vectors(data.ids, broken, name="nan")}
    )
    refused("unknown features 'embeding'; did you mean 'embedding'", features="embeding")
    refused("'modell' is no kind", kind="modell")
    other = atlas(name="other", seed=4)
    refused("made from other cells", cells={"a": other.cells})
    content = json.loads((tmp_path / "split.json").read_text())
    content["folds"][0]["train"] += content["folds"][0]["test"]
    (tmp_path / "split.json").write_text(json.dumps(content))
    refused("on both sides")


def test_splits_edited_to_leak_are_refused(atlas: Any, build: Any, tmp_path: Path) -> None:
    """The donors of the cells decide, not what the file claims."""
    data = atlas()
    path = tmp_path / "split.json"
    split_of(tmp_path, data, None)
    by_cell = json.loads(path.read_text())
    split_of(tmp_path, data)
    held_out = json.loads(path.read_text())

    def refused(match: str, **edits: Any) -> None:
        path.write_text(json.dumps(held_out | edits))
        with pytest.raises(UserError, match=match):
            run(tmp_path, cells={"a": data.cells}, inputs={"a": build.vectors(data.ids, data.vectors)})
        assert not (tmp_path / "score.json").exists()

    refused("claims to be 'held-out' by 'cell'", by="cell", folds=by_cell["folds"])
    refused("has cells on both sides", kind="given", by="cell", folds=by_cell["folds"])
    refused("has cells on both sides", kind="stratified", by="cell", folds=by_cell["folds"])
    refused(
        "made from other cells, labels or units",
        unit=None,
        kind="stratified",
        by="cell",
        folds=by_cell["folds"],
    )
    twice = [fold | {"train": [*fold["train"], fold["test"][0]]} for fold in held_out["folds"]]
    refused("on both sides of fold", folds=twice)
    refused("fold 1 has no lists of names", folds=[{"name": "x", "train": "all", "test": "all"}])
    refused("split.json: is not a split: 'seed' is missing", seed=None)
    refused("split.json: is not a split: 'excluded' is missing", excluded=None)
    refused("it has no fold", folds=[])
    refused("fold 1 has no name", folds=[{"train": ["a"], "test": ["b"]}])
    refused("split.json: was made from other cells, labels or units", classes=held_out["classes"][1:])
    unknown = [{"name": "x", "train": held_out["folds"][0]["train"], "test": ["nobody"]}]
    refused("split.json: fold 'x' names 'nobody', which is no unit of its cells", folds=unknown)
    refused("is in the test of two folds", folds=[held_out["folds"][0]] * 2)


def cohort(
    build: Any, *, n_donors: int, effect: float, signal: float, seed: int = 0, cells_each: int = 40
) -> tuple[Path, list[Path]]:
    """Donors, half of them ill, whose cells share a strong effect of their donor; and what illness adds to it."""
    rng = np.random.default_rng(seed)
    donor = np.repeat(np.arange(n_donors), cells_each)
    ill = donor % 2
    vectors = rng.normal(size=(len(donor), 10)) + effect * rng.normal(size=(n_donors, 10))[donor]
    vectors[:, 0] += signal * ill
    ids = [f"c{i}" for i in range(len(donor))]
    cells = build.cells(
        f"cohort{seed}", cell_id=ids, disease=np.array(["control", "ill"])[ill].tolist(),
        donor=[f"d{d:02d}" for d in donor],
    )  # fmt: skip
    return cells, build.vectors(ids, vectors, name=f"cohort{seed}")


def test_labels_of_donors_get_votes_and_an_auc(build: Any, tmp_path: Path) -> None:
    cells, files = cohort(build, n_donors=12, effect=0.5, signal=6.0)
    make_cell_split(cells={"a": cells}, label="disease", unit="donor", output=tmp_path / "split.json")
    score = run(tmp_path, cells={"a": cells}, inputs={"a": files})
    table = pq.read_table(tmp_path / "score.parquet").to_pandas()
    found = score["metrics"]
    for name in ("macro_f1", "accuracy", "macro_precision", "macro_recall", "auc", "unit_vote"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"], name
        assert len(found[name]["folds"]) == 5
        assert score["chance"][name] == pytest.approx(0.5)
    expected = reference.roc_auc_score(table["label"] == "ill", table["probability:ill"])
    assert found["auc"]["value"] == pytest.approx(expected, abs=1e-6)
    assert found["auc"]["units"] is None  # a donor has one label
    assert found["macro_recall"]["value"] == pytest.approx(
        reference.recall_score(table["label"], table["predicted"], average="macro")
    )
    majority = table.groupby("unit")["predicted"].agg(lambda p: p.value_counts().index[0])
    truth = table.groupby("unit")["label"].first()
    assert found["unit_vote"]["value"] == pytest.approx((majority == truth).mean())
    assert [(v["unit"], v["label"], v["predicted"]) for v in score["votes"]] == [
        (u, truth[u], majority[u]) for u in truth.index
    ]
    for vote in score["votes"]:
        of_unit = table[table["unit"] == vote["unit"]]
        assert vote["cells"] == len(of_unit)
        assert vote["share"]["ill"] == pytest.approx((of_unit["predicted"] == "ill").mean())


def test_no_votes_where_a_unit_has_several_labels(atlas: Any, build: Any, tmp_path: Path) -> None:
    data = atlas()
    split_of(tmp_path, data)
    score = run(tmp_path, cells={"a": data.cells}, inputs={"a": build.vectors(data.ids, data.vectors)})
    assert score["votes"] is None
    assert "unit_vote" not in score["metrics"]
    assert score["metrics"]["auc"]["value"] > 0.95
    assert set(score["metrics"]["auc"]["units"]) == set(data.donors)


def test_diseases_are_permuted_over_donors_and_come_out_at_chance(build: Any, tmp_path: Path) -> None:
    """Donors whose cells are all alike: what tells donors apart must not tell permuted labels apart."""
    scores = []
    for seed in range(6):
        cells, files = cohort(build, n_donors=16, effect=3.0, signal=4.0, seed=seed, cells_each=20)
        ask = {"cells": {"a": cells}, "inputs": {"a": files}}
        make_cell_split(
            cells={"a": cells}, label="disease", unit="donor", output=tmp_path / "split.json", seed=seed
        )
        control = run(tmp_path, permute=True, kind="control", **ask)
        table = pq.read_table(tmp_path / "score.parquet").to_pandas()
        assert (table.groupby("unit")["label"].nunique() == 1).all()
        assert (
            "labels permuted over 16 units (donor), each of which has one label: has to come out at chance"
            in (control["notes"])
        )
        scores.append(
            [
                control["metrics"][m]["value"] - control["chance"][m]
                for m in ("accuracy", "macro_f1", "unit_vote", "auc")
            ]
        )
    assert np.mean(scores, axis=0).max() < 0.05
    assert np.mean(scores) > -0.35


def test_cell_types_are_permuted_over_cells(atlas: Any, build: Any, tmp_path: Path) -> None:
    data = atlas()
    split_of(tmp_path, data)
    control = run(tmp_path, cells={"a": data.cells}, inputs={"a": build.vectors(data.ids, data.vectors)}, permute=True,
                  kind="control")  # fmt: skip
    assert "labels permuted over cells: has to come out at chance" in control["notes"]


def test_transfer_across_platforms_that_share_lines(atlas: Any, build: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cells, inputs = {}, {}
    for number, name in enumerate(("drop", "dronc")):
        day, line = np.repeat([0, 1], 60), np.tile(np.repeat(["p", "q", "r"][: 3 - number], 10), 6)[:120]
        ids = [f"c{i}" for i in range(120)]
        cells[name] = build.cells(name, cell_id=ids, day=day.tolist(), line=line.tolist())
        vectors = rng.normal(size=(120, 5)) + 5 * day[:, None] + number
        inputs[name] = build.vectors(ids, vectors, name=f"{name}-emb")
    make_cell_split(
        cells=cells, label="day", unit="line", train=["drop"], test=["dronc"], across=True,
        output=tmp_path / "split.json",
    )  # fmt: skip
    score = run(tmp_path, cells=cells, inputs=inputs)
    assert score["split"]["names"] == ["drop to dronc: p", "drop to dronc: q"]
    assert score["n"] == 120
    assert score["metrics"]["accuracy"]["value"] > 0.9
    assert set(score["metrics"]["accuracy"]["units"]) == {"p", "q"}
    assert "2 units (line) are too few" in score["interval"]["note"]
    assert set(pq.read_table(tmp_path / "score.parquet")["dataset"].to_pylist()) == {"dronc"}


def token_shards(build: Any, data: Any, folder: Path, shards: int = 1) -> tuple[list[Path], Path]:
    """Tokens of an atlas, genes by descending count, and their vocabulary."""
    vocabulary = make_vocabulary(len(data.genes), special="v2")
    if not (folder / "vocabulary").exists():
        vocabulary.save(folder / "vocabulary")
    special, paths = vocabulary.special_tokens, []
    for number, rows in enumerate(np.array_split(np.arange(len(data.ids)), shards)):
        cells = []
        for row in rows:
            order = np.argsort(-data.counts[row], kind="stable")[: (data.counts[row] > 0).sum()]
            cells.append([special["<cls>"], *vocabulary.token_ids[order].tolist(), special["<eos>"]])
        table = pa.table(
            {
                "cell_id": data.ids[rows].tolist(), "input_ids": pa.array(cells, pa.list_(pa.int32())),
                "length": pa.array([len(c) for c in cells], pa.int32()),
            }
        )  # fmt: skip
        path = folder / f"tokens-{shards}" / f"{number}.parquet"
        write_table(
            table, path, stamp("tokenize", 1, parameters={}, inputs={"vocabulary": vocabulary.digest})
        )
        paths.append(path)
    return paths, folder / "vocabulary"


def test_ranks_alone_find_the_types(atlas: Any, build: Any, tmp_path: Path) -> None:
    data = atlas()
    split_of(tmp_path, data)
    scores = []
    for shards in (1, 3):
        files, vocabulary = token_shards(build, data, tmp_path, shards)
        scores.append(run(tmp_path, cells={"a": data.cells}, features="rank_only", inputs={"a": files[::-1]},
                          vocabulary=vocabulary, kind="baseline"))  # fmt: skip
    assert scores[0] == scores[1]
    assert scores[0]["metrics"]["macro_f1"]["value"] > 0.9
    with pytest.raises(UserError, match="which tokens are genes; give --vocabulary"):
        run(tmp_path, cells={"a": data.cells}, features="rank_only", inputs={"a": files})
    make_vocabulary(7).save(tmp_path / "other")
    with pytest.raises(UserError, match="wrong vocabulary"):
        run(tmp_path, cells={"a": data.cells}, features="rank_only", inputs={"a": files},
            vocabulary=tmp_path / "other")  # fmt: skip


def test_harmony_mixes_batches_and_says_that_it_saw_the_test_cells(
    atlas: Any, build: Any, tmp_path: Path
) -> None:
    pytest.importorskip("harmonypy", reason="harmonypy is not installed")
    data = atlas(n=240, n_donors=4)
    split_of(tmp_path, data)
    ask = {"cells": {"a": data.cells}, "features": "harmony", "kind": "baseline",
           "inputs": {"a": build.counts(data.ids, data.genes, data.counts)}}  # fmt: skip
    score = run(tmp_path, batch="donor", **ask)
    assert score["metrics"]["macro_f1"]["value"] > 0.9
    assert any(note.startswith("transductive: sees the test cells' counts") for note in score["notes"])
    with pytest.raises(UserError, match="has to know what to mix; give --batch"):
        run(tmp_path, **ask)
    with pytest.raises(UserError, match="no column 'doner'; did you mean 'donor'"):
        run(tmp_path, batch="doner", **ask)
    with pytest.raises(UserError, match="all are of 'a'"):
        run(tmp_path, batch="dataset", **ask)


def test_cells_that_a_model_can_not_read_are_scored_by_no_method(build: Any, tmp_path: Path) -> None:
    """A cell that passed QC may have too few genes of a vocabulary: it has no tokens, so no embedding."""
    rng = np.random.default_rng(0)
    ids = [f"c{i}" for i in range(120)]
    labels = ["a", "b"] * 60
    cells = build.cells(cell_id=ids, kind=labels, donor=[f"d{i // 12}" for i in range(120)])
    values = rng.normal(size=(120, 3)) + np.array([[i % 2, 0, 0] for i in range(120)])
    readable = [i for i in range(120) if i not in (3, 50)]
    shards = {"one": [i for i in range(120) if i != 3], "two": [i for i in range(120) if i != 50]}
    tokens = []
    for vocabulary, rows in shards.items():
        for part in (rows[:50], rows[50:]):
            path = tmp_path / vocabulary / f"{part[0]}.parquet"
            table = pa.table({"cell_id": [ids[i] for i in part]})
            write_table(table, path, metadata={"inputs": {"vocabulary": vocabulary}})
            tokens.append(path)
    split = tmp_path / "split.json"
    made = make_cell_split(
        cells={"atlas": cells}, label="kind", unit="donor", tokens={"atlas": tokens}, output=split
    )
    assert made.content["excluded"]["too few genes of a vocabulary"] == 2
    vectors = build.vectors([ids[i] for i in readable], values[readable])
    score = evaluate_cells(
        benchmark="b", method="m", kind="model", split=split, cells={"atlas": cells}, features="embedding",
        inputs={"atlas": vectors}, output=tmp_path / "m.json", predictions=tmp_path / "m.parquet",
    )  # fmt: skip
    assert score["n"] == 118
