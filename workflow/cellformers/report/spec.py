"""What a report is made of: which files belong to which dataset, model, map and benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


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
    maps
        Maps of cells.
    scores
        Score files of all methods on all benchmarks, each with METHOD.predictions.parquet beside it.
    runtime
        Folder of Snakemake's benchmark files.
    config
        The configuration of the run as YAML text.
    """

    title: str = "Single-cell embeddings"
    datasets: Mapping[str, DatasetFiles]
    models: Mapping[str, Path] = field(default_factory=dict)
    maps: Sequence[MapFile] = ()
    scores: Sequence[Path] = ()
    runtime: Path | None = None
    config: str = ""
