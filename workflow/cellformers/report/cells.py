"""Sections about cells: datasets and QC, gene mapping, tokens per cell."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cellformers import plots
from cellformers.io.arrow import as_numbers
from cellformers.io.files import open_parquet, read_json, read_metadata, read_table, whole
from cellformers.report import fields, words
from cellformers.report.figures import Figure, Figures
from cellformers.report.spec import DatasetFiles, ReportSpec
from cellformers.selection import flags, read_column

MEASURES = (  # column, axis, logarithmic
    ("n_counts", "Total counts", True),
    ("n_genes", "Detected genes", True),
    ("mito_fraction", "Mitochondrial fraction", False),
    ("doublet_score", "Doublet score", False),
)
METHODS = {
    "sd": "within {n_sd:g} standard deviations of the mean",
    "mad": "within {n_sd:g} median absolute deviations (scaled) of the median",
    "fixed": "within fixed bounds",
    "none": "without bounds",
}


def categories(cells: Path, column: str) -> tuple[list[str], list[str | None]]:
    """Names of the cells, and their values in a column as text, None where missing."""
    labels = read_column(cells, column)
    names = np.array([*labels.names, None], dtype=object)  # a missing label has the code -1
    return read_table(cells, ["cell_id"])["cell_id"].to_pylist(), names[labels.codes].tolist()


def datasets(spec: ReportSpec, figures: Figures) -> list[dict[str, Any]]:
    """One entry a dataset: numbers of cells, criteria, figures of each threshold."""
    return [_dataset(name, files, figures) for name, files in spec.datasets.items()]


def _dataset(name: str, files: DatasetFiles, figures: Figures) -> dict[str, Any]:
    path = files.folder / "cells.parquet"
    passed, measured = _measured(path)
    n = len(passed)
    thresholds = _thresholds(files.folder / "qc" / "thresholds.json")
    bounds = thresholds.pop("bounds")
    drawn: list[Figure] = []
    for key, axis, log in MEASURES:
        values = measured.get(key)
        if values is None or not np.isfinite(values).any():
            continue
        low, high = bounds.get(key, (None, None))
        low = None if low is None or low < 0 else low  # excludes nothing

        def draw(
            stem: Path, key: str = key, axis: str = axis, log: bool = log, low: Any = low, high: Any = high
        ) -> None:
            plots.qc_histogram(
                measured[key], passed, stem, title=axis, xlabel=axis, low=low, high=high, log=log
            )  # fmt: skip

        text = f"{name}: distribution of {axis.lower()} over cells, with thresholds"
        drawn.append(figures.add(f"{name}-{key}", text, draw))
    if all(key in measured and np.isfinite(measured[key]).all() for key in ("n_counts", "n_genes")):
        drawn.append(
            figures.add(
                f"{name}-counts-genes",
                f"{name}: detected genes against total counts of each cell",
                lambda stem: plots.qc_scatter(
                    measured["n_counts"], measured["n_genes"], passed, stem, title="Genes against counts"
                ),
            )
        )
    return {
        "name": name,
        "cells": n,
        "passed": int(passed.sum()),
        "features": _rows(files.folder / "features.parquet"),
        "median_counts": _median(measured.get("n_counts"), passed),
        "median_genes": _median(measured.get("n_genes"), passed),
        "groups": _groups(path, files),
        **thresholds,
        "figures": drawn,
    }  # fmt: skip


def _measured(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which cells of a table passed, bool[n], and its measures, float64[n], NaN where missing."""
    table = read_table(path)
    with whole(path):
        passed = np.ones(table.num_rows, dtype=bool)
        if "qc_pass" in table.column_names:
            passed = flags(table, "qc_pass")
        there = [key for key, _, _ in MEASURES if key in table.column_names and table.num_rows]
        return passed, {key: fields.measures(table, key) for key in there}


def _thresholds(path: Path) -> dict[str, Any]:
    """What QC recorded: method, criteria and where as the page says them, and bounds, (low, high) by measure."""
    found = _optional_json(path)
    with whole(path):
        parameters, criteria = fields.part(found, "parameters"), fields.part(found, "criteria")
        each = {key: fields.part(criteria, key) for key in criteria}
        return {
            "method": _method(parameters),
            "criteria": [{"name": words.criterion(k), **_bounds(k, c)} for k, c in each.items()],
            "where": _where(parameters),
            "bounds": {k: (fields.number(c, "low"), fields.number(c, "high")) for k, c in each.items()},
        }


def _method(parameters: dict[str, Any]) -> str | None:
    text = METHODS.get(fields.text(parameters, "method") or "")
    return None if text is None else text.format(n_sd=fields.number(parameters, "n_sd") or 0)


