"""Verbs from embeddings to the report: split, evaluate, summarize, map, report."""

from pathlib import Path
from typing import Annotated

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError

Task = Annotated[str, typer.Option("--task", help="cells or genes.")]
NAMED = "NAME=PATH"
PUBLISHED = "METRIC|VALUE|SOURCE|SD|PROTOCOL"


def named_paths(words: list[str] | None, option: str) -> dict[str, list[Path]]:
    """Files by name from NAME=PATH words; a name may be given several times.

    Raises
    ------
    UserError
        If a word has no `=`.
    """
    found: dict[str, list[Path]] = {}
    for word in words or []:
        name, separator, path = word.partition("=")
        if not separator or not name or not path:
            raise UserError(f"{option} {word!r} is not NAME=PATH")
        found.setdefault(name, []).append(Path(path))
    return found


def one_each(words: list[str] | None, option: str) -> dict[str, Path]:
    """One file a name from NAME=PATH words."""
    found = named_paths(words, option)
    for name, paths in found.items():
        if len(paths) > 1:
            raise UserError(f"{option} {name} is given {len(paths)} times")
    return {name: paths[0] for name, paths in found.items()}


def _check_task(task: str) -> None:
    if task not in ("cells", "genes"):
        raise UserError(f"no task {task!r}", fix="give --task cells or --task genes")


def split(
    task: Task,
    label: Annotated[str, typer.Option(help="Column of classes.")],
    output: opt.Output,
    cells: Annotated[
        list[str] | None,
        typer.Option(metavar=NAMED, help="cells.parquet of a dataset; genes: with --match."),
    ] = None,
    unit: Annotated[str | None, typer.Option(help="cells: column of donors or batches to hold out.")] = None,
    train: Annotated[list[str] | None, typer.Option(help="cells, transfer: datasets to train on.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="cells, transfer: datasets to test on.")] = None,
    across: Annotated[
        bool,
        typer.Option(
            "--across", help="cells, transfer: datasets share units; test on one unit, train on the others."
        ),
    ] = False,
    given: Annotated[Path | None, typer.Option(help="cells: JSON file with a split of your own.")] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(metavar=NAMED, help="cells: token shards; only cells that have tokens."),
    ] = None,
    folds: Annotated[int, typer.Option(help="Folds over units, cells or genes.", min=2)] = 5,
    labels: Annotated[Path | None, typer.Option(help="genes: table of labelled genes.")] = None,
    gene: Annotated[str, typer.Option(help="genes: its column of gene ids.")] = "gene_id",
    positive: Annotated[str | None, typer.Option(help="genes: the class that is scored.")] = None,
    embeddings: Annotated[
        list[Path] | None, typer.Option(help="genes: gene embeddings to be scored.")
    ] = None,
    group: Annotated[str | None, typer.Option(help="genes: column of genes to keep on one side.")] = None,
    match: Annotated[
        str | None, typer.Option(help="genes: `expression` keeps pairs of both classes alike in expression.")
    ] = None,
    counts: Annotated[list[Path] | None, typer.Option(help="genes, --match: counts shards.")] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(help="genes, --match: maps features of the counts to genes.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="genes: name of the dataset of the embeddings.")] = "",
    note: Annotated[str | None, typer.Option(help="A caveat to print beside every score.")] = None,
    seed: opt.Seed = 0,
) -> None:
    """Split cells or genes into training and test, once for all methods of a benchmark.

    Example: cellformers split --task cells --cells a=cells.parquet --label cell_type --unit donor -o split.json
    """
    from cellformers.evaluate.cell_splits import make_cell_split
    from cellformers.evaluate.gene_splits import make_gene_split

    _check_task(task)
    if task == "cells":
        if not cells:
            raise UserError("a split of cells needs --cells NAME=PATH")
        make_cell_split(
            cells=one_each(cells, "--cells"), label=label, unit=unit, train=train, test=test, across=across,
            given=given, tokens=named_paths(tokens, "--tokens"), folds=folds, seed=seed, note=note,
            output=output,
        )  # fmt: skip
        return
    if labels is None or positive is None or not embeddings:
        raise UserError("a split of genes needs --labels, --positive and --embeddings")
    make_gene_split(
        labels=labels, gene=gene, label=label, positive=positive, group=group, embeddings=embeddings, dataset=dataset,
        match=match, counts=counts or (), cells=next(iter(one_each(cells, "--cells").values()), None),
        vocabulary=vocabulary, folds=folds, seed=seed, note=note, output=output,
    )  # fmt: skip


def evaluate(
    task: Task,
    split_file: Annotated[Path, typer.Option("--split", help="What `split` wrote.")],
    method: Annotated[str, typer.Option(help="Name of the method in the tables.")],
    features: Annotated[str, typer.Option(help="embedding, or the name of a baseline.")],
    output: opt.Output,
    predictions: Annotated[Path, typer.Option(help="Where one prediction a row goes.")],
    cells: Annotated[list[str], typer.Option(metavar=NAMED, help="cells.parquet of a dataset.")],
    input_files: Annotated[
        list[str] | None,
        typer.Option("--input", metavar=NAMED, help="Embeddings, counts or tokens of a dataset."),
    ] = None,
    benchmark: Annotated[str, typer.Option(help="Name of the benchmark.")] = "benchmark",
    kind: Annotated[str, typer.Option(help="model, baseline, control or oracle.")] = "model",
    permute: Annotated[bool, typer.Option("--permute", help="Shuffle the labels first: a control.")] = False,
    batch: Annotated[
        str | None, typer.Option(help="features harmony: column of batches to mix, or `dataset`.")
    ] = None,
    fold_model: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="features finetuned: the model of each fold, in their order."),
    ] = None,
    classifier: Annotated[str, typer.Option(help="genes: logistic, svm or forest.")] = "logistic",
    max_cells: Annotated[
        int, typer.Option(help="genes, features ranks and counts: cells that describe a gene.", min=1)
    ] = 10_000,
    column: Annotated[str | None, typer.Option(help="genes, features column: the column.")] = None,
    gene: Annotated[str, typer.Option(help="genes, features column: column of gene ids.")] = "gene_id",
    vocabulary: Annotated[Path | None, typer.Option(help="Maps features of counts to genes.")] = None,
    published: Annotated[list[str] | None, typer.Option(metavar=PUBLISHED)] = None,
    threads: opt.Threads = 1,
) -> None:
    """Score one method on one benchmark, with intervals; features and baselines by logistic regression.

    Example: cellformers evaluate --task cells --split split.json --method v2 --features embedding --cells
    a=cells.parquet --input a=v2.h5ad --predictions v2.predictions.parquet -o v2.json
    """
    from cellformers.evaluate.cells import evaluate_cells
    from cellformers.evaluate.genes import evaluate_genes

    _check_task(task)
    numbers = [published_number(word) for word in published or []]
    tables, inputs = one_each(cells, "--cells"), named_paths(input_files, "--input")
    if task == "cells":
        if classifier != "logistic":
            raise UserError(f"--classifier {classifier} is for genes", fix="leave it out")
        evaluate_cells(
            benchmark=benchmark, method=method, kind=kind, split=split_file, cells=tables, features=features,
            inputs=inputs, permute=permute, batch=batch, fold_models=fold_model or (), vocabulary=vocabulary,
            published=numbers, threads=threads, output=output, predictions=predictions,
        )  # fmt: skip
    else:
        evaluate_genes(
            benchmark=benchmark, method=method, kind=kind, split=split_file, features=features,
            inputs=[path for paths in inputs.values() for path in paths],
            cells=next(iter(tables.values()), None), column=column, gene=gene, permute=permute, classifier=classifier,
            max_cells=max_cells, fold_models=fold_model or (), vocabulary=vocabulary, published=numbers,
            threads=threads, output=output, predictions=predictions,
        )  # fmt: skip


