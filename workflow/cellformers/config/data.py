"""Parts of the config about data: datasets, quality control, corpora, vocabularies."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cellformers.config.section import Name, Section


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
    max_genes: int | None = Field(None, description="`fixed`: most detected features", ge=1)
    max_mito_fraction: float | None = Field(
        None, description="`fixed`: highest mitochondrial fraction", gt=0, le=1
    )
    doublets: bool = Field(
        False, description="score doublets with scrublet, per batch over the whole dataset, and drop them"
    )

    @model_validator(mode="after")
    def _only_what_counts(self) -> Self:
        for key in ("min_counts", "max_counts", "max_genes", "max_mito_fraction"):
            if getattr(self, key) is not None and self.method != "fixed":
                raise ValueError(f"{key} is used by method: fixed only, the method is {self.method}")
        return self


class Dataset(Section):
    """One dataset: a file, several files, a deposit, or a part of the simulation."""

    path: Path | None = Field(
        None,
        description="one count file or folder: h5ad, loom, AnnData zarr, 10x .h5, 10x mtx folder, dense csv/tsv",
    )
    samples: Path | None = Field(
        None,
        description="a csv/tsv table with columns sample, path and any others: several files, one dataset",
    )
    simulated: Literal["atlas", "second"] | None = Field(None, description="a part of the simulation")
    deposit: Name | None = Field(
        None, description="a registered deposit to download, e.g. `gse129096` (`cellformers download --list`)"
    )
    part: Name = Field("all", description="deposit: which part of it, e.g. `drop`")
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
    where: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="only cells with one of these values in each of these metadata columns, {column: [value]}",
    )
    max_cells: int | None = Field(
        None, description="at most so many cells, drawn by their names and the seed", ge=1
    )
    qc: QC = Field(QC(), description="quality control")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        given = [k for k in ("path", "samples", "simulated", "deposit") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of path, samples, simulated, deposit (given: {', '.join(given) or 'none'})"
            )
        if self.part != "all" and self.deposit is None:
            raise ValueError("part is of a deposit")
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
