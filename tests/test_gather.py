"""One file of an embedding: every cell in its place, the same bytes for any shards, in every format."""

import csv
import gzip
import io
import itertools
import json
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory import peak_memory

from cellformers import gather as module
from cellformers import vectors as reading
from cellformers.errors import UserError
from cellformers.gather import gather_cells, in_order, ordered
from cellformers.io.files import METADATA_KEY, read_metadata, stamp
from cellformers.summaries import summarize_embeddings
from cellformers.vectors import blocks, open_embeddings, principal_components

N, DIM = 50, 7
FORMATS = ["o.h5ad", "o.parquet", "o.csv", "o.tsv", "o.csv.gz", "o.tsv.gz"]


def write_shard(
    path: Path, cells: range, vectors: np.ndarray, *, group: int = 1024, **parameters: Any
) -> Path:
    flat = pa.array(vectors.reshape(-1), pa.float32())
    columns = {
        "cell_id": pa.array([f"cell{i}" for i in cells], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    made = stamp("embed", 1, parameters=parameters, inputs={"dataset": "sha256:d"})
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: json.dumps(made)})
    pq.write_table(table, path, compression="zstd", row_group_size=group)
    return path


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """More cells than were embedded, in another order."""
    ids = [f"cell{i}" for i in range(N + 5)][::-1]
    table = pa.table(
        {
            "cell_id": ids,
            "type": pa.array([f"t,{cell[-1]}" for cell in ids]).dictionary_encode(),
            "age": [float(cell[4:]) if cell != "cell3" else None for cell in ids],
            "ok": [True] * len(ids),
        }
    )
    pq.write_table(table, tmp_path / "cells.parquet")
    return tmp_path / "cells.parquet"


def split(folder: Path, vectors: np.ndarray, bounds: list[int]) -> list[Path]:
    folder.mkdir(exist_ok=True)
    return [
        write_shard(folder / f"{a}-{b}.parquet", range(a, b), vectors[a:b], mode="cls")
        for a, b in itertools.pairwise([0, *bounds, len(vectors)])
    ]


def test_the_h5ad_opens_with_every_cell_in_its_place(
    tmp_path: Path, cells: Path, vectors: np.ndarray
) -> None:
    n = gather_cells(split(tmp_path / "s", vectors, [20, 20]), cells, output=tmp_path / "small.h5ad")
    adata = anndata.read_h5ad(tmp_path / "small.h5ad")
    assert n == adata.n_obs == N
    assert adata.obs_names.tolist() == [f"cell{i}" for i in range(N)]
    assert adata.obs["type"].tolist() == [f"t,{i % 10}" for i in range(N)]
    assert adata.obs["age"].isna().tolist() == [i == 3 for i in range(N)]
    assert isinstance(adata.obs["type"].dtype, pd.CategoricalDtype)
    assert list(adata.obsm) == ["X_small"]
    assert adata.obsm["X_small"].dtype == np.float32
    assert np.array_equal(adata.obsm["X_small"], vectors)


def test_the_dataset_is_what_anndata_itself_would_store(
    tmp_path: Path, cells: Path, vectors: np.ndarray
) -> None:
    gather_cells(split(tmp_path / "s", vectors, []), cells, output=tmp_path / "o.h5ad", name="e")
    anndata.read_h5ad(tmp_path / "o.h5ad").write_h5ad(tmp_path / "again.h5ad", compression="gzip")
    with h5py.File(tmp_path / "o.h5ad") as ours, h5py.File(tmp_path / "again.h5ad") as theirs:
        a, b = ours["obsm/X_e"], theirs["obsm/X_e"]
        assert dict(a.attrs) == dict(b.attrs)
        assert (a.dtype, a.shape, a.compression) == (b.dtype, b.shape, b.compression)


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_bytes_for_any_shards_and_blocks(
    tmp_path: Path, cells: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * DIM * 8)
    monkeypatch.setattr(module, "ROWS", 16)
    made = set()
    for number, (bounds, rows) in enumerate(itertools.product([[], [25], [1, 9, 10, 44]], (1024, 3))):
        monkeypatch.setattr(reading, "ROWS", rows)
        shards = split(tmp_path / str(number), vectors, bounds)
        gather_cells(shards, cells, output=tmp_path / name, name="e", labels=["type"])
        made.add((tmp_path / name).read_bytes())
    assert len(made) == 1


