"""Two runs held against each other: what differs is found, named and measured; hostile folders are harmless."""

import itertools
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from command_line import Ran, run

from cellformers.compare import compare
from cellformers.compare.tally import Tally, hold_together
from cellformers.io.files import write_json

N = 6000  # rows; more than are read at a time
EMBEDDINGS = "d/embeddings/e"


def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)


def write_vectors(path: Path, values: np.ndarray, first: int = 0, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = pa.array([f"c{first + i}" for i in range(len(values))])
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    table = pa.table({"cell_id": names, "embedding": column} | more)
    metadata = {"step": "embed", "parameters": {"layer": 0}, "inputs": {"model": "sha256:" + "0" * 64}}
    pq.write_table(table.replace_schema_metadata({"cellformers": json.dumps(metadata)}), path)


def write_counts(path: Path, counts: sp.csr_matrix, first: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = pd.Index([f"c{first + i}" for i in range(counts.shape[0])])
    var = pd.DataFrame(index=pd.Index([f"g{i}" for i in range(counts.shape[1])]))
    anndata.AnnData(counts, obs=pd.DataFrame(index=names), var=var).write_h5ad(path)


def write_tensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    content = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def make(folder: Path, shards: int = 1) -> Path:
    """A small results folder: tables, counts, scores, weights, a figure."""
    counts = sp.random(N, 20, 0.2, format="csr", random_state=0, dtype=np.float32)
    counts.data = np.ceil(counts.data * 9).astype(np.uint16)
    edges = [N * i // shards for i in range(shards + 1)]
    for number, (lo, hi) in enumerate(itertools.pairwise(edges), start=1):
        name = f"{number:04d}-of-{shards:04d}"
        write_vectors(folder / EMBEDDINGS / f"{name}.parquet", vectors()[lo:hi], lo)
        write_counts(folder / "d" / "counts" / f"{name}.h5ad", counts[lo:hi], lo)
        tokens = [list(range(i % 7)) for i in range(lo, hi)]
        table = pa.table({"input_ids": pa.array(tokens, pa.list_(pa.int32()))})
        (folder / "d" / "tokens" / "v").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / "d" / "tokens" / "v" / f"{name}.parquet")
    weights = np.arange(6, dtype=np.float32)
    write_tensors(
        folder / "models" / "m" / "model.safetensors",
        {"a": ("F32", [2, 3], weights.tobytes()), "b": ("BF16", [2], struct.pack("<2H", 0x3F80, 0x4000))},
    )
    write_json({"metrics": {"f1": {"value": 0.5, "n": 3}}}, folder / "benchmarks" / "b" / "e.json")
    (folder / "benchmarks.tsv").write_text("method\tvalue\ne\t0.5\npca\t0.25\n")
    (folder / "report.html").write_text("<p>one</p>")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal runs."""
    first = make(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    return first, tmp_path / "b"


def against(runs: tuple[Path, Path], *options: str) -> Ran:
    ended = run("compare", *runs, *options)
    assert ended.code in (0, 1), ended.err
    return ended


def test_equal_runs_do_not_differ(runs: tuple[Path, Path]) -> None:
    (runs[1] / "logs").mkdir()
    (runs[1] / "logs" / "x.log").write_text("other words")
    ended = against(runs)
    assert ended.code == 0
    assert "Nothing differs: 7 artefacts are equal to the byte." in ended.out


@pytest.mark.parametrize("shards", [2, 7])
def test_shards_are_compared_by_their_rows(tmp_path: Path, shards: int) -> None:
    runs = make(tmp_path / "a"), make(tmp_path / "b", shards)
    ended = against(runs)
    assert ended.code == 0, ended.out
    assert "3 are cut into other shards with the same rows" in ended.out
    path = runs[1] / EMBEDDINGS / f"{shards:04d}-of-{shards:04d}.parquet"
    lo = N * (shards - 1) // shards
    values = vectors()[lo:]
    values[-1, 0] += 0.5
    write_vectors(path, values, lo)
    ended = against(runs)
    assert ended.code == 1
    assert (
        f"d/embeddings/e/*.parquet\n      column embedding: 1 of {N * 4:,} values differ, by at most 0.5"
        in ended.out
    )


def test_a_count_that_moved_to_another_row_is_seen_in_other_shards(tmp_path: Path) -> None:
    runs = make(tmp_path / "a"), make(tmp_path / "b", 2)
    with h5py.File(runs[1] / "d" / "counts" / "0002-of-0002.h5ad", "r+") as file:
        file["X/indptr"][5] += 1
    ended = against(runs)
    assert ended.code == 1
    assert "column X/indptr: 2 of 6,000 values differ, by at most 1" in ended.out


def edit_parquet(values: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: write_vectors(folder / EMBEDDINGS / "0001-of-0001.parquet", values)


def set_x(folder: Path) -> None:
    with h5py.File(folder / "d" / "counts" / "0001-of-0001.h5ad", "r+") as file:
        file["X/data"][3] += 2


def changed_weights(folder: Path) -> None:
    weights = np.arange(6, dtype=np.float32)
    weights[5] += 0.25
    path = folder / "models" / "m" / "model.safetensors"
    values = {"a": ("F32", [2, 3], weights.tobytes()), "b": ("BF16", [2], struct.pack("<2H", 0x3F80, 0x4080))}
    write_tensors(path, values)


def with_nan() -> np.ndarray:
    values = vectors()
    values[0, 0] = np.nan
    return values


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "number": (edit_parquet(vectors() * np.float32(1.5)), "column embedding: 24,000 of 24,000 values differ, by at"),
    "nan": (edit_parquet(with_nan()), "column embedding: 1 of 24,000 values differ"),
    "rows": (edit_parquet(vectors()[:-1]), "column cell_id: 6,000 -> 5,999 values"),
    "column": (
        lambda f: write_vectors(f / EMBEDDINGS / "0001-of-0001.parquet", vectors(), more=pa.array([1] * N)),
        "column more: only in the second",
    ),
    "h5ad": (set_x, "column X/data: 1 of "),
    "weights": (changed_weights, "column a: 1 of 6 values differ, by at most 0.25 (0.048 of the largest value)"),
    "bf16": (changed_weights, "column b: 1 of 2 values differ, by at most 2 (0.5 of the largest value)"),
    "json": (
        lambda f: write_json({"metrics": {"f1": {"value": 0.5}}, "x": 1}, f / "benchmarks" / "b" / "e.json"),
        "metrics.f1.n: only in the first (3)\n      x: only in the second (1)",
    ),
    "tsv": (
        lambda f: (f / "benchmarks.tsv").write_text("method\tvalue\ne\t0.5\npca\t0.5\nz\t1\n"),
        "rows: 3 -> 4\n      column value: 1 of 2 values differ, by at most 0.25",
    ),
    "text": (lambda f: (f / "report.html").write_text("<p>two</p>"), "1 lines differ, the first is line 1"),
    "gone": (lambda f: (f / "report.html").unlink(), "artefacts only in A: 1\n  report.html"),
    "new": (lambda f: (f / "more.txt").touch(), "artefacts only in B: 1\n  more.txt"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_and_measured(runs: tuple[Path, Path], change: str, tmp_path: Path) -> None:
    edit, said = CHANGES[change]
    edit(runs[1])
    ended = against(runs, "-o", str(tmp_path / "out.json"))
    assert ended.code == 1
    assert said in ended.out
    assert ended.out.endswith(".\n")
    assert "The runs differ" in ended.out
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["differs"] is True
    assert found["equal"] == 6 if change != "new" else 7


def test_a_tolerance_accepts_floats_only(runs: tuple[Path, Path]) -> None:
    values = vectors()
    values *= np.float32(1.001)
    edit_parquet(values)(runs[1])
    (runs[1] / "report.html").write_text("<p>drawn from other numbers</p>")
    write_json({"metrics": {"f1": {"value": 0.5002, "n": 3}}}, runs[1] / "benchmarks" / "b" / "e.json")
    (runs[1] / "benchmarks.tsv").write_text("method\tvalue\ne\t0.5001\npca\t0.25\n")
    ended = against(runs, "--tolerance", "5e-3")
    assert ended.code == 0, ended.out
    assert "Nothing differs: 3 artefacts are equal to the byte, 4 differ within 0.005." in ended.out
    assert against(runs, "--tolerance", "1e-4").code == 1
    write_json({"metrics": {"f1": {"value": 0.5002, "n": 4}}}, runs[1] / "benchmarks" / "b" / "e.json")
    ended = against(runs, "--tolerance", "5e-3")
    assert ended.code == 1
    assert "metrics.f1.n: 3 -> 4" in ended.out


@pytest.mark.parametrize(
    ("first", "second", "differs"),
    [
        ("n\n1000\n", "n\n1001\n", True),  # whole numbers have to be equal
        ("v\n1000.5\n1.5\n", "v\n1000.5\n1.7\n", False),  # of the largest value of the column, equal ones too
        ("v\n1000.5\n1.5\n", "v\n1000.5\n9.5\n", True),
        ("a\tb\nx\ty\n", "a\tb\n\n", True),  # a line without anything
        ("v\n1.0\n", "v\n1\n", False),
    ],
)
def test_a_tolerance_in_tables_of_text(
    runs: tuple[Path, Path], first: str, second: str, differs: bool
) -> None:
    for folder, text in zip(runs, (first, second), strict=True):
        (folder / "benchmarks.tsv").write_text(text)
    assert against(runs, "--tolerance", "5e-3").code == differs


def test_the_digest_of_an_accepted_input_is_accepted_with_it(runs: tuple[Path, Path]) -> None:
    for digit, folder in zip("01", runs, strict=True):
        write_json({"inputs": {"model": "sha256:" + digit * 64}}, folder / "benchmarks" / "b" / "e.json")
    assert against(runs).code == 1
    assert against(runs, "--tolerance", "1e-6").code == 0


def recorded(folder: Path, **changes: dict[str, Any]) -> Path:
    """The folder with a record of what is in it."""
    from cellformers.compare.runs import _found
    from cellformers.provenance import file_entry

    config = {"seed": 0, "accelerator": "cpu", "datasets": {"d": {"path": "d.h5ad", "shards": 1}}}
    record = {
        "format": 1, "versions": {"numpy": "2"}, "code": {"commit": None}, "machine": {"system": "Linux"},
        "config": {"given": {}, "validated": config | changes.get("config", {})}, "sources": {},
        "inputs": {"d.h5ad": {"size": 1, "sha256": "1"}} | changes.get("inputs", {}),
        "artefacts": {name: file_entry(folder / name) for name in sorted(_found(folder))},
    }  # fmt: skip
    write_json(
        record | {k: v for k, v in changes.items() if k in ("versions", "machine")},
        folder / "provenance.json",
    )
    return folder


def test_records_tell_of_config_inputs_and_circumstances(runs: tuple[Path, Path]) -> None:
    recorded(runs[0])
    recorded(runs[1], versions={"numpy": "3", "torch": "2"})
    ended = against(runs)
    assert ended.code == 0
    assert "versions.numpy: '2' -> '3'\n  versions.torch: only in the second ('2')" in ended.out
    assert against(runs, "--strict").code == 1
    recorded(runs[1], config={"seed": 1})
    ended = against(runs)
    assert ended.code == 1
    assert "config: 1\n  seed: 0 -> 1" in ended.out
    recorded(runs[1], inputs={"d.h5ad": {"size": 1, "sha256": "2"}})
    ended = against(runs)
    assert ended.code == 1
    assert "inputs: 1\n  d.h5ad.sha256: '1' -> '2'" in ended.out
    recorded(runs[1], config={"accelerator": "cuda", "datasets": {"d": {"path": "d.h5ad", "shards": 9}}})
    ended = against(runs)
    assert ended.code == 0
    assert "config.accelerator: 'cpu' -> 'cuda'\n  config.shards.d: 1 -> 9" in ended.out


def test_records_alone_are_compared_by_digests(runs: tuple[Path, Path]) -> None:
    set_x(runs[1])
    records = [recorded(folder) / "provenance.json" for folder in runs]
    moved = [shutil.move(path, path.parent.parent / f"{path.parent.name}.json") for path in records]
    ended = run("compare", *moved)
    assert ended.code == 1
    assert "d/counts/0001-of-0001.h5ad\n      not looked into: that takes both results folders" in ended.out
    assert run("compare", moved[0], moved[0]).code == 0


def test_a_file_changed_after_it_was_recorded_is_told(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        recorded(folder)
    set_x(runs[1])
    (runs[1] / "leftover.parquet").touch()  # no artefact of the recorded run
    ended = against(runs)
    assert ended.code == 1
    assert f"changed since they were recorded: 1\n  {runs[1]}: d/counts/0001-of-0001.h5ad" in ended.out
    assert "leftover" not in ended.out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not readable as JSON"),
        ("[]", "is no record of a run"),
        ('{"format": 1}', "is no record of a run"),
        (None, "no such folder or file"),
    ],
)
def test_what_is_no_run_is_one_line(runs: tuple[Path, Path], content: str | None, said: str) -> None:
    path = runs[1].parent / "other.json"
    if content is not None:
        path.write_text(content)
    ended = run("compare", runs[0], path)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert said in ended.err


def test_an_empty_folder_is_no_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("compare", runs[0], tmp_path / "empty").code == 2


@pytest.mark.parametrize("name", ["../secret.json", "/etc/hostname", "d/../../secret.json", "a\0b"])
def test_a_record_that_names_files_outside_is_refused(runs: tuple[Path, Path], name: str) -> None:
    path = recorded(runs[1]) / "provenance.json"
    record = json.loads(path.read_text())
    record["artefacts"][name] = {"size": 1, "sha256": "0"}
    path.write_text(json.dumps(record))
    ended = run("compare", *runs)
    assert ended.code == 2
    assert "outside the results" in ended.err


def test_links_that_lead_outside_are_not_followed(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Equal content behind the link, so that following it would say that nothing differs."""
    secret = tmp_path / "secret.json"
    path = runs[1] / "benchmarks" / "b" / "e.json"
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)
    ended = against(runs)
    assert ended.code == 1
    assert "leads out of the folder" in ended.out
    path.unlink()
    (path.parent / "real.json").write_bytes(secret.read_bytes())
    path.symlink_to("real.json")
    assert "leads out" not in against(runs).out


def test_a_pipe_does_not_hang(runs: tuple[Path, Path]) -> None:
    path = runs[1] / "report.html"
    path.unlink()
    os.mkfifo(path)
    ended = against(runs)
    assert ended.code == 1
    assert "is no file" in ended.out


def test_links_out_of_hdf5_are_not_followed(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["x"] = np.arange(4)
    for number, folder in enumerate(runs):
        with h5py.File(folder / "d" / "counts" / "0001-of-0001.h5ad", "r+") as file:
            file["uns/out"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "x")
            file["uns/loop"] = file["uns"]
            file["uns"].attrs["number"] = number
    ended = against(runs)
    assert ended.code == 1
    assert "uns/@number: 0 -> 1" in ended.out
    assert "uns/out" not in ended.out  # said of both in the same words


def test_pickles_are_bytes(runs: tuple[Path, Path], tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    (runs[0] / "x.pkl").write_bytes(pickle.dumps(1))
    (runs[1] / "x.pkl").write_bytes(pickle.dumps(Evil()))
    assert against(runs).code == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "x.parquet", "x.h5ad", "x.json", "x.tsv"])
def test_damaged_files_are_told_of_and_the_rest_is_compared(runs: tuple[Path, Path], name: str) -> None:
    for number, folder in enumerate(runs):
        (folder / name).write_bytes(b"\xff\xff\xff\x00\x00\x00\x00\x00{\x00" * (3 + number))
    edit_parquet(vectors() + 1)(runs[1])
    ended = against(runs)
    assert ended.code == 1
    assert "column embedding" in ended.out
    assert "artefacts that differ: 2" in ended.out


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1, -1], "data_offsets": [-4, 0]},
        {"dtype": "NO", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 4]},
        None,
    ],
)
def test_tensors_outside_their_file_are_refused(runs: tuple[Path, Path], entry: Any) -> None:
    text = json.dumps({"a": entry}).encode()
    path = runs[1] / "models" / "m" / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    ended = against(runs)
    assert ended.code == 1
    assert "is not a safetensors file" in ended.out


