"""The verb search, which has every option of finetune and a few of its own."""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cellformers.commands import finetuning
from cellformers.commands import options as opt
from cellformers.errors import UserError

Trials = Annotated[int, typer.Option(min=1, help="Trials in all, those made before included.")]
Metric = Annotated[str, typer.Option(help="Of the held-out side: macro_f1, accuracy, or loss.")]
SpaceFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="YAML: what is searched, between which bounds.")
]
Prune = Annotated[bool, typer.Option(help="End trials that are worse than the median.")]

# of an unfinished training; a search keeps its own states and curves
NOT_SHARED = ("tensorboard", "checkpoint_every")


def search(
    output: opt.Output, trials: Trials = 25, metric: Metric = "macro_f1", space: SpaceFile = None,
    prune: Prune = True, quiet: opt.Quiet = False, **options: Any,
) -> None:  # fmt: skip
    """Search hyperparameters: fine-tune many times, keep the best model on the held-out side.

    What is not searched is as for finetune. A search that was interrupted goes on when the same command is given
    again; more --trials prolong it. The folder gets trials.tsv, best.json and the model best/.

    Example: cellformers search tokens/*.parquet --model models/v1-10m --labels cells.parquet --label cell_type
    --unit donor --epochs 1 --trials 25 --metric macro_f1 -o searches/types
    """
    from cellformers.progress import progress, say
    from cellformers.training.search import search as run
    from cellformers.training.space import read_space

    chosen = None if space is None else read_space(space)
    what = job(options)
    line = "\r\033[2K" if sys.stderr.isatty() else ""
    with progress("search", trials, unit="trials", quiet=quiet) as advance:
        best = run(
            **what, output=output, space=chosen, n_trials=trials, metric=metric, seed=what["settings"].seed,
            prune=prune, progress=advance, note=lambda text: say(f"{line}search: {text}", quiet=quiet),
        )  # fmt: skip
    say(
        f"search: best {metric} {best['value']:.4f} in trial {best['trial']}, kept in {output / 'best'}",
        quiet=quiet,
    )


def job(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `training.finetune.finetune` from the options of the verb: all that both verbs have."""
    from cellformers.registry import find_model
    from cellformers.training.finetune_presets import find_preset, resolve
    from cellformers.training.targets import KINDS

    task, label, side = given["task"], given["label"], given["split_column"]
    if task not in KINDS:
        raise UserError(f"no task {task!r}", fix=f"give --task {', '.join(KINDS)}")
    preset = None if given["preset"] is None else find_preset(given["preset"], task=task)
    fields = {name: given[name] for name in finetuning._SETTINGS}
    fields["task_weights"] = tuple(given["task_weight"]) if given["task_weight"] else None
    settings = resolve(preset, fields)
    split = {name: given[name] for name in ("folds", "fold", "heldout", "test")} | {
        "file": given["split_file"]
    }
    is_given = any(value is not None for value in split.values())
    if side is not None and is_given:
        raise UserError("--split-column says all sides", fix="leave out the other options of the split")
    published = preset if side is None else None
    unit = given["unit"]
    if published is not None and unit is None and not is_given:
        unit = published.unit
    if preset is not None and preset.label is not None and not label:
        label = [preset.label]
    targets = finetuning._read_targets(
        task, finetuning._named(given["labels"], "--labels"), label or [], key=given["key"], unit=unit, side=side,
        positive=given["positive"],
    )  # fmt: skip
    seed = settings.seed if given["split_seed"] is None else given["split_seed"]
    adapter = [given[name] for name in ("lora", "quantize", "rank", "alpha", "lora_dropout")]
    return {
        "tokens": finetuning._named(given["tokens"], "tokens"), "model": find_model(given["model"]),
        "targets": targets, "split": finetuning._split_spec(published, unit=unit, seed=seed, **split),
        "settings": settings, "adapter": finetuning._adapter(*adapter),
        **{name: given[name] for name in ("accelerator", "backend", "threads", "batch_tokens")},
    }  # fmt: skip


def _with_options_of_finetune() -> inspect.Signature:
    """What the command line takes: the parameters of finetune, then those of search that finetune lacks."""
    own = [p for p in inspect.signature(search).parameters.values() if p.kind is not p.VAR_KEYWORD]
    shared = inspect.signature(finetuning.finetune).parameters
    kept = [p for name, p in shared.items() if name not in NOT_SHARED]
    added = [p for p in own if p.name not in shared]
    return inspect.Signature([*kept, *added])


search.__signature__ = _with_options_of_finetune()  # type: ignore[attr-defined]
search.__annotations__ = {n: p.annotation for n, p in search.__signature__.parameters.items()}  # type: ignore[attr-defined]

VERBS = {"search": search}
