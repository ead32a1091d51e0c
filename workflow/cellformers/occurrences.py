"""The vector of every single occurrence of a gene: one row for each gene of each cell.

    write_occurrences("tokens/0.parquet", "models/gf", "occurrences.parquet", genes=["ENSG00000118194"])

A million cells of 2,000 genes make two thousand million rows, 6 TB at 768 numbers each, so the size is known, and
said, before anything is computed. Rows are written as they are computed; memory does not grow with their number.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from cellformers.embedding import (
    BLOCK,
    Progress,
    check_finite,
    chosen_cells,
    largest_of_cells,
    load_model,
    made_from,
)
from cellformers.errors import UserError, did_you_mean
from cellformers.gene_embedding import token_names
from cellformers.io.arrow import numbers, strings
from cellformers.io.files import METADATA_KEY, atomic_path, digest_arrays
from cellformers.models.batches import Step, precision_name, runner
from cellformers.models.directory import Model
from cellformers.selection import Choice
from cellformers.vocabulary import Vocabulary, normalise

Array = np.ndarray[Any, Any]

CELLS = {"cpu": 16, "cuda": BLOCK}  # whose hidden states are in memory, all at once on the CPU
GROUP_BYTES = 32 << 20  # vectors of a row group
# What vectors take on disk, as a share of their float32 size (measured: 0.85, and 0.34 of a network in 16 bits); a
# little less, so that nothing is refused that may fit.
DISK_SHARE = {"float32": 0.8, "float16": 0.3, "bfloat16": 0.3, "fp8": 0.3}


class Wanted(NamedTuple):
    """Which tokens get a row each, and under which name."""

    tokens: Array
    """bool[tokens of the network]"""
    names: pa.StringArray
    """of all of them, null where a token has none"""


def read_genes(named: str) -> list[str]:
    """Names of genes from a text file (one a line; lines that begin with # are comments), or from `ID,ID`."""
    path = Path(named)
    if not path.is_file():
        return [name.strip() for name in named.split(",") if name.strip()]
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"not readable as text ({error})", path=path, fix="one gene a line") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def find_genes(names: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """The gene ids that ids, symbols and aliases stand for, each once; UserError for one that has no token."""
    if not names:
        raise UserError("no genes are named", fix="give --genes ID,ID or a file with one gene a line")
    known = set(vocabulary.gene_ids.tolist())
    gene_of: dict[str, str] = {}
    if not known.issuperset(names):
        table = vocabulary.aliases()
        gene_of = dict(zip(table["alias"].to_pylist(), table["gene_id"].to_pylist(), strict=True))
    found = []
    for name, normal in zip(names, normalise(strings(names)).to_pylist(), strict=True):
        gene = name if name in known else gene_of.get(normal, "")
        if gene not in known:
            others = [alias for alias, other in gene_of.items() if other in known]
            raise UserError(
                f"gene {name!r} has no token in the vocabulary {vocabulary.name!r}",
                fix=did_you_mean(normal, others),
            )
        found.append(gene)
    return list(dict.fromkeys(found))


def _wanted(model: Model, genes: Sequence[str] | None, *, special: bool) -> Wanted:
    tokens, ids, _ = token_names(model.vocabulary, special=special)
    named = np.full(model.network.config.vocab_size, None, dtype=object)
    named[tokens] = ids
    if genes is not None:
        kept = [*genes, *(model.vocabulary.special_tokens if special else ())]
        tokens = tokens[np.isin(ids.astype(str), kept)]
    chosen = np.zeros(len(named), bool)
    chosen[tokens] = True
    return Wanted(chosen, strings(named))


def _check_space(
    output: Path, rows: int, *, dim: int, dtype: str, note: Callable[[str], None] | None
) -> None:
    """Say how much is going to be written; UserError where the disk has no room for it."""
    size = 4.0 * dim * rows
    if note is not None:
        note(f"{output}: {rows:,} occurrences of {dim} numbers, {size / 1e9:,.1f} GB before compression")
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if size * DISK_SHARE[precision_name(dtype)] > free:
        raise UserError(
            f"{rows:,} occurrences take about {size * DISK_SHARE[precision_name(dtype)] / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} GB are free",
            path=output, fix="name the --genes you need, choose cells with --where, or leave out --occurrences",
        )  # fmt: skip


def write_occurrences(
    tokens: str | Path,
    model_dir: str | Path | Model,
    output: str | Path,
    *,
    genes: Sequence[str] | None = None,
    special: bool = False,
    layer: int = -1,
    dtype: str = "float32",
    backend: str = "auto",
    choice: Choice | None = None,
    accelerator: str = "cpu",
    threads: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> int:
    """Write the vector of each gene in each cell: cell_id, gene_id, position int32, embedding
    fixed_size_list<float32>[hidden_size], cells in the order of `tokens`, genes in that of the cell.

    Parameters
    ----------
    genes
        Ids, symbols or aliases of the genes to write; None: all.
    special
        Also write special tokens, whose gene_id is their name, such as `<cls>`.
    note
        Called with a line on how much is going to be written.

    `position` counts all tokens of the cell from 0, <cls> among them. Other parameters are as in
    `embedding.embed_cells`. Returns the number of rows.

    Raises
    ------
    UserError
        As in `embed_cells`; also if a gene has no token or the disk has no room for all rows.
    """
    model = load_model(model_dir, layer=layer, dtype=dtype, backend=backend, accelerator=accelerator)
    output, dim = Path(output), model.network.config.hidden_size
    found = None if genes is None else find_genes(genes, model.vocabulary)
    metadata = made_from(
        tokens, model,
        {"mode": "gene", "layer": layer, "dtype": dtype, "occurrences": True, "special": special},
        choice=choice, inputs=None if found is None else {"genes": digest_arrays(sorted(found))},
    )  # fmt: skip
    wanted = _wanted(model, found, special=special)
    n_rows = sum(
        int(np.count_nonzero(wanted.tokens[cell]))
        for _, cells in chosen_cells(tokens, model, choice=choice, size=BLOCK)
        for cell in cells
    )
    _check_space(output, n_rows, dim=dim, dtype=dtype, note=note)
    step = _step(model, wanted, layer=layer)
    schema = pa.schema(
        [
            ("cell_id", pa.string()), ("gene_id", pa.string()), ("position", pa.int32()),
            ("embedding", pa.list_(pa.float32(), dim)),
        ],
        metadata={METADATA_KEY: json.dumps(metadata).encode()},
    )  # fmt: skip
    device = model.network.words.weight.device
    with (
        atomic_path(output) as temporary,
        pq.ParquetWriter(
            temporary, schema, compression="zstd", use_dictionary=["cell_id", "gene_id"],
            write_statistics=["cell_id", "gene_id", "position"],
            column_encoding={"embedding.list.element": "BYTE_STREAM_SPLIT"},
        ) as writer,
        runner(device, threads=threads, batch_tokens=batch_tokens) as run,
    ):  # fmt: skip

        def tables() -> Iterator[pa.Table]:
            for names, cells in chosen_cells(tokens, model, choice=choice, size=CELLS[device.type]):
                first = 0
                for n, result in run(cells, step):
                    batch, vectors = slice(first, first + n), result.cpu().numpy()
                    table, rows_of_cell = _rows(names[batch], cells[batch], vectors, wanted, schema)
                    largest = largest_of_cells(np.abs(vectors).max(axis=1, initial=0), rows_of_cell)
                    check_finite(names[batch], largest, dtype=dtype, model=model)
                    yield table
                    first += n
                    if progress is not None:
                        progress(n)

        for table in _regrouped(tables(), max(1, GROUP_BYTES // (4 * dim))):
            writer.write_table(table)
    return n_rows


def _step(model: Model, wanted: Wanted, *, layer: int) -> Step:
    """The work that makes the vectors of the wanted tokens, float32 [rows, dim], of packed cells."""
    is_wanted = torch.from_numpy(wanted.tokens).to(model.network.words.weight.device)

    def vectors(tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        return model.network(tokens, cu_seqlens, layer=layer)[is_wanted[tokens]].float()

    return vectors


def _rows(
    names: Sequence[str], cells: Sequence[Array], vectors: Array, wanted: Wanted, schema: pa.Schema
) -> tuple[pa.Table, list[int]]:
    """The rows of some cells, and how many each has; vectors float32[rows, dim] are those of all their tokens."""
    kept = [np.flatnonzero(wanted.tokens[cell]) for cell in cells]
    n_rows = [len(positions) for positions in kept]
    positions = np.concatenate(kept).astype(np.int32)
    found = np.concatenate([cell[at] for cell, at in zip(cells, kept, strict=True)])
    columns = [
        strings(names).take(numbers(np.repeat(np.arange(len(names)), n_rows))),
        wanted.names.take(numbers(found)),
        numbers(positions),
        pa.FixedSizeListArray.from_arrays(numbers(vectors.reshape(-1)), vectors.shape[1]),
    ]
    return pa.table(columns, schema=schema), n_rows


def _regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows, so many in each table, so that row groups don't depend on batches."""
    waiting: list[pa.Table] = []
    n = 0
    for table in tables:
        waiting.append(table)
        n += len(table)
        while n >= rows:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, rows).combine_chunks()
            waiting, n = [joined.slice(rows)], n - rows
    if n:
        yield pa.concat_tables(waiting).combine_chunks()
