"""Mixing: batches that are mixed score high, batches that are apart score low, with the metrics of scib-metrics."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cellformers.config import EXTRA_METRICS
from cellformers.errors import UserError
from cellformers.evaluate import mixing_metrics
from cellformers.evaluate.mixing import measure_mixing, resample_median
from cellformers.evaluate.scores import read_score, summarise

pytest.importorskip("scib_metrics", reason="scib-metrics is not installed")
N, BATCHES, LABELS = (
    240,
    ("p1", "p2"),
    ("B cell", "NK", "T cell"),
)  # one size: jax compiles anew for every other


def planted(*, shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of three kinds of cells from two batches, `shift` apart; batch; label."""
    rng = np.random.default_rng(seed)
    kind, batch = np.arange(N) % 3, rng.permutation(N) % 2
    X = rng.normal(size=(N, 8)) + 8 * np.eye(3, 8)[kind]
    X[:, 7] += shift * batch
    return X, np.array(BATCHES, dtype=object)[batch], np.array(LABELS, dtype=object)[kind]


@pytest.fixture
def bench(build: Any, tmp_path: Path) -> Any:
    """Writes cells and embedding of planted batches, and measures them."""

    def run(name: str = "score", *, shift: float = 0.0, **more: Any) -> dict[str, Any]:
        X, batch, label = planted(shift=shift)
        donor = [f"{b}-d{i % 4}" for i, b in enumerate(batch)]
        ids = [f"cell{i}" for i in range(N)]
        cells = build.cells(cell_id=ids, platform=batch, celltype=label, donor=donor, qc_pass=[True] * N)
        ask = {
            "benchmark": "b", "method": "m", "kind": "model", "features": "embedding", "cells": {"a": cells},
            "inputs": {"a": build.vectors(ids, X, name=f"{name}-{shift}")}, "batch": "platform", "label": "celltype",
            "output": tmp_path / f"{name}.json",
        }  # fmt: skip
        score = measure_mixing(**(ask | more))
        assert read_score(tmp_path / f"{name}.json") == json.loads(json.dumps(score))
        return score

    return run


def values(score: dict[str, Any]) -> dict[str, float]:
    return {name: entry["value"] for name, entry in score["metrics"].items()}


def test_mixed_batches_score_high_and_shifted_ones_low(bench: Any) -> None:
    mixed, apart = bench("mixed", shift=0), bench("apart", shift=30)
    good, bad = values(mixed), values(apart)
    assert set(good) == {"batch_correction", *EXTRA_METRICS["mixing"]}
    assert all(0 <= v <= 1 for found in (good, bad) for v in found.values())
    assert good["ilisi"] > 0.8
    assert bad["ilisi"] < 0.01
    assert good["kbet"] > 0.8
    assert bad["kbet"] == 0
    assert good["graph_connectivity"] > 0.95
    assert bad["graph_connectivity"] < 0.7
    assert good["silhouette_batch"] > 0.9
    assert bad["silhouette_batch"] < 0.3
    assert good["batch_correction"] > 0.9
    assert bad["batch_correction"] < 0.35
    assert good["batch_correction"] == pytest.approx(
        np.mean([good[p] for p in ("silhouette_batch", "ilisi", "kbet", "graph_connectivity")])
    )
    assert good["bio_conservation"] == pytest.approx(
        np.mean([good[p] for p in ("isolated_labels", "nmi", "ari", "silhouette_label", "clisi")])
    )
    assert good["clisi"] > 0.95
    assert good["nmi"] > 0.95
    assert mixed["n"] == N
    assert mixed["label"] == "celltype"
    assert mixed["batches"] == {"p1": 120, "p2": 120}
    assert mixed["split"]["unit"] == "platform"
    assert mixed["inputs"]["split"] == apart["inputs"]["split"]
    assert mixed["inputs"]["features"] != apart["inputs"]["features"]


def test_kinds_that_are_one_cloud_are_not_conserved(bench: Any, build: Any) -> None:
    noise = np.random.default_rng(1).normal(size=(N, 8))
    found = values(bench(inputs={"a": build.vectors([f"cell{i}" for i in range(N)], noise, name="noise")}))
    assert found["batch_correction"] > 0.8
    assert found["bio_conservation"] < 0.45
    assert found["nmi"] < 0.2
    assert found["clisi"] < 0.3


