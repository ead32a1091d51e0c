"""Verbs about whole runs: provenance, compare."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError


def _read_config(path: Path) -> Any:
    from cellformers.resources import MAX_BYTES, read_yaml
    from cellformers.resources.loading import load_yaml

    try:
        if str(path) == "-":
            text = sys.stdin.read(MAX_BYTES + 1)
            if len(text) > MAX_BYTES:
                raise ValueError(f"it has more than {MAX_BYTES >> 10} KiB")
            values = load_yaml(text)
        else:
            values = read_yaml(path)
    except FileNotFoundError:
        raise UserError("no such file", path=path) from None
    except (OSError, ValueError) as error:
        raise UserError(f"not readable as YAML ({error})", path=path) from None
    if not isinstance(values, dict):
        raise UserError("is not a YAML mapping", path=path, fix="give the config of the run")
    return {key: value for key, value in values.items() if key != "pathvars"}


def provenance(
    config: Annotated[Path, typer.Argument(help="The config of the run; - reads it from stdin.")],
    results: Annotated[Path, typer.Option(help="Its folder of results.")],
    output: opt.Output,
    root: Annotated[Path, typer.Option(help="Folder that paths of the config are relative to.")] = Path(),
    threads: opt.Threads = 1,
    quiet: opt.Quiet = False,
) -> None:
    """Record a run: versions, commit, config, and digests of what it read and what it made.

    The same run gives the same bytes.

    Example: cellformers provenance config/config.yaml --results results -o results/provenance.json
    """
    from cellformers.provenance import write_record

    write_record(
        _read_config(config), results=results, output=output, root=root, threads=threads, quiet=quiet
    )


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="A results folder, or a provenance.json.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="The other one.")],
    tolerance: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Accept differences of floats up to this share of the largest value in their column "
            "(GPU and bf16: 5e-3).",
        ),
    ] = 0.0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Other versions, machines or shards count as a difference.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write everything that differs, as JSON.")
    ] = None,
    threads: opt.Threads = 2,
) -> None:
    """List what differs between two runs; exit status 0: nothing, 1: something, 2: no runs to compare.

    Folders are read as they are now; of two provenance.json, the digests are compared.

    Example: cellformers compare results other/results --tolerance 5e-3
    """  # fmt: skip
    from cellformers.compare import as_json, as_text
    from cellformers.compare import compare as run
    from cellformers.io.files import write_json

    if output is not None and output.suffix != ".json":  # of a run, perhaps
        raise UserError("should be a .json file", path=output, fix="name it so")
    found = run(first, second, tolerance=tolerance, threads=threads)
    if output is not None:
        write_json(as_json(found, strict=strict), output)
    print(as_text(found, strict=strict))
    if found.differs(strict=strict):
        raise typer.Exit(1)


VERBS = {"provenance": provenance, "compare": compare}
