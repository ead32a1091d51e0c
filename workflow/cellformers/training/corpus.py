"""All tokens to train on as one flat file that is mapped into memory, so that 30 million cells need no more of it
than a thousand.

    corpus = open_corpus(["tokens/0.parquet"], vocabulary, "work")
    tokens, bounds = corpus.store.gather(cells)

It is laid out once, from the Parquet shards, in the folder of an unfinished training, with two bytes a token where
the vocabulary has at most 65,536. Cells lie in the order of the shards; how they are divided among these makes no
difference.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellformers.errors import UserError
from cellformers.io.files import atomic_path, read_json, write_json
from cellformers.tokens import read_tokens
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]

_TOKENS, _OFFSETS, _ABOUT = "tokens.bin", "offsets.bin", "corpus.json"
_AT_ONCE = 1 << 24  # tokens


class TokenStore(NamedTuple):
    """Cells one after the other, in memory or mapped into it."""

    tokens: Array
    """Whole numbers [total]."""
    offsets: Array
    """int64 [n_cells + 1]: where each cell begins."""

    @property
    def lengths(self) -> Array:
        """Tokens of each cell, int64 [n_cells]."""
        return np.diff(self.offsets)

    def lengths_of(self, cells: Array) -> Array:
        """Tokens of each of some cells, int64 [len(cells)]."""
        return np.asarray(self.offsets[cells + 1] - self.offsets[cells])

    def gather(self, cells: Array) -> tuple[Array, Array]:
        """Flat tokens int64 and cumulative lengths int64 [n + 1] of some cells, in the order given."""
        parts = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in cells.tolist()]
        bounds = np.zeros(len(cells) + 1, dtype=np.int64)
        np.cumsum([len(part) for part in parts], out=bounds[1:])
        return np.concatenate(parts).astype(np.int64), bounds


class Corpus(NamedTuple):
    """Cells to train on, and what is to be known about all of them."""

    store: TokenStore
    """Mapped; tokens as uint16 or int32."""
    counts: Array
    """int64 [vocabulary size]: how often each token occurs."""
    longest: int
    """Tokens of the longest cell."""
    digest: str
    """sha256 of the tokens as int32 and the offsets."""


def open_corpus(paths: Sequence[str | Path], vocabulary: Vocabulary, folder: str | Path) -> Corpus:
    """The corpus of some token shards, laid out in `folder` unless it is there already.

    Raises
    ------
    UserError
        If there is no cell or only empty ones, a token is not of the vocabulary, a shard is damaged, or the disk
        is full.
    """
    folder = Path(folder)
    shards = [[str(Path(p).resolve()), Path(p).stat().st_size, Path(p).stat().st_mtime_ns] for p in paths]
    about: dict[str, Any] = {"shards": shards, "vocabulary": vocabulary.digest}
    if not _is_whole(folder, about):
        (folder / _ABOUT).unlink(missing_ok=True)
        _lay_out(paths, vocabulary, folder, about)
    found = read_json(folder / _ABOUT)
    store = TokenStore(
        np.memmap(folder / _TOKENS, found["dtype"], mode="r"),
        np.memmap(folder / _OFFSETS, np.int64, mode="r"),
    )
    return Corpus(
        store,
        np.array(found["counts"], np.int64),
        found["longest"],
        found["digest"],
    )


def _is_whole(folder: Path, about: dict[str, Any]) -> bool:
    """Whether the corpus of these shards is there, every byte of it."""
    if not all((folder / name).is_file() for name in (_ABOUT, _TOKENS, _OFFSETS)):
        return False
    found = read_json(folder / _ABOUT)
    sizes = [(folder / name).stat().st_size for name in (_TOKENS, _OFFSETS)]
    if not isinstance(found, dict) or found.get("dtype") not in ("uint16", "int32"):
        return False
    return about.items() <= found.items() and found.get("bytes") == sizes


def _lay_out(
    paths: Sequence[str | Path], vocabulary: Vocabulary, folder: Path, about: dict[str, Any]
) -> None:
    """Write the flat files; corpus.json, which says that they are complete, last."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.int32)
    counts = np.zeros(vocabulary.size, np.int64)
    end, longest = 0, 0
    with (
        atomic_path(folder / _TOKENS) as tokens_file,
        atomic_path(folder / _OFFSETS) as offsets_file,
        tokens_file.open("wb") as tokens,
        offsets_file.open("wb") as offsets,
    ):
        offsets.write(np.zeros(1, np.int64).data)  # write, as tofile hides why it failed
        for batch in read_tokens(paths):
            _check_range(batch.tokens, vocabulary)
            tokens.write(batch.tokens.astype(dtype).data)
            offsets.write((batch.offsets[1:] + end).data)
            counts += np.bincount(batch.tokens, minlength=vocabulary.size)
            end += len(batch.tokens)
            longest = max(longest, int(np.diff(batch.offsets).max(initial=0)))
    if not end:
        raise UserError("no cells to train on", path=paths[0] if paths else None, fix="tokenize some first")
    digest = _digest(
        np.memmap(folder / _TOKENS, dtype, mode="r"), np.memmap(folder / _OFFSETS, np.int64, mode="r")
    )
    facts = {
        "bytes": [(folder / name).stat().st_size for name in (_TOKENS, _OFFSETS)],
        "dtype": dtype.name, "longest": longest, "digest": digest, "counts": counts.tolist(),
    }  # fmt: skip
    write_json(about | facts, folder / _ABOUT)


def _check_range(tokens: Array, vocabulary: Vocabulary) -> None:
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary.size:
        raise UserError(f"a token is outside 0 to {vocabulary.size - 1}", fix="tokenize again")


def _digest(tokens: Array, offsets: Array) -> str:
    """`io.files.digest_arrays` of the tokens as int32 and the offsets, without having them in memory."""
    sha = hashlib.sha256()
    for values, dtype in ((tokens, "<i4"), (offsets, "<i8")):
        sha.update(f"{dtype}{values.shape}:".encode())
        for start in range(0, len(values), _AT_ONCE):
            sha.update(np.ascontiguousarray(values[start : start + _AT_ONCE], dtype).data)
    return "sha256:" + sha.hexdigest()
