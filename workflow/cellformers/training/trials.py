"""Trials of values that Optuna proposes, one after the other, written down so that a search can go on.

    trials = run_trials(objective, {"rate": Range(1e-6, 1e-3, log=True)}, folder, n_trials=25, minimize=True, seed=0,
                        about={})

Proposals are those of the tree-structured Parzen estimator (Bergstra et al. 2011), seeded for every trial from the seed
and the number of trials before it, in a study that is made anew from those trials. So a search that was killed, and
begun again, proposes what it would have proposed, and no trial is made twice. What is known is in trials.json alone:
one file, whole at any time on any file system.
"""

import importlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import DiskFullError, UserError
from cellformers.io.files import read_json, whole, write_json, write_text
from cellformers.training.curves import as_tsv
from cellformers.training.space import Choice, Range, Space, describe

FINISHED, PRUNED, FAILED = "finished", "pruned", "failed"
NOT_PRUNED = 5  # finished trials before one can be ended early
FIRST_PRUNED = 2  # the measurement from which on one can be

Report = Callable[[int, float], None]
"""Takes the number of a measurement, from 1, and the metric then; raises where the trial is to end."""
Objective = Callable[[dict[str, Any], Report], float]
"""Takes the values drawn and gives the metric of the trial."""
Trial = dict[str, Any]
"""What trials.json holds of one: number, state, value, params, measured (metric by measurement), error."""


class TrialError(Exception):
    """What the values drawn have led to, such as a loss that is no longer finite; others may do better."""


def _optuna() -> Any:
    try:
        optuna = importlib.import_module("optuna")
    except ImportError as error:
        raise UserError(f"a search needs the package optuna ({error})", fix="pip install optuna") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _distribution(optuna: Any, dimension: Range | Choice) -> Any:
    kinds = optuna.distributions
    if isinstance(dimension, Choice):
        return kinds.CategoricalDistribution(dimension.values)
    if dimension.whole:
        return kinds.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return kinds.FloatDistribution(float(dimension.low), float(dimension.high), log=dimension.log)


def _propose(optuna: Any, space: Space, before: Sequence[Trial], *, minimize: bool, seed: int) -> Any:
    """A trial with values drawn, in a study of the trials before it and of nothing else."""
    distributions = {name: _distribution(optuna, dimension) for name, dimension in space.items()}
    own_seed = int(np.random.SeedSequence([seed, len(before)]).generate_state(1)[0])
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=own_seed, constant_liar=False),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=NOT_PRUNED, n_warmup_steps=FIRST_PRUNED),
        direction="minimize" if minimize else "maximize",
    )
    states = optuna.trial.TrialState
    for trial in before:
        study.add_trial(
            optuna.trial.create_trial(
                state=states.COMPLETE if trial["state"] == FINISHED else states.PRUNED, value=trial["value"],
                params=trial["params"], distributions=distributions,
                intermediate_values={int(n): value for n, value in trial["measured"].items()},
            )
        )  # fmt: skip
    return study.ask(distributions)


def is_outside(error: UserError) -> bool:
    """Whether an error is of the disk, full or with a file gone: the same trial is made again when that is mended."""
    return isinstance(error, DiskFullError) or (error.path is not None and not Path(error.path).exists())


