"""Large count files for measuring speed and memory: the sizes are realistic, the biology is not.

    write_large("big.h5ad", n_cells=1_000_000, median_counts=2_000)

Eight cell types, each with its own gene programme, ten donors, and a library for every 10,000 cells in a row. A
cell's total is log-normal, its counts are multinomial in the proportions of its type:

    p_tg ~ exp(Normal(0, 2.2²)) · exp(Normal(0, 1)),   Σ_g p_tg = 1;   mitochondrial genes together 5 %
    n_c = clip(median · exp(Normal(0, 0.5²)), 500, 60,000)   (at least a tenth of the median, where that is less)

Proportions are rounded to 2^-22. Blocks of cells have random numbers of their own, so that a smaller file holds the
first cells of a larger one, and memory does not depend on the number of cells.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from cellformers.io.files import atomic_path
from cellformers.simulate.truth import FIRST_SYNTHETIC_ID, MITOCHONDRIAL_GENES

N_GENES, N_TYPES, N_DONORS, CELLS_A_LIBRARY = 33_000, 8, 10, 10_000
MITOCHONDRIAL_SHARE = 0.05
BLOCK = 2000  # cells drawn at a time
LEVELS = 1 << 22
CHUNK = 1 << 18

Array = np.ndarray[Any, Any]


def write_large(
    path: str | Path,
    *,
    n_cells: int,
    median_counts: float = 5400,
    gene_ids: Sequence[str] | None = None,
    compressed: bool = False,
    seed: int = 0,
) -> int:
    """Write an AnnData .h5ad: X float32 CSR, obs cell_type, donor and library (categories), var Ensembl ids.

    Parameters
    ----------
    n_cells, median_counts
        Of the file; 5,400 counts make some 2,400 detected genes a cell, 2,000 some 1,100.
    gene_ids
        Names of the features; None: 33,000, 13 mitochondrial ones among them, the others synthetic.
    compressed
        Gzip X, as files for download are; False: as scanpy writes it.

    Returns
    -------
    Stored counts, all cells together.
    """
    import h5py

    genes = _gene_ids() if gene_ids is None else list(gene_ids)
    tables = _tables(genes, seed)
    options: dict[str, Any] = (
        {"compression": "gzip", "compression_opts": 1, "shuffle": True} if compressed else {}
    )
    types, donors = np.empty(n_cells, np.int8), np.empty(n_cells, np.int8)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        _encode(file, "anndata", "0.1.0")
        X = file.create_group("X")
        _encode(X, "csr_matrix", "0.1.0")
        X.attrs["shape"] = np.array([n_cells, len(genes)])
        data = X.create_dataset("data", (0,), "f4", maxshape=(None,), chunks=(CHUNK,), **options)
        indices = X.create_dataset("indices", (0,), "i4", maxshape=(None,), chunks=(CHUNK,), **options)
        indptr = np.zeros(n_cells + 1, np.int64)
        for number, start in enumerate(range(0, n_cells, BLOCK)):
            n = min(BLOCK, n_cells - start)
            rng = np.random.default_rng([seed, number])
            drawn = _draw(rng, tables, len(genes), median_counts)
            types[start : start + n], donors[start : start + n] = drawn[0][:n], drawn[1][:n]
            ends = drawn[2][: n + 1] + indptr[start]
            indptr[start : start + n + 1] = ends
            for dataset, values in ((indices, drawn[3]), (data, drawn[4])):
                dataset.resize((int(ends[-1]),))
                dataset[ends[0] :] = values[: ends[-1] - ends[0]]
        X.create_dataset("indptr", data=indptr)
        names = np.char.add("cell", np.char.zfill(np.arange(n_cells).astype(str), 7))
        labels: dict[str, tuple[Array, str, int]]
        labels = {"cell_type": (types, "type", N_TYPES), "donor": (donors, "donor", N_DONORS)}
        library = np.arange(n_cells, dtype=np.int32) // CELLS_A_LIBRARY
        labels["library"] = (library, "library", int(library[-1]) + 1)
        _write_frame(file, "obs", names, labels)
        _write_frame(file, "var", np.array(genes), {})
        for name in ("layers", "obsm", "obsp", "uns", "varm", "varp"):
            _encode(file.create_group(name), "dict", "0.1.0")
    return int(indptr[-1])


def _gene_ids() -> list[str]:
    """Ids of no real gene, and the mitochondrial ones."""
    n = N_GENES - len(MITOCHONDRIAL_GENES)
    return sorted([f"ENSG{FIRST_SYNTHETIC_ID + i:011d}" for i in range(n)] + list(MITOCHONDRIAL_GENES))


def _tables(genes: Sequence[str], seed: int) -> Array:
    """uint16[N_TYPES, LEVELS]: a uniform level of a row is a gene in the proportions of the type."""
    rng = np.random.default_rng(seed)
    programmes = rng.lognormal(0, 2.2, len(genes)) * rng.lognormal(0, 1, (N_TYPES, len(genes)))
    programmes /= programmes.sum(axis=1, keepdims=True)
    mitochondrial = np.isin(genes, list(MITOCHONDRIAL_GENES))
    if mitochondrial.any():
        share = programmes[:, mitochondrial].sum(axis=1, keepdims=True)
        programmes[:, mitochondrial] *= MITOCHONDRIAL_SHARE / share
        programmes[:, ~mitochondrial] *= (1 - MITOCHONDRIAL_SHARE) / (1 - share)
    levels = (np.arange(LEVELS) + 0.5) / LEVELS
    ends = np.cumsum(programmes, axis=1)
    return np.stack([np.searchsorted(end / end[-1], levels).astype(np.uint16) for end in ends])


def _draw(
    rng: np.random.Generator, tables: Array, n_genes: int, median: float
) -> tuple[Array, Array, Array, Array, Array]:
    """A block of cells: types, donors, indptr from 0, indices int32 and counts float32."""
    types, donors = rng.integers(0, N_TYPES, BLOCK), rng.integers(0, N_DONORS, BLOCK)
    totals = np.clip(median * rng.lognormal(0, 0.5, BLOCK), min(500, median / 10), 60_000).astype(np.int64)
    levels = rng.integers(0, LEVELS, int(totals.sum()), dtype=np.uint32)
    indptr, indices = np.zeros(BLOCK + 1, np.int64), np.empty(len(levels), np.int32)
    counts = np.empty(len(levels), np.float32)
    _count(types, totals, levels, tables, np.zeros(n_genes, np.int32), indptr, indices, counts)
    return types, donors, indptr, indices[: indptr[-1]], counts[: indptr[-1]]


@njit(cache=True)
def _count(
    types: Array, totals: Array, levels: Array, tables: Array, seen: Array, indptr: Array, indices: Array, counts: Array
) -> None:  # fmt: skip
    """Count each cell's genes; `seen`, int32[genes], is zero before and after."""
    drawn = n = 0
    for cell in range(len(totals)):
        for _ in range(totals[cell]):
            seen[tables[types[cell], levels[drawn]]] += 1
            drawn += 1
        for gene in range(len(seen)):
            if seen[gene] > 0:
                indices[n] = gene
                counts[n] = seen[gene]
                seen[gene] = 0
                n += 1
        indptr[cell + 1] = n


def _encode(item: Any, kind: str, version: str) -> None:
    item.attrs.update({"encoding-type": kind, "encoding-version": version})


def _write_frame(file: Any, name: str, index: Array, labels: dict[str, tuple[Array, str, int]]) -> None:
    """A data frame as anndata has it: index, and columns of categories."""
    import h5py

    text = h5py.string_dtype()
    frame = file.create_group(name)
    _encode(frame, "dataframe", "0.2.0")
    frame.attrs["_index"] = "_index"
    frame.attrs.create("column-order", list(labels), dtype=text)
    frame.create_dataset("_index", data=index.astype(object), dtype=text)
    _encode(frame["_index"], "string-array", "0.2.0")
    for column, (codes, prefix, n) in labels.items():
        group = frame.create_group(column)
        _encode(group, "categorical", "0.2.0")
        group.attrs["ordered"] = False
        group.create_dataset("codes", data=codes)
        group.create_dataset("categories", data=[f"{prefix}{i}" for i in range(n)], dtype=text)
        _encode(group["codes"], "array", "0.2.0")
        _encode(group["categories"], "string-array", "0.2.0")
