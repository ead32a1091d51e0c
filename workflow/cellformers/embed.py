"""Embeddings of cells and genes from tokens and a model.

    embed("tokens/0.parquet", "models/gf", "embeddings/0.parquet", mode="cell", layer=-1)
    gene_sums("tokens/0.parquet", "models/gf", "sums/0.parquet", layer=-1)
    merge_gene_sums(["sums/0.parquet", "sums/1.parquet"], "gene_embeddings.parquet")

Cells are read, computed and written in order, a block at a time, so memory does not grow with their number.
Per-gene sums are integers, hence exact and the same for any division of the cells into shards.
"""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import (
    METADATA_KEY,
    atomic_path,
    open_parquet,
    read_metadata,
    read_table,
    stamp,
    write_table,
)  # fmt: skip
from cellformers.models.batches import Step, pick_device, pick_dtype, runner
from cellformers.models.directory import Model, check_tokens, open_model
from cellformers.revisions import REVISIONS

MODES = ("cls", "cell")
BLOCK = 1024  # cells read, computed and written at a time
Progress = Callable[[int], None]  # called with the number of cells done so far

# Per-gene sums in units of 2^-28: an entry of at most 2^8 times 2^26 cells stays within int64.
FIXED_POINT = 28
MAX_MAGNITUDE = 2.0**8
MAX_CELLS = 2**26


class Embedded(NamedTuple):
    """What `embed` and `gene_sums` went through."""

    n_cells: int
    n_tokens: int
    n_empty: int  # cells without a single gene; their embedding is all zeros
    dim: int


class Block(NamedTuple):
    """Successive cells of a tokens file."""

    cell_ids: pa.Array
    cells: list[np.ndarray]  # int32 tokens of each


def read_blocks(path: str | Path) -> Iterator[Block]:
    """The cells of a tokens file in order, some at a time; UserError where it is none."""
    with open_parquet(path) as file:
        for column in ("cell_id", "input_ids"):
            if column not in file.schema_arrow.names:
                raise UserError(f"has no column {column!r}", path=path, fix="is this a tokens file?")
        try:
            for batch in file.iter_batches(BLOCK, columns=["cell_id", "input_ids"]):
                lists = batch.column("input_ids")
                ends = np.cumsum(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False))
                flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
                cells = np.split(flat, ends[:-1]) if len(ends) else []
                yield Block(batch.column("cell_id").cast(pa.string()), cells)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"not a readable tokens file ({error})", path=path, fix="make it again"
            ) from error


def _validate(block: Block, model: Model, path: str | Path, *, cls: int | None) -> None:
    """Refuse tokens the network has no row for, cells longer than its positions, cells without <cls>."""
    config = model.network.config
    for cell_id, cell in zip(block.cell_ids, block.cells, strict=True):
        what = None
        if len(cell) > config.max_position_embeddings:
            what = f"has {len(cell)} tokens, the model takes {config.max_position_embeddings}"
        elif len(cell) and not 0 <= int(cell.min()) <= int(cell.max()) < model.vocabulary.size:
            what = f"has a token outside 0 to {model.vocabulary.size - 1}"
        elif cls is not None and (not len(cell) or int(cell[0]) != cls):
            what = "does not begin with <cls>"
        if what:
            raise UserError(
                f"cell {cell_id.as_py()!r} {what}", path=path, fix="tokenize with the vocabulary of the model"
            )


def _is_gene(model: Model, device: torch.device) -> Tensor:
    """bool [vocab_size]: True for tokens that are genes, False for special ones."""
    table = torch.ones(model.network.config.vocab_size, dtype=torch.bool)
    table[list(model.vocabulary.special_tokens.values())] = False
    return table.to(device)


