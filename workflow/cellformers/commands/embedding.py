"""Verbs that compute embeddings: embed, gather, gather-genes, summarize-embeddings, embed-file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError, did_you_mean

ModelFolder = Annotated[
    Path, typer.Option("--model", help="A model folder, or a registered name (see `download --list`).")
]
Layer = Annotated[
    int,
    typer.Option(
        "--layer", max=0,
        help="0 = last layer, -1 = second to last, ... Published uses: -1 for pretrained models, 0 for fine-tuned.",
    ),
]  # fmt: skip
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="fp32, or bf16, fp16, fp8 where the device has it; or float32, bfloat16, ..."
    ),
]
Backend = Annotated[
    str, typer.Option("--backend", help="auto, te, varlen or sdpa; `cellformers doctor` says what works.")
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens", min=1, help="Tokens computed at once on a GPU (default: what mostly fits)."
    ),
]
Cells = Annotated[
    Path | None, typer.Option("--cells", help="The dataset's cells.parquet, for --where, --max-cells.")
]
Mode = Annotated[
    str | None, typer.Option("--mode", help="cls, cell or gene; default: cls where there is <cls>.")
]
CellMode = Annotated[
    str | None, typer.Option("--mode", help="cls or cell; default: cls where there is <cls>.")
]
Shards = Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Files of earlier steps, in order.")]


def embed(
    tokens: Annotated[Path, typer.Argument(help="A tokens shard, by `tokenize`.")],
    model: ModelFolder,
    output: opt.Output,
    mode: Mode = None,
    layer: Layer = -1,
    dtype: Dtype = "float32",
    backend: Backend = "auto",
    cells: Cells = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only cells with COLUMN=VALUE[,VALUE], as a whole; several columns: all of them."),
    ] = None,
    max_cells: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many cells at random: of --cells, or without it of this file."),
    ] = None,
    seed: opt.Seed = 0,
    occurrences: Annotated[
        bool, typer.Option("--occurrences", help="--mode gene: a row for each gene of each cell, no means.")
    ] = False,
    genes: Annotated[
        str | None, typer.Option(help="--occurrences: only these genes, as ID,ID or a file with one a line.")
    ] = None,
    special: Annotated[
        bool, typer.Option("--special", help="--mode gene: rows of <cls> and other special tokens, too.")
    ] = False,
    accelerator: opt.Accelerator = "cpu",
    batch_tokens: BatchTokens = None,
    threads: opt.Threads = 2,
    quiet: opt.Quiet = False,
) -> None:
    """Embed the cells of a tokens shard (--mode cls, cell), or its genes (--mode gene): their sums for
    `gather-genes`, or every occurrence. Every cell is embedded unless cells are chosen, and rows are in their order.

    Example: cellformers embed tokens.parquet --model models/v2-104m -o embeddings.parquet
    """
    from cellformers import embedding
    from cellformers.gene_embedding import sum_genes
    from cellformers.occurrences import read_genes, write_occurrences
    from cellformers.progress import progress, say
    from cellformers.registry import find_model
    from cellformers.selection import choose_cells, read_where

    modes = (*embedding.MODES, "gene")
    if mode is not None and mode not in modes:
        raise UserError(f"no embedding mode {mode!r}", fix=did_you_mean(mode, modes))
    if mode != "gene" and (occurrences or special):
        raise UserError("--occurrences and --special are about genes", fix="give --mode gene")
    if genes is not None and not occurrences:
        raise UserError("--genes are for --occurrences", fix="give both, or choose among the means later")
    wanted = read_where(where, cells) if where and cells else dict.fromkeys(where or (), ())
    if output.suffix in (".h5ad", ".csv", ".tsv", ".gz"):
        raise UserError(
            "embed writes a shard, in Parquet", path=output,
            fix=f"give -o {output.name.split('.')[0]}.parquet, and make {output.suffix} of it with gather",
        )  # fmt: skip
    model = find_model(model)
    choice = choose_cells(tokens, cells=cells, where=wanted, max_cells=max_cells, seed=seed)
    total = embedding.count_chosen(tokens, choice)
    if choice is not None:
        say(f"embed: {total:,} of the {len(choice.keep):,} cells of {tokens} are chosen", quiet=quiet)
    options: dict[str, Any] = {
        "layer": layer, "dtype": dtype, "backend": backend, "choice": choice, "accelerator": accelerator,
        "threads": threads, "batch_tokens": batch_tokens,
    }  # fmt: skip
    with progress("embed", total, quiet=quiet) as advance:
        options["progress"] = advance
        if mode != "gene":
            embedding.embed_cells(
                tokens, model, output, mode=mode or embedding.default_mode(model), **options
            )
        elif occurrences:
            write_occurrences(
                tokens, model, output, genes=None if genes is None else read_genes(genes), special=special,
                note=lambda line: say(line, quiet=quiet), **options,
            )  # fmt: skip
        else:
            sum_genes(tokens, model, output, special=special, **options)


def gather(
    shards: Shards,
    cells: Annotated[Path, typer.Option(help="The dataset's cells.parquet.")],
    output: opt.Output,
    name: Annotated[
        str | None, typer.Option(help="Name of the embedding: obsm['X_NAME'] (default: the output's).")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="A column of --cells to write; again for more (default: all in .h5ad, else none)."),
    ] = None,
) -> None:
    """Join embedding shards and cell metadata into one file: .h5ad, .parquet, .csv, .tsv, .csv.gz or .tsv.gz.

    Example: cellformers gather embeddings/*.parquet --cells cells.parquet --name v2 -o embeddings.h5ad
    """
    from cellformers.gather import gather_cells

    gather_cells(shards, cells, output=output, name=name, labels=label or None)


def summarize_embeddings(
    embeddings: Annotated[
        list[Path], typer.Argument(metavar="EMBEDDINGS...", help="Embedding shards, or one gathered .h5ad.")
    ],
    output: opt.Output,
    cells: Annotated[
        Path | None, typer.Option(help="The dataset's cells.parquet, with the labels of states.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="Column whose labels are the states (default: one state, all).")
    ] = None,
    statistic: Annotated[
        list[str] | None,
        typer.Option(help="mean, median or lower_median (torch's); again for more (default: mean, median)."),
    ] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Compute the exact mean and median embedding of every state: of each disease, say, or each cell type.

    Example: cellformers summarize-embeddings embeddings/*.parquet --cells cells.parquet --by disease -o states.parquet
    """
    from cellformers import summaries
    from cellformers.progress import progress, say

    with progress("summarize-embeddings", unit="dimensions", quiet=quiet) as advance:
        found = summaries.summarize_embeddings(
            embeddings,
            output,
            cells=cells,
            by=by,
            statistics=statistic or summaries.DEFAULT,
            progress=advance,
        )
    left_out = "".join(
        f"; {found[key]:,} cells {what} left out"
        for key, what in (("no_label", "without a label"), ("no_embedding", "without an embedding"))
        if found[key]
    )
    say(f"{output}: {found['states']:,} states of {found['cells']:,} cells{left_out}", quiet=quiet)


def gather_genes(
    shards: Annotated[list[Path], typer.Argument(metavar="SUMS...", help="What `embed --mode gene` wrote.")],
    output: opt.Output,
) -> None:
    """Turn the sums of all shards into gene embeddings: the mean over the cells that express the gene.

    Example: cellformers gather-genes gene_embeddings/*.parquet -o gene_embeddings.parquet
    """
    from cellformers.gene_embedding import merge_gene_sums

    merge_gene_sums(shards, output)


def embed_file(
    counts: Annotated[Path, typer.Argument(metavar="FILE", help="Any count file or folder.")],
    model: ModelFolder,
    output: opt.Output,
    name: Annotated[str | None, typer.Option(help="Name of the embedding (default: of the model).")] = None,
    mode: CellMode = None,
    layer: Layer = -1,
    dtype: Dtype = "float32",
    backend: Backend = "auto",
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

    A registered model that is not there yet is downloaded first.

    Example: cellformers embed-file my.h5ad --model geneformer-v1-10m -o my_embedded.h5ad
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
        counts, model, output, name=name, mode=mode, layer=layer, dtype=dtype, backend=backend, umap=umap, seed=seed,
        accelerator=accelerator, threads=threads, options=chosen, quiet=quiet,
    )  # fmt: skip


VERBS = {
    "embed": embed,
    "gather": gather,
    "gather-genes": gather_genes,
    "summarize-embeddings": summarize_embeddings,
    "embed-file": embed_file,
}
