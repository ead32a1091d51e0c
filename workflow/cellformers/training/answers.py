"""Predictions as tables: of cells, of genes in cells, and of genes over all cells.

A gene's probability over its cells is the softmax of the mean of its logits: for two classes, the mean of its
log-odds. Every gene then counts once, unlike in the pooled (cell, gene) predictions, where frequent genes dominate.
Of classes with exactly the same probability the first is predicted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from cellformers import metrics
from cellformers.errors import UserError
from cellformers.io.arrow import as_numbers, as_strings, numbers, strings
from cellformers.io.files import read_json, read_table, whole
from cellformers.training.classify import softmax
from cellformers.training.problem import Outputs, Problem
from cellformers.training.sides import SIDES
from cellformers.training.targets import SEPARATOR
from cellformers.training.verdict import by_task, scores
from cellformers.vocabulary import Vocabulary

Array = np.ndarray[Any, Any]

AGGREGATION = "softmax of the mean of a gene's logits over its cells"


def probability_columns(logits: Array, classes: Sequence[str], prefix: str = "") -> dict[str, pa.Array]:
    """Columns predicted and probability_{class} (float32) of logits [n, classes]."""
    names = np.array([*classes, None], dtype=object)[:-1]
    p = softmax(logits).astype(np.float32) if len(logits) else logits
    chosen = names[logits.argmax(axis=1)] if len(logits) else names[:0]
    return {
        f"{prefix}predicted": strings(chosen),
        **{f"{prefix}probability_{c}": numbers(p[:, i].astype(np.float32)) for i, c in enumerate(classes)},
    }


def cell_columns(
    logits: Array, names: Sequence[str], classes: Sequence[Sequence[str]], *, several: bool
) -> dict[str, pa.Array]:
    """The columns of every task; where there are several, behind the name of the task."""
    columns: dict[str, pa.Array] = {}
    for name, labels, part in zip(names, classes, by_task(logits, classes), strict=True):
        columns |= probability_columns(part, labels, f"{name}_" if several else "")
    return columns


class GeneSums:
    """Sums of logits over cells, by gene; constant memory."""

    def __init__(self, n_tokens: int, n_classes: int) -> None:
        self.sums = np.zeros((n_tokens, n_classes))
        self.cells = np.zeros(n_tokens, dtype=np.int64)

    def add(self, tokens: Array, logits: Array) -> None:
        """Add logits [m, classes] of the genes int64 [m]; in the order given, so sums don't depend on blocks."""
        np.add.at(self.sums, tokens, logits.astype(np.float64))
        self.cells += np.bincount(tokens, minlength=len(self.cells))

    def means(self, tokens: Array) -> Array:
        """Mean logits, float64 [len(tokens), classes], of genes that were seen."""
        return np.asarray(self.sums[tokens] / self.cells[tokens, None])


def gene_columns(
    sums: GeneSums, tokens: Array, classes: Sequence[str], vocabulary: Vocabulary
) -> dict[str, pa.Array]:
    """Columns gene_id, symbol, n_cells, predicted and probabilities of genes that were seen."""
    place = np.searchsorted(vocabulary.token_ids, tokens)
    return {
        "gene_id": strings(vocabulary.gene_ids[place]),
        "symbol": strings(vocabulary.symbols[place]),
        "n_cells": numbers(sums.cells[tokens]),
        **probability_columns(sums.means(tokens), classes),
    }


def named_cells(keys: Array) -> dict[str, pa.Array]:
    """Column cell_id and, where datasets have names, dataset."""
    if not len(keys) or SEPARATOR not in keys[0]:
        return {"cell_id": strings(keys)}
    parts = [key.split(SEPARATOR, 1) for key in keys.tolist()]
    return {"cell_id": strings([p[1] for p in parts]), "dataset": strings([p[0] for p in parts])}


class Answers(NamedTuple):
    """What a fine-tuned network says about the held-out and the test side."""

    table: pa.Table
    pooled: pa.Table | None
    """Of genes in cells; None where cells are classified."""
    metrics: dict[str, Any]


def _texts(labels: Array, classes: Sequence[str]) -> pa.Array:
    names = np.array([*classes, None], dtype=object)  # -1 takes the last
    return strings(names[labels])


def answers_about_cells(problem: Problem, found: Outputs, *, datasets: bool) -> Answers:
    """Tables and scores of cells: by side, each task for itself."""
    order = np.argsort(found.cell, kind="stable")
    logits, labels, cell = found.logits[order], found.labels[order], found.cell[order]
    side = problem.side[cell]
    several = problem.kind == "tasks"
    columns = named_cells(problem.keys[cell]) if datasets else {"cell_id": strings(problem.keys[cell])}
    columns["side"] = strings(np.array(SIDES, dtype=object)[side])
    for task, (name, classes) in enumerate(zip(problem.names, problem.classes, strict=True)):
        columns[f"{name}_label" if several else "label"] = _texts(labels[:, task], classes)
    columns |= cell_columns(logits, problem.names, problem.classes, several=several)
    measured: dict[str, Any] = {}
    for number in sorted(set(side.tolist())):
        each = {}
        for task, (name, part) in enumerate(
            zip(problem.names, by_task(logits, problem.classes), strict=True)
        ):
            rows = np.flatnonzero((side == number) & (labels[:, task] >= 0))
            each[name] = scores(
                part[rows],
                labels[rows, task],
                problem.classes[task],
                positive=problem.positive if not several else 1,
            )
        measured[SIDES[number]] = each if several else each[problem.names[0]]
    return Answers(pa.table(columns), None, measured)


