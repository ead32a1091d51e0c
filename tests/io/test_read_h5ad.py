"""h5ad and zarr against anndata, which writes them."""

import tempfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from cellformers.io import ReadOptions, open_counts
from cellformers.io.hdf5 import StoredStretch


@pytest.fixture
def adata(truth, gene_ids, symbols, cell_ids) -> ad.AnnData:
    n = len(cell_ids)
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(np.where(np.arange(n) % 3, "T cell", None)),
            "depth": np.arange(n) / 2,
            "batch": pd.array([1, None] + [3] * (n - 2), dtype="Int64"),
            "good": pd.array([True, None] + [False] * (n - 2), dtype="boolean"),
            "label": [f"é{i % 4}" for i in range(n)],
            "filter_pass": (np.arange(n) % 2).astype(int),
        },
        index=cell_ids,
    )
    var = pd.DataFrame({"gene_symbols": symbols}, index=gene_ids)
    return ad.AnnData(truth.copy(), obs=obs, var=var)


def as_csr(x):
    return x


def as_dense(x):
    return x.toarray()


@pytest.mark.parametrize("layout", [as_csr, sp.csc_matrix, as_dense])
@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
@pytest.mark.parametrize("dtype", ["float32", "int64", "float64", "int32"])
def test_layouts(adata, layout, compression, dtype, tmp_path, agrees, symbols):
    adata.X = layout(adata.X.astype(dtype))
    adata.write_h5ad(tmp_path / "a.h5ad", compression=compression)
    source = agrees(tmp_path / "a.h5ad")
    assert list(source.feature_symbols) == symbols
    assert list(source.filter_pass) == [i % 2 == 1 for i in range(source.n_cells)]
    assert source.notes == []


@pytest.mark.parametrize("layout", [as_csr, sp.csc_matrix, as_dense])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr(adata, layout, zarr_format, tmp_path, agrees, symbols):
    adata.X = layout(adata.X)
    before = ad.settings.zarr_write_format
    ad.settings.zarr_write_format = zarr_format
    try:
        adata.write_zarr(tmp_path / "a.zarr")
    finally:
        ad.settings.zarr_write_format = before
    source = agrees(tmp_path / "a.zarr")
    assert list(source.feature_symbols) == symbols
    with open_counts(tmp_path / "a.zarr") as again:
        pd.testing.assert_series_equal(
            again.obs()["type"], adata.obs["type"], check_names=False, check_index_type=False
        )


