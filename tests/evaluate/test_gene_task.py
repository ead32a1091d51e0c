"""The gene task: folds over genes, AUC with ties, controls at chance, an oracle on top."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cellformers.errors import UserError
from cellformers.evaluate.genes import evaluate_genes
from cellformers.evaluate.splitfile import read_split
from cellformers.evaluate.splits import make_gene_split

N = 160


@pytest.fixture
def task(build: Any, tmp_path: Path) -> Any:
    """160 genes, 60 positive; an embedding that tells them apart, counts that don't."""
    rng = np.random.default_rng(0)
    genes = np.array([f"ENSG{i:011d}" for i in range(N)], dtype=object)
    positive = rng.permutation(N) < 60
    degree = np.where(positive, rng.integers(30, 60, N), rng.integers(1, 25, N))
    lines = [
        f"{g},{'sensitive' if p else 'insensitive'},{d}"
        for g, p, d in zip(genes, positive, degree, strict=True)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["gene_id,label,degree", *lines]) + "\n")
    vectors = rng.normal(size=(N, 20)) + 1.0 * positive[:, None] * (np.arange(20) < 4)
    files = build.vectors(genes, vectors, key="gene_id")
    X = rng.poisson(rng.gamma(2.0, 1.0, N), (90, N))
    counts = build.counts([f"c{i}" for i in range(90)], genes, X)
    make_gene_split(
        labels=tmp_path / "labels.csv", label="label", positive="sensitive", embeddings=files, dataset="d",
        output=tmp_path / "split.json",
    )  # fmt: skip

    def run(name: str = "score", **more: Any) -> dict[str, Any]:
        ask = {
            "benchmark": "dosage", "method": "m", "kind": "model", "split": tmp_path / "split.json",
            "features": "embedding", "inputs": files,
            "output": tmp_path / f"{name}.json", "predictions": tmp_path / f"{name}.parquet",
        }  # fmt: skip
        return evaluate_genes(**(ask | more))

    run.genes, run.positive, run.vectors, run.counts, run.X = genes, positive, vectors, counts, X
    return run


def test_an_informative_embedding_scores_high(task: Any, tmp_path: Path) -> None:
    score = task()
    auc = score["metrics"]["auc"]
    assert auc["value"] > 0.85
    assert auc["low"] < auc["value"] < auc["high"]
    assert auc["value"] == pytest.approx(np.mean(auc["folds"]))
    assert len(auc["folds"]) == 5
    assert abs(score["metrics"]["auc_pooled"]["value"] - auc["value"]) < 0.05
    assert score["n"] == N
    assert score["classes"] == ["insensitive", "sensitive"]
    table = pq.read_table(tmp_path / "score.parquet").to_pandas()
    assert sorted(table["gene_id"]) == sorted(task.genes)
    truth = dict(zip(task.genes, task.positive, strict=True))
    assert all(
        (label == "sensitive") == truth[g] for g, label in zip(table["gene_id"], table["label"], strict=True)
    )


def test_permuted_labels_come_out_at_chance(task: Any) -> None:
    score = task(permute=True, kind="control")
    auc = score["metrics"]["auc"]
    assert auc["low"] < 0.5 + 0.05
    assert 0.35 < auc["value"] < 0.62


def test_an_oracle_column_scores_near_one(task: Any, tmp_path: Path) -> None:
    score = task(features="column", inputs=[tmp_path / "labels.csv"], column="degree", kind="oracle")
    assert score["metrics"]["auc"]["value"] > 0.99
    assert score["metrics"]["auc_raw"]["value"] == 1.0
    rows = [{"gene_id": g, "out_degree": int(p)} for g, p in zip(task.genes, task.positive, strict=True)]
    (tmp_path / "truth.json").write_text(json.dumps({"seed": 1, "factors": rows}))
    score = task(features="column", inputs=[tmp_path / "truth.json"], column="out_degree", kind="oracle")
    assert score["metrics"]["auc"]["value"] == 1.0


