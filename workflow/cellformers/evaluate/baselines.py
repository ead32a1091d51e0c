"""Features without a model: what every embedding has to beat, under the same split.

Cells: `pca_hvg` (log counts of 2,000 highly variable genes, 50 principal components) and `log_counts` (log counts of
the 2,000 highest expressed genes). What is fitted is fitted on the training cells of the fold.
Genes: `mean_expression`, `detection` (share of cells with a count) and `coexpression_pca` (loadings of the genes in a
PCA of the log counts); none of them sees a label, so they are computed over all cells once.
Log counts are log(1 + 10,000 × count / n_counts), n_counts over all features of the cell.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

from cellformers.errors import UserError
from cellformers.evaluate.tables import Cells, locate
from cellformers.io.files import digest_arrays

LIBRARY_SIZE = 10_000
HIGHLY_VARIABLE = 2000
COMPONENTS = 50
MIN_CELLS = 10
BINS = 20


@dataclass(frozen=True)
class Counts:
    """Counts of cells: X int64 CSR [cells, genes] in canonical form, genes object[n], totals int64[cells]."""

    X: sp.csr_matrix
    genes: np.ndarray
    totals: np.ndarray

    def digest(self) -> str:
        """Digest of the content, whatever the shards and their integer type were."""
        return digest_arrays(
            self.genes, self.X.indptr.astype(np.int64), self.X.indices.astype(np.int64), self.X.data
        )

    def log(self, genes: np.ndarray | None = None) -> sp.csr_matrix:
        """Log counts float64 [cells, genes] of all or of some gene columns."""
        X = (self.X if genes is None else self.X[:, genes]).astype(np.float64)
        X.data *= np.repeat(LIBRARY_SIZE / np.maximum(self.totals, 1), np.diff(X.indptr))
        np.log1p(X.data, out=X.data)
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


def read_counts(paths: Sequence[Path], *, vocabulary: Path | None = None) -> tuple[np.ndarray, Counts]:
    """Read counts shards; features of one gene are summed, genes are sorted by name.

    Returns
    -------
    cell ids, object[n], in the order of the files; the counts.

    Raises
    ------
    UserError
        If a shard is missing or broken, or shards differ in their features.
    """
    if not paths:
        raise UserError("no counts shards given")
    ids, blocks, features = [], [], None
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError("no such file", path=path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # features of one name are summed below
                shard = anndata.read_h5ad(path)
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"not a readable counts shard ({error})", path=path) from error
        names = np.array(shard.var_names, dtype=object)
        if features is None:
            features = names
            symbols = np.array(shard.var["symbol"], dtype=object) if "symbol" in shard.var else None
        elif not np.array_equal(features, names):
            raise UserError("has other features than the shards before it", path=path, fix="ingest again")
        ids.append(np.array(shard.obs_names, dtype=object))
        blocks.append(sp.csr_matrix(shard.X).astype(np.int64))
    assert features is not None
    genes, column = np.unique(gene_names(features, symbols, vocabulary).astype(str), return_inverse=True)
    ones = np.ones(len(column), dtype=np.int64)
    membership = sp.csr_matrix((ones, (np.arange(len(column)), column)), shape=(len(column), len(genes)))
    X = (sp.vstack(blocks, format="csr") @ membership).tocsr()
    X.eliminate_zeros()
    X.sort_indices()
    return np.concatenate(ids), Counts(X, genes.astype(object), np.asarray(X.sum(axis=1)).ravel())


def aligned_counts(
    cells: Cells, files: Mapping[str, Sequence[Path]], *, vocabulary: Path | None = None
) -> Counts:
    """Counts of `cells` in their order, over the genes that all datasets have.

    Raises
    ------
    UserError
        If shards lack cells of the benchmark, or the datasets have no gene in common.
    """
    parts: list[Counts] = []
    for dataset in dict.fromkeys(cells.dataset):
        if dataset not in files:
            raise UserError(f"no counts shards given for dataset {dataset!r}")
        ids, counts = read_counts(files[dataset], vocabulary=vocabulary)
        rows = locate(cells.cell_id[cells.dataset == dataset], ids, what="cells", path=files[dataset][0])
        parts.append(Counts(counts.X[rows], counts.genes, counts.totals[rows]))
    shared = parts[0].genes
    for part in parts[1:]:
        shared = np.intersect1d(shared.astype(str), part.genes.astype(str)).astype(object)
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
    mean = np.bincount(X.indices, weights=X.data, minlength=width) / n
    square = np.bincount(X.indices, weights=X.data**2, minlength=width) / n
    return mean, np.maximum(square - mean**2, 0) * n / max(n - 1, 1)


def highly_variable(log_counts: sp.csr_matrix, *, n_genes: int = HIGHLY_VARIABLE) -> np.ndarray:
    """Columns of the genes of highest normalised dispersion, sorted: int64[up to n_genes].

    Dispersion (variance / mean of 10,000 × count / n_counts) is compared within 20 bins of the log mean, as
    Satija et al. 2015 do (flavour "seurat" of scanpy). Genes seen in no cell are never chosen.
    """
    counts = log_counts.copy()
    np.expm1(counts.data, out=counts.data)
    mean, variance = _mean_and_variance(counts)
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
        raise UserError(f"{X.shape[0]} cells × {X.shape[1]} genes are too few for a PCA")
    return PCA(n_components=n, svd_solver="arpack", random_state=seed).fit(X)


def pca_hvg(
    counts: Counts, train: np.ndarray, test: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Principal components of highly variable genes, float64[rows, 50]; genes and axes from the training cells."""
    everything = counts.log()
    genes = highly_variable(everything[train])
    chosen = everything[:, genes]
    model = _fit_pca(chosen[train], seed)
    return model.transform(chosen[train]), model.transform(chosen[test])


def log_counts(counts: Counts, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log counts float64[rows, up to 2,000] of the genes of highest mean in training, seen in 10 of its cells."""
    everything = counts.log()
    fitted = everything[train]
    mean, _ = _mean_and_variance(fitted)
    mean[fitted.getnnz(axis=0) < min(MIN_CELLS, len(train))] = 0
    best = np.argsort(-mean, kind="stable")[:HIGHLY_VARIABLE]
    genes = np.sort(best[mean[best] > 0])
    if len(genes) == 0:
        raise UserError("no gene is detected in enough training cells")
    return fitted[:, genes].toarray(), everything[test][:, genes].toarray()


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
