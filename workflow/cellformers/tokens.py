"""Tokens of cells: from counts to a Parquet file of rank values, and back.

    with open_counts("my.h5ad") as source:
        report = tokenize(source, Vocabulary.load("vocabulary"), output="tokens.parquet")
    for batch in read_tokens(["tokens.parquet"]):
        batch.cell_ids, batch.tokens, batch.offsets

A tokens file has the columns cell_id, input_ids (list of int32) and length, cells in the order of the input;
Hugging Face `datasets` loads it as it is. Blocks are read, ranked and written at the same time, a few at once, so
memory does not depend on the number of cells.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellformers.errors import UserError
from cellformers.genes import check_mapping, check_species, map_features
from cellformers.io.arrow import as_numbers, as_strings, numbers
from cellformers.io.files import (
    METADATA_KEY,
    atomic_path,
    digest_arrays,
    open_parquet,
    read_metadata,
    stamp,
    whole,
)  # fmt: skip
from cellformers.revisions import REVISIONS
from cellformers.vocabulary import Vocabulary

if TYPE_CHECKING:
    from cellformers.io.source import Block, CountSource
    from cellformers.ranking import Ranked, RankTable

Array = np.ndarray[Any, Any]

BLOCK_BYTES = 4 << 20  # a block is read, ranked and gone while it is in the processor's cache
CELLS_PER_GROUP = (
    2048  # a row group is written when it is full, so its size must not depend on blocks or threads
)
ELEMENT = pa.field("element", pa.int32(), nullable=False)
SCHEMA = pa.schema(
    [
        pa.field("cell_id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(ELEMENT), nullable=False),
        pa.field("length", pa.int32(), nullable=False),
    ]
)


def tokenize(
    source: "CountSource",
    vocabulary: Vocabulary,
    *,
    output: str | Path,
    cells: Collection[str] | Array | None = None,
    min_genes: int = 0,
    threads: int = 2,
    dataset: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write the tokens of a count file.

    Parameters
    ----------
    source
        An opened count file. Cells its own `filter_pass` excludes are left out.
    output
        The Parquet file; it appears when it is complete.
    cells
        Which cells to keep, as their ids (others of them may be in other files) or as bool[n_cells]; None: all.
    min_genes
        Cells with fewer genes of the vocabulary are left out. With 0 a cell without any has no tokens, or only
        <cls> and <eos>.
    threads
        Threads that rank; reading and writing have one each besides if there are two or more.
    dataset
        Digest of the dataset that this file is a shard of: the file is trusted to have been checked as a whole, and
        the digest is passed on. None: a raw file, which is checked, and whose digest is computed.
    advance
        Called with the number of cells done, for a progress bar.

    Returns
    -------
    dict
        `dataset`, `vocabulary`: digests. `cells`: numbers of all, kept, filtered (by `filter_pass` or `cells`),
        few_genes (under `min_genes`), empty (kept, without a gene of the vocabulary), truncated. `tokens`. `genes`:
        see `FeatureMap.report`. `seconds`: processor time of reading, ranking and writing, and time from start to
        end (all); the one entry that differs from run to run.

    Raises
    ------
    UserError
        If the file is not human, under half of its counts are of known genes, or no cell is left; no output then.
        A shard (`dataset` given) may have no cell left.
    """
    # here, not above: numba takes a third of a second, which reading tokens is spared
    from cellformers.ranking import rank_rows, rank_table

    started = time.perf_counter()
    if dataset is None:
        check_species(source.feature_ids, source.feature_symbols, source.path)
    features = map_features(source.feature_ids, source.feature_symbols, vocabulary)
    table = rank_table(features.token_of_feature, vocabulary)
    keep = _kept_cells(source, cells, raw=dataset is None)
    seconds = {"reading": 0.0, "ranking": 0.0, "writing": 0.0}

    def rank(block: "Block") -> "tuple[Block, Ranked]":
        with _timing(seconds, "ranking"):
            wanted = None if keep is None else keep[block.start : block.start + len(block.indptr) - 1]
            ranked = rank_rows(
                block.indptr, block.indices, block.data, table=table, keep=wanted, min_genes=min_genes
            )
            return block, ranked

    with atomic_path(output) as temporary, _Writer(temporary, source, table) as writer:

        def write(block: "Block", ranked: "Ranked") -> None:
            with _timing(seconds, "writing"):
                writer.add(block.start, ranked)
            if advance is not None:
                advance(len(ranked.lengths))

        blocks = _timed(source.blocks(max_bytes=BLOCK_BYTES), seconds)
        _stream(blocks, rank, write, threads=threads)
        with _timing(seconds, "writing"):
            writer.flush()
        report = features.report(writer.feature_totals)
        if dataset is None:
            check_mapping(report, source.path)
            _check_any_left(
                writer.cells(source.n_cells, keep), source.path,
                n_counts=report["counts"]["all"], min_genes=min_genes,
            )  # fmt: skip
            dataset = digest_arrays(
                source.names, features.feature_ids, writer.cell_totals, writer.feature_totals
            )
        metadata = stamp(
            "tokenize",
            REVISIONS["tokenize"],
            parameters={"min_genes": min_genes, "context_length": vocabulary.context_length},
            inputs={"dataset": dataset, "vocabulary": vocabulary.digest},
        )
        writer.finish(metadata)
    return {
        "dataset": dataset,
        "vocabulary": vocabulary.digest,
        "cells": writer.cells(source.n_cells, keep),
        "tokens": writer.n_tokens,
        "genes": report,
        "seconds": {**seconds, "all": time.perf_counter() - started},
    }