def run_trials(
    objective: Objective,
    space: Space,
    folder: Path,
    *,
    n_trials: int,
    minimize: bool,
    seed: int,
    about: Mapping[str, Any],
    prune: bool = True,
    done: Callable[[Trial, Trial | None], None] = lambda _trial, _best: None,
) -> list[Trial]:
    """Make trials until there are `n_trials`, those that trials.json has from an earlier run included.

    Parameters
    ----------
    objective
        Makes a trial. A `TrialError`, and once a trial has finished any UserError but those of `is_outside`, is its
        own affair; whatever else it raises ends the search.
    folder
        Of trials.json and trials.tsv, which are rewritten after every trial.
    about
        What the values of trials depend on, as JSON; trials of another search are refused.
    prune
        Whether trials are ended that are worse than the median.
    done
        Called with each new trial, and the best of those before it, before it is written down.

    Raises
    ------
    UserError
        If optuna is missing, the folder holds another search, or no trial could be finished.
    """
    optuna = _optuna()
    about = {**about, "space": describe(space), "minimize": minimize, "prune": prune, "seed": seed}
    about = json.loads(json.dumps(about))  # as it will be read back
    trials, unfinished = _begun(folder, about)
    while len(trials) < n_trials:
        with whole(folder / "trials.json", fix="choose another --output"):  # parameters of another space
            proposed = _propose(optuna, space, trials, minimize=minimize, seed=seed)
        trial: Trial = {
            "number": len(trials), "state": FINISHED, "value": None, "params": proposed.params, "measured": {}
        }  # fmt: skip
        if unfinished.get("params") == trial["params"]:  # the training goes on where it was, behind these
            trial["measured"] = dict(unfinished["measured"])

        def measured(trial: Trial = trial) -> None:
            _write(folder, about, trials, unfinished=trial)

        try:
            _carry_out(objective, proposed, trial, prune=prune, measured=measured)
        except UserError as error:
            if best_trial(trials, minimize=minimize) is None or is_outside(error):
                raise
            trial |= {"state": FAILED, "error": str(error)}
        done(trial, best_trial(trials, minimize=minimize))
        trials.append(trial)
        _write(folder, about, trials)
    if best_trial(trials, minimize=minimize) is None:
        raise UserError(
            f"none of the {len(trials)} trials could be finished ({trials[-1].get('error')})", path=folder,
            fix="search elsewhere, in another folder",
        )  # fmt: skip
    return trials


def _carry_out(
    objective: Objective, proposed: Any, trial: Trial, *, prune: bool, measured: Callable[[], None]
) -> None:
    """Make a trial, of which something may have been measured before; how it went is put down in `trial`."""
    optuna = _optuna()
    known = trial["measured"]

    def check() -> None:
        if prune and proposed.should_prune():
            raise optuna.TrialPruned

    def report(number: int, value: float) -> None:
        if str(number) in known or not math.isfinite(value):
            return
        known[str(number)] = value
        proposed.report(value, number)
        measured()
        check()

    for number, value in known.items():
        proposed.report(value, int(number))
    try:
        check()
        value = objective(dict(trial["params"]), report)
        if not math.isfinite(value):
            raise TrialError(f"it came to {value}")
        trial["value"] = value
    except optuna.TrialPruned:
        trial["state"] = PRUNED
    except TrialError as error:
        trial |= {"state": FAILED, "error": str(error)}


def best_trial(trials: Sequence[Trial], *, minimize: bool) -> Trial | None:
    """The finished trial with the best value, of equal ones the first; None where none has finished."""
    finished = [trial for trial in trials if trial["state"] == FINISHED]
    return (min if minimize else max)(finished, key=lambda trial: trial["value"], default=None)


def _begun(folder: Path, about: Mapping[str, Any]) -> tuple[list[Trial], Trial]:
    """Trials of an earlier run, and what it had measured of the one it did not finish."""
    path = folder / "trials.json"
    if not path.is_file():
        return [], {}
    with whole(path, fix="choose another --output"):
        content = dict(read_json(path))
        known = dict(content["about"])
        trials, unfinished = content["trials"], content.get("unfinished") or {}
        known_ones = [*trials, *([unfinished] if unfinished else [])]
        if not isinstance(trials, list) or not all(map(_is_trial, known_ones)):
            raise ValueError("what is no trial")
    differing = sorted(k for k in {*known, *about} if known.get(k) != about.get(k))
    if differing:
        raise UserError(
            f"belongs to another search ({', '.join(differing)} differ)", path=path,
            fix="ask for the same again, or choose another --output",
        )  # fmt: skip
    return trials, unfinished


def _is_trial(entry: Any) -> bool:
    """Whether an entry of trials.json is of the form that `run_trials` gives it; one that is unfinished as well."""
    known = {"state": str, "params": dict, "measured": dict, "number": int}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), kind) for k, kind in known.items()):
        return False
    values = [entry.get("value"), *entry["measured"].values()]
    return all(number.isdigit() for number in entry["measured"]) and all(
        value is None or (isinstance(value, int | float) and math.isfinite(value)) for value in values
    )


def _write(
    folder: Path, about: Mapping[str, Any], trials: Sequence[Trial], *, unfinished: Trial | None = None
) -> None:
    extra = {} if unfinished is None else {"unfinished": unfinished}
    write_json({"about": about, "trials": list(trials), **extra}, folder / "trials.json")
    rows = [{"number": t["number"], "state": t["state"], "value": t["value"], **t["params"]} for t in trials]
    write_text(as_tsv(rows, list(rows[0]) if rows else ["number", "state", "value"]), folder / "trials.tsv")
