"""Features of cells from the ranks of their genes alone: what of a Geneformer's score its input already has.

A cell's tokens are its genes in descending order of count over median. The first has 1, the last of n has 1 / n, a
gene that is not among them 0; special tokens are no genes. Of the 2,000 genes whose mean is highest in the training
cells, a classifier gets these numbers. Memory: 8 bytes a token of the cells of the benchmark, and 16 kB a cell for the
features of a fold, three times in the classifier; of many cells it is bounded (`large`).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellformers.errors import UserError
from cellformers.evaluate.baselines import highest
from cellformers.evaluate.rows import add_columns, split, stacked
from cellformers.evaluate.tables import Cells, locate
from cellformers.tokens import TokenBatch, check_vocabulary, read_tokens
from cellformers.vocabulary import Vocabulary


def normalised_ranks(batch: TokenBatch, keep: np.ndarray, vocabulary: Vocabulary) -> sp.csr_matrix:
    """Ranks of the genes of some cells, float32 CSR [kept cells, genes]: 1 for the first, 1 / n for the last of n.

    Parameters
    ----------
    batch
        Tokens of consecutive cells.
    keep
        bool[cells], which of them.
    vocabulary
        Its genes are the columns.
    """
    column = np.full(vocabulary.size, -1, dtype=np.int32)
    column[vocabulary.token_ids] = np.arange(len(vocabulary.token_ids), dtype=np.int32)
    gene = column[batch.tokens]
    cell = np.repeat(np.arange(len(keep)), np.diff(batch.offsets))
    used = (gene >= 0) & keep[cell]
    n_genes = np.bincount(cell[used], minlength=len(keep))[keep]
    indptr = np.zeros(len(n_genes) + 1, dtype=np.int64)
    np.cumsum(n_genes, out=indptr[1:])
    place = np.arange(indptr[-1]) - np.repeat(indptr[:-1], n_genes)
    value = (1 - place / np.repeat(n_genes, n_genes)).astype(np.float32)
    shape = (len(n_genes), len(vocabulary.token_ids))
    return sp.csr_matrix((value, gene[used], indptr), shape=shape)


def aligned_ranks(
    cells: Cells, files: Mapping[str, Sequence[Path]], *, vocabulary: Path | None
) -> sp.csr_matrix:
    """Ranks of the genes of `cells` in their order, float32 CSR [cells, genes of the vocabulary].

    Raises
    ------
    UserError
        If there is no vocabulary, tokens were made with another one, or lack cells of the benchmark.
    """
    if vocabulary is None:
        raise UserError("rank_only needs to know which tokens are genes", fix="give --vocabulary")
    known = Vocabulary.load(vocabulary)
    parts: list[sp.csr_matrix] = []
    for dataset in dict.fromkeys(cells.dataset):
        if not files.get(dataset):
            raise UserError(f"no tokens given for dataset {dataset!r}")
        wanted = cells.cell_id[cells.dataset == dataset]
        ids, ranks = _read(files[dataset], wanted, known)
        rows = locate(wanted, ids, what="cells", path=files[dataset][0])
        parts.append(ranks if np.array_equal(rows, np.arange(len(ids))) else ranks[rows])
    return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")


def _read(
    paths: Sequence[Path], wanted: np.ndarray, vocabulary: Vocabulary
) -> tuple[np.ndarray, sp.csr_matrix]:
    """Names and ranks of the wanted cells, in the order of the files."""
    ids: list[np.ndarray] = [np.empty(0, dtype=object)]

    def parts() -> Iterator[sp.csr_matrix]:
        index = pd.Index(wanted)
        for batch in _batches(paths, vocabulary):
            keep = np.asarray(pd.Index(batch.cell_ids).isin(index))
            ids.append(batch.cell_ids[keep])
            yield normalised_ranks(batch, keep, vocabulary)

    ranks = stacked(parts(), len(vocabulary.token_ids))
    names = np.concatenate(ids)
    repeated = pd.Index(names).duplicated()
    if repeated.any():
        raise UserError(
            f"cell {names[repeated][0]!r} is there twice", path=paths[0], fix="give each file once"
        )
    return names, ranks


def _batches(paths: Sequence[Path], vocabulary: Vocabulary) -> Iterator[TokenBatch]:
    """Tokens of some cells at a time, all of them in the vocabulary."""
    for path in paths:
        check_vocabulary(path, vocabulary)
        for batch in read_tokens(path):
            if len(batch.tokens) and int(batch.tokens.max()) >= vocabulary.size:
                raise UserError("holds tokens that the vocabulary lacks", path=path, fix="tokenize again")
            yield batch


def rank_blocks(paths: Sequence[Path], vocabulary: Path | None) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
    """Names and ranks of all cells of tokens files, some at a time."""
    known = Vocabulary.load(str(vocabulary))
    for batch in _batches(paths, known):
        yield batch.cell_ids, normalised_ranks(batch, np.ones(len(batch.cell_ids), bool), known)


def highest_ranks(ranks: sp.csr_matrix, train: np.ndarray) -> np.ndarray:
    """Columns of the genes of highest mean rank among training cells, seen in 10 of them: int64[up to 2,000]."""
    total, detected = np.zeros(ranks.shape[1]), np.zeros(ranks.shape[1])
    for part in split(train):
        fitted = ranks[part]
        add_columns(total, fitted, fitted.data)
        add_columns(detected, fitted, np.ones_like(fitted.data))
    return highest(total, detected, len(train))


def rank_only(ranks: sp.csr_matrix, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks float64[rows, up to 2,000] of the genes of highest mean in training, seen in 10 of its cells."""
    chosen = ranks[:, highest_ranks(ranks, train)]
    return chosen[train].toarray().astype(np.float64), chosen[test].toarray().astype(np.float64)