@pytest.mark.parametrize("name", FORMATS[2:])
def test_text_has_cells_labels_and_dimensions(
    tmp_path: Path, cells: Path, vectors: np.ndarray, name: str
) -> None:
    gather_cells(
        split(tmp_path / "s", vectors, [7]), cells, output=tmp_path / name, labels=["age", "type", "ok"]
    )
    content = (tmp_path / name).read_bytes()
    text = (gzip.decompress(content) if name.endswith(".gz") else content).decode()
    rows = list(csv.reader(io.StringIO(text), delimiter="\t" if "tsv" in name else ","))
    assert rows[0] == ["cell_id", "age", "type", "ok", *map(str, range(DIM))]
    assert len(rows) == N + 1
    assert [row[0] for row in rows[1:]] == [f"cell{i}" for i in range(N)]
    assert [row[1] for row in rows[1:]] == ["" if i == 3 else str(i) for i in range(N)]
    assert [row[2] for row in rows[1:]] == [f"t,{i % 10}" for i in range(N)]
    assert np.array_equal(np.array([row[4:] for row in rows[1:]], np.float32), vectors)
    frame = pd.read_csv(tmp_path / name, sep="\t" if "tsv" in name else ",", index_col=0)
    assert np.array_equal(frame[[*map(str, range(DIM))]].to_numpy(np.float32), vectors)


def test_parquet_is_one_shard_with_labels(tmp_path: Path, cells: Path, vectors: np.ndarray) -> None:
    shards = split(tmp_path / "s", vectors, [7])
    gather_cells(shards, cells, output=tmp_path / "o.parquet", labels=["type"])
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column_names == ["cell_id", "type", "embedding"]
    assert table["type"].to_pylist() == [f"t,{i % 10}" for i in range(N)]
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), vectors)
    assert read_metadata(tmp_path / "o.parquet")["parameters"] == {"mode": "cls"}
    gather_cells([tmp_path / "o.parquet"], cells, output=tmp_path / "a.h5ad", name="e")
    gather_cells(shards, cells, output=tmp_path / "b.h5ad", name="e")
    assert (tmp_path / "a.h5ad").read_bytes() == (tmp_path / "b.h5ad").read_bytes()


@pytest.mark.parametrize("name", ["o.h5ad", "o.parquet", "o.csv"])
def test_memory_does_not_grow_with_the_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """16 MB of vectors, half a MB at a time."""
    many = np.random.default_rng(0).normal(size=(8192, 512)).astype(np.float32).round(2)
    pq.write_table(pa.table({"cell_id": [f"cell{i}" for i in range(len(many))]}), tmp_path / "cells.parquet")
    shards = [
        write_shard(tmp_path / f"{a}.parquet", range(a, a + 4096), many[a : a + 4096], group=256)
        for a in (0, 4096)
    ]
    for reader in (module, reading):
        monkeypatch.setattr(reader, "ROWS", 256)
    gather_cells(shards[:1], tmp_path / "cells.parquet", output=tmp_path / name)  # imports what it needs
    with peak_memory() as peak:
        gather_cells(shards, tmp_path / "cells.parquet", output=tmp_path / name)
    assert peak() < 12 << 20
    if name == "o.h5ad":
        assert np.array_equal(anndata.read_h5ad(tmp_path / name).obsm["X_o"], many)


def test_labels_choose_the_columns_of_the_h5ad(tmp_path: Path, cells: Path, vectors: np.ndarray) -> None:
    shards = split(tmp_path / "s", vectors, [])
    gather_cells(shards, cells, output=tmp_path / "o.h5ad", labels=["ok"])
    assert list(anndata.read_h5ad(tmp_path / "o.h5ad").obs) == ["ok"]
    gather_cells(shards, cells, output=tmp_path / "o.csv")
    assert (tmp_path / "o.csv").read_text().splitlines()[0] == "cell_id," + ",".join(map(str, range(DIM)))


def test_no_cells_at_all(tmp_path: Path, cells: Path) -> None:
    shards = split(tmp_path / "s", np.zeros((0, DIM), np.float32), [])
    for name in FORMATS:
        assert gather_cells(shards, cells, output=tmp_path / name, name="e") == 0
    assert anndata.read_h5ad(tmp_path / "o.h5ad").obsm["X_e"].shape == (0, DIM)
    with pytest.raises(UserError, match="no cell of any state"):
        summarize_embeddings(shards, tmp_path / "states.parquet")


@pytest.mark.parametrize("name", ["o.txt", "o", "o.h5ad.gz"])
def test_other_formats_are_refused(tmp_path: Path, cells: Path, vectors: np.ndarray, name: str) -> None:
    with pytest.raises(UserError, match=r"gather writes \.h5ad"):
        gather_cells(split(tmp_path / "s", vectors, []), cells, output=tmp_path / name)


