"""Which files a configuration makes and reads: what the rules plan, as names below the results folder.

    artefacts(config)     every file and folder that `snakemake` makes, but for logs and measurements
    inputs(config)        every raw file or folder that it reads, as the config writes it

A test compares `artefacts` with the plans of Snakemake, so that a rule's new output is not forgotten here.
"""

from collections.abc import Iterator
from pathlib import Path

from cellformers.config import (
    FINETUNED_SUFFIX,
    RANDOM_SUFFIX,
    CellBenchmark,
    Config,
    GeneBenchmark,
    MixingBenchmark,
)
from cellformers.errors import UserError
from cellformers.io.files import read_json
from cellformers.io.samples import read_sample_table

VOCABULARY_FILES = ("tokens.parquet", "aliases.parquet", "vocabulary.json")
SIMULATED = ("atlas.h5ad", "second.loom", "gene_labels.csv", "out_degrees.csv", "truth.json")
FOLDERS = ("figures", "tables")
"""Folders of the report, whose files no rule names."""


def artefacts(config: Config) -> list[str]:
    """What a run makes, relative to its results folder, sorted; folders of deposits and of the report as such.

    Files that a run removes again (weights of folds), logs and measurements of time and memory are no artefacts.
    """
    parts = (_data, _words, _models, _embeddings, _benchmarks)
    found = {name for part in parts for name in part(config)}
    found |= {"benchmarks.tsv", "config.yaml", "report.html", *FOLDERS}
    return sorted(found)


def inputs(config: Config) -> list[str]:
    """Raw files and folders that a run reads, as the config (or a table of samples beside itself) names them, sorted.

    Raises
    ------
    UserError
        If a table of samples can't be read.
    """
    found: set[Path] = set()
    for dataset in config.datasets.values():
        found |= {path for path in (dataset.path, dataset.samples) if path is not None}
        if dataset.samples is not None:
            found |= {Path(row["path"]) for row in read_sample_table(dataset.samples)}
        if dataset.labels is not None:
            found.add(dataset.labels.path)
    for model in config.models.values():
        if model.path is not None:
            found.add(model.path)
        if model.finetune is not None and model.finetune.labels is not None:
            found.add(model.finetune.labels)
    for name in _used_vocabularies(config):
        source = config.vocabularies.get(name)
        if source is not None and source.published is not None:
            found.add(source.published)
    for benchmark in config.benchmarks.values():
        if isinstance(benchmark, CellBenchmark) and benchmark.split is not None:
            found.add(benchmark.split)
        if isinstance(benchmark, GeneBenchmark) and benchmark.labels.path is not None:
            found.add(benchmark.labels.path)
    return sorted(str(path) for path in found)


def shard_names(config: Config, dataset: str) -> list[str]:
    """The shards of a dataset, e.g. 0001-of-0002."""
    total = config.datasets[dataset].shards
    return [f"{number:04d}-of-{total:04d}" for number in range(1, total + 1)]


def number_of_folds(benchmark: CellBenchmark | GeneBenchmark) -> int:
    """Folds of a benchmark; a split that is given has them in its file (UserError where it has none)."""
    if isinstance(benchmark, GeneBenchmark):
        return benchmark.folds
    if benchmark.split is not None:
        try:
            return len(read_json(benchmark.split)["folds"])
        except (KeyError, TypeError):
            raise UserError("is no file with a list of folds", path=benchmark.split) from None
    return 1 if benchmark.test and not benchmark.across else benchmark.folds


def _sharded(config: Config, dataset: str, pattern: str) -> Iterator[str]:
    for shard in shard_names(config, dataset):
        yield f"{dataset}/{pattern.format(shard)}"


def _used_vocabularies(config: Config) -> list[str]:
    return list(dict.fromkeys(map(config.vocabulary_of, config.models)))


def _data(config: Config) -> Iterator[str]:
    """Counts, quality control, tokens."""
    simulated = [bool(dataset.simulated) for dataset in config.datasets.values()]
    simulated += [b.labels.simulated for b in config.benchmarks.values() if isinstance(b, GeneBenchmark)]
    simulated += [model.finetune.simulated for model in config.models.values() if model.finetune]
    if any(simulated):
        yield from (f"simulated/{name}" for name in SIMULATED)
    for name, dataset in config.datasets.items():
        if dataset.deposit:
            yield f"deposits/{dataset.deposit}"
        yield from (f"{name}/{file}" for file in ("metadata.parquet", "features.parquet", "cells.parquet"))
        yield from (f"{name}/qc/{file}" for file in ("thresholds.json", "thresholds.png", "thresholds.svg"))
        yield f"{name}/qc/columns.json"
        if dataset.qc.doublets:
            yield f"{name}/qc/doublets.parquet"
        yield from _sharded(config, name, "counts/{}.h5ad")
        yield from _sharded(config, name, "qc/metrics/{}.parquet")
        for vocabulary in _used_vocabularies(config):
            yield f"{name}/qc/genes.{vocabulary}.json"
            yield from _sharded(config, name, f"tokens/{vocabulary}/{{}}.parquet")


