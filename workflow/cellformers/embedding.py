"""Embeddings of cells and genes from tokens and a model.

    embed_cells("tokens/0.parquet", "models/gf", "embeddings/0.parquet", mode="cell", layer=-1)
    sum_genes("tokens/0.parquet", "models/gf", "sums/0.parquet", layer=-1)
    merge_gene_sums(["sums/0.parquet", "sums/1.parquet"], "gene_embeddings.parquet")

Cells are read, computed and written in order, a block at a time, so memory does not grow with their number.
Per-gene sums are integers, hence exact and the same for any division of the cells into shards.
"""

import json
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cellformers.errors import UserError, did_you_mean
from cellformers.io.arrow import as_numbers, numbers, strings
from cellformers.io.files import METADATA_KEY, atomic_path, read_metadata, read_table, stamp, write_table
from cellformers.models.batches import Step, pick_device, pick_precision, runner
from cellformers.models.checkpoints import read_config
from cellformers.models.directory import VOCABULARY, Model, open_model
from cellformers.models.geneformer import Geneformer
from cellformers.revisions import REVISIONS
from cellformers.tokens import TokenBatch, check_vocabulary, read_tokens
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]

MODES = ("cls", "cell")
BLOCK = 1024  # cells read, computed and written at a time
Progress = Callable[[int], None]  # called with the number of cells that were done since the last call

# Per-gene sums in units of 2^-28: an entry of at most 2^8 times 2^26 cells stays within int64.
FIXED_POINT = 28
MAX_MAGNITUDE = 2.0**8
MAX_CELLS = 2**26


class Embedded(NamedTuple):
    """What `embed_cells` and `sum_genes` went through."""

    n_cells: int
    n_tokens: int
    n_empty: int  # cells without a single gene; their embedding is all zeros
    dim: int


def _cells(block: TokenBatch) -> list[Array]:
    """The tokens of each cell."""
    return [block.tokens[a:b] for a, b in zip(block.offsets[:-1], block.offsets[1:], strict=True)]


def _validate(block: TokenBatch, model: Model, path: str | Path, *, cls: int | None) -> None:
    """Refuse tokens the network has no row for, cells longer than its positions, cells without <cls>."""
    most = model.network.config.max_position_embeddings
    for cell_id, cell in zip(block.cell_ids, _cells(block), strict=True):
        what = None
        if len(cell) > most:
            what = f"has {len(cell)} tokens, the model takes {most}"
        elif len(cell) and not 0 <= int(cell.min()) <= int(cell.max()) < model.vocabulary.size:
            what = f"has a token outside 0 to {model.vocabulary.size - 1}"
        elif cls is not None and (not len(cell) or int(cell[0]) != cls):
            what = "does not begin with <cls>"
        if what:
            raise UserError(
                f"cell {cell_id!r} {what}", path=path, fix="tokenize with the vocabulary of the model"
            )


