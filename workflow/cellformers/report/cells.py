"""Sections about cells: datasets and QC, gene mapping, tokens per cell."""

from pathlib import Path
from typing import Any

import numpy as np

from cellformers import plots
from cellformers.io.files import open_parquet, read_json, read_metadata, read_table
from cellformers.report import words
from cellformers.report.figures import Figure, Figures
from cellformers.report.spec import DatasetFiles, ReportSpec
from cellformers.selection import read_column

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
    table = read_table(path)
    present = set(table.column_names)
    n = table.num_rows
    passed = np.ones(n, dtype=bool)
    if "qc_pass" in present:
        passed = table["qc_pass"].combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)
    measured = {
        key: table[key].to_numpy().astype(np.float64) for key, _, _ in MEASURES if key in present and n
    }
    thresholds = _optional_json(files.folder / "qc" / "thresholds.json")
    criteria = thresholds.get("criteria", {})
    drawn: list[Figure] = []
    for key, axis, log in MEASURES:
        values = measured.get(key)
        if values is None or not np.isfinite(values).any():
            continue
        bounds = criteria.get(key, {})
        low, high = bounds.get("low"), bounds.get("high")
        low = None if low is None or low < 0 else low  # excludes nothing

        def draw(
            stem: Path, key: str = key, axis: str = axis, log: bool = log, low: Any = low, high: Any = high
        ) -> None:
            plots.qc_histogram(
                measured[key], passed, stem, title=axis, xlabel=axis, low=low, high=high, log=log
            )  # fmt: skip

        text = f"{name}: distribution of {axis.lower()} over cells, with thresholds"
        drawn.append(figures.add(f"{name}-{key}", text, draw))
    if {"n_counts", "n_genes"} <= set(measured):
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
        "method": _method(thresholds),
        "criteria": [{"name": words.criterion(k), **_bounds(k, c)} for k, c in criteria.items()],
        "where": _where(thresholds),
        "figures": drawn,
    }  # fmt: skip


def _method(thresholds: dict[str, Any]) -> str | None:
    parameters = thresholds.get("parameters", {})
    text = METHODS.get(str(parameters.get("method")))
    return None if text is None else text.format(n_sd=parameters.get("n_sd", 0))


def _where(thresholds: dict[str, Any]) -> str | None:
    """Which cells were asked for by their metadata, and how many at most."""
    parameters = thresholds.get("parameters", {})
    asked = [f"{column} {' or '.join(map(str, v))}" for column, v in (parameters.get("where") or {}).items()]
    parts = [f"Only cells with {words.listing(asked)}"] if asked else []
    if parameters.get("max_cells") is not None:
        parts.append(
            f"{'at' if parts else 'At'} most {words.count(parameters['max_cells'])} cells, drawn by their names"
        )
    return "; ".join(parts) or None


def _bounds(key: str, criterion: dict[str, Any]) -> dict[str, Any]:
    """A row of the table of thresholds: bounds as text, cells that fail, why it was skipped."""
    low, high = criterion.get("low"), criterion.get("high")
    digits = 3 if key == "mito_fraction" else 4
    return {
        "low": "–" if low is None else "below 0" if low < 0 else words.number(low, digits),
        "high": "–" if high is None else words.number(high, digits),
        "fail": criterion.get("n_fail", 0),
        "skipped": criterion.get("skipped"),
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


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(read_json(path)) if path.is_file() else {}


def genes(spec: ReportSpec) -> list[dict[str, Any]]:
    """One row a dataset and vocabulary: what became of its features and of their counts."""
    rows = []
    for name, files in spec.datasets.items():
        for path in sorted((files.folder / "qc").glob("genes.*.json")):
            vocabulary = path.name.removeprefix("genes.").removesuffix(".json")
            if files.tokens and vocabulary not in files.tokens:
                continue  # left by an earlier run of another configuration
            report = _optional_json(path)
            features = report.get("features", {})
            dropped = sum(features.get(k, 0) for k in ("outside", "unknown", "spike_ins"))
            examples = report.get("examples", {})
            rows.append(
                {
                    "dataset": name,
                    "vocabulary": vocabulary,
                    "all": features.get("all"),
                    "mapped": features.get("mapped"),
                    "genes": report.get("genes"),
                    "summed": features.get("summed"),
                    "dropped": dropped,
                    "spike_ins": features.get("spike_ins", 0),
                    "share": report.get("shares", {}).get("mapped"),
                    "examples": [(k.replace("_", " "), words.listing(v, 5)) for k, v in examples.items() if v],
                }
            )  # fmt: skip
    return rows


def tokens(spec: ReportSpec, figures: Figures) -> list[dict[str, Any]]:
    """One entry a dataset and vocabulary: distribution of tokens per cell."""
    entries = []
    for name, files in spec.datasets.items():
        for vocabulary, shards in files.tokens.items():
            if not shards:
                continue
            lengths = np.concatenate([read_table(p, ["length"])["length"].to_numpy() for p in shards])
            context = read_metadata(shards[0]).get("parameters", {}).get("context_length")

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
