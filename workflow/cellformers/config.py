"""The configuration of the workflow: defaults and validation in one place (its texts: `config_docs`).

The config holds science only: threads, memory, partitions and output folders belong to profiles and to the command
line. Paths are relative to the working directory of the run.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cellformers.errors import UserError, did_you_mean

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
RESERVED = (
    "benchmarks", "corpora", "figures", "logs", "models", "runtime", "simulated", "vocabularies",
    "benchmarks.tsv", "config.yaml", "report.html",
)  # fmt: skip
METHODS = (
    "pca_hvg", "log_counts", "mean_expression", "detection", "coexpression_pca", "permuted", "oracle",
)  # fmt: skip
RANDOM_SUFFIX = "-random"


class Section(BaseModel):
    """A part of the config: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Simulate(Section):
    """The demo's simulated deposits: an atlas (h5ad), a second platform (loom), gene labels, and their truth."""

    seed: int = Field(0, description="seed of the generator", ge=0)
    cells: int = Field(3000, description="cells of the atlas; the second dataset has a third of them", ge=300)


class Labels(Section):
    """A table of cell labels to join."""

    path: Path = Field(description="csv, tsv or Parquet table, gzipped or not")
    key: str = Field(description="its column that holds the cell names (or barcodes)")


class QC(Section):
    """Which cells pass."""

    method: Literal["sd", "mad", "fixed", "none"] = Field(
        "sd",
        description="`sd`: within n_sd standard deviations of the dataset's mean of total counts and of "
        "mitochondrial fraction (Genecorpus); `mad`: the same with medians and median absolute deviations of "
        "log counts; `fixed`: the bounds given below; `none`: only min_genes",
    )
    n_sd: float = Field(3.0, description="width for `sd` and `mad`", gt=0)
    min_genes: int = Field(7, description="detected features a cell must have", ge=0)
    min_counts: float | None = Field(None, description="`fixed`: least total counts", ge=0)
    max_counts: float | None = Field(None, description="`fixed`: most total counts", gt=0)
    max_mito_fraction: float | None = Field(
        None, description="`fixed`: highest mitochondrial fraction", gt=0, le=1
    )
    doublets: bool = Field(
        False, description="score doublets with scrublet, per batch over the whole dataset, and drop them"
    )

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        for key in ("min_counts", "max_counts", "max_mito_fraction"):
            if getattr(self, key) is not None and self.method != "fixed":
                raise ValueError(f"{key} is used by method: fixed only, the method is {self.method}")
        return self


class Dataset(Section):
    """One dataset: a file, several files, or a part of the simulation."""

    path: Path | None = Field(
        None,
        description="one count file or folder: h5ad, loom, AnnData zarr, 10x .h5, 10x mtx folder, dense csv/tsv",
    )
    samples: Path | None = Field(
        None,
        description="a csv/tsv table with columns sample, path and any others: several files, one dataset",
    )
    simulated: Literal["atlas", "second"] | None = Field(None, description="a part of the simulation")
    shards: int = Field(1, description="contiguous row ranges to work on in parallel", ge=1)
    layer: str | None = Field(None, description="h5ad/zarr: read counts from this layer")
    raw: bool = Field(False, description="h5ad/zarr: read counts from `raw`")
    round: bool = Field(False, description="round counts to integers (alevin, SoupX)")
    make_unique: bool = Field(False, description="number duplicate cell names instead of refusing them")
    genes_in_rows: bool | None = Field(None, description="dense text: orientation, where it can't be guessed")
    gene_column: str | None = Field(None, description="column or attribute that holds the gene ids")
    cell_column: str | None = Field(None, description="column or attribute that holds the cell names")
    labels: Labels | None = Field(None, description="a label table to join: {path, key}")
    label: str | None = Field(None, description="metadata column to colour the map of cells by")
    batch: str | None = Field(None, description="metadata column of the donor, batch or library")
    qc: QC = Field(QC(), description="quality control")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [k for k in ("path", "samples", "simulated") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of path, samples, simulated (given: {', '.join(given) or 'none'})"
            )
        if self.layer is not None and self.raw:
            raise ValueError("give layer or raw, not both")
        return self


