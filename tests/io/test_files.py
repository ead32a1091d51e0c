"""Files are whole or absent."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cellformers.errors import DiskFullError, UserError
from cellformers.io import files


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    with files.atomic_path(target) as part:
        part.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert sorted(p.name for p in target.parent.iterdir()) == ["a.txt"]


@pytest.mark.parametrize("context", [files.atomic_path, files.atomic_dir, files.temporary_folder])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, context: object) -> None:
    with pytest.raises(RuntimeError), context(tmp_path / "new"):  # type: ignore[operator]
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with files.atomic_dir(target) as part:
            (part / text).write_text(text)
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "a.parquet"
    code = (
        "import sys, time; from cellformers.io.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as part:\n    print(part, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        part = Path(writer.stdout.readline().strip())
        with files.atomic_path(target):
            assert part.exists(), "a living writer's part must be left alone"
        writer.kill()
    assert part.exists()
    target.unlink()
    files.write_table(pa.table({"a": [1]}), target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_unwritable_output_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="can't write here") as caught,
        files.atomic_path(tmp_path / "file" / "a"),
    ):
        pytest.fail("the block must not run")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="is a folder"), files.atomic_path(tmp_path):
        pytest.fail("the block must not run")


def test_tables_carry_metadata_and_no_time(tmp_path: Path) -> None:
    made = files.stamp("qc", 3, parameters={"n_sd": 3.0}, inputs={"dataset": "sha256:0"})
    for name in ("a", "b"):
        files.write_table(pa.table({"x": [1, 2]}), tmp_path / name, made)
        time.sleep(0.01)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert files.read_metadata(tmp_path / "a") == made
    with pytest.raises(UserError, match="has no column 'y'"):
        files.read_table(tmp_path / "a", ["y"])


def test_truncated_parquet_is_named(tmp_path: Path) -> None:
    files.write_table(pa.table({"x": np.arange(1000)}), tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="not a readable Parquet"):
        files.read_table(tmp_path / "a")


def test_digests_do_not_depend_on_byte_order_or_string_type() -> None:
    assert files.digest_arrays(np.array([1, 2], "<i8")) == files.digest_arrays(np.array([1, 2], ">i8"))
    assert files.digest_arrays(np.array(["a", "b"])) == files.digest_arrays(
        np.array(["a", "b"], dtype=object)
    )
    names = [f"cell {i}é" for i in range(70_000)]  # more than are taken at once
    assert files.digest_arrays(pa.array(names)) == files.digest_arrays(names)
    assert files.digest_arrays(pa.array(names)[1:]) == files.digest_arrays(names[1:])
    assert files.digest_arrays(pa.array([], pa.string())) == files.digest_arrays(np.array([], dtype=object))
    assert files.digest_arrays(["ab", "c"]) != files.digest_arrays(["a", "bc"])


def test_results_are_readable_by_others(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        files.write_text("x", tmp_path / "a")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_file_is_readable_though_its_writer_makes_private_ones(tmp_path):
    before = os.umask(0o027)
    try:
        with files.atomic_path(tmp_path / "a") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_two_files_of_one_process_and_number_of_a_dead_one(tmp_path: Path) -> None:
    """In a container every process may have the same number: a part that nobody here writes is left from before."""
    left = tmp_path / f".part-{os.getpid()}-0123abcd-a.txt"
    left.write_text("half")
    with files.temporary_folder(tmp_path / "a.txt") as folder, files.atomic_path(tmp_path / "a.txt") as part:
        assert not left.exists()
        assert folder.exists()
        part.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_write_that_hdf5_can_only_mention_is_a_failure(tmp_path: Path) -> None:
    """h5py finds out as a handle goes that the disk is full, where nothing can be raised."""

    class Handle:
        def __del__(self) -> None:
            raise RuntimeError(
                "Can't decrement id ref count (file write failed: errno = 28, error message = '')"
            )

    target = tmp_path / "a.h5ad"
    with (
        pytest.raises(DiskFullError, match=r"a\.h5ad: can't be written \(No space left"),
        files.atomic_path(target),
    ):
        del [Handle()][0]
    assert list(tmp_path.iterdir()) == []
