"""Verbs about the installation and the demo: doctor, simulate."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.commands.options import Output, Quiet, Seed


def doctor(
    config: Annotated[Path | None, typer.Option("--config", help="Also check this workflow config.")] = None,
) -> None:
    """Say what is installed, which devices and backends work, what is missing and how to get it.

    Example: cellformers doctor --config config/config.yaml
    """
    from cellformers.doctor import examine, report

    findings = examine()
    print(report(findings))
    if config is not None:
        from cellformers.config import load_file
        from cellformers.provenance.artefacts import inputs

        checked = load_file(config)
        print(f"ok       {config}: datasets {len(checked.datasets)}, benchmarks {len(checked.benchmarks)}")
        for path in inputs(checked):
            if not Path(path).exists():
                print(
                    f"no file  {path} in {Path.cwd()}: the run has to make it, or works in another --directory"
                )
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


ATLAS_CELLS = 3000
LEAST_ATLAS_CELLS = 300  # so that the second dataset, a third as large, holds all donors and types


def simulate(
    output: Output,
    deposit: Annotated[
        list[str] | None,
        typer.Option("--deposit", help="Instead: a registered deposit (repeatable), or all of them."),
    ] = None,
    cells: Annotated[
        int | None,
        typer.Option(
            "--cells", min=150, help="Cells: of the atlas (3000, at least 300), of each deposit (300 or so)."
        ),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write a small atlas (h5ad), a second platform (loom) and gene labels, with known truth; or small public deposits.

    Deposits come as a mirror of the servers that hold the real ones (www), a registry with their digests (resources),
    what has to be fetched by hand (home/manual) and the truth; all of them come with two tiny published models.

    Example: cellformers simulate --cells 3000 -o simulated
    """
    from cellformers.errors import UserError
    from cellformers.progress import say

    if deposit:
        from cellformers.simulate.deposits import simulate_deposits

        written = simulate_deposits(deposit, output, cells=cells, seed=seed)
        say(f"{output}: {', '.join(written)}, in www, resources, home and truth", quiet=quiet)
        return
    if cells is not None and cells < LEAST_ATLAS_CELLS:
        raise UserError(
            f"{cells} cells are too few for an atlas", fix=f"give --cells {LEAST_ATLAS_CELLS} or more"
        )
    from cellformers.simulate import simulate as run

    run(output, seed=seed, n_cells=cells or ATLAS_CELLS)
    say(f"{output}: atlas.h5ad, second.loom, gene_labels.csv, out_degrees.csv, truth.json", quiet=quiet)


VERBS = {"doctor": doctor, "simulate": simulate}
