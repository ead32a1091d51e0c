"""Medians: within the error bound of the exact ones, and the same to the byte for any sharding."""

import itertools
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellformers import histograms
from cellformers.counts import Sample, ingest
from cellformers.errors import UserError
from cellformers.histograms import Chunk, bucket_of, mantissa_bits, medians_of, value_of
from cellformers.io.files import read_metadata
from cellformers.medians import merge, sketch
from cellformers.qc import QCParameters, qc, qc_metrics
from cellformers.vocabulary import Vocabulary

GENES = [f"ENSG{i:011d}" for i in range(1, 301)]
values = st.floats(1e-14, 10_000.0)
errors = st.sampled_from([0.1, 0.03, 0.001, 0.0001])


def counts(n_cells: int, n_genes: int = 300, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.negative_binomial(0.3, 0.3 / (0.3 + rng.lognormal(0, 2, n_genes)), (n_cells, n_genes))


def dataset(folder: Path, X, *, shards: int = 1, genes=GENES, symbols=None, obs=None) -> list[Path]:
    folder.mkdir(exist_ok=True, parents=True)
    var = pd.DataFrame({} if symbols is None else {"symbol": symbols}, index=list(genes)[: X.shape[1]])
    frame = pd.DataFrame(obs or {}, index=[f"c{i}" for i in range(len(X))])
    anndata.AnnData(sp.csr_matrix(X.astype(np.float64)), obs=frame, var=var).write_h5ad(folder / "in.h5ad")
    outputs = [folder / f"{i}.h5ad" for i in range(shards)]
    ingest(
        [Sample(folder / "in.h5ad")],
        outputs,
        metadata=folder / "metadata.parquet",
        features=folder / "features.parquet",
    )
    return outputs


def sketches(shards, **options) -> list[Path]:
    outputs = [path.with_suffix(".sketch") for path in shards]
    for shard, output in zip(shards, outputs, strict=True):
        sketch(shard, output, **options)
    return outputs


def exact(X) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        scaled = X / X.sum(1, keepdims=True) * 10_000
    return np.array([np.median(column[column > 0]) if (column > 0).any() else np.nan for column in scaled.T])


@given(st.lists(values, min_size=1, max_size=50), errors)
def test_a_bucket_stands_for_its_values(numbers, error):
    bits = mantissa_bits(error)
    array = np.array(numbers)
    buckets = bucket_of(array, bits)
    assert (abs(value_of(buckets, bits) - array) <= error * array).all()
    assert (buckets >= 0).all()
    assert (buckets < 64 << bits).all()
    order = np.argsort(array, kind="stable")
    assert (np.diff(buckets[order]) >= 0).all()


@given(st.lists(st.lists(values, min_size=1, max_size=30), min_size=1, max_size=5), errors)
def test_medians_of_buckets_are_within_the_error(genes, error):
    bits = mantissa_bits(error)
    parts = [np.unique(bucket_of(np.array(gene), bits), return_counts=True) for gene in genes]
    chunk = Chunk(
        np.array([f"g{i}" for i in range(len(genes))], object),
        np.full(len(genes), None, object),
        np.repeat(np.arange(len(genes)), [len(buckets) for buckets, _ in parts]),
        np.concatenate([buckets for buckets, _ in parts]),
        np.concatenate([n for _, n in parts]),
    )
    medians, n = medians_of(chunk, bits)
    truth = np.array([np.median(gene) for gene in genes])
    assert n.tolist() == [len(gene) for gene in genes]
    # half an ulp of the midpoint itself on top
    assert (abs(medians - truth) <= (error + 1e-15) * truth).all()


def test_mantissa_bits():
    assert mantissa_bits(0.001) == 9
    assert mantissa_bits(2**-10) == 9
    assert mantissa_bits(0.1) == 3
    for error in (0.5, 0.00001, float("nan")):
        with pytest.raises(UserError, match="not within"):
            mantissa_bits(error)


@pytest.mark.parametrize("error", [0.03, 0.001, 0.0001])
@pytest.mark.parametrize("n_cells", [1, 2, 500, 501])
def test_medians_are_the_exact_ones_within_the_error(tmp_path, n_cells, error):
    X = counts(n_cells)
    merge(sketches(dataset(tmp_path, X), relative_error=error), tmp_path / "m.parquet")
    table = pq.read_table(tmp_path / "m.parquet")
    truth = exact(X)
    detected = ~np.isnan(truth)
    assert table["gene_id"].to_pylist() == [
        gene for gene, there in zip(GENES, detected, strict=True) if there
    ]
    assert (abs(table["median"].to_numpy() - truth[detected]) <= error * truth[detected]).all()
    assert table["n_cells"].to_pylist() == (X > 0).sum(0)[detected].tolist()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(0, 12))