def test_obs_is_what_anndata_reads(adata, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    expected = ad.read_h5ad(tmp_path / "a.h5ad").obs
    with open_counts(tmp_path / "a.h5ad") as source:
        obs = source.obs()
    assert list(obs.columns) == list(expected.columns)
    for column in expected:
        assert obs[column].astype(object).where(obs[column].notna(), None).tolist() == (
            expected[column].astype(object).where(expected[column].notna(), None).tolist()
        )
    assert isinstance(obs["type"].dtype, pd.CategoricalDtype)


def test_uint16_is_kept_and_large_counts_are_int64(adata, tmp_path, collect):
    X = adata.X.copy()
    X.data = np.minimum(X.data, 65535)
    adata.X = X.astype(np.uint16)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_counts(tmp_path / "a.h5ad") as source:
        assert {b.data.dtype for b in source.blocks(max_bytes=5000)} == {np.dtype(np.uint16)}
    big = adata.X.astype(np.float64)
    big[2, 2] = 2.0**31 + 5
    for layout in (sp.csr_matrix, sp.csc_matrix, as_dense):
        adata.X = layout(big)
        adata.write_h5ad(tmp_path / "b.h5ad")
        with open_counts(tmp_path / "b.h5ad") as source:
            np.testing.assert_array_equal(collect(source, 5000), big.toarray().astype(np.int64))


@pytest.mark.parametrize(("chunk", "stored"), [(1 << 15, True), (100, False), (None, True)])
def test_stored_arrays_are_read_from_where_they_lie(chunk, stored, tmp_path, agrees, adata):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        for name in ("data", "indices"):
            values = file["X"][name][:]
            del file["X"][name]
            maximum = (None,) if chunk else None
            file["X"].create_dataset(name, data=values, chunks=(chunk,) if chunk else None, maxshape=maximum)
    with open_counts(tmp_path / "a.h5ad") as source:
        assert isinstance(source.matrix._data, StoredStretch) is stored
    agrees(tmp_path / "a.h5ad")


def test_many_chunks(tmp_path, collect):
    rng = np.random.default_rng(0)
    X = sp.random(3000, 400, density=0.3, format="csr", random_state=0, dtype=np.float32)
    X.data = rng.integers(1, 50, X.nnz).astype(np.float32)
    ad.AnnData(X, var=pd.DataFrame(index=[f"G{i}" for i in range(400)])).write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        for name in ("data", "indices"):
            values = file["X"][name][:]
            del file["X"][name]
            file["X"].create_dataset(name, data=values, chunks=(20_000,), maxshape=(None,))
    with open_counts(tmp_path / "a.h5ad") as source:
        assert isinstance(source.matrix._data, StoredStretch)
        for max_bytes in (30_000, 1 << 20, 1 << 26):
            np.testing.assert_array_equal(collect(source, max_bytes), X.toarray())


def test_layer_and_raw_on_request(adata, truth, tmp_path, agrees):
    adata.layers["double"] = truth * 2
    adata.raw = adata.copy()
    adata = adata[:, :50].copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    dense = truth.toarray().astype(np.int64)
    agrees(tmp_path / "a.h5ad", expected=dense[:, :50], genes=list(adata.var_names))
    agrees(tmp_path / "a.h5ad", expected=2 * dense[:, :50], genes=list(adata.var_names), layer="double")
    agrees(tmp_path / "a.h5ad", raw=True)


def logged(X):
    per_cell = np.maximum(np.asarray(X.sum(1)), 1)
    return sp.csr_matrix(X.multiply(1e4 / per_cell)).log1p().astype(np.float32)


@pytest.mark.parametrize("options", [{}, {"round": True}])
def test_raw_is_used_where_x_is_logged(adata, truth, tmp_path, agrees, options):
    adata.raw = adata.copy()
    adata.X = logged(truth)
    adata = adata[:, ::-1].copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    source = agrees(tmp_path / "a.h5ad", **options)
    assert source.notes == ["X holds no counts; raw/X does and is used"]


def test_counts_layer_is_used_where_x_is_logged(adata, truth, tmp_path, agrees):
    adata.layers["counts"] = truth.copy()
    adata.X = logged(truth)
    adata.raw = adata.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    source = agrees(tmp_path / "a.h5ad")
    assert source.notes == ["X holds no counts; layers['counts'] does and is used"]
    adata.X = None
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert agrees(tmp_path / "b.h5ad").notes == ["X is missing; layers['counts'] does and is used"]


def test_asked_for_is_not_replaced(adata, truth, tmp_path, refuses):
    adata.layers["counts"] = truth.copy()
    adata.layers["logged"] = logged(truth)
    adata.write_h5ad(tmp_path / "a.h5ad")
    refuses(tmp_path / "a.h5ad", "layers['logged'] holds log-normalised", layer="logged")
    refuses(tmp_path / "a.h5ad", "has no layer 'count'", "'counts'", layer="count")
    refuses(tmp_path / "a.h5ad", "has no raw", raw=True)
    refuses(tmp_path / "a.h5ad", "exclude each other", raw=True, layer="counts")


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, as_dense])
@pytest.mark.parametrize(
    ("value", "reason", "keys"),
    [
        (-2.0, "negative", "layer:"),
        (np.nan, "NaN", "layer:"),
        (np.inf, "infinite", "layer:"),
        (1.25, "non-integer", "round: true"),
        (1e17, "too large", "layer:"),
    ],
)
def test_values_that_are_no_counts(adata, layout, value, reason, keys, tmp_path, refuses, cell_ids, gene_ids):
    X = adata.X.tolil()
    X[101, 33] = value
    adata.X = layout(X)
    adata.layers["spliced"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    refuses(tmp_path / "a.h5ad", reason, keys, repr(cell_ids[101]), repr(gene_ids[33]), "spliced")


def test_logged_values_are_called_so(adata, truth, tmp_path, refuses):
    adata.X = logged(truth)
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert "round" not in refuses(tmp_path / "a.h5ad", "log-normalised", "layer:", "raw: true")
    refuses(tmp_path / "a.h5ad", "log-normalised", round=True)


def test_round_rounds_halves_up(adata, truth, tmp_path, agrees, refuses):
    X = truth.astype(np.float64)
    X.data = X.data + np.resize([0.0, 0.49, 0.5, -0.4, 0.5], X.nnz)
    adata.X = X
    adata.write_h5ad(tmp_path / "a.h5ad")
    expected = (
        sp.csr_matrix((np.floor(X.data + 0.5), X.indices, X.indptr), X.shape).toarray().astype(np.int64)
    )
    agrees(tmp_path / "a.h5ad", expected=expected, round=True)
    adata.X = -X
    adata.write_h5ad(tmp_path / "b.h5ad")
    refuses(tmp_path / "b.h5ad", "negative", round=True)


def test_duplicate_cells(adata, truth, tmp_path, refuses, cell_ids):
    names = cell_ids.copy()
    names[9] = names[40] = names[2]
    names[50] = names[2] + "-1"
    adata.obs_names = names
    adata.write_h5ad(tmp_path / "a.h5ad")
    refuses(tmp_path / "a.h5ad", f"{names[2]!r} occurs more than once", "make_unique: true")
    with open_counts(tmp_path / "a.h5ad", options=ReadOptions(make_unique=True)) as source:
        made = list(source.cell_ids)
        assert len(set(made)) == len(made)
        assert made[9] == names[2] + "-2"
        assert made[40] == names[2] + "-3"
        assert made[:9] == names[:9]
        assert source.notes


def test_gene_names(adata, tmp_path, agrees, gene_ids, symbols, refuses):
    adata.var = pd.DataFrame(
        {"feature_id": [f"{g}.{i % 9}" for i, g in enumerate(gene_ids)], "n": range(len(symbols))},
        index=symbols,
    )
    adata.write_h5ad(tmp_path / "a.h5ad")
    source = agrees(tmp_path / "a.h5ad")
    assert list(source.feature_symbols) == symbols
    assert source.notes == ["gene ids from column 'feature_id'"]
    agrees(tmp_path / "a.h5ad", genes=symbols, gene_column="index")
    refuses(tmp_path / "a.h5ad", "no gene column 'feature_ids'", "'feature_id'", gene_column="feature_ids")


def test_names_keep_what_is_no_version(adata, tmp_path, agrees, gene_ids):
    names = gene_ids.copy()
    written = names.copy()
    written[0], names[0] = "AC012345.1", "AC012345.1"
    written[1], names[1] = "ENSG00000182378.14_PAR_Y", "ENSG00000182378"
    written[2], names[2] = "ENSG00000182378.14", "ENSG00000182378"
    written[3], names[3] = "ENSGR0000182378", "ENSGR0000182378"
    adata.var = pd.DataFrame(index=written)
    adata.write_h5ad(tmp_path / "a.h5ad")
    agrees(tmp_path / "a.h5ad", genes=names)


def test_cell_column(adata, tmp_path, refuses, cell_ids):
    adata.obs["name"] = [f"c{i}" for i in range(len(cell_ids))]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_counts(tmp_path / "a.h5ad", options=ReadOptions(cell_column="name")) as source:
        assert source.cell_ids[5] == "c5"
    refuses(tmp_path / "a.h5ad", "no cell column 'names'", "'name'", cell_column="names")


def test_before_anndata_0_7(adata, truth, tmp_path, agrees, gene_ids, cell_ids, symbols):
    with h5py.File(tmp_path / "old.h5ad", "w") as file:
        X = file.create_group("X")
        X.attrs["h5sparse_format"], X.attrs["h5sparse_shape"] = b"csr", truth.shape
        for part in ("data", "indices", "indptr"):
            X[part] = getattr(truth, part)
        obs = np.empty(len(cell_ids), dtype=[("index", "S30"), ("kind", "i1"), ("depth", "f4")])
        obs["index"], obs["kind"], obs["depth"] = cell_ids, np.arange(len(cell_ids)) % 2, 1.5
        var = np.empty(len(gene_ids), dtype=[("index", "S30"), ("gene_name", "S30")])
        var["index"], var["gene_name"] = gene_ids, symbols
        file["obs"], file["var"] = obs, var
        file["uns/kind_categories"] = np.array([b"A", b"B"])
    source = agrees(tmp_path / "old.h5ad")
    assert list(source.feature_symbols) == symbols
    with open_counts(tmp_path / "old.h5ad") as again:
        assert list(again.obs()["kind"][:3]) == ["A", "B", "A"]
        assert again.obs()["depth"].iloc[0] == 1.5


def test_raw_before_anndata_0_7(adata, tmp_path, agrees, truth):
    adata.X = logged(truth)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.X = truth
    adata.write_h5ad(tmp_path / "b.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file, h5py.File(tmp_path / "b.h5ad") as other:
        file.pop("raw", None)
        other.copy("X", file, "raw.X")
        other.copy("var", file, "raw.var")
    assert agrees(tmp_path / "a.h5ad").notes == ["X holds no counts; raw/X does and is used"]
    agrees(tmp_path / "a.h5ad", raw=True)


def damage(path: Path, part: str, values) -> None:
    with h5py.File(path, "r+") as file:
        attributes = dict(file[part].attrs)
        del file[part]
        file[part] = values
        file[part].attrs.update(attributes)


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix])
def test_damaged_matrices(adata, truth, layout, tmp_path, refuses):
    path = tmp_path / "a.h5ad"
    adata.X = X = layout(truth)

    def fresh():
        adata.write_h5ad(path)

    fresh()
    damage(path, "X/indptr", X.indptr[:-1])
    refuses(path, "indptr has")
    fresh()
    damage(path, "X/indptr", X.indptr[::-1].copy())
    refuses(path, "does not start at 0 or decreases")
    fresh()
    damage(path, "X/data", X.data[:-5])
    refuses(path, "indptr ends at")
    fresh()
    for wrong in (-1, 1000):
        indices = X.indices.copy()
        indices[len(indices) - 4] = wrong
        damage(path, "X/indices", indices)
        refuses(path, f"index {wrong} among")
    fresh()
    damage(path, "X/data", np.array(["a"] * X.nnz, dtype="S1"))
    refuses(path, "X is damaged")
    fresh()
    with h5py.File(path, "r+") as file:
        del file["X/indptr"]
    refuses(path, "without indptr")
    fresh()
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [truth.shape[0], truth.shape[1] + 1]
    refuses(path, "damaged" if layout is sp.csc_matrix else "names of")


