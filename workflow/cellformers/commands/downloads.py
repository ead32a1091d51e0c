"""The verb that fetches published models: download."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError

if TYPE_CHECKING:
    from cellformers.registry import PublishedModel


def download(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A registered model or vocabulary.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also put it here (weights as a link if possible).")
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit, other than the registered one.")
    ] = None,
    list_models: Annotated[bool, typer.Option("--list", help="Show what is registered, and stop.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare digests of what is there.")] = False,
    relock: Annotated[
        bool,
        typer.Option("--relock", help="Accept files that changed on the Hub and have no registered digest."),
    ] = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fetch a published model with its vocabulary, verified; an interrupted download goes on.

    It goes to CELLFORMERS_HOME (default: ~/.cache/cellformers), where other verbs find it by its name. HF_ENDPOINT
    names another Hub, HF_TOKEN is a token for it.

    Example: cellformers download geneformer-v2-104m
    """
    from cellformers.registry import download as run

    if list_models:
        print(listing())
        return
    if name is None:
        raise UserError("no model is named", fix="cellformers download --list shows those there are")
    folder = run(name, output, revision=revision, verify=verify, relock=relock, quiet=quiet)
    print(folder)


def listing() -> str:
    """The registered models as a table: parameters, context, size, vocabulary, licence, where it is."""
    from cellformers.registry import home, read_registry

    registry = read_registry()
    head = ("model", "parameters", "context", "weights", "vocabulary", "licence", "here")
    rows = [head, *(_row(model, home()) for model in registry.models.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    vocabularies = ", ".join(registry.vocabularies)
    return "\n".join([*lines, "", f"vocabularies: {vocabularies}", f"cache: {home()}"])


def _row(model: "PublishedModel", cache: Path) -> tuple[str, ...]:
    size = model.weights.size
    return (
        model.name,
        f"{model.n_parameters / 1e6:,.1f} M",
        f"{model.architecture['max_position_embeddings']:,}",
        "?" if size is None else f"{size / 1e6:,.0f} MB",
        model.vocabulary,
        model.licence or "not verified",
        "yes" if (cache / "models" / model.name).is_dir() else "no",
    )


VERBS = {"download": download}
