"""Models fine-tuned on the folds of a benchmark: scored where they fit the split, refused where they don't."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from token_files import make_model, make_vocabulary, write_tokens

from cellformers.errors import UserError
from cellformers.evaluate.cell_splits import make_cell_split
from cellformers.evaluate.cells import evaluate_cells
from cellformers.evaluate.splitfile import read_split
from cellformers.io.files import write_table
from cellformers.training.finetune import Settings, SplitSpec, finetune
from cellformers.training.targets import read_cell_targets

N, DONORS = 80, 4


@dataclass
class Benchmark:
    """Two datasets that share their donors, a split across them, and a model fine-tuned on each of its folds."""

    folder: Path
    cells: dict[str, Path]
    tokens: dict[str, list[Path]]
    split: Path
    models: list[Path]

    def evaluate(self, output: Path, **more: Any) -> dict[str, Any]:
        """The score of the fine-tuned models."""
        ask: dict[str, Any] = {
            "benchmark": "b", "method": "m", "kind": "model", "split": self.split, "cells": self.cells,
            "features": "finetuned", "inputs": {}, "fold_models": self.models,
            "output": output / "score.json", "predictions": output / "score.parquet",
        }  # fmt: skip
        return evaluate_cells(**ask | more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    folder = tmp_path_factory.mktemp("finetuned")
    vocabulary = make_vocabulary(40, special="v2", context_length=32)
    source = make_model(folder / "model", vocabulary, num_hidden_layers=2, max_position_embeddings=32)
    rng = np.random.default_rng(0)
    special = vocabulary.special_tokens
    cells, tokens = {}, {}
    for name in ("drop", "dronc"):
        kind = rng.integers(2, size=N)
        genes = [np.concatenate([5 * k + rng.permutation(5), 10 + rng.permutation(30)[:5]]) for k in kind]
        ids = [
            np.array([special["<cls>"], *vocabulary.token_ids[g], special["<eos>"]], np.int32) for g in genes
        ]
        tokens[name] = [
            write_tokens(folder / f"{name}.tokens.parquet", ids, vocabulary, dataset=f"sha256:{name}")
        ]
        cells[name] = folder / f"{name}.cells.parquet"
        write_table(
            pa.table(
                {
                    "cell_id": [f"cell{i}" for i in range(N)], "type": ["AB"[k] for k in kind],
                    "donor": [f"d{i % DONORS}" for i in range(N)],
                }
            ),
            cells[name],
        )  # fmt: skip
    split = folder / "split.json"
    make_cell_split(
        cells=cells, label="type", unit="donor", train=["drop"], test=["dronc"], across=True, folds=2,
        output=split,
    )  # fmt: skip
    models = [folder / f"fold-{k}" for k in (1, 2)]
    for number, output in enumerate(models, start=1):
        finetune(
            tokens, source, output, targets=read_cell_targets(cells, ["type"], unit="donor"),
            split=SplitSpec(file=split, fold=number, heldout=0), settings=Settings(learning_rate=3e-3, epochs=20),
            threads=1,
        )  # fmt: skip
    return Benchmark(folder, cells, tokens, split, models)


def test_fine_tuning_takes_the_sides_of_a_split_across_datasets(trained: Benchmark) -> None:
    for fold, model in zip(read_split(trained.split, task="cells").folds, trained.models, strict=True):
        sides = json.loads((model / "split.json").read_text())
        assert sides["by"] == "dataset unit"
        assert sides["train"] == fold["train"]
        assert sides["test"] == fold["test"]
        table = pq.read_table(model / "predictions.parquet").to_pandas()
        assert set(table["dataset"]) == {"dronc"}
        donors = {f"dronc:d{int(cell.removeprefix('cell')) % DONORS}" for cell in table["cell_id"]}
        assert donors == set(fold["test"])


def test_folds_are_scored_together(trained: Benchmark, tmp_path: Path) -> None:
    score = trained.evaluate(tmp_path)
    assert score["n"] == N
    assert score["penalties"] is None
    assert score["metrics"]["macro_f1"]["value"] > 0.8
    assert set(score["metrics"]["macro_f1"]["units"]) == {f"d{i}" for i in range(DONORS)}
    theirs = pa.concat_tables([pq.read_table(m / "predictions.parquet") for m in trained.models])
    assert score["metrics"]["accuracy"]["value"] == pytest.approx(
        pc.mean(pc.equal(theirs["label"], theirs["predicted"]).cast(pa.float64())).as_py()
    )
    own = pq.read_table(tmp_path / "score.parquet").to_pandas().set_index("cell_id")
    expected = theirs.to_pandas().set_index("cell_id").loc[own.index]
    assert np.allclose(own["probability:B"], expected["probability_B"])
    assert (own["label"] == expected["label"]).all()
    assert not [note for note in score["notes"] if "fine-tuned with" in note]


def copies(trained: Benchmark, folder: Path) -> list[Path]:
    """The models without their weights."""
    result = []
    for model in trained.models:
        copy = folder / model.name
        copy.mkdir(parents=True)
        for name in ("training.json", "split.json", "predictions.parquet"):
            shutil.copy(model / name, copy / name)
        result.append(copy)
    return result


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_table(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    write_table(change(pq.read_table(path)), path)


def relabelled(table: pa.Table) -> pa.Table:
    labels = ["A" if label == "B" else "B" for label in table["label"].to_pylist()]
    return table.set_column(table.column_names.index("label"), "label", pa.array(labels))


EDITS: Sequence[tuple[str, str, Callable[[Path], None]]] = (
    ("leak", r"trained on dataset unit 'dronc:d\d', which fold .* does not train on", lambda m: edit_json(
        m / "split.json", lambda c: c["train"].append(c["test"][0]))),
    ("leak in the held-out side", "which fold .* does not train on", lambda m: edit_json(
        m / "split.json", lambda c: c["heldout"].append(c["test"][0]))),
    ("stranger", "trained on dataset unit 'elsewhere:d9'", lambda m: edit_json(
        m / "split.json", lambda c: c["train"].append("elsewhere:d9"))),
    ("label", "was not trained on 'type'; did you mean 'typo'", lambda m: edit_json(
        m / "training.json", lambda c: c["labels"][0].update(name="typo"))),
    ("class", "knows a type 'C' that the split lacks", lambda m: edit_json(
        m / "training.json", lambda c: c["labels"][0].update(classes=["A", "C"]))),
    ("task", "holds no model fine-tuned to classify cells", lambda m: edit_json(
        m / "training.json", lambda c: c.update(task="genes"))),
    ("fewer", "did not test 3 of the 40 cells of fold", lambda m: edit_table(
        m / "predictions.parquet", lambda t: t.slice(3))),
    ("more", "tested cell 'dronc:cell.*' twice", lambda m: edit_table(
        m / "predictions.parquet", lambda t: pa.concat_tables([t, t.slice(0, 1)]))),
    ("labels", "has other labels of the cells", lambda m: edit_table(m / "predictions.parquet", relabelled)),
    ("dataset", "does not say which dataset", lambda m: edit_table(
        m / "predictions.parquet", lambda t: t.drop_columns(["dataset"]))),
    ("columns", "has no column 'probability_A'", lambda m: edit_table(
        m / "predictions.parquet", lambda t: t.drop_columns(["probability_A"]))),
)  # fmt: skip


@pytest.mark.parametrize(("match", "edit"), [e[1:] for e in EDITS], ids=[e[0] for e in EDITS])
def test_a_model_of_another_split_is_refused(
    trained: Benchmark, tmp_path: Path, match: str, edit: Callable[[Path], None]
) -> None:
    models = copies(trained, tmp_path)
    edit(models[0])
    with pytest.raises(UserError, match=match) as error:
        trained.evaluate(tmp_path, fold_models=models)
    assert str(models[0]) in str(error.value)
    assert not (tmp_path / "score.json").exists()
    assert not (tmp_path / "score.parquet").exists()


def test_models_in_another_order_or_number_are_refused(trained: Benchmark, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was trained on dataset unit"):
        trained.evaluate(tmp_path, fold_models=trained.models[::-1])
    with pytest.raises(UserError, match="1 fine-tuned models for 2 folds; give --fold-model once a fold"):
        trained.evaluate(tmp_path, fold_models=trained.models[:1])
    with pytest.raises(UserError, match="has learnt the true labels"):
        trained.evaluate(tmp_path, permute=True)


def test_training_on_fewer_cells_is_said(trained: Benchmark, tmp_path: Path) -> None:
    models = copies(trained, tmp_path)
    edit_json(models[1] / "split.json", lambda c: c["n"].update(train=30))
    score = trained.evaluate(tmp_path, fold_models=models)
    name = score["split"]["names"][1]
    assert f"fold {name}: fine-tuned with 30 of its 40 cells" in score["notes"]


def test_fine_tuning_refuses_a_split_that_leaks(trained: Benchmark, tmp_path: Path) -> None:
    """A donor on both sides of a fold, put there by hand, and a donor that goes unseen without its column."""

    def start(targets: Any, content: dict[str, Any]) -> None:
        (tmp_path / "split.json").write_text(json.dumps(content))
        finetune(
            trained.tokens, trained.folder / "model", tmp_path / "out", targets=targets,
            split=SplitSpec(file=tmp_path / "split.json", fold=1, heldout=0), settings=Settings(epochs=1), threads=1,
        )  # fmt: skip

    targets = read_cell_targets(trained.cells, ["type"], unit="donor")
    content = json.loads(trained.split.read_text())
    fold = content["folds"][0]
    both = {**content, "folds": [{**fold, "train": [*fold["train"], fold["test"][0]]}]}
    with pytest.raises(UserError, match=r"dataset unit 'dronc:d\d' is on both sides of fold 1"):
        start(targets, both)
    other = fold["test"][0].replace("dronc", "drop")
    with pytest.raises(
        UserError, match=r"donor 'd\d' is on two sides of the split: (train and test|test and train)"
    ):
        start(targets, {**content, "folds": [{**fold, "train": [*fold["train"], other]}]})
    whole = {**content, "by": "dataset", "folds": [{"name": "x", "train": ["drop"], "test": ["dronc"]}]}
    with pytest.raises(UserError, match="is on two sides of the split"):
        start(targets, whole)
    blind = read_cell_targets(trained.cells, ["type"])
    for edited in (content, whole):
        with pytest.raises(UserError, match="holds out values of 'donor'; name the column with --unit donor"):
            start(blind, edited)
    with pytest.raises(UserError, match=r"split\.json: fold 1 has no list 'train'"):
        start(targets, {**content, "folds": [{**fold, "train": "drop"}]})
    with pytest.raises(UserError, match=r"split\.json: has not one group a gene"):
        start(targets, {**content, "groups": ["a"]})
    assert not (tmp_path / "out").exists()