def test_not_a_count_file(adata, tmp_path, refuses):
    refuses(tmp_path / "none.h5ad", "no such file")
    (tmp_path / "empty.h5ad").touch()
    refuses(tmp_path / "empty.h5ad", "is an empty file")
    (tmp_path / "text.h5ad").write_text("a,b\nc,1\n")
    refuses(tmp_path / "text.h5ad", "is not an HDF5 file")
    adata.write_h5ad(tmp_path / "whole.h5ad")
    whole = (tmp_path / "whole.h5ad").read_bytes()
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut.h5ad").write_bytes(whole[: int(share * len(whole))])
        refuses(tmp_path / "cut.h5ad", "is truncated")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["table"] = [1]
    refuses(tmp_path / "other.h5", "neither AnnData nor loom nor 10x", "table")
    (tmp_path / "folder").mkdir()
    refuses(tmp_path / "folder", "folder without matrix.mtx")
    for name, content in (
        ("a.rds", b"X\n\0\0"),
        ("a.xlsx", b"PK\x03\x04"),
        ("a.bin", b"\1\0\2"),
        ("a.bz2", b"BZh9"),
    ):
        (tmp_path / name).write_bytes(content)
        refuses(tmp_path / name)


def test_damaged_inside(adata, tmp_path, refuses):
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    with h5py.File(tmp_path / "a.h5ad") as file:
        info = file["X/data"].id.get_chunk_info(0)
    content = bytearray((tmp_path / "a.h5ad").read_bytes())
    content[info.byte_offset : info.byte_offset + info.size] = b"\xff" * info.size
    (tmp_path / "a.h5ad").write_bytes(content)
    refuses(tmp_path / "a.h5ad", "damaged or truncated")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, as_dense])