def answers_about_genes(problem: Problem, found: Outputs, vocabulary: Vocabulary) -> Answers:
    """Tables and scores of genes: pooled over (cell, gene), as published, and each gene once."""
    assert found.token is not None
    classes = problem.classes[0]
    order = np.lexsort((np.arange(len(found.cell)), found.cell))
    logits, labels, cell, token = (
        part[order] for part in (found.logits, found.labels[:, 0], found.cell, found.token)
    )
    sums = GeneSums(len(problem.labels), len(classes))
    sums.add(token, logits)
    genes = np.unique(token)
    table = {**gene_columns(sums, genes, classes, vocabulary)}
    words = np.array(SIDES, dtype=object)
    own = {"side": strings(words[problem.side[genes]]), "label": _texts(problem.labels[genes, 0], classes)}
    place = np.searchsorted(vocabulary.token_ids, token)
    pooled = {
        "cell_id": strings(problem.keys[cell]),
        "gene_id": strings(vocabulary.gene_ids[place]),
        "side": strings(words[problem.side[token]]),
        "label": _texts(labels, classes),
        **probability_columns(logits, classes),
    }
    measured = {}
    means = sums.means(genes)
    for number in sorted(set(problem.side[genes].tolist())):
        rows, once = problem.side[token] == number, problem.side[genes] == number
        measured[SIDES[number]] = {
            "pooled": scores(logits[rows], labels[rows], classes, positive=problem.positive),
            "per_gene": scores(
                means[once], problem.labels[genes[once], 0], classes, positive=problem.positive
            ),
        }
    head, rest = dict(list(table.items())[:2]), dict(list(table.items())[2:])
    return Answers(pa.table(head | own | rest), pa.table(pooled), measured)


def pool_folds(folders: Sequence[str | Path]) -> tuple[pa.Table, dict[str, Any]]:
    """The test predictions of the folds of one split, one behind the other, and what they come to.

    Parameters
    ----------
    folders
        What `finetune` wrote with fold 1, 2, ... of the same labels and seed.

    Returns
    -------
    The rows of predictions.parquet of the test sides, with the fold in front; and {metric: mean over folds, SD (with
    n - 1), the folds' values} of accuracy, macro_f1 and auc, of genes once per gene and once pooled.

    Raises
    ------
    UserError
        If a folder has no test side, or something is tested twice.
    """
    tables: list[pa.Table] = []
    figures: dict[str, list[float]] = {}
    tested: set[str] = set()
    for number, folder in enumerate(folders, start=1):
        with whole(folder, fix="fine-tune again"):
            test = _leaves(dict(read_json(Path(folder) / "training.json")["metrics"].get("test") or {}))
        if not test:
            raise UserError("tested nothing", path=folder, fix="pool folds that have a test side")
        table = read_table(Path(folder) / "predictions.parquet")
        rows = np.flatnonzero(as_strings(table["side"]) == "test")
        table = table.take(numbers(rows))
        names = as_strings(table["gene_id" if "gene_id" in table.column_names else "cell_id"]).tolist()
        if tested & set(names):
            raise UserError(
                f"{min(tested & set(names))!r} is tested in another fold as well", path=folder,
                fix="pool folds of one split",
            )  # fmt: skip
        tested |= set(names)
        tables.append(table.add_column(0, "fold", numbers(np.full(len(table), number, dtype=np.int32))))
        for name, value in test:
            figures.setdefault(name, []).append(value)
    return pa.concat_tables(tables), {name: _over_folds(values) for name, values in figures.items()}


def _leaves(found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The figures that folds are averaged by, under names such as per_gene.auc."""
    known = {n: found[n] for n in ("accuracy", "macro_f1", "auc") if found.get(n) is not None}
    own = [(prefix + n, value) for n, value in known.items() if isinstance(value, int | float)]
    if len(own) < len(known):
        raise ValueError("a score that is no number")
    if own:
        return own
    return [
        leaf for n, part in found.items() if isinstance(part, dict) for leaf in _leaves(part, f"{prefix}{n}.")
    ]


def _over_folds(values: list[float]) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "folds": values}


def pooled_auc(table: pa.Table, positive: str) -> float:
    """Area under the ROC curve of the rows of a table of predictions, those of all folds compared with each other."""
    label = as_strings(table["label"])
    score = as_numbers(table[f"probability_{positive}"]).astype(np.float64)
    return float(metrics.auc(label == positive, score))
