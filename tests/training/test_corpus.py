"""The flat corpus: the same cells as the shards, in little memory."""

import os

import numpy as np
import pytest
from token_files import make_cells, make_vocabulary, write_shards, write_tokens

from cellformers.errors import UserError
from cellformers.io.files import digest_arrays
from cellformers.training import corpus as module
from cellformers.training.corpus import open_corpus

VOCABULARY = make_vocabulary(special="v2")
LENGTHS = (5, 9, 1, 30, 12)


def test_it_holds_the_cells_of_the_shards_however_they_are_divided(tmp_path, monkeypatch):
    cells = make_cells(VOCABULARY, LENGTHS)
    monkeypatch.setattr(module, "_AT_ONCE", 16)  # several pieces of the digest
    for n in (1, 3):
        corpus = open_corpus(write_shards(tmp_path, cells, VOCABULARY, n), VOCABULARY, tmp_path / f"w{n}")
        flat = np.concatenate(cells)
        assert corpus.store.tokens.dtype == np.uint16
        assert isinstance(corpus.store.tokens, np.memmap)
        assert np.array_equal(corpus.store.tokens, flat)
        assert np.array_equal(corpus.store.lengths, [len(c) for c in cells])
        assert np.array_equal(corpus.counts, np.bincount(flat, minlength=VOCABULARY.size))
        assert corpus.longest == 32
        assert corpus.digest == digest_arrays(flat.astype(np.int32), np.array(corpus.store.offsets))
        tokens, bounds = corpus.store.gather(np.array([3, 0]))
        assert tokens.tolist() == [*cells[3], *cells[0]]
        assert bounds.tolist() == [0, len(cells[3]), len(cells[3]) + len(cells[0])]
        assert corpus.store.lengths_of(np.array([3, 0])).tolist() == [32, 7]


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path):
    large = make_vocabulary(70_000)
    paths = [write_tokens(tmp_path / "t.parquet", [np.array([2, 69_999], np.int32)], large)]
    store = open_corpus(paths, large, tmp_path / "w").store
    assert store.tokens.dtype == np.int32
    assert store.tokens.tolist() == [2, 69_999]


def test_it_is_laid_out_once_unless_the_shards_change(tmp_path):
    cells = make_cells(VOCABULARY, LENGTHS)
    path = write_tokens(tmp_path / "t.parquet", cells, VOCABULARY)
    open_corpus([path], VOCABULARY, tmp_path / "w")
    laid = (tmp_path / "w" / "tokens.bin").stat().st_mtime_ns
    open_corpus([path], VOCABULARY, tmp_path / "w")
    assert (tmp_path / "w" / "tokens.bin").stat().st_mtime_ns == laid
    write_tokens(path, cells[1:], VOCABULARY)
    os.utime(path, ns=(1, 1))
    assert len(open_corpus([path], VOCABULARY, tmp_path / "w").store.lengths) == len(cells) - 1


def test_half_a_layout_is_made_again(tmp_path):
    cells = make_cells(VOCABULARY, LENGTHS)
    path = write_tokens(tmp_path / "t.parquet", cells, VOCABULARY)
    folder = tmp_path / "w"
    for lost in ("corpus.json", "tokens.bin", "offsets.bin"):
        open_corpus([path], VOCABULARY, folder)
        (folder / lost).unlink()
        assert np.array_equal(open_corpus([path], VOCABULARY, folder).store.tokens, np.concatenate(cells))
    (folder / "tokens.bin").write_bytes(b"\0\0")
    assert np.array_equal(open_corpus([path], VOCABULARY, folder).store.tokens, np.concatenate(cells))


def test_no_cells_and_foreign_tokens_are_refused(tmp_path):
    empty = write_tokens(tmp_path / "e.parquet", [], VOCABULARY)
    with pytest.raises(UserError, match="no cells to train on"):
        open_corpus([empty], VOCABULARY, tmp_path / "w")
    foreign = write_tokens(tmp_path / "f.parquet", [np.array([5, 64], np.int32)], VOCABULARY)
    with pytest.raises(UserError, match="outside 0 to 63"):
        open_corpus([foreign], VOCABULARY, tmp_path / "w")
    assert not (tmp_path / "w" / "corpus.json").exists()