def test_any_counts(tmp_path_factory, seed, n_cells, log_size):
    rng = np.random.default_rng(seed)
    X = rng.integers(0, 10**log_size + 1, (n_cells, 5)) * (rng.random((n_cells, 5)) < 0.7)
    X[0, 0] = 1
    folder = tmp_path_factory.mktemp("any")
    merge(sketches(dataset(folder, X)), folder / "m.parquet")
    truth = exact(X)
    truth = truth[~np.isnan(truth)]
    found = pq.read_table(folder / "m.parquet")["median"].to_numpy()
    assert (abs(found - truth) <= 0.001 * truth).all()


def test_the_same_bytes_for_any_number_and_order_of_shards(tmp_path):
    X = counts(70)
    seen = set()
    for shards in (1, 2, 7):
        made = sketches(dataset(tmp_path / str(shards), X, shards=shards))
        orders = (
            itertools.islice(itertools.permutations(made), 0, None, 911)
            if shards == 7
            else [made, made[::-1]]
        )
        for order in orders:
            merge(list(order), tmp_path / "m.parquet")
            seen.add((tmp_path / "m.parquet").read_bytes())
    assert len(seen) == 1
    assert read_metadata(tmp_path / "m.parquet")["parameters"] == {"relative_error": 0.001}


def test_counters_that_go_to_disk_change_nothing(tmp_path, monkeypatch):
    shard = dataset(tmp_path, counts(200))
    plain = sketches(shard)[0].read_bytes()
    monkeypatch.setattr(histograms, "POOL_BYTES", 1)
    spilled = []
    write = histograms.write_sketch
    monkeypatch.setattr("cellformers.medians.write_sketch", lambda *a: (spilled.append(a[1]), write(*a)))
    assert sketches(shard)[0].read_bytes() == plain
    assert len(spilled) > 3
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".part")]


