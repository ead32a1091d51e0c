"""Count files that are odd in ways of their own: read right, or refused in one line, soon and in little memory."""

import json
import os
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from test_counts_named import GENES, mtx, refusal, write

from cellformers.io import open_counts
from cellformers.io.labels import read_labels
from cellformers.io.samples import read_sample_table


def read(path: Path) -> int:
    """Everything there is in a count file, and how many entries that is."""
    with open_counts(path) as source:
        source.obs()
        return sum(int(block.indptr[-1]) for block in source.blocks())


@pytest.fixture
def counts(tmp_path) -> Path:
    return write(tmp_path / "a.h5ad", np.random.default_rng(0).poisson(2, (9, 11)))


@pytest.fixture
def store(tmp_path) -> Path:
    names = pd.DataFrame(index=[f"c{i}" for i in range(3)]), pd.DataFrame(index=GENES[:4])
    anndata.AnnData(sp.csr_matrix(np.ones((3, 4), np.float32)), *names).write_zarr(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / ".zmetadata").unlink(missing_ok=True)
    return tmp_path / "a.zarr"


@pytest.mark.parametrize(("place", "kind"), [("X/data", "f4"), ("obs/_index", "S4")])
def test_virtual_data_of_itself_do_not_crash(tmp_path, counts, place, kind):
    with h5py.File(counts, "r+") as file:
        n = file[place].shape[0]
        del file[place]
        layout = h5py.VirtualLayout((n,), kind)
        layout[:] = h5py.VirtualSource(".", place, (n,))
        file.create_virtual_dataset(place, layout)
    assert "is a virtual dataset" in refusal(read, counts, folder=tmp_path)


@pytest.mark.parametrize("packed", [None, "gzip"])
def test_entries_that_are_declared_and_not_stored_are_refused(tmp_path, counts, packed):
    n = 200_000_000  # a cell
    with h5py.File(counts, "r+") as file:
        for name, kind in (("data", "f4"), ("indices", "i4")):
            del file["X"][name]
            file["X"].create_dataset(name, (9 * n,), kind, chunks=(1024,), compression=packed)
        del file["X/indptr"]
        file["X/indptr"] = np.arange(10) * n
    assert "numbers are declared" in refusal(read, counts, folder=tmp_path)


def test_a_row_of_too_many_entries_is_refused(tmp_path, store):
    n = 300_000_000
    for name, shape in (("data", [3 * n]), ("indices", [3 * n])):
        path = store / "X" / name / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"shape": shape, "chunks": [1 << 20]}))
    anndata.io.write_elem(zarr.open_group(store / "X"), "indptr", np.arange(4) * n)
    assert "a cell has 300,000,000 entries for 4 genes" in refusal(read, store, folder=tmp_path)


def test_a_kind_of_matrix_that_is_no_text_is_refused(tmp_path, counts):
    with h5py.File(counts, "r+") as file:
        file["X"].attrs["encoding-type"] = np.arange(4)
    assert "without a known encoding" in refusal(read, counts, folder=tmp_path)


def test_metadata_of_any_numbers_are_read(counts):
    kinds = {"half": ">f2", "whole": ">i4", "long": "g"}
    with h5py.File(counts, "r+") as file:
        for name, kind in kinds.items():
            file["obs"].create_dataset(name, data=np.arange(9).astype(kind))
        group = file["obs"].create_group("dose")
        group["codes"], group["categories"] = np.arange(9, dtype="i1") % 3 - 1, np.array([np.nan, 1.5])
        file["obs"].attrs["column-order"] = np.array([*kinds, "dose"], dtype=object)
    with open_counts(counts) as source:
        obs = source.obs()
    assert all(obs[name].tolist() == list(range(9)) for name in kinds)
    assert all(obs[name].to_numpy().dtype.isnative for name in kinds)
    np.testing.assert_array_equal(obs["dose"].to_numpy(), [np.nan, np.nan, 1.5] * 3)


def test_a_loom_attribute_of_other_length_is_left_out(tmp_path):
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = np.ones((4, 3), np.float32)
        file["row_attrs/Accession"] = np.array([g.encode() for g in GENES[:4]])
        file["col_attrs/CellID"], file["col_attrs/x"] = np.array([b"a", b"b", b"c"]), np.zeros(2)
    with open_counts(tmp_path / "a.loom") as source:
        assert source.obs().columns.tolist() == []


@pytest.mark.parametrize("attributes", [
    {"encoding-type": "csr_matrix", "shape": [[3], [4, 2]]}, {"encoding-type": ["csr_matrix"], "shape": [3, 4]},
])  # fmt: skip
def test_a_zarr_of_odd_attributes_is_refused(tmp_path, store, attributes):
    (store / "X" / ".zattrs").write_text(json.dumps(attributes))
    assert "is no count matrix" in refusal(read, store, folder=tmp_path)


def test_a_zarr_of_odd_columns_is_refused(tmp_path, store):
    (store / "obs" / ".zattrs").write_text('{"_index": "_index", "column-order": [{"a": 2}, ["b"]]}')
    assert "lists a column" in refusal(read, store, folder=tmp_path)


@pytest.mark.parametrize("place", ["X/data/0", ".zgroup"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_pipes_and_links_in_a_zarr_are_refused(tmp_path, store, place, kind):
    (store / place).unlink()
    (os.mkfifo if kind == "pipe" else lambda path: os.symlink("/dev/zero", path))(store / place)
    assert f"{place} in it is no plain file" in refusal(read, store, folder=tmp_path)


@pytest.mark.parametrize("name", ["barcodes.tsv", "features.tsv", "matrix.mtx"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_pipes_and_devices_in_an_mtx_folder_are_refused(tmp_path, name, kind):
    path = mtx(tmp_path, "1 1 1\n", size="3 4 1") / name
    path.unlink()
    (os.mkfifo if kind == "pipe" else lambda path: os.symlink("/dev/zero", path))(path)
    assert f"{path}: is no plain file" in refusal(read, tmp_path, folder=tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_pipes_and_devices_in_place_of_a_sample_table_are_refused(tmp_path, kind):
    path = tmp_path / "samples.tsv"
    (os.mkfifo if kind == "pipe" else lambda path: os.symlink("/dev/zero", path))(path)
    assert "is no plain file" in refusal(read_sample_table, path, folder=tmp_path)


def test_labels_in_a_hundred_thousand_columns_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",".join(f"c{i}" for i in range(100_000)) + "\n" + ",".join("1" * 100_000) + "\n")
    assert "has 100,000 columns" in refusal(read_labels, path, folder=tmp_path)
