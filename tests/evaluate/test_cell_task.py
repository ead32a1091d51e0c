"""The cell task: finds what is there, finds nothing where labels are shuffled, refuses what doesn't fit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cellformers.errors import UserError
from cellformers.evaluate.cells import evaluate_cells
from cellformers.evaluate.splits import make_cell_split
from cellformers.io.files import read_metadata


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
    assert score["split"]["names"] == ["one to two", "two to one"]
    assert min(score["metrics"]["macro_f1"]["folds"]) > 0.9
    assert score["metrics"]["macro_f1"]["units"].keys() == {"one", "two"}
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
        both_ways=False,
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


def test_a_cell_split_that_hides_a_shared_donor_is_refused(atlas: Any, build: Any, tmp_path: Path) -> None:
    """Folds by cell in a file that claims held-out donors: the donors of the cells decide, not the claim."""
    data = atlas()
    split_of(tmp_path, data, None)
    content = json.loads((tmp_path / "split.json").read_text())
    split_of(tmp_path, data, "donor")
    held_out = json.loads((tmp_path / "split.json").read_text())
    held_out |= {"by": "cell", "folds": content["folds"]}
    (tmp_path / "split.json").write_text(json.dumps(held_out))
    with pytest.raises(UserError, match="has cells on both sides"):
        run(tmp_path, cells={"a": data.cells}, inputs={"a": build.vectors(data.ids, data.vectors)})
