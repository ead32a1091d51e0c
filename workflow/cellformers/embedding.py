"""Embeddings of cells from tokens and a model.

    embed_cells("tokens/0.parquet", "models/gf", "embeddings/0.parquet", mode="cell", layer=-1)

Cells are read, computed and written in order, a block at a time, so memory does not grow with their number. Models
with the head of a classifier embed like any other: what counts is their encoder. The vectors of genes are in
`gene_embedding`.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cellformers.errors import UserError, did_you_mean
from cellformers.io.arrow import numbers, strings
from cellformers.io.files import METADATA_KEY, atomic_path, read_metadata, stamp
from cellformers.models.batches import Step, pick_precision, precision_name, runner
from cellformers.models.checkpoints import read_config
from cellformers.models.devices import pick_device
from cellformers.models.directory import VOCABULARY, Model, open_model
from cellformers.models.geneformer import Geneformer
from cellformers.revisions import REVISIONS
from cellformers.selection import Choice
from cellformers.tokens import check_vocabulary, count_cells, read_tokens
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]
Cells = tuple[list[str], list[Array]]  # names, and the tokens of each

MODES = ("cls", "cell")
FLOAT_MAX = float(np.finfo(np.float32).max)
BLOCK = 1024  # cells read, computed and written at a time
Progress = Callable[[int], None]  # called with the number of cells that were done since the last call


class Embedded(NamedTuple):
    """What went through a model."""

    n_cells: int
    n_tokens: int
    n_empty: int  # cells without a single gene; their embedding is all zeros
    dim: int


# --- what embeddings of cells and of genes have in common -----------------------------------------------


def load_model(
    model_dir: str | Path | Model,
    *,
    layer: int,
    mode: str | None = None,
    dtype: str = "float32",
    backend: str = "auto",
    accelerator: str = "cpu",
) -> Model:
    """Open a model for embedding, which takes it in place of its folder where many files are embedded.

    An opened model is handed back as it is, when it has the mode and the layer.

    Raises
    ------
    UserError
        If it is damaged, has no such mode or layer, or the device or backend is not there.
    """
    if isinstance(model_dir, Model):
        model = model_dir
    else:
        precision = pick_precision(dtype)
        device = pick_device(accelerator)
        model = open_model(
            model_dir, dtype=precision.dtype, device=device, backend=backend, fp8=precision.fp8
        )
    if mode is not None:
        _cls_token(mode, model)
    model.network.config.depth(layer)
    return model


def made_from(
    tokens: str | Path, model: Model, parameters: Mapping[str, Any], *, choice: Choice | None,
    inputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Metadata of a result; UserError where the tokens are of another vocabulary than the model's."""
    check_vocabulary(tokens, model.vocabulary)
    known = read_metadata(tokens)["inputs"]
    found = {key: known[key] for key in ("dataset", "vocabulary") if key in known}
    found |= {"model": model.digest, **(inputs or {})}
    used = {**parameters, "dtype": precision_name(parameters["dtype"])}
    if choice is not None:
        found["cells"] = choice.digest
        used |= choice.parameters
    return stamp("embed", REVISIONS["embed"], parameters=used, inputs=found)


def chosen_cells(
    tokens: str | Path, model: Model, *, choice: Choice | None, size: int, cls: int | None = None
) -> Iterator[Cells]:
    """Names and tokens of the chosen cells of a file in order, `size` cells at a time.

    Raises
    ------
    UserError
        For tokens the network has no row for, cells longer than its positions, and, where the token of <cls> is
        given, cells that don't begin with it.
    """
    names: list[str] = []
    cells: list[Array] = []
    seen = 0
    for block in read_tokens(tokens, cells=BLOCK):
        stop = seen + len(block.cell_ids)
        keep = range(stop - seen) if choice is None else np.flatnonzero(choice.keep[seen:stop]).tolist()
        seen = stop
        for i in keep:
            names.append(block.cell_ids[i])
            cells.append(block.tokens[block.offsets[i] : block.offsets[i + 1]])
            _check_cell(names[-1], cells[-1], model, tokens, cls=cls)
            if len(cells) == size:
                yield names, cells
                names, cells = [], []
    if cells:
        yield names, cells


def _check_cell(name: str, cell: Array, model: Model, path: str | Path, *, cls: int | None) -> None:
    most = model.network.config.max_position_embeddings
    what = None
    if len(cell) > most:
        what = f"has {len(cell)} tokens, the model takes {most}"
    elif len(cell) and not 0 <= int(cell.min()) <= int(cell.max()) < model.vocabulary.size:
        what = f"has a token outside 0 to {model.vocabulary.size - 1}"
    elif cls is not None and (not len(cell) or int(cell[0]) != cls):
        what = "does not begin with <cls>"
    if what:
        raise UserError(f"cell {name!r} {what}", path=path, fix="tokenize with the vocabulary of the model")


