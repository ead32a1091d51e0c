"""States: exact, the same bytes for any shards and any order of cells."""

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from memory import peak_memory

from cellformers import summaries
from cellformers import vectors as vectors_module
from cellformers.errors import UserError
from cellformers.gather import gather_cells
from cellformers.io.files import METADATA_KEY, read_metadata, stamp
from cellformers.summaries import read_states, summarize_embeddings

N, DIM = 37, 11
STATES = [None if i % 9 == 0 else ["nf", "dcm", "hcm"][i % 3] if i != 1 else "rare" for i in range(N)]


def make_vectors(n: int = N, *, seed: int = 0) -> np.ndarray:
    """float32[n, DIM] of very different magnitudes, so that sums depend on their order if they are rounded."""
    rng = np.random.default_rng(seed)
    found = rng.normal(size=(n, DIM)) * 10.0 ** rng.integers(-6, 7, (n, DIM))
    found[rng.random((n, DIM)) < 0.2] = 0.0
    found[rng.random((n, DIM)) < 0.1] = -0.0
    return found.astype(np.float32)


def write_shard(path: Path, ids: list[str], vectors: np.ndarray, **parameters: Any) -> Path:
    flat = pa.array(vectors.reshape(-1), pa.float32())
    table = pa.table({"cell_id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})
    parameters = {"mode": "cls", "layer": -1, "dtype": "float32", **parameters}
    made = stamp("embed", 1, parameters=parameters, inputs={"dataset": "sha256:d"})
    table = table.replace_schema_metadata({METADATA_KEY: json.dumps(made)})
    pq.write_table(table, path, compression="zstd", row_group_size=512)
    return path


def write_split(
    folder: Path, vectors: np.ndarray, bounds: list[int], order: np.ndarray | None = None
) -> list[Path]:
    """Shards of the cells in that order, cut at the bounds."""
    folder.mkdir(parents=True, exist_ok=True)
    order = np.arange(len(vectors)) if order is None else order
    return [
        write_shard(folder / f"{a}.parquet", [f"cell{i}" for i in order[a:b]], vectors[order[a:b]])
        for a, b in itertools.pairwise([0, *bounds, len(vectors)])
    ]


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    table = pa.table({"cell_id": [f"cell{i}" for i in range(N + 3)], "disease": [*STATES, "nf", "nf", None]})
    pq.write_table(table, tmp_path / "cells.parquet")
    return tmp_path / "cells.parquet"


def exact_mean(values: np.ndarray) -> np.float32:
    """By rational numbers, rounded to float64 and then to float32."""
    total = sum((Fraction(float(v)) for v in values), Fraction(0))
    return np.float32(float(total) / len(values))


@pytest.mark.parametrize("statistic", ["mean", "median", "lower_median"])
def test_every_state_has_its_statistic(tmp_path: Path, cells: Path, statistic: str) -> None:
    vectors = make_vectors()
    shards = write_split(tmp_path / "s", vectors, [10, 20])
    counts = summarize_embeddings(
        shards, tmp_path / "o.parquet", cells=cells, by="disease", statistics=[statistic]
    )
    assert counts == {"cells": N - 5, "states": 4, "no_label": 5, "no_embedding": 0}
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column_names == ["state", "n_cells", statistic]
    assert table["state"].to_pylist() == ["dcm", "hcm", "nf", "rare"]
    assert table["n_cells"].to_pylist() == [STATES.count(s) for s in ("dcm", "hcm", "nf", "rare")]
    found = read_states(tmp_path / "o.parquet")
    assert list(found) == ["dcm", "hcm", "nf", "rare"]
    for state, vector in found.items():
        members = vectors[[i for i, s in enumerate(STATES) if s == state]]
        if statistic == "mean":
            wanted = np.array([exact_mean(column) for column in members.T])
        elif statistic == "median":
            wanted = np.median(members.astype(np.float64), axis=0).astype(np.float32)
        else:
            wanted = torch.median(torch.from_numpy(members), dim=0).values.numpy()
        assert vector.dtype == np.float32
        assert np.array_equal(vector, wanted), state


def test_one_state_of_all_cells(tmp_path: Path) -> None:
    vectors = make_vectors()
    summarize_embeddings(write_split(tmp_path / "s", vectors, [5]), tmp_path / "o.parquet")
    table = pq.read_table(tmp_path / "o.parquet")
    assert table.select(["state", "n_cells"]).to_pylist() == [{"state": "all", "n_cells": N}]
    assert table.column_names == ["state", "n_cells", "mean", "median"]
    median = np.median(vectors.astype(np.float64), axis=0).astype(np.float32)
    assert np.array_equal(read_states(tmp_path / "o.parquet", statistic="median")["all"], median)
    default = read_states(tmp_path / "o.parquet")["all"]
    assert np.array_equal(default, np.array([exact_mean(column) for column in vectors.T]))


def test_the_same_bytes_for_any_shards_order_and_memory(
    tmp_path: Path, cells: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = make_vectors()
    made = set()
    cuts: list[list[int]] = [[], [18], [3, 4, 30]]
    for number, (bounds, budget) in enumerate(itertools.product(cuts, (1, 3 * 4 * N, 1 << 20))):
        monkeypatch.setattr(summaries, "BUDGET", budget)
        order = np.random.default_rng(number).permutation(N)
        shards = write_split(tmp_path / str(number), vectors, bounds, order)
        output = tmp_path / f"{number}.parquet"
        summarize_embeddings(
            shards[::-1], output, cells=cells, by="disease", statistics=list(summaries.STATISTICS)
        )
        made.add(output.read_bytes())
    assert len(made) == 1


def test_memory_does_not_grow_with_the_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 MB of vectors pass through 1 MB held at a time, and some more for blocks of rows."""
    vectors = np.random.default_rng(0).normal(size=(4096, 1024)).astype(np.float32)
    shards = write_split(tmp_path / "s", vectors, [3000])
    monkeypatch.setattr(summaries, "BUDGET", 1 << 20)
    monkeypatch.setattr(summaries, "ROWS", 128)
    monkeypatch.setattr(vectors_module, "ROWS", 128)
    monkeypatch.setattr(summaries, "STATISTICS", {"median": summaries.median})
    with peak_memory() as peak:
        summarize_embeddings(shards, tmp_path / "o.parquet", statistics=["median"])
    assert peak() < 8 << 20
    median = np.median(vectors.astype(np.float64), axis=0).astype(np.float32)
    assert np.array_equal(read_states(tmp_path / "o.parquet", statistic="median")["all"], median)


def test_a_gathered_file_gives_the_same_numbers_with_labels_of_its_own(tmp_path: Path, cells: Path) -> None:
    shards = write_split(tmp_path / "s", make_vectors(), [10, 20])
    gather_cells(shards, cells, output=tmp_path / "small.h5ad")
    for number, (files, table) in enumerate(
        [(shards, cells), ([tmp_path / "small.h5ad"], None), ([tmp_path / "small.h5ad"], cells)]
    ):
        summarize_embeddings(files, tmp_path / f"{number}.parquet", cells=table, by="disease")
    made = {(tmp_path / f"{number}.parquet").read_bytes() for number in range(3)}
    assert len(made) == 1


def test_cells_without_an_embedding_are_left_out_and_counted(tmp_path: Path, cells: Path) -> None:
    vectors = make_vectors()
    vectors[[1, 2]] = np.nan
    shards = write_split(tmp_path / "s", vectors, [10])
    counts = summarize_embeddings(shards, tmp_path / "o.parquet", cells=cells, by="disease")
    assert counts == {"cells": N - 7, "states": 3, "no_label": 5, "no_embedding": 2}
    assert "rare" not in read_states(tmp_path / "o.parquet")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    for wrong in (np.nan, np.inf):
        vectors = make_vectors()
        vectors[12, 3] = wrong
        with pytest.raises(UserError, match="'cell12' is not finite"):
            summarize_embeddings(write_split(tmp_path / "s", vectors, [10]), tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()


def test_metadata_tell_the_embedding_and_the_column(tmp_path: Path, cells: Path) -> None:
    summarize_embeddings(
        write_split(tmp_path / "s", make_vectors(), []), tmp_path / "o.parquet", cells=cells, by="disease"
    )
    metadata = read_metadata(tmp_path / "o.parquet")
    assert metadata["step"] == "summarize-embeddings"
    assert metadata["parameters"] == {"mode": "cls", "layer": -1, "dtype": "float32", "by": "disease"}
    assert metadata["inputs"] == {"dataset": "sha256:d"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "diseas"}, "no column 'diseas'; did you mean 'disease'"),
        ({"by": "disease", "cells": None}, "give --cells"),
        ({"statistics": ["mode"]}, "no statistic 'mode'"),
    ],
)
def test_options_that_do_not_exist(tmp_path: Path, cells: Path, options: dict[str, Any], words: str) -> None:
    shards = write_split(tmp_path / "s", make_vectors(), [])
    with pytest.raises(UserError, match=words):
        summarize_embeddings(shards, tmp_path / "o.parquet", **{"cells": cells, **options})
    assert not (tmp_path / "o.parquet").exists()


def test_files_that_are_no_states(tmp_path: Path, cells: Path) -> None:
    with pytest.raises(UserError, match="summarize-embeddings makes"):
        read_states(cells)
    summarize_embeddings(
        write_split(tmp_path / "s", make_vectors(), []), tmp_path / "o.parquet", statistics=["lower_median"]
    )
    with pytest.raises(UserError, match="has no 'mean' of states"):
        read_states(tmp_path / "o.parquet", statistic="mean")
    assert list(read_states(tmp_path / "o.parquet")) == ["all"]
