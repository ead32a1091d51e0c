"""What a report is made of: which files belong to which dataset, model, map and benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cellformers.config import Config
from cellformers.report import words
from cellformers.report.statements import statements


@dataclass(frozen=True, kw_only=True)
class DatasetFiles:
    """One dataset.

    Parameters
    ----------
    folder
        Holds cells.parquet; qc/thresholds.json and qc/genes.{vocabulary}.json where there are any.
    label, batch
        Columns of cells.parquet that colour the maps.
    tokens
        Tokens shards, in order, by the name of their vocabulary.
    """

    folder: Path
    label: str | None = None
    batch: str | None = None
    tokens: Mapping[str, Sequence[Path]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MapFile:
    """A map of a dataset's cells: the Parquet file that `maps.umap` wrote for an embedding."""

    dataset: str
    embedding: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class ReportSpec:
    """Everything a report shows; all but the datasets may be left out.

    Parameters
    ----------
    title
        Heading of the page.
    datasets
        By name, in the order of the report.
    models
        Folder by name: config.json and model.safetensors; training.json and loss.tsv where trained here.
    verified
        What `verify` wrote, by the name of the model.
    maps
        Maps of cells.
    scores
        Score files of all methods on all benchmarks, each with METHOD.predictions.parquet beside it.
    statements
        What is to be said of a benchmark beside its scores, by its name; any part may be left out: question, protocol
        (text), new (no publication has a number for it), citation (texts), pretraining (dataset, model, contains: yes,
        no or unknown, source).
    runtime
        Folder of Snakemake's benchmark files.
    config
        The configuration of the run as YAML text.
    """

    title: str = "Single-cell embeddings"
    datasets: Mapping[str, DatasetFiles]
    models: Mapping[str, Path] = field(default_factory=dict)
    verified: Mapping[str, Path] = field(default_factory=dict)
    maps: Sequence[MapFile] = ()
    scores: Sequence[Path] = ()
    statements: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    runtime: Path | None = None
    config: str = ""


def from_config(
    config: Config,
    results: str | Path,
    *,
    scores: Sequence[str | Path] | None = None,
    title: str | None = None,
) -> ReportSpec:
    """The report of a run: what a configuration asks for and the results folder has by now.

    Parameters
    ----------
    results
        Folder in the workflow's layout.
    scores
        Score files, in the order of the report; default: those of the benchmarks of the config that are there.
    """
    results = Path(results)
    vocabularies = dict.fromkeys([*config.vocabularies, *map(config.vocabulary_of, config.models)])
    datasets = {}
    for name, dataset in config.datasets.items():
        shards = [f"{number:04d}-of-{dataset.shards:04d}.parquet" for number in range(1, dataset.shards + 1)]
        tokens = {v: [results / name / "tokens" / v / shard for shard in shards] for v in vocabularies}
        tokens = {v: paths for v, paths in tokens.items() if all(path.is_file() for path in paths)}
        folder = results / name
        datasets[name] = DatasetFiles(folder=folder, label=dataset.label, batch=dataset.batch, tokens=tokens)
    maps = [
        MapFile(
            dataset=dataset, embedding=name, path=results / dataset / "embeddings" / f"{name}.map.parquet"
        )
        for name, embedding in config.embeddings.items()
        for dataset in embedding.datasets or config.datasets
    ]
    if scores is None:
        scores = [
            path
            for benchmark in config.benchmarks
            for path in sorted((results / "benchmarks" / benchmark).glob("[!.]*.json"))
            if path.name != "split.json"
        ]
    models = {name: results / "models" / name for name in config.models}
    return ReportSpec(
        title=title or f"Single-cell embeddings of {words.listing(list(config.datasets), 3)}",
        datasets=datasets,
        models={name: folder for name, folder in models.items() if (folder / "config.json").is_file()},
        verified={
            name: results / "models" / f"{name}.verify.json"
            for name, model in config.models.items()
            if model.verify and (results / "models" / f"{name}.verify.json").is_file()
        },
        maps=[file for file in maps if file.path.is_file()],
        scores=[Path(path) for path in scores],
        statements=statements(config),
        runtime=results / "runtime",
        config=_parameters(config),
    )


def _parameters(config: Config) -> str:
    """The config as YAML without defaults, and without the number of shards, which changes no result."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    values["datasets"] = {
        name: {key: value for key, value in dataset.items() if key != "shards"}
        for name, dataset in values["datasets"].items()
    }
    return yaml.safe_dump(values, sort_keys=False)
