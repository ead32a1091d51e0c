"""Parts of the config about benchmarks."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cellformers.config.finetuning import BenchmarkFinetune
from cellformers.config.section import Name, Once, Section

CellBaseline = Literal["pca_hvg", "log_counts", "rank_only", "harmony"]
GeneBaseline = Literal[
    "mean_expression", "detection", "coexpression_pca",
    "svm_ranks", "forest_ranks", "logistic_ranks", "svm_counts", "forest_counts", "logistic_counts",
]  # fmt: skip
MixingBaseline = Literal["pca_hvg", "harmony", "combat", "scvi"]


MAIN_METRICS = {"cells": ("macro_f1", "accuracy"), "genes": ("auc",), "mixing": ("batch_correction",)}
# shown where a method has them
EXTRA_METRICS = {
    "cells": ("auc", "macro_precision", "macro_recall", "unit_vote"),
    "genes": ("auc_tokens", "average_precision"),
    "mixing": (
        "bio_conservation", "ilisi", "kbet", "graph_connectivity", "silhouette_batch", "clisi", "silhouette_label",
        "nmi", "ari", "isolated_labels",
    ),
}  # fmt: skip


class GeneLabels(Section):
    """Labelled genes: a table, a registered deposit, or those of the simulation."""

    path: Path | None = Field(None, description="csv/tsv with one gene a row")
    deposit: Name | None = Field(
        None, description="a registered deposit of gene labels, e.g. `collins2022` (`download --list`)"
    )
    part: Name | None = Field(None, description="deposit: which of its label sets")
    simulated: bool = Field(False, description="use the labels of the simulation")
    gene: str = Field("gene_id", description="column of gene ids")
    label: str = Field("label", description="column of classes")
    positive: str | None = Field(
        None,
        description="the class whose probability is scored (default: the deposit's, else `sensitive`)",
    )
    group: str | None = Field(
        None, description="column of genes to keep on one side of the split, e.g. matched pairs or paralogues"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if [self.path is not None, self.deposit is not None, self.simulated].count(True) != 1:
            raise ValueError("give exactly one of path, deposit and simulated: true")
        if (self.deposit is None) != (self.part is None):
            raise ValueError("deposit and part go together")
        if self.deposit is not None and (self.gene, self.label, self.group) != ("gene_id", "label", None):
            raise ValueError("a deposit brings its columns: leave gene, label and group out")
        return self


class Published(Section):
    """A published number to show beside the scores."""

    metric: str = Field(description="metric it is about, e.g. auc, auc_tokens or macro_f1")
    value: float = Field(description="the value, a share and no percentage", ge=0, le=1)
    sd: float | None = Field(None, description="its standard deviation or error, as the source has it", ge=0)
    source: str = Field(description="where it stands")
    protocol: str | None = Field(None, description="how it was come by, where that differs from here")

    @model_validator(mode="after")
    def _fit_a_command_line(self) -> Self:
        if any("|" in (text or "") for text in (self.metric, self.source, self.protocol)):
            raise ValueError("metric, source and protocol are without |")
        return self


class _Benchmark(Section):
    """What every benchmark has."""

    question: str | None = Field(None, description="what is asked, in a sentence, for the report")
    protocol: str | None = Field(
        None, description="how it is asked, and where that differs from the publication"
    )
    new: bool = Field(False, description="a new evaluation, which no publication has a number for")
    citation: str | None = Field(None, description="what to cite for labels and task")
    embeddings: Annotated[list[Name], Once] | None = Field(
        None, description="embeddings to score (default: all)"
    )
    note: str | None = Field(None, description="a caveat to print beside the scores")
    published: list[Published] = Field(default_factory=list, description="published numbers")


class CellBenchmark(_Benchmark):
    """Annotation of cells: logistic regression on frozen embeddings, and fine-tuning where asked for."""

    task: Literal["cells"] = Field(description="`cells`")
    train: Annotated[list[Name], Once] = Field(description="datasets to train on", min_length=1)
    test: Annotated[list[Name], Once] | None = Field(
        None, description="other datasets to test on; left out: cross-validation within `train`"
    )
    label: str = Field(description="metadata column to predict")
    unit: str | None = Field(
        None,
        description="metadata column of donors or batches to hold out; left out: a stratified split, marked so",
    )
    across: bool = Field(
        False,
        description="transfer between datasets that share units: test on one unit, train on the others",
    )
    folds: int = Field(5, description="folds over units or cells", ge=2)
    split: Path | None = Field(
        None, description='JSON file with a published split, {"folds": [{"train": [...], "test": [...]}]}'
    )
    batch: str = Field("dataset", description="baseline harmony: column of batches, or `dataset`")
    baselines: Annotated[list[CellBaseline], Once] = Field(
        ["pca_hvg", "log_counts", "rank_only"], description="what embeddings are compared with"
    )
    finetune: BenchmarkFinetune | None = Field(None, description="also fine-tune models in every fold")

    @model_validator(mode="after")
    def _splits_fit(self) -> Self:
        if self.across and (self.test is None or self.unit is None):
            raise ValueError("across needs test and unit: a transfer between datasets that share units")
        if self.split is not None and self.test is not None:
            raise ValueError("give split or test, not both")
        if "harmony" in self.baselines and self.batch == "dataset" and len(self.datasets) < 2:
            raise ValueError(
                "harmony has one batch, the dataset: name a column as batch, or leave harmony out"
            )
        if self.finetune is not None:
            self.finetune.check_task("cells")
        return self

    @property
    def datasets(self) -> list[str]:
        """Datasets whose cells it has."""
        return [*self.train, *(self.test or ())]


class GeneBenchmark(_Benchmark):
    """Classification of genes, folds over genes: logistic regression on frozen gene embeddings, and fine-tuning."""

    task: Literal["genes"] = Field(description="`genes`")
    dataset: Name = Field(description="dataset whose cells make the gene embeddings")
    labels: GeneLabels = Field(description="labelled genes")
    match: Literal["expression"] | None = Field(
        None, description="`expression`: compare only genes matched in mean expression and detection rate"
    )
    folds: int = Field(5, description="folds over genes", ge=2)
    baselines: Annotated[list[GeneBaseline], Once] = Field(
        ["mean_expression", "detection", "coexpression_pca"], description="what embeddings are compared with"
    )
    finetune: BenchmarkFinetune | None = Field(None, description="also fine-tune models in every fold")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.match is not None and (self.labels.group is not None or self.labels.simulated):
            raise ValueError(
                "match makes groups of its own: leave it out, or the group (simulated labels have one)"
            )
        if self.finetune is not None:
            self.finetune.check_task("genes")
        return self

    @property
    def datasets(self) -> list[str]:
        """Datasets whose cells it has."""
        return [self.dataset]


class MixingBenchmark(_Benchmark):
    """How far batches mix in an embedding while kinds of cells stay apart (scib-metrics)."""

    task: Literal["mixing"] = Field(description="`mixing`")
    datasets: Annotated[list[Name], Once] = Field(
        description="datasets whose cells are laid together", min_length=1
    )
    batch: str = Field("dataset", description="metadata column of donors or batches, or `dataset`")
    label: str | None = Field(None, description="metadata column of what has to stay apart")
    max_cells: int = Field(20_000, description="most cells, drawn by their names", ge=100)
    baselines: Annotated[list[MixingBaseline], Once] = Field(
        ["pca_hvg", "harmony", "combat"], description="what embeddings are compared with"
    )

    @model_validator(mode="after")
    def _batches_exist(self) -> Self:
        if self.batch == "dataset" and len(self.datasets) < 2:
            raise ValueError("one dataset is one batch: name a column as batch")
        return self


Benchmark = Annotated[CellBenchmark | GeneBenchmark | MixingBenchmark, Field(discriminator="task")]
