"""Predictions of fine-tuned models: those of the training's own tables, in order, for models of any origin."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from planted import N_CELLS, Planted
from token_files import make_cells, make_config, make_model, make_vocabulary, write_shards, write_tokens
from typer.testing import CliRunner

from cellformers.commands.finetuning import VERBS
from cellformers.errors import UserError
from cellformers.io.files import read_metadata
from cellformers.models import checkpoints, layouts
from cellformers.training.finetune import Settings, SplitSpec, finetune
from cellformers.training.predict import predict
from cellformers.training.targets import read_cell_targets, read_gene_targets


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def models(planted):
    """A fine-tuned model of each kind, after a few steps."""
    targets = {
        "cells": read_cell_targets(planted.labels, ["type"]),
        "genes": read_gene_targets(planted.gene_labels, "kind"),
        "tasks": read_cell_targets(planted.labels, ["type", "sex"]),
    }
    for kind, labels in targets.items():
        settings = Settings(epochs=0.5, learning_rate=3e-3)
        finetune(
            [planted.tokens], planted.model, planted.folder / kind, targets=labels, split=SplitSpec(),
            settings=settings, threads=1,
        )  # fmt: skip
    return {kind: planted.folder / kind for kind in targets}


def table_of(path):
    return pq.read_table(path).to_pandas()


# --- cells --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cells", "tasks"])
def test_they_are_those_that_fine_tuning_wrote(planted, models, tmp_path, kind):
    done = predict([planted.tokens], models[kind], tmp_path / "p.parquet", threads=2)
    assert (done.n_cells, done.n_without, done.n_rows) == (N_CELLS, 0, N_CELLS)
    ours = table_of(tmp_path / "p.parquet")
    assert ours.cell_id.tolist() == [f"cell{i}" for i in range(N_CELLS)]
    theirs = table_of(models[kind] / "predictions.parquet")
    same = ours.set_index("cell_id").loc[theirs.cell_id].reset_index()
    shared = [name for name in ours if name in theirs]
    assert len(shared) == (5 if kind == "cells" else 8)
    for name in shared:
        if (
            "probability" in name
        ):  # weights that were read lie elsewhere in memory, and products round otherwise
            np.testing.assert_allclose(same[name], theirs[name], rtol=0, atol=1e-6)
        else:
            assert (same[name] == theirs[name]).all(), name


@pytest.mark.parametrize(("kind", "options"), [("cells", {}), ("genes", {}), ("genes", {"per_cell": True})])
def test_the_same_for_any_number_of_shards(planted, models, tmp_path, kind, options):
    found = []
    for n in (1, 3):
        shards = write_shards(tmp_path / str(n), planted.cells, planted.vocabulary, n)
        predict(shards, models[kind], tmp_path / f"{n}.parquet", **options)
        found.append(pq.read_table(tmp_path / f"{n}.parquet"))
    assert found[0].equals(found[1])
    assert read_metadata(tmp_path / "1.parquet") == read_metadata(tmp_path / "3.parquet")
    assert read_metadata(tmp_path / "1.parquet")["inputs"]["dataset"] == "sha256:d"


def test_cells_without_genes_have_no_prediction(planted, models, tmp_path):
    special = planted.vocabulary.special_tokens
    empty = np.array([special["<cls>"], special["<eos>"]], np.int32)
    tokens = write_tokens(tmp_path / "t.parquet", [empty, planted.cells[0], empty], planted.vocabulary)
    done = predict([tokens], models["cells"], tmp_path / "p.parquet")
    assert (done.n_cells, done.n_without) == (3, 2)
    table = pq.read_table(tmp_path / "p.parquet")
    assert [v is None for v in table["predicted"].to_pylist()] == [True, False, True]
    assert [v is None for v in table["probability_A"].to_pylist()] == [True, False, True]
    none = write_tokens(tmp_path / "none.parquet", [], planted.vocabulary)
    assert predict([none], models["cells"], tmp_path / "n.parquet").n_cells == 0
    assert pq.read_table(tmp_path / "n.parquet").column_names == table.column_names


def test_models_that_name_no_classes_and_exact_ties(tmp_path):
    vocabulary = make_vocabulary(context_length=64)
    network = layouts.random_model(
        make_config(vocabulary, head="cell", labels=("LABEL_0", "LABEL_1", "LABEL_2")), seed=0
    )
    with torch.no_grad():  # as of a head that was never trained
        network.head.classifier.weight.zero_()
        network.head.classifier.bias.copy_(torch.tensor([0.0, 1.0, 1.0]))
    checkpoints.save(network, tmp_path / "m")
    vocabulary.save(tmp_path / "m" / "vocabulary")
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [5, 9]), vocabulary)
    predict([tokens], tmp_path / "m", tmp_path / "p.parquet")
    assert table_of(tmp_path / "p.parquet").predicted.tolist() == [
        "LABEL_1",
        "LABEL_1",
    ]  # of equals the first


@pytest.mark.parametrize("head", ["cell", "gene"])
def test_outputs_that_are_no_numbers_predict_nothing(tmp_path, head):
    vocabulary = make_vocabulary(context_length=64)
    network = layouts.random_model(make_config(vocabulary, head=head, labels=("a", "b")), seed=0)
    with torch.no_grad():
        network.head.classifier.weight.fill_(3e38)  # finite, but not what is made of it
    checkpoints.save(network, tmp_path / "m")
    vocabulary.save(tmp_path / "m" / "vocabulary")
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [5, 9]), vocabulary)
    with pytest.raises(UserError, match="its outputs are not finite"):
        predict([tokens], tmp_path / "m", tmp_path / "p.parquet")
    assert not (tmp_path / "p.parquet").exists()


# --- genes --------------------------------------------------------------------------------------------------


def test_genes_over_all_cells(planted, models, tmp_path):
    done = predict([planted.tokens], models["genes"], tmp_path / "p.parquet")
    genes = table_of(tmp_path / "p.parquet")
    assert done.n_rows == len(genes) == 60
    assert list(genes)[:4] == ["gene_id", "symbol", "n_cells", "predicted"]
    assert genes.symbol.tolist() == [f"G{i}" for i in range(60)]
    predict([planted.tokens], models["genes"], tmp_path / "c.parquet", per_cell=True)
    pairs = table_of(tmp_path / "c.parquet")
    n_genes = sum(len(cell) - 2 for cell in planted.cells)
    assert len(pairs) == n_genes == genes.n_cells.sum()
    odds = np.log(pairs.probability_up.astype(float) / pairs.probability_down.astype(float))
    own = np.log(genes.probability_up.astype(float) / genes.probability_down.astype(float))
    np.testing.assert_allclose(own, odds.groupby(pairs.gene_id).mean()[genes.gene_id], rtol=1e-3, atol=1e-4)
    first = planted.cells[0][1:-1]
    of_token = dict(zip(planted.vocabulary.token_ids, planted.vocabulary.gene_ids, strict=True))
    assert pairs.gene_id[: len(first)].tolist() == [of_token[t] for t in first]
    theirs = table_of(models["genes"] / "predictions.parquet").set_index("gene_id")
    np.testing.assert_allclose(
        genes.set_index("gene_id").loc[theirs.index].probability_up, theirs.probability_up, rtol=0, atol=1e-6
    )


def test_only_the_genes_asked_for(planted, models, tmp_path):
    wanted = [planted.vocabulary.gene_ids[20], planted.vocabulary.gene_ids[30].lower(), "unknown"]
    predict([planted.tokens], models["genes"], tmp_path / "p.parquet", genes=wanted)
    assert table_of(tmp_path / "p.parquet").symbol.tolist() == ["G20", "G30"]
    with pytest.raises(UserError, match="none of the 1 genes"):
        predict([planted.tokens], models["genes"], tmp_path / "q.parquet", genes=["unknown"])


# --- what can't be ------------------------------------------------------------------------------------------


def test_models_without_a_classifier_and_tokens_of_others(planted, models, tmp_path):
    with pytest.raises(UserError, match="no classifier; cellformers finetune"):
        predict([planted.tokens], planted.model, tmp_path / "p.parquet")
    with pytest.raises(UserError, match="classifies cells"):
        predict([planted.tokens], models["cells"], tmp_path / "p.parquet", per_cell=True)
    other = make_vocabulary(61, special="v2", context_length=64)
    strange = write_tokens(tmp_path / "t.parquet", planted.cells, other)
    with pytest.raises(UserError, match="wrong vocabulary"):
        predict([strange], models["cells"], tmp_path / "p.parquet")
    long = write_tokens(tmp_path / "l.parquet", [np.tile(planted.cells[0], 9)], planted.vocabulary)
    with pytest.raises(UserError, match="more than the 64 tokens"):
        predict([long], models["cells"], tmp_path / "p.parquet")
    assert not (tmp_path / "p.parquet").exists()


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    app = typer.Typer()
    for name, verb in VERBS.items():
        app.command(name)(verb)

    def invoke(*words):
        ran = CliRunner().invoke(app, [str(word) for word in words])
        if ran.exception is not None and not isinstance(ran.exception, SystemExit):
            raise ran.exception
        assert ran.exit_code == 0, ran.output
        return ran.output

    return invoke


def test_the_verbs_work_together(planted, run, tmp_path):
    shards = tmp_path / "shards"
    write_shards(shards, planted.cells, planted.vocabulary, 3)
    heard = run(
        "finetune", shards, "--model", planted.model, "--labels", planted.labels, "--label", "type", "--unit",
        "donor", "--epochs", 0.5, "--threads", 1, "-o", tmp_path / "m",
    )  # fmt: skip
    assert "150 cells to train on, 30 held out, 60 to test" in heard
    assert "test (60): accuracy" in heard
    run("predict", planted.tokens, "--model", tmp_path / "m", "-o", tmp_path / "p.parquet", "--quiet")
    assert len(table_of(tmp_path / "p.parquet")) == N_CELLS


def test_presets_are_overridden_by_options(planted, run, tmp_path):
    common = (
        "--model",
        planted.model,
        "--labels",
        planted.gene_labels,
        "--label",
        "kind",
        "--task",
        "genes",
        "--threads",
        1,
    )
    words = (
        "--preset",
        "dosage-sensitivity",
        "--freeze-layers",
        1,
        "--warmup",
        2,
        "--max-cells",
        24,
        "--fold",
        2,
    )
    run("finetune", planted.tokens, *common, *words, "--quiet", "-o", tmp_path / "m")
    made = json.loads((tmp_path / "m" / "training.json").read_text())
    used = made["parameters"]
    assert (used["freeze_layers"], used["warmup"], used["learning_rate"], used["epochs"]) == (1, 2, 5e-5, 1)
    assert (made["steps"], made["cells"]["used"]) == (2, 24)
    split = json.loads((tmp_path / "m" / "split.json").read_text())
    assert (split["folds"], split["fold"], split["heldout"]) == (5, 2, [])


def test_several_tasks_and_datasets_by_name(planted, run, tmp_path):
    words = [
        f"--{what}={value}"
        for what in ("labels",)
        for value in (f"a={planted.labels}", f"b={planted.labels}")
    ]
    run(
        "finetune", f"a={planted.tokens}", f"b={planted.tokens}", *words, "--model", planted.model, "--task",
        "tasks", "--label", "type", "--label", "sex", "--epochs", 0, "--quiet", "-o", tmp_path / "m",
    )  # fmt: skip
    made = json.loads((tmp_path / "m" / "training.json").read_text())
    assert made["cells"]["labelled"] == 2 * N_CELLS
    assert [task["name"] for task in made["labels"]] == ["type", "sex"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "cell"], "no task 'cell'"),
        (["--label", "sex"], "2 labels for the task cells"),
        (["--split-column", "x", "--test", "0.2"], "says all sides"),
        (["--preset", "cardiomyopathy"], "no column 'individual'"),
        (["--preset", "nothing"], "no preset 'nothing'"),
        (["--fold", "2"], "a fold of what"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_mistakes_on_the_command_line(planted, run, tmp_path, words, message):
    before = ["finetune", planted.tokens, "--labels", planted.labels, "--label", "type", "-o", tmp_path / "m"]
    with pytest.raises(UserError, match=message):
        run(*before, *([] if "--model" in words else ["--model", planted.model]), *words, "--quiet")


def test_names_of_tokens_and_labels_go_together(planted, run, tmp_path):
    tokens, labels = planted.tokens, planted.labels
    after = ["--model", planted.model, "--label", "type", "-o", tmp_path / "m", "--quiet"]
    for first, second, message in (
        (
            f"a={tokens}",
            labels,
            "has no name, tokens have a; give tokens and labels of a dataset the same name",
        ),
        (tokens, f"a={labels}", "tokens have no name"),
        (f"a={tokens}", f"b={labels}", "--labels b=.*: tokens have a"),
    ):
        with pytest.raises(UserError, match=message):
            run("finetune", first, "--labels", second, *after)


def test_a_model_made_by_hand_is_no_classifier(tmp_path, run):
    vocabulary = make_vocabulary(context_length=64)
    model = make_model(tmp_path / "m", vocabulary, head="none")
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [5]), vocabulary)
    with pytest.raises(UserError, match="no classifier"):
        run("predict", tokens, "--model", model, "-o", tmp_path / "p.parquet", "--quiet")
