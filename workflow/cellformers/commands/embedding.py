"""Verbs that compute embeddings: embed, gather, gather-genes, embed-file."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError

ModelFolder = Annotated[Path, typer.Option("--model", help="A model folder: config, weights, vocabulary/.")]
Layer = Annotated[int, typer.Option("--layer", max=0, help="0 = last layer, -1 = second to last, ...")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, or bfloat16 where the device has it.")]
Mode = Annotated[
    str | None, typer.Option("--mode", help="cls, cell or gene; default: cls where there is <cls>.")
]
Shards = Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Files of earlier steps, in order.")]


def embed(
    tokens: Annotated[Path, typer.Argument(help="A tokens shard, by `tokenize`.")],
    model: ModelFolder,
    output: opt.Output,
    mode: Mode = None,
    layer: Layer = -1,
    dtype: Dtype = "float32",
    accelerator: opt.Accelerator = "cpu",
    threads: opt.Threads = 2,
    quiet: opt.Quiet = False,
) -> None:
    """Embed the cells of a tokens shard (--mode cls, cell), or sum up the vectors of its genes (--mode gene).

    Example: cellformers embed tokens.parquet --model models/v2-104m -o embeddings.parquet
    """
    from cellformers.embedding import default_mode, embed_cells, sum_genes
    from cellformers.progress import progress
    from cellformers.tokens import count_cells

    with progress("embed", count_cells(tokens), quiet=quiet) as advance:
        if mode == "gene":
            sum_genes(
                tokens, model, output, layer=layer, dtype=dtype, accelerator=accelerator, threads=threads,
                progress=advance,
            )  # fmt: skip
        else:
            embed_cells(
                tokens, model, output, mode=mode or default_mode(model), layer=layer, dtype=dtype,
                accelerator=accelerator, threads=threads, progress=advance,
            )  # fmt: skip


def gather(
    shards: Shards,
    cells: Annotated[Path, typer.Option(help="The dataset's cells.parquet.")],
    output: opt.Output,
    name: Annotated[str, typer.Option(help="Name of the embedding: obsm['X_NAME'].")],
) -> None:
    """Join embedding shards and cell metadata into one AnnData file.

    Example: cellformers gather embeddings/*.parquet --cells cells.parquet --name v2 -o embeddings.h5ad
    """
    from cellformers.gather import gather_cells

    gather_cells(shards, cells, name=name, output=output)


def gather_genes(
    shards: Annotated[list[Path], typer.Argument(metavar="SUMS...", help="What `embed --mode gene` wrote.")],
    output: opt.Output,
) -> None:
    """Turn the sums of all shards into gene embeddings: the mean over the cells that express the gene.

    Example: cellformers gather-genes gene_embeddings/*.parquet -o gene_embeddings.parquet
    """
    from cellformers.embedding import merge_gene_sums

    merge_gene_sums(shards, output)


def embed_file(
    counts: Annotated[Path, typer.Argument(metavar="FILE", help="Any count file or folder.")],
    model: ModelFolder,
    output: opt.Output,
    name: Annotated[str | None, typer.Option(help="Name of the embedding (default: of the model).")] = None,
    mode: Mode = None,
    layer: Layer = -1,
    dtype: Dtype = "float32",
    umap: Annotated[bool, typer.Option(help="Also neighbours and a UMAP.")] = True,
    accelerator: opt.Accelerator = "cpu",
    threads: opt.Threads = 2,
    seed: opt.Seed = 0,
    counts_layer: Annotated[str | None, typer.Option(help="h5ad, zarr: read counts from this layer.")] = None,
    raw: opt.Raw = False,
    round_counts: opt.Round = False,
    make_unique: opt.MakeUnique = False,
    genes_in_rows: opt.GenesInRows = False,
    cells_in_rows: opt.CellsInRows = False,
    gene_column: opt.GeneColumn = None,
    cell_column: opt.CellColumn = None,
    quiet: opt.Quiet = False,
) -> None:
    """Embed one file, without a config: a copy of it with the embedding, neighbours and a UMAP. Resumes.

    Example: cellformers embed-file my.h5ad --model models/v2-104m -o my_embedded.h5ad
    """
    from cellformers.embed_file import embed_file as run

    if mode == "gene":
        raise UserError(
            "embed-file embeds cells", fix="give --mode cls or cell; gene vectors: tokenize, embed"
        )
    chosen = opt.read_options(
        layer=counts_layer, raw=raw, round_counts=round_counts, make_unique=make_unique,
        genes_in_rows=genes_in_rows, cells_in_rows=cells_in_rows, gene_column=gene_column, cell_column=cell_column,
    )  # fmt: skip
    run(
        counts, model, output, name=name, mode=mode, layer=layer, dtype=dtype, umap=umap, seed=seed,
        accelerator=accelerator, threads=threads, options=chosen, quiet=quiet,
    )  # fmt: skip


VERBS = {"embed": embed, "gather": gather, "gather-genes": gather_genes, "embed-file": embed_file}