class Corpus(Section):
    """Datasets whose cells make gene medians."""

    datasets: list[Name] = Field(description="names of datasets", min_length=1)


class VocabularySource(Section):
    """Where a vocabulary comes from: published dictionaries or the medians of an own corpus."""

    published: Path | None = Field(
        None, description="folder with Geneformer's four dictionaries (.pkl), or a vocabulary folder"
    )
    corpus: Name | None = Field(None, description="a corpus of this config")
    special_tokens: Literal["v1", "v2"] = Field(
        "v2", description="own corpus: `v2` puts `<cls>` and `<eos>` around a cell, `v1` does not"
    )
    context_length: int | None = Field(
        None, description="own corpus: longest sequence (default 2048 for v1, 4096 for v2)", ge=8
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.published is None) == (self.corpus is None):
            raise ValueError("give either published or corpus")
        return self


class Pretrain(Section):
    """Masked-gene pretraining of a small model."""

    datasets: list[Name] | None = Field(None, description="datasets to train on (default: all)")
    layers: int = Field(2, description="encoder layers", ge=1)
    hidden_size: int = Field(128, description="width", ge=8)
    heads: int = Field(4, description="attention heads", ge=1)
    intermediate_size: int = Field(256, description="width of the feed-forward layer", ge=8)
    steps: int = Field(2000, description="optimiser steps", ge=1)
    batch_tokens: int = Field(4096, description="tokens of a batch", ge=64)
    learning_rate: float = Field(2e-3, description="peak learning rate", gt=0)
    seed: int = Field(0, description="seed of weights, order and masks", ge=0)


class Model(Section):
    """A model: a folder with published weights, or one to pretrain in the run."""

    path: Path | None = Field(
        None, description="folder with config.json and model.safetensors (and vocabulary/)"
    )
    pretrain: Pretrain | None = Field(None, description="train it here")
    vocabulary: Name | None = Field(
        None, description="a vocabulary of this config; may be left out where the folder carries its own"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.pretrain is None):
            raise ValueError("give either path or pretrain")
        if self.pretrain is not None and self.vocabulary is None:
            raise ValueError("pretrain needs a vocabulary")
        return self


class Embedding(Section):
    """A view of the cells: which model, which vectors."""

    model: Name = Field(description="a model of this config")
    mode: Literal["cls", "cell"] | None = Field(
        None,
        description="`cls` vector or `cell` mean over genes (default: cls where the vocabulary has `<cls>`)",
    )
    layer: int = Field(-1, description="0 = last layer, -1 = second to last, and so on", le=0)
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the computation")
    datasets: list[Name] | None = Field(None, description="datasets to embed (default: all)")


class GeneLabels(Section):
    """A table of labelled genes."""

    path: Path | None = Field(None, description="csv/tsv with one gene a row")
    simulated: bool = Field(False, description="use the labels of the simulation")
    gene: str = Field("gene_id", description="column of gene ids")
    label: str = Field("label", description="column of classes; the default suits the simulation")
    positive: str = Field("sensitive", description="the class whose probability is scored")
    group: str | None = Field(
        None, description="column of genes to keep on one side of the split, e.g. matched pairs or paralogues"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) != self.simulated:
            raise ValueError("give either path or simulated: true")
        return self


class Published(Section):
    """A published number to show beside the scores."""

    metric: str = Field(description="metric it is about, e.g. auc or macro_f1")
    value: float = Field(description="the value")
    source: str = Field(description="where it stands, and under which protocol")


