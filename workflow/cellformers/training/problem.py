"""What is learnt from which tokens: labels of cells or of genes beside the tokens, and batches of both.

problem, report = prepare(files, targets, split, config=config, vocabulary=vocabulary, limits=Limits(seed=0))
problem.batch(problem.cells(TRAIN)[:12], (TRAIN,))
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

from cellformers.errors import UserError
from cellformers.io.files import digest_arrays
from cellformers.models.bert_config import Config
from cellformers.training.examples import (
    Cells,
    Files,
    cap,
    cell_check,
    cells_with,
    read_cells,
    read_keys,
)  # fmt: skip
from cellformers.training.sides import OUT, TRAIN, SplitSpec, assign, strata
from cellformers.training.targets import Targets, drop_rare, encode, gene_rows
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]

BLOCK = 1024  # cells whose tokens are widened at a time


class Limits(NamedTuple):
    """Cells and classes that are left out."""

    max_cells: int | None = None
    max_cells_per_class: int | None = None
    min_cells: int = 1
    seed: int = 0


class Batch(NamedTuple):
    """Packed cells with their labels."""

    tokens: Array
    """int64 [T]."""
    bounds: Array
    """int64 [n + 1]: where each cell begins."""
    rows: Array | None
    """int64 [m], ascending: the tokens that have a label; None where cells have."""
    labels: Array
    """int64 [m or n, tasks], -1 where there is none."""


class Problem(NamedTuple):
    """Cells in memory and what is known about them or their genes."""

    kind: str
    """cells, genes or tasks."""
    store: Cells
    keys: Array
    """object [n_cells] of str: names of the cells."""
    labels: Array
    """int64 [n_cells, tasks]; of genes [vocab_size, 1], by token. -1: none."""
    side: Array
    """int8 [n_cells], of genes [vocab_size]."""
    names: tuple[str, ...]
    """The columns of labels."""
    classes: tuple[tuple[str, ...], ...]
    """The classes of each, sorted."""
    positive: int
    """The class of two that an AUC is of."""
    split: dict[str, Any]
    """The content of split.json."""
    digest: str
    """Of tokens, labels and sides."""

    def wanted(self, sides: Collection[int]) -> Array:
        """Cells, or tokens of the vocabulary, on one of these sides and with a label: bool."""
        return np.isin(self.side, list(sides)) & (self.labels >= 0).any(axis=1)

    def cells(self, *sides: int) -> Array:
        """Numbers of the cells that have something to learn or to test there, by ascending name."""
        wanted = self.wanted(sides)
        if self.kind == "genes":
            hits = np.zeros(len(self.store.tokens) + 1, dtype=np.int64)
            np.cumsum(wanted[self.store.tokens], out=hits[1:])
            wanted = hits[self.store.offsets[1:]] > hits[self.store.offsets[:-1]]
        found = np.flatnonzero(wanted)
        return found[np.argsort(self.keys[found].astype(str), kind="stable")]

    def batch(self, cells: Array, sides: Collection[int]) -> Batch:
        """Tokens and labels of some cells; of genes, those on these sides."""
        tokens, bounds = self.store.gather(cells)
        if self.kind != "genes":
            return Batch(tokens, bounds, None, self.labels[cells])
        rows = np.flatnonzero(self.wanted(sides)[tokens])
        return Batch(tokens, bounds, rows, self.labels[tokens[rows]])

    def class_sizes(self, *sides: int) -> list[Array]:
        """Labels of each class, int64 [classes] a task; of genes, each occurrence in a cell counts."""
        wanted = self.wanted(sides)
        times = np.ones(len(wanted), dtype=np.int64)
        if self.kind == "genes":
            times = self.store.counts
        sizes = []
        for task, classes in enumerate(self.classes):
            rows = np.flatnonzero(wanted & (self.labels[:, task] >= 0))
            counts = np.bincount(self.labels[rows, task], weights=times[rows], minlength=len(classes))
            sizes.append(counts.astype(np.int64))
        return sizes


class Outputs(NamedTuple):
    """Logits of cells, or of genes in cells."""

    logits: Array
    """float32 [m, classes of all tasks]."""
    labels: Array
    """int64 [m, tasks]."""
    cell: Array
    """int64 [m]: the number of the cell."""
    token: Array | None
    """int64 [m]: the gene."""


def outputs(
    problem: Problem, run: Callable[[Sequence[Array]], Array], cells: Array, sides: Collection[int]
) -> Outputs:
    """What the network of an `evaluator` says about cells, or about the genes of these sides in them."""
    parts: list[tuple[Array, ...]] = []
    for start in range(0, len(cells), BLOCK):
        batch = problem.batch(cells[start : start + BLOCK], sides)
        spans = zip(batch.bounds[:-1], batch.bounds[1:], strict=True)
        logits = run([batch.tokens[a:b] for a, b in spans])
        number = np.arange(len(batch.bounds) - 1)
        if batch.rows is not None:
            number = np.searchsorted(batch.bounds, batch.rows, side="right") - 1
        parts.append(
            (
                logits,
                batch.labels,
                cells[start + number],
                batch.tokens if batch.rows is None else batch.tokens[batch.rows],
            )
        )
    if not parts:
        n_logits = sum(map(len, problem.classes))
        nothing = np.zeros(0, dtype=np.int64)
        parts = [
            (
                np.zeros((0, n_logits), np.float32),
                np.zeros((0, len(problem.names)), np.int64),
                nothing,
                nothing,
            )
        ]
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Outputs(joined[0], joined[1], joined[2], joined[3] if problem.kind == "genes" else None)


def prepare(
    files: Files,
    targets: Targets,
    split: SplitSpec,
    *,
    config: Config,
    vocabulary: Vocabulary,
    limits: Limits,
) -> tuple[Problem, dict[str, Any]]:
    """Read the cells that have labels, or that hold labelled genes; the report says what was left out.

    Raises
    ------
    UserError
        If labels and tokens have nothing in common, a cell does not fit the model, or a split is impossible.
    """
    make = _of_genes if targets.kind == "genes" else _of_cells
    problem, report = make(files, targets, split, config=config, vocabulary=vocabulary, limits=limits)
    if not len(problem.cells(TRAIN)):
        raise UserError("no cell holds a gene to train on", fix="give more cells, or other genes")
    return problem, report


def _positive(targets: Targets, classes: tuple[tuple[str, ...], ...]) -> int:
    return classes[0].index(targets.positive) if targets.positive in classes[0] else 1


def _of_cells(
    files: Files,
    targets: Targets,
    split: SplitSpec,
    *,
    config: Config,
    vocabulary: Vocabulary,
    limits: Limits,
) -> tuple[Problem, dict[str, Any]]:
    keys = read_keys(files)
    row_of = {key: row for row, key in enumerate(targets.keys.tolist())}
    row = np.array([row_of.get(key, -1) for key in keys], dtype=np.int64)
    if not len(keys):
        raise UserError("the tokens hold no cell", fix="tokenize some first")
    if not (row >= 0).any():
        raise UserError(
            f"none of the {len(targets):,} labelled cells is in the tokens (labels name {targets.keys[0]!r}, "
            f"cells are called {keys[0]!r})",
            fix="name the column of cell ids with --key",
        )  # fmt: skip
    cells = np.flatnonzero(row >= 0)
    known = targets.take(row[cells])
    n_known = len(cells)
    known, kept, rare = drop_rare(known, limits.min_cells)
    cells = cells[kept]
    limited = cap(
        known.keys, strata_of_text(known.labels), most=limits.max_cells,
        most_per_group=limits.max_cells_per_class, seed=limits.seed,
    )  # fmt: skip
    known, cells = known.take(limited.rows), cells[limited.rows]
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[cells] = True
    check = cell_check(config, vocabulary, first_is_cls=True)
    store = read_cells(files, chosen, check, n_tokens=config.vocab_size)
    filled = np.flatnonzero(_genes_per_cell(store, vocabulary) > 0)
    n_empty = len(cells) - len(filled)
    known = known.take(filled)
    labels = np.full((len(cells), len(targets.names)), -1, dtype=np.int64)
    side = np.full(len(cells), OUT, dtype=np.int8)
    labels[filled], classes = encode(known)
    side[filled], record = assign(known, labels[filled], split)
    report = {
        "in_tokens": len(keys), "labelled": n_known, "no_label": len(keys) - n_known,
        "labelled_without_tokens": len(targets) - n_known, "table": dict(targets.excluded),
        "rare_classes": rare, "in_rare_classes": n_known - len(kept), "over_limit": limited.left_out,
        "without_genes": n_empty, "used": int((side != OUT).sum()),
    }  # fmt: skip
    digest = digest_arrays([store.digest], keys[chosen], labels, side)
    return Problem(
        targets.kind, store, keys[chosen], labels, side, targets.names, classes, _positive(targets, classes),
        record, digest,
    ), {"cells": report}  # fmt: skip


def strata_of_text(labels: Array) -> Array:
    """The combination of classes of each row, object [n] of str, before classes have numbers."""
    _, numbers = np.unique(labels.astype(str), return_inverse=True)
    return strata(numbers.reshape(labels.shape))


def _genes_per_cell(store: Cells, vocabulary: Vocabulary) -> Array:
    """Tokens of each cell that are genes, int64 [n_cells]."""
    is_gene = ~np.isin(store.tokens, list(vocabulary.special_tokens.values()))
    genes = np.zeros(len(store.tokens) + 1, dtype=np.int64)
    np.cumsum(is_gene, out=genes[1:])
    return genes[store.offsets[1:]] - genes[store.offsets[:-1]]


def _of_genes(
    files: Files,
    targets: Targets,
    split: SplitSpec,
    *,
    config: Config,
    vocabulary: Vocabulary,
    limits: Limits,
) -> tuple[Problem, dict[str, Any]]:
    known, tokens, genes = gene_rows(targets, vocabulary)
    ids, classes = encode(known)
    sides, record = assign(known, ids, split)
    labels = np.full((config.vocab_size, 1), -1, dtype=np.int64)
    side = np.full(config.vocab_size, OUT, dtype=np.int8)
    labels[tokens], side[tokens] = ids, sides
    keys = read_keys(files)
    holding = np.flatnonzero(cells_with(files, side != OUT))
    limited = cap(keys[holding], None, most=limits.max_cells, most_per_group=None, seed=limits.seed)
    chosen = np.zeros(len(keys), dtype=bool)
    chosen[holding[limited.rows]] = True
    check = cell_check(config, vocabulary, first_is_cls=False)
    store = read_cells(files, chosen, check, n_tokens=config.vocab_size)
    used = tokens[sides != OUT]
    report = {
        "cells": {
            "in_tokens": len(keys), "without_labelled_genes": len(keys) - len(holding),
            "over_limit": limited.left_out, "used": int(chosen.sum()),
        },
        "genes": {
            **genes, "table": dict(targets.excluded), "used": len(used),
            "in_no_cell": sorted(known.keys[(sides != OUT) & (store.counts[tokens] == 0)].tolist()),
        },
    }  # fmt: skip
    digest = digest_arrays([store.digest], keys[chosen], labels, side)
    return Problem(
        "genes", store, keys[chosen], labels, side, targets.names, classes, _positive(targets, classes),
        record, digest,
    ), report  # fmt: skip
