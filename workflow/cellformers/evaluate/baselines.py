"""Features without a model: what every embedding has to beat, under the same split.

Cells: `pca_hvg` (log counts of 2,000 highly variable genes, 50 principal components) and `log_counts` (log counts of
the 2,000 highest expressed genes). What is fitted is fitted on the training cells of the fold. Memory: 8 bytes a count
other than zero of the cells of the benchmark (a million cells of 2,000 genes: 16 GB), and for each fold computed at a
time 16 kB a cell for the features of `log_counts`, 400 bytes for those of `pca_hvg`, each three times in the
classifier, and for `pca_hvg` 12 bytes a count of the chosen genes. Where labels of many cells are predicted it is
bounded (`large`).
Genes: `mean_expression`, `detection` (share of cells with a count) and `coexpression_pca` (loadings of the genes in a
PCA of the log counts); none of them sees a label, so they are computed over all cells once.
Log counts are log(1 + 10,000 × count / n_counts), n_counts over all features of the cell.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from sklearn.decomposition import PCA

from cellformers.counts import canonical_blocks
from cellformers.errors import UserError
from cellformers.evaluate.rows import add_columns, split, stacked
from cellformers.evaluate.tables import Cells, locate
from cellformers.io.arrow import as_strings
from cellformers.io.files import digest_arrays
from cellformers.io.source import open_counts

LIBRARY_SIZE = 10_000
HIGHLY_VARIABLE = 2000
COMPONENTS = 50
MIN_CELLS = 10
BINS = 20
ROWS = 16_384  # cells whose sums are added up before they are added to those of the others
MORE = "give more cells, or cells with counts"
PIECE = 1 << 24  # counts whose digest is computed at a time


@dataclass(frozen=True)
class Counts:
    """Counts of cells: X int CSR [cells, genes] in canonical form, genes object[n], totals int64[cells]."""

    X: sp.csr_matrix
    genes: np.ndarray
    totals: np.ndarray

    def digest(self) -> str:
        """Digest of the content, whatever the shards and their integer type were."""
        X = self.X
        pieces = [
            digest_arrays(part[start : start + PIECE].astype(np.int64))
            for part in (X.indices, X.data)
            for start in range(0, X.nnz, PIECE)
        ]
        return digest_arrays(self.genes, X.indptr.astype(np.int64), self.totals, pieces)

    def __getitem__(self, rows: np.ndarray) -> "Counts":
        """Those of some cells."""
        return Counts(self.X[rows], self.genes, self.totals[rows])

    def log(self, genes: np.ndarray | None = None) -> sp.csr_matrix:
        """Log counts float64 [cells, genes] of all or of some gene columns."""
        X = self._scaled(self.X if genes is None else self.X[:, genes])
        np.log1p(X.data, out=X.data)
        return X

    def scaled(self, rows: np.ndarray) -> sp.csr_matrix:
        """10,000 × count / n_counts of some cells, float64 [cells, genes]."""
        return self._scaled(self.X, rows)

    def _scaled(self, X: sp.csr_matrix, rows: np.ndarray | None = None) -> sp.csr_matrix:
        totals = self.totals if rows is None else self.totals[rows]
        X = (X if rows is None else X[rows]).astype(np.float64)
        X.data *= np.repeat(LIBRARY_SIZE / np.maximum(totals, 1), np.diff(X.indptr))
        return X


def gene_names(ids: np.ndarray, symbols: np.ndarray | None, vocabulary: Path | None) -> np.ndarray:
    """The gene each feature counts for: by the vocabulary's aliases where there is one, else its own id."""
    if vocabulary is None:
        return ids
    from cellformers.genes import map_features
    from cellformers.vocabulary import Vocabulary

    mapped = map_features(ids, symbols, Vocabulary.load(vocabulary)).gene_of_feature
    return np.array(
        [own if gene is None else gene for own, gene in zip(ids, mapped, strict=True)], dtype=object
    )