def largest_of_cells(of_row: Array, n_rows: Sequence[int]) -> Array:
    """float32[cells]: the largest magnitude in each cell, from those of its rows; 0 for a cell without rows."""
    rows = np.asarray(n_rows, np.int64)
    result = np.zeros(len(rows), np.float32)
    if len(of_row):  # reduceat passes NaN on
        result[rows > 0] = np.maximum.reduceat(of_row, (np.cumsum(rows) - rows)[rows > 0])
    return result


def check_finite(
    names: Sequence[str], largest: Array, *, dtype: str, model: Model, most: float = FLOAT_MAX
) -> None:
    """UserError, with the name of the first such cell, where a cell has entries beyond `most`, or none at all.

    `largest` float[n_cells] holds the largest magnitude of each cell, NaN where an entry is NaN. Half precision
    overflows at 65,504; networks in float32 and bfloat16 are finite unless their weights are not.
    """
    wrong = np.flatnonzero(~(largest <= most))
    if not len(wrong):
        return
    value = float(largest[wrong[0]])
    what = (
        "is not finite"
        if not np.isfinite(value)
        else f"has an entry of {value:g}, beyond the range of {most:g}"
    )
    raise UserError(
        f"the embedding of cell {names[wrong[0]]!r} {what}", path=model.path,
        fix="float16 overflows with these weights: give --dtype bf16" if precision_name(dtype) == "float16"
        else "are these weights of a trained model?",
    )  # fmt: skip


def tally(counts: Embedded, cells: Sequence[Array], model: Model) -> Embedded:
    """The counts with these cells added."""
    special = np.array(list(model.vocabulary.special_tokens.values()))
    empty = sum(len(cell) <= len(special) and bool(np.isin(cell, special).all()) for cell in cells)
    tokens = sum(map(len, cells))
    return Embedded(counts.n_cells + len(cells), counts.n_tokens + tokens, counts.n_empty + empty, counts.dim)


def count_chosen(tokens: str | Path, choice: Choice | None) -> int:
    """Number of the chosen cells of a tokens file."""
    return count_cells(tokens) if choice is None else int(choice.keep.sum())


# --- cells ----------------------------------------------------------------------------------------------


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


def _cls_token(mode: str, model: Model) -> int | None:
    """The token of <cls> where the mode needs it; UserError where there is no such mode or token."""
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


def embed_cells(
    tokens: str | Path,
    model_dir: str | Path | Model,
    output: str | Path,
    *,
    mode: str = "cell",
    layer: int = -1,
    dtype: str = "float32",
    backend: str = "auto",
    choice: Choice | None = None,
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
        0 = last, -1 = second to last, ... to -n_layers, the embedding layer. Published uses take -1 for pretrained
        models and 0 for fine-tuned ones.
    dtype
        "float32" (fp32), "bfloat16" (bf16), "float16" (fp16) or "fp8": precision of the network; embeddings are
        stored as float32.
    backend
        "auto", "te", "varlen" or "sdpa": how attention is computed.
    choice
        The cells to embed, by `selection.choose_cells`; None: all of them.
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
        If the tokens are of another vocabulary or don't fit the model, the mode or layer does not exist, the
        device or backend is not there, or an embedding is not finite (float16 overflows).
    """
    model = load_model(
        model_dir, mode=mode, layer=layer, dtype=dtype, backend=backend, accelerator=accelerator
    )
    metadata = made_from(tokens, model, {"mode": mode, "layer": layer, "dtype": dtype}, choice=choice)
    dim = model.network.config.hidden_size
    step = cell_step(model.network, mode=mode, layer=layer, special=model.vocabulary.special_tokens.values())
    schema = pa.schema(
        [("cell_id", pa.string()), ("embedding", pa.list_(pa.float32(), dim))],
        metadata={METADATA_KEY: json.dumps(metadata).encode()},
    )
    counts = Embedded(0, 0, 0, dim)
    cls = _cls_token(mode, model)
    with (
        atomic_path(output) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
        runner(model.network.words.weight.device, threads=threads, batch_tokens=batch_tokens) as run,
    ):
        for names, cells in chosen_cells(tokens, model, choice=choice, size=BLOCK, cls=cls):
            rows = []
            for n, result in run(cells, step):
                rows.append(result.cpu().numpy())
                if progress is not None:
                    progress(n)
            found = np.concatenate(rows)
            check_finite(names, np.abs(found).max(axis=1), dtype=dtype, model=model)
            vectors = pa.FixedSizeListArray.from_arrays(numbers(found.reshape(-1)), dim)
            writer.write_table(pa.table([strings(names), vectors], schema=schema))
            counts = tally(counts, cells, model)
    return counts
