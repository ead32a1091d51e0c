"""loom against loompy, which writes it."""

import tempfile

import h5py
import loompy
import numpy as np
import pytest

from cellformers.io import ReadOptions, open_counts


@pytest.fixture
def loom(truth, gene_ids, symbols, cell_ids, tmp_path):
    path = tmp_path / "a.loom"
    rows = {"Accession": np.array([f"{g}.3" for g in gene_ids]), "Gene": np.array(symbols)}
    columns = {
        "CellID": np.array(cell_ids),
        "Organ": np.array(["Heart", "Éye"] * 68 + ["Eye"]),
        "n": np.arange(137.0),
    }
    loompy.create(str(path), {"": truth.toarray().T, "spliced": 2 * truth.toarray().T}, rows, columns)
    return path


def rewrite(path, values=None, **how):
    """Give the matrix another storage layout."""
    with h5py.File(path, "r+") as file:
        old = file["matrix"][:]
        del file["matrix"]
        file.create_dataset("matrix", data=old if values is None else values, **how)


def test_as_loompy_writes_it(loom, agrees, symbols, truth):
    with h5py.File(loom) as file:
        assert file["matrix"].chunks == (64, 64)
        assert file["matrix"].compression == "gzip"
    source = agrees(loom)
    assert list(source.feature_symbols) == symbols
    with open_counts(loom) as again:
        obs = again.obs()
        assert list(obs.columns) == ["Organ", "n"]
        assert obs["Organ"].iloc[1] == "Éye"
    agrees(loom, expected=2 * truth.toarray().astype(int), layer="spliced")
    agrees(loom, genes=symbols, gene_column="Gene")


@pytest.mark.parametrize(
    "how",
    [
        {"chunks": (64, 64), "compression": "gzip"},
        {"chunks": (1, 137), "compression": "gzip"},
        {"chunks": (211, 1)},
        {"chunks": (50, 100), "compression": "lzf"},
        {"chunks": (211, 137), "compression": "gzip", "shuffle": True},
        {},
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8", "float64", "int32"])
def test_layouts(loom, agrees, how, dtype, truth):
    values = np.minimum(truth.toarray().T, 100).astype(dtype)
    rewrite(loom, values, **how)
    source = agrees(loom, expected=values.T.astype(np.int64))
    if dtype == "uint16":
        with open_counts(loom) as again:
            assert {b.data.dtype for b in again.blocks(max_bytes=5000)} == {np.dtype(np.uint16)}
    assert source.notes == ["gene ids from column 'Accession'"]


def test_names_of_the_fetal_atlas(loom, agrees, symbols, gene_ids, cell_ids):
    with h5py.File(loom, "r+") as file:
        file.move("row_attrs/Accession", "row_attrs/gene_id")
        file.move("row_attrs/Gene", "row_attrs/gene_short_name")
        file.move("col_attrs/CellID", "col_attrs/sample")
    assert list(agrees(loom).feature_symbols) == symbols
    with h5py.File(loom, "r+") as file:
        file.move("col_attrs/sample", "col_attrs/mine")
        file.move("row_attrs/gene_id", "row_attrs/theirs")
    agrees(loom, cell_column="mine", gene_column="theirs")


def test_labels_of_many_cells_are_few_texts(loom, monkeypatch):
    monkeypatch.setattr("cellformers.io.loom._CELLS_AT_A_TIME", 10)
    with h5py.File(loom, "r+") as file:
        file["col_attrs/type"] = [f"type {i % 3}".encode() for i in range(137)]
        file["col_attrs/name"] = [f"name {i}" for i in range(137)]
    with open_counts(loom) as source:
        obs = source.obs()
    assert obs["Organ"].tolist() == ["Heart", "Éye"] * 68 + ["Eye"]
    assert obs["type"].tolist() == [f"type {i % 3}" for i in range(137)]
    assert len({id(value) for value in obs["type"]}) == 3
    assert obs["name"].tolist() == [f"name {i}" for i in range(137)]
    assert obs["n"].tolist() == list(range(137))


def test_refusals(loom, refuses, cell_ids, gene_ids):
    refuses(loom, "has no layer 'splice'", "'spliced'", layer="splice")
    refuses(loom, "no raw", raw=True)
    refuses(loom, "no cell column 'x'", cell_column="x")
    refuses(loom, "no gene column 'Accesion'", "'Accession'", gene_column="Accesion")
    with h5py.File(loom, "r+") as file:
        file["matrix"][20, 90] = 0.5
    refuses(loom, "non-integer values", repr(cell_ids[90]), repr(gene_ids[20]), "round: true", "spliced")
    rewrite(loom)
    refuses(loom, "non-integer values", repr(cell_ids[90]), repr(gene_ids[20]))
    with h5py.File(loom, "r+") as file:
        names = file["col_attrs/CellID"][:]
        names[4] = names[3]
        del file["col_attrs/CellID"]
        file["col_attrs/CellID"] = names
    refuses(loom, "more than once", "make_unique")
    with h5py.File(loom, "r+") as file:
        file.move("col_attrs/CellID", "col_attrs/what")
    refuses(loom, "no column attribute names the cells", "cell_column:")
    with h5py.File(loom, "r+") as file:
        del file["col_attrs/what"]
        file["col_attrs/CellID"] = names[:-1]
    refuses(loom, "names of 136 cells")
    rewrite(loom, np.zeros((211, 0), np.float32))
    refuses(loom, "empty")


def test_spill_leaves_nothing(loom, tmp_path, monkeypatch, agrees, refuses):
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    rewrite(loom)
    agrees(loom)
    with h5py.File(loom, "r+") as file:
        file["matrix"][210, 136] = np.nan
    refuses(loom, "NaN")
    assert list(folder.iterdir()) == []


def test_memory_depends_on_the_block(tmp_path):
    """A chunked loom of 30 MB is read with a few MB."""
    import tracemalloc

    path = tmp_path / "wide.loom"
    with h5py.File(path, "w") as file:
        matrix = file.create_dataset("matrix", (500, 16_000), "f4", chunks=(64, 64), compression="gzip")
        matrix[:, ::100] = 1
        file["row_attrs/Gene"] = [f"G{i}".encode() for i in range(500)]
        file["col_attrs/CellID"] = [f"c{i}".encode() for i in range(16_000)]
    with open_counts(path, options=ReadOptions()) as source:
        next(source.blocks(max_bytes=1 << 20))
        tracemalloc.start()
        total = sum(int(block.data.sum()) for block in source.blocks(max_bytes=1 << 20))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total == 500 * 160
    assert peak < 5 << 20
