"""Predictions of models fine-tuned on the folds of a benchmark, checked to be of this very split.

`cellformers finetune --split-file split.json --fold k` writes one model a fold; `cellformers evaluate --features
finetuned --fold-model ...` takes their test predictions, in the order of the folds, and scores them like any other.
A model that was trained on anything its fold does not train on is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate.classify import FoldPrediction
from cellformers.evaluate.splitfile import Split, row_names
from cellformers.evaluate.tables import Cells
from cellformers.io.arrow import as_numbers, as_strings
from cellformers.io.files import digest_arrays, read_json, read_table, whole

Array = np.ndarray[Any, Any]
FIX = "fine-tune it with this split: cellformers finetune --split-file split.json --fold K"


class Finetuned(NamedTuple):
    """Predictions of all folds."""

    folds: list[FoldPrediction]
    digest: str
    """Of the probabilities, in the order of the test rows."""
    notes: list[str]


def finetuned_cells(
    models: Sequence[str | Path], split: Split, cells: Cells, folds: Sequence[tuple[Array, Array]]
) -> Finetuned:
    """Test predictions of one fine-tuned model a fold.

    Parameters
    ----------
    models
        Model directories that `finetune` wrote, in the order of the folds.
    split, cells, folds
        The split, its cells and the row numbers (train, test) of its folds.

    Raises
    ------
    UserError
        If there is not one model a fold, or a model was fine-tuned for another label, on other cells than its fold
        trains on, or tested on others than its fold tests.
    """
    if len(models) != len(folds):
        raise UserError(
            f"{len(models)} fine-tuned models for {len(folds)} folds",
            fix="give --fold-model once a fold, in the order of the folds",
        )
    parts, notes = [], []
    for number, (path, (train, test)) in enumerate(zip(map(Path, models), folds, strict=True)):
        with whole(path, fix=FIX):
            prefix, classes = _labels(path, split)
            notes += _check_trained(path, split, cells, train, number=number)
            own = _probability(
                path, cells, test, prefix=prefix, classes=classes, fold=split.folds[number]["name"]
            )
            probability = np.zeros((len(test), len(split.classes)))
            probability[:, [split.classes.index(c) for c in classes]] = own
            if not (np.isfinite(own).all() and (own >= 0).all() and (own <= 1).all()):
                raise ValueError("probabilities outside 0 to 1")
        parts.append(FoldPrediction(probability, float("nan"), True))
    return Finetuned(parts, digest_arrays(*(part.probability for part in parts)), notes)


def _labels(path: Path, split: Split) -> tuple[str, list[str]]:
    """What the columns of the label begin with, and its classes."""
    training = read_json(path / "training.json")
    kind = training.get("task") if isinstance(training, dict) else None
    if kind not in ("cells", "tasks"):
        raise UserError("holds no model fine-tuned to classify cells", path=path, fix=FIX)
    known = {entry["name"]: list(entry["classes"]) for entry in training["labels"]}
    label = split.content["label"]
    if label not in known:
        raise UserError(f"was not trained on {label!r}", path=path, fix=did_you_mean(label, list(known)))
    foreign = sorted(set(known[label]) - set(split.classes))
    if foreign:
        raise UserError(f"knows a {label} {foreign[0]!r} that the split lacks", path=path, fix=FIX)
    return f"{label}_" if kind == "tasks" else "", known[label]


def _check_trained(path: Path, split: Split, cells: Cells, train: Array, *, number: int) -> list[str]:
    """Refuse a model that has seen what its fold doesn't train on; the note says what it was not shown."""
    fold = split.folds[number]["name"]
    sides = read_json(path / "split.json")
    if not isinstance(sides, dict) or "by" not in sides:
        raise UserError("has no split.json of a fine-tuning", path=path, fix=FIX)
    names = row_names(cells, sides["by"]).astype(str)
    seen = [str(name) for side in ("train", "heldout") for name in sides.get(side, [])]
    allowed = np.zeros(len(cells), dtype=bool)
    allowed[train] = True
    strange = np.setdiff1d(seen, names)
    other = np.unique(names[np.isin(names, seen) & ~allowed])
    if len(strange) or len(other):
        first = str((other if len(other) else strange)[0])
        raise UserError(
            f"was trained on {sides['by']} {first!r}, which fold {fold!r} does not train on",
            path=path,
            fix=FIX,
        )
    n = sum(int(sides["n"].get(side, 0)) for side in ("train", "heldout"))
    return [] if n >= len(train) else [f"fold {fold}: fine-tuned with {n} of its {len(train)} cells"]


def _probability(
    path: Path, cells: Cells, test: Array, *, prefix: str, classes: Sequence[str], fold: str
) -> Array:
    """Probabilities float64[test rows, classes] in the order of the rows; UserError where others were tested."""
    table = read_table(path / "predictions.parquet")
    columns = [f"{prefix}probability_{name}" for name in classes]
    for column in ("cell_id", "side", f"{prefix}label", *columns):
        if column not in table.column_names:
            raise UserError(f"has no column {column!r}", path=path / "predictions.parquet", fix=FIX)
    label = as_strings(table[f"{prefix}label"])
    tested = (as_strings(table["side"]) == "test") & (label != np.array(None, dtype=object))
    table, label = table.filter(pa.array(tested)), label[tested]
    present, wanted = _keys(table, cells, test, path)
    index = pd.Index(present)
    if index.has_duplicates:
        twice = present[index.duplicated()][0]
        raise UserError(f"tested cell {twice!r} twice", path=path, fix=FIX)
    found = index.get_indexer(pd.Index(wanted))
    extra = len(present) - int((found >= 0).sum())
    if (found < 0).any() or extra:
        missing = [str(name) for name in np.asarray(wanted)[found < 0][:1]]
        what = f"did not test {int((found < 0).sum())} of the {len(wanted)} cells" if missing else (
            f"tested {extra} cells more than the {len(wanted)}"
        )  # fmt: skip
        shown = f", e.g. {missing[0]}" if missing else ""
        raise UserError(f"{what} of fold {fold!r}{shown}", path=path, fix=FIX)
    if (label[found] != cells.label[test]).any():
        raise UserError(f"has other labels of the cells of fold {fold!r}", path=path, fix=FIX)
    return np.stack([as_numbers(table[column]).astype(np.float64)[found] for column in columns], axis=1)


def _keys(table: pa.Table, cells: Cells, test: Array, path: Path) -> tuple[Array, Array]:
    """Names of the tested cells there and of the cells of a fold, with the dataset where the table has it."""
    ids = as_strings(table["cell_id"])
    if "dataset" in table.column_names:
        names = as_strings(table["dataset"])
        pairs = zip(cells.dataset[test], cells.cell_id[test], strict=True)
        return (
            np.array([f"{d}:{c}" for d, c in zip(names, ids, strict=True)], dtype=object),
            np.array([f"{d}:{c}" for d, c in pairs], dtype=object),
        )
    if len(set(cells.dataset)) > 1:
        raise UserError(
            "does not say which dataset its cells are of", path=path, fix="give each as NAME=PATH"
        )
    return ids, cells.cell_id[test]
