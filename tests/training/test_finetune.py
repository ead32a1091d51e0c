"""Fine-tuning: it finds what is planted and nothing else, and the same input gives the same bytes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from planted import DONORS, LENGTH, N_CELLS, Planted
from safetensors import safe_open
from token_files import make_model, make_vocabulary, write_shards, write_tokens

from cellformers.embedding import embed_cells
from cellformers.errors import UserError
from cellformers.io.locks import exclusive
from cellformers.models import checkpoints
from cellformers.models.directory import open_model
from cellformers.training.answers import pool_folds, pooled_auc
from cellformers.training.finetune import Settings, SplitSpec, finetune, make_network
from cellformers.training.fitting import batch_loss, loss_weights
from cellformers.training.problem import Limits, prepare
from cellformers.training.sides import TRAIN
from cellformers.training.state import has_state
from cellformers.training.targets import read_cell_targets, read_gene_targets

LEARN = {"learning_rate": 3e-3, "epochs": 5}
SHORT = {"learning_rate": 3e-3, "epochs": 1}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return Planted(tmp_path_factory.mktemp("planted"))


def types(planted, **options):
    return read_cell_targets(planted.labels, ["type"], **{"unit": "donor", **options})


def run(planted, output, targets, *, tokens=None, split=None, model=None, **options):
    settings = {k: options.pop(k) for k in list(options) if k in Settings.__dataclass_fields__}
    return finetune(
        tokens or [planted.tokens], model or planted.model, output, targets=targets, split=split or SplitSpec(),
        settings=Settings(**settings), threads=1, **options,
    )  # fmt: skip


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def classifier(planted):
    output = planted.folder / "types"
    return output, run(planted, output, types(planted), **LEARN)


# --- cells ------------------------------------------------------------------------------------------------


def test_it_learns_to_tell_cells_of_other_donors_apart(planted, classifier):
    output, result = classifier
    assert result["metrics"]["test"]["macro_f1"] >= 0.9
    assert result["metrics"]["heldout"]["macro_f1"] >= 0.9
    assert result == json.loads((output / "training.json").read_text())
    split = json.loads((output / "split.json").read_text())
    assert sorted(split["train"] + split["heldout"] + split["test"]) == [f"d{i}" for i in range(DONORS)]
    assert set(files(output)) == {
        "config.json", "model.safetensors", "training.json", "loss.tsv", "split.json", "predictions.parquet",
        "vocabulary/tokens.parquet", "vocabulary/aliases.parquet", "vocabulary/vocabulary.json",
    }  # fmt: skip
    assert not (planted.folder / ".training-types").exists()


def test_predictions_are_of_what_was_not_trained_on(planted, classifier):
    output, result = classifier
    table = pq.read_table(output / "predictions.parquet").to_pandas()
    assert list(table) == [
        "cell_id", "side", "label", "predicted", "probability_A", "probability_B", "probability_C"
    ]  # fmt: skip
    split = json.loads((output / "split.json").read_text())
    donor = {f"cell{i}": f"d{i % DONORS}" for i in range(N_CELLS)}
    for side in ("heldout", "test"):
        rows = table[table.side == side]
        assert {donor[cell] for cell in rows.cell_id} == set(split[side])
        assert (rows.label == rows.predicted).mean() == pytest.approx(result["metrics"][side]["accuracy"])
    number = [int(cell.removeprefix("cell")) for cell in table.cell_id]
    assert number == sorted(number)  # in the order of the tokens
    assert (table.label == np.array(list("ABC"))[planted.types[number]]).all()
    assert np.allclose(table.filter(like="probability").sum(axis=1), 1)


def test_the_result_is_a_model_like_any_other(planted, classifier, tmp_path):
    output, _ = classifier
    model = open_model(output)
    assert model.network.config.labels == ("A", "B", "C")
    assert model.vocabulary.digest == planted.vocabulary.digest
    assert embed_cells(planted.tokens, output, tmp_path / "e.parquet", mode="cls").n_cells == N_CELLS
    again = run(planted, tmp_path / "again", types(planted), model=output, **{**SHORT, "learning_rate": 0})
    assert again["n_parameters"] == classifier[1]["n_parameters"]


def test_permuted_labels_stay_at_chance(planted, tmp_path):
    order = np.random.default_rng(1).permutation(N_CELLS)
    labels = planted.write_labels(planted.types[order], "permuted.parquet")
    targets = read_cell_targets(labels, ["type"], unit="donor")
    result = run(planted, tmp_path / "m", targets, **LEARN)
    assert result["metrics"]["test"]["macro_f1"] < 0.6


def test_the_test_side_has_no_part_in_the_weights(planted, tmp_path):
    given = {"train": ["d0", "d1", "d2", "d3"], "heldout": ["d4"], "test": ["d5", "d6", "d7"]}
    (tmp_path / "s.json").write_text(json.dumps(given))
    split = SplitSpec(file=tmp_path / "s.json")
    wrong = planted.types.copy()
    tested = np.arange(N_CELLS) % DONORS >= 5
    wrong[tested] = (wrong[tested] + 1) % 3
    labels = planted.write_labels(wrong, "wrong.parquet")
    settings = {**SHORT, "epochs": 2, "class_weights": "balanced"}
    run(planted, tmp_path / "right", types(planted), split=split, **settings)
    run(
        planted,
        tmp_path / "wrong",
        read_cell_targets(labels, ["type"], unit="donor"),
        split=split,
        **settings,
    )
    right, wrong_files = files(tmp_path / "right"), files(tmp_path / "wrong")
    assert right["model.safetensors"] == wrong_files["model.safetensors"]
    assert right["loss.tsv"] == wrong_files["loss.tsv"]
    assert right["predictions.parquet"] != wrong_files["predictions.parquet"]


def test_the_same_bytes_twice_and_for_any_number_of_shards(planted, tmp_path):
    for name, n in (("a", 1), ("b", 1), ("c", 3)):
        shards = write_shards(tmp_path / name, planted.cells, planted.vocabulary, n)
        run(planted, tmp_path / f"m{name}", types(planted), tokens=shards, **SHORT)
    assert files(tmp_path / "ma") == files(tmp_path / "mb") == files(tmp_path / "mc")
    run(planted, tmp_path / "md", types(planted), seed=1, **SHORT)
    assert files(tmp_path / "ma")["model.safetensors"] != files(tmp_path / "md")["model.safetensors"]


class Stop(BaseException):
    """As an interruption from outside."""


def test_an_interrupted_training_gives_the_same_bytes(planted, tmp_path):
    settings = {**SHORT, "epochs": 3, "evaluate_every": 5, "save_every": 4}
    run(planted, tmp_path / "whole", types(planted), **settings)

    def interrupt_after(steps):
        left = [steps]

        def progress(done):
            left[0] -= done
            if left[0] <= 0:
                raise Stop

        return progress

    for steps in (14, 8):  # the second counts from 12, where the first left a state
        with pytest.raises(Stop):
            run(
                planted,
                tmp_path / "m",
                types(planted),
                progress=interrupt_after(steps + 12 * (steps == 8)),
                **settings,
            )
        assert not (tmp_path / "m").exists()
        assert has_state(tmp_path / ".training-m")
    heard = []
    run(planted, tmp_path / "m", types(planted), note=heard.append, **settings)
    assert "going on behind step 16" in heard or "going on behind step 20" in heard
    assert files(tmp_path / "m") == files(tmp_path / "whole")
    assert not (tmp_path / ".training-m").exists()


def test_one_process_at_a_time(planted, tmp_path):
    with (
        exclusive(tmp_path / ".training-m" / ".lock"),
        pytest.raises(UserError, match="another process is fine-tuning this model"),
    ):
        run(planted, tmp_path / "m", types(planted), **SHORT)
    with pytest.raises(Stop):  # before there is a state, nothing stays behind
        run(planted, tmp_path / "m", types(planted), trial_callback=stop, **SHORT)
    assert not (tmp_path / ".training-m").exists()


def stop(*_):
    raise Stop


def test_a_signal_leaves_a_state_behind(planted, tmp_path):
    run(planted, tmp_path / "whole", types(planted), **SHORT)
    done = []

    def progress(steps):
        done.append(steps)
        if sum(done) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        run(planted, tmp_path / "m", types(planted), progress=progress, **SHORT)
    assert ended.value.code == 128 + signal.SIGTERM
    assert has_state(tmp_path / ".training-m")
    heard = []
    run(planted, tmp_path / "m", types(planted), note=heard.append, **SHORT)
    assert "going on behind step 4" in heard
    assert files(tmp_path / "m") == files(tmp_path / "whole")


@pytest.mark.parametrize(("special", "kind"), [("v1", "cells"), ("v2", "cells"), ("v2", "genes")])
def test_transformers_loads_the_result_and_says_the_same(tmp_path, special, kind):
    transformers = pytest.importorskip("transformers")
    planted = Planted(tmp_path, special=special)
    if kind == "cells":
        run(planted, tmp_path / "m", types(planted), **SHORT)
        theirs = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "m").eval()
    else:
        run(planted, tmp_path / "m", read_gene_targets(planted.gene_labels, "kind"), **SHORT)
        theirs = transformers.BertForTokenClassification.from_pretrained(tmp_path / "m").eval()
    names = ("A", "B", "C") if kind == "cells" else ("down", "up")
    assert theirs.config.id2label == dict(enumerate(names))
    name = "predictions.parquet" if kind == "cells" else "predictions_pooled.parquet"
    table = pq.read_table(tmp_path / "m" / name).to_pandas()
    token_of = dict(zip(planted.vocabulary.gene_ids, planted.vocabulary.token_ids, strict=True))
    for row in table[:: max(1, len(table) // 20)].itertuples():
        cell = planted.cells[int(row.cell_id.removeprefix("cell"))]
        with torch.no_grad():
            p = torch.softmax(theirs(torch.from_numpy(cell.astype(np.int64))[None]).logits[0], dim=-1)
        if kind == "genes":
            p = p[int(np.flatnonzero(cell == token_of[row.gene_id])[0])]
        ours = [getattr(row, f"probability_{c}") for c in names]
        np.testing.assert_allclose(ours, p.numpy(), rtol=0, atol=2e-6)


# --- what is trained ---------------------------------------------------------------------------------------


def targets_of(planted, kind):
    if kind == "genes":
        return read_gene_targets(planted.gene_labels, "kind")
    return read_cell_targets(planted.labels, ["type"] if kind == "cells" else ["type", "sex"], unit="donor")


@pytest.mark.parametrize("kind", ["cells", "genes", "tasks"])
def test_it_begins_with_the_weights_of_the_model(planted, tmp_path, kind):
    source = checkpoints.load(planted.model).state_dict()
    result = run(planted, tmp_path / "m", targets_of(planted, kind), epochs=0)
    assert (result["steps"], result["best"]) == (0, None)
    state = checkpoints.load(tmp_path / "m").state_dict()
    encoder = [name for name in source if not name.startswith("head.")]
    assert all(torch.equal(source[name], state[name]) for name in encoder)
    assert any(name.startswith("head.") for name in state)


def test_frozen_layers_stay_and_embeddings_learn_unless_frozen_too(planted, tmp_path):
    source = checkpoints.load(planted.model).state_dict()
    few = {**SHORT, "epochs": 0.3}
    for embeddings in (False, True):
        run(planted, tmp_path / "m", types(planted), freeze_layers=1, freeze_embeddings=embeddings, **few)
        state = checkpoints.load(tmp_path / "m").state_dict()
        same = {name for name in source if name in state and torch.equal(source[name], state[name])}
        assert {name for name in state if name.startswith("layers.0.")} <= same
        assert not {name for name in state if name.startswith("layers.1.")} & same
        assert (
            ("words.weight" in same) == ("positions.weight" in same) == ("norm.weight" in same) == embeddings
        )
    with pytest.raises(UserError, match="3 layers can't be frozen in a model of 2"):
        run(planted, tmp_path / "m", types(planted), freeze_layers=3)


def make_problem(planted, kind, **limits):
    model = open_model(planted.model)
    problem, report = prepare(
        {"": [planted.tokens]}, targets_of(planted, kind), SplitSpec(), config=model.network.config,
        vocabulary=model.vocabulary, limits=Limits(**limits),
    )  # fmt: skip
    return problem, report, model.network


@pytest.mark.parametrize("kind", ["cells", "genes", "tasks"])
def test_micro_batches_add_up_to_the_whole_batch(planted, kind):
    problem, _, source = make_problem(planted, kind)
    settings = Settings(
        dropout=0.0, class_weights="balanced", task_weights=(3, 1) if kind == "tasks" else None
    )
    network = make_network(source, settings, kind=kind, names=problem.names, classes=problem.classes)
    weights = [torch.from_numpy(w) for w in loss_weights(problem, settings)]
    cells = problem.cells(TRAIN)[:12]

    def loss_of(some, totals):
        batch = problem.batch(some, (TRAIN,))
        shares = [0.75, 0.25] if kind == "tasks" else [1.0]
        return batch_loss(network, batch, weights=weights, shares=shares, totals=totals)

    whole = problem.batch(cells, (TRAIN,))
    totals = [
        float(w[torch.from_numpy(whole.labels[whole.labels[:, i] >= 0, i])].sum())
        for i, w in enumerate(weights)
    ]
    together = loss_of(cells, totals)
    parts = sum(loss_of(part, totals) for part in (cells[:5], cells[5:6], cells[6:]))
    torch.testing.assert_close(parts, together, rtol=1e-5, atol=1e-6)
    if kind == "cells":  # the weighted mean that torch computes
        labels = torch.from_numpy(whole.labels[:, 0])
        network.eval()
        from cellformers.training.classify import head_logits

        (logits,) = head_logits(network, torch.from_numpy(whole.tokens), torch.from_numpy(whole.bounds))
        expected = torch.nn.functional.cross_entropy(logits, labels, weight=weights[0])
        torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)


def test_balanced_classes_weigh_the_same(planted):
    problem, _, _ = make_problem(planted, "cells")
    (weights,) = loss_weights(problem, Settings(class_weights="balanced"))
    (sizes,) = problem.class_sizes(TRAIN)
    assert np.allclose(weights * sizes, sizes.sum() / 3)
    genes, _, _ = make_problem(planted, "genes")
    (sizes,) = genes.class_sizes(TRAIN)
    labels = np.concatenate([genes.batch(genes.cells(TRAIN), (TRAIN,)).labels[:, 0]])
    assert sizes.tolist() == np.bincount(labels).tolist()


# --- when it ends ------------------------------------------------------------------------------------------


def test_it_stops_when_the_held_out_side_gets_no_better(planted, tmp_path):
    options = {"learning_rate": 0.0, "epochs": 50, "patience": 2}
    result = run(planted, tmp_path / "m", types(planted), **options)
    assert result["stopped_early"]
    assert result["epochs"] == 3  # the first is the best, two more are not better
    assert result["best"]["epoch"] == 1
    without = run(
        planted, tmp_path / "m", types(planted), split=SplitSpec(heldout=0), **{**options, "epochs": 2}
    )
    assert (without["epochs"], without["best"], without["kept"]) == (2, None, "last")


@pytest.mark.parametrize("kind", ["cells", "genes", "tasks"])
def test_everything_may_be_trained_on(planted, tmp_path, kind):
    split = SplitSpec(heldout=0, test=0)
    result = run(planted, tmp_path / "m", targets_of(planted, kind), split=split, **{**SHORT, "epochs": 0.3})
    assert result["metrics"] == {}
    assert len(pq.read_table(tmp_path / "m" / "predictions.parquet")) == 0


def test_the_best_weights_are_kept_or_the_last(planted, tmp_path):
    # a rate this high spoils what was learnt
    options = {"learning_rate": 0.02, "schedule": "constant", "epochs": 3, "patience": 0, "evaluate_every": 4}
    best = run(planted, tmp_path / "best", types(planted), **options)
    last = run(planted, tmp_path / "last", types(planted), keep="last", **options)
    rows = [line.split("\t") for line in (tmp_path / "best" / "loss.tsv").read_text().splitlines()[1:]]
    measured = {int(row[0]): float(row[4]) for row in rows if row[4]}
    assert best["best"]["step"] == min(measured, key=measured.get)
    assert best["metrics"]["heldout"]["loss"] == pytest.approx(min(measured.values()), rel=1e-4)
    assert last["metrics"]["heldout"]["loss"] == pytest.approx(measured[max(measured)], rel=1e-4)


def test_epochs_may_be_a_fraction(planted, tmp_path):
    result = run(planted, tmp_path / "m", types(planted), **{**SHORT, "epochs": 0.5})
    assert result["n_cells"] == 150
    assert result["steps"] == 7  # of 13, rounded up
    header, *rows = (tmp_path / "m" / "loss.tsv").read_text().splitlines()
    assert header.split("\t")[:4] == ["step", "epoch", "learning_rate", "train_loss"]
    assert float(rows[-1].split("\t")[1]) == pytest.approx(7 / 13, rel=1e-4)


def test_a_callback_hears_of_each_measurement_and_may_end_it(planted, tmp_path):
    heard = []

    def enough(number, figures):
        heard.append((number, figures["macro_f1"]))
        if number == 2:
            raise Stop

    with pytest.raises(Stop):
        run(planted, tmp_path / "m", types(planted), trial_callback=enough, **LEARN)
    assert [number for number, _ in heard] == [1, 2]
    assert not (tmp_path / "m").exists()


# --- genes and tasks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gene_folds(planted):
    outputs = [planted.folder / f"fold{fold}" for fold in (1, 2, 3)]
    targets = read_gene_targets(planted.gene_labels, "kind", positive="up")
    results = [
        run(planted, output, targets, split=SplitSpec(folds=3, fold=fold), **{**LEARN, "epochs": 2})
        for fold, output in enumerate(outputs, start=1)
    ]
    return outputs, results


def test_it_learns_about_genes_that_it_was_not_told_about(planted, gene_folds):
    outputs, results = gene_folds
    for output, result in zip(outputs, results, strict=True):
        assert result["metrics"]["test"]["per_gene"]["macro_f1"] >= 0.9
        assert result["metrics"]["test"]["pooled"]["auc"] >= 0.9
        assert result["metrics"]["test"]["pooled"]["auc_of"] == "up"
        split = json.loads((output / "split.json").read_text())
        assert not set(split["train"]) & set(split["test"])
        genes = pq.read_table(output / "predictions.parquet").to_pandas()
        assert set(genes.gene_id) == set(split["test"]) | set(split["heldout"])
        counts = np.bincount(np.concatenate(planted.cells), minlength=70)
        token_of = dict(zip(planted.vocabulary.gene_ids, planted.vocabulary.token_ids, strict=True))
        assert all(counts[token_of[g]] == n for g, n in zip(genes.gene_id, genes.n_cells, strict=True))


def test_a_gene_is_the_mean_of_its_log_odds_over_cells(gene_folds):
    output = gene_folds[0][0]
    genes = pq.read_table(output / "predictions.parquet").to_pandas().set_index("gene_id")
    pooled = pq.read_table(output / "predictions_pooled.parquet").to_pandas()
    odds = np.log(pooled.probability_up.astype(float) / pooled.probability_down.astype(float))
    mean = odds.groupby(pooled.gene_id).mean()
    own = np.log(genes.probability_up.astype(float) / genes.probability_down.astype(float))
    np.testing.assert_allclose(own, mean[own.index], rtol=1e-2, atol=1e-3)
    assert (pooled.groupby("gene_id").size()[genes.index] == genes.n_cells).all()


def test_folds_are_pooled(gene_folds):
    outputs, results = gene_folds
    table, figures = pool_folds(outputs)
    assert len(set(table["gene_id"].to_pylist())) == len(table) == 44
    values = [result["metrics"]["test"]["per_gene"]["auc"] for result in results]
    assert figures["per_gene.auc"]["folds"] == values
    assert figures["per_gene.auc"]["mean"] == pytest.approx(np.mean(values))
    assert pooled_auc(table, "up") >= 0.9
    with pytest.raises(UserError, match="tested in another fold"):
        pool_folds([outputs[0], outputs[0]])


@pytest.mark.parametrize("pooling", ["first", "attention"])
def test_several_tasks_share_an_encoder(planted, tmp_path, pooling):
    options = {"task_weights": (2, 6), "pooling": pooling, **LEARN, "epochs": 7}
    result = run(planted, tmp_path / "m", targets_of(planted, "tasks"), **options)
    assert result["task_weights"] == [0.25, 0.75]
    assert result["metrics"]["test"]["type"]["macro_f1"] >= 0.9
    assert result["metrics"]["test"]["sex"]["macro_f1"] >= 0.9
    assert result["metrics"]["test"]["sex"]["n"] < result["metrics"]["test"]["type"]["n"] == 60
    network = checkpoints.load(tmp_path / "m")
    assert network.config.tasks == (("type", ("A", "B", "C")), ("sex", ("f", "m")))
    table = pq.read_table(tmp_path / "m" / "predictions.parquet").to_pandas()
    assert {"type_predicted", "type_probability_C", "sex_label", "sex_probability_m"} <= set(table)
    assert table.sex_label.isna().any()
    with pytest.raises(UserError, match="1 task weights for 2 tasks"):
        run(planted, tmp_path / "m", targets_of(planted, "tasks"), task_weights=(1,))


# --- which cells -----------------------------------------------------------------------------------------------


def test_limits_are_kept_and_reported(planted, tmp_path):
    problem, report, _ = make_problem(planted, "cells", max_cells=100)
    assert report["cells"]["over_limit"] == 140
    assert len(problem.side) == 100
    problem, report, _ = make_problem(planted, "cells", max_cells_per_class=20)
    assert np.bincount(problem.labels[:, 0]).tolist() == [20, 20, 20]
    other, _, _ = make_problem(planted, "cells", max_cells_per_class=20, seed=1)
    assert set(problem.keys) != set(other.keys)
    _, report, _ = make_problem(planted, "genes", max_cells=50)
    assert report["cells"]["used"] == 50
    heard = []
    run(planted, tmp_path / "m", types(planted), max_cells=100, epochs=0, note=heard.append)
    assert "140 cells are left out by the limits" in heard
    assert any(line.endswith("at most 0 steps") for line in heard)


def test_cells_without_genes_or_without_labels_are_left_out_and_counted(planted, tmp_path):
    special = planted.vocabulary.special_tokens
    empty = np.array([special["<cls>"], special["<eos>"]], np.int32)
    cells = [*planted.cells[:60], empty, *planted.cells[61:], planted.cells[0]]
    tokens = write_tokens(tmp_path / "t.parquet", cells, planted.vocabulary)
    result = run(planted, tmp_path / "m", types(planted), tokens=[tokens], epochs=0)
    assert (result["cells"]["without_genes"], result["cells"]["no_label"]) == (1, 1)
    assert result["cells"]["used"] == 239


def test_datasets_are_told_apart_by_name(planted, tmp_path):
    targets = read_cell_targets({"x": planted.labels, "y": planted.labels}, ["type"])
    lists = {"train": [f"x:cell{i}" for i in range(100)], "test": [f"y:cell{i}" for i in range(40)]}
    (tmp_path / "s.json").write_text(json.dumps(lists))
    tokens = {"x": [planted.tokens], "y": [planted.tokens]}
    spec = SplitSpec(file=tmp_path / "s.json")
    result = run(planted, tmp_path / "m", targets, tokens=tokens, split=spec, epochs=0)
    assert result["split"]["n"] == {"train": 100, "heldout": 0, "test": 40}
    table = pq.read_table(tmp_path / "m" / "predictions.parquet").to_pandas()
    assert list(table)[:2] == ["cell_id", "dataset"]
    assert set(table.dataset) == {"y"}
    assert table.cell_id[0] == "cell0"


def test_what_does_not_go_together_is_refused(planted, tmp_path):
    other = make_vocabulary(61, special="v2", context_length=64)
    strange = write_tokens(tmp_path / "strange.parquet", planted.cells, other)
    moved = write_tokens(tmp_path / "moved.parquet", planted.cells, planted.vocabulary, first=1000)
    long = write_tokens(tmp_path / "long.parquet", [np.tile(c, 9) for c in planted.cells], planted.vocabulary)
    headless = write_tokens(tmp_path / "headless.parquet", [c[1:] for c in planted.cells], planted.vocabulary)
    far = {"learning_rate": 1e38, "warmup": 0}
    empty = write_tokens(tmp_path / "empty.parquet", [], planted.vocabulary)
    cells, both = types(planted), targets_of(planted, "tasks")
    for targets, tokens, options, words in (
        (cells, [strange], {}, "wrong vocabulary"),
        (cells, [moved], {}, "none of the 240 labelled cells is in the tokens"),
        (cells, [long], {}, "more than the 64 tokens"),
        (cells, [headless], {}, "does not begin with <cls>"),
        (cells, [planted.tokens] * 2, {}, "cell 'cell0' is in the tokens twice"),
        (cells, {"a:b": [planted.tokens]}, {}, "name of dataset 'a:b' holds ':'"),
        (cells, [empty], {}, "the tokens hold no cell; tokenize"),
        (cells, [planted.tokens], {"warmup": 500}, "warmup of 500 steps is longer than the training"),
        (cells, [planted.tokens], {"min_cells": 1000}, "no class"),
        (cells, [planted.tokens], {"accelerator": "gpu"}, "no accelerator"),
        (cells, [planted.tokens], {"learning_rate": 1e30, "clip": 1e30}, "lower the learning rate"),
        (cells, [planted.tokens], {**far, "epochs": 0.01}, "held-out loss is nan at step 1; lower"),
        (
            cells,
            [planted.tokens],
            {**far, "epochs": 0.01, "split": SplitSpec(heldout=0)},
            "predictions are no lo",
        ),
        (both, [planted.tokens], {"task_weights": (1, float("nan"))}, "2 task weights for 2 tasks: 1, nan"),
    ):
        with pytest.raises(UserError, match=words):
            run(planted, tmp_path / "m", targets, tokens=tokens, **{"epochs": 2, **options})
        assert not (tmp_path / "m").exists()
    with pytest.raises(UserError, match="no such model directory"):
        run(planted, tmp_path / "m", cells, model=tmp_path / "nothing")


def test_no_state_is_saved_of_what_is_not_finite(planted, tmp_path):
    with pytest.raises(UserError, match=r"the loss is nan at step [23]; lower the learning rate"):
        run(planted, tmp_path / "m", types(planted), epochs=1, learning_rate=1e30, warmup=0, save_every=1)
    for path in (tmp_path / ".training-m").rglob("step-*"):
        with safe_open(path, framework="pt") as state:
            assert all(torch.isfinite(state.get_tensor(name)).all() for name in state.keys())  # noqa: SIM118


def test_what_is_no_model_is_not_replaced(planted, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output, words in (
        (tmp_path / "file", "is a file"),
        (planted.folder, "is a folder with other things in it"),
    ):
        before = files(output) if output.is_dir() else output.read_bytes()
        with pytest.raises(UserError, match=words):
            run(planted, output, types(planted), epochs=0)
        assert before == (files(output) if output.is_dir() else output.read_bytes())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"monitor": "f1"}, "no monitor 'f1'"),
        ({"keep": "first"}, "no keep"),
        ({"epochs": -1}, "epochs is -1"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"batch_cells": 0}, "batch_cells is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"clip": 0.0}, "clip is 0"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"pooling": "mean"}, "no pooling"),
    ],
)
def test_settings_that_can_not_be(options, words):
    with pytest.raises(UserError, match=words):
        Settings(**options)


# --- adapters --------------------------------------------------------------------------------------------------


def test_adapters_learn_and_are_merged(planted, tmp_path):
    pytest.importorskip("peft", reason="adapters need peft")
    from cellformers.training.adapters import Adapter

    adapter = Adapter(rank=8, alpha=16, dropout=0.0)
    result = run(
        planted,
        tmp_path / "m",
        types(planted),
        adapter=adapter,
        **{**LEARN, "learning_rate": 1e-2, "epochs": 6},
    )
    assert result["metrics"]["test"]["macro_f1"] >= 0.9
    assert result["n_trained"] < result["n_parameters"]
    source, state = (checkpoints.load(f).state_dict() for f in (planted.model, tmp_path / "m"))
    assert torch.equal(source["words.weight"], state["words.weight"])
    assert not torch.equal(source["layers.0.up.weight"], state["layers.0.up.weight"])
    assert (tmp_path / "m" / "adapter" / "adapter_model.safetensors").is_file()


def test_one_first_gene_is_read_by_models_without_cls(tmp_path):
    planted = Planted(tmp_path / "p", special="v1")
    result = run(planted, tmp_path / "m", types(planted), **LEARN)
    assert result["metrics"]["test"]["macro_f1"] >= 0.9
    assert len(planted.cells[0]) in (LENGTH + 3, LENGTH + 4)


def test_bfloat16_is_a_precision_of_the_forward_pass(planted, tmp_path):
    result = run(planted, tmp_path / "m", types(planted), precision="bfloat16", **LEARN)
    assert result["metrics"]["test"]["macro_f1"] >= 0.9
    assert {t.dtype for t in checkpoints.load(tmp_path / "m").state_dict().values()} == {torch.float32}


def test_the_dropout_that_is_given_is_written_down(planted, tmp_path):
    run(planted, tmp_path / "m", types(planted), dropout=0.3, classifier_dropout=0.2, epochs=0)
    config = checkpoints.read_config(tmp_path / "m")
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.3)
    assert config.head_dropout == 0.2


def test_a_model_of_another_kind_begins_with_its_encoder(tmp_path):
    planted = Planted(tmp_path / "p")
    bare = make_model(
        tmp_path / "bare", planted.vocabulary, num_hidden_layers=2, max_position_embeddings=64, head="none"
    )
    result = run(planted, tmp_path / "m", types(planted), model=Path(bare), epochs=0)
    assert result["task"] == "cells"
