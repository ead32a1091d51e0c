"""The cells that fine-tuning reads: those with labels, checked against the model, in memory as flat arrays.

    files = by_dataset(["tokens/0.parquet", "tokens/1.parquet"])
    keys = read_keys(files)
    store = read_cells(files, chosen, check)

Everything random comes from names and a seed, so neither shards nor their order matter.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellformers.errors import UserError
from cellformers.folds import hash_order
from cellformers.io.arrow import as_strings
from cellformers.io.files import digest_arrays, open_parquet, read_table
from cellformers.models.bert_config import Config
from cellformers.tokens import TokenBatch, check_vocabulary, read_tokens
from cellformers.training.targets import SEPARATOR
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]
Files = Mapping[str, Sequence[Path]]
Check = Callable[[TokenBatch, Path], None]


class Cells(NamedTuple):
    """Cells in memory, one after the other."""

    tokens: Array
    """uint16 or int32 [total]."""
    offsets: Array
    """int64 [n_cells + 1]."""
    counts: Array
    """int64 [vocabulary size]: how often each token occurs."""
    digest: str
    """Of tokens and offsets."""

    def lengths(self, cells: Array) -> Array:
        """Tokens of each of some cells, int64 [len(cells)]."""
        return np.asarray(self.offsets[cells + 1] - self.offsets[cells])

    def gather(self, cells: Array) -> tuple[Array, Array]:
        """Flat tokens int64 and cumulative lengths int64 [n + 1] of some cells, in the order given."""
        bounds = np.zeros(len(cells) + 1, dtype=np.int64)
        np.cumsum(self.lengths(cells), out=bounds[1:])
        parts = [self.tokens[self.offsets[i] : self.offsets[i + 1]] for i in cells.tolist()]
        return np.concatenate(parts).astype(np.int64), bounds


def by_dataset(tokens: Mapping[str, Sequence[str | Path]] | Sequence[str | Path] | str | Path) -> Files:
    """Token files by dataset; a plain list is of one dataset without a name. UserError where there is none."""
    if not isinstance(tokens, Mapping):
        tokens = {"": [tokens] if isinstance(tokens, str | Path) else list(tokens)}
    files = {name: [Path(path) for path in paths] for name, paths in sorted(tokens.items())}
    for name in files:
        if SEPARATOR in name:
            raise UserError(
                f"the name of dataset {name!r} holds {SEPARATOR!r}, which stands between dataset and cell",
                fix="choose another name",
            )
    if not any(files.values()):
        raise UserError("no tokens given", fix="cellformers tokenize makes them")
    return files


def _paths(files: Files) -> Iterator[tuple[str, Path]]:
    return ((dataset, path) for dataset, paths in files.items() for path in paths)


def read_keys(files: Files) -> Array:
    """The names of all cells in the order of the files, object [n] of str, behind `dataset:` where it has a name.

    Raises
    ------
    UserError
        If a name is there twice.
    """
    parts = []
    for dataset, path in _paths(files):
        with open_parquet(path) as file:
            if "cell_id" not in file.schema_arrow.names:
                raise UserError(
                    "not a tokens file (no cell_id)", path=path, fix="cellformers tokenize makes one"
                )
        ids = as_strings(read_table(path, ["cell_id"])["cell_id"])
        parts.append(np.array([f"{dataset}{SEPARATOR}{i}" for i in ids], object) if dataset else ids)
    keys = np.concatenate(parts)
    if len(set(keys.tolist())) < len(keys):
        names, counts = np.unique(keys.astype(str), return_counts=True)
        raise UserError(
            f"cell {str(names[counts.argmax()])!r} is in the tokens twice",
            fix="give each file once, and several datasets as NAME=PATH",
        )
    return keys


def cell_check(config: Config, vocabulary: Vocabulary, *, first_is_cls: bool) -> Check:
    """What refuses tokens that the network has no row for, cells longer than its positions, or without <cls>."""
    most, size = config.max_position_embeddings, vocabulary.size
    cls = vocabulary.special_tokens["<cls>"] if first_is_cls and vocabulary.has_cls else None

    def check(block: TokenBatch, path: Path) -> None:
        lengths = np.diff(block.offsets)
        outside = np.zeros(len(lengths), dtype=bool)
        wrong = np.flatnonzero((block.tokens < 0) | (block.tokens >= size))
        outside[np.searchsorted(block.offsets, wrong, side="right") - 1] = True
        starts = np.append(block.tokens, -1)[block.offsets[:-1]]
        without = (lengths == 0) | (starts != cls) if cls is not None else np.zeros(len(lengths), dtype=bool)
        for bad, what in (
            (lengths > most, f"has more than the {most} tokens the model takes"),
            (outside, f"has a token outside 0 to {size - 1}"),
            (without, "does not begin with <cls>"),
        ):
            if bad.any():
                raise UserError(
                    f"cell {block.cell_ids[int(bad.argmax())]!r} {what}", path=path,
                    fix="tokenize with the vocabulary of the model",
                )  # fmt: skip

    return check


def check_files(files: Files, vocabulary: Vocabulary) -> None:
    """UserError where tokens were made with another vocabulary than the model's."""
    for _, path in _paths(files):
        check_vocabulary(path, vocabulary)


