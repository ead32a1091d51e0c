"""Options that several verbs share, so that they are spelt and explained the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.errors import UserError
from cellformers.io.source import ReadOptions

Output = Annotated[Path, typer.Option("--output", "-o", help="Where the result goes.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Threads = Annotated[int, typer.Option("--threads", "-t", min=1, help="CPU threads to use.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Accelerator = Annotated[str, typer.Option("--accelerator", help="cpu, or cuda for an NVIDIA GPU.")]

Layer = Annotated[str | None, typer.Option("--layer", help="h5ad, zarr: read counts from this layer.")]
Raw = Annotated[bool, typer.Option("--raw", help="h5ad, zarr: read counts from `raw`.")]
Round = Annotated[bool, typer.Option("--round", help="Round counts to integers (alevin, SoupX).")]
MakeUnique = Annotated[bool, typer.Option("--make-unique", help="Number duplicate cell names.")]
GenesInRows = Annotated[bool, typer.Option("--genes-in-rows", help="Dense text: rows are genes.")]
CellsInRows = Annotated[bool, typer.Option("--cells-in-rows", help="Dense text: rows are cells.")]
GeneColumn = Annotated[
    str | None, typer.Option("--gene-column", help="Column or attribute with the gene ids.")
]
CellColumn = Annotated[
    str | None, typer.Option("--cell-column", help="Column or attribute with the cell names.")
]


def read_options(
    *,
    layer: str | None,
    raw: bool,
    round_counts: bool,
    make_unique: bool,
    genes_in_rows: bool,
    cells_in_rows: bool,
    gene_column: str | None,
    cell_column: str | None,
) -> ReadOptions:
    """The reader's options from the flags of a verb."""
    if genes_in_rows and cells_in_rows:
        raise UserError("give --genes-in-rows or --cells-in-rows, not both")
    if layer is not None and raw:
        raise UserError("give --layer or --raw, not both")
    return ReadOptions(
        layer=layer,
        raw=raw,
        round=round_counts,
        make_unique=make_unique,
        genes_in_rows=True if genes_in_rows else False if cells_in_rows else None,
        gene_column=gene_column,
        cell_column=cell_column,
    )
