"""Trials: what is proposed, that a search that was cut off goes on as if it had not been, and what ends a trial."""

import json
import math
import signal
import subprocess
import sys

import pytest

from cellformers.errors import UserError
from cellformers.training.space import Choice, Range
from cellformers.training.trials import FAILED, FINISHED, PRUNED, TrialError, best_trial, run_trials

pytest.importorskip("optuna", reason="a search needs optuna")

SPACE = {
    "learning_rate": Range(1e-6, 1e-1, log=True),
    "weight_decay": Range(0.0, 0.3),
    "freeze_layers": Range(0, 4, whole=True),
    "schedule": Choice(("linear", "cosine")),
}


def valley(drawn, report):
    """Least, 0, at a learning rate of 1e-3."""
    value = abs(math.log10(drawn["learning_rate"]) + 3) + drawn["freeze_layers"]
    for number in (1, 2, 3):
        report(number, value + 3 - number)
    return value


def run(folder, objective=valley, *, n_trials=14, space=SPACE, minimize=True, seed=0, about=None, **options):
    return run_trials(
        objective,
        space,
        folder,
        n_trials=n_trials,
        minimize=minimize,
        seed=seed,
        about=about or {},
        **options,
    )


def test_the_same_seed_makes_the_same_trials(tmp_path):
    runs = [run(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert runs[0] == runs[1]
    assert (tmp_path / "a" / "trials.json").read_bytes() == (tmp_path / "b" / "trials.json").read_bytes()
    assert runs[0][0]["params"] != runs[2][0]["params"]


def test_values_lie_in_the_space_and_differ_between_trials(tmp_path):
    trials = run(tmp_path)
    for trial in trials:
        drawn = trial["params"]
        assert 1e-6 <= drawn["learning_rate"] <= 1e-1
        assert drawn["freeze_layers"] in range(5)
        assert isinstance(drawn["freeze_layers"], int)
        assert drawn["schedule"] in ("linear", "cosine")
    assert len({trial["params"]["learning_rate"] for trial in trials}) == len(trials)
    assert sum(trial["params"]["learning_rate"] < 3e-4 for trial in trials[:10]) in range(2, 9)  # log: half


def test_proposals_learn_from_the_trials_before(tmp_path):
    """Behind ten random trials they come closer to the least value than random ones do."""
    trials = run(tmp_path, n_trials=40, prune=False)
    values = [trial["value"] for trial in trials]
    assert sum(values[25:]) / 15 < 0.6 * sum(values[:10]) / 10


@pytest.mark.parametrize("cut", [3, 12])
def test_a_search_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path, cut):
    whole = run(tmp_path / "whole")
    made = []

    def cut_off(drawn, report):
        made.append(drawn)
        if len(made) == cut:
            report(1, valley(drawn, lambda *_: None) + 2)
            raise KeyboardInterrupt
        return valley(drawn, report)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", cut_off)
    again = []
    trials = run(tmp_path / "cut", lambda drawn, report: (again.append(drawn), valley(drawn, report))[1])
    assert trials == whole
    assert len(again) == len(whole) - cut + 1
    assert (tmp_path / "cut" / "trials.json").read_bytes() == (
        tmp_path / "whole" / "trials.json"
    ).read_bytes()


def test_a_killed_search_goes_on(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from test_trials import run, valley
made = []
def killed(drawn, report):
    made.append(drawn)
    if len(made) == 4:
        report(1, 1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    return valley(drawn, report)
run(Path(sys.argv[1]), killed, n_trials=6)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=__file__.rpartition("/")[0], capture_output=True
    )
    assert done.returncode == -signal.SIGKILL
    content = json.loads((tmp_path / "trials.json").read_text())
    assert len(content["trials"]) == 3
    assert content["unfinished"]["measured"] == {"1": 1.0}
    again = []
    run(tmp_path, lambda drawn, report: (again.append(drawn), 1.0)[1], n_trials=6)
    assert again[0] == content["unfinished"]["params"]
    assert len(again) == 3


def test_a_finished_search_makes_no_trial_and_can_be_prolonged(tmp_path):
    first = run(tmp_path, n_trials=5)

    def never(drawn, report):
        raise AssertionError

    assert run(tmp_path, never, n_trials=5) == first
    assert run(tmp_path, n_trials=8)[:5] == first
    assert run(tmp_path, n_trials=8) == run(tmp_path / "at once", n_trials=8)


def test_a_trial_worse_than_the_median_is_ended_but_not_at_its_first_measurement(tmp_path):
    seen = []

    def worse_and_worse(drawn, report):
        seen.append(0)
        for number in (1, 2, 3):
            report(number, float(len(seen)))
            seen[-1] = number
        return float(len(seen))

    trials = run(tmp_path, worse_and_worse, n_trials=8)
    assert [trial["state"] for trial in trials] == [FINISHED] * 5 + [PRUNED] * 3
    assert seen == [3] * 5 + [1] * 3  # the second measurement was made, and ended them
    assert trials[-1]["value"] is None
    seen.clear()
    assert {t["state"] for t in run(tmp_path / "b", worse_and_worse, n_trials=8, prune=False)} == {FINISHED}


def test_a_trial_cut_off_between_measurement_and_end_is_ended(tmp_path):
    def ended(drawn, report):
        report(1, 9.0)
        report(2, 9.0)
        return 9.0

    run(tmp_path, n_trials=5)
    content = json.loads((tmp_path / "trials.json").read_text())
    sixth = run(tmp_path, ended, n_trials=6)[5]
    assert sixth["state"] == PRUNED
    content["unfinished"] = sixth | {"state": FINISHED}
    (tmp_path / "trials.json").write_text(json.dumps(content))
    assert run(tmp_path, lambda *_: pytest.fail("it was to end"), n_trials=6)[5] == sixth


@pytest.mark.parametrize("trouble", ["nan", "trial", "user"])
def test_a_trial_that_fails_is_put_down_and_the_search_goes_on(tmp_path, trouble):
    made = []

    def fails_once(drawn, report):
        made.append(drawn)
        if len(made) == 2:
            if trouble == "nan":
                return math.nan
            raise {"trial": TrialError, "user": UserError}[trouble]("the loss is nan")
        return valley(drawn, report)

    trials = run(tmp_path, fails_once, n_trials=4)
    assert [trial["state"] for trial in trials] == [FINISHED, FAILED, FINISHED, FINISHED]
    assert "nan" in trials[1]["error"]
    assert run(tmp_path, n_trials=4) == trials


def test_what_is_wrong_from_the_beginning_ends_the_search(tmp_path):
    def impossible(drawn, report):
        raise UserError("no such file", path="tokens.parquet")

    with pytest.raises(UserError, match=r"tokens\.parquet: no such file"):
        run(tmp_path, impossible)
    assert not (tmp_path / "trials.json").exists()


def test_a_search_without_a_finished_trial_says_why(tmp_path):
    def diverges(drawn, report):
        raise TrialError("the loss is nan at step 3")

    with pytest.raises(UserError, match=r"none of the 3 trials .*loss is nan at step 3"):
        run(tmp_path, diverges, n_trials=3)


def test_a_folder_of_another_search_is_refused(tmp_path):
    run(tmp_path, n_trials=2, about={"inputs": {"model": "a"}})
    with pytest.raises(UserError, match=r"another search \(inputs differ\)"):
        run(tmp_path, n_trials=2, about={"inputs": {"model": "b"}})
    with pytest.raises(UserError, match="inputs, seed, space differ"):
        run(tmp_path, n_trials=2, seed=5, space={"epochs": Range(1, 2)})


def test_the_table_has_a_row_for_each_trial(tmp_path):
    trials = run(tmp_path, n_trials=3)
    lines = [line.split("\t") for line in (tmp_path / "trials.tsv").read_text().splitlines()]
    assert lines[0] == ["number", "state", "value", *SPACE]
    assert [line[0] for line in lines[1:]] == ["0", "1", "2"]
    assert [float(line[2]) for line in lines[1:]] == pytest.approx([t["value"] for t in trials], rel=1e-5)


def test_of_equal_trials_the_first_is_best():
    trials = [{"number": n, "state": s, "value": v} for n, (s, v) in enumerate(
        [(PRUNED, None), (FINISHED, 0.5), (FINISHED, 0.7), (FAILED, None), (FINISHED, 0.7), (FINISHED, 0.5)]
    )]  # fmt: skip
    assert best_trial(trials, minimize=False)["number"] == 2
    assert best_trial(trials, minimize=True)["number"] == 1
    assert best_trial(trials[:1], minimize=True) is None


def test_without_optuna_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs the package optuna .*; pip install optuna"):
        run(tmp_path)
