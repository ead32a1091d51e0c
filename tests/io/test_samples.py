"""Sample tables."""

from pathlib import Path

import pytest

from cellformers.errors import UserError
from cellformers.io.samples import read_sample_table


def write(folder: Path, text: str) -> Path:
    path = folder / "samples.tsv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("separator", ["\t", ","])
def test_paths_are_relative_to_the_table(tmp_path: Path, separator: str) -> None:
    path = write(
        tmp_path, "\ufeffsample\tpath\tage\na\tone.h5ad\t4\nb\t/abs/two.loom\t5\n".replace("\t", separator)
    )
    rows = read_sample_table(path)
    assert [row["path"] for row in rows] == [str(tmp_path / "one.h5ad"), "/abs/two.loom"]
    assert [row["age"] for row in rows] == ["4", "5"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sampel\tpath\na\tb\n", "no column 'sample'; did you mean 'sampel'"),
        ("sample\tpath\n", "no rows"),
        ("sample\tpath\na\t\n", "line 2: sample or path is empty"),
        ("sample\tpath\na\tx\na\ty\n", "line 3: sample 'a' is there twice"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_sample_table(write(tmp_path, text))
    with pytest.raises(UserError, match="no such sample table"):
        read_sample_table(tmp_path / "absent.tsv")
