"""Parts of the config about benchmarks."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cellformers.config.section import Name, Section


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
