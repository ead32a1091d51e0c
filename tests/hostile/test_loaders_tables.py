"""Parquet, JSON and YAML that ask for more than they hold, or for what no reader expects."""

import json
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import forked
import h5py
import numpy as np
import opcodes
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loader_targets import YAMLS, attempt

from cellformers import config
from cellformers.deposits.entries import read_entry
from cellformers.errors import UserError
from cellformers.evaluate.tables import read_vectors
from cellformers.io.files import open_parquet, read_json, read_metadata, read_table
from cellformers.io.labels import read_labels
from cellformers.io.pages import RATIO, ROOM, asked_for
from cellformers.maps import umap as draw_map
from cellformers.registry.entries import read_registry
from cellformers.registry.store import read_lock
from cellformers.tokens import read_tokens, token_lengths
from cellformers.training.space import read_space
from cellformers.vectors import blocks, open_embeddings

# --- Parquet ----------------------------------------------------------------------------------------------


def write(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path, compression="zstd")


def zeros(n: int) -> pa.Array:
    return pa.array(np.zeros(n, np.int64))


def one_text(n: int, length: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array(["x" * length]))


def varint(n: int) -> bytes:
    """A number in Thrift's compact form."""
    out, n = bytearray(), n << 1
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def bomb_page(path: Path) -> None:
    """A page that says to unpack to two gigabytes, of which a part is there."""
    there = 150_000_000
    table = pa.table({"cell_id": pa.array([bytes(there - 4)], pa.binary())})
    pq.write_table(
        table, path, compression="zstd", use_dictionary=False, write_statistics=False, store_schema=False
    )
    content = path.read_bytes()
    assert content.count(varint(there + 6)) == 1  # with the levels of a column that may hold nulls
    path.write_bytes(content.replace(varint(there + 6), varint(2_000_000_000)))


def bomb_rows_in_full(path: Path) -> None:
    """A hundred and forty million rows that are there, as runs."""
    schema = pa.schema({"cell_id": pa.bool_()})
    batch = pa.record_batch([pa.array(np.zeros(20_000_000, np.bool_))], schema=schema)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for _ in range(7):
            writer.write_batch(batch, row_group_size=20_000_000)


def bomb_text(path: Path) -> None:
    """Half a million rows that name one long text."""
    write(path, cell_id=one_text(500_000, 100_000), embedding=zeros(500_000), input_ids=zeros(500_000))


def in_another_file(path: Path) -> None:
    """A footer may name other files for its columns."""
    write(path, cell_id=["a"])
    pq.write_metadata(pa.schema({"cell_id": pa.string()}), path.with_name("other"), [])
    metadata = pq.read_metadata(path)
    metadata.set_file_path("../../etc/passwd")
    metadata.write_metadata_file(path)


def twice(path: Path) -> None:
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["cell_id", "cell_id"]), path)


def no_text(path: Path) -> None:
    pq.write_table(pa.table({"cell_id": pa.array([b"\xff\xfe"]).view(pa.string())}), path)


def nested(path: Path) -> None:
    value: Any = "a"
    for _ in range(60):
        value = [value]
    pq.write_table(pa.table({"cell_id": pa.array([value])}), path)


BOMBS = {
    f.__name__: f for f in (bomb_page, bomb_rows_in_full, bomb_text, in_another_file, twice, no_text, nested)
}


def read_everything(folder: Path) -> list[tuple[str, str, str, str]]:
    """What every reader of Parquet says of every file."""

    def vectors(path: Path) -> None:
        list(blocks(open_embeddings([path]), 10))

    def tokens(path: Path) -> None:
        list(read_tokens(path))

    readers: dict[str, Callable[[Path], Any]] = {
        "table": partial(read_table, columns=["cell_id"]), "whole table": read_table, "tokens": tokens,
        "lengths": token_lengths, "vectors": vectors, "labels": read_labels,
    }  # fmt: skip
    return [
        (path.stem, name, *attempt(partial(read, path)))
        for path in sorted(folder.glob("*.parquet"))
        for name, read in readers.items()
    ]


def test_hostile_parquet_is_refused_by_every_reader(tmp_path: Path) -> None:
    for name, bomb in BOMBS.items():
        bomb(tmp_path / f"{name}.parquet")
        assert (tmp_path / f"{name}.parquet").stat().st_size < 4 << 20
    outcome = forked.run(read_everything, tmp_path, writable=tmp_path, seconds=100)
    assert outcome.kind == "value", outcome.text
    assert outcome.peak_mb < 1200
    assert len(outcome.value) == 6 * len(BOMBS)
    for name, reader, ended, text in outcome.value:
        if name == "nested" and reader in ("whole table", "labels"):
            continue  # a table of lists, which nobody asked to be anything else
        assert ended == "user_error", (name, reader, ended, text)
        assert text.isprintable()