def _kept_cells(source: "CountSource", cells: Collection[str] | Array | None, *, raw: bool) -> Array | None:
    """bool[n_cells], or None for all."""
    keep = source.filter_pass
    if cells is None:
        return keep
    if isinstance(cells, np.ndarray) and cells.dtype == bool:
        if len(cells) != source.n_cells:
            raise ValueError(f"{len(cells)} flags for {source.n_cells} cells")
        chosen = cells
    else:
        ids = set(cells)
        chosen = np.fromiter((cell in ids for cell in source.cell_ids), bool, source.n_cells)
        if raw and ids and not chosen.any():
            raise UserError(
                f"has none of the {len(ids)} cells asked for, e.g. {next(iter(cells))!r}",
                path=source.path,
                fix=f"its cells are named like {source.cell_ids[0]!r}",
            )
    return chosen if keep is None else chosen & keep


def _check_any_left(cells: dict[str, int], path: Path, *, n_counts: int, min_genes: int) -> None:
    """UserError where a raw file has no counts in the cells that it lets pass, or none of its cells is kept."""
    if not n_counts and cells["filtered"] < cells["all"]:
        raise UserError("holds no counts: all its values are 0", path=path, fix="give a file with counts")
    if cells["kept"]:
        return
    reasons = {
        "filtered": "are excluded by filter_pass",
        "few_genes": f"have under {min_genes} genes of the vocabulary",
    }
    found = ", ".join(f"{cells[key]:,} {what}" for key, what in reasons.items() if cells[key])
    raise UserError(
        f"no cell passes: of {cells['all']:,}, {found}", path=path, fix="give other cells or counts"
    )


# --- reading, ranking and writing at once ----------------------------------------------------------------


@contextmanager
def _timing(seconds: dict[str, float], activity: str) -> Iterator[None]:
    """Add the processor time of this thread; a lost addition of two threads at once would not matter."""
    start = time.thread_time()
    yield
    seconds[activity] += time.thread_time() - start


def _timed(blocks: "Iterator[Block]", seconds: dict[str, float]) -> "Iterator[Block]":
    while True:
        with _timing(seconds, "reading"):
            block = next(blocks, None)
        if block is None:
            return
        yield block


def _stream(
    blocks: "Iterator[Block]",
    rank: "Callable[[Block], tuple[Block, Ranked]]",
    write: "Callable[[Block, Ranked], None]",
    *,
    threads: int,
) -> None:
    """Rank every block and write the results in order, with a bounded number of blocks in memory."""
    if threads < 2:
        for block in blocks:
            write(*rank(block))
        return
    with ThreadPoolExecutor(threads) as rankers, ThreadPoolExecutor(1) as writing:
        pending: deque[Future[None]] = deque()
        try:
            for block in blocks:
                ranked = rankers.submit(rank, block)
                pending.append(writing.submit(lambda future: write(*future.result()), ranked))
                del block, ranked
                while len(pending) > threads + 1:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
        finally:  # after a failure: start nothing more
            rankers.shutdown(wait=False, cancel_futures=True)
            writing.shutdown(wait=False, cancel_futures=True)