def _where(parameters: dict[str, Any]) -> str | None:
    """Which cells were asked for by their metadata, and how many at most."""
    where = fields.part(parameters, "where")
    asked = [f"{column} {' or '.join(fields.texts(where, column))}" for column in where]
    parts = [f"Only cells with {words.listing(asked)}"] if asked else []
    most = fields.count(parameters, "max_cells")
    if most is not None:
        parts.append(f"{'at' if parts else 'At'} most {words.count(most)} cells, drawn by their names")
    return "; ".join(parts) or None


def _bounds(key: str, criterion: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of thresholds: bounds as text, cells that fail, why it was skipped."""
    low, high = fields.number(criterion, "low"), fields.number(criterion, "high")
    digits = 3 if key == "mito_fraction" else 4
    return {
        "low": "–" if low is None else "below 0" if low < 0 else words.number(low, digits),
        "high": "–" if high is None else words.number(high, digits),
        "fail": fields.count(criterion, "n_fail") or 0,
        "skipped": fields.text(criterion, "skipped"),
    }


def _groups(path: Path, files: DatasetFiles) -> list[dict[str, Any]]:
    """What the label and the batch column hold."""
    found = []
    for role, column in (("label", files.label), ("batch", files.batch)):
        if column is None:
            continue
        _, values = categories(path, column)
        names = sorted({v for v in values if v is not None})
        missing = sum(v is None for v in values)
        found.append(
            {
                "role": role,
                "column": column,
                "n": len(names),
                "names": words.listing(names, 6),
                "missing": missing,
            }
        )
    return found  # fmt: skip


def _median(values: np.ndarray | None, passed: np.ndarray) -> float | None:
    if values is None or not passed.any():
        return None
    return float(np.median(values[passed]))


def _rows(path: Path) -> int | None:
    if not path.is_file():
        return None
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def _optional_json(path: Path) -> Any:
    return read_json(path) if path.is_file() else {}


def genes(spec: ReportSpec) -> list[dict[str, Any]]:
    """One row a dataset and vocabulary: what became of its features and of their counts."""
    rows = []
    for name, files in spec.datasets.items():
        for path in sorted((files.folder / "qc").glob("genes.*.json")):
            vocabulary = path.name.removeprefix("genes.").removesuffix(".json")
            if files.tokens and vocabulary not in files.tokens:
                continue  # left by an earlier run of another configuration
            rows.append({"dataset": name, "vocabulary": vocabulary, **_mapping(path)})
    return rows


def _mapping(path: Path) -> dict[str, Any]:
    """What became of the features of a dataset, by the report of `genes`."""
    report = _optional_json(path)
    with whole(path):
        features, examples = fields.part(report, "features"), fields.part(report, "examples")
        listed = {key: fields.texts(examples, key) for key in examples}
        return {
            **{key: fields.count(features, key) for key in ("all", "mapped", "summed")},
            "genes": fields.count(report, "genes"),
            "dropped": sum(fields.count(features, key) or 0 for key in ("outside", "unknown", "spike_ins")),
            "spike_ins": fields.count(features, "spike_ins") or 0,
            "share": fields.number(fields.part(report, "shares"), "mapped"),
            "examples": [(k.replace("_", " "), words.listing(v, 5)) for k, v in listed.items() if v],
        }


def _lengths(shard: Path) -> np.ndarray:
    """Tokens of each cell of a shard, int64[n]."""
    table = read_table(shard, ["length"])
    with whole(shard):
        return as_numbers(table["length"].cast(pa.int32())).astype(np.int64)


def tokens(spec: ReportSpec, figures: Figures) -> list[dict[str, Any]]:
    """One entry a dataset and vocabulary: distribution of tokens per cell."""
    entries = []
    for name, files in spec.datasets.items():
        for vocabulary, shards in files.tokens.items():
            if not shards:
                continue
            lengths = np.concatenate([_lengths(path) for path in shards])
            made = read_metadata(shards[0])
            with whole(shards[0]):
                context = fields.count(fields.part(made, "parameters"), "context_length")

            def draw(stem: Path, lengths: Any = lengths, context: Any = context, name: str = name) -> None:
                title = f"{words.title(name)}: tokens per cell"
                plots.tokens_per_cell(lengths, stem, title=title, context_length=context)

            text = f"{name}: distribution of tokens per cell in the vocabulary {vocabulary}"
            entries.append(
                {
                    "dataset": name,
                    "vocabulary": vocabulary,
                    "cells": len(lengths),
                    "tokens": int(lengths.sum()),
                    "median": float(np.median(lengths)) if len(lengths) else None,
                    "context": context,
                    "full": float((lengths >= context).mean()) if context and len(lengths) else None,
                    "figure": figures.add(f"{name}-tokens-{vocabulary}", text, draw),
                }
            )
    return entries
