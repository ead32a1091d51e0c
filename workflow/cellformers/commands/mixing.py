"""The verb `mixing`: how far batches mix in an embedding while kinds of cells stay apart."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.commands import options as opt
from cellformers.commands.evaluation import NAMED, PUBLISHED, named_paths, one_each, published_number


def mixing(
    method: Annotated[str, typer.Option(help="Name of the method in the tables.")],
    features: Annotated[str, typer.Option(help="embedding, pca_hvg, harmony, combat or scvi.")],
    batch: Annotated[str, typer.Option(help="Column of batches, or dataset: each dataset is one.")],
    cells: Annotated[list[str], typer.Option(metavar=NAMED, help="cells.parquet of a dataset.")],
    input_files: Annotated[
        list[str], typer.Option("--input", metavar=NAMED, help="Embeddings or counts of a dataset.")
    ],
    output: opt.Output,
    label: Annotated[str | None, typer.Option(help="Column of what has to stay apart.")] = None,
    unit: Annotated[
        str | None, typer.Option(help="Column of donors to resample (default: the batches).")
    ] = None,
    tokens: Annotated[
        list[str] | None, typer.Option(metavar=NAMED, help="Token shards: only cells that have tokens.")
    ] = None,
    max_cells: Annotated[
        int, typer.Option("--max-cells", min=100, help="Draw so many cells if there are more.")
    ] = 20_000,
    benchmark: Annotated[str, typer.Option(help="Name of the benchmark.")] = "benchmark",
    kind: Annotated[str, typer.Option(help="model, baseline, control or oracle.")] = "model",
    permute: Annotated[bool, typer.Option("--permute", help="Shuffle the batches: perfect mixing.")] = False,
    vocabulary: Annotated[Path | None, typer.Option(help="Maps features of counts to genes.")] = None,
    published: Annotated[list[str] | None, typer.Option(metavar=PUBLISHED)] = None,
    note: Annotated[str | None, typer.Option(help="A caveat to print beside every score.")] = None,
    seed: opt.Seed = 0,
    threads: opt.Threads = 1,
) -> None:
    """Measure how far batches mix in one embedding while kinds of cells stay apart (scib-metrics).

    Example: cellformers mixing --method v2 --features embedding --batch donor --label cell_type --cells
    a=cells.parquet --input a=v2.h5ad -o v2.json
    """
    from cellformers.evaluate.mixing import measure_mixing

    measure_mixing(
        benchmark=benchmark, method=method, kind=kind, cells=one_each(cells, "--cells"), features=features,
        inputs=named_paths(input_files, "--input"), batch=batch, label=label, unit=unit,
        tokens=named_paths(tokens, "--tokens"), max_cells=max_cells,
        permute=permute, vocabulary=vocabulary, published=[published_number(word) for word in published or []],
        note=note, seed=seed, threads=threads, output=output,
    )  # fmt: skip


VERBS = {"mixing": mixing}
