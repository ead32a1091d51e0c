"""Small vocabularies, token files and model directories made by hand, for tests of what computes with a model."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cellformers.io.files import stamp, write_table
from cellformers.models import checkpoints, layouts
from cellformers.models.bert_config import Config
from cellformers.vocabulary import CONTEXT_LENGTH, SPECIAL_TOKENS, Vocabulary


def make_vocabulary(
    n_genes: int = 60, *, special: Any = "v1", context_length: int | None = None
) -> Vocabulary:
    ids = [f"ENSG{i:011d}" for i in range(n_genes)]
    tokens = SPECIAL_TOKENS[special]
    return Vocabulary(
        name=f"hand-{special}",
        gene_ids=np.array(ids, dtype=object),
        token_ids=np.arange(len(tokens), len(tokens) + n_genes, dtype=np.int32),
        medians=np.linspace(0.5, 3.0, n_genes),
        symbols=np.array([f"G{i}" for i in range(n_genes)], dtype=object),
        special_tokens=dict(tokens),
        context_length=context_length or CONTEXT_LENGTH[special],
        alias_source=pa.table({"alias": ids, "gene_id": ids}),
    )


def make_config(vocabulary: Vocabulary, **changes: Any) -> Config:
    small = {
        "vocab_size": vocabulary.size, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 128, "hidden_act": "relu", "initializer_range": 0.1,
    }  # fmt: skip
    return Config(**{**small, **changes})


def make_model(folder: Path, vocabulary: Vocabulary, *, seed: int = 0, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    checkpoints.save(layouts.random_model(make_config(vocabulary, **changes), seed=seed), folder)
    vocabulary.save(folder / "vocabulary")
    return folder


def make_cells(vocabulary: Vocabulary, lengths: Sequence[int], *, seed: int = 0) -> list[np.ndarray]:
    """Cells of so many genes each (drawn without replacement), between <cls> and <eos> where those exist."""
    rng = np.random.default_rng(seed)
    cells = []
    for length in lengths:
        genes = rng.permutation(vocabulary.token_ids)[:length]
        if vocabulary.has_cls:
            special = vocabulary.special_tokens
            genes = np.concatenate([[special["<cls>"]], genes, [special["<eos>"]]])
        cells.append(genes.astype(np.int32))
    return cells


def write_tokens(
    path: Path,
    cells: Sequence[np.ndarray],
    vocabulary: Vocabulary,
    *,
    first: int = 0,
    dataset: str = "sha256:d",
) -> Path:
    table = pa.table(
        {
            "cell_id": pa.array([f"cell{first + i}" for i in range(len(cells))], pa.string()),
            "input_ids": pa.array([cell.tolist() for cell in cells], pa.list_(pa.int32())),
            "length": pa.array([len(cell) for cell in cells], pa.int32()),
        }
    )
    inputs = {"dataset": dataset, "vocabulary": vocabulary.digest}
    write_table(table, path, stamp("tokenize", 1, parameters={}, inputs=inputs))
    return path


def write_shards(
    folder: Path, cells: Sequence[np.ndarray], vocabulary: Vocabulary, n_shards: int
) -> list[Path]:
    bounds = np.linspace(0, len(cells), n_shards + 1).astype(int)
    return [
        write_tokens(folder / f"{n_shards}-{i}.parquet", cells[a:b], vocabulary, first=a)
        for i, (a, b) in enumerate(pairwise(bounds))
    ]


def make_atlas(n_cells: int, n_genes: int, *, n_types: int = 6, seed: int = 0) -> list[np.ndarray]:
    """Cells of several types as tokens of a V1-like vocabulary: negative-binomial counts, ranked by count / median."""
    rng = np.random.default_rng(seed)
    programmes = np.zeros((n_types, n_genes))
    for row in programmes:
        members = rng.choice(n_genes, n_genes // 6, replace=False)
        row[members] = rng.normal(1.5, 0.4, len(members))
    rates = rng.lognormal(-0.5, 1.2, n_genes) * np.exp(programmes[rng.integers(n_types, size=n_cells)])
    means = rates / rates.sum(1, keepdims=True) * rng.lognormal(np.log(n_genes), 0.3, (n_cells, 1))
    counts = rng.poisson(rng.gamma(2.0, means / 2.0))
    per_cell = counts / counts.sum(1, keepdims=True)
    medians = np.array([np.median(gene[gene > 0]) if gene.any() else 1.0 for gene in per_cell.T])
    cells = []
    for cell in per_cell:
        genes = np.flatnonzero(cell)
        order = np.lexsort((genes, -cell[genes] / medians[genes]))
        cells.append((genes[order] + 2).astype(np.int32))
    return cells
