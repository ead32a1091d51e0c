"""Verbs about model folders: import-model, randomize, convert, verify."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.commands import options as opt

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a registered name.")]


def import_model(
    source: Annotated[
        Path, typer.Argument(help="Folder with config.json and model.safetensors or pytorch_model.bin.")
    ],
    output: opt.Output,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Its vocabulary, unless the folder has one.")
    ] = None,
) -> None:
    """Make a model folder of published weights and their vocabulary; everything is checked.

    Example: cellformers import-model Geneformer-V2-104M --vocabulary vocabularies/gc104M -o models/v2-104m
    """
    from cellformers.models.directory import import_model as run
    from cellformers.progress import say

    surplus = run(source, vocabulary, output)
    if surplus:
        say(
            f"import-model: the network knows {surplus:,} tokens more than the vocabulary has: is it the one that the "
            "model was trained with?",
            quiet=False,
        )


def randomize(model: Model, output: opt.Output, seed: opt.Seed = 0) -> None:
    """Make the same network with random weights: the baseline of every model.

    Example: cellformers randomize models/small -o models/small-random
    """
    from cellformers.models.directory import randomize as run
    from cellformers.registry import find_model

    run(find_model(model), output, seed=seed)


def convert(
    model: Model,
    output: opt.Output,
    to: Annotated[
        str, typer.Option("--to", help="hf, as transformers has it, or te, as NVIDIA's BioNeMo exports it.")
    ],
    quiet: opt.Quiet = False,
) -> None:
    """Write a model with its weights in another layout: Hugging Face's or TransformerEngine's.

    Nothing is rounded, and the way there and back gives the same model to the bit. Every other verb reads both.

    Example: cellformers convert models/v2-104m --to te -o models/v2-104m-te
    """
    from cellformers.models.directory import convert as run
    from cellformers.progress import say
    from cellformers.registry import find_model

    before = run(find_model(model), output, layout=to)
    if before == to:
        say(f"convert: the weights had layout {to} already; copied", quiet=quiet)


def verify(
    model: Model,
    output: opt.Output,
    tokens: Annotated[
        Path | None, typer.Option(help="Tokens whose first cells are taken (default: cells of random genes).")
    ] = None,
    cells: Annotated[int, typer.Option(min=1, help="Cells to compare.")] = 8,
    backend: Annotated[
        list[str] | None, typer.Option(help="A backend to compare, again for more (default: all here).")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16 or fp8 (default: the most precise a backend takes)."),
    ] = None,
    seed: opt.Seed = 0,
    threads: opt.Threads = 2,
    accelerator: opt.Accelerator = "cpu",
    quiet: opt.Quiet = False,
) -> None:
    """Compare every layer with what transformers computes; exit status 1 where they differ by too much.

    Needs transformers. The table goes to stdout, the numbers as JSON to the output.

    Example: cellformers verify models/v2-104m -o verify.json
    """
    import torch

    from cellformers.progress import progress
    from cellformers.registry import find_model
    from cellformers.verify import table
    from cellformers.verify import verify as run

    torch.set_num_threads(threads)
    with progress("verify", cells, unit="cells", quiet=quiet) as advance:
        report = run(
            find_model(model), output, tokens=tokens, n_cells=cells, backends=backend or (), dtype=dtype,
            accelerator=accelerator, seed=seed, progress=advance,
        )  # fmt: skip
    print(table(report))
    if not report["passed"]:
        raise typer.Exit(1)


VERBS = {"import-model": import_model, "randomize": randomize, "convert": convert, "verify": verify}
