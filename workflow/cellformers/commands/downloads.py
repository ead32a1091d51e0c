"""The verb that fetches what is published, models and deposits: download."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from cellformers.deposits import Deposit
    from cellformers.registry import PublishedModel


def download(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A registered model, vocabulary or deposit.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also put it here (large files as links if possible)."),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Of a model: branch, tag or commit, other than the registered one."),
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Show what is registered, and stop.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare digests of what is there.")] = False,
    relock: Annotated[
        bool,
        typer.Option(
            "--relock", help="Accept files that changed at the publisher, if no digest is registered."
        ),
    ] = False,
    quiet: opt.Quiet = False,
) -> None:
    """Fetch a published model with its vocabulary, or a deposit, verified; an interrupted download goes on.

    It goes to CELLFORMERS_HOME (default: ~/.cache/cellformers), where other verbs find it by its name. HF_ENDPOINT
    names another Hub, HF_TOKEN is a token for it. With CELLFORMERS_MIRROR set, https://host/path is fetched from
    $CELLFORMERS_MIRROR/host/path. A deposit that needs a login is looked for in CELLFORMERS_HOME/manual/NAME; what is
    missing there is said.

    Example: cellformers download geneformer-v2-104m
    """
    if list_all:
        print(listing())
        return
    if name is None:
        raise UserError(
            "no model or deposit is named", fix="cellformers download --list shows those there are"
        )
    print(_fetch(name, output, revision=revision, verify=verify, relock=relock, quiet=quiet))


def _fetch(
    name: str, output: Path | None, *, revision: str | None, verify: bool, relock: bool, quiet: bool
) -> Path:
    from cellformers.deposits import deposit_names, download_deposit
    from cellformers.registry import download as download_model
    from cellformers.registry import read_registry

    deposits = deposit_names()
    if name in deposits:
        if revision is not None:
            raise UserError(f"the deposit {name} has no revisions", fix="leave out --revision")
        return download_deposit(name, output, verify=verify, relock=relock, quiet=quiet)
    registry = read_registry()
    known = [*registry.models, *registry.vocabularies, *deposits]
    if name not in known:
        raise UserError(
            f"no model or deposit {name!r} is registered",
            fix=f"{did_you_mean(name, known)} (cellformers download --list)",
        )
    return download_model(name, output, revision=revision, verify=verify, relock=relock, quiet=quiet)


def listing() -> str:
    """What is registered, as tables: models with parameters, context and size, deposits with title and access."""
    from cellformers.deposits import deposit_names, read_deposit
    from cellformers.registry import home, read_registry

    registry = read_registry()
    models = [
        ("model", "parameters", "context", "weights", "vocabulary", "licence", "here"),
        *(_row(model, home()) for model in registry.models.values()),
    ]
    deposits = [
        ("deposit", "title", "known size", "access", "licence", "here"),
        *(_deposit_row(read_deposit(name)) for name in deposit_names()),
    ]
    return "\n".join(
        [
            *_aligned(models), "", f"vocabularies: {', '.join(registry.vocabularies)}", "", *_aligned(deposits), "",
            f"cache: {home()}",
        ]
    )  # fmt: skip


def _aligned(rows: list[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


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


def _deposit_row(deposit: "Deposit") -> tuple[str, ...]:
    from cellformers.deposits.obtain import is_here

    sizes = [file.size for file in deposit.files.values()]
    known = sum(filter(None, sizes))
    more = " and more" if None in sizes else ""
    return (
        deposit.name,
        deposit.title,
        f"{known / 1e6:,.1f} MB{more}" if known else "?",
        deposit.access if deposit.access == "open" else "by hand",
        deposit.licence or "not verified",
        "yes" if is_here(deposit) else "no",
    )


VERBS = {"download": download}