def test_empty_matrices(shape, layout, tmp_path, refuses):
    X = layout(sp.csr_matrix(shape, dtype=np.float32))
    ad.AnnData(X).write_h5ad(tmp_path / "a.h5ad")
    refuses(tmp_path / "a.h5ad", f"is empty ({shape[0]} cells, {shape[1]} genes)")


def test_other_files_are_not_followed(adata, tmp_path, refuses):
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata.write_h5ad(tmp_path / "b.h5ad")
    with h5py.File(tmp_path / "b.h5ad", "r+") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink("a.h5ad", "X")
    refuses(tmp_path / "b.h5ad", "link to another file (a.h5ad)")
    adata.write_h5ad(tmp_path / "c.h5ad")
    with h5py.File(tmp_path / "c.h5ad", "r+") as file:
        n = file["X/data"].shape[0]
        del file["X/data"]
        (tmp_path / "outside").write_bytes(b"\1" * 4 * n)
        file["X"].create_dataset("data", (n,), "f4", external=[(str(tmp_path / "outside"), 0, 4 * n)])
    refuses(tmp_path / "c.h5ad", "stored in another file")
    with h5py.File(tmp_path / "c.h5ad", "r+") as file:
        del file["X/data"]
        layout = h5py.VirtualLayout((n,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "a.h5ad"), "X/data", (n,))
        file["X"].create_virtual_dataset("data", layout)
    refuses(tmp_path / "c.h5ad", "stored in another file")


