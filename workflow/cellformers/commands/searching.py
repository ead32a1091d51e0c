"""The verb search, which has every option of finetune and a few of its own."""

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cellformers.commands import finetuning
from cellformers.commands import options as opt

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
    what = finetuning.job(options)
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
