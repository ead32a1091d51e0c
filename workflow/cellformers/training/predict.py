"""Predict with a fine-tuned model: classes of cells, of genes, or of several tasks.

    predict(["tokens/0.parquet"], "models/types", "predictions.parquet")

Cells are read, computed and written in order, a block at a time, so memory does not grow with their number. Models
fine-tuned elsewhere work as well: a BertForSequenceClassification or BertForTokenClassification directory with the
vocabulary of its tokens.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellformers.errors import UserError
from cellformers.genes import map_features
from cellformers.io.arrow import strings
from cellformers.io.files import METADATA_KEY, atomic_path, digest_arrays, read_metadata, stamp, write_table
from cellformers.models.batches import pick_precision
from cellformers.models.devices import pick_device
from cellformers.models.directory import Model, open_model
from cellformers.revisions import REVISIONS
from cellformers.tokens import TokenBatch, check_vocabulary, read_tokens
from cellformers.training.answers import GeneSums, cell_columns, gene_columns, probability_columns
from cellformers.training.classify import evaluator
from cellformers.training.examples import cell_check

Array = np.ndarray[Any, Any]
Run = Callable[[Sequence[Array]], Array]

BLOCK = 1024  # cells read, computed and written at a time
_NO_CELLS = TokenBatch(np.zeros(0, dtype=object), np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64))


class Predicted(NamedTuple):
    """What `predict` went through."""

    n_cells: int
    n_without: int
    """Cells without a gene, or without one that was asked for."""
    n_rows: int
    """Rows written."""


def predict(
    tokens: Sequence[str | Path] | str | Path,
    model_dir: str | Path,
    output: str | Path,
    *,
    per_cell: bool = False,
    genes: Sequence[str] | None = None,
    dtype: str = "float32",
    accelerator: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Predicted:
    """Write predictions as Parquet.

    Of cells: cell_id, predicted, probability_{class} (float32), one row a cell in the order of the tokens, null for a
    cell without a gene; with several tasks, each column behind the name of its task. Of genes: gene_id, symbol,
    n_cells, predicted, probability_{class}, by ascending token, over all cells (see `answers`); with `per_cell`
    instead cell_id, gene_id, predicted, probability_{class}, one row for each gene of each cell. Of classes with
    exactly the same probability the first is predicted.

    Parameters
    ----------
    tokens, model_dir, output
        Token shards, a fine-tuned model directory, the file to write.
    per_cell, genes
        Gene classifiers only: not aggregated; only these genes (ids or symbols).
    dtype, accelerator, backend, threads, batch_tokens
        How it is computed, as in `embedding.embed_cells`.
    progress
        Called with the number of cells done.

    Raises
    ------
    UserError
        If the model has no classifier, or tokens and model don't go together.
    """
    files = [Path(tokens)] if isinstance(tokens, str | Path) else [Path(path) for path in tokens]
    precision = pick_precision(dtype)
    model = open_model(
        model_dir, dtype=precision.dtype, device=pick_device(accelerator), backend=backend, fp8=precision.fp8
    )
    head = model.network.config.head
    if head not in ("cell", "gene", "tasks"):
        raise UserError(
            "has no classifier", path=model_dir, fix="cellformers finetune makes a model that has one"
        )
    if head != "gene" and (per_cell or genes is not None):
        raise UserError(
            "classifies cells", path=model_dir, fix="per-cell rows and genes are for gene classifiers"
        )
    for path in files:
        check_vocabulary(path, model.vocabulary)
    metadata = _stamp(files, model, dtype=dtype, per_cell=per_cell, genes=genes)
    wanted = _wanted(model, genes)
    with evaluator(
        model.network, wanted=wanted if head == "gene" else None, threads=threads, batch_tokens=batch_tokens,
        progress=progress,
    ) as run:  # fmt: skip
        blocks = _blocks(files, model, first_is_cls=head != "gene")
        if head == "gene" and not per_cell:
            return _genes(blocks, run, model, wanted, output, metadata)
        rows = _gene_rows if head == "gene" else _cell_rows
        n_cells = n_without = n_rows = 0
        with atomic_path(output) as temporary, _Writer(temporary, metadata) as writer:
            for block in blocks:
                table, n_empty = rows(block, run, model, wanted)
                writer.add(table)
                n_cells, n_without = n_cells + len(block.cell_ids), n_without + n_empty
                n_rows += len(table)
            if not n_cells:  # no cell, but a table with its columns
                writer.add(rows(_NO_CELLS, run, model, wanted)[0])
    return Predicted(n_cells, n_without, n_rows)


def _stamp(files: Sequence[Path], model: Model, **parameters: Any) -> dict[str, Any]:
    known = {str(read_metadata(path).get("inputs", {}).get("dataset")) for path in files}
    dataset = known.pop() if len(known) == 1 else digest_arrays(sorted(known))
    inputs = {"dataset": dataset, "vocabulary": model.vocabulary.digest, "model": model.digest}
    genes = parameters["genes"]
    parameters["genes"] = None if genes is None else sorted(set(genes))
    return stamp("predict", REVISIONS["predict"], parameters=parameters, inputs=inputs)


def _wanted(model: Model, genes: Sequence[str] | None) -> Array:
    """Tokens that are genes, or the genes asked for: bool [vocab_size]."""
    wanted = np.zeros(model.network.config.vocab_size, dtype=bool)
    if genes is None:
        wanted[model.vocabulary.token_ids] = True
        return wanted
    tokens = map_features(
        np.array([*genes, None], dtype=object)[:-1], None, model.vocabulary
    ).token_of_feature
    if not (tokens >= 0).any():
        raise UserError(
            f"none of the {len(genes)} genes asked for is in the vocabulary {model.vocabulary.name!r}",
            fix="give Ensembl ids or symbols",
        )
    wanted[tokens[tokens >= 0]] = True
    return wanted


def _blocks(files: Sequence[Path], model: Model, *, first_is_cls: bool) -> Iterator[TokenBatch]:
    check = cell_check(model.network.config, model.vocabulary, first_is_cls=first_is_cls)
    for path in files:
        for block in read_tokens(path, cells=BLOCK):
            check(block, path)
            yield block


def _filled(block: TokenBatch, wanted: Array) -> tuple[Array, list[Array]]:
    """Numbers of the cells that hold a wanted token, and their tokens."""
    hits = np.zeros(len(block.tokens) + 1, dtype=np.int64)
    np.cumsum(wanted[block.tokens], out=hits[1:])
    rows = np.flatnonzero(hits[block.offsets[1:]] > hits[block.offsets[:-1]])
    return rows, [block.tokens[block.offsets[i] : block.offsets[i + 1]] for i in rows]


def _n_logits(model: Model) -> int:
    config = model.network.config
    return sum(len(labels) for _, labels in config.tasks) or len(config.labels)


def _logits(run: Run, cells: Sequence[Array], model: Model) -> Array:
    """float32[rows, classes]; UserError where one is no number: of them the first class would be predicted."""
    if not cells:
        return np.zeros((0, _n_logits(model)), dtype=np.float32)
    logits = run(cells)
    if not np.isfinite(logits).all():
        raise UserError(
            "says nothing of these cells: its outputs are not finite", path=model.path,
            fix="are these weights of a trained model? float16 may overflow: give --dtype bf16",
        )  # fmt: skip
    return logits


def _cell_rows(block: TokenBatch, run: Run, model: Model, wanted: Array) -> tuple[pa.Table, int]:
    config = model.network.config
    rows, cells = _filled(block, wanted)
    several = config.head == "tasks"
    names, classes = zip(*config.tasks, strict=True) if several else (("",), (config.labels,))
    columns = cell_columns(_logits(run, cells, model), names, classes, several=several)
    place = np.full(len(block.cell_ids), -1)
    place[rows] = np.arange(len(rows))
    if len(rows) < len(place):  # null where there is nothing to predict from
        chosen = pa.array(place, mask=place < 0)
        columns = {name: column.take(chosen) for name, column in columns.items()}
    return pa.table({"cell_id": strings(block.cell_ids), **columns}), len(place) - len(rows)


def _gene_rows(block: TokenBatch, run: Run, model: Model, wanted: Array) -> tuple[pa.Table, int]:
    rows, cells = _filled(block, wanted)
    logits = _logits(run, cells, model)
    tokens = np.concatenate([cell[wanted[cell]] for cell in cells]) if cells else np.zeros(0, dtype=np.int32)
    counts = [int(wanted[cell].sum()) for cell in cells]
    place = np.searchsorted(model.vocabulary.token_ids, tokens)
    columns = {
        "cell_id": strings(np.repeat(block.cell_ids[rows], counts)),
        "gene_id": strings(model.vocabulary.gene_ids[place]),
        **probability_columns(logits, model.network.config.labels),
    }
    return pa.table(columns), len(block.cell_ids) - len(rows)


def _genes(
    blocks: Iterator[TokenBatch], run: Run, model: Model, wanted: Array, output: str | Path,
    metadata: dict[str, Any],
) -> Predicted:  # fmt: skip
    labels = model.network.config.labels
    sums = GeneSums(len(wanted), len(labels))
    n_cells = n_without = 0
    for block in blocks:
        rows, cells = _filled(block, wanted)
        if cells:
            sums.add(np.concatenate([cell[wanted[cell]] for cell in cells]), _logits(run, cells, model))
        n_cells, n_without = n_cells + len(block.cell_ids), n_without + len(block.cell_ids) - len(rows)
    seen = np.flatnonzero(sums.cells)
    write_table(pa.table(gene_columns(sums, seen, labels, model.vocabulary)), output, metadata)
    return Predicted(n_cells, n_without, len(seen))


class _Writer:
    """A Parquet file whose columns are known with its first rows."""

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self.path, self.metadata = path, {METADATA_KEY: json.dumps(metadata).encode()}
        self.writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.writer is not None:
            self.writer.close()

    def add(self, table: pa.Table) -> None:
        """Write rows."""
        if self.writer is None:
            schema = table.schema.with_metadata(self.metadata)
            self.writer = pq.ParquetWriter(self.path, schema, compression="zstd")
        self.writer.write_table(table.cast(self.writer.schema))