def test_large_but_plain_tables_are_read(tmp_path: Path) -> None:
    """What a bomb looks like must not be what tables of many cells look like."""
    n = 200_000
    columns = {f"label {i}": pa.array(["the same for all"] * n) for i in range(10)}
    write(tmp_path / "x.parquet", cell_id=[f"cell{i}" for i in range(n)], **columns)
    assert len(read_table(tmp_path / "x.parquet")) == n
    asked = asked_for(tmp_path / "x.parquet")
    assert n * 8 <= asked["cell_id"] < 100 * n
    assert sum(asked.values()) < RATIO * (tmp_path / "x.parquet").stat().st_size or sum(asked.values()) < ROOM


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_what_a_file_asks_for_is_at_least_what_it_takes(
    compression: str, version: str, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    words = pa.array(rng.choice(["a", "bb", "c" * 300], 5000))
    table = pa.table(
        {
            "text": words, "coded": words.dictionary_encode(), "n": rng.integers(9, size=5000),
            "half": rng.random(5000),
            "list": [[1, 2]] * 5000, "vector": pa.FixedSizeListArray.from_arrays(pa.array(rng.random(20_000)), 4),
            "fixed": pa.array([b"abcd"] * 5000, pa.binary(4)), "nothing": pa.nulls(5000), "flag": [True] * 5000,
        }
    )  # fmt: skip
    for dictionary in (True, False):
        pq.write_table(
            table, tmp_path / "x.parquet", compression=compression, data_page_version=version, row_group_size=1700,
            use_dictionary=dictionary,
        )  # fmt: skip
        asked = asked_for(tmp_path / "x.parquet")
        found = read_table(tmp_path / "x.parquet")
        for name in table.column_names:
            taken = found[name].cast(pa.string()).nbytes if name == "coded" else found[name].nbytes
            assert asked[name] >= 0.8 * taken, name
            assert asked[name] < 100 * max(taken, 40_000), name


def test_metadata_of_another_kind_is_refused(tmp_path: Path) -> None:
    for content in (
        b"[" * 1_000_000,
        b"{",
        b"[]",
        b"null",
        b'{"inputs": 1}',
        b'{"parameters": []}',
        b"\xff",
        b"",
    ):
        table = pa.table({"cell_id": ["a"]}).replace_schema_metadata({b"cellformers": content})
        pq.write_table(table, tmp_path / "x.parquet")
        with pytest.raises(UserError, match="damaged"):
            read_metadata(tmp_path / "x.parquet")


def test_statistics_that_end_arrow_do_not_end_us(tmp_path: Path) -> None:
    """pyarrow's own view of a footer aborts the process over some of them; damage each byte of one."""
    path = tmp_path / "x.parquet"
    write(path, gene_id=["A", "B"], n=[1, 2], score=[0.5, 1.5])
    outcome = forked.run(read_all_damages, path, writable=tmp_path, seconds=60)
    assert outcome.kind == "value", outcome
    assert outcome.value > 100  # refused, of all


def read_all_damages(path: Path) -> int:
    """How many of the files with one byte of the footer changed are refused; others are read."""
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    refused = 0
    for place in range(start, len(content)):
        for value in (0, content[place] ^ 0x10):
            path.write_bytes(content[:place] + bytes([value]) + content[place + 1 :])
            ended, text = attempt(partial(read_table, path))
            assert ended in ("value", "user_error"), text
            refused += ended == "user_error"
    return refused


def test_pipes_and_devices_in_place_of_tables_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "nothing"):
        for read in (open_parquet, read_json):
            with pytest.raises(UserError, match=r"no plain file|no such file"):
                read(path)


