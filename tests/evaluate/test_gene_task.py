"""The gene task: folds over genes, AUC with ties, controls at chance, an oracle on top."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import run as cellformers
from token_files import make_vocabulary, write_tokens

from cellformers.errors import UserError
from cellformers.evaluate.classify import predict_folds
from cellformers.evaluate.gene_splits import make_gene_split
from cellformers.evaluate.genes import evaluate_genes
from cellformers.evaluate.splitfile import read_split

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


def test_splits_edited_by_hand_are_refused(task: Any, tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    whole = json.loads(path.read_text())

    def refused(match: str, **edits: Any) -> None:
        path.write_text(json.dumps(whole | edits))
        with pytest.raises(UserError, match=f"split.json: .*{match}"):
            task()
        assert not (tmp_path / "score.json").exists()

    first, *others = whole["folds"]
    other = {"sensitive": "insensitive", "insensitive": "sensitive"}
    gene = first["test"][0]
    refused(
        "its genes or their classes have been changed",
        genes=whole["genes"] | {gene: other[whole["genes"][gene]]},
    )
    refused("its genes or their classes have been changed", classes=["a", "b"])
    refused("'genes' or 'class_sizes' is missing", genes=None)
    refused("has not one group a gene", groups=["a", "b"])
    refused("'notes' is missing", notes=None)
    refused("it has one fold", folds=[first | {"test": list(whole["genes"])}])
    refused(
        "names 'nobody', which is none of its genes",
        folds=[first | {"test": [*first["test"], "nobody"]}, *others],
    )
    refused(
        "is in the test of two folds",
        folds=[first | {"test": [*first["test"], others[0]["test"][0]]}, *others],
    )
    refused("is on both sides of fold", folds=[first | {"train": list(whole["genes"])}, *others])
    refused("is tested in no fold", folds=[first | {"test": first["test"][1:]}, *others])
    alike = [name for name in others[0]["test"] if whole["genes"][name] == "sensitive"]
    refused("lacks a class in train or test", folds=[first | {"train": alike}, *others])


def test_few_genes_get_no_interval(build: Any, tmp_path: Path) -> None:
    """A gene alone in its class and fold is drawn in every resample: its interval would have no width."""
    rng = np.random.default_rng(0)
    genes = [f"g{i:02d}" for i in range(40)]
    lines = [f"{g},{'yes' if i < 8 else 'no'}" for i, g in enumerate(genes)]
    (tmp_path / "labels.csv").write_text("\n".join(["gene_id,label", *lines]) + "\n")
    files = build.vectors(genes, rng.normal(size=(40, 3)), key="gene_id")
    found = {}
    for folds in (5, 2):
        make_gene_split(
            labels=tmp_path / "labels.csv", label="label", positive="yes", embeddings=files, dataset="d", folds=folds,
            output=tmp_path / "split.json",
        )  # fmt: skip
        found[folds] = evaluate_genes(
            benchmark="b", method="m", kind="model", split=tmp_path / "split.json", features="embedding",
            inputs=files, output=tmp_path / "o.json", predictions=tmp_path / "o.parquet",
        )  # fmt: skip
    assert {entry["low"] for entry in found[5]["metrics"].values()} == {None}
    assert found[5]["interval"]["resampled"] is None
    assert found[5]["interval"]["note"].startswith("no interval: needs two genes of each class in every fold")
    assert found[2]["metrics"]["auc"]["low"] < found[2]["metrics"]["auc"]["value"]
    assert found[2]["interval"]["resampled"] == "genes"


def test_a_published_number_that_no_table_shows_is_refused(task: Any) -> None:
    with pytest.raises(UserError, match="no table of genes shows 'auc_token'; did you mean 'auc_tokens'"):
        task(published=[{"metric": "auc_token", "value": 0.9, "source": "a paper"}])


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


@pytest.fixture
def ranked(task: Any, build: Any, tmp_path: Path) -> dict[str, Any]:
    """Cells in which positive genes come first, as tokens and as counts."""
    vocabulary = make_vocabulary(N, context_length=64)
    vocabulary.save(tmp_path / "vocabulary")
    rng = np.random.default_rng(0)
    cells, X = [], np.zeros((50, N), dtype=int)
    for row in X:
        genes = rng.permutation(N)[:60]
        genes = genes[np.argsort(rng.normal(size=60) - 3.0 * task.positive[genes], kind="stable")]
        cells.append(vocabulary.token_ids[genes])
        row[genes] = np.arange(60, 0, -1)
    ids = [f"cell{i}" for i in range(50)]
    return {
        "ranks": {"inputs": [write_tokens(tmp_path / "t.parquet", cells, vocabulary)]},
        "counts": {"inputs": build.counts(ids, task.genes, X, name="ranked")},
        "vocabulary": {"vocabulary": tmp_path / "vocabulary"},
    }


@pytest.mark.parametrize("features", ["ranks", "counts"])
@pytest.mark.parametrize("classifier", ["logistic", "svm", "forest"])
def test_the_published_baselines_find_genes_that_rank_high(
    task: Any, ranked: dict[str, Any], features: str, classifier: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("cellformers.evaluate.classify.TREES", 8)
    ask = {"features": features, "classifier": classifier, "kind": "baseline", **ranked[features]}
    ask |= ranked["vocabulary"]
    score = task(**ask)
    assert score["metrics"]["auc"]["value"] > 0.75
    assert score["classifier"] == classifier
    assert len(score[{"logistic": "penalties", "svm": "C", "forest": "max_depth"}[classifier]]) == 5
    assert any("50 cells, drawn by name" in note for note in score["notes"])
    assert score["parameters"]["max_cells"] == 10_000
    first = [(tmp_path / f"score.{s}").read_bytes() for s in ("json", "parquet")]
    task(**ask, threads=3)
    assert first == [(tmp_path / f"score.{s}").read_bytes() for s in ("json", "parquet")]
    control = task(**ask | {"kind": "control"}, permute=True, name="control")
    assert 0.3 < control["metrics"]["auc"]["value"] < 0.68


@pytest.mark.parametrize("classifier", ["logistic", "svm", "forest"])
def test_few_genes_of_a_class_are_enough_for_every_classifier(classifier: str, monkeypatch: Any) -> None:
    """A class of 5 genes in 5 folds: 4 to train on, of which an inner fold has one or two."""
    monkeypatch.setattr("cellformers.evaluate.classify.TREES", 20)
    y = (np.arange(56) % 11 == 0).astype(np.int64)[:52]
    X = np.random.default_rng(0).normal(size=(52, 6)) + 3.0 * y[:, None]
    assert y.sum() == 5
    fold = np.zeros(52, dtype=int)
    fold[np.flatnonzero(y)] = np.arange(5)
    fold[np.flatnonzero(y == 0)] = np.arange(47) % 5
    folds = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(5)]
    found = predict_folds(
        lambda a, b: (X[a], X[b]), y, folds, names=np.array([f"g{i}" for i in range(52)], dtype=object), units=None,
        n_classes=2, seed=0, classifier=classifier,
    )  # fmt: skip
    for (_, test), result in zip(folds, found, strict=True):
        up = result.probability[:, 1]
        assert up[y[test] == 1].min() > np.median(up[y[test] == 0])
        assert np.allclose(result.probability.sum(axis=1), 1)


def test_classifiers_that_do_not_exist_or_fit_are_refused(task: Any) -> None:
    with pytest.raises(UserError, match="unknown classifier 'forrest'; did you mean 'forest'"):
        task(classifier="forrest")
    y = np.arange(12_000) % 2
    with pytest.raises(UserError, match="12,000 training rows are too many for svm"):
        predict_folds(
            lambda a, b: (a[:, None], b[:, None]), y, [(np.arange(12_000), np.arange(1))], names=y.astype(object),
            units=None, n_classes=2, seed=0, classifier="svm",
        )  # fmt: skip


def test_the_command_line_matches_genes_and_runs_the_published_baselines(
    task: Any, ranked: dict[str, Any], build: Any, tmp_path: Path
) -> None:
    cells = build.cells(cell_id=[f"cell{i}" for i in range(50)])
    vectors = build.vectors(task.genes, task.vectors, key="gene_id")
    passed = build.cells("passed", cell_id=[f"c{i}" for i in range(90)])
    done = cellformers(
        "split", "--task", "genes", "--labels", tmp_path / "labels.csv", "--label", "label", "--positive",
        "sensitive", "--embeddings", vectors[0], "--dataset", "d", "--match", "expression", "--counts",
        task.counts[0], "--cells", f"d={passed}", "--folds", "3", "-o", tmp_path / "matched.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    split = read_split(tmp_path / "matched.json", task="genes")
    assert len(split.folds) == 3
    assert split.content["matched"]["pairs"] == split.content["n"] // 2
    done = cellformers(
        "evaluate", "--task", "genes", "--split", tmp_path / "matched.json", "--method", "svm_ranks", "--kind",
        "baseline", "--features", "ranks", "--classifier", "svm", "--max-cells", "20", "--cells", f"d={cells}",
        "--input", f"d={ranked['ranks']['inputs'][0]}", "--vocabulary", tmp_path / "vocabulary",
        "--predictions", tmp_path / "p.parquet", "-o", tmp_path / "svm.json",
    )  # fmt: skip
    assert done.code == 0, done.err
    score = json.loads((tmp_path / "svm.json").read_text())
    assert len(score["C"]) == 3
    assert score["parameters"]["max_cells"] == 20
    assert any("matched 1:1" in note for note in score["notes"])
    assert score["interval"]["resampled"] == "pair alike in expression"
    done = cellformers(
        "evaluate", "--task", "genes", "--split", tmp_path / "matched.json", "--method", "m", "--features",
        "finetuned", "--fold-model", tmp_path, "--cells", f"d={cells}", "--predictions", tmp_path / "p.parquet",
        "-o", tmp_path / "none.json",
    )  # fmt: skip
    assert done.code == 2
    assert "1 fine-tuned models for 3 folds" in done.err
