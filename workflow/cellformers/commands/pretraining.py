"""The verb pretrain."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.commands import options as opt

Shards = Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Files of earlier steps, in order.")]


def pretrain(
    tokens: Shards,
    vocabulary: Annotated[Path, typer.Option(help="The vocabulary of the tokens.")],
    output: opt.Output,
    layers: Annotated[int, typer.Option(min=1)] = 2,
    hidden_size: Annotated[int, typer.Option(min=8)] = 128,
    heads: Annotated[int, typer.Option(min=1)] = 4,
    intermediate_size: Annotated[int, typer.Option(min=8)] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 2000,
    batch_tokens: Annotated[int, typer.Option(min=64, help="Tokens of a batch.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: opt.Seed = 0,
    threads: opt.Threads = 2,
    accelerator: opt.Accelerator = "cpu",
    quiet: opt.Quiet = False,
) -> None:
    """Train a model on masked genes, from scratch.

    Example: cellformers pretrain tokens/*.parquet --vocabulary vocabularies/mine --steps 2000 -o models/small
    """
    from cellformers.progress import progress, say
    from cellformers.training.pretrain import pretrain as run

    with progress("pretrain", steps, unit="steps", quiet=quiet) as advance:
        done = run(
            tokens, vocabulary, output, layers=layers, hidden_size=hidden_size, heads=heads,
            intermediate_size=intermediate_size, steps=steps, batch_tokens=batch_tokens,
            learning_rate=learning_rate, seed=seed, threads=threads, accelerator=accelerator,
            progress=advance,
        )  # fmt: skip
    say(
        f"pretrain: held-out loss {done['heldout_loss']:.3f} nats, unigram {done['unigram_entropy']:.3f}",
        quiet=quiet,
    )


VERBS = {"pretrain": pretrain}
