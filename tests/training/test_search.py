"""A search over fine-tunings: what it is judged by, what it leaves, and that it can be cut off anywhere."""

import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from token_files import make_cells, make_model, make_vocabulary, write_shards
from typer.testing import CliRunner

from cellformers.commands.searching import VERBS
from cellformers.errors import UserError
from cellformers.io.files import read_json
from cellformers.io.locks import exclusive
from cellformers.models.directory import open_model
from cellformers.training import fitting
from cellformers.training import search as searching
from cellformers.training.adapters import Adapter
from cellformers.training.finetune import finetune
from cellformers.training.search import search
from cellformers.training.settings import Settings
from cellformers.training.sides import SplitSpec
from cellformers.training.space import Choice, Range
from cellformers.training.targets import read_cell_targets, read_gene_targets

pytest.importorskip("optuna", reason="a search needs optuna")

N = 60
CLASSES = ("B", "NK", "T")
# a rate of 1e-7 learns nothing in a few steps, one of 0.01 all there is
SPACE = {"learning_rate": Choice((1e-7, 1e-2)), "weight_decay": Range(0.0, 0.3)}
SETTINGS = Settings(epochs=2, batch_cells=12, warmup=0.0, patience=0)
SPLIT = SplitSpec(heldout=0.2, test=0.2, seed=0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Cells whose first gene tells their class, in two shards, and a small model."""
    folder = tmp_path_factory.mktemp("search")
    vocabulary = make_vocabulary()
    classes = np.random.default_rng(1).integers(3, size=N).tolist()
    telling = vocabulary.token_ids[:3]
    cells = [
        np.array([telling[number], *cell[~np.isin(cell, telling)][:11]])
        for cell, number in zip(make_cells(vocabulary, [15] * N), classes, strict=True)
    ]
    shards = write_shards(folder, cells, vocabulary, 2)
    table = pa.table(
        {
            "cell_id": [f"cell{i}" for i in range(N)],
            "type": [CLASSES[number] for number in classes],
            "other": [("x", "y")[number > 0] for number in classes],
        }
    )
    pq.write_table(table, folder / "labels.parquet")
    model = make_model(
        folder / "m", vocabulary, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, hidden_size=16,
        intermediate_size=32, num_hidden_layers=1,
    )  # fmt: skip
    return {"tokens": shards, "model": model, "labels": folder / "labels.parquet", "vocabulary": vocabulary}


def run(world, output, *, labels=("type",), **changes):
    targets = changes.pop("targets", None) or read_cell_targets(world["labels"], labels)
    options = {"split": SPLIT, "settings": SETTINGS, "space": SPACE, "n_trials": 3, "metric": "macro_f1"}
    options["seed"] = 5  # the first trial is the one that learns nothing
    return search(
        world["tokens"], world["model"], output, targets=targets, threads=1, **{**options, **changes}
    )


def without_places(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A search that nothing interrupted, of three trials."""
    folder = tmp_path_factory.mktemp("whole") / "s"
    run(world, folder)
    return folder


def test_the_best_model_and_its_settings_are_kept(whole):
    best = read_json(whole / "best.json")
    trials = read_json(whole / "trials.json")["trials"]
    rates = [trial["params"]["learning_rate"] for trial in trials]
    assert len(rates) == 3
    assert rates[0] == 1e-7
    assert 1e-2 in rates
    assert best["value"] == max(trial["value"] for trial in trials) > 0.9
    assert best["settings"]["learning_rate"] == 1e-2
    assert sorted(p.name for p in whole.iterdir()) == ["best", "best.json", "trials.json", "trials.tsv"]
    assert open_model(whole / "best").network.config.labels == CLASSES


def test_the_best_settings_give_the_best_model_again(world, whole, tmp_path):
    best = read_json(whole / "best.json")
    again = finetune(
        world["tokens"], world["model"], tmp_path / "m", split=SPLIT, threads=1,
        targets=read_cell_targets(world["labels"], ["type"]), settings=Settings(**best["settings"]),
    )  # fmt: skip
    assert again["metrics"]["heldout"]["macro_f1"] == best["value"]
    assert without_places(tmp_path / "m") == without_places(whole / "best")


def test_the_same_search_gives_the_same_files_and_says_what_is_best(world, whole, tmp_path):
    assert run(world, tmp_path / "s") == read_json(whole / "best.json")
    assert without_places(tmp_path / "s") == without_places(whole)


def test_trials_are_judged_by_the_held_out_side_alone(world, tmp_path, monkeypatch):
    """Labels of the test side are turned round between two searches: nothing but the test figures changes."""
    table = pq.read_table(world["labels"])
    sides = pa.array([("train", "train", "train", "heldout", "test")[i % 5] for i in range(N)])
    table = table.append_column("side", sides)
    types = np.array(table["type"].to_pylist(), dtype=object)
    tested = np.array(sides.to_pylist()) == "test"
    found = []
    for name in ("a", "b"):
        if name == "b":
            types[tested] = [{"B": "T", "T": "NK", "NK": "B"}[word] for word in types[tested]]
        column = table.column_names.index("type")
        pq.write_table(table.set_column(column, "type", pa.array(types)), tmp_path / f"{name}.parquet")
        targets = read_cell_targets(tmp_path / f"{name}.parquet", ["type"], side="side")
        run(world, tmp_path / name, targets=targets, n_trials=2)
        found.append(read_json(tmp_path / name / "trials.json")["trials"])
        tests = read_json(tmp_path / name / "best" / "training.json")["metrics"]["test"]
        assert (tests["macro_f1"] > 0.9) == (name == "a")
    assert found[0] == found[1]


def test_a_search_cut_off_goes_on(world, whole, tmp_path, monkeypatch):
    calls = []

    def cut_off(*arguments, **options):
        calls.append(options["settings"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finetune(*arguments, **options)

    monkeypatch.setattr(searching, "finetune", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "cut")
    assert len(read_json(tmp_path / "cut" / "trials.json")["trials"]) == 1
    assert (tmp_path / "cut" / "best").is_dir()
    run(world, tmp_path / "cut")
    assert calls[2] == calls[1]
    assert len(calls) == 4
    assert without_places(tmp_path / "cut") == without_places(whole)


@pytest.mark.parametrize("number", [1, 2])
def test_a_search_cut_off_within_a_training_goes_on_within_it(world, whole, tmp_path, monkeypatch, number):
    monkeypatch.setattr(fitting, "SECONDS_BETWEEN_STATES", 0.0)
    steps = []

    def cut_off(*arguments, trial_callback, progress, **options):
        def call(measured, figures):
            trial_callback(measured, figures)
            if len(steps) > 6 and measured == number and not resumed:
                raise KeyboardInterrupt

        def count(n):
            steps.append(n)
            progress(n)

        return finetune(*arguments, trial_callback=call, progress=count, **options)

    resumed = False
    monkeypatch.setattr(searching, "finetune", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "s")
    assert list(read_json(tmp_path / "s" / "trials.json")["unfinished"]["measured"]) == ["1", "2"][:number]
    resumed = True
    before = len(steps)
    run(world, tmp_path / "s")
    assert steps[before] > 1, "it goes on behind the last state"
    assert without_places(tmp_path / "s") == without_places(whole)


@pytest.mark.parametrize("moment", ["keep", "note"])
def test_a_search_killed_while_it_puts_the_best_in_place_goes_on(
    world, whole, tmp_path, monkeypatch, moment
):  # fmt: skip
    keep = searching._keep
    times = []

    def killed(made, output):
        times.append(0)
        if (output / "best").is_dir():
            (output / "best").replace(output / ".old")
            if moment == "note":
                made.replace(output / "best")
            raise KeyboardInterrupt
        keep(made, output)

    monkeypatch.setattr(searching, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path / "cut")
    monkeypatch.setattr(searching, "_keep", keep)
    run(world, tmp_path / "cut")
    assert len(times) == 2
    assert without_places(tmp_path / "cut") == without_places(whole)


def test_a_prolonged_search_has_the_trials_of_a_long_one(world, whole, tmp_path):
    run(world, tmp_path / "s", n_trials=1)
    run(world, tmp_path / "s", n_trials=3)
    assert without_places(tmp_path / "s") == without_places(whole)


def test_shards_make_no_difference_and_other_inputs_another_search(world, tmp_path):
    run(world, tmp_path / "s", n_trials=1)
    run({**world, "tokens": world["tokens"][::-1]}, tmp_path / "s", n_trials=1)
    for change, named in (
        ({"metric": "loss"}, "minimize, parameters"),
        ({"settings": dataclasses.replace(SETTINGS, clip=0.5)}, "parameters"),
        ({"split": dataclasses.replace(SPLIT, seed=1)}, "parameters"),
        ({"labels": ["other"]}, "inputs, parameters"),
        ({"seed": 6}, "seed"),
    ):
        with pytest.raises(UserError, match=rf"another search \({named} differ\)"):
            run(world, tmp_path / "s", n_trials=1, **change)


def test_a_loss_that_is_not_finite_is_the_trials_own_affair(world, tmp_path):
    space = {"learning_rate": Choice((1e-2, 1e30)), "seed": Range(0, 100, whole=True)}
    notes = []
    best = run(world, tmp_path / "s", space=space, n_trials=4, note=notes.append)
    trials = read_json(tmp_path / "s" / "trials.json")["trials"]
    states = {trial["params"]["learning_rate"]: trial["state"] for trial in trials}
    assert states == {1e-2: "finished", 1e30: "failed"}
    assert best["settings"]["learning_rate"] == 1e-2
    assert any("failed (the loss is" in note for note in notes)


def test_genes_are_judged_by_all_their_cells(world, tmp_path):
    vocabulary = world["vocabulary"]
    table = {"gene_id": vocabulary.gene_ids.tolist(), "class": ["a" if i % 2 else "b" for i in range(60)]}
    pq.write_table(pa.table(table), tmp_path / "genes.parquet")
    targets = read_gene_targets(tmp_path / "genes.parquet", "class")
    best = run(world, tmp_path / "s", targets=targets, n_trials=2, metric="loss")
    measured = read_json(tmp_path / "s" / "best" / "training.json")["metrics"]["heldout"]
    assert best["value"] == measured["pooled"]["loss"]
    trials = read_json(tmp_path / "s" / "trials.json")["trials"]
    assert best["value"] == min(trial["value"] for trial in trials)


def test_task_weights_do_not_weigh_what_trials_are_judged_by(world, tmp_path):
    """Else a search would weigh the easiest task most."""
    space = {"task_weights": Range(0.1, 2.0), "learning_rate": Choice((1e-7, 1e-2))}
    best = run(world, tmp_path / "s", labels=["type", "other"], space=space, n_trials=2, metric="loss")
    assert len(best["settings"]["task_weights"]) == 2
    measured = read_json(tmp_path / "s" / "best" / "training.json")["metrics"]["heldout"]
    assert best["value"] == pytest.approx((measured["type"]["loss"] + measured["other"]["loss"]) / 2)
    assert read_json(tmp_path / "s" / "trials.json")["about"]["prune"] is False


@pytest.mark.parametrize("labels", [["type"], ["type", "other"]])
def test_the_default_space_can_be_searched(world, tmp_path, labels):
    best = run(world, tmp_path / "s", labels=labels, space=None, n_trials=1)
    assert best["settings"]["learning_rate"] != SETTINGS.learning_rate
    assert best["settings"]["epochs"] == SETTINGS.epochs


def test_adapters_can_be_searched_with(world, tmp_path):
    pytest.importorskip("peft", reason="adapters need peft")
    adapter = Adapter(rank=2, alpha=4, dropout=0)
    best = run(world, tmp_path / "s", adapter=adapter)
    assert best["value"] > 0.9
    assert best["parameters"]["adapter"]["rank"] == 2
    assert (tmp_path / "s" / "best" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metric": "auc"}, "no metric 'auc'"),
        ({"n_trials": 0}, "0 trials"),
        ({"split": SplitSpec(heldout=0.0)}, "nothing is held out"),
        ({"space": {"task_weights": Range(0.1, 2.0)}}, "one task"),
        ({"space": {"learning_rate": Range(1.0, 0.1)}}, "goes from 1 to 0.1"),
        ({"space": {"warmup": Range(1000, 2000, whole=True)}}, "longer than the training"),
    ],
)
def test_what_can_not_be_searched_is_refused(world, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run(world, tmp_path / "s", **changes)
    assert not (tmp_path / "s" / "trials.json").exists()


def test_a_folder_in_use_is_refused(world, tmp_path):
    with exclusive(tmp_path / "s" / ".lock"), pytest.raises(UserError, match="another search is at work"):
        run(world, tmp_path / "s")


def test_nothing_written_names_a_place(world, whole, tmp_path):
    for name in ("trials.json", "best.json", "trials.tsv"):
        assert str(whole.parent) not in (whole / name).read_text()
    shutil.copytree(whole, tmp_path / "elsewhere")
    assert run(world, tmp_path / "elsewhere") == read_json(whole / "best.json")


def command(world, *options):
    """The verb, as the command line calls it."""
    app = typer.Typer()
    app.command()(VERBS["search"])
    words = [*world["tokens"], "--model", world["model"], "--labels", world["labels"], *options]
    return CliRunner().invoke(app, list(map(str, words)))


def test_the_verb_takes_the_options_of_finetune_and_its_own(world, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("learning_rate: [1.0e-7, 1.0e-2]\nweight_decay: {low: 0.0, high: 0.3}\n")
    options = [
        "--label",
        "type",
        "--epochs",
        2,
        "--batch-cells",
        12,
        "--heldout",
        0.2,
        "--seed",
        5,
        "--threads",
        1,
    ]
    done = command(world, *options, "--space", space, "--trials", 2, "-o", tmp_path / "s")
    assert done.exit_code == 0, done.output
    best = read_json(tmp_path / "s" / "best.json")
    assert best["parameters"]["settings"]["batch_cells"] == 12
    assert best["parameters"]["split"]["heldout"] == 0.2
    assert read_json(tmp_path / "s" / "trials.json")["about"]["seed"] == 5
    assert f"search: best macro_f1 {best['value']:.4f} in trial {best['trial']}" in done.stderr
    assert "trial 0: finished, macro_f1 " in done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--label", "typ"], "did you mean 'type'"),
        (["--label", "type", "--task", "cell"], "no task 'cell'"),
        (["--label", "type", "--metric", "f1"], "no metric 'f1'"),
        (["--label", "type", "--space", "none.yaml"], "no such file"),
        (["--label", "type", "--split-column", "other", "--test", "0.1"], "leave out the other options"),
        (["--task", "genes", "--label", "x", "--preset", "cardiomyopathy"], "give --task cells"),
    ],
)
def test_a_mistake_on_the_command_line_is_said(world, tmp_path, options, words):
    done = command(world, *options, "-o", tmp_path / "s")
    assert isinstance(done.exception, UserError)
    assert words in str(done.exception)
    assert not list(tmp_path.rglob("*.json"))
