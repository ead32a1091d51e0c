"""Where results go: never in the place of what is read, of a device or a pipe; one line where that can't be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import run, save_vocabulary, write_adata

from cellformers.cli import _sparing
from cellformers.errors import UserError
from cellformers.io.files import _refuse_device, write_text


@pytest.fixture
def dataset(tmp_path) -> Path:
    """What ingest makes, and QC metrics."""
    out = tmp_path / "a"
    assert run("ingest", write_adata(tmp_path / "raw.h5ad"), "-o", out, "-q").code == 0
    assert run("qc-metrics", out / "counts/0001-of-0001.h5ad", "-o", out / "m.parquet", "-q").code == 0
    return out


def test_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(UserError, match=f"{name}: is no plain file"):
            write_text("x", tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["null", "full", "stdout", "new"])
def test_devices_are_not_replaced(name):
    with pytest.raises(UserError, match="is no plain file"):
        _refuse_device(Path("/dev") / name)  # only asks: root could do it


@pytest.mark.parametrize("length", [250, 255, 300, 5000])
def test_names_that_are_too_long_are_one_line(tmp_path, dataset, length):
    shard = dataset / "counts/0001-of-0001.h5ad"
    for words in (
        (shard, "-o", tmp_path / ("a" * length)),
        (tmp_path / ("a" * length), "-o", tmp_path / "o"),
    ):
        ran = run("qc-metrics", *words, "-q")
        assert ran.code == 2
        assert ran.err.startswith("cellformers: error: ")
        assert ran.err.count("\n") == 1


def test_names_that_are_no_utf8_are_one_line(tmp_path, dataset):
    odd = os.fsdecode(bytes(tmp_path) + b"/\xff.parquet")
    ran = run("qc-metrics", dataset / "counts/0001-of-0001.h5ad", "-o", odd)
    assert ran.code == 2
    assert "is a name that is no UTF-8; rename it" in ran.err


def nothing(**_: object) -> None:
    raise AssertionError("it ran")


@pytest.mark.parametrize("option", ["cells", "input_files", "tokens", "labels"])
@pytest.mark.parametrize("written", ["output", "predictions"])
def test_inputs_that_have_a_name_are_not_replaced(tmp_path, option, written):
    path = tmp_path / "a=b.h5ad"
    path.write_text("mine")
    for word in (f"x={path}", str(path)):
        with pytest.raises(UserError, match="is the input"):
            _sparing(nothing)(**{option: [word], "output": tmp_path / "o", written: path})


def test_parts_of_an_input_are_not_replaced(tmp_path):
    save_vocabulary(tmp_path / "v")
    (tmp_path / "matrix.mtx").write_text("")
    for folder, name in (("v", "tokens.parquet"), ("v", "vocabulary.json"), (".", "matrix.mtx")):
        with pytest.raises(UserError, match="is the input"):
            _sparing(nothing)(counts=tmp_path / folder, output=tmp_path / folder / name)


def test_labels_that_ingest_would_replace(tmp_path, dataset):
    before = (dataset / "metadata.parquet").read_bytes()
    labels = ("--labels", dataset / "metadata.parquet", "--key", "cell_id")
    ran = run("ingest", tmp_path / "raw.h5ad", *labels, "-o", dataset, "-q")
    assert ran.code == 2
    assert "is the input" in ran.err
    assert (dataset / "metadata.parquet").read_bytes() == before


def test_one_name_for_two_results(tmp_path, dataset):
    both = tmp_path / "both"
    words = (dataset / "m.parquet", "--metadata", dataset / "metadata.parquet", "-o", both, "--report", both)
    ran = run("qc", *words)
    assert ran.code == 2
    assert "is given for two things" in ran.err
    assert not both.exists()


@pytest.mark.parametrize("stream", [1, 2])
def test_closed_streams_lead_nowhere(tmp_path, dataset, stream):
    words = ("qc-metrics", dataset / "counts/0001-of-0001.h5ad", "-o", tmp_path / "m.parquet")
    command = f'"$@" {stream}>&-'
    ran = subprocess.run(
        ["bash", "-c", command, "bash", sys.executable, "-m", "cellformers.cli", *map(str, words)],
        check=False,
    )
    assert ran.returncode == 0
    assert (tmp_path / "m.parquet").read_bytes() == (dataset / "m.parquet").read_bytes()


def test_tables_of_a_dataset_in_each_others_place(tmp_path, dataset):
    metadata, metrics = dataset / "metadata.parquet", dataset / "m.parquet"
    table = pq.read_table(metrics)
    text = table.set_column(1, "n_counts", pa.array(["a"] * len(table)))
    pq.write_table(text.replace_schema_metadata(table.schema.metadata), tmp_path / "text.parquet")
    made = ("-o", tmp_path / "c.parquet", "--report", tmp_path / "qc")
    shard = shutil.copy(dataset / "counts/0001-of-0001.h5ad", tmp_path)
    for words, said in (
        (("qc", metadata, "--metadata", metadata, *made), "has no column 'n_counts'"),
        (("qc", tmp_path / "text.parquet", "--metadata", metadata, *made), "holds string, no numbers"),
        (
            ("qc", metrics, "--metadata", metadata, "--doublets", metrics, *made),
            "has no column 'doublet_score'",
        ),
        (
            ("doublets", shard, "--metadata", dataset / "features.parquet", *made[:2]),
            "not the metadata of a dataset",
        ),
    ):
        ran = run(*words)
        assert ran.code == 2, ran.err
        assert said in ran.err
    assert not (tmp_path / "c.parquet").exists()


def test_a_folder_in_place_of_labels(tmp_path):
    (tmp_path / "labels").mkdir()
    words = (
        "finetune",
        tmp_path / "t.parquet",
        "--model",
        tmp_path,
        "--labels",
        tmp_path / "labels",
        "--label",
        "x",
    )
    ran = run(*words, "-o", tmp_path / "m")
    assert ran.code == 2
    assert ran.err.startswith("cellformers: error: ")


def test_a_folder_that_is_a_link_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="can't write here"):
        write_text("x", tmp_path / "loop" / "a.txt")
