"""The whole configuration, and how it is read.

The config holds science only: threads, memory, partitions and output folders belong to profiles and to the command
line. Paths are relative to the working directory of the run.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from cellformers.config.benchmarks import (
    EXTRA_METRICS,
    MAIN_METRICS,
    Benchmark,
    CellBaseline,
    CellBenchmark,
    GeneBaseline,
    GeneBenchmark,
    GeneLabels,
    MixingBaseline,
    MixingBenchmark,
    Published,
)
from cellformers.config.data import QC, Corpus, Dataset, Labels, Simulate, VocabularySource
from cellformers.config.finetuning import BenchmarkFinetune, Finetune, Lora
from cellformers.config.models import Embedding, Model, Pretrain
from cellformers.config.section import Name, Section
from cellformers.errors import UserError, did_you_mean
from cellformers.resources import read_yaml, resource

RESERVED = (
    "benchmarks", "corpora", "deposits", "figures", "labels", "logs", "models", "runtime", "simulated", "tables",
    "vocabularies", "benchmarks.tsv", "config.yaml", "provenance.json", "report.html",
)  # fmt: skip
METHODS = (
    *dict.fromkeys([*get_args(CellBaseline), *get_args(GeneBaseline), *get_args(MixingBaseline)]),
    "permuted",
    "oracle",
)
RANDOM_SUFFIX = "-random"
FINETUNED_SUFFIX = "-finetuned"


@cache
def registered_models() -> dict[str, str]:
    """The vocabulary of every registered checkpoint, by its name."""
    path = resource("checkpoints.yaml")
    with _registry(path):
        return {str(name): str(entry["vocabulary"]) for name, entry in read_yaml(path)["models"].items()}


def registered_parts(deposit: str, kind: Literal["cells", "genes"]) -> dict[str, dict[str, Any]]:
    """The parts of a registered deposit of cells or of gene labels, as the registry has them.

    Raises
    ------
    ValueError
        If there is no such deposit, or it holds the other kind.
    """
    try:
        path = resource(f"datasets/{deposit}.yaml")
    except FileNotFoundError:
        raise ValueError(
            f"no deposit {deposit!r} is registered; `cellformers download --list` shows those there are"
        ) from None
    with _registry(path):
        entry = read_yaml(path)
        holds, parts = str(entry["kind"]), {str(name): dict(part) for name, part in entry["parts"].items()}
    if holds != kind:
        raise ValueError(f"the deposit {deposit} holds {holds}, not {kind}")
    return parts


@contextmanager
def _registry(path: Path) -> Iterator[None]:
    """Within it, what is not as a registry has it is said of its file."""
    try:
        yield
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"is no entry of a registry ({error})", path=path, fix="mend it") from error


class Config(Section):
    """The whole configuration."""

    accelerator: Literal["cpu", "cuda"] = Field(
        "cpu", description="`cuda` makes the rules that compute with a model ask for one NVIDIA GPU each"
    )
    seed: int = Field(0, description="seed of splits, bootstraps and maps", ge=0)
    simulate: Simulate = Field(Simulate(), description="the simulation, where a dataset asks for it")
    datasets: dict[Name, Dataset] = Field(description="datasets by name", min_length=1)
    corpora: dict[Name, Corpus] = Field(default_factory=dict, description="own corpora by name")
    vocabularies: dict[Name, VocabularySource] = Field(
        default_factory=dict, description="vocabularies by name"
    )
    models: dict[Name, Model] = Field(default_factory=dict, description="models by name")
    embeddings: dict[Name, Embedding] = Field(default_factory=dict, description="embeddings by name")
    benchmarks: dict[Name, Benchmark] = Field(default_factory=dict, description="benchmarks by name")

    def lineage(self, model: str) -> list[str]:
        """The model, the one it was fine-tuned or continued from, and so on; ValueError where they go in a circle."""
        line = [model]
        while True:
            spec = self.models[line[-1]]
            start = spec.finetune.model if spec.finetune else spec.pretrain and spec.pretrain.continue_from
            if not start:
                return line
            if start in line:
                raise ValueError(f"models.{model}: {' and '.join(line)} start from each other")
            line.append(start)

    def vocabulary_of(self, model: str) -> str:
        """The vocabulary a model reads: of the config, of its checkpoint, or the folder's own.

        A fine-tuned or continued model has that of the model it starts from; a folder that carries its own lends it
        the model's name.
        """
        first = self.lineage(model)[-1]
        spec = self.models[first]
        return spec.vocabulary or registered_models().get(spec.checkpoint or "", first)

    def taught(self, model: str, benchmark: Benchmark) -> str | None:
        """What of a benchmark's answers a model has seen in fine-tuning, in words; None where nothing.

        Labels of cells are those of a dataset. Labels of genes are the same whatever the cells they were learnt on.
        """
        specs = [spec for name in self.lineage(model) if (spec := self.models[name].finetune) is not None]
        if isinstance(benchmark, GeneBenchmark):
            return "labels of genes" if any(spec.task == "genes" for spec in specs) else None
        cells = {dataset for spec in specs if spec.task != "genes" for dataset in spec.datasets}
        seen = sorted(cells & set(benchmark.datasets))
        return f"labels of {seen[0]}" if seen else None

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for name in self.datasets:
            if name in RESERVED:
                raise ValueError(f"datasets: the name {name!r} is taken by a results folder")
        for name in self.embeddings:
            if name in (*METHODS, "split", "finetuned"):
                raise ValueError(
                    f"embeddings: the name {name!r} is taken by a method or a file of the benchmarks"
                )
        for name in self.models | self.embeddings:
            for suffix, owner in (
                (RANDOM_SUFFIX, "the random-weights baseline"),
                (FINETUNED_SUFFIX, "fine-tuning in a benchmark"),
            ):
                if name.endswith(suffix):
                    raise ValueError(f"{name!r}: names ending in {suffix!r} are taken by {owner}")

        def known(kind: str, names: list[str] | None, where: str) -> None:
            for name in names or ():
                table: Mapping[str, object] = getattr(self, kind)
                if name not in table:
                    raise ValueError(
                        f"{where}: there is no entry {name!r} in {kind}; {did_you_mean(name, table)}"
                    )

        for name, corpus in self.corpora.items():
            known("datasets", corpus.datasets, f"corpora.{name}.datasets")
        for name, source in self.vocabularies.items():
            known("corpora", [source.corpus] if source.corpus else None, f"vocabularies.{name}.corpus")
        for name, model in self.models.items():
            known(
                "vocabularies", [model.vocabulary] if model.vocabulary else None, f"models.{name}.vocabulary"
            )
            if model.path is not None and model.vocabulary is None and name in self.vocabularies:
                raise ValueError(
                    f"models.{name}: give vocabulary: {name}, or rename the vocabulary of that name"
                )
            if model.pretrain:
                start = model.pretrain.continue_from
                known("datasets", model.pretrain.datasets, f"models.{name}.pretrain.datasets")
                known("models", [start] if start else None, f"models.{name}.pretrain.continue_from")
            if model.finetune:
                spec, where = model.finetune, f"models.{name}.finetune"
                known("models", [spec.model], f"{where}.model")
                known("datasets", spec.datasets, f"{where}.datasets")
                known("datasets", spec.predict, f"{where}.predict")
            if model.checkpoint is not None and model.checkpoint not in registered_models():
                hint = did_you_mean(model.checkpoint, registered_models())
                raise ValueError(f"models.{name}.checkpoint: {model.checkpoint!r} is not registered; {hint}")
        for name in self.models:
            self.vocabulary_of(name)
        for name, embedding in self.embeddings.items():
            known("models", [embedding.model], f"embeddings.{name}.model")
            known("datasets", embedding.datasets, f"embeddings.{name}.datasets")
        for name, dataset in self.datasets.items():
            if dataset.deposit is not None:
                self._check_part(f"datasets.{name}", dataset.deposit, dataset.part, "cells")
        for name, benchmark in self.benchmarks.items():
            where = f"benchmarks.{name}"
            shown = (*MAIN_METRICS[benchmark.task], *EXTRA_METRICS[benchmark.task])
            for number in benchmark.published:
                if number.metric not in shown:
                    raise ValueError(
                        f"{where}.published: no table shows {number.metric!r}; {did_you_mean(number.metric, shown)}"
                    )
            known("embeddings", benchmark.embeddings, f"{where}.embeddings")
            if isinstance(benchmark, CellBenchmark):
                known("datasets", benchmark.train, f"{where}.train")
                known("datasets", benchmark.test, f"{where}.test")
                both = set(benchmark.train) & set(benchmark.test or ())
                if both:
                    raise ValueError(f"{where}: {', '.join(sorted(both))} is in train and in test")
            else:
                key = "dataset" if isinstance(benchmark, GeneBenchmark) else "datasets"
                known("datasets", benchmark.datasets, f"{where}.{key}")
            if isinstance(benchmark, GeneBenchmark) and benchmark.labels.deposit is not None:
                labels = benchmark.labels
                part = self._check_part(f"{where}.labels", str(labels.deposit), str(labels.part), "genes")
                if labels.positive is not None and labels.positive not in part["classes"]:
                    hint = did_you_mean(labels.positive, part["classes"])
                    raise ValueError(f"{where}.labels.positive: no class is {labels.positive!r}; {hint}")
            if not isinstance(benchmark, MixingBenchmark) and benchmark.finetune is not None:
                known("models", benchmark.finetune.models, f"{where}.finetune.models")
                for start in benchmark.finetune.models:
                    self._check_untaught(where, f"model {start}", start, benchmark)
            for embedding_name in benchmark.embeddings or ():
                embedding = self.embeddings[embedding_name]
                self._check_untaught(
                    where, f"the model of embedding {embedding_name}", embedding.model, benchmark
                )
                scope = embedding.datasets
                missing = [d for d in benchmark.datasets if scope is not None and d not in scope]
                if missing:
                    raise ValueError(
                        f"{where}: embedding {embedding_name} does not cover dataset {missing[0]}"
                    )
        return self

    def _check_untaught(self, where: str, what: str, model: str, benchmark: Benchmark) -> None:
        seen = self.taught(model, benchmark)
        if seen:
            raise ValueError(
                f"{where}: {what} was fine-tuned on {seen}, so its scores there would say nothing"
            )

    def _check_part(
        self, where: str, deposit: str, part: str, kind: Literal["cells", "genes"]
    ) -> dict[str, Any]:
        """The part of a deposit; ValueError where there is no such deposit, or no such part of it."""
        try:
            parts = registered_parts(deposit, kind)
        except ValueError as error:
            raise ValueError(f"{where}.deposit: {error}") from None
        if part not in parts:
            raise ValueError(f"{where}.part: {deposit} has no part {part!r}; {did_you_mean(part, parts)}")
        return parts[part]


def _location(error: Mapping[str, Any]) -> str:
    parts = [str(part) for part in error["loc"] if part != "[key]"]
    if len(parts) > 2 and parts[0] == "benchmarks" and parts[2] in ("cells", "genes", "mixing"):
        del parts[2]  # the task, by which pydantic told the two kinds of benchmark apart
    return ".".join(parts)


PLAIN = {
    "string_pattern_mismatch": "names are made of letters, digits and _ . + -, and begin with a letter or digit",
    "string_type": "has to be text; put it in quotes",
    "list_type": "has to be a list; write [one, two]",
    "dict_type": "has to be a section of its own, with keys",
    "model_type": "has to be a section of its own, with keys",
    "missing": "is missing",
}


def _section_fields(location: tuple[Any, ...]) -> list[str]:
    """The keys allowed where an unknown key was found, by walking the models along the location."""
    model: type[BaseModel] | None = Config
    by_key: dict[str, type[BaseModel]] = {
        "simulate": Simulate, "qc": QC, "labels": Labels, "pretrain": Pretrain, "finetune": Finetune, "lora": Lora,
        "published": Published,
    }  # fmt: skip
    tables: dict[str, type[BaseModel]] = {
        "datasets": Dataset, "corpora": Corpus, "vocabularies": VocabularySource, "models": Model,
        "embeddings": Embedding,
    }  # fmt: skip
    parts = [str(p) for p in location[:-1]]
    for position, part in enumerate(parts):
        if position == 1 and parts[0] in tables:
            model = tables[parts[0]]
        elif position == 1 and parts[0] == "benchmarks":
            kinds: dict[str, type[BaseModel]] = {"genes": GeneBenchmark, "mixing": MixingBenchmark}
            model = next((kind for task, kind in kinds.items() if task in parts), CellBenchmark)
        elif part == "labels" and model is GeneBenchmark:
            model = GeneLabels
        elif part == "finetune" and model in (CellBenchmark, GeneBenchmark):
            model = BenchmarkFinetune
        elif part in by_key:
            model = by_key[part]
    return list(model.model_fields) if model is not None else []


def load(values: Mapping[str, Any], *, path: str | Path = "config") -> Config:
    """Validate a parsed configuration.

    Raises
    ------
    UserError
        One line that names the first wrong key, what is wrong, and for a misspelt key the nearest right one.
    """
    if not isinstance(values, Mapping):
        raise UserError("is not a YAML mapping", path=path, fix="start from config/config.yaml")
    try:
        return Config.model_validate(dict(values))
    except ValidationError as failure:
        errors = failure.errors()
        error = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        where = _location(error)
        if error["type"] == "extra_forbidden":
            key = str(error["loc"][-1])
            hint = did_you_mean(key, _section_fields(error["loc"]))
            raise UserError(f"unknown key {where!r}", path=path, fix=hint) from None
        message = PLAIN.get(error["type"]) or re.sub(r"^Value error, ", "", str(error["msg"]))
        raise UserError(f"{where}: {message}" if where else message, path=path) from None


def load_file(path: str | Path) -> Config:
    """Read and validate a YAML config file; UserError as `load`, and for what is not YAML."""
    try:
        values = read_yaml(path)
    except OSError as error:
        raise UserError(f"can't be read ({error})", path=path) from None
    except ValueError as error:
        raise UserError(f"is not YAML ({error})", path=path) from None
    return load(
        {k: v for k, v in values.items() if k != "pathvars"} if isinstance(values, dict) else values,
        path=path,
    )