def test_soft_links_within_the_file_are(adata, tmp_path, agrees):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file.move("X", "layers/counts")
        file["X"] = h5py.SoftLink("/layers/counts")
    agrees(tmp_path / "a.h5ad")


def test_spill_leaves_nothing(adata, tmp_path, monkeypatch, refuses, agrees):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    adata.X = sp.csc_matrix(adata.X)
    adata.write_h5ad(tmp_path / "a.h5ad")
    agrees(tmp_path / "a.h5ad")
    adata.X[50, 50] = -1
    adata.write_h5ad(tmp_path / "b.h5ad")
    refuses(tmp_path / "b.h5ad", "negative")
    assert list(folder.iterdir()) == []


def test_blocks_own_their_arrays(adata, truth, tmp_path):
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_counts(tmp_path / "a.h5ad") as source:
        blocks = list(source.blocks(max_bytes=3000))
    assert len(blocks) > 5
    np.testing.assert_array_equal(np.concatenate([b.data for b in blocks]), truth.data)


def test_zarr_that_is_no_anndata(tmp_path, refuses):
    import zarr

    zarr.open_group(str(tmp_path / "a.zarr"), mode="w").create_group("obsm")
    refuses(tmp_path / "a.zarr", "not of AnnData")
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / "zarr.json").write_text("{")
    refuses(tmp_path / "b.zarr")


@pytest.mark.parametrize("name", ["blood_sorted", "pbmc_5k_protein_v3", "pbmc_10k_protein_v3", "pbmc_ifnb"])
def test_real_files(name, reference_data, collect):
    path = reference_data / "counts" / f"{name}.h5ad"
    expected = ad.read_h5ad(path)
    X = expected.X.toarray() if sp.issparse(expected.X) else expected.X
    with open_counts(path) as source:
        assert list(source.cell_ids) == list(expected.obs_names)
        assert list(source.feature_ids) == list(expected.var_names)
        np.testing.assert_array_equal(collect(source, 2 << 20), X)
        for column in expected.obs:
            assert source.obs()[column].astype(str).tolist() == expected.obs[column].astype(str).tolist()
        if name == "blood_sorted":
            assert list(source.feature_symbols) == list(expected.var["symbol"].astype(str))