def cells_with(files: Files, wanted: Array) -> Array:
    """Which cells hold a token for which `wanted`, bool [vocab_size], is true: bool [n_cells]."""
    found = []
    for _, path in _paths(files):
        for block in read_tokens(path):
            hits = np.zeros(len(block.tokens) + 1, dtype=np.int64)
            inside = np.clip(
                block.tokens, 0, len(wanted) - 1
            )  # tokens out of range are refused when they are read
            np.cumsum(wanted[inside], out=hits[1:])
            found.append(hits[block.offsets[1:]] > hits[block.offsets[:-1]])
    return np.concatenate(found) if found else np.zeros(0, dtype=bool)


def read_cells(files: Files, keep: Array, check: Check, *, n_tokens: int) -> Cells:
    """The cells for which `keep`, bool [n_cells], is true, in order and in memory.

    A token takes 2 bytes where the vocabulary, of `n_tokens`, allows it.
    """
    dtype = np.uint16 if n_tokens <= 1 << 16 else np.int32
    flats, lengths = [np.zeros(0, dtype=dtype)], [np.zeros(1, dtype=np.int64)]
    start = 0
    for _, path in _paths(files):
        for block in read_tokens(path):
            chosen = keep[start : start + len(block.cell_ids)]
            start += len(block.cell_ids)
            if not chosen.any():
                continue
            part = _chosen(block, chosen)
            check(part, path)
            flats.append(part.tokens.astype(dtype))
            lengths.append(np.diff(part.offsets))
    tokens, offsets = np.concatenate(flats), np.cumsum(np.concatenate(lengths))
    return Cells(tokens, offsets, np.bincount(tokens, minlength=n_tokens), digest_arrays(tokens, offsets))


def _chosen(block: TokenBatch, chosen: Array) -> TokenBatch:
    if chosen.all():
        return block
    lengths = np.diff(block.offsets)
    tokens = block.tokens[np.repeat(chosen, lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths[chosen])])
    return TokenBatch(block.cell_ids[chosen], tokens, offsets)


class Capped(NamedTuple):
    """Rows that are kept, ascending, and how many a limit left out."""

    rows: Array
    left_out: int


def cap(
    keys: Array, groups: Array | None, *, most: int | None, most_per_group: int | None, seed: int
) -> Capped:
    """At most so many rows, of each group and in all, drawn in hash order of their names."""
    for limit in (most, most_per_group):
        if limit is not None and limit < 1:
            raise UserError(f"at most {limit} cells leave nothing to learn from", fix="give 1 or more")
    if most is None and most_per_group is None:
        return Capped(np.arange(len(keys)), 0)
    order = hash_order(keys, seed=seed, salt="cap")
    if most_per_group is not None and groups is not None:
        taken: dict[Any, int] = {}
        kept = []
        for row in order.tolist():
            taken[groups[row]] = taken.get(groups[row], 0) + 1
            if taken[groups[row]] <= most_per_group:
                kept.append(row)
        order = np.array(kept, dtype=np.int64)
    rows = np.sort(order[:most])
    return Capped(rows, len(keys) - len(rows))
