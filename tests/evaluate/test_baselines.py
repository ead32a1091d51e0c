"""Baselines: fitted on the training cells only, equal to what scanpy finds, the same for any number of shards."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scanpy
import scipy.sparse as sp
from token_files import make_vocabulary

from cellformers.errors import UserError
from cellformers.evaluate import baselines, rank_features
from cellformers.evaluate.tables import Cells
from cellformers.tokens import TokenBatch
from cellformers.vocabulary import read_published


def make_counts(n: int = 200, width: int = 400, seed: int = 0) -> baselines.Counts:
    rng = np.random.default_rng(seed)
    rate = rng.gamma(0.5, 2.0, width)
    X = sp.csr_matrix(rng.poisson(rng.gamma(2.0, 0.5, (n, width)) * rate)).astype(np.int64)
    genes = np.array([f"g{i:04d}" for i in range(width)], dtype=object)
    return baselines.Counts(X, genes, np.asarray(X.sum(axis=1)).ravel())


def test_log_counts_are_per_ten_thousand_of_all_counts() -> None:
    counts = make_counts()
    dense = counts.X.toarray()
    expected = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    assert np.allclose(counts.log().toarray(), expected, rtol=1e-12)
    some = np.array([3, 5, 8])
    assert np.allclose(counts.log(some).toarray(), expected[:, some], rtol=1e-12)


def test_highly_variable_genes_are_those_of_scanpy() -> None:
    counts = make_counts()
    log = counts.log()
    adata = anndata.AnnData(log.copy())
    scanpy.pp.highly_variable_genes(adata, flavor="seurat", n_top_genes=100)
    expected = np.flatnonzero(adata.var["highly_variable"])
    found = baselines.highly_variable(log, n_genes=100)
    assert len(found) == 100
    assert len(np.intersect1d(found, expected)) >= 98


def test_nothing_is_learnt_from_test_cells() -> None:
    counts = make_counts()
    train, test = np.arange(150), np.arange(150, 200)
    other = counts.X.copy().tolil()
    other[150:, :50] = 900  # would change genes and axes if test cells were looked at
    changed = baselines.Counts(sp.csr_matrix(other), counts.genes, np.asarray(other.sum(axis=1)).ravel())
    for features in (
        lambda c: baselines.pca_hvg(c, train, test, seed=0),
        lambda c: baselines.log_counts(c, train, test),
    ):
        before, after = features(counts), features(changed)
        assert np.array_equal(before[0], after[0])
        assert before[1].shape == after[1].shape == (50, before[0].shape[1])
        assert not np.array_equal(before[1], after[1])


def test_principal_components_are_those_of_the_dense_matrix() -> None:
    counts = make_counts(80, 60)
    train = np.arange(60)
    got, _ = baselines.pca_hvg(counts, train, np.arange(60, 80), seed=0)
    log = counts.log()
    dense = log[train][:, baselines.highly_variable(log[train])].toarray()
    u, s, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    assert got.shape == (60, 50)
    assert np.allclose(np.abs(got), np.abs(u[:, :50] * s[:50]), atol=1e-6)


def test_gene_features() -> None:
    counts = make_counts(100, 60)
    dense = counts.X.toarray()
    assert np.allclose(baselines.detection(counts)[:, 0], (dense > 0).mean(axis=0))
    scaled = dense / dense.sum(axis=1, keepdims=True) * 1e4
    assert np.allclose(baselines.mean_expression(counts)[:, 0], np.log1p(scaled.mean(axis=0)))


def test_coexpression_loadings_hold_correlations() -> None:
    rng = np.random.default_rng(0)
    programme = rng.random((300, 2))
    rate = np.concatenate([np.repeat(programme[:, [k]], 20, axis=1) for k in range(2)], axis=1) * 40
    X = np.concatenate([rng.poisson(rate), np.zeros((300, 1)), rng.poisson(20, (300, 60))], axis=1)
    X = sp.csr_matrix(X).astype(np.int64)
    counts = baselines.Counts(X, np.arange(101).astype(str).astype(object), np.asarray(X.sum(axis=1)).ravel())
    loadings = baselines.coexpression_pca(counts, seed=0)
    assert loadings.shape == (101, 50)
    assert np.all(loadings[40] == 0)  # detected nowhere
    similarity = loadings[:, :3] @ loadings[:, :3].T
    within = similarity[:20, :20][~np.eye(20, dtype=bool)]
    assert within.min() > similarity[:20, 20:40].max()


@pytest.mark.filterwarnings("ignore:Variable names")
def test_shards_and_their_integer_type_do_not_matter(build: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.poisson(1.0, (31, 20))
    X[30, 3] = 70_000  # one shard of three becomes int32
    ids, genes = [f"c{i}" for i in range(31)], [f"g{i % 18}" for i in range(20)]
    digests = set()
    for shards in (1, 3):
        names, counts = baselines.read_counts(build.counts(ids, genes, X, shards=shards))
        digests.add(counts.digest())
        assert names.tolist() == ids
        assert counts.X.shape == (31, 18)
        column = int(np.flatnonzero(counts.genes == "g1")[0])
        assert np.array_equal(counts.X[:, column].toarray().ravel(), X[:, 1] + X[:, 19])
        assert np.array_equal(counts.totals, X.sum(axis=1))
    assert len(digests) == 1


def test_datasets_meet_on_their_common_genes(build: Any) -> None:
    rng = np.random.default_rng(0)
    a = rng.poisson(3.0, (5, 4))
    b = rng.poisson(3.0, (6, 3))
    files = {
        "a": build.counts([f"c{i}" for i in range(5)], ["g1", "g2", "g3", "g4"], a, name="a"),
        "b": build.counts([f"c{i}" for i in range(6)], ["g4", "g9", "g2"], b, name="b"),
    }
    cells = Cells(
        np.array(["a"] * 2 + ["b"] * 2, dtype=object), np.array(["c3", "c0", "c5", "c1"], dtype=object),
        np.array(["x", "y"] * 2, dtype=object), None,
    )  # fmt: skip
    counts = baselines.aligned_counts(cells, files)
    assert counts.genes.tolist() == ["g2", "g4"]
    assert np.array_equal(counts.X.toarray(), np.concatenate([a[[3, 0]][:, [1, 3]], b[[5, 1]][:, [2, 0]]]))
    assert counts.totals.tolist() == [a[3].sum(), a[0].sum(), b[5].sum(), b[1].sum()]
    files["b"] = build.counts([f"c{i}" for i in range(6)], ["h1", "h2", "h3"], b, name="other")
    with pytest.raises(UserError, match="no gene name in common"):
        baselines.aligned_counts(cells, files)


def test_broken_or_foreign_shards(build: Any, tmp_path: Path) -> None:
    X = np.ones((4, 3), dtype=int)
    good = build.counts(list("abcd"), ["g1", "g2", "g3"], X)
    other = build.counts(list("efgh"), ["g1", "g2", "g4"], X, name="other")
    with pytest.raises(UserError, match="other features"):
        baselines.read_counts([*good, *other])
    broken = tmp_path / "broken.h5ad"
    broken.write_bytes(good[0].read_bytes()[:700])
    with pytest.raises(UserError, match="is truncated"):
        baselines.read_counts([broken])
    with pytest.raises(UserError, match="no such file"):
        baselines.read_counts([tmp_path / "none.h5ad"])
    with pytest.raises(UserError, match="cell 'a' is in two of the shards"):
        baselines.read_counts([*good, *good])


@pytest.mark.filterwarnings("ignore:Variable names")
def test_only_the_cells_of_the_benchmark_are_kept(build: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.poisson(1.0, (40, 12))
    X[7, 10:] = 2_000_000_000  # of one gene, and together more than int32 holds
    genes = [f"g{i:02d}" for i in range(11)]
    files = build.counts([f"c{i}" for i in range(40)], [*genes, "g10"], X, shards=4)
    wanted = np.array(["c31", "c7", "c8", "elsewhere"], dtype=object)
    names, counts = baselines.read_counts(files, cells=wanted)
    summed = np.concatenate([X[:, :10], X[:, 10:].sum(axis=1, keepdims=True)], axis=1)[[7, 8, 31]]
    assert names.tolist() == ["c7", "c8", "c31"]
    assert np.array_equal(counts.X.toarray(), summed)
    assert counts.totals.tolist() == summed.sum(axis=1).tolist()
    none, empty = baselines.read_counts(files, cells=wanted[3:])
    assert len(none) == 0
    assert empty.X.shape == (0, 11)


def test_moments_of_many_cells_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = make_counts(100, 300)
    rows, test = np.arange(70), np.arange(70, 100)
    before = [f(counts, rows, test) for f in (lambda *a: baselines.pca_hvg(*a, seed=0), baselines.log_counts)]
    monkeypatch.setattr(baselines, "ROWS", 16)
    after = [f(counts, rows, test) for f in (lambda *a: baselines.pca_hvg(*a, seed=0), baselines.log_counts)]
    for one, two in zip(before, after, strict=True):
        assert all(np.allclose(a, b, atol=1e-8) for a, b in zip(one, two, strict=True))


def test_ranks_of_genes_run_from_one_to_nothing() -> None:
    vocabulary = make_vocabulary(5, special="v2")
    special, gene = vocabulary.special_tokens, vocabulary.token_ids
    cells = [
        np.array([special["<cls>"], gene[3], gene[0], gene[4], gene[1], special["<eos>"]], dtype=np.int32),
        np.array([special["<cls>"], special["<eos>"]], dtype=np.int32),
        np.array([special["<cls>"], gene[2], special["<eos>"]], dtype=np.int32),
    ]
    offsets = np.cumsum([0, *map(len, cells)])
    batch = TokenBatch(np.array(list("abc"), dtype=object), np.concatenate(cells), offsets)
    ranks = rank_features.normalised_ranks(batch, np.ones(3, dtype=bool), vocabulary)
    assert ranks.toarray().tolist() == [[0.75, 0.25, 0, 1, 0.5], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]
    some = rank_features.normalised_ranks(batch, np.array([False, False, True]), vocabulary)
    assert some.toarray().tolist() == [[0, 0, 1, 0, 0]]


def test_rank_features_are_of_genes_that_training_cells_rank_high() -> None:
    rng = np.random.default_rng(0)
    dense = rng.random((40, 3000)) * (rng.random((40, 3000)) < 0.5)
    dense[30:, 2500:] = 5  # of test cells: must not choose genes
    dense[:30, 2999] = 0
    ranks = sp.csr_matrix(dense.astype(np.float32))
    train, test = np.arange(30), np.arange(30, 40)
    a, b = rank_features.rank_only(ranks, train, test)
    detected = (dense[:30] > 0).sum(axis=0) >= 10
    best = np.sort(np.argsort(-np.where(detected, dense[:30].astype(np.float32).sum(axis=0), 0))[:2000])
    assert a.shape == (30, 2000)
    assert b.shape == (10, 2000)
    assert np.allclose(np.sort(a.sum(axis=0)), np.sort(dense[:30][:, best].sum(axis=0)), atol=1e-4)


def test_a_vocabulary_brings_symbols_and_ids_together(
    build: Any, reference_data: Path, tmp_path: Path
) -> None:
    read_published(reference_data / "geneformer" / "gc104M").save(tmp_path / "vocabulary")
    X = np.array([[3, 1, 2, 5], [0, 4, 1, 1]])
    files = {
        "a": build.counts(["c1", "c2"], ["CD3E", "GAPDH", "no-such-gene", "cd3e"], X, name="a"),
        "b": build.counts(["c1", "c2"], ["x", "ENSG00000111640", "ENSG00000198851", "y"], X, name="b"),
    }
    cells = Cells(*(np.array(v, dtype=object) for v in (list("aabb"), ["c1", "c2"] * 2, list("xyxy"))), None)
    counts = baselines.aligned_counts(cells, files, vocabulary=tmp_path / "vocabulary")
    assert counts.genes.tolist() == ["ENSG00000111640", "ENSG00000198851"]
    assert counts.X.toarray().tolist() == [[1, 8], [4, 1], [1, 2], [4, 1]]
    assert counts.totals.tolist() == [11, 6, 11, 6]
