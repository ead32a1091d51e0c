"""Ingest: what goes in comes out, whatever the format and the number of shards."""

import gzip
import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from cellformers.counts import Sample, canonical, ingest, shard_bounds, shard_digest
from cellformers.errors import UserError
from cellformers.io.files import read_metadata
from cellformers.io.labels import LabelTable, read_labels
from cellformers.io.source import Block, ReadOptions, open_counts

GENES = [f"ENSG{i:011d}" for i in range(1, 41)]


def write_h5ad(path: Path, X, *, cells=None, genes=None, symbols=None, obs=None) -> Path:
    cells = [f"cell{i}" for i in range(X.shape[0])] if cells is None else cells
    genes = GENES[: X.shape[1]] if genes is None else genes
    frame = pd.DataFrame(obs or {}, index=pd.Index(cells))
    var = pd.DataFrame({} if symbols is None else {"symbol": symbols}, index=pd.Index(genes))
    anndata.AnnData(sp.csr_matrix(X.astype(np.float32)), obs=frame, var=var).write_h5ad(path)
    return path


def run(folder: Path, *samples: Sample, shards: int = 1, **more):
    outputs = [folder / "counts" / f"{i}.h5ad" for i in range(shards)]
    found = ingest(
        samples, outputs, metadata=folder / "metadata.parquet", features=folder / "features.parquet", **more
    )
    return found, outputs