def test_gene_ranges_and_row_groups_change_nothing(tmp_path, monkeypatch):
    shards = dataset(tmp_path, counts(150), shards=3)
    merge(sketches(shards), tmp_path / "a.parquet")
    monkeypatch.setattr(histograms, "MERGE_BYTES", 3_000_000)
    monkeypatch.setattr(histograms, "ROWS_PER_GROUP", 100)
    made = sketches(shards)
    assert pq.ParquetFile(made[0]).num_row_groups > 5
    merge(made, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_sketch_is_ordered_and_its_row_groups_hold_whole_genes(tmp_path, monkeypatch):
    monkeypatch.setattr(histograms, "ROWS_PER_GROUP", 500)
    X = counts(100)
    path = sketches(dataset(tmp_path, X))[0]
    file = pq.ParquetFile(path)
    table = file.read()
    keys = list(zip(table["gene_id"].to_pylist(), table["bucket"].to_pylist(), strict=True))
    assert keys == sorted(set(keys))
    assert sum(table["count"].to_pylist()) == (X > 0).sum()
    groups = [set(file.read_row_group(i)["gene_id"].to_pylist()) for i in range(file.num_row_groups)]
    assert len(groups) > 3
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_against_t_digests(tmp_path):
    crick = pytest.importorskip("crick")
    X = counts(3000, 40)
    merge(sketches(dataset(tmp_path, X)), tmp_path / "m.parquet")
    found = dict(
        zip(
            *(pq.read_table(tmp_path / "m.parquet")[c].to_pylist() for c in ("gene_id", "median")),
            strict=True,
        )
    )
    scaled = X / X.sum(1, keepdims=True) * 10_000
    for gene, column in zip(GENES, scaled.T, strict=False):
        digest = crick.TDigest()
        digest.update(column[column > 0])
        if (column > 0).sum() > 100:
            assert found[gene] == pytest.approx(digest.quantile(0.5), rel=0.03)


def test_features_of_one_gene_are_summed_in_the_cell(tmp_path):
    X = counts(50, 6)
    names = [GENES[0], GENES[1], GENES[0], GENES[2], GENES[3], GENES[0]]
    merge(sketches(dataset(tmp_path, X, genes=names)), tmp_path / "m.parquet")
    merged = np.stack([X[:, [0, 2, 5]].sum(1), X[:, 1], X[:, 3], X[:, 4]], axis=1)
    table = pq.read_table(tmp_path / "m.parquet")
    assert table["gene_id"].to_pylist() == GENES[:4]
    assert np.allclose(table["median"].to_numpy(), exact(merged), rtol=0.001)
    assert table["n_cells"].to_pylist() == (merged > 0).sum(0).tolist()


def test_a_vocabulary_maps_features_to_genes(tmp_path, reference_data):
    from cellformers.genes import read_published

    vocabulary: Vocabulary = read_published(reference_data / "geneformer" / "gc104M")
    X = counts(60, 4) + 1
    names = ["GAPDH", "ENSG00000111640", "no such gene", "ACTB"]
    symbols = {"ENSG00000075624": "ACTB", "ENSG00000111640": "GAPDH"}
    merge(sketches(dataset(tmp_path, X, genes=names), vocabulary=vocabulary), tmp_path / "m.parquet")
    table = pq.read_table(tmp_path / "m.parquet")
    assert dict(zip(table["gene_id"].to_pylist(), table["symbol"].to_pylist(), strict=True)) == symbols
    share = X / X.sum(1, keepdims=True) * 10_000  # of all counts, also those of unknown features
    truth = [np.median(share[:, 3]), np.median(share[:, 0] + share[:, 1])]
    assert np.allclose(table["median"].to_numpy(), truth, rtol=0.001)
    assert read_metadata(tmp_path / "m.parquet")["inputs"]["vocabulary"] == vocabulary.digest


def test_only_cells_that_pass_count(tmp_path):
    X = counts(80)
    shards = dataset(tmp_path, X, shards=3)
    for shard in shards:
        qc_metrics(shard, shard.with_suffix(".qc"))
    cells = tmp_path / "cells.parquet"
    n_genes = int(np.median((X > 0).sum(1)))
    qc(
        [shard.with_suffix(".qc") for shard in shards],
        tmp_path / "metadata.parquet",
        output=cells,
        thresholds=tmp_path / "t.json",
        parameters=QCParameters(method="none", min_genes=n_genes),
    )
    kept = X[(X > 0).sum(1) >= n_genes]
    assert 0 < len(kept) < 80
    merge(sketches(shards, cells=cells), tmp_path / "m.parquet")
    truth = exact(kept)
    found = pq.read_table(tmp_path / "m.parquet")
    assert np.allclose(found["median"].to_numpy(), truth[~np.isnan(truth)], rtol=0.001)


def test_any_count_file_gives_what_its_shard_gives(tmp_path):
    X = counts(40)
    shards = dataset(tmp_path, X, obs={"filter_pass": [1] * 20 + [0] * 20})
    sketch(tmp_path / "in.h5ad", tmp_path / "raw.sketch")
    merge([tmp_path / "raw.sketch"], tmp_path / "m.parquet")
    truth = exact(X[:20])
    found = pq.read_table(tmp_path / "m.parquet")["median"].to_numpy()
    assert np.allclose(found, truth[~np.isnan(truth)], rtol=0.001)
    metadata = [read_metadata(p)["inputs"] for p in (tmp_path / "raw.sketch", *sketches(shards))]
    assert metadata[0] == metadata[1]


def test_shards_without_genes_or_cells_are_neutral(tmp_path):
    X = counts(30)
    X[10:20] = 0
    shards = dataset(tmp_path / "a", X, shards=3)
    made = sketches(shards)
    assert pq.read_table(made[1]).num_rows == 0
    merge(made, tmp_path / "with.parquet")
    merge([made[0], made[2]], tmp_path / "without.parquet")
    assert (tmp_path / "with.parquet").read_bytes() == (tmp_path / "without.parquet").read_bytes()
    with pytest.raises(UserError, match="hold no cells"):
        merge([made[1]], tmp_path / "none.parquet")


def test_corpora_of_several_datasets(tmp_path):
    X, Y = counts(30, 20) + 1, counts(21, 30, seed=5) + 1
    a = sketches(dataset(tmp_path / "a", X, symbols=[f"S{i}" for i in range(20)]))
    b = sketches(dataset(tmp_path / "b", Y, genes=GENES[10:], symbols=[f"R{i}" for i in range(30)]))
    merge([*a, *b], tmp_path / "ab.parquet")
    merge([*b, *a], tmp_path / "ba.parquet")
    assert (tmp_path / "ab.parquet").read_bytes() == (tmp_path / "ba.parquet").read_bytes()
    table = pq.read_table(tmp_path / "ab.parquet").to_pydict()
    symbol = dict(zip(table["gene_id"], table["symbol"], strict=True))
    assert (symbol[GENES[9]], symbol[GENES[12]], symbol[GENES[39]]) == ("S9", "R2", "R29")
    both = np.zeros((51, 40))
    both[:30, :20] = X / X.sum(1, keepdims=True)
    both[30:, 10:] = Y / Y.sum(1, keepdims=True)
    truth = np.array([np.median(column[column > 0]) for column in both.T if column.any()]) * 10_000
    assert np.allclose(table["median"], truth, rtol=0.001)
    inputs = read_metadata(tmp_path / "ab.parquet")["inputs"]
    assert list(inputs) == ["dataset.1", "dataset.2"]
    assert list(inputs.values()) == sorted(inputs.values())


def test_what_does_not_fit_is_refused(tmp_path):
    shards = dataset(tmp_path, counts(10), shards=2)
    a, b = tmp_path / "a", tmp_path / "b"
    sketch(shards[0], a)
    sketch(shards[1], b, relative_error=0.01)
    out = tmp_path / "m.parquet"
    for given_, message in (
        ([], "no sketches"),
        ([a, a], "given twice"),
        ([a, b], "another error bound"),
        ([tmp_path / "metadata.parquet"], "not a sketch"),
        ([tmp_path / "absent"], "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            merge(given_, out)
    assert not out.exists()