def read_counts(
    paths: Sequence[Path], *, vocabulary: Path | None = None, cells: np.ndarray | None = None
) -> tuple[np.ndarray, Counts]:
    """Read counts shards block by block; features of one gene are summed, genes are sorted by name.

    Parameters
    ----------
    paths
        Counts shards.
    vocabulary
        Maps ids and symbols to genes.
    cells
        Names of the cells to keep, object[n] of str; None: all. Those of them that the shards lack are missing.

    Returns
    -------
    cell ids, object[n], in the order of the files; the counts.

    Raises
    ------
    UserError
        If a shard is missing or broken, a cell to keep is there twice, or shards differ in their features.
    """
    if not paths:
        raise UserError("no counts shards given")
    genes = gene_list(Path(paths[0]), vocabulary)
    ids: list[np.ndarray] = [np.empty(0, dtype=object)]
    totals: list[np.ndarray] = [np.empty(0, np.int64)]

    def parts() -> Iterator[sp.csr_matrix]:
        wanted = None if cells is None else pd.Index(cells)
        for names, counts in count_blocks(paths, vocabulary=vocabulary, wanted=wanted):
            ids.append(names)
            totals.append(counts.totals)
            yield counts.X

    X = stacked(parts(), len(genes))
    names = np.concatenate(ids)
    repeated = pd.Index(names).duplicated()
    if repeated.any():
        raise UserError(
            f"cell {names[repeated][0]!r} is in two of the shards", path=paths[0], fix="give each once"
        )
    return names, Counts(X, genes, np.concatenate(totals))


def gene_list(path: Path, vocabulary: Path | None) -> np.ndarray:
    """The genes of a counts shard, object[n], sorted by name."""
    if not path.is_file():
        raise UserError("no such file", path=path)
    with open_counts(path) as source:
        return _membership(source.feature_ids, source.feature_symbols, vocabulary)[0]


def count_blocks(
    paths: Sequence[Path], *, vocabulary: Path | None = None, wanted: pd.Index | None = None
) -> Iterator[tuple[np.ndarray, Counts]]:
    """Names and counts of some cells at a time, as `read_counts` has them; blocks may hold no cell."""
    features = genes = membership = None
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError("no such file", path=path)
        with open_counts(path) as source:
            if features is None:
                features = source.feature_ids
                genes, membership = _membership(features, source.feature_symbols, vocabulary)
            elif not np.array_equal(features, source.feature_ids):
                raise UserError("has other features than the shards before it", path=path, fix="ingest again")
            assert genes is not None
            for block in canonical_blocks(source):
                names = as_strings(source.names.slice(block.start, block.n_cells))
                rows = (
                    np.arange(len(names)) if wanted is None else np.flatnonzero(pd.Index(names).isin(wanted))
                )
                shape = (block.n_cells, len(features))
                X = sp.csr_matrix((block.data, block.indices, block.indptr), shape=shape)[rows]
                X = _summed(X, membership)
                yield names[rows], Counts(X, genes, np.asarray(X.sum(axis=1, dtype=np.int64)).ravel())


def _membership(
    features: np.ndarray, symbols: np.ndarray | None, vocabulary: Path | None
) -> tuple[np.ndarray, sp.csr_matrix]:
    """Genes, object[genes], sorted, and which feature counts for which: int64 CSR [features, genes]."""
    genes, column = np.unique(gene_names(features, symbols, vocabulary).astype(str), return_inverse=True)
    ones = np.ones(len(column), dtype=np.int64)
    cells = (np.arange(len(column)), column)
    return genes.astype(object), sp.csr_matrix((ones, cells), shape=(len(column), len(genes)))


def _summed(X: sp.csr_matrix, membership: sp.csr_matrix) -> sp.csr_matrix:
    """Counts by gene of counts by feature, in canonical form and int32 where they fit."""
    X = (X.astype(np.int64) @ membership).tocsr()
    X.eliminate_zeros()
    X.sort_indices()
    small = X.nnz == 0 or int(X.data.max()) <= np.iinfo(np.int32).max
    return X.astype(np.int32) if small else X