def counts(n_cells: int, n_genes: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.negative_binomial(0.5, 0.1, (n_cells, n_genes))


def matrix(outputs):
    return sp.vstack([anndata.read_h5ad(path).X for path in outputs]).toarray()


@given(st.integers(1, 10_000), st.integers(1, 50))
def test_shard_bounds_cover_evenly(n_cells, n_shards):
    if n_shards > n_cells:
        with pytest.raises(UserError, match="can't be split"):
            shard_bounds(n_cells, n_shards)
        return
    bounds = shard_bounds(n_cells, n_shards)
    assert [low for low, _ in bounds] == [0, *(high for _, high in bounds[:-1])]
    assert bounds[-1][1] == n_cells
    sizes = [high - low for low, high in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_shards_hold_the_counts_in_canonical_form(tmp_path):
    X = counts(23, 40)
    source = write_h5ad(
        tmp_path / "in.h5ad", X, symbols=[f"G{i}" for i in range(40)], obs={"type": ["a"] * 23}
    )
    before = source.read_bytes()
    found, outputs = run(tmp_path, Sample(source), shards=3)
    assert (found.n_cells, found.n_features) == (23, 40)
    shards = [anndata.read_h5ad(path) for path in outputs]
    assert [s.n_obs for s in shards] == [8, 8, 7]
    assert np.array_equal(matrix(outputs), X)
    for shard in shards:
        assert shard.X.dtype == np.uint16
        assert shard.X.has_canonical_format
        assert shard.X.data.all()
        assert list(shard.var["symbol"]) == [f"G{i}" for i in range(40)]
        assert list(shard.var_names) == GENES
        assert json.loads(shard.uns["cellformers"])["inputs"] == {"dataset": found.digest}
    assert [name for s in shards for name in s.obs_names] == [f"cell{i}" for i in range(23)]
    assert shard_digest(outputs[1]) == found.digest
    assert source.read_bytes() == before


def test_metadata_and_features(tmp_path):
    X = counts(10, 5)
    obs = {
        "type": pd.Categorical([*"abababab", None, "a"]),
        "n_counts": np.arange(10.0),
        "age": np.arange(10),
    }
    found, _ = run(tmp_path, Sample(write_h5ad(tmp_path / "in.h5ad", X, obs=obs), columns={"donor": "d1"}))
    table = pq.read_table(tmp_path / "metadata.parquet")
    assert table.column_names == ["cell_id", "type", "input_n_counts", "age", "donor"]
    assert table["type"].to_pylist() == [*"abababab", None, "a"]
    assert table["age"].to_pylist() == list(range(10))
    assert set(table["donor"].to_pylist()) == {"d1"}
    assert read_metadata(tmp_path / "metadata.parquet")["inputs"] == {"dataset": found.digest}
    features = pq.read_table(tmp_path / "features.parquet")
    assert features["n_counts"].to_pylist() == X.sum(0).tolist()
    assert features["n_cells"].to_pylist() == (X > 0).sum(0).tolist()
    assert features["symbol"].to_pylist() == [None] * 5


def test_merged_tables_are_the_same_bytes_for_any_number_of_shards(tmp_path):
    source = write_h5ad(tmp_path / "in.h5ad", counts(30, 40), obs={"type": [*"ab"] * 15})
    seen = set()
    for shards in (1, 2, 7):
        found, outputs = run(tmp_path / str(shards), Sample(source), shards=shards)
        files = [tmp_path / str(shards) / name for name in ("metadata.parquet", "features.parquet")]
        seen.add((found.digest, *(f.read_bytes() for f in files), matrix(outputs).tobytes()))
    assert len(seen) == 1


def test_the_digest_does_not_depend_on_the_format(tmp_path):
    import loompy

    X = counts(12, 20)
    cells = [f"c{i}" for i in range(12)]
    write_h5ad(tmp_path / "in.h5ad", X, cells=cells)
    loompy.create(
        str(tmp_path / "in.loom"), X.T, {"ensembl_id": np.array(GENES[:20])}, {"CellID": np.array(cells)}
    )
    frame = pd.DataFrame(X.T, index=GENES[:20], columns=cells)
    frame.to_csv(tmp_path / "in.csv.gz")
    digests = set()
    for name in ("in.h5ad", "in.loom", "in.csv.gz"):
        digests.add(run(tmp_path / f"out-{name}", Sample(tmp_path / name))[0].digest)
    assert len(digests) == 1
    write_h5ad(tmp_path / "other.h5ad", X + np.eye(12, 20, dtype=int), cells=cells)
    assert run(tmp_path / "other", Sample(tmp_path / "other.h5ad"))[0].digest not in digests


def test_a_shard_ingested_again_is_the_same(tmp_path):
    source = write_h5ad(tmp_path / "in.h5ad", counts(9, 12), symbols=[f"G{i}" for i in range(12)])
    found, outputs = run(tmp_path / "one", Sample(source))
    again, others = run(tmp_path / "two", Sample(outputs[0]))
    assert again.digest == found.digest
    assert outputs[0].read_bytes() == others[0].read_bytes()


def test_canonical_sums_without_overflow():
    block = Block(
        3,
        np.array([0, 4, 4, 6]),
        np.array([5, 2, 5, 1, 0, 0], np.int32),
        np.array([65_535, 7, 65_535, 0, 1, 2], np.uint16),
    )
    kept = [array.copy() for array in block[1:]]
    result = canonical(block, 6)
    assert result.start == 3
    assert result.indptr.tolist() == [0, 2, 2, 3]
    assert result.indices.tolist() == [2, 5, 0]
    assert result.data.tolist() == [7, 131_070, 3]
    assert all(np.array_equal(a, b) for a, b in zip(block[1:], kept, strict=True))


@pytest.mark.parametrize(
    ("largest", "dtype"), [(65_535, np.uint16), (65_536, np.int32), (2**31 + 5, np.int64)]
)
def test_large_counts_get_a_wider_type(tmp_path, largest, dtype):
    X = counts(6, 4)
    X[4, 2] = largest
    data = sp.csr_matrix(X)
    anndata.AnnData(data, var=pd.DataFrame(index=GENES[:4])).write_h5ad(tmp_path / "in.h5ad")
    _, outputs = run(tmp_path, Sample(tmp_path / "in.h5ad"))
    assert anndata.read_h5ad(outputs[0]).X.dtype == dtype
    assert np.array_equal(matrix(outputs), X)


def test_blocks_split_at_shards_and_widen_late(tmp_path, monkeypatch):
    monkeypatch.setattr("cellformers.counts.BLOCK_BYTES", 400)
    monkeypatch.setattr("cellformers.io.shards.CHUNK", 64)
    X = counts(50, 40)
    X[47, 3] = 100_000
    _, outputs = run(tmp_path, Sample(write_h5ad(tmp_path / "in.h5ad", X)), shards=4)
    assert np.array_equal(matrix(outputs), X)
    assert [anndata.read_h5ad(p).X.dtype for p in outputs] == [np.uint16] * 3 + [np.int32]


def test_several_files_are_united_by_feature_id(tmp_path):
    X, Y = counts(4, 4), counts(3, 4, seed=1)
    a = write_h5ad(tmp_path / "a.h5ad", X, genes=[*GENES[:3], GENES[0]], obs={"type": list("abcd")})
    b = write_h5ad(
        tmp_path / "b.h5ad", Y, genes=[GENES[5], GENES[0], GENES[2], GENES[0]], obs={"age": [1, 2, 3]}
    )
    samples = Sample(a, "s1", {"donor": "d1"}), Sample(b, "s2", {"donor": "d2"})
    _, outputs = run(tmp_path, *samples, shards=2)
    names = [*GENES[:3], GENES[0], GENES[5]]
    assert list(anndata.read_h5ad(outputs[0]).var_names) == names
    expected = np.zeros((7, 5), int)
    expected[:4, :4] = X
    expected[4:, [4, 0, 2, 3]] = Y
    assert np.array_equal(matrix(outputs), expected)
    table = pq.read_table(tmp_path / "metadata.parquet")
    assert table.column_names == ["cell_id", "sample", "type", "age", "donor"]
    assert table["cell_id"].to_pylist() == [f"s1:cell{i}" for i in range(4)] + [
        f"s2:cell{i}" for i in range(3)
    ]
    assert table["age"].to_pylist() == [None] * 4 + [1, 2, 3]
    assert table["donor"].to_pylist() == ["d1"] * 4 + ["d2"] * 3


def test_columns_of_different_types_become_text(tmp_path):
    a = write_h5ad(tmp_path / "a.h5ad", counts(2, 4), obs={"batch": [1, 2]})
    b = write_h5ad(tmp_path / "b.h5ad", counts(2, 4), obs={"batch": ["x", "y"]})
    run(tmp_path, Sample(a, "a"), Sample(b, "b"))
    assert pq.read_table(tmp_path / "metadata.parquet")["batch"].to_pylist() == ["1", "2", "x", "y"]


def test_filter_pass_is_kept_as_bool(tmp_path):
    a = write_h5ad(tmp_path / "a.h5ad", counts(3, 4), obs={"filter_pass": [1, 0, 1]})
    b = write_h5ad(tmp_path / "b.h5ad", counts(2, 4))
    run(tmp_path, Sample(a, "a"), Sample(b, "b"))
    assert pq.read_table(tmp_path / "metadata.parquet")["filter_pass"].to_pylist() == [
        True,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize("form", ["csv", "tsv.gz", "parquet", "r"])
def test_labels_join_by_cell(tmp_path, form):
    source = write_h5ad(tmp_path / "in.h5ad", counts(4, 4), cells=["001", "002", "003", "004"])
    frame = pd.DataFrame({"barcode": ["003", "001", "zzz"], "type": ["T", "NA", "B"], "n": [3, 1, 9]})
    path = tmp_path / f"labels.{form}"
    key = "barcode"
    if form == "csv":
        frame.to_csv(path, index=False)
    elif form == "tsv.gz":
        frame.to_csv(path, index=False, sep="\t")
    elif form == "parquet":
        frame.replace("NA", None).to_parquet(path)
    else:  # as R's write.table has it: no name over the row names
        path.write_text('"type","n"\n"003","T",3\n"001",NA,1\n"zzz","B",9\n')
        key = ""
    found, _ = run(tmp_path, Sample(source), labels=LabelTable(path, key))
    table = pq.read_table(tmp_path / "metadata.parquet")
    assert table["type"].to_pylist() == [None, None, "T", None]
    assert table["n"].to_pylist() == [1, None, 3, None]
    assert any("2 of 4 cells" in note for note in found.notes)


def test_labels_of_several_samples(tmp_path):
    a, b = (write_h5ad(tmp_path / f"{n}.h5ad", counts(2, 4), cells=["x", "y"]) for n in "ab")
    samples = Sample(a, "a"), Sample(b, "b")
    path = tmp_path / "labels.csv"
    path.write_text("cell,type\na:x,T\nb:y,B\n")
    run(tmp_path, *samples, labels=LabelTable(path, "cell", {"type": "kind"}))
    assert pq.read_table(tmp_path / "metadata.parquet")["kind"].to_pylist() == ["T", None, None, "B"]
    path.write_text("cell,sample,type\nx,b,T\nx,a,B\n")
    run(tmp_path, *samples, labels=LabelTable(path, "cell"))
    table = pq.read_table(tmp_path / "metadata.parquet")
    assert table["type"].to_pylist() == ["B", None, "T", None]
    assert table.column_names == ["cell_id", "sample", "type"]
    path.write_text("cell,type\nx,T\n")
    with pytest.raises(UserError, match="barcodes that several samples share"):
        run(tmp_path, *samples, labels=LabelTable(path, "cell"))


def test_bad_labels_are_refused(tmp_path):
    source = write_h5ad(tmp_path / "in.h5ad", counts(2, 4), cells=["x", "y"])
    path = tmp_path / "labels.csv"
    path.write_text("barcode,type\nx,T\nx,B\n")
    with pytest.raises(UserError, match="'x' stands in more than one row"):
        run(tmp_path / "out", Sample(source), labels=LabelTable(path, "barcode"))
    with pytest.raises(UserError, match="no column 'barcodes'; did you mean 'barcode'"):
        run(tmp_path / "out", Sample(source), labels=LabelTable(path, "barcodes"))
    path.write_text("barcode,type\nx-1,T\n")
    with pytest.raises(UserError, match=r"matches no cell .it holds 'x-1', cells are called 'x'"):
        run(tmp_path / "out", Sample(source), labels=LabelTable(path, "barcode"))
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "out", Sample(source), labels=LabelTable(tmp_path / "absent.csv", "barcode"))
    assert not (tmp_path / "out").exists()


def test_read_labels_refuses_what_is_no_table(tmp_path):
    path = tmp_path / "labels.csv.gz"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n")[:-9])
    with pytest.raises(UserError, match="not readable"):
        read_labels(path)
    path.write_bytes(b"a,b\n")
    with pytest.raises(UserError, match="holds no rows"):
        read_labels(path)
    path.write_bytes(b"a,a\n1,2\n")
    with pytest.raises(UserError, match="two columns called 'a'"):
        read_labels(path)


def test_failure_leaves_nothing(tmp_path):
    X = counts(6, 4).astype(float)
    X[5, 1] = 0.5
    X[5, 2] = -1
    good = write_h5ad(tmp_path / "good.h5ad", counts(5, 4))
    bad = write_h5ad(tmp_path / "bad.h5ad", X)
    with pytest.raises(UserError):
        run(tmp_path / "out", Sample(good, "a"), Sample(bad, "b"), shards=3)
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


def test_sample_names_and_shards_are_checked(tmp_path):
    path = write_h5ad(tmp_path / "in.h5ad", counts(3, 4))
    for samples, message in (
        ([], "no input files"),
        ([Sample(path, "a"), Sample(path)], "has no sample name"),
        ([Sample(path, "a"), Sample(path, "a")], "given twice"),
        ([Sample(path, "a:b"), Sample(path, "a")], "contains ':'"),
    ):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "out", *samples)
    with pytest.raises(UserError, match="3 cells can't be split into 4 shards"):
        run(tmp_path / "out", Sample(path), shards=4)
    with pytest.raises(UserError, match="not a counts shard"):
        shard_digest(path)


def test_options_are_recorded_where_they_matter(tmp_path):
    path = write_h5ad(tmp_path / "in.h5ad", counts(3, 4) + 0.25)
    _, outputs = run(tmp_path, Sample(path), options=ReadOptions(round=True))
    with h5py.File(outputs[0]) as file:
        assert json.loads(file["uns/cellformers"].asstr()[()])["parameters"] == {"round": True}


def test_mouse_genes_are_refused(tmp_path):
    path = write_h5ad(tmp_path / "in.h5ad", counts(3, 4), genes=[f"ENSMUSG{i:011d}" for i in range(4)])
    with pytest.raises(UserError, match="mouse"):
        run(tmp_path, Sample(path))


def test_real_counts_survive(tmp_path, reference_data):
    path = reference_data / "counts" / "blood_sorted.h5ad"
    found, outputs = run(tmp_path, Sample(path), shards=3)
    original = anndata.read_h5ad(path)
    assert abs(sp.vstack([anndata.read_h5ad(p).X for p in outputs]).astype(np.int64) - original.X).sum() == 0
    assert found.n_cells == original.n_obs
    with open_counts(outputs[2]) as source:
        assert source.cell_ids[-1] == original.obs_names[-1]
        assert source.feature_symbols is not None