def test_values_are_those_of_scib_metrics() -> None:
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    X, batch, label = planted(shift=1.0)
    batch[label == "NK"] = "p1"  # a label in one batch only, hence the isolated one
    found = mixing_metrics.measure(X, batch, label)
    distance, index = mixing_metrics.neighbours(X, 90)
    graph = NeighborsResults(indices=index, distances=distance)
    expected = {
        "ilisi": scib_metrics.ilisi_knn(graph, batch),
        "clisi": scib_metrics.clisi_knn(graph, label),
        "silhouette_label": scib_metrics.silhouette_label(X, label),
        "silhouette_batch": scib_metrics.silhouette_batch(X, label, batch),
        "isolated_labels": scib_metrics.isolated_labels(X, label, batch),
    }
    for name, value in expected.items():
        assert found.values[name] == pytest.approx(float(value), abs=1e-5), name
    b_cells = label == "B cell"
    _, near = mixing_metrics.neighbours(X[b_cells], 11)
    by_scib = scib_metrics.kbet(
        NeighborsResults(indices=near, distances=np.zeros(near.shape)), batch[b_cells]
    )
    assert mixing_metrics.kbet(X[b_cells], batch[b_cells]) == pytest.approx(float(by_scib[0]))
    assert 0.05 < float(by_scib[0]) < 0.95
    assert any("in one batch only" in note and "NK" in note for note in found.notes)


def test_shuffled_batches_show_what_perfect_mixing_scores(bench: Any) -> None:
    control = bench("control", shift=30, kind="control", permute=True)
    mixed = values(bench("mixed", shift=0))
    found, apart = values(control), values(bench("apart", shift=30))
    for name in ("ilisi", "kbet", "silhouette_batch"):
        assert found[name] > 0.8
        assert found[name] == pytest.approx(mixed[name], abs=0.1)
    for name in ("graph_connectivity", "silhouette_label", "clisi", "nmi"):  # these don't ask for the batch
        assert found[name] == apart[name]
    assert control["inputs"] == bench("apart", shift=30)["inputs"]
    assert any("shuffled" in note for note in control["notes"])


def test_scores_repeat_themselves(bench: Any) -> None:
    one, other = bench("one", shift=2, threads=1), bench("other", shift=2, threads=2)
    assert one == other


def test_labels_may_be_absent(bench: Any) -> None:
    score = bench(label=None)
    found = values(score)
    assert set(found) == {"ilisi", "kbet", "batch_correction"}
    assert found["batch_correction"] == pytest.approx((found["ilisi"] + found["kbet"]) / 2)
    assert score["classes"] == []
    assert any("without labels" in note for note in score["notes"])


def test_intervals_come_from_donors_and_only_from_enough(bench: Any) -> None:
    few = bench("few", shift=1)
    assert few["interval"]["resampled"] is None
    assert "2 units (platform) are too few" in few["interval"]["note"]
    assert few["metrics"]["ilisi"]["low"] is None
    assert set(few["metrics"]["ilisi"]["units"]) == set(BATCHES)
    donors = bench("donors", shift=1, unit="donor")
    entry = donors["metrics"]["ilisi"]
    assert donors["interval"]["resampled"] == "donor"
    assert entry["low"] < entry["value"] < entry["high"]
    batches = bench("batches", batch="donor")
    assert batches["interval"]["resampled"] == "donor"
    assert len(batches["metrics"]["ilisi"]["units"]) == 8
    assert batches["metrics"]["batch_correction"]["low"] is None


def test_bootstrap_draws_whole_units() -> None:
    values, units = np.array([0.0, 0.0, 0.0, 1.0]), np.array(["a", "a", "a", "b"], dtype=object)
    medians = resample_median(values, units, seed=0)
    # 1 only where unit b, which has one cell of four, is drawn twice: a quarter of the resamples
    assert set(medians) == {0.0, 1.0}
    assert medians.mean() == pytest.approx(0.25, abs=0.04)


def test_datasets_can_be_the_batches(bench: Any, build: Any, tmp_path: Path) -> None:
    X, _, label = planted(shift=0)
    half, ids = N // 2, np.array([f"c{i % (N // 2)}" for i in range(N)])  # the same names in both
    X[half:, 7] += 30
    rows = {"drop": slice(0, half), "dronc": slice(half, N)}
    cells = {k: build.cells(k, cell_id=ids[r], celltype=label[r]) for k, r in rows.items()}
    inputs = {k: build.vectors(ids[r], X[r], name=k) for k, r in rows.items()}
    score = bench(cells=cells, inputs=inputs, batch="dataset")
    assert score["dataset"] == "dronc+drop"
    assert score["batches"] == {"dronc": half, "drop": half}
    assert values(score)["ilisi"] < 0.01
    assert score["interval"]["resampled"] is None
    assert values(bench("p", cells=cells, inputs=inputs, batch="dataset", permute=True))["ilisi"] > 0.8
    with pytest.raises(UserError, match="no embedding files given for dataset 'drop'"):
        bench(cells=cells, inputs={"dronc": inputs["dronc"]}, batch="dataset")