def aligned_counts(
    cells: Cells, files: Mapping[str, Sequence[Path]], *, vocabulary: Path | None = None,
    others: Sequence[str] = (),
) -> Counts:  # fmt: skip
    """Counts of `cells` in their order, over the genes that all their datasets, and those of `others`, have.

    Raises
    ------
    UserError
        If shards lack cells of the benchmark, or the datasets have no gene in common.
    """
    parts: list[Counts] = []
    for dataset in dict.fromkeys(cells.dataset):
        if dataset not in files:
            raise UserError(f"no counts shards given for dataset {dataset!r}")
        wanted = cells.cell_id[cells.dataset == dataset]
        ids, counts = read_counts(files[dataset], vocabulary=vocabulary, cells=wanted)
        rows = locate(wanted, ids, what="cells", path=files[dataset][0])
        in_order = np.array_equal(rows, np.arange(len(ids)))
        parts.append(counts if in_order else Counts(counts.X[rows], counts.genes, counts.totals[rows]))
    more = [gene_list(Path(files[d][0]), vocabulary) for d in others if d not in set(cells.dataset)]
    if len(parts) + len(more) == 1:
        return parts[0]
    shared = parts[0].genes
    for genes in [*(part.genes for part in parts[1:]), *more]:
        shared = np.intersect1d(shared.astype(str), genes.astype(str)).astype(object)
    if len(shared) == 0:
        raise UserError(
            "the datasets have no gene name in common",
            fix="give --vocabulary to map ids and symbols to genes",
        )
    columns = [np.searchsorted(part.genes.astype(str), shared.astype(str)) for part in parts]
    X = sp.vstack([p.X[:, c] for p, c in zip(parts, columns, strict=True)], format="csr")
    X.sort_indices()
    return Counts(X, shared, np.concatenate([p.totals for p in parts]))