def published_number(word: str) -> dict[str, str | float | None]:
    """A published number; SD and PROTOCOL may be empty or left out."""
    metric, value, source, sd, protocol = [*word.split("|", 4), "", "", "", ""][:5]
    try:
        number, spread = float(value), float(sd) if sd else None
    except ValueError:
        raise UserError(f"--published {word!r} is not {PUBLISHED}") from None
    return {"metric": metric, "value": number, "source": source, "sd": spread, "protocol": protocol or None}


def summarize(
    scores: Annotated[
        list[Path] | None, typer.Argument(metavar="SCORE...", help="What `evaluate` wrote.")
    ] = None,
    output: opt.Output = Path("benchmarks.tsv"),
) -> None:
    """Put the scores of every method on every benchmark into one table.

    Example: cellformers summarize benchmarks/*/*.json -o benchmarks.tsv
    """
    from cellformers.evaluate.scores import summarise

    summarise(scores or [], output)


def map_cells(
    embeddings: Annotated[Path, typer.Argument(help="An embedding .h5ad, by `gather`.")],
    output: opt.Output,
    seed: opt.Seed = 0,
) -> None:
    """Lay the cells of an embedding out in the plane (UMAP).

    Example: cellformers map embeddings/v2.h5ad -o v2.map.parquet
    """
    from cellformers.maps import umap

    umap(embeddings, output, seed=seed)


def report(
    config: Annotated[Path, typer.Option(help="The config of the run.")],
    results: Annotated[Path, typer.Option(help="Its folder of results.")],
    output: opt.Output,
    score: Annotated[
        list[Path] | None, typer.Option(help="Scores to show (default: all in the results).")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the page.")] = None,
) -> None:
    """Write one page about a run: quality control, training, maps, scores beside baselines, speed, versions.

    Example: cellformers report --config config/config.yaml --results results -o results/report.html
    """
    from cellformers.config import load_file
    from cellformers.report import from_config, write_report

    if output.suffix != ".html":  # of the run, perhaps
        raise UserError("should be a .html file", path=output, fix="name it so")
    write_report(from_config(load_file(config), results, scores=score or None, title=title), output)


VERBS = {"split": split, "evaluate": evaluate, "summarize": summarize, "map": map_cells, "report": report}