def cell_step(model: Model, *, mode: str, layer: int, device: torch.device) -> Step:
    """The work that makes embeddings, float32 [n, dim], of n packed cells.

    `cls` is the hidden state at position 0; `cell` the mean over the positions that hold genes, accumulated in
    float64, and zeros where there is none.
    """
    network = model.network
    if mode == "cls":
        return lambda tokens, cu: network(tokens, cu, layer=layer, rows=cu[:-1]).float()
    is_gene = _is_gene(model, device)

    def mean(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = network(tokens, cu_seqlens, layer=layer)
        n = len(cu_seqlens) - 1
        owner = torch.repeat_interleave(torch.arange(n), cu_seqlens.diff()).to(device)
        weight = is_gene[tokens].to(torch.float64)
        sums = torch.zeros(n, hidden.shape[1], dtype=torch.float64, device=device)
        sums.index_add_(0, owner, hidden * weight[:, None])
        genes = torch.zeros(n, dtype=torch.float64, device=device).index_add_(0, owner, weight)
        return (sums / genes.clamp(min=1)[:, None]).float()

    return mean


def _checked_mode(mode: str, model: Model) -> int | None:
    """The token of <cls> where the mode needs it."""
    if mode not in MODES:
        raise UserError(f"no embedding mode {mode!r}", fix=did_you_mean(mode, MODES))
    if mode != "cls":
        return None
    if not model.vocabulary.has_cls:
        raise UserError(
            f"mode cls needs a <cls> token, which the vocabulary {model.vocabulary.name!r} does not have",
            path=model.path, fix="choose mode cell",
        )  # fmt: skip
    return int(model.vocabulary.special_tokens["<cls>"])


def _inputs(tokens: str | Path, model: Model) -> dict[str, str]:
    """Digests for the stamp; UserError where the tokens are of another vocabulary."""
    metadata = read_metadata(tokens)
    check_tokens(metadata, model.vocabulary, tokens)
    dataset = metadata["inputs"].get("dataset")
    digests = {"model": model.digest, "vocabulary": model.vocabulary.digest}
    return digests if dataset is None else {"dataset": dataset, **digests}


def embed(
    tokens: str | Path,
    model_dir: str | Path,
    output: str | Path,
    *,
    mode: str = "cell",
    layer: int = -1,
    dtype: str = "float32",
    accelerator: str = "cpu",
    threads: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Write an embedding shard: cell_id, embedding fixed_size_list<float32>[hidden_size], in the order of `tokens`.

    Parameters
    ----------
    tokens, model_dir, output
        A tokens shard, a model directory, the Parquet file to write.
    mode
        "cls": hidden state of the <cls> token; "cell": mean over the genes of the cell, special tokens left
        out, zeros for a cell without genes.
    layer
        0 = last, -1 = second to last, ... to -n_layers, the embedding layer.
    dtype
        "float32" or "bfloat16": precision of the network; embeddings are stored as float32.
    accelerator
        "cpu" or "cuda".
    threads
        Cells computed side by side on the CPU (default: torch's number of threads).
    batch_tokens
        Tokens of a batch on CUDA; halved when memory runs out.
    progress
        Called with the number of cells done, now and then.

    Raises
    ------
    UserError
        If the tokens are of another vocabulary or don't fit the model, the mode or layer does not exist, or the
        device is not there.
    """
    device = pick_device(accelerator)
    model = open_model(model_dir, dtype=pick_dtype(dtype), device=device)
    cls = _checked_mode(mode, model)
    model.network.config.depth(layer)
    metadata = stamp(
        "embed", REVISIONS["embed"], parameters={"mode": mode, "layer": layer, "dtype": dtype},
        inputs=_inputs(tokens, model),
    )  # fmt: skip
    dim = model.network.config.hidden_size
    step = cell_step(model, mode=mode, layer=layer, device=device)
    schema = pa.schema(
        [("cell_id", pa.string()), ("embedding", pa.list_(pa.float32(), dim))],
        metadata={METADATA_KEY: json.dumps(metadata).encode()},
    )
    counts = Embedded(0, 0, 0, dim)
    with (
        atomic_path(output) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        runner(device, threads=threads, batch_tokens=batch_tokens) as run,
    ):
        for block in read_blocks(tokens):
            _validate(block, model, tokens, cls=cls)
            rows = []
            for done, result in run(block.cells, step):
                rows.append(result.cpu().numpy())
                if progress is not None:
                    progress(counts.n_cells + done)
            flat = pa.array(np.concatenate(rows).reshape(-1))
            vectors = pa.FixedSizeListArray.from_arrays(flat, dim)
            writer.write_table(pa.table([block.cell_ids, vectors], schema=schema))
            counts = _count(counts, block, model)
    return counts


def _count(counts: Embedded, block: Block, model: Model) -> Embedded:
    special = list(model.vocabulary.special_tokens.values())
    empty = sum(len(cell) <= len(special) and bool(np.isin(cell, special).all()) for cell in block.cells)
    return Embedded(
        counts.n_cells + len(block.cells), counts.n_tokens + sum(map(len, block.cells)), counts.n_empty + empty,
        counts.dim,
    )  # fmt: skip


# --- genes --------------------------------------------------------------------------------------------


def gene_sums(
    tokens: str | Path,
    model_dir: str | Path,
    output: str | Path,
    *,
    layer: int = -1,
    dtype: str = "float32",
    accelerator: str = "cpu",
    threads: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Sum the hidden states of every gene over the cells of a tokens shard, exactly.

    Every float32 entry is rounded to a multiple of 2^-28 (an error of at most 1.9e-9) and summed as int64, so
    sums don't depend on order or division. Writes gene_id, symbol, n_cells int64, total
    fixed_size_list<int64>[hidden_size] for the genes that occur, by ascending token. Parameters as in `embed`.

    Raises
    ------
    UserError
        As in `embed`; also if an entry exceeds 256 or a shard holds more than 2^26 cells.
    """
    device = pick_device(accelerator)
    model = open_model(model_dir, dtype=pick_dtype(dtype), device=device)
    config = model.network.config
    config.depth(layer)
    metadata = stamp(
        "embed", REVISIONS["embed"], parameters={"mode": "gene", "layer": layer, "dtype": dtype},
        inputs=_inputs(tokens, model),
    )  # fmt: skip
    totals = torch.zeros(config.vocab_size, config.hidden_size, dtype=torch.int64, device=device)
    n_cells = torch.zeros(config.vocab_size, dtype=torch.int64, device=device)
    lock = threading.Lock()

    def add(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = model.network(tokens, cu_seqlens, layer=layer)
        largest = hidden.abs().max() if len(hidden) else hidden.new_zeros(())
        if not bool(largest <= MAX_MAGNITUDE):
            raise UserError(
                f"a hidden state of {float(largest):g} is beyond the range of exact sums ({MAX_MAGNITUDE:g})",
                path=model_dir, fix="are these weights of a trained model?",
            )  # fmt: skip
        fixed = (hidden.double() * 2.0**FIXED_POINT).round_().to(torch.int64)
        with lock:  # last, and without allocation: a step that runs out of memory has added nothing
            totals.index_add_(0, tokens, fixed)
            n_cells.index_add_(0, tokens, torch.ones_like(tokens))
        return largest

    counts = Embedded(0, 0, 0, config.hidden_size)
    with runner(device, threads=threads, batch_tokens=batch_tokens) as run:
        for block in read_blocks(tokens):
            _validate(block, model, tokens, cls=None)
            for done, _ in run(block.cells, add):
                if progress is not None:
                    progress(counts.n_cells + done)
            counts = _count(counts, block, model)
            if counts.n_cells > MAX_CELLS:
                raise UserError(f"more than {MAX_CELLS} cells in a shard", path=tokens, fix="use more shards")
    vocabulary = model.vocabulary
    by_token = np.argsort(vocabulary.token_ids)
    cells_of = n_cells.cpu().numpy()[vocabulary.token_ids]
    rows = by_token[cells_of[by_token] > 0]
    picked = totals.cpu().numpy()[vocabulary.token_ids[rows]]
    table = pa.table(
        {
            "gene_id": pa.array([vocabulary.gene_ids[i] for i in rows], pa.string()),
            "symbol": pa.array([vocabulary.symbols[i] for i in rows], pa.string()),
            "n_cells": pa.array(cells_of[rows], pa.int64()),
            "total": pa.FixedSizeListArray.from_arrays(pa.array(picked.reshape(-1)), config.hidden_size),
        }
    )
    write_table(table, output, metadata)
    return counts


def merge_gene_sums(paths: Sequence[str | Path], output: str | Path) -> int:
    """Gene embeddings from the sums of all shards: the mean over the cells that express the gene.

    Writes gene_id, symbol, n_cells int64, embedding fixed_size_list<float32>[dim] by ascending gene_id, the same
    bytes for any number and order of shards; returns the number of genes.

    Raises
    ------
    UserError
        If there are no shards, or they differ in model, parameters or dataset.
    """
    if not paths:
        raise UserError("no gene sums to merge", path=output, fix="name at least one shard")
    metadata = read_metadata(paths[0])
    totals: dict[str, np.ndarray] = {}
    n_cells: dict[str, int] = {}
    symbols: dict[str, str | None] = {}
    for path in paths:
        other = read_metadata(path)
        if other != metadata:
            differing = [k for k in metadata | other if metadata.get(k) != other.get(k)]
            raise UserError(
                f"{', '.join(differing)} not as in {paths[0]}", path=path,
                fix="merge shards of one dataset, model and layer only",
            )  # fmt: skip
        table = read_table(path, ["gene_id", "symbol", "n_cells", "total"])
        dim = table.schema.field("total").type.list_size
        sums = table["total"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
        for gene, symbol, n, total in zip(
            table["gene_id"].to_pylist(), table["symbol"].to_pylist(), table["n_cells"].to_pylist(), sums,
            strict=True,
        ):  # fmt: skip
            symbols[gene] = symbol
            n_cells[gene] = n_cells.get(gene, 0) + n
            if n_cells[gene] > MAX_CELLS:
                raise UserError(f"gene {gene} is in more than {MAX_CELLS} cells", path=path)
            totals[gene] = totals[gene] + total if gene in totals else total
    genes = sorted(totals)
    counts = np.array([n_cells[gene] for gene in genes], dtype=np.int64)
    stacked = np.stack([totals[gene] for gene in genes]) if genes else np.zeros((0, dim), dtype=np.int64)
    means = (stacked / 2.0**FIXED_POINT / counts[:, None]).astype(np.float32)
    merged = pa.table(
        {
            "gene_id": pa.array(genes, pa.string()),
            "symbol": pa.array([symbols[gene] for gene in genes], pa.string()),
            "n_cells": pa.array(counts),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(means.reshape(-1)), dim),
        }
    )
    write_table(merged, output, metadata)
    return len(genes)
