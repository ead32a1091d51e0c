"""Verbs from raw files to the table of cells: ingest, qc-metrics, doublets, qc."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError

if TYPE_CHECKING:
    from cellformers.counts import Knowledge, Sample
    from cellformers.io.source import ReadOptions

Shards = Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Files of earlier steps, in order.")]
Metadata = Annotated[Path, typer.Option("--metadata", help="The dataset's metadata.parquet.")]


def ingest(
    output: opt.Output,
    raw_file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="One count file or folder; a deposit's folder.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="A table (sample, path, ...) of several files.")
    ] = None,
    deposit: Annotated[
        str | None, typer.Option(help="FILE is the folder of this registered deposit.")
    ] = None,
    part: Annotated[str | None, typer.Option(help="Which part of the deposit (all).")] = None,
    shards: Annotated[int, typer.Option(min=1, help="Number of contiguous row ranges.")] = 1,
    labels: Annotated[Path | None, typer.Option(help="A table of cell labels to join.")] = None,
    key: Annotated[str | None, typer.Option(help="Its column of cell names or barcodes.")] = None,
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
    """Turn raw files into a dataset folder: counts/, metadata.parquet, features.parquet.

    Example: cellformers ingest my.h5ad --shards 4 -o results/mine
    """
    from cellformers.counts import ingest as run
    from cellformers.io.labels import LabelTable
    from cellformers.io.source import ReadOptions
    from cellformers.progress import say

    if (labels is None) != (key is None):
        raise UserError("--labels and --key go together")
    if (raw_file is None) == (samples is None):
        raise UserError("give either one FILE or --samples TABLE")
    if part is not None and deposit is None:
        raise UserError("--part is of a --deposit")
    chosen = opt.read_options(
        layer=layer, raw=raw, round_counts=round_counts, make_unique=make_unique, genes_in_rows=genes_in_rows,
        cells_in_rows=cells_in_rows, gene_column=gene_column, cell_column=cell_column,
    )  # fmt: skip
    if deposit is not None and chosen != ReadOptions():
        raise UserError("how a deposit is read is known", fix="leave out the options about its files")
    with _inputs(raw_file, samples, deposit, part or "all", output) as given:
        done = run(
            given.samples,
            [output / "counts" / f"{number:04d}-of-{shards:04d}.h5ad" for number in range(1, shards + 1)],
            metadata=output / "metadata.parquet",
            features=output / "features.parquet",
            options=given.options or chosen,
            labels=LabelTable(labels, key) if labels is not None and key is not None else None,
            known=given.known,
            quiet=quiet,
        )
    for note in done.notes:
        say(f"ingest: {note}", quiet=quiet)


class _Inputs(NamedTuple):
    """What `ingest` reads; of a deposit also how, and what is known of it."""

    samples: "list[Sample]"
    options: "ReadOptions | None" = None
    known: "Knowledge | None" = None


@contextmanager
def _inputs(
    raw_file: Path | None, samples: Path | None, deposit: str | None, part: str, output: Path
) -> "Iterator[_Inputs]":
    """The files to ingest; what of a deposit has to be unpacked lies beside `output` for as long as this is open."""
    from cellformers.counts import Sample

    if deposit is not None:
        from cellformers.deposits.parts import naming_deposit, open_part
        from cellformers.io.files import temporary_folder

        if raw_file is None:
            raise UserError("--deposit needs the folder of the deposit, not --samples")
        with temporary_folder(output.parent / f"{output.name}.unpacked") as work:
            opened = open_part(deposit, part, raw_file, work)
            with naming_deposit(opened, raw_file):
                yield _Inputs(opened.samples, opened.options, opened.known)
    elif raw_file is not None:
        yield _Inputs([Sample(raw_file)])
    else:
        from cellformers.io.samples import read_sample_table

        yield _Inputs(
            [
                Sample(
                    Path(row["path"]),
                    row["sample"],
                    {k: v for k, v in row.items() if k not in ("sample", "path")},
                )
                for row in read_sample_table(str(samples))
            ]
        )


def qc_metrics(
    shard: Annotated[Path, typer.Argument(help="A counts shard.")],
    output: opt.Output,
    quiet: opt.Quiet = False,
) -> None:
    """Measure total counts, detected genes and the mitochondrial fraction of a shard's cells.

    Example: cellformers qc-metrics results/mine/counts/0001-of-0001.h5ad -o metrics.parquet
    """
    from cellformers.qc import qc_metrics as run

    run(shard, output, quiet=quiet)


def doublets(
    shards: Shards,
    metadata: Metadata,
    output: opt.Output,
    batch: Annotated[str | None, typer.Option(help="Metadata column of batches to score apart.")] = None,
    seed: opt.Seed = 0,
    quiet: opt.Quiet = False,
) -> None:
    """Score doublets with scrublet, batch by batch over the whole dataset.

    Example: cellformers doublets counts/*.h5ad --metadata metadata.parquet --batch donor -o doublets.parquet
    """
    from cellformers.doublets import score_doublets
    from cellformers.progress import say

    for note in score_doublets(shards, metadata, output=output, batch=batch, seed=seed, quiet=quiet):
        say(f"doublets: {note}", quiet=quiet)


def qc(
    metrics: Shards,
    metadata: Metadata,
    output: opt.Output,
    report: Annotated[Path, typer.Option(help="Folder for thresholds.json and the figures.")],
    method: Annotated[str, typer.Option(help="sd, mad, fixed or none.")] = "sd",
    n_sd: Annotated[float, typer.Option(help="Width for sd and mad.")] = 3.0,
    min_genes: Annotated[int, typer.Option(help="Detected features a cell must have.")] = 7,
    max_genes: Annotated[int | None, typer.Option(help="fixed: most detected features.")] = None,
    min_counts: Annotated[float | None, typer.Option(help="fixed: least total counts.")] = None,
    max_counts: Annotated[float | None, typer.Option(help="fixed: most total counts.")] = None,
    max_mito_fraction: Annotated[
        float | None, typer.Option(help="fixed: highest mitochondrial fraction.")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="Only cells with this label in the metadata; repeatable."),
    ] = None,
    max_cells: Annotated[int | None, typer.Option(min=1, help="Keep so many of the cells that pass.")] = None,
    seed: opt.Seed = 0,
    doublet_scores: Annotated[Path | None, typer.Option("--doublets", help="Scores by `doublets`.")] = None,
    quiet: opt.Quiet = False,
) -> None:
    """Decide which cells pass; write cells.parquet, thresholds.json and figures of each threshold.

    Example: cellformers qc metrics/*.parquet --metadata metadata.parquet -o cells.parquet --report qc
    """
    from cellformers.plots.quality import draw_thresholds
    from cellformers.progress import say
    from cellformers.qc import QCParameters
    from cellformers.qc import qc as run
    from cellformers.selection import read_where

    parameters = QCParameters(
        method=method, n_sd=n_sd, min_genes=min_genes, max_genes=max_genes, min_counts=min_counts,
        max_counts=max_counts, max_mito_fraction=max_mito_fraction, where=read_where(where or [], metadata),
        max_cells=max_cells, seed=seed,
    )  # fmt: skip
    thresholds = report / "thresholds.json"
    done = run(
        metrics,
        metadata,
        output=output,
        thresholds=thresholds,
        parameters=parameters,
        doublets=doublet_scores,
    )
    draw_thresholds(output, thresholds, report / "thresholds")
    say(f"qc: {done['n_pass']:,} of {done['n_cells']:,} cells pass", quiet=quiet)
    for name, criterion in done["criteria"].items():
        if criterion.get("skipped"):
            say(f"qc: {name} skipped: {criterion['skipped']}", quiet=quiet)


def check_columns(
    metadata: Annotated[Path, typer.Argument(help="A dataset's metadata.parquet.")],
    output: opt.Output,
    column: Annotated[list[str] | None, typer.Option(help="A column that has to be there.")] = None,
) -> None:
    """Check that a dataset has the metadata columns that a config names, and write them down.

    Example: cellformers check-columns metadata.parquet --column cell_type --column donor -o columns.json
    """
    from cellformers.errors import did_you_mean
    from cellformers.io.files import open_parquet, write_json

    with open_parquet(metadata) as file:
        there = [name for name in file.schema_arrow.names if name != "cell_id"]
    for name in column or []:
        if name not in there:
            raise UserError(
                f"has no column {name!r}, which the config names",
                path=metadata,
                fix=did_you_mean(name, there),
            )
    write_json({"needed": column or [], "there": there}, output)


VERBS = {
    "check-columns": check_columns,
    "ingest": ingest,
    "qc-metrics": qc_metrics,
    "doublets": doublets,
    "qc": qc,
}
