"""Builders of the artefacts that evaluation reads, in the formats of the contracts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp

from cellformers.io.files import write_table


def bounds(n: int, shards: int) -> list[tuple[int, int]]:
    return list(pairwise(round(i * n / shards) for i in range(shards + 1)))


@dataclass
class Builder:
    """Writes small artefacts under one folder."""

    folder: Path

    def cells(self, name: str = "atlas", **columns: Sequence[Any]) -> Path:
        """A cells.parquet."""
        path = self.folder / name / "cells.parquet"
        write_table(pa.table(columns), path)
        return path

    def vectors(
        self,
        ids: Sequence[str],
        values: np.ndarray,
        *,
        shards: int = 1,
        name: str = "emb",
        key: str = "cell_id",
    ) -> list[Path]:
        """Embedding shards of cells or genes."""
        paths = []
        for number, (low, high) in enumerate(bounds(len(ids), shards)):
            flat = pa.array(np.asarray(values[low:high], dtype=np.float32).ravel())
            column = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
            path = self.folder / f"{name}-{shards}" / f"{number}.parquet"
            write_table(pa.table({key: pa.array(list(ids[low:high])), "embedding": column}), path)
            paths.append(path)
        return paths

    def counts(
        self,
        ids: Sequence[str],
        genes: Sequence[str],
        X: np.ndarray,
        *,
        shards: int = 1,
        name: str = "counts",
    ) -> list[Path]:
        """Counts shards, uint16 where it fits."""
        paths = []
        for number, (low, high) in enumerate(bounds(len(ids), shards)):
            block = X[low:high]
            dtype = np.uint16 if block.max() < 60_000 else np.int32
            shard = anndata.AnnData(
                sp.csr_matrix(block.astype(dtype)),
                obs=pd.DataFrame(index=pd.Index(list(ids[low:high]))),
                var=pd.DataFrame(index=pd.Index(list(genes))),
            )
            path = self.folder / f"{name}-{shards}" / f"{number}.h5ad"
            path.parent.mkdir(parents=True, exist_ok=True)
            shard.write_h5ad(path)
            paths.append(path)
        return paths


@pytest.fixture
def build(tmp_path: Path) -> Builder:
    return Builder(tmp_path)


@dataclass
class Atlas:
    """Cells of three types from `n_donors` donors; vectors and counts tell the types apart."""

    cells: Path
    ids: np.ndarray
    labels: np.ndarray
    donors: np.ndarray
    vectors: np.ndarray
    counts: np.ndarray
    genes: list[str]


@pytest.fixture
def atlas(build: Builder) -> Any:
    def make(
        *, n: int = 360, n_donors: int = 6, name: str = "atlas", seed: int = 0, gap: float = 4.0
    ) -> Atlas:
        rng = np.random.default_rng(seed)
        kind = rng.integers(0, 3, n)
        donor = np.arange(n) % n_donors
        ids = np.array([f"{name}-cell{i}" for i in rng.permutation(n)], dtype=object)
        labels = np.array(["B cell", "NK", "T cell"], dtype=object)[kind]
        donors = np.array([f"{name}-d{d}" for d in donor], dtype=object)
        vectors = (
            rng.normal(size=(n, 8)) + gap * np.eye(3, 8)[kind] + 0.3 * rng.normal(size=(n_donors, 8))[donor]
        )
        rate = np.full((3, 120), 1.0)
        for k in range(3):
            rate[k, 20 * k : 20 * (k + 1)] = 1 + gap
        rate[:, 60:] *= np.random.default_rng(7).gamma(1.0, 1.0, 60)
        counts = rng.poisson(rate[kind] * rng.gamma(5.0, 0.2, n)[:, None])
        cells = build.cells(name, cell_id=ids, celltype=labels, donor=donors, qc_pass=np.ones(n, dtype=bool))
        return Atlas(cells, ids, labels, donors, vectors, counts, [f"ENSG{i:011d}" for i in range(120)])

    return make