class _Writer:
    """Collects ranked cells into row groups and totals."""

    def __init__(self, path: Path, source: "CountSource", table: "RankTable") -> None:
        self.names = source.names
        self.empty_length = (table.first >= 0) + (table.last >= 0)
        self.most_genes = table.n_genes
        self.cell_totals = np.zeros(source.n_cells, np.int64)
        self.feature_totals = np.zeros(source.n_features, np.int64)
        self.kept: list[Array] = []
        self.lengths: list[Array] = []
        # the tokens of a row group, whatever their lengths; memory that is not needed is never touched
        self.tokens = np.empty(CELLS_PER_GROUP * (table.n_genes + self.empty_length), np.int32)
        self.filled = self.waiting = self.n_kept = self.n_tokens = self.n_empty = self.n_truncated = 0
        # Tokens are numbers without pattern in their low byte and nearly none in the high ones: byte streams apart,
        # zstd takes 0.2 s for 100,000 cells instead of 1.3 (plain) and the file is a fifth smaller. Dictionaries and
        # statistics would cost as much again and help nobody. Without the Arrow schema, readers find the metadata
        # that is added last.
        self.writer = pq.ParquetWriter(
            path,
            SCHEMA,
            compression="zstd",
            compression_level=1,
            use_dictionary=False,
            write_statistics=False,
            store_schema=False,
            column_encoding={
                "cell_id": "PLAIN",
                "input_ids.list.element": "BYTE_STREAM_SPLIT",
                "length": "PLAIN",
            },
        )

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()

    def add(self, start: int, ranked: "Ranked") -> None:
        """Take the cells from number `start` on; whole row groups are written."""
        self.cell_totals[start : start + len(ranked.lengths)] = ranked.cell_totals
        self.feature_totals += ranked.feature_totals
        kept = np.flatnonzero(ranked.lengths >= 0)
        lengths = ranked.lengths[kept]
        genes = ranked.n_genes[kept]
        self.n_empty += int((genes == 0).sum())
        self.n_truncated += int((genes > self.most_genes).sum())
        self.n_kept += len(kept)
        self.n_tokens += len(ranked.tokens)
        tokens = ranked.tokens
        while len(kept):
            n = min(len(kept), CELLS_PER_GROUP - self.waiting)
            n_tokens = int(lengths[:n].sum(dtype=np.int64))
            self.kept.append(kept[:n] + start)
            self.lengths.append(lengths[:n])
            self.tokens[self.filled : self.filled + n_tokens] = tokens[:n_tokens]
            self.filled += n_tokens
            kept, lengths, tokens = kept[n:], lengths[n:], tokens[n_tokens:]
            self.waiting += n
            if self.waiting == CELLS_PER_GROUP:
                self.flush()

    def flush(self) -> None:
        """Write what waits as a row group."""
        if not self.waiting:
            return
        lengths = np.concatenate(self.lengths)
        offsets = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=offsets[1:])
        values = numbers(self.tokens[: self.filled])
        lists = pa.Array.from_buffers(
            pa.list_(ELEMENT), len(lengths), [None, pa.py_buffer(offsets)], children=[values]
        )
        names = self.names.take(numbers(np.concatenate(self.kept)))
        batch = pa.RecordBatch.from_arrays([names, lists, numbers(lengths)], schema=SCHEMA)
        self.writer.write_table(pa.Table.from_batches([batch]))
        self.kept, self.lengths, self.filled, self.waiting = [], [], 0, 0

    def finish(self, metadata: dict[str, Any]) -> None:
        """Put in the metadata."""
        self.writer.add_key_value_metadata({METADATA_KEY: json.dumps(metadata).encode()})

    def cells(self, n_cells: int, keep: Array | None) -> dict[str, int]:
        """Numbers of cells for the report."""
        filtered = 0 if keep is None else n_cells - int(keep.sum())
        return {
            "all": n_cells,
            "kept": self.n_kept,
            "filtered": filtered,
            "few_genes": n_cells - filtered - self.n_kept,
            "empty": self.n_empty,
            "truncated": self.n_truncated,
        }


