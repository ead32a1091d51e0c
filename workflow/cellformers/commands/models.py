"""Verbs about model folders: import-model, randomize."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.commands import options as opt


def import_model(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and model.safetensors.")],
    output: opt.Output,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Its vocabulary, unless the folder has one.")
    ] = None,
) -> None:
    """Make a model folder of published weights and their vocabulary; everything is checked.

    Example: cellformers import-model Geneformer-V2-104M --vocabulary vocabularies/gc104M -o models/v2-104m
    """
    from cellformers.models.directory import import_model as run

    run(source, vocabulary, output)


def randomize(
    model: Annotated[Path, typer.Argument(help="A model folder.")], output: opt.Output, seed: opt.Seed = 0
) -> None:
    """Make the same network with random weights: the baseline of every model.

    Example: cellformers randomize models/small -o models/small-random
    """
    from cellformers.models.directory import randomize as run

    run(model, output, seed=seed)


VERBS = {"import-model": import_model, "randomize": randomize}