def test_what_does_not_belong_together_is_refused(tmp_path: Path, cells: Path, vectors: np.ndarray) -> None:
    shards = split(tmp_path / "s", vectors, [20])
    other = write_shard(tmp_path / "other.parquet", range(3), vectors[:3], mode="cell")
    strange = write_shard(tmp_path / "strange.parquet", range(90, 93), vectors[:3], mode="cls")
    cases: list[tuple[list[Path], dict[str, Any], str]] = [
        ([shards[0], other], {}, "made from another dataset, model or choice"),
        ([*shards, shards[1]], {}, "cell 'cell20' is there twice"),
        ([*shards, strange], {}, "has no cell 'cell90'"),
        (shards, {"labels": ["typ"]}, "no column 'typ'; did you mean 'type'"),
        ([], {}, "no embedding files"),
    ]
    for files, options, words in cases:
        with pytest.raises(UserError, match=words):
            gather_cells(files, cells, output=tmp_path / "o.h5ad", **options)
        assert not (tmp_path / "o.h5ad").exists()


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 16, 100])
def test_blocks_go_on_over_shards(tmp_path: Path, vectors: np.ndarray, rows: int) -> None:
    embeddings = open_embeddings(split(tmp_path / "s", vectors, [3, 3, 30]))
    found = list(blocks(embeddings, rows))
    assert [len(block) for block in found] == [rows] * (N // rows) + ([N % rows] if N % rows else [])
    assert np.array_equal(np.concatenate(found), vectors)
    assert (len(embeddings), embeddings.dim) == (N, DIM)


def test_in_order_puts_vectors_where_their_cells_are(tmp_path: Path, vectors: np.ndarray) -> None:
    shards = split(tmp_path / "s", vectors, [20])
    wanted = np.array([f"cell{i}" for i in range(N + 2)][::-1], dtype=object)
    found = in_order(wanted, shards)
    assert np.isnan(found[:2]).all()
    assert np.array_equal(found[2:], vectors[::-1])


def test_files_that_are_no_embedding(tmp_path: Path, cells: Path, vectors: np.ndarray) -> None:
    with pytest.raises(UserError, match="no column 'embedding'"):
        open_embeddings([cells])
    pq.write_table(pa.table({"cell_id": ["a"], "embedding": [[1.0]]}), tmp_path / "lists.parquet")
    with pytest.raises(UserError, match="not fixed-size lists"):
        open_embeddings([tmp_path / "lists.parquet"])
    gather_cells(split(tmp_path / "s", vectors, []), cells, output=tmp_path / "o.h5ad", name="e")
    assert open_embeddings([tmp_path / "o.h5ad"]).key == "X_e"
    with pytest.raises(UserError, match="give it alone"):
        open_embeddings([tmp_path / "o.h5ad", tmp_path / "s" / "0-50.parquet"])
    adata = anndata.read_h5ad(tmp_path / "o.h5ad")
    adata.obsm["X_f"] = adata.obsm["X_e"]
    adata.write_h5ad(tmp_path / "o.h5ad")
    with pytest.raises(
        UserError, match="which of X_e, X_f is the embedding is not clear; call the entry X_o"
    ):
        open_embeddings([tmp_path / "o.h5ad"])
    adata.obsm["X_o"] = adata.obsm["X_f"]
    adata.write_h5ad(tmp_path / "o.h5ad")
    assert open_embeddings([tmp_path / "o.h5ad"]).key == "X_o"
    adata.obsm.clear()
    adata.write_h5ad(tmp_path / "o.h5ad")
    with pytest.raises(UserError, match="which of no obsm entries"):
        open_embeddings([tmp_path / "o.h5ad"])


def test_names_with_slashes_and_columns_of_lists(tmp_path: Path, cells: Path, vectors: np.ndarray) -> None:
    """anndata could not read the one, nor write the other."""
    shards = split(tmp_path / "s", vectors, [])
    with pytest.raises(UserError, match="the name 'a/b' has a slash"):
        gather_cells(shards, cells, output=tmp_path / "o.h5ad", name="a/b")
    table = pq.read_table(cells)
    pq.write_table(table.append_column("ids", pa.array([[1, 2]] * len(table))), cells)
    with pytest.raises(UserError, match=r"the column 'ids' holds lists"):
        gather_cells(shards, cells, output=tmp_path / "o.h5ad")
    assert not (tmp_path / "o.h5ad").exists()
    gather_cells(shards, cells, output=tmp_path / "o.h5ad", labels=["type"])


def test_vectors_in_the_order_of_the_cells_leave_room_for_others(tmp_path: Path, vectors: np.ndarray) -> None:
    shards = split(tmp_path / "s", vectors, [17])
    names = [name for i in range(N) for name in ((f"cell{i}", f"other{i}") if i % 3 == 0 else (f"cell{i}",))]
    found = ordered(pa.array([*names, "last"]), shards)
    for size in (1, 7, 1000):
        blocks = list(found.blocks(size))
        assert max(map(len, blocks)) <= size
        whole = np.concatenate(blocks)
        assert len(whole) == len(names) + 1
        own = np.array([name.startswith("cell") for name in [*names, "last"]])
        assert np.array_equal(whole[own], vectors)
        assert np.isnan(whole[~own]).all()
    with pytest.raises(ValueError, match="another order"):
        ordered(pa.array(names[::-1]), shards)


def test_principal_components_in_two_passes(tmp_path: Path, vectors: np.ndarray) -> None:
    shards = split(tmp_path / "s", vectors, [17])
    found = principal_components(open_embeddings(shards), 3)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(centred @ axes[:3].T), atol=1e-4)
