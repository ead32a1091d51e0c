"""Truth for the readers: small counts with awkward rows and columns, and how a source is compared with them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from cellformers.errors import UserError
from cellformers.io import CountSource, ReadOptions, open_counts
from cellformers.io.files import digest_file

N_CELLS, N_GENES = 137, 211


def make_counts(n_cells: int = N_CELLS, n_genes: int = N_GENES, *, seed: int = 0) -> sp.csr_matrix:
    """Counts with an empty cell, an empty gene, a full cell and one count above 65,535."""
    rng = np.random.default_rng(seed)
    dense = rng.poisson(rng.gamma(0.3, 2.0, n_genes), (n_cells, n_genes))
    dense[3] = 0
    dense[:, 5] = 0
    dense[7] = 1 + rng.integers(0, 9, n_genes)
    dense[11, 13] = 70_000
    return sp.csr_matrix(dense.astype(np.float32))


@pytest.fixture(scope="session")
def truth() -> sp.csr_matrix:
    return make_counts()


@pytest.fixture(scope="session")
def gene_ids() -> list[str]:
    return [f"ENSG{i:011d}" for i in range(1, N_GENES + 1)]


@pytest.fixture(scope="session")
def symbols() -> list[str]:
    return [f"GENE{i}" for i in range(1, N_GENES + 1)]


@pytest.fixture(scope="session")
def cell_ids() -> list[str]:
    rng = np.random.default_rng(1)
    return ["".join(rng.choice(list("ACGT"), 16)) + f"-{i}" for i in range(N_CELLS)]


def collect_blocks(source: CountSource, max_bytes: int = 1 << 20) -> np.ndarray:
    """All blocks of a source as one int64 table; checks what every block must be."""
    dense = np.zeros((source.n_cells, source.n_features), np.int64)
    at = 0
    for block in source.blocks(max_bytes=max_bytes):
        assert block.start == at
        assert block.indptr.dtype == np.int64
        assert block.indptr[0] == 0
        assert block.indices.dtype == np.int32
        assert block.data.dtype in (np.uint16, np.int32, np.int64)
        assert len(block.indices) == len(block.data) == block.indptr[-1]
        assert block.nbytes <= max_bytes or block.n_cells == 1
        rows = at + np.repeat(np.arange(block.n_cells), np.diff(block.indptr))
        np.add.at(dense, (rows, block.indices), block.data)
        at += block.n_cells
    assert at == source.n_cells
    return dense


@pytest.fixture(scope="session")
def collect() -> Callable[..., np.ndarray]:
    return collect_blocks


Check = Callable[..., CountSource]


@pytest.fixture
def agrees(truth: sp.csr_matrix, gene_ids: list[str], cell_ids: list[str]) -> Check:
    """A function that opens a file and compares it with the truth in blocks of several sizes."""

    def check(
        path: Path, *, expected: np.ndarray | None = None, genes: list[str] | None = None, **options: object
    ):
        before = digest_file(path) if path.is_file() else None
        wanted = truth.toarray().astype(np.int64) if expected is None else expected
        with open_counts(path, options=ReadOptions(**options)) as source:
            assert list(source.cell_ids) == cell_ids
            assert source.names.to_pylist() == cell_ids
            assert list(source.feature_ids) == (gene_ids if genes is None else genes)
            assert (source.n_cells, source.n_features) == wanted.shape
            assert list(source.obs().index) == cell_ids
            for max_bytes in (1, 5000, 1 << 20):
                np.testing.assert_array_equal(collect_blocks(source, max_bytes), wanted)
        assert before is None or digest_file(path) == before
        return source

    return check


@pytest.fixture
def refuses() -> Callable[..., str]:
    """A function that reads a file to its end and returns the one line it is refused with."""

    def check(path: Path, *parts: str, **options: object) -> str:
        with pytest.raises(UserError) as caught, open_counts(path, options=ReadOptions(**options)) as source:
            for _ in source.blocks(max_bytes=5000):
                pass
        line = str(caught.value)
        assert "\n" not in line
        assert str(path) in line
        for part in parts:
            assert part in line, line
        return line

    return check
