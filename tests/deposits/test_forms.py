"""What a file is by its first bytes."""

import gzip
from pathlib import Path

import h5py
import pytest
from deposit_files import write_tar

from cellformers.deposits.forms import wrong_form

HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(100)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tsv", b"gene\tcell\n", None),
        ("a.tsv", b"<TF001>\t3\n", None),
        ("a.tsv.gz", gzip.compress(b"", mtime=0), None),
        ("a.tsv.gz", b"gene\tcell\n", None),  # unpacked by a browser
        ("a.loom.gz", gzip.compress(HDF5, mtime=0), None),
        ("a.loom.gz", HDF5, None),
        ("a.loom.gz", b"Not found", "is no HDF5 file"),
        ("a.h5ad", HDF5, None),
        ("a.h5ad", gzip.compress(HDF5, mtime=0), "is no HDF5 file"),
        ("a.mtx", b"%%MatrixMarket matrix coordinate", None),
        ("a.mtx", b"1 2 3\n", "is no Matrix Market file"),
        ("a.tar", b"Not found", "is no tar archive"),
        ("a.tar", gzip.compress(bytes(1024), mtime=0), "is no tar archive"),
        ("a.tar", b"", "is empty"),
        ("a.csv", b"\n <html lang='en'>", "is a web page, not the file"),
        ("a.h5ad", b"<!doctype html>", "is a web page, not the file"),
    ],
)
def test_files_by_their_first_bytes(tmp_path: Path, name: str, content: bytes, words: str | None) -> None:
    (tmp_path / name).write_bytes(content)
    assert wrong_form(tmp_path / name) == words


def test_files_that_programs_wrote(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"b.txt": b"3"})
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = [[1]]
    assert wrong_form(tmp_path / "a.tar") is None
    assert wrong_form(tmp_path / "a.loom") is None