class CellBenchmark(Section):
    """Annotation of cells by logistic regression on frozen embeddings."""

    task: Literal["cells"] = Field(description="`cells`")
    train: list[Name] = Field(description="datasets to train on", min_length=1)
    test: list[Name] | None = Field(
        None, description="other datasets to test on; left out: cross-validation within `train`"
    )
    label: str = Field(description="metadata column to predict")
    unit: str | None = Field(
        None,
        description="metadata column of donors or batches to hold out; left out: a stratified split, marked so",
    )
    embeddings: list[Name] | None = Field(None, description="embeddings to score (default: all)")
    note: str | None = Field(None, description="a caveat to print beside the scores")
    published: list[Published] = Field(default_factory=list, description="published numbers")


class GeneBenchmark(Section):
    """Classification of genes by logistic regression on frozen gene embeddings, folds over genes."""

    task: Literal["genes"] = Field(description="`genes`")
    dataset: Name = Field(description="dataset whose cells make the gene embeddings")
    labels: GeneLabels = Field(description="labelled genes")
    embeddings: list[Name] | None = Field(None, description="embeddings whose models to score (default: all)")
    note: str | None = Field(None, description="a caveat to print beside the scores")
    published: list[Published] = Field(default_factory=list, description="published numbers")


Benchmark = Annotated[CellBenchmark | GeneBenchmark, Field(discriminator="task")]


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

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        for name in self.datasets:
            if name in RESERVED:
                raise ValueError(f"datasets: the name {name!r} is taken by a results folder")
        for name in self.embeddings:
            if name in (*METHODS, "split"):
                raise ValueError(
                    f"embeddings: the name {name!r} is taken by a method or a file of the benchmarks"
                )
        for name in self.models | self.embeddings:
            if name.endswith(RANDOM_SUFFIX):
                raise ValueError(
                    f"{name!r}: names ending in {RANDOM_SUFFIX!r} are taken by the random-weights baseline"
                )

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
            if model.vocabulary is None and name in self.vocabularies:
                raise ValueError(
                    f"models.{name}: give vocabulary: {name}, or rename the vocabulary of that name"
                )
            if model.pretrain:
                known("datasets", model.pretrain.datasets, f"models.{name}.pretrain.datasets")
        for name, embedding in self.embeddings.items():
            known("models", [embedding.model], f"embeddings.{name}.model")
            known("datasets", embedding.datasets, f"embeddings.{name}.datasets")
        for name, benchmark in self.benchmarks.items():
            where = f"benchmarks.{name}"
            known("embeddings", benchmark.embeddings, f"{where}.embeddings")
            if isinstance(benchmark, CellBenchmark):
                known("datasets", benchmark.train, f"{where}.train")
                known("datasets", benchmark.test, f"{where}.test")
                both = set(benchmark.train) & set(benchmark.test or ())
                if both:
                    raise ValueError(f"{where}: {', '.join(sorted(both))} is in train and in test")
            else:
                known("datasets", [benchmark.dataset], f"{where}.dataset")
            needed = (
                benchmark.train + (benchmark.test or [])
                if isinstance(benchmark, CellBenchmark)
                else [benchmark.dataset]
            )
            for embedding_name in benchmark.embeddings or ():
                scope = self.embeddings[embedding_name].datasets
                missing = [d for d in needed if scope is not None and d not in scope]
                if missing:
                    raise ValueError(
                        f"{where}: embedding {embedding_name} does not cover dataset {missing[0]}"
                    )
        return self


def _location(error: Mapping[str, Any]) -> str:
    parts = [str(part) for part in error["loc"] if part != "[key]"]
    if len(parts) > 2 and parts[0] == "benchmarks" and parts[2] in ("cells", "genes"):
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
        "simulate": Simulate, "qc": QC, "labels": Labels, "pretrain": Pretrain, "published": Published,
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
            model = GeneBenchmark if "genes" in parts else CellBenchmark
        elif part == "labels" and model is GeneBenchmark:
            model = GeneLabels
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
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't be read ({error})", path=path) from None
    except yaml.YAMLError as error:
        raise UserError(f"is not YAML ({error})", path=path) from None
    return load(
        {k: v for k, v in values.items() if k != "pathvars"} if isinstance(values, dict) else values,
        path=path,
    )
