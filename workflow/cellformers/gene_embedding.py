"""Embeddings of genes from tokens and a model: the mean of every gene over the cells that express it.

    sum_genes("tokens/0.parquet", "models/gf", "sums/0.parquet", layer=-1)
    merge_gene_sums(["sums/0.parquet", "sums/1.parquet"], "gene_embeddings.parquet")

Sums are integers, hence exact and the same for any division of the cells into shards. A cell that holds a gene
twice, which `tokenize` never makes, counts twice for it. Chosen cells (`selection`) give the means of a state.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cellformers.embedding import (
    BLOCK,
    Embedded,
    Progress,
    check_finite,
    chosen_cells,
    largest_of_cells,
    load_model,
    made_from,
    tally,
)
from cellformers.errors import UserError
from cellformers.io.arrow import as_numbers, numbers, strings
from cellformers.io.files import read_metadata, read_table, whole, write_table
from cellformers.models.batches import runner
from cellformers.models.directory import Model
from cellformers.selection import Choice
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]

# Per-gene sums in units of 2^-28: an entry of at most 2^8 times 2^26 cells stays within int64.
FIXED_POINT = 28
MAX_MAGNITUDE = 2.0**8
MAX_CELLS = 2**26


def token_names(vocabulary: Vocabulary, *, special: bool) -> tuple[Array, Array, Array]:
    """Tokens ascending, the names and the symbols they stand for; special tokens, if wanted, under their own."""
    if not special:
        return vocabulary.token_ids, vocabulary.gene_ids, vocabulary.symbols
    extra = vocabulary.special_tokens
    tokens = np.concatenate([np.array(list(extra.values()), np.int32), vocabulary.token_ids])
    ids = np.concatenate([np.array(list(extra), dtype=object), vocabulary.gene_ids])
    symbols = np.concatenate([np.full(len(extra), None, dtype=object), vocabulary.symbols])
    order = np.argsort(tokens)
    return tokens[order], ids[order], symbols[order]


def sum_genes(
    tokens: str | Path,
    model_dir: str | Path | Model,
    output: str | Path,
    *,
    layer: int = -1,
    dtype: str = "float32",
    backend: str = "auto",
    choice: Choice | None = None,
    special: bool = False,
    accelerator: str = "cpu",
    threads: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Embedded:
    """Sum the hidden states of every gene over the cells of a tokens shard, exactly.

    Every float32 entry is rounded to a multiple of 2^-28 (an error of at most 1.9e-9) and summed as int64, so
    sums don't depend on order or division. Writes gene_id, symbol, n_cells int64, total
    fixed_size_list<int64>[hidden_size] for the genes that occur, by ascending token. With `special` the special
    tokens have rows too, under their own names. Other parameters as in `embedding.embed_cells`.

    Raises
    ------
    UserError
        As in `embed_cells`; also if an entry exceeds 256 or a shard holds more than 2^26 cells.
    """
    model = load_model(model_dir, layer=layer, dtype=dtype, backend=backend, accelerator=accelerator)
    config, device = model.network.config, model.network.words.weight.device
    parameters = {"mode": "gene", "layer": layer, "dtype": dtype} | ({"special": True} if special else {})
    metadata = made_from(tokens, model, parameters, choice=choice)
    totals = torch.zeros(config.vocab_size, config.hidden_size, dtype=torch.int64, device=device)
    n_cells = torch.zeros(config.vocab_size, dtype=torch.int64, device=device)
    lock = threading.Lock()

    def add(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        hidden = model.network(tokens, cu_seqlens, layer=layer)
        largest = hidden.abs().amax(dim=1).float()
        fixed = hidden.double().mul_(2.0**FIXED_POINT).round_().to(torch.int64)
        ones = torch.ones_like(tokens)
        with lock:  # last, and without allocation: a step that runs out of memory has added nothing
            totals.index_add_(0, tokens, fixed)
            n_cells.index_add_(0, tokens, ones)
        return largest

    counts = Embedded(0, 0, 0, config.hidden_size)
    with runner(device, threads=threads, batch_tokens=batch_tokens) as run:
        for names, cells in chosen_cells(tokens, model, choice=choice, size=BLOCK):
            found = []
            for n, result in run(cells, add):
                found.append(result.cpu().numpy())
                if progress is not None:
                    progress(n)
            largest = largest_of_cells(np.concatenate(found), [len(cell) for cell in cells])
            check_finite(names, largest, most=MAX_MAGNITUDE, dtype=dtype, model=model)
            counts = tally(counts, cells, model)
            if counts.n_cells > MAX_CELLS:
                raise UserError(f"more than {MAX_CELLS} cells in a shard", path=tokens, fix="use more shards")
    write_table(_sums_table(model, totals, n_cells, special=special), output, metadata)
    return counts


def _sums_table(model: Model, totals: Tensor, n_cells: Tensor, *, special: bool) -> pa.Table:
    """gene_id, symbol, n_cells, total of the tokens that occur."""
    tokens, ids, symbols = token_names(model.vocabulary, special=special)
    n_of_gene = n_cells.cpu().numpy()[tokens]
    found = np.flatnonzero(n_of_gene)
    picked = totals[torch.from_numpy(tokens[found].astype(np.int64)).to(totals.device)].cpu().numpy()
    return pa.table(
        {
            "gene_id": strings(ids[found]),
            "symbol": strings(symbols[found]),
            "n_cells": numbers(n_of_gene[found]),
            "total": pa.FixedSizeListArray.from_arrays(numbers(picked.reshape(-1)), totals.shape[1]),
        }
    )


def _columns(table: pa.Table) -> tuple[list[str], list[str | None], list[int], Array]:
    """Ids, symbols, numbers of cells and sums, int64[genes, dim], of a table of sums; ValueError for another table."""
    ids, counts = table["gene_id"].to_pylist(), as_numbers(table["n_cells"])
    kind = table["total"].type
    if len(set(ids)) < len(ids) or counts.dtype != np.int64 or (counts < 1).any():
        raise ValueError("a gene twice, or one that is in no cell")
    if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.int64() or table["total"].null_count:
        raise ValueError("sums of another kind")
    sums = as_numbers(table["total"].combine_chunks().flatten()).reshape(-1, kind.list_size)
    return ids, table["symbol"].cast(pa.string()).to_pylist(), counts.tolist(), sums


def merge_gene_sums(paths: Sequence[str | Path], output: str | Path) -> int:
    """Gene embeddings from the sums of all shards: the mean over the cells that express the gene.

    Writes gene_id, symbol, n_cells int64, embedding fixed_size_list<float32>[dim] by ascending gene_id, the same
    bytes for any number and order of shards; returns the number of genes.

    Raises
    ------
    UserError
        If there are no shards, or they differ in model, parameters, chosen cells or dataset.
    """
    if not paths:
        raise UserError("no gene sums to merge", path=output, fix="name at least one shard")
    metadata = read_metadata(paths[0])
    dim = 0
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
        with whole(path):
            ids, names, numbers_of, sums = _columns(table)
        if totals and sums.shape[1] != dim:
            raise UserError(f"has {sums.shape[1]} dimensions, {paths[0]} has {dim}", path=path)
        dim = int(sums.shape[1])
        for row, gene in enumerate(ids):
            symbols[gene] = names[row]
            n_cells[gene] = n_cells.get(gene, 0) + numbers_of[row]
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