@pytest.mark.parametrize("features", ["pca_hvg", "harmony", "combat"])
def test_methods_start_from_counts(bench: Any, build: Any, features: str) -> None:
    rng = np.random.default_rng(0)
    _, batch, label = planted(shift=0)
    rate = np.full((3, 60), 4.0)
    for k in range(3):
        rate[k, 10 * k : 10 * (k + 1)] = 20
    efficiency = np.exp(np.outer([0, 1], rng.normal(0, 0.5, 60)))
    kind, number = np.searchsorted(LABELS, label.astype(str)), np.searchsorted(BATCHES, batch.astype(str))
    X = rng.poisson(rate[kind] * efficiency[number])
    shards = build.counts([f"cell{i}" for i in range(N)], [f"g{i}" for i in range(60)], X, shards=2)
    score = bench(inputs={"a": shards}, features=features, kind="baseline")
    found = values(score)
    assert found["clisi"] > 0.95
    if features == "pca_hvg":
        assert found["ilisi"] < 0.45
    else:
        assert found["ilisi"] > 0.6
        assert any("told their batches" in note for note in score["notes"])


def test_cells_are_drawn_by_name_and_small_batches_left_out(bench: Any, build: Any) -> None:
    X, batch, label = planted(shift=0)
    batch[:4] = "tiny"
    qc = [i != 6 for i in range(N)]
    ids = [f"cell{i}" for i in range(N)]
    cells = build.cells("small", cell_id=ids, platform=batch, celltype=label, qc_pass=qc)
    ask = {"cells": {"a": cells}, "inputs": {"a": build.vectors(ids, X, name="small")}, "label": None}
    score = bench(**ask, max_cells=200)
    excluded = score["split"]["excluded"]
    assert excluded == {"failed QC": 1, "no batch": 0, "not drawn": 39, "in a small batch": 200 - score["n"]}
    assert 1 <= excluded["in a small batch"] <= 4
    assert any("200 of 239 cells" in note for note in score["notes"])
    assert any("left out: tiny" in note for note in score["notes"])


def test_mistakes_are_named(bench: Any, build: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no column 'platfrom'; did you mean 'platform'"):
        bench(batch="platfrom")
    with pytest.raises(UserError, match="has no column 'cell_type'; did you mean 'celltype'"):
        bench(label="cell_type")
    with pytest.raises(UserError, match="unknown features 'harmoni'; did you mean 'harmony'"):
        bench(features="harmoni")
    with pytest.raises(UserError, match=r"two batches of 'dataset'.*only 'a' is left"):
        bench(batch="dataset")
    X, batch, _ = planted(shift=0)
    ids = [f"cell{i}" for i in range(N)]
    same = build.cells("same", cell_id=ids, platform=batch, celltype=["T cell"] * N)
    with pytest.raises(UserError, match=r"two labels of 'celltype'.*only 'T cell' is left"):
        bench(cells={"a": same})
    with pytest.raises(UserError, match="lacks 40 of the 240 cells"):
        bench(inputs={"a": build.vectors(ids[:200], X[:200], name="few")})
    with pytest.raises(UserError, match="no such file"):
        bench(cells={"a": tmp_path / "nothing.parquet"})
    assert not (tmp_path / "score.json").exists()


def test_a_missing_package_is_named(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scib_metrics", None)  # what Python takes for a failed import
    with pytest.raises(UserError, match=r"measuring .*scib_metrics.*pip install 'cellformers\[benchmarks\]'"):
        bench()


def test_scores_stand_in_the_table(bench: Any, tmp_path: Path) -> None:
    bench("good", shift=0, method="good", unit="donor")
    bench("bad", shift=30, method="bad", kind="baseline")
    rows = summarise([tmp_path / "good.json", tmp_path / "bad.json"], tmp_path / "table.tsv")
    first = next(row for row in rows if row["metric"] == "batch_correction")
    assert first["method"] == "good"
    assert first["task"] == "mixing"
    assert float(first["value"]) > 0.8