def cell_step(network: Geneformer, *, mode: str, layer: int, special: Collection[int]) -> Step:
    """The work that makes embeddings, float32 [n, dim], of n packed cells.

    `cls` is the hidden state at position 0; `cell` the mean over the positions whose token is not among `special`,
    accumulated in float64, and zeros where there is none.
    """
    if mode == "cls":
        return lambda tokens, cu: network(tokens, cu, layer=layer, rows=cu[:-1]).float()
    device = network.words.weight.device
    is_gene = torch.ones(network.config.vocab_size, dtype=torch.float64)
    is_gene[list(special)] = 0.0
    is_gene = is_gene.to(device)

    def mean(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = network(tokens, cu_seqlens, layer=layer)
        n = len(cu_seqlens) - 1
        owner = torch.repeat_interleave(torch.arange(n), cu_seqlens.diff()).to(device)
        weight = is_gene[tokens]
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


def default_mode(model_dir: str | Path) -> str:
    """The mode the field takes for a model: cls where its vocabulary has <cls>, else cell."""
    read_config(model_dir)  # so that a folder that is no model is called so
    return "cls" if Vocabulary.load(Path(model_dir) / VOCABULARY).has_cls else "cell"


def load_model(
    model_dir: str | Path, *, mode: str, layer: int, dtype: str = "float32", accelerator: str = "cpu"
) -> Model:
    """Open a model for `embed_cells`, which takes it in place of its folder where many files are embedded.

    Raises
    ------
    UserError
        If it is damaged, has no such mode or layer, or the device is not there.
    """
    device = pick_device(accelerator)
    model = open_model(model_dir, dtype=pick_precision(dtype).dtype, device=device)
    _checked_mode(mode, model)
    model.network.config.depth(layer)
    return model


def _stamp(tokens: str | Path, model: Model, **parameters: Any) -> dict[str, Any]:
    """Metadata of a result; UserError where the tokens are of another vocabulary than the model's."""
    check_vocabulary(tokens, model.vocabulary)
    inputs = read_metadata(tokens)["inputs"]
    inputs = {key: inputs[key] for key in ("dataset", "vocabulary") if key in inputs}
    return stamp("embed", REVISIONS["embed"], parameters=parameters, inputs={**inputs, "model": model.digest})


def _count(counts: Embedded, block: TokenBatch, model: Model) -> Embedded:
    special = list(model.vocabulary.special_tokens.values())
    genes = np.concatenate([[0], np.cumsum(~np.isin(block.tokens, special))])
    empty = int((genes[block.offsets[1:]] == genes[block.offsets[:-1]]).sum())
    return Embedded(
        counts.n_cells + len(block.cell_ids), counts.n_tokens + len(block.tokens), counts.n_empty + empty,
        counts.dim,
    )  # fmt: skip


def embed_cells(
    tokens: str | Path,
    model_dir: str | Path | Model,
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
        A tokens shard, a model directory (or what `load_model` made of it), the Parquet file to write.
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
    model = (
        model_dir
        if isinstance(model_dir, Model)
        else load_model(model_dir, mode=mode, layer=layer, dtype=dtype, accelerator=accelerator)
    )
    device = model.network.words.weight.device
    cls = _checked_mode(mode, model)
    metadata = _stamp(tokens, model, mode=mode, layer=layer, dtype=dtype)
    dim = model.network.config.hidden_size
    step = cell_step(model.network, mode=mode, layer=layer, special=model.vocabulary.special_tokens.values())
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
        for block in read_tokens(tokens, cells=BLOCK):
            _validate(block, model, tokens, cls=cls)
            rows = []
            for n, result in run(_cells(block), step):
                rows.append(result.cpu().numpy())
                if progress is not None:
                    progress(n)
            vectors = pa.FixedSizeListArray.from_arrays(numbers(np.concatenate(rows).reshape(-1)), dim)
            writer.write_table(pa.table([strings(block.cell_ids), vectors], schema=schema))
            counts = _count(counts, block, model)
    return counts


# --- genes --------------------------------------------------------------------------------------------


def sum_genes(
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
    fixed_size_list<int64>[hidden_size] for the genes that occur, by ascending token. Parameters as in `embed_cells`.

    Raises
    ------
    UserError
        As in `embed_cells`; also if an entry exceeds 256 or a shard holds more than 2^26 cells.
    """
    device = pick_device(accelerator)
    model = open_model(model_dir, dtype=pick_precision(dtype).dtype, device=device)
    config = model.network.config
    config.depth(layer)
    metadata = _stamp(tokens, model, mode="gene", layer=layer, dtype=dtype)
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
        for block in read_tokens(tokens, cells=BLOCK):
            _validate(block, model, tokens, cls=None)
            for n, _ in run(_cells(block), add):
                if progress is not None:
                    progress(n)
            counts = _count(counts, block, model)
            if counts.n_cells > MAX_CELLS:
                raise UserError(f"more than {MAX_CELLS} cells in a shard", path=tokens, fix="use more shards")
    vocabulary = model.vocabulary
    n_of_gene = n_cells.cpu().numpy()[vocabulary.token_ids]
    found = np.flatnonzero(n_of_gene)
    picked = totals[torch.from_numpy(vocabulary.token_ids[found].astype(np.int64)).to(device)].cpu().numpy()
    table = pa.table(
        {
            "gene_id": strings(vocabulary.gene_ids[found]),
            "symbol": strings(vocabulary.symbols[found]),
            "n_cells": numbers(n_of_gene[found]),
            "total": pa.FixedSizeListArray.from_arrays(numbers(picked.reshape(-1)), config.hidden_size),
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
    totals: dict[str, Array] = {}
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
        table = read_table(path, ["gene_id", "symbol", "n_cells", "total"]).combine_chunks()
        dim = table.schema.field("total").type.list_size
        sums = as_numbers(table["total"].combine_chunks().flatten()).reshape(-1, dim)
        for row, gene in enumerate(table["gene_id"].to_pylist()):
            symbols[gene] = table["symbol"][row].as_py()
            n_cells[gene] = n_cells.get(gene, 0) + table["n_cells"][row].as_py()
            if n_cells[gene] > MAX_CELLS:
                raise UserError(f"gene {gene} is in more than {MAX_CELLS} cells", path=path)
            totals[gene] = totals[gene] + sums[row] if gene in totals else sums[row]
    genes = sorted(totals)
    counts = np.array([n_cells[gene] for gene in genes], dtype=np.int64)
    stacked = np.stack([totals[gene] for gene in genes]) if genes else np.zeros((0, dim), dtype=np.int64)
    means = (stacked / 2.0**FIXED_POINT / counts[:, None]).astype(np.float32)
    merged = pa.table(
        {
            "gene_id": strings(genes),
            "symbol": strings([symbols[gene] for gene in genes]),
            "n_cells": numbers(counts),
            "embedding": pa.FixedSizeListArray.from_arrays(numbers(means.reshape(-1)), dim),
        }
    )
    write_table(merged, output, metadata)
    return len(genes)
