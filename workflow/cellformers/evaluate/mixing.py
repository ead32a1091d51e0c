"""Mixing: how far batches (donors, platforms) mix in an embedding while kinds of cells stay apart.

Runs as `cellformers mixing`, one benchmark and one method at a time; all methods are compared on the same cells.
Features are an embedding, principal components of counts (`pca_hvg`: no correction) or a method that is told the
batches (`harmony`, `combat`, `scvi`). With `permute` batches are shuffled over cells once the features are there:
what perfect mixing scores in all that depends on batches, which the connectivity of labels doesn't.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from cellformers import metrics
from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate import baselines, integration, mixing_metrics
from cellformers.evaluate.scores import check_kind, published_by_metric, write_score
from cellformers.evaluate.tables import Cells, aligned_vectors, read_cells, take_cells, tokenised
from cellformers.folds import hash_order, permuted
from cellformers.io.files import digest_arrays, stamp
from cellformers.revisions import REVISIONS

MixingFeatures = Literal["embedding", "pca_hvg", "harmony", "combat", "scvi"]
DATASET = "dataset"  # as the name of a batch column: the dataset is the batch
MAX_CELLS = 20_000
MIN_BATCH = 10  # cells; fewer have no neighbourhoods to speak of
RESAMPLED_AT_ONCE = 50


def _read(
    cells: Mapping[str, Path],
    tokens: Mapping[str, Sequence[Path]],
    *,
    batch: str,
    label: str | None,
    unit: str | None,
) -> tuple[Cells, np.ndarray | None, dict[str, int]]:
    """Cells that have all that is asked for, with their batch as unit; their donors, object[n]; who was left out."""
    column = None if batch == DATASET else batch
    table, excluded = read_cells(cells, label=label or column or "cell_id", unit=column)
    if column is not None:
        excluded["no batch"] = excluded.pop("no unit")
    if label is None:  # the column of batches, or the names, stood in for labels
        stood_in = excluded.pop("no label")
        if column is not None:
            excluded["no batch"] += stood_in
    table = Cells(table.dataset, table.cell_id, table.label, table.dataset if column is None else table.unit)
    known = tokenised(table, tokens)
    if not known.all():
        excluded["too few genes of a vocabulary"] = int((~known).sum())
        table = take_cells(table, known)
    if unit is None:
        return table, None, excluded
    placed, _ = read_cells(cells, label=unit)
    found = pd.Index(placed.keys()).get_indexer(pd.Index(table.keys()))
    kept = np.flatnonzero(found >= 0)
    excluded["no unit"] = len(table) - len(kept)
    return take_cells(table, kept), placed.label[found[kept]], excluded


def _drawn(cells: Cells, *, max_cells: int, seed: int) -> tuple[np.ndarray, dict[str, int], list[str]]:
    """Rows to compare, int64[n], how many were left out for which reason, and notes."""
    rows = np.sort(hash_order(cells.keys(), seed=seed, salt="mixing")[:max_cells])
    assert cells.unit is not None
    names, counts = np.unique(cells.unit[rows].astype(str), return_counts=True)
    small = names[counts < MIN_BATCH]
    kept = rows[~np.isin(cells.unit[rows].astype(str), small)]
    notes = []
    if len(rows) < len(cells):
        notes.append(f"{len(rows):,} of {len(cells):,} cells, drawn by their names")
    if len(small):
        notes.append(f"batches of fewer than {MIN_BATCH} cells left out: {', '.join(small)}")
    excluded = {"not drawn": len(cells) - len(rows), "in a small batch": len(rows) - len(kept)}
    return kept, excluded, notes


def _check(
    batch: np.ndarray, label: np.ndarray | None, names: tuple[str, str | None], path: Path | None
) -> None:
    """UserError unless there are two batches and, where labels are asked for, two labels."""
    for values, name, what in ((batch, names[0], "batches"), (label, names[1], "labels")):
        if values is not None and len(set(values)) < 2:
            found = f"only {values[0]!r} is left" if len(values) else "no cell is left"
            raise UserError(
                f"mixing needs two {what} of {name!r} with {MIN_BATCH} cells or more, {found}",
                path=path,
                fix="give cells of a second dataset" if name == DATASET else "choose another column",
            )


def _features(
    features: str,
    inputs: Mapping[str, Sequence[Path]],
    cells: Cells,
    batch: np.ndarray,
    *,
    vocabulary: Path | None,
    seed: int,
    threads: int,
) -> tuple[np.ndarray, str, list[str]]:
    """Coordinates of the cells, float[n, dim], the digest of what they come from, and notes."""
    if features == "embedding":
        vectors = aligned_vectors(cells, inputs)
        return vectors, digest_arrays(vectors), []
    counts = baselines.aligned_counts(cells, inputs, vocabulary=vocabulary)
    notes = [f"{len(counts.genes):,} genes in common"] if len(set(cells.dataset)) > 1 else []
    if features == "pca_hvg":
        X = integration.uncorrected(counts, seed=seed)
    else:
        notes.append("fitted on the cells that are compared, and told their batches")
        if features == "harmony":
            pcs = integration.uncorrected(counts, seed=seed)
            X = integration.harmony(pcs, batch, seed=seed, threads=threads)
        elif features == "combat":
            X = integration.combat(counts, batch, seed=seed)
        else:
            X = integration.scvi(counts, batch, seed=seed)
    return X, counts.digest(), notes


def resample_median(values: np.ndarray, units: np.ndarray, *, seed: int) -> np.ndarray:
    """Medians of the cells of units drawn with replacement, float64[resamples].

    Parameters
    ----------
    values
        float64[n], one a cell.
    units
        Unit of each cell, object[n] of str.
    """
    names, number = np.unique(units.astype(str), return_inverse=True)
    chance = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), chance, size=metrics.RESAMPLES)
    order = np.argsort(values, kind="stable")
    medians = []
    for start in range(0, len(draws), RESAMPLED_AT_ONCE):
        below = np.cumsum(draws[start : start + RESAMPLED_AT_ONCE][:, number[order]], axis=1)
        middle = (2 * below < below[:, -1:]).sum(axis=1)
        medians.append(values[order[middle]])
    return np.concatenate(medians)


def _interval(
    ilisi: np.ndarray, units: np.ndarray | None, what: str, *, seed: int
) -> tuple[dict[str, Any], tuple[float, float] | None]:
    """What the score says of its interval, and the interval of the iLISI."""
    said: dict[str, Any] = {
        "method": "percentile bootstrap",
        "level": metrics.LEVEL,
        "resamples": metrics.RESAMPLES,
        "resampled": None,
        "note": None,
    }
    if units is None:
        return said | {"note": "datasets are no sample of anything: see the value of each"}, None
    n = len(set(units))
    if n < metrics.MIN_UNITS:
        return said | {
            "note": f"{n} units ({what}) are too few for an interval: see the value of each batch"
        }, None
    said |= {"resampled": what, "note": "of the iLISI only; neighbours are not searched again"}
    return said, metrics.percentile_interval(resample_median(ilisi, units, seed=seed))


def _entries(
    found: mixing_metrics.Mixing, batch: np.ndarray, ends: tuple[float, float] | None
) -> dict[str, Any]:
    """The metrics of the score: the iLISI with its interval and the median of each batch, all others as they are."""
    entries = {name: metrics.metric(value, None, []) for name, value in found.values.items()}
    by_batch = {name: float(np.median(found.ilisi[batch == name])) for name in sorted(set(batch))}
    entries["ilisi"] = metrics.metric(found.values["ilisi"], ends, [], units=by_batch)
    return entries


def measure_mixing(
    *,
    benchmark: str,
    method: str,
    kind: str,
    cells: Mapping[str, Path],
    features: str,
    inputs: Mapping[str, Sequence[Path]],
    batch: str,
    output: str | Path,
    label: str | None = None,
    unit: str | None = None,
    tokens: Mapping[str, Sequence[Path]] | None = None,
    max_cells: int = MAX_CELLS,
    permute: bool = False,
    vocabulary: Path | None = None,
    published: Sequence[Mapping[str, Any]] = (),
    note: str | None = None,
    seed: int = 0,
    threads: int = 1,
) -> dict[str, Any]:
    """Measure how far batches mix in the features of one method, and write the score.

    Parameters
    ----------
    benchmark, method, kind
        Names for the tables; kind is `model`, `baseline`, `control` or `oracle`.
    cells
        `cells.parquet` by dataset. Cells count that passed QC and have a batch, a label and a unit.
    features, inputs
        What is measured, and its files by dataset: embedding shards or one .h5ad for `embedding`, counts shards for
        all others.
    batch
        Column of batches, or `dataset`.
    label
        Column of what has to stay apart; None: only mixing is measured.
    unit
        Column of donors to resample for the interval of the iLISI; None: the batches.
    tokens
        Token shards by dataset, in all vocabularies of the benchmark: cells without tokens in one are left out.
    max_cells
        Of more cells than this so many are drawn by a hash of their names and the seed.
    permute
        Shuffle the batches over the cells, once the features are there: a control, what perfect mixing scores.
    vocabulary
        Maps ids and symbols to genes where datasets name them differently.
    published
        Published numbers to show beside, {"metric", "value", "source"}.
    note
        A caveat to print beside every score.
    threads
        Don't change the result.

    Returns
    -------
    The score as written; its metrics are those of `mixing_metrics`, the iLISI with the value of each batch.

    Raises
    ------
    UserError
        If a column or file is missing, files lack cells, there is one batch or one label only, or a package that
        the method needs is not installed.
    """
    check_kind(kind)
    numbers = published_by_metric(published, task="mixing")
    if features not in get_args(MixingFeatures):
        raise UserError(
            f"unknown features {features!r}", fix=did_you_mean(features, get_args(MixingFeatures))
        )
    table, donors, excluded = _read(cells, tokens or {}, batch=batch, label=label, unit=unit)
    rows, drawn, notes = _drawn(table, max_cells=max_cells, seed=seed)
    table, donors = take_cells(table, rows), None if donors is None else donors[rows]
    assert table.unit is not None
    batches, labels = table.unit, None if label is None else table.label
    _check(batches, labels, (batch, label), next(iter(cells.values())) if len(cells) == 1 else None)
    X, digest, said = _features(
        features, inputs, table, batches, vocabulary=vocabulary, seed=seed, threads=threads
    )
    shown = permuted(batches, table.keys(), seed=seed) if permute else batches
    found = mixing_metrics.measure(X, shown, labels, threads=threads)
    units = donors if unit is not None else None if batch == DATASET else shown
    interval, ends = _interval(found.ilisi, units, unit or batch, seed=seed)
    notes = [*([note] if note else []), *notes, *said, *found.notes]
    if permute:
        notes.append(
            "batches shuffled over cells: what perfect mixing scores (graph connectivity asks for labels only)"
        )
    score = {
        "benchmark": benchmark,
        "task": "mixing",
        "dataset": "+".join(sorted(cells)),
        "method": method,
        "kind": kind,
        "label": label or "",
        "classes": [] if labels is None else sorted(set(labels)),
        "split": {
            "kind": "all cells", "unit": batch, "seed": seed, "folds": 0, "names": [], "units": None,
            "excluded": excluded | drawn,
        },
        "batches": {name: int(np.count_nonzero(batches == name)) for name in sorted(set(batches))},
        "n": len(table),
        "interval": interval,
        "metrics": _entries(found, shown, ends),
        "chance": {},
        "published": numbers,
        "notes": notes,
    }  # fmt: skip
    parameters = {
        "features": features, "batch": batch, "label": label, "unit": unit, "max_cells": max_cells,
        "permute": permute, "seed": seed,
    }  # fmt: skip
    # all methods of a benchmark have to be compared on one choice of cells, as others are on one split
    read = {"split": digest_arrays(table.dataset, table.cell_id, batches, table.label), "features": digest}
    score |= stamp("mixing", REVISIONS["mixing"], parameters=parameters, inputs=read)
    write_score(score, output)
    return score