# --- reading tokens ---------------------------------------------------------------------------------------


class TokenBatch(NamedTuple):
    """Tokens of some consecutive cells."""

    cell_ids: Array
    """object[cells] of str."""
    tokens: Array
    """int32[sum of lengths]: all cells, one after the other."""
    offsets: Array
    """int64[cells + 1]: where each begins."""


def read_tokens(paths: str | Path | Sequence[str | Path], *, cells: int = 1024) -> Iterator[TokenBatch]:
    """Read one or several tokens files in order, `cells` cells at a time (fewer at the end of a file).

    Raises
    ------
    UserError
        If a file is missing, damaged or not a tokens file, or was made with another vocabulary than the first.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    first: str | None = None
    for number, path in enumerate(files):
        digest = vocabulary_digest(path)
        first = digest if number == 0 else first
        if digest != first:
            raise UserError(
                "made with another vocabulary than the file before", path=path, fix="tokenize it again"
            )
        with _open_tokens(path) as file, whole(path):
            for batch in file.iter_batches(cells, columns=["cell_id", "input_ids"], use_threads=False):
                batch.validate(full=True)
                yield _token_batch(batch)


def _open_tokens(path: str | Path) -> pq.ParquetFile:
    file = open_parquet(path)
    kinds = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True))
    lists = kinds.get("input_ids", pa.null())
    whole_numbers = pa.types.is_list(lists) and pa.types.is_integer(lists.value_type)
    if kinds.get("cell_id") != pa.string() or not whole_numbers:
        file.close()
        raise UserError(
            "not a tokens file (no cell_id and input_ids)", path=path, fix="cellformers tokenize makes one"
        )
    return file


def _token_batch(batch: pa.RecordBatch) -> TokenBatch:
    lists = batch.column("input_ids")
    bounds = np.frombuffer(lists.buffers()[1], np.int32)[lists.offset : lists.offset + len(lists) + 1]
    values = as_numbers(lists.values)[bounds[0] : bounds[-1]] if len(lists) else np.empty(0, np.int32)
    if batch.column("cell_id").null_count:
        raise ValueError("a cell without a name")
    if values.dtype != np.int32 and len(values) and not 0 <= values.min() <= values.max() < 1 << 31:
        raise ValueError("a token that is none")
    return TokenBatch(
        as_strings(batch.column("cell_id")),
        values.astype(np.int32, copy=False),
        bounds.astype(np.int64) - bounds[0],
    )


def token_lengths(paths: str | Path | Sequence[str | Path]) -> Array:
    """int32[cells]: number of tokens of every cell of one or several tokens files, special ones included."""
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    parts = []
    for path in files:
        with _open_tokens(path) as file, whole(path):
            parts.append(as_numbers(file.read(columns=["length"])["length"]).astype(np.int32))
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def count_cells(path: str | Path) -> int:
    """Number of cells in a tokens file."""
    with _open_tokens(path) as file:
        return int(file.metadata.num_rows)


def vocabulary_digest(path: str | Path) -> str | None:
    """Digest of the vocabulary that a tokens file was made with; None where it does not say."""
    digest = read_metadata(path).get("inputs", {}).get("vocabulary")
    return None if digest is None else str(digest)


def check_vocabulary(path: str | Path, vocabulary: Vocabulary) -> None:
    """Refuse tokens that were made with another vocabulary.

    Raises
    ------
    UserError
        Also where the file does not say with which it was made.
    """
    digest = vocabulary_digest(path)
    if digest == vocabulary.digest:
        return
    what = "names none" if digest is None else "was made with another"
    raise UserError(
        f"wrong vocabulary for this model: the model has {vocabulary.name!r}, the tokens file {what}",
        path=path,
        fix="tokenize with the vocabulary that the model carries",
    )
