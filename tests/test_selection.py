"""Choosing cells: by whole labels, and at random in the same way for any shards."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from token_files import make_cells, make_vocabulary, write_shards, write_tokens

from cellformers.errors import UserError
from cellformers.selection import Choice, choose_cells, encode, read_where

N = 40
TYPES = ["T cell", "NK T cell", "B cell", "CD4-positive, alpha-beta T cell"]


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    table = pa.table(
        {
            "cell_id": [f"cell{i}" for i in range(N)],
            "qc_pass": [True] * N,
            "type": pa.array([TYPES[i % 4] for i in range(N)]).dictionary_encode(),
            "stage": pa.array([None if i % 5 == 0 else float(i % 5) for i in range(N)], pa.float64()),
            "a=b": ["x", "y"] * (N // 2),
            "a": ["b=x", "z"] * (N // 2),
            "old": [i % 2 == 0 for i in range(N)],
            "vector": [[i] for i in range(N)],
        }
    )
    pq.write_table(table, tmp_path / "cells.parquet")
    return tmp_path / "cells.parquet"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    vocabulary = make_vocabulary()
    return write_tokens(tmp_path / "tokens.parquet", make_cells(vocabulary, [3] * N), vocabulary)


def rows(choice: Choice | None) -> list[int]:
    assert choice is not None
    return np.flatnonzero(choice.keep).tolist()


# --- labels --------------------------------------------------------------------------------------------------


def test_labels_are_compared_as_a_whole(tokens: Path, cells: Path) -> None:
    found = choose_cells(tokens, cells=cells, where={"type": ["T cell"]})
    assert rows(found) == list(range(0, N, 4))


def test_values_of_a_column_are_alternatives_and_columns_have_all_to_match(tokens: Path, cells: Path) -> None:
    choice = choose_cells(tokens, cells=cells, where={"type": ["T cell", "B cell"], "stage": ["1", "2"]})
    assert rows(choice) == [i for i in range(N) if i % 4 in (0, 2) and i % 5 in (1, 2)]
    assert choice is not None
    assert choice.parameters == {"where": {"stage": ["1", "2"], "type": ["B cell", "T cell"]}}


def test_nothing_asked_for_is_no_choice(tokens: Path, cells: Path) -> None:
    assert choose_cells(tokens) is None
    assert choose_cells(tokens, cells=cells, where={}) is None


def test_numbers_and_booleans_are_labels_too_and_missing_ones_none() -> None:
    def codes(values: list[object]) -> tuple[list[int], list[str]]:
        labels = encode(pa.chunked_array([pa.array(values)]), name="c", path="t")
        return labels.codes.tolist(), labels.names

    assert codes([2.0, 1.0, float("nan"), None, 1.5]) == ([2, 0, -1, -1, 1], ["1", "1.5", "2"])
    assert codes([10, 9, None]) == ([0, 1, -1], ["10", "9"])
    assert codes([True, False]) == ([1, 0], ["False", "True"])
    assert codes(["b", "", "NA", "a"]) == ([1, -1, -1, 0], ["a", "b"])
    assert codes([None, None]) == ([-1, -1], [])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"typ": ["x"]}, "no column 'typ'; did you mean 'type'"),
        ({"type": ["T cel"]}, "no cell has type 'T cel'; did you mean 'T cell'"),
        ({"type": ["B cell"], "a": ["z"]}, "no cell has all the labels"),
        ({"vector": ["1"]}, "'vector' holds list"),
        ({"stage": ["nan"]}, "no cell has stage 'nan'"),
    ],
)
def test_labels_that_do_not_exist(tokens: Path, cells: Path, where: dict[str, list[str]], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        choose_cells(tokens, cells=cells, where=where)
    assert str(error.value).startswith(str(cells))


def test_labels_need_the_table_of_cells(tokens: Path) -> None:
    with pytest.raises(UserError, match="give --cells"):
        choose_cells(tokens, where={"type": ["T cell"]})


def test_cells_that_the_table_lacks_are_named(tmp_path: Path, cells: Path) -> None:
    vocabulary = make_vocabulary()
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [3] * 3), vocabulary, first=N - 2)
    with pytest.raises(UserError, match=f"no cell 'cell{N}', which {tokens} holds"):
        choose_cells(tokens, cells=cells, where={"type": ["T cell"]})


# --- as written on a command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conditions", "found"),
    [
        (["type=T cell"], {"type": ["T cell"]}),
        (["type=T cell,B cell"], {"type": ["T cell", "B cell"]}),
        (["type=T cell", "stage=1,2", "type=B cell,T cell"],
         {"type": ["T cell", "B cell"], "stage": ["1", "2"]}),
        (["type=CD4-positive, alpha-beta T cell"], {"type": [TYPES[3]]}),
        (['type="CD4-positive, alpha-beta T cell",B cell'], {"type": [TYPES[3], "B cell"]}),
        (["a=b=x"], {"a=b": ["x"]}),
        (["a=z"], {"a": ["z"]}),
    ],
)  # fmt: skip
def test_conditions(cells: Path, conditions: list[str], found: dict[str, list[str]]) -> None:
    assert read_where(conditions, cells) == found


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("type", "'type' is not COLUMN=VALUE"),
        ("typ=B cell", "no column 'typ'; did you mean 'type'"),
        ("type=", "no cell has type ''"),
        ("type=B cell,T sell", "no cell has type 'T sell'; did you mean 'T cell'"),
    ],
)
def test_conditions_that_make_no_sense(cells: Path, condition: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_where([condition], cells)


# --- at random -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_shards", [1, 3, 7])
def test_shards_agree_on_the_cells_that_are_drawn(tmp_path: Path, cells: Path, n_shards: int) -> None:
    vocabulary = make_vocabulary()
    shards = write_shards(tmp_path, make_cells(vocabulary, [3] * N), vocabulary, n_shards)
    choices = [choose_cells(shard, cells=cells, max_cells=9, seed=3) for shard in shards]
    keep = np.concatenate([choice.keep for choice in choices if choice is not None])
    whole = choose_cells(write_shards(tmp_path, make_cells(vocabulary, [3] * N), vocabulary, 1)[0],
                         cells=cells, max_cells=9, seed=3)  # fmt: skip
    assert keep.sum() == 9
    assert np.flatnonzero(keep).tolist() == rows(whole)
    assert {choice.digest for choice in choices if choice is not None} == {whole.digest if whole else ""}
    assert {str(choice.parameters) for choice in choices if choice} == {"{'max_cells': 9, 'seed': 3}"}


def test_the_order_of_the_table_does_not_matter(tokens: Path, cells: Path, tmp_path: Path) -> None:
    table = pq.read_table(cells)
    pq.write_table(table.take(np.random.default_rng(0).permutation(N)), tmp_path / "other.parquet")
    a, b = (
        choose_cells(tokens, cells=path, where={"a": ["z"]}, max_cells=7)
        for path in (cells, tmp_path / "other.parquet")
    )
    assert rows(a) == rows(b)
    assert a is not None
    assert b is not None
    assert (a.digest, a.parameters) == (b.digest, b.parameters)


def test_cells_are_drawn_from_those_with_the_labels_that_passed_qc(tokens: Path, cells: Path) -> None:
    table = pq.read_table(cells)
    passed = pa.array([i % 3 != 0 for i in range(N)])
    pq.write_table(table.set_column(1, "qc_pass", passed), cells)
    eligible = {i for i in range(1, N, 2) if i % 3 != 0}
    drawn = rows(choose_cells(tokens, cells=cells, where={"a": ["z"]}, max_cells=8))
    assert len(drawn) == 8
    assert set(drawn) < eligible
    assert set(rows(choose_cells(tokens, cells=cells, where={"a": ["z"]}, max_cells=1000))) == eligible


def test_without_a_table_cells_are_drawn_from_the_file(tokens: Path) -> None:
    drawn = rows(choose_cells(tokens, max_cells=6, seed=1))
    assert len(drawn) == 6
    assert drawn == sorted(drawn)
    assert drawn != rows(choose_cells(tokens, max_cells=6, seed=2))


def test_every_cell_is_drawn_as_often_as_any_other(tokens: Path) -> None:
    """400 draws of 10 of 40 cells: each 100 times, give or take 5 standard deviations of 8.7."""
    times = np.zeros(N)
    for seed in range(400):
        choice = choose_cells(tokens, max_cells=10, seed=seed)
        assert choice is not None
        times += choice.keep
    assert times.sum() == 4000
    assert np.abs(times - 100).max() < 44


@pytest.mark.parametrize("number", [0, -1])
def test_so_few_cells_cannot_be_drawn(tokens: Path, number: int) -> None:
    with pytest.raises(UserError, match=f"can't draw {number} cells"):
        choose_cells(tokens, max_cells=number)