def test_names_can_not_write_on_a_terminal(runs: tuple[Path, Path]) -> None:
    (runs[1] / "x\x1b[31m\n.txt").touch()
    ended = against(runs)
    assert "\x1b" not in ended.out
    assert "x\\x1b[31m\\n.txt" in ended.out


def test_streams_of_unlike_blocks_are_aligned() -> None:
    rng = np.random.default_rng(1)
    left = rng.normal(size=1000).astype(np.float32)
    right = left.copy()
    right[[17, 500, 999]] += np.array([1.0, -2.0, 3.0], np.float32)
    cuts = np.split(left, [0, 1, 400, 400, 777]), np.split(right, [33, 801])
    tally, n, m = hold_together(*cuts)
    assert (n, m, tally.n, tally.differing, tally.beyond) == (1000, 1000, 1000, 3, 0)
    gaps = np.abs(left.astype(np.float64) - right)
    assert tally.largest == gaps.max()
    assert tally.relative == gaps.max() / max(np.abs(left).max(), np.abs(right).max())
    assert hold_together([left], [right[:10]])[1:] == (1000, 10)


@pytest.mark.parametrize(
    ("left", "right", "beyond"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], None),
        ([np.nan, 1.0], [2.0, 1.0], 1),
        ([np.inf, 1.0], [-np.inf, 1.0], 1),
        ([np.inf, 0.0], [np.inf, -0.0], None),
    ],
)
def test_what_is_no_number_is_equal_to_itself_only(
    left: list[float], right: list[float], beyond: int | None
) -> None:
    tally = Tally()
    tally.add(np.array(left), np.array(right))
    difference = tally.difference("x", 1.0)
    if beyond is None:
        assert difference is None
    else:
        assert tally.beyond == beyond
        assert difference is not None
        assert not difference.accepted


def test_threads_change_nothing(runs: tuple[Path, Path]) -> None:
    edit_parquet(vectors() + 1)(runs[1])
    assert compare(*runs, threads=1) == compare(*runs, threads=4)
