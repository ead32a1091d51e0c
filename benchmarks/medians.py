"""Gene medians against t-digests (`crick.TDigest`, what the published medians were made with): accuracy and time.

    python benchmarks/medians.py                      # 5,000 simulated cells x 2,000 genes
    python benchmarks/medians.py --cells 20000 --genes 5000 --shards 4

Both see the same shards once. The t-digests are updated as in the notebook that made the published medians: gene by
gene with the values of a shard's cells, then merged over shards. Errors are relative to the exact medians.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

# benchmarks/tokenize.py would hide Python's own module of that name from the packages imported below
sys.path.remove(str(Path(__file__).resolve().parent))

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import scipy.sparse as sp
from crick import TDigest

from cellformers.counts import Sample, ingest
from cellformers.medians import merge, sketch


def simulate(n_cells: int, n_genes: int, seed: int) -> sp.csr_matrix:
    """Negative-binomial counts with depths and gene means that differ as in droplet data, CSR."""
    rng = np.random.default_rng(seed)
    means = rng.lognormal(-2, 2, n_genes)
    blocks = []
    for low in range(0, n_cells, 1000):
        depth = rng.lognormal(0, 0.5, (min(1000, n_cells - low), 1))
        blocks.append(sp.csr_matrix(rng.poisson(rng.gamma(0.5, depth * means / 0.5))))
    return sp.vstack(blocks, format="csr")


def normalised(X: sp.csr_matrix) -> sp.csc_matrix:
    """count / n_counts x 10,000, by gene."""
    n_counts = np.asarray(X.sum(1)).ravel()
    scaled = X.astype(np.float64)
    scaled.data = scaled.data / np.repeat(n_counts, np.diff(scaled.indptr)) * 10_000
    return scaled.tocsc()


def by_digests(shards: list[sp.csr_matrix]) -> np.ndarray:
    """Medians by t-digests, merged over shards; NaN where a gene is never detected."""
    merged = [TDigest() for _ in range(shards[0].shape[1])]
    for shard in shards:
        columns = normalised(shard)
        for gene, digest in enumerate(merged):
            part = TDigest()
            part.update(columns.data[columns.indptr[gene] : columns.indptr[gene + 1]])
            digest.merge(part)
    return np.array([digest.quantile(0.5) for digest in merged])


def by_sketches(shards: list[Path], folder: Path, relative_error: float) -> pd.Series:
    """Medians by sketches merged over shards, by gene id."""
    parts = [folder / f"{i}.sketch.parquet" for i in range(len(shards))]
    for shard, part in zip(shards, parts, strict=True):
        sketch(shard, part, relative_error=relative_error)
    merge(parts, folder / "medians.parquet")
    return pq.read_table(folder / "medians.parquet").to_pandas().set_index("gene_id")["median"]


def main() -> None:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=5000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--relative-error", type=float, default=0.001)
    arguments = parser.parse_args()

    X = simulate(arguments.cells, arguments.genes, arguments.seed)
    genes = [f"ENSG{i:011d}" for i in range(arguments.genes)]
    columns = normalised(X)
    exact = pd.Series({g: np.median(columns[:, i].data) for i, g in enumerate(genes) if columns[:, i].nnz})

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        anndata.AnnData(X, var=pd.DataFrame(index=genes)).write_h5ad(folder / "in.h5ad")
        shards = [folder / f"{i}.h5ad" for i in range(arguments.shards)]
        tables = {kind: folder / f"{kind}.parquet" for kind in ("metadata", "features")}
        ingest([Sample(folder / "in.h5ad")], shards, **tables)
        by_sketches(shards[:1], folder, arguments.relative_error)  # compiles the loops
        results = {}
        start = time.perf_counter()
        results["sketch"] = by_sketches(shards, folder, arguments.relative_error), time.perf_counter() - start
        start = time.perf_counter()
        loaded = [anndata.read_h5ad(shard).X for shard in shards]
        medians = pd.Series(by_digests(loaded), index=genes)
        results["t-digest"] = medians, time.perf_counter() - start

    print(
        f"{arguments.cells:,} cells x {arguments.genes:,} genes, {X.nnz:,} counts, {arguments.shards} shards"
    )
    print(
        f"{'method':<10}{'seconds':>9}{'cells/s':>10}{'median error':>14}{'99 % of genes':>15}{'largest':>10}"
    )
    for method, (found, seconds) in results.items():
        errors = (found.reindex(exact.index) / exact - 1).abs()
        middle, most = errors.median(), errors.quantile(0.99)
        rate = arguments.cells / seconds
        print(f"{method:<10}{seconds:>9.2f}{rate:>10,.0f}{middle:>14.2e}{most:>15.2e}{errors.max():>10.2e}")


if __name__ == "__main__":
    main()