def _mean_and_variance(X: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of each column, without making it dense."""
    n, width = X.shape
    total = np.bincount(X.indices, weights=X.data, minlength=width)
    square = np.bincount(X.indices, weights=X.data**2, minlength=width)
    return _from_sums(total, square, n)


def _from_sums(total: np.ndarray, square: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of n values from their sum and the sum of their squares."""
    mean = total / n
    return mean, np.maximum(square / n - mean**2, 0) * n / max(n - 1, 1)


def _column_sums(
    counts: Counts, rows: np.ndarray, *terms: Callable[[np.ndarray], np.ndarray]
) -> list[np.ndarray]:
    """For each term its sum over some cells, of 10,000 × count / n_counts of each gene, float64[genes]."""
    sums = [np.zeros(counts.X.shape[1]) for _ in terms]
    for block in split(rows, ROWS):
        own = [np.zeros(counts.X.shape[1]) for _ in terms]
        for part in split(block):
            X = counts.scaled(part)
            for total, term in zip(own, terms, strict=True):
                add_columns(total, X, term(X.data))
        for total, more in zip(sums, own, strict=True):
            total += more
    return sums


def _moments(counts: Counts, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance of 10,000 × count / n_counts of each gene over some cells."""
    total, square = _column_sums(counts, rows, np.positive, np.square)
    return _from_sums(total, square, len(rows))


def highly_variable(log_counts: sp.csr_matrix, *, n_genes: int = HIGHLY_VARIABLE) -> np.ndarray:
    """Columns of the genes of highest normalised dispersion, sorted: int64[up to n_genes].

    Dispersion (variance / mean of 10,000 × count / n_counts) is compared within 20 bins of the log mean, as
    Satija et al. 2015 do (flavour "seurat" of scanpy). Genes seen in no cell are never chosen.
    """
    counts = log_counts.copy()
    np.expm1(counts.data, out=counts.data)
    return _dispersed(*_mean_and_variance(counts), n_genes=n_genes)


def _dispersed(mean: np.ndarray, variance: np.ndarray, *, n_genes: int = HIGHLY_VARIABLE) -> np.ndarray:
    """Of genes with this mean and variance those of highest normalised dispersion, sorted."""
    seen = np.flatnonzero((mean > 0) & (variance > 0))
    if len(seen) <= n_genes:
        return seen
    level, dispersion = np.log1p(mean), np.log(variance[seen] / mean[seen])
    inner_edges = np.linspace(level.min(), level.max(), BINS + 1)[1:-1]
    bin_of = np.digitize(level[seen], inner_edges, right=True)
    size = np.bincount(bin_of, minlength=BINS)
    centre = np.bincount(bin_of, weights=dispersion, minlength=BINS) / np.maximum(size, 1)
    squares = np.bincount(bin_of, weights=(dispersion - centre[bin_of]) ** 2, minlength=BINS)
    spread = np.sqrt(squares / np.maximum(size - 1, 1))
    lone = size == 1  # a gene alone in its bin: normalised dispersion 1, as scanpy does
    normalised = np.where(
        lone[bin_of], 1.0, (dispersion - centre[bin_of]) / np.where(spread > 0, spread, np.inf)[bin_of]
    )
    best = np.argsort(-normalised, kind="stable")[:n_genes]
    return np.sort(seen[best])


def _components(X: sp.csr_matrix) -> int:
    return min(COMPONENTS, *(side - 1 for side in X.shape))


def _fit_pca(X: sp.csr_matrix, seed: int) -> PCA:
    """PCA of a sparse matrix, centred implicitly; ARPACK starts from a fixed vector and runs on one thread."""
    n = _components(X)
    if n < 1:
        raise UserError(f"{X.shape[0]} cells × {X.shape[1]} genes are too few for a PCA", fix=MORE)
    return PCA(n_components=n, svd_solver="arpack", random_state=seed).fit(X)


def pca_hvg(
    counts: Counts, train: np.ndarray, test: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of highly variable genes, float64[rows, 50]; genes and axes from the training cells."""
    genes, transform = fit_pca_hvg(counts, train, seed=seed)
    chosen = counts.log(genes)
    return transform(chosen[train]), transform(chosen[test])


def fit_pca_hvg(
    counts: Counts, train: np.ndarray, *, seed: int
) -> tuple[np.ndarray, Callable[[sp.csr_matrix], np.ndarray]]:
    """Columns of the highly variable genes of training cells, and log counts of these genes -> their components."""
    genes = _dispersed(*_moments(counts, train))
    chosen = stacked((counts[part].log(genes) for part in split(train)), len(genes))
    return genes, _fit_pca(chosen, seed).transform


def highest(mean: np.ndarray, detected: np.ndarray, n_cells: int) -> np.ndarray:
    """Columns of the 2,000 genes of highest mean among those detected in 10 cells, sorted: int64[up to 2,000].

    Raises
    ------
    UserError
        If there are none.
    """
    mean = np.where(detected >= min(MIN_CELLS, n_cells), mean, 0)
    best = np.argsort(-mean, kind="stable")[:HIGHLY_VARIABLE]
    genes = np.sort(best[mean[best] > 0])
    if len(genes) == 0:
        raise UserError("no gene is detected in enough training cells", fix=MORE)
    return genes


def log_counts(counts: Counts, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log counts float64[rows, up to 2,000] of the genes of highest mean in training, seen in 10 of its cells."""
    chosen = counts.log(fit_log_counts(counts, train))
    return chosen[train].toarray(), chosen[test].toarray()


def fit_log_counts(counts: Counts, train: np.ndarray) -> np.ndarray:
    """Columns of the genes of `log_counts`: int64[up to 2,000]."""
    total, detected = _column_sums(counts, train, np.log1p, np.ones_like)
    return highest(total, detected, len(train))


def mean_expression(counts: Counts) -> np.ndarray:
    """log(1 + mean of 10,000 × count / n_counts over all cells) of every gene, float64[genes, 1]."""
    scaled = counts.log()
    np.expm1(scaled.data, out=scaled.data)
    return np.log1p(_mean_and_variance(scaled)[0])[:, None]


def detection(counts: Counts) -> np.ndarray:
    """Share of cells with a count of every gene, float64[genes, 1]."""
    return (counts.X.getnnz(axis=0) / counts.X.shape[0])[:, None]


def coexpression_pca(counts: Counts, *, seed: int) -> np.ndarray:
    """Loadings of every gene on 50 principal components of the cells, float64[genes, 50].

    Log counts are scaled to unit variance, so that loadings (axis × square root of its variance) hold correlations
    and not expression. Genes seen in fewer than 10 cells have none: their loadings are 0.
    """
    X = counts.log()
    _, variance = _mean_and_variance(X)
    genes = np.flatnonzero((X.getnnz(axis=0) >= min(MIN_CELLS, X.shape[0])) & (variance > 0))
    scaled = X[:, genes] @ sp.diags(1 / np.sqrt(variance[genes]))
    model = _fit_pca(sp.csr_matrix(scaled), seed)
    result = np.zeros((X.shape[1], model.n_components_))
    result[genes] = model.components_.T * np.sqrt(model.explained_variance_)
    return result
