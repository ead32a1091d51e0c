"""The check of values, alone."""

import itertools

import numpy as np
import pytest
import scipy.sparse as sp

from cellformers.io.names import looks_ensembl, make_names_unique, strip_version
from cellformers.io.spill import Spill
from cellformers.io.validate import looks_logged, to_counts

KINDS = [
    "uint8",
    "uint16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint32",
    "uint64",
    "float32",
    "float64",
    ">f4",
    ">i8",
]


@pytest.mark.parametrize("dtype", KINDS)
def test_counts_of_every_type(dtype):
    values = np.array([0, 1, 5, 100, 127, 0], dtype)
    counts = to_counts(values)
    assert counts is not None
    assert counts.tolist() == values.tolist()
    assert counts.dtype == (np.uint16 if dtype in ("uint8", "uint16") else np.int32)
    assert to_counts(values[:0]) is not None


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint32"])
def test_limits(dtype):
    below = np.array([2**31 - 128], dtype)
    assert to_counts(below).dtype == np.int32
    above = np.array([2**31, 3], dtype)
    assert to_counts(above).dtype == np.int64
    assert to_counts(above).tolist() == [2**31, 3]


@pytest.mark.parametrize("bad", [-1, 0.5, np.nan, np.inf, -np.inf, 1e300, -1e-30, 1 - 1e-7])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("position", [0, 17, 999])
def test_one_bad_value_among_many(bad, dtype, position):
    with np.errstate(over="ignore"):
        values = np.ones(1000, dtype)
        values[position] = bad
    assert to_counts(values) is None


def test_negative_integers():
    assert to_counts(np.array([1, -1])) is None
    assert to_counts(np.array([-128], np.int8)) is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding(dtype):
    values = np.array([0.0, 0.4999, 0.5, 1.5, 2.5, 2.49, 3.0, 16777215.0], dtype)
    assert to_counts(values, round_values=True).tolist() == [0, 0, 1, 2, 3, 2, 3, 16777215]
    for bad in (-0.1, np.nan, np.inf):
        assert to_counts(np.array([1.5, bad], dtype), round_values=True) is None


def test_logs_are_recognised_and_estimates_are_not():
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, 200)
    for target in (1e4, 1e6, 2500):
        assert looks_logged(np.log1p(counts * target / counts.sum()).astype(np.float32))
    assert not looks_logged(counts)
    assert not looks_logged(counts * 0.97)
    assert not looks_logged(counts - rng.random(200) * 0.3)
    assert not looks_logged(rng.random(500))


def test_spill_of_many_runs(monkeypatch):
    monkeypatch.setattr("cellformers.io.spill._ENTRIES", 1000)
    monkeypatch.setattr("cellformers.io.spill._BUCKETS", 16)
    truth = sp.random(300, 90, density=0.4, format="csc", random_state=0)
    truth.data = np.arange(1, truth.nnz + 1)
    truth.data[5000] = 2**40
    spill = Spill(300)
    for gene in range(90):
        part = slice(truth.indptr[gene], truth.indptr[gene + 1])
        wide = truth.data[part].max() > 2**31
        spill.add(
            truth.indices[part].astype(np.int32),
            np.full(part.stop - part.start, gene, np.int32),
            truth.data[part].astype(np.int64 if wide else np.int32),
        )
    for max_bytes in (1, 3000, 1 << 20):
        at, rows = 0, []
        for block in spill.blocks(max_bytes):
            assert block.start == at
            assert block.nbytes <= max_bytes or block.n_cells == 1
            assert all((np.diff(block.indices[a:b]) > 0).all() for a, b in itertools.pairwise(block.indptr))
            rows.append(
                sp.csr_matrix((block.data.astype(np.int64), block.indices, block.indptr), (block.n_cells, 90))
            )
            at += block.n_cells
        assert at == 300
        assert (sp.vstack(rows) != truth).nnz == 0
    spill.close()


def test_names():
    assert strip_version("ENSG00000123456.12") == "ENSG00000123456"
    assert strip_version("ENSMUSG00000123456.1") == "ENSMUSG00000123456"
    assert strip_version("AC012345.1") == "AC012345.1"
    assert strip_version("ENSG00000123456.x") == "ENSG00000123456.x"
    assert looks_ensembl(["ENSG00000123456", "ERCC-00002"])
    assert not looks_ensembl(["ACTB", "ENSA", "GAPDH"])
    assert not looks_ensembl([])
    assert make_names_unique(["a", "a", "a-1", "b", "a"]) == ["a", "a-2", "a-1", "b", "a-3"]
