"""Features of genes: embeddings, columns of tables, and baselines computed from counts or tokens.

`ranks` and `counts` are what the published baselines were trained on (Theodoris et al. 2023): a gene is described by
its place, or its log counts, in each of up to 10,000 cells. The cells are drawn by a hash of their names, so neither
shards nor their order matter, and both kinds of features describe genes by the same cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from cellformers.errors import UserError
from cellformers.evaluate import baselines
from cellformers.evaluate.tables import locate, read_gene_table, read_vectors
from cellformers.folds import hash_order
from cellformers.io.files import open_parquet, read_table
from cellformers.io.source import open_counts
from cellformers.selection import as_text
from cellformers.tokens import read_tokens, vocabulary_digest
from cellformers.vocabulary import Vocabulary

GeneFeatures = Literal[
    "embedding", "mean_expression", "detection", "coexpression_pca", "column", "ranks", "counts", "finetuned"
]
MAX_CELLS = 10_000


class Read(NamedTuple):
    """Features float64[genes, dim] and what has to be said about them."""

    X: np.ndarray
    notes: list[str]


def passing_cells(cells: Path) -> np.ndarray:
    """Names of the cells that passed QC, object[n] of str, in the order of the table."""
    with open_parquet(cells) as file:
        has_pass = "qc_pass" in file.schema_arrow.names
    table = read_table(cells, columns=["cell_id", "qc_pass"] if has_pass else ["cell_id"])
    names = as_text(table["cell_id"])
    if not has_pass:
        return names
    return names[table["qc_pass"].combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)]


def passing_counts(paths: Sequence[Path], *, cells: Path | None, vocabulary: Path | None) -> baselines.Counts:
    """Counts of the cells that passed QC, as embeddings hold them, in the order of `cells`."""
    files = [Path(p) for p in paths]
    if cells is None:
        return baselines.read_counts(files, vocabulary=vocabulary)[1]
    wanted = passing_cells(cells)
    names, counts = baselines.read_counts(files, vocabulary=vocabulary, cells=wanted)
    rows = locate(wanted, names, what="cells", path=cells)
    return baselines.Counts(counts.X[rows], counts.genes, counts.totals[rows])


def expression(
    paths: Sequence[Path], genes: np.ndarray, *, cells: Path | None, vocabulary: Path | None
) -> dict[str, np.ndarray]:
    """Mean expression and detection rate of some genes, float64[genes] each, over the cells that passed QC.

    Raises
    ------
    UserError
        If the counts lack one of the genes.
    """
    counts = passing_counts(paths, cells=cells, vocabulary=vocabulary)
    rows = locate(genes, counts.genes, what="genes", path=paths[0])
    return {
        "mean_expression": baselines.mean_expression(counts)[rows, 0],
        "detection": baselines.detection(counts)[rows, 0],
    }


def _drawn(present: np.ndarray, cells: Path | None, *, max_cells: int, seed: int) -> np.ndarray:
    """Up to `max_cells` cells, object[n] of str, ascending: drawn from those that passed QC, if present."""
    eligible = present if cells is None else passing_cells(cells)
    names = eligible[hash_order(eligible, seed=seed, salt="cells")[:max_cells]]
    found = names[np.isin(names.astype(str), present.astype(str))]
    if not len(found):
        raise UserError(
            "no cell that passed QC is in the files", path=cells, fix="give the table of the same dataset"
        )
    return np.array(sorted(found), dtype=object)


def ranks(
    paths: Sequence[Path],
    genes: np.ndarray,
    *,
    vocabulary: Path | None,
    cells: Path | None = None,
    max_cells: int = MAX_CELLS,
    seed: int = 0,
) -> np.ndarray:
    """Context length - rank of each gene in each drawn cell, float64[genes, cells]; 0 where a cell lacks the gene.

    Ranks count the genes of a cell from 0, the one of highest normalised expression; special tokens have none.
    Source: baselines "-r" of Theodoris et al., Nature 618:616 (2023), as 2,048 - rank.

    Raises
    ------
    UserError
        If a file was made with another vocabulary, or the vocabulary lacks a gene.
    """
    if vocabulary is None:
        raise UserError("features 'ranks' need the vocabulary of the tokens", fix="give --vocabulary")
    known = Vocabulary.load(vocabulary)
    for path in paths:
        if vocabulary_digest(path) != known.digest:
            raise UserError(
                f"was not made with the vocabulary {known.name!r}",
                path=path,
                fix="give the one it was made with",
            )
    row_of_token = np.full(known.size, -1, dtype=np.int64)
    row_of_token[known.token_ids[locate(genes, known.gene_ids, what="genes", path=vocabulary)]] = np.arange(
        len(genes)
    )
    special = np.isin(np.arange(known.size), list(known.special_tokens.values()))
    present = np.concatenate([as_text(read_table(path, ["cell_id"])["cell_id"]) for path in paths])
    drawn = _drawn(present, cells, max_cells=max_cells, seed=seed)
    index = pd.Index(drawn)
    result = np.zeros((len(genes), len(drawn)))
    for batch in read_tokens([Path(p) for p in paths]):
        cell = np.repeat(np.arange(len(batch.cell_ids)), np.diff(batch.offsets))
        before = np.append(0, np.cumsum(~special[batch.tokens]))  # genes before each token of the batch
        rank = before[:-1] - before[batch.offsets[cell]]
        row, column = row_of_token[batch.tokens], index.get_indexer(batch.cell_ids)[cell]
        here = (row >= 0) & (column >= 0)
        result[row[here], column[here]] = known.context_length - rank[here]
    return result


def cell_counts(
    paths: Sequence[Path],
    genes: np.ndarray,
    *,
    vocabulary: Path | None = None,
    cells: Path | None = None,
    max_cells: int = MAX_CELLS,
    seed: int = 0,
) -> np.ndarray:
    """Log counts of each gene in each drawn cell, float64[genes, cells].

    Raises
    ------
    UserError
        If the counts lack a gene, or shards differ in their features.
    """
    present = []
    for path in paths:
        with open_counts(path) as source:
            present.append(source.cell_ids)
    drawn = _drawn(np.concatenate(present), cells, max_cells=max_cells, seed=seed)
    names, counts = baselines.read_counts([Path(p) for p in paths], vocabulary=vocabulary, cells=drawn)
    columns = locate(genes, counts.genes, what="genes", path=paths[0])
    result = np.zeros((len(genes), len(drawn)))
    result[:, pd.Index(drawn).get_indexer(names)] = counts.log(columns).T.toarray()
    return result


def _column(path: Path, genes: np.ndarray, *, gene: str, column: str | None) -> np.ndarray:
    """One numeric column of a table, float64[genes, 1]."""
    if column is None:
        raise UserError("features 'column' need the name of a column")
    ids, texts = read_gene_table(path, gene=gene, column=column)
    rows = locate(genes, ids, what="genes", path=path)
    try:
        numbers = np.array([float(v) for v in texts[rows]])[:, None]
    except (TypeError, ValueError):
        raise UserError(f"column {column!r} is not a number for every gene of the split", path=path) from None
    if not np.isfinite(numbers).all():
        raise UserError(f"column {column!r} is not finite for every gene of the split", path=path)
    return numbers


def read_features(
    features: str,
    inputs: Sequence[Path],
    genes: np.ndarray,
    *,
    cells: Path | None,
    column: str | None,
    gene: str,
    vocabulary: Path | None,
    max_cells: int,
    seed: int,
) -> Read:
    """Features of the split's genes, in their order, by one of `GeneFeatures` other than `finetuned`.

    Raises
    ------
    UserError
        If the files lack genes of the split, or don't fit the features.
    """
    if not inputs:
        raise UserError(f"no files given for features {features!r}")
    paths = [Path(p) for p in inputs]
    if features == "embedding":
        ids, values = read_vectors(paths, key="gene_id")
        return Read(values[locate(genes, ids, what="genes", path=paths[0])].astype(np.float64), [])
    if features == "column":
        return Read(_column(paths[0], genes, gene=gene, column=column), [])
    if features in ("ranks", "counts"):
        if max_cells < 1:
            raise UserError(f"can't draw {max_cells} cells", fix="give 1 or more")
        some: dict[str, Any] = {
            "cells": cells,
            "max_cells": max_cells,
            "seed": seed,
            "vocabulary": vocabulary,
        }
        X = (ranks if features == "ranks" else cell_counts)(paths, genes, **some)
        what = "ranks" if features == "ranks" else "log counts"
        return Read(X, [f"{what} of the genes in {X.shape[1]:,} cells, drawn by name"])
    if features == "coexpression_pca":
        counts = passing_counts(paths, cells=cells, vocabulary=vocabulary)
        rows = locate(genes, counts.genes, what="genes", path=paths[0])
        return Read(baselines.coexpression_pca(counts, seed=seed)[rows], [])
    return Read(expression(paths, genes, cells=cells, vocabulary=vocabulary)[features][:, None], [])
