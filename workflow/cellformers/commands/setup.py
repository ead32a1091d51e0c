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

        checked = load_file(config)
        print(f"ok       {config}: {len(checked.datasets)} datasets, {len(checked.benchmarks)} benchmarks")
    if any(finding.state == "missing" for finding in findings):
        raise typer.Exit(1)


def simulate(
    output: Output,
    cells: Annotated[int, typer.Option("--cells", min=300, help="Cells of the atlas.")] = 3000,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Write a small atlas (h5ad), a second platform (loom) and gene labels, with known truth.

    Example: cellformers simulate --cells 3000 -o simulated
    """
    from cellformers.progress import say
    from cellformers.simulate import simulate as run

    run(output, seed=seed, n_cells=cells)
    say(f"{output}: atlas.h5ad, second.loom, gene_labels.csv, out_degrees.csv, truth.json", quiet=quiet)


VERBS = {"doctor": doctor, "simulate": simulate}