def embeddings_with_a_bomb(path: Path) -> None:
    """A gzipped chunk of embeddings that unpacks to a gigabyte of zeros."""
    n, dim = 10, 4
    data = anndata.AnnData(obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]))
    data.obsm["X_a"] = np.ones((n, dim), np.float32)
    data.write_h5ad(path)
    squeeze = zlib.compressobj(9)
    start, piece = (squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    with h5py.File(path, "r+") as file:
        del file["obsm/X_a"]
        made = file["obsm"].create_dataset("X_a", (n, dim), "f4", chunks=(n, dim), compression="gzip")
        made.id.write_direct_chunk((0, 0), start + piece * 1700, 0)


@pytest.mark.parametrize("reader", ["open_embeddings", "read_vectors", "map"])
def test_embeddings_that_unpack_to_no_end_are_refused(tmp_path: Path, reader: str) -> None:
    path = tmp_path / "a.h5ad"
    embeddings_with_a_bomb(path)
    tasks: dict[str, Callable[[], forked.Outcome]] = {
        "open_embeddings": lambda: forked.run(open_embeddings, [path]),
        "read_vectors": lambda: forked.run(read_vectors, [path]),
        "map": lambda: forked.run(draw_map, path, tmp_path / "m.parquet", name="a", writable=tmp_path),
    }
    outcome = tasks[reader]()
    assert outcome.kind == "user_error", outcome
    assert str(path) in outcome.text
    assert outcome.peak_mb < 300


# --- JSON -------------------------------------------------------------------------------------------------

JSON: dict[str, Callable[[], bytes]] = {
    "lists in lists": lambda: b"[" * 1_000_000,
    "objects in objects": lambda: b'{"a":' * 1_000_000,
    "five million lists": lambda: b"[" + b"[]," * 5_000_000 + b"[]]",
    "fifty million numbers": lambda: b"[" + b"1000," * 50_000_000 + b"1]",
    "a number of a million digits": lambda: b"9" * 1_000_000,
    "half a character": lambda: b'["\\ud800"]',
    "half a character as a key": lambda: b'{"\\uDFFF": 1}',
    "no UTF-8": lambda: b'"\xff"',
    "UTF-16": lambda: '{"a": 1}'.encode("utf-16"),
    "NULs": lambda: bytes(1000),
    "nothing": lambda: b"",
    "a pickle": lambda: opcodes.DANGEROUS["GLOBAL os.system"],
    "two values": lambda: b"{} {}",
}


def read_each(folder: Path) -> list[tuple[str, str, str]]:
    found = []
    for name, make in JSON.items():
        (folder / "x.json").write_bytes(make())
        found.append((name, *attempt(partial(read_json, folder / "x.json"))))
    return found


def test_hostile_json_is_refused(tmp_path: Path) -> None:
    outcome = forked.run(read_each, tmp_path, writable=tmp_path, seconds=60)
    assert outcome.kind == "value", outcome.text
    assert outcome.peak_mb < 500
    assert [(name, ended) for name, ended, _ in outcome.value] == [(name, "user_error") for name in JSON]


def test_lock_files_lead_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELLFORMERS_HOME", str(tmp_path))
    known = {"size": 1, "sha256": "0" * 64}
    for content in (
        {"folders": {"m": {"../../x": known}}}, {"folders": {"m": {"/etc/passwd": known}}},
        {"folders": {"m": {"": known}}},
        {"folders": {"m": {"a": {"size": "1"}}}}, {"files": {"a": {"size": 1, "sha256": None}}}, {"files": []},
        {"revisions": {"m": "main"}}, {"revisions": {"m": 7}}, [], {"folders": {"m": []}},
    ):  # fmt: skip
        (tmp_path / "checkpoints.lock.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="remove it: what it locked is taken as it comes"):
            read_lock()
    (tmp_path / "checkpoints.lock.json").write_text("{")
    with pytest.raises(UserError, match=r"not readable as JSON.*remove it"):
        read_lock()


# --- YAML -------------------------------------------------------------------------------------------------


def read_each_yaml(folder: Path) -> list[tuple[str, str, str, str]]:
    """Every hostile document with everything that reads YAML."""
    readers = (config.load_file, read_entry, read_registry, read_space)
    found = []
    for name, make in YAMLS.items():
        path = folder / "x.yaml"
        path.write_text(make(), encoding="utf-8", errors="surrogateescape")
        found += [(name, read.__name__, *attempt(partial(read, path))) for read in readers]
    return found


def test_hostile_yaml_is_refused_by_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = forked.run(read_each_yaml, tmp_path, writable=tmp_path, seconds=100)
    assert outcome.kind == "value", outcome.text
    assert not outcome.deeds
    assert outcome.peak_mb < 500
    for name, reader, ended, text in outcome.value:
        assert ended == "user_error", (name, reader, text)
        assert text.isprintable(), (name, reader)
    assert [path.name for path in tmp_path.iterdir()] == ["x.yaml"]  # nothing was run


def test_plain_yaml_is_read(tmp_path: Path) -> None:
    """Anchors and merges are of use in a config."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "datasets:\n  a: &same {path: a.h5ad, label: kind}\n  b: {<<: *same, path: b.h5ad}\n  c: *same\n"
    )
    read = config.load_file(path)
    assert [str(read.datasets[name].path) for name in "abc"] == ["a.h5ad", "b.h5ad", "a.h5ad"]
    assert read.datasets["b"].label == "kind"
