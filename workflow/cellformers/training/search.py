"""Hyperparameter search: fine-tune with settings that Optuna proposes, keep the model best on the held-out side.

    search(["tokens/0.parquet"], "models/v1-10m", "searches/types", targets=targets, split=SplitSpec(seed=0),
           settings=Settings(epochs=1), n_trials=25, metric="macro_f1")

The folder holds trials.json, from which a search goes on, trials.tsv, to read, best.json, the settings of the best
trial, and best/, its model. A search may be killed at any time and begun again, or prolonged by asking for more trials.
A trial that after some measurement is worse than the median of those before it is ended. The test side has no part in
any of this.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import digest_arrays, digest_file, read_json, read_metadata, stamp, write_json
from cellformers.io.locks import exclusive
from cellformers.models.checkpoints import read_config
from cellformers.models.directory import model_digest
from cellformers.revisions import REVISIONS
from cellformers.training.adapters import Adapter
from cellformers.training.examples import by_dataset
from cellformers.training.finetune import BATCH_TOKENS, Tokens, finetune
from cellformers.training.settings import Settings
from cellformers.training.sides import SplitSpec
from cellformers.training.space import TASK_WEIGHTS, Space, apply, check_space, default_space, flatten
from cellformers.training.targets import Targets
from cellformers.training.trials import Report, Trial, TrialError, best_trial, is_outside, run_trials

METRICS = ("macro_f1", "accuracy", "loss")


def _held_out(metrics: Mapping[str, Any], metric: str, kind: str) -> float:
    """The metric on the held-out side: of cells, pooled over genes in cells, or the mean over tasks."""
    found = metrics.get("heldout")
    if found is None:
        raise UserError("nothing is held out to compare trials on", fix="hold out a share of the cells")
    if kind == "cells":
        return float(found[metric])
    if kind == "genes":
        return float(found["pooled"][metric])
    return float(np.mean([task[metric] for task in found.values() if task is not None]))


def _identity(
    files: Mapping[str, Sequence[Path]], model: Path, targets: Targets, split: SplitSpec,
    *, settings: Settings, adapter: Adapter | None, metric: str,
) -> dict[str, Any]:  # fmt: skip
    """What the values of trials depend on beside the values drawn; the tokens by what they were made from."""
    columns = [targets.keys, targets.labels.ravel(), targets.units, targets.sides]
    made_from = {
        json.dumps([dataset, read_metadata(path).get("inputs")], sort_keys=True)
        for dataset, paths in files.items()
        for path in paths
    }
    inputs = {
        "tokens": digest_arrays(sorted(made_from)), "model": model_digest(model),
        "targets": digest_arrays(*[column for column in columns if column is not None]),
        **({} if split.file is None else {"split": digest_file(split.file)}),
    }  # fmt: skip
    parameters = {
        "metric": metric, "task": targets.kind, "labels": list(targets.names), "settings": asdict(settings),
        "adapter": None if adapter is None else asdict(adapter), "split": asdict(replace(split, file=None)),
    }  # fmt: skip
    return stamp("search", REVISIONS["finetune"], parameters=parameters, inputs=inputs)


def _check(targets: Targets, split: SplitSpec, *, metric: str, n_trials: int) -> None:
    if metric not in METRICS:
        raise UserError(f"no metric {metric!r}", fix=did_you_mean(metric, METRICS))
    if n_trials < 1:
        raise UserError(f"{n_trials} trials find nothing", fix="ask for 1 at least")
    given = split.file is not None or split.published is not None or targets.sides is not None
    if not given and split.heldout == 0:
        raise UserError("nothing is held out to compare trials on", fix="hold out a share of the cells")


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Hold the folder against other searches, and put in order what a killed one left half done."""

    def busy() -> None:
        raise UserError("another search is at work here", path=output, fix="wait, or choose another --output")

    with exclusive(output / ".lock", waiting=busy):
        best, old = output / "best", output / ".old"
        if old.is_dir() and not best.is_dir():
            old.replace(best)
        for left in (old, output / ".trial"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def _keep(made: Path, output: Path) -> None:
    """Put the model of a trial in the place of the best."""
    best, old = output / "best", output / ".old"
    if best.is_dir():
        best.replace(old)
    made.replace(best)
    shutil.rmtree(old, ignore_errors=True)


def search(
    tokens: Tokens,
    model: str | Path,
    output: str | Path,
    *,
    targets: Targets,
    split: SplitSpec,
    settings: Settings,
    space: Space | None = None,
    n_trials: int = 25,
    metric: str = "macro_f1",
    seed: int = 0,
    prune: bool = True,
    adapter: Adapter | None = None,
    accelerator: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Search, or go on with a search, in the folder `output`; what best.json holds.

    Parameters
    ----------
    tokens, model, targets, split, adapter, accelerator, backend, threads, batch_tokens
        As for `finetune.finetune`; something has to be held out.
    settings
        What is not searched.
    space
        What is (`space.read_space`); None: as in Geneformer's own searches (`space.default_space`).
    n_trials
        Trials in all, those of earlier runs in this folder included.
    metric
        Of the held-out side: macro_f1, accuracy or loss (the least). Of genes it is pooled over genes in cells, of
        several tasks the plain mean, whatever weights they have in training.
    seed
        Of the proposals.
    prune
        Whether trials are ended early; they are not where task weights are searched, as these weigh what is measured
        along the way.
    progress, note
        Called with 1 for every trial; with a line worth saying.

    Raises
    ------
    UserError
        As `finetune.finetune` and `trials.run_trials`; if another process searches in the same folder.
    """
    output, model = Path(output), Path(model)
    _check(targets, split, metric=metric, n_trials=n_trials)
    tell, advance = note or (lambda _: None), progress or (lambda _: None)
    if space is None:
        n_layers = read_config(model).num_hidden_layers
        space = default_space(targets.kind, n_layers=n_layers, adapted=adapter is not None)
    check_space(space)
    about = _identity(
        by_dataset(tokens), model, targets, split, settings=settings, adapter=adapter, metric=metric
    )
    made, work = output / ".trial", output / ".unfinished"

    def objective(drawn: dict[str, Any], report: Report) -> float:
        steps: list[int] = []
        try:
            training = finetune(
                tokens, model, made, targets=targets, split=split,
                settings=apply(settings, drawn, targets.names), adapter=adapter, accelerator=accelerator,
                backend=backend, threads=threads, batch_tokens=batch_tokens, work=work,
                progress=steps.append,
                trial_callback=lambda number, figures: report(number, figures[metric]),
            )  # fmt: skip
        except UserError as error:
            if steps and not is_outside(error):
                raise TrialError(str(error)) from error
            raise
        return _held_out(training["metrics"], metric, targets.kind)

    def done(trial: Trial, before: Trial | None) -> None:
        value = "" if trial["value"] is None else f", {metric} {trial['value']:.4f}"
        why = f" ({trial['error']})" if "error" in trial else ""
        tell(f"trial {trial['number']}: {trial['state']}{value}{why}")
        contenders = [t for t in (before, trial) if t is not None]
        if best_trial(contenders, minimize=minimize) is trial:
            _keep(made, output)
            chosen = asdict(apply(settings, trial["params"], targets.names))
            found = {**about, "metric": metric, "value": trial["value"], "trial": trial["number"]}
            write_json({**found, "settings": chosen}, output / "best.json")
        for folder in (made, work):
            shutil.rmtree(folder, ignore_errors=True)
        advance(1)

    minimize = metric == "loss"
    with _alone(output):
        run_trials(
            objective, flatten(space, targets.names), output, n_trials=n_trials, minimize=minimize, seed=seed,
            about=about, prune=prune and TASK_WEIGHTS not in space, done=done,
        )  # fmt: skip
        best: dict[str, Any] = read_json(output / "best.json")
    return best
