"""Verbs about genes: sketch, medians, vocabulary, genes, gene-labels, tokenize."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError

VocabularyFolder = Annotated[Path, typer.Option("--vocabulary", help="A vocabulary folder, by `vocabulary`.")]


def sketch(
    counts: Annotated[Path, typer.Argument(help="A counts shard, or any count file.")],
    output: opt.Output,
    cells: Annotated[Path | None, typer.Option(help="cells.parquet: only cells that pass QC count.")] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="Its aliases say which features are one gene.")
    ] = None,
    relative_error: Annotated[float, typer.Option(help="Bound of the medians' relative error.")] = 0.001,
    quiet: opt.Quiet = False,
) -> None:
    """Sum up the expression of each gene in a shard, to be merged into medians.

    Example: cellformers sketch counts/0001-of-0002.h5ad --cells cells.parquet -o sketch.parquet
    """
    from cellformers.genes import Vocabulary
    from cellformers.medians import sketch as run

    known = None if vocabulary is None else Vocabulary.load(vocabulary)
    run(counts, output, cells=cells, vocabulary=known, relative_error=relative_error, quiet=quiet)


def _is_parquet(path: Path) -> bool:
    """A sketch is Parquet; no count file is."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def medians(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Sketches, counts shards or raw files.")
    ],
    output: opt.Output,
    cells: Annotated[Path | None, typer.Option(help="cells.parquet: only cells that pass QC count.")] = None,
    relative_error: Annotated[float, typer.Option(help="Bound of the medians' relative error.")] = 0.001,
    quiet: opt.Quiet = False,
) -> None:
    """Median of the non-zero expression of every gene over any set of sketches or count files.

    Example: cellformers medians my_atlas.h5ad other.loom -o medians.parquet
    """
    from cellformers.io.files import temporary_folder
    from cellformers.medians import merge
    from cellformers.medians import sketch as make_sketch

    with temporary_folder(output) as folder:
        sketches = []
        for number, path in enumerate(inputs):
            if _is_parquet(path):
                sketches.append(path)
                continue
            made = folder / f"{number}.parquet"
            make_sketch(path, made, cells=cells, relative_error=relative_error, quiet=quiet)
            sketches.append(made)
        merge(sketches, output)


def vocabulary(
    source: Annotated[
        Path, typer.Option("--from", help="Published dictionaries, medians.parquet, or a vocabulary.")
    ],
    output: opt.Output,
    name: Annotated[str | None, typer.Option(help="Name of the vocabulary.")] = None,
    special_tokens: Annotated[str, typer.Option(help="Own medians: v1, or v2 with <cls> and <eos>.")] = "v2",
    context_length: Annotated[int | None, typer.Option(min=8, help="Own medians: longest sequence.")] = None,
) -> None:
    """Make a vocabulary from published dictionaries (never unpickled as code) or from own medians.

    Example: cellformers vocabulary --from geneformer/gene_dictionaries_30m -o vocabularies/gc30M
    """
    from cellformers.genes import Vocabulary
    from cellformers.vocabulary import Special, from_medians, read_published

    if special_tokens not in ("v1", "v2"):
        raise UserError(f"no special tokens {special_tokens!r}", fix="give v1 or v2")
    if not source.exists():
        raise UserError("no such file or folder", path=source)
    if source.is_file():
        special: Special = "v1" if special_tokens == "v1" else "v2"
        made = from_medians(
            source, name=name or output.name, special=special, context_length=context_length
        )  # fmt: skip
        made.save(output)
    elif (source / "vocabulary.json").is_file():
        Vocabulary.load(source).save(output)
    else:
        read_published(source, name=name).save(output)


def genes(
    features: Annotated[Path, typer.Argument(help="A dataset's features.parquet, by `ingest`.")],
    vocabulary: VocabularyFolder,
    output: opt.Output,
    quiet: opt.Quiet = False,
) -> None:
    """Count which features of a dataset map to which genes; refuse a dataset that hardly maps.

    Example: cellformers genes features.parquet --vocabulary vocabularies/gc104M -o genes.json
    """
    from cellformers.genes import Vocabulary, check_mapping, map_features
    from cellformers.io.files import read_metadata, read_table, stamp, write_json
    from cellformers.progress import say
    from cellformers.revisions import REVISIONS

    table = read_table(features, ["feature_id", "symbol", "n_counts"])
    known = Vocabulary.load(vocabulary)
    ids, symbols = table["feature_id"].to_numpy(), table["symbol"].to_numpy()
    report = map_features(ids, None if table["symbol"].null_count == len(ids) else symbols, known).report(
        table["n_counts"].to_numpy()
    )
    check_mapping(report, features)
    inputs = {**read_metadata(features).get("inputs", {}), "vocabulary": known.digest}
    write_json(stamp("genes", REVISIONS["genes"], parameters={}, inputs=inputs) | report, output)
    say(f"genes: {report['shares']['mapped']:.1%} of the counts are of genes in {known.name}", quiet=quiet)


