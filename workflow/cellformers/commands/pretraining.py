"""The verb pretrain."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cellformers.commands import options as opt

Shards = Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Files of earlier steps, in order.")]


def _number(help_: str, *, minimum: float | None = None) -> Any:
    return typer.Option(help=help_, min=minimum)


def pretrain(
    tokens: Shards,
    output: opt.Output,
    vocabulary: Annotated[
        Path | None, typer.Option(help="The vocabulary of the tokens; may be left out with --from.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="Settings to begin with: small, geneformer-v1-10m, gf-12L-30M, gf-12L-95M, geneformer-v2-104m, "
            "geneformer-v2-104m-clcancer, geneformer-v2-316m. Every option below that is given overrides it."
        ),
    ] = "small",
    start: Annotated[
        str | None, typer.Option("--from", help="Continue from this model: a folder, or a registered name.")
    ] = None,
    layers: Annotated[int | None, _number("Encoder layers.", minimum=1)] = None,
    hidden_size: Annotated[int | None, _number("Width.", minimum=8)] = None,
    heads: Annotated[int | None, _number("Attention heads.", minimum=1)] = None,
    intermediate_size: Annotated[int | None, _number("Width of the feed-forward layer.", minimum=8)] = None,
    max_positions: Annotated[
        int | None, _number("Longest cell (default: the vocabulary's context).", minimum=2)
    ] = None,
    dropout: Annotated[float | None, _number("Of hidden states and attention.", minimum=0)] = None,
    initializer_range: Annotated[float | None, _number("SD of the initial weights.")] = None,
    steps: Annotated[int | None, _number("Optimiser steps.", minimum=0)] = None,
    epochs: Annotated[
        float | None, _number("Passes over the cells instead of steps; may be a fraction.", minimum=0)
    ] = None,
    batch_tokens: Annotated[int | None, _number("Most tokens of a micro-batch.", minimum=64)] = None,
    batch_cells: Annotated[
        int | None, _number("Cells of a step over all processes, cut into micro-batches.", minimum=1)
    ] = None,
    accumulate: Annotated[
        int | None,
        _number("Micro-batches of a step over all processes, where cells are not given.", minimum=1),
    ] = None,
    learning_rate: Annotated[float | None, _number("Peak learning rate.")] = None,
    warmup: Annotated[
        float | None, _number("Share of the steps (under 1) or number of steps of warm-up.", minimum=0)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="How the rate falls: cosine, linear, polynomial, constant.")
    ] = None,
    weight_decay: Annotated[float | None, _number("AdamW's decay of matrices.", minimum=0)] = None,
    beta1: Annotated[float | None, _number("AdamW's first beta.")] = None,
    beta2: Annotated[float | None, _number("AdamW's second beta.")] = None,
    eps: Annotated[float | None, _number("AdamW's epsilon.")] = None,
    clip: Annotated[float | None, _number("Largest norm of the gradient.")] = None,
    mask_probability: Annotated[float | None, _number("Share of the genes to guess.")] = None,
    heldout_fraction: Annotated[float | None, _number("Share of cells not trained on.")] = None,
    measurements: Annotated[int | None, _number("Times the held-out loss is measured.", minimum=1)] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, or bfloat16 for matrix products (fp32 weights).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of weights, order, masks and dropout.")
    ] = None,
    checkpoint_every: Annotated[
        str, typer.Option(help="How often the state is saved: steps (500) or minutes (15min).")
    ] = "15min",
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for a TensorBoard event log.")] = None,
    threads: opt.Threads = 2,
    accelerator: opt.Accelerator = "cpu",
    backend: Annotated[
        str, typer.Option(help="Kernels of the layers: auto, te, varlen or sdpa (see doctor).")
    ] = "auto",
    quiet: opt.Quiet = False,
) -> None:
    """Train a model on masked genes, from scratch or from another model.

    An interrupted training goes on where it was when the same command is given again. For several GPUs:
    torchrun --nproc-per-node 4 -m cellformers.cli pretrain ... --accelerator cuda.

    Example: cellformers pretrain tokens/*.parquet --vocabulary vocabularies/mine --steps 2000 -o models/small
    """
    settings = {name: value for name, value in locals().items() if name in _SETTINGS}
    from cellformers.progress import progress, say
    from cellformers.registry import find_model
    from cellformers.training.distributed import rank
    from cellformers.training.presets import PRESETS
    from cellformers.training.pretrain import pretrain as run

    quiet = quiet or rank() > 0
    total = steps
    if steps is None and epochs is None and preset in PRESETS:
        total = PRESETS[preset].settings.get("steps")
    line = "\r\033[2K" if sys.stderr.isatty() else ""
    with progress("pretrain", total, unit="steps", quiet=quiet) as advance:
        done = run(
            tokens, vocabulary, output, preset=preset, start=None if start is None else find_model(start),
            checkpoint_every=checkpoint_every, tensorboard=tensorboard, threads=threads,
            accelerator=accelerator, backend=backend, progress=advance,
            note=lambda text: say(f"{line}pretrain: {text}", quiet=quiet), **settings,
        )  # fmt: skip
    say(
        f"pretrain: held-out loss {done['heldout_loss']:.3f} nats, unigram {done['unigram_entropy']:.3f}",
        quiet=quiet,
    )


# options that are settings of training, by their names
_SETTINGS = frozenset(
    ("layers", "hidden_size", "heads", "intermediate_size", "max_positions", "dropout", "initializer_range",
     "steps", "epochs", "batch_tokens", "batch_cells", "accumulate", "learning_rate", "warmup", "schedule",
     "weight_decay", "beta1", "beta2", "eps", "clip", "mask_probability", "heldout_fraction", "measurements",
     "precision", "seed")
)  # fmt: skip

VERBS = {"pretrain": pretrain}
