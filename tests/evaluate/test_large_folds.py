"""Benchmarks of many cells: the same classifier in blocks, training cells drawn and said, all test cells predicted."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_cell_task import run, split_of
from token_files import make_vocabulary

from cellformers.errors import UserError
from cellformers.evaluate import large
from cellformers.evaluate.cell_splits import make_cell_split
from cellformers.evaluate.classify import _logistic
from cellformers.evaluate.splitfile import cell_folds, read_split
from cellformers.evaluate.tables import read_cells
from cellformers.io.files import stamp, write_table


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_classifier_is_that_of_fewer_cells(n_classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "BLOCK", 37)
    rng = np.random.default_rng(0)
    y = rng.integers(0, n_classes, 400)
    X = (rng.normal(0, 1, (n_classes, 6))[y] + rng.normal(3, 1.5, (400, 6))).astype(np.float32)
    X[:, 5] = 1.5
    inner = [
        (np.flatnonzero(np.arange(300) % 3 != f), np.flatnonzero(np.arange(300) % 3 == f)) for f in range(3)
    ]
    known = _logistic(
        X[:300].astype(np.float64), y[:300], X[300:].astype(np.float64), inner, n_classes=n_classes
    )
    model = large.fit_logistic(X[:300], y[:300], inner, n_classes=n_classes)
    assert (model.penalty, model.converged) == (known.penalty, known.converged)
    np.testing.assert_allclose(model.probability(X[300:], n_classes), known.probability, atol=2e-5)


def test_a_class_that_training_lacks_has_no_probability() -> None:
    X = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    model = large.fit_logistic(X, np.repeat([0, 2], 30), [], n_classes=4)
    found = model.probability(X, 4)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert not found[:, [1, 3]].any()


def test_drawn_cells_are_of_the_fold_and_the_same_whatever_the_order() -> None:
    names = np.array([f"cell{i}" for i in range(100)], dtype=object)
    folds = [(np.arange(80), np.arange(80, 100)), (np.arange(20, 100), np.arange(20))]
    assert large.drawn(names, folds, seed=0) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large, "FEW_CELLS", 30)
        patch.setattr(large, "TRAIN_CELLS", 30)
        first, second = large.drawn(names, folds, seed=0) or []
        turned, _ = large.drawn(names[::-1], [(99 - train, 99 - test) for train, test in folds], seed=0) or []
        few = [(np.arange(25), np.arange(25, 100))]
        (alone,) = large.drawn(names, few, seed=0) or []
        assert alone.tolist() == list(range(25)), "the cells to test are many"
    assert len(first) == len(second) == 30
    assert set(first) <= set(range(80))
    assert set(second) <= set(range(20, 100))
    assert set(names[first]) == set(names[::-1][turned])


@pytest.mark.parametrize("features", ["embedding", "pca_hvg", "log_counts", "rank_only"])
def test_all_test_cells_are_predicted_whatever_the_shards(
    atlas: Any, build: Any, tmp_path: Path, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "FEW_CELLS", 90)
    monkeypatch.setattr(large, "TRAIN_CELLS", 90)
    data = atlas(n_donors=6)
    split_of(tmp_path, data)
    vocabulary = None
    written = []
    for shards, turn, threads in ((1, 1, 1), (3, -1, 2)):
        if features == "embedding":
            files = build.vectors(data.ids, data.vectors, shards=shards)
        elif features == "rank_only":
            vocabulary, files = tokens_of(data, tmp_path, shards)
        else:
            files = build.counts(data.ids, data.genes, data.counts, shards=shards)
        score = run(tmp_path, cells={"a": data.cells}, features=features, inputs={"a": files[::turn]},
                    threads=threads, vocabulary=vocabulary)  # fmt: skip
        written.append([(tmp_path / f"score.{suffix}").read_bytes() for suffix in ("json", "parquet")])
    assert written[0] == written[1]
    assert score["n"] == len(data.ids)
    assert score["metrics"]["macro_f1"]["value"] > 0.9
    assert any(note.startswith("trained on 90 of the ") for note in score["notes"])


def tokens_of(data: Any, folder: Path, shards: int) -> tuple[Path, list[Path]]:
    """Tokens of the cells, each the genes by count."""
    import pyarrow as pa

    vocabulary = make_vocabulary(special="v2")
    vocabulary.save(folder / "vocabulary")
    genes = vocabulary.token_ids[: data.counts.shape[1]]
    order = np.argsort(-data.counts[:, : len(genes)], axis=1, kind="stable")
    ranked = [genes[row[: (cell > 0).sum()]].tolist() for row, cell in zip(order, data.counts, strict=True)]
    made = stamp("tokenize", 1, parameters={}, inputs={"vocabulary": vocabulary.digest})
    files = []
    for number, rows in enumerate(np.array_split(np.arange(len(data.ids)), shards)):
        files.append(folder / f"tokens-{shards}" / f"{number}.parquet")
        table = pa.table(
            {
                "cell_id": pa.array([data.ids[i] for i in rows]),
                "input_ids": pa.array([ranked[i] for i in rows], pa.list_(pa.int32())),
                "length": pa.array([len(ranked[i]) for i in rows], pa.int32()),
            }
        )
        write_table(table, files[-1], made)
    return folder / "vocabulary", files


def two_datasets(atlas: Any, tmp_path: Path) -> dict[str, Any]:
    """A dataset to train on and one to test on, with a split from the one to the other."""
    data = {"a": atlas(n_donors=3, name="x"), "b": atlas(n_donors=3, name="y", seed=1)}
    cells = {name: each.cells for name, each in data.items()}
    make_cell_split(
        cells=cells, label="celltype", unit="donor", train=["a"], test=["b"], output=tmp_path / "split.json"
    )
    return data


@pytest.mark.parametrize("features", ["pca_hvg", "log_counts"])
def test_a_dataset_that_is_tested_only_decides_on_the_genes_in_common_too(
    atlas: Any, build: Any, tmp_path: Path, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = two_datasets(atlas, tmp_path)
    turned = np.arange(100)[::-1]  # the other dataset lacks 20 genes and has the rest in another order
    named = [data["b"].genes[i] for i in turned]
    inputs = {
        "a": build.counts(data["a"].ids, data["a"].genes, data["a"].counts, name="ca"),
        "b": build.counts(data["b"].ids, named, data["b"].counts[:, turned], name="cb"),
    }
    cells = {name: each.cells for name, each in data.items()}
    ask = {"cells": cells, "features": features, "inputs": inputs}
    known = run(tmp_path, "known", **ask)
    monkeypatch.setattr(large, "FEW_CELLS", 90)
    score = run(tmp_path, **ask)
    assert "100 genes in common" in known["notes"]
    assert "100 genes in common" in score["notes"]
    found, expected = (pq.read_table(tmp_path / f"{name}.parquet").to_pandas() for name in ("score", "known"))
    assert found["cell_id"].equals(expected["cell_id"])
    for label in ("B cell", "NK", "T cell"):
        column = f"probability:{label}"
        np.testing.assert_allclose(found[column], expected[column], atol=2e-3)


def test_vectors_of_another_width_are_refused(
    atlas: Any, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "FEW_CELLS", 90)
    data = two_datasets(atlas, tmp_path)
    cells = {name: each.cells for name, each in data.items()}
    inputs = {
        "a": build.vectors(data["a"].ids, data["a"].vectors, name="va"),
        "b": build.vectors(data["b"].ids, data["b"].vectors[:, :5], name="vb"),
    }
    with pytest.raises(UserError, match="has 5 dimensions, the training cells have 8"):
        run(tmp_path, cells=cells, inputs=inputs)
    with pytest.raises(UserError, match="no embedding files given for dataset 'b'"):
        run(tmp_path, cells=cells, inputs={"a": inputs["a"]})


@pytest.mark.parametrize("features", ["embedding", "log_counts"])
def test_cells_that_are_only_tested_have_to_be_there_once(
    atlas: Any, build: Any, tmp_path: Path, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large, "FEW_CELLS", 20)
    monkeypatch.setattr(large, "TRAIN_CELLS", 20)
    data = atlas(n=90, n_donors=2)
    split_of(tmp_path, data)
    one = {"cells": {"a": data.cells}, "features": features}
    files = (
        build.vectors(data.ids, data.vectors, shards=90)
        if features == "embedding"
        else build.counts(data.ids, data.genes, data.counts, shards=90)
    )
    split = read_split(tmp_path / "split.json", task="cells")
    table, _ = read_cells({"a": data.cells}, label="celltype", unit="donor")
    drawn = large.drawn(table.keys(), cell_folds(split, table, path=tmp_path), seed=0) or []
    alone = next(i for i in range(90) if i not in np.concatenate(drawn))
    without = [file for number, file in enumerate(files) if number != alone]
    with pytest.raises(UserError, match=f"lacks 1 of the 90 cells of the split, e.g. {table.cell_id[alone]}"):
        run(tmp_path, **one, inputs={"a": without})
    with pytest.raises(UserError, match="is there twice"):
        run(tmp_path, **one, inputs={"a": [*files, files[alone]]})