def gene_labels(
    folder: Annotated[Path, typer.Argument(help="The folder of a deposit, by `download`.")],
    deposit: Annotated[str, typer.Option(help="Name of the deposit.")],
    vocabulary: VocabularyFolder,
    output: opt.Output,
    part: Annotated[str, typer.Option(help="Which part of the deposit.")] = "all",
    quiet: opt.Quiet = False,
) -> None:
    """Write a deposit's labels of genes as a table: gene_id, symbol, label and the scores of the source.

    Example: cellformers gene-labels deposits/tf-range --deposit tf-range --vocabulary gc104M -o labels.csv
    """
    from cellformers.deposits.parts import gene_labels as run
    from cellformers.progress import say

    for note in run(deposit, part, folder, vocabulary=vocabulary, output=output):
        say(f"gene-labels: {note}", quiet=quiet)


def tokenize(
    counts: Annotated[Path, typer.Argument(help="A counts shard, or any count file or folder.")],
    vocabulary: VocabularyFolder,
    output: opt.Output,
    cells: Annotated[
        Path | None, typer.Option(help="cells.parquet: only cells that pass QC are tokenized.")
    ] = None,
    min_genes: Annotated[
        int | None, typer.Option(help="Vocabulary genes a cell must have (7 with --cells).")
    ] = None,
    threads: opt.Threads = 2,
    layer: opt.Layer = None,
    raw: opt.Raw = False,
    round_counts: opt.Round = False,
    make_unique: opt.MakeUnique = False,
    genes_in_rows: opt.GenesInRows = False,
    cells_in_rows: opt.CellsInRows = False,
    gene_column: opt.GeneColumn = None,
    cell_column: opt.CellColumn = None,
    quiet: opt.Quiet = False,
) -> None:
    """Rank the genes of every cell by count over corpus median: the tokens a model reads.

    Without --cells every cell of the file is kept, in file order, but those whose own `filter_pass` is 0.

    Example: cellformers tokenize my.h5ad --vocabulary vocabularies/gc104M -o tokens.parquet
    """
    from cellformers.genes import Vocabulary
    from cellformers.io.source import open_counts
    from cellformers.progress import progress, say
    from cellformers.tokens import tokenize as run

    chosen = opt.read_options(
        layer=layer, raw=raw, round_counts=round_counts, make_unique=make_unique, genes_in_rows=genes_in_rows,
        cells_in_rows=cells_in_rows, gene_column=gene_column, cell_column=cell_column,
    )  # fmt: skip
    known = Vocabulary.load(vocabulary)
    least = min_genes if min_genes is not None else (7 if cells is not None else 0)
    with open_counts(counts, options=chosen) as source:
        for note in source.notes:
            say(f"{counts}: {note}", quiet=quiet)
        kept, dataset = None, None
        if cells is not None:
            from cellformers.counts import shard_digest
            from cellformers.qc import passing

            kept, dataset = passing(cells, source.names), shard_digest(counts)
        with progress("tokenize", source.n_cells, quiet=quiet) as advance:
            done = run(
                source, known, output=output, cells=kept, min_genes=least, threads=threads, dataset=dataset,
                advance=advance,
            )  # fmt: skip
    found = done["cells"]
    for key, what in (
        ("filtered", "filtered out"),
        ("few_genes", f"with under {least} genes of the vocabulary left out"),
        ("empty", "without a gene of the vocabulary kept, empty"),
        ("truncated", "truncated to the context length"),
    ):
        if found[key]:
            say(f"tokenize: {found[key]:,} cells {what}", quiet=quiet)


VERBS = {
    "sketch": sketch,
    "medians": medians,
    "vocabulary": vocabulary,
    "genes": genes,
    "gene-labels": gene_labels,
    "tokenize": tokenize,
}