@pytest.mark.parametrize("features", ["mean_expression", "detection", "coexpression_pca"])
def test_baselines_without_information_score_like_it(task: Any, features: str) -> None:
    score = task(features=features, inputs=task.counts, kind="baseline")
    assert 0.3 < score["metrics"]["auc"]["value"] < 0.65
    assert ("auc_raw" in score["metrics"]) == (features != "coexpression_pca")


def test_expression_that_informs_is_found(task: Any, build: Any, tmp_path: Path) -> None:
    X = task.X + 8 * task.positive
    counts = build.counts([f"c{i}" for i in range(90)], task.genes, X, name="informed")
    assert task(features="mean_expression", inputs=counts)["metrics"]["auc"]["value"] > 0.95


def test_baselines_use_the_cells_that_passed(task: Any, build: Any) -> None:
    ids = [f"c{i}" for i in range(90)]
    passed = [i >= 30 for i in range(90)]
    cells = build.cells(cell_id=ids, qc_pass=passed)
    junk = task.X.copy()
    junk[:30] *= 50 * (1 + task.positive)
    a = task(features="detection", inputs=task.counts, cells=cells)
    b = task(features="detection", inputs=build.counts(ids, task.genes, junk, name="junk"), cells=cells)
    assert a["metrics"] == b["metrics"]
    assert a["inputs"] == b["inputs"]
    c = task(features="detection", inputs=build.counts(ids[30:], task.genes, task.X[30:], name="kept"))
    assert a["metrics"] == c["metrics"]


def test_shards_do_not_matter(task: Any, build: Any, tmp_path: Path) -> None:
    ids = [f"c{i}" for i in range(90)]
    written = []
    for shards in (1, 3):
        task(
            features="coexpression_pca",
            inputs=build.counts(ids, task.genes, task.X, shards=shards),
            threads=shards,
        )
        written.append([(tmp_path / f"score.{s}").read_bytes() for s in ("json", "parquet")])
    assert written[0] == written[1]


def test_what_does_not_fit_is_refused(task: Any, build: Any, tmp_path: Path) -> None:
    few = build.vectors(task.genes[2:], task.vectors[2:], name="few", key="gene_id")
    with pytest.raises(UserError, match="lacks 2 of the 160 genes"):
        task(inputs=few)
    with pytest.raises(UserError, match="no column 'degre'; did you mean 'degree'"):
        task(features="column", inputs=[tmp_path / "labels.csv"], column="degre")
    with pytest.raises(UserError, match="is not a number for every gene"):
        task(features="column", inputs=[tmp_path / "labels.csv"], column="label")
    with pytest.raises(UserError, match="a split of genes, one of cells"):
        read_split(tmp_path / "split.json", task="cells")


def test_pairs_matched_in_a_feature_need_to_be_grouped(build: Any, tmp_path: Path) -> None:
    """Matched classes differ by nothing, so the feature has to score chance, and does if pairs are not torn apart."""
    rng = np.random.default_rng(0)
    genes = [f"g{i:03d}" for i in range(120)]
    value = np.repeat(rng.normal(size=60), 2) + 1e-3 * rng.normal(size=120)
    rows = [f"{g},{'yes' if i % 2 else 'no'},{i // 2},{value[i]}" for i, g in enumerate(genes)]
    (tmp_path / "labels.csv").write_text("\n".join(["gene_id,label,pair,value", *rows]) + "\n")
    found = {}
    for group in (None, "pair"):
        make_gene_split(
            labels=tmp_path / "labels.csv", label="label", positive="yes", group=group, dataset="d",
            embeddings=build.vectors(genes, np.ones((120, 2)), key="gene_id"), output=tmp_path / "split.json",
        )  # fmt: skip
        found[group] = evaluate_genes(
            benchmark="b", method="value", kind="baseline", split=tmp_path / "split.json", features="column",
            inputs=[tmp_path / "labels.csv"], column="value", output=tmp_path / "o.json",
            predictions=tmp_path / "o.parquet",
        )  # fmt: skip
    assert found[None]["metrics"]["auc"]["value"] < 0.45
    assert abs(found["pair"]["metrics"]["auc"]["value"] - 0.5) < 0.06
    assert found["pair"]["interval"]["resampled"] == "pair"
    assert abs(found["pair"]["metrics"]["auc_raw"]["value"] - 0.5) < 0.06