def _words(config: Config) -> Iterator[str]:
    """Vocabularies, and the medians they are made of."""
    brought = {config.vocabulary_of(name) for name, model in config.models.items() if model.checkpoint}
    for vocabulary in _used_vocabularies(config):
        source = config.vocabularies.get(vocabulary)
        if source is not None or vocabulary not in brought:
            yield from (f"vocabularies/{vocabulary}/{file}" for file in VOCABULARY_FILES)
        if source is not None and source.corpus:
            yield f"corpora/{source.corpus}/medians.parquet"
            for dataset in config.corpora[source.corpus].datasets:
                yield from _sharded(config, dataset, "medians/{}.parquet")


def _models(config: Config) -> Iterator[str]:
    """Models, and what those trained here predict."""
    files = ["config.json", "model.safetensors", *(f"vocabulary/{name}" for name in VOCABULARY_FILES)]
    for name, model in config.models.items():
        more = ["training.json", "loss.tsv"] if model.pretrain or model.finetune else []
        more += ["split.json", "predictions.parquet"] if model.finetune else []
        yield from (f"models/{name}/{file}" for file in [*files, *more])
        if model.verify:
            yield f"models/{name}.verify.json"
        for dataset in model.finetune.predict if model.finetune else ():
            yield f"{dataset}/predictions/{name}.parquet"
    for name in _random_models(config):
        yield from (f"models/{name}/{file}" for file in files)


def _random_models(config: Config) -> set[str]:
    """Twins with random weights that a benchmark asks for."""
    found = set()
    for benchmark in config.benchmarks.values():
        found |= {config.embeddings[e].model + RANDOM_SUFFIX for e in _scored(config, benchmark)}
        found |= {start for start in _starts(benchmark) if start.endswith(RANDOM_SUFFIX)}
    return found


def _embeddings(config: Config) -> Iterator[str]:
    for name, embedding in config.embeddings.items():
        for dataset in config.datasets if embedding.datasets is None else embedding.datasets:
            folder = f"{dataset}/embeddings"
            yield from _embedded(config, dataset, name)
            yield f"{folder}/{name}.map.parquet"
            if embedding.states:
                yield f"{folder}/{name}.states.parquet"
    for benchmark in config.benchmarks.values():
        for name in _scored(config, benchmark):
            for dataset in benchmark.datasets:
                if isinstance(benchmark, GeneBenchmark):
                    for each in (name, name + RANDOM_SUFFIX):
                        yield f"{dataset}/gene_embeddings/{each}.parquet"
                        yield from _sharded(config, dataset, f"gene_embeddings/{each}/{{}}.parquet")
                else:
                    yield from _embedded(config, dataset, name + RANDOM_SUFFIX)


def _embedded(config: Config, dataset: str, embedding: str) -> Iterator[str]:
    yield f"{dataset}/embeddings/{embedding}.h5ad"
    yield from _sharded(config, dataset, f"embeddings/{embedding}/{{}}.parquet")


AnyBenchmark = CellBenchmark | GeneBenchmark | MixingBenchmark


def _scored(config: Config, benchmark: AnyBenchmark) -> list[str]:
    """Embeddings scored in a benchmark: those named, else all that cover its datasets and have not seen its labels."""
    if benchmark.embeddings is not None:
        return list(benchmark.embeddings)
    return [
        name
        for name, embedding in config.embeddings.items()
        if set(benchmark.datasets)
        <= set(config.datasets if embedding.datasets is None else embedding.datasets)
        and not config.taught(embedding.model, benchmark)
    ]


def _starts(benchmark: AnyBenchmark) -> list[str]:
    """Models that are fine-tuned in a benchmark, with their twins where it asks for them."""
    settings = None if isinstance(benchmark, MixingBenchmark) else benchmark.finetune
    if settings is None:
        return []
    twins = [name + RANDOM_SUFFIX for name in settings.models] if settings.untrained else []
    return [*settings.models, *twins]


def _benchmarks(config: Config) -> Iterator[str]:
    """Splits, fine-tunings of the folds, scores and predictions."""
    for name, benchmark in config.benchmarks.items():
        folder = f"benchmarks/{name}"
        scored, starts = _scored(config, benchmark), _starts(benchmark)
        methods = [each for embedding in scored for each in (embedding, embedding + RANDOM_SUFFIX)]
        methods += [start + FINETUNED_SUFFIX for start in starts] + [*benchmark.baselines, "permuted"]
        genes = benchmark if isinstance(benchmark, GeneBenchmark) else None
        if genes and genes.labels.simulated:
            methods.append("oracle")
        yield from (f"{folder}/{method}.json" for method in methods)
        if isinstance(benchmark, MixingBenchmark):
            continue
        yield f"{folder}/split.json"
        yield from (f"{folder}/{method}.predictions.parquet" for method in methods)
        predicted = ["predictions.parquet", *(["predictions_pooled.parquet"] if genes else [])]
        for start in starts:
            for fold in range(1, number_of_folds(benchmark) + 1):
                for file in ("training.json", "loss.tsv", "split.json", *predicted):
                    yield f"{folder}/finetuned/{start}/fold-{fold}/{file}"
        if genes and genes.labels.deposit is not None:
            labels = genes.labels
            used = [config.embeddings[e].model for e in scored]
            used += [start.removesuffix(RANDOM_SUFFIX) for start in starts]
            vocabulary = config.vocabulary_of(next(iter([*used, *config.models])))
            yield f"deposits/{labels.deposit}"
            yield f"labels/{labels.deposit}.{labels.part}.{vocabulary}.csv"
