"""Quality control: metrics per shard, thresholds per dataset, and which cells pass.

    cellformers qc-metrics counts/0001-of-0001.h5ad -o metrics.parquet
    cellformers qc metrics.parquet --metadata metadata.parquet -o cells.parquet --report qc

The default is what the Genecorpus did (Theodoris et al., Nature 618:616, 2023, Methods): within each dataset, total
counts and mitochondrial fraction within three standard deviations of their means, and at least seven detected
genes. Thresholds are those of the whole dataset, never of a shard. Which cells are of interest may be said first, by
their metadata (`where`, and the column `excluded` that a deposit brings); thresholds are then those of these cells.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cellformers.counts import RESERVED, canonical_blocks, row_totals, shard_digest
from cellformers.errors import UserError, did_you_mean
from cellformers.folds import hash_order
from cellformers.genes import is_mitochondrial
from cellformers.io.files import (
    atomic_path,
    open_parquet,
    read_json,
    read_metadata,
    read_table,
    stamp,
    whole,
    write_json,
    write_table,
)
from cellformers.io.source import Array, open_counts
from cellformers.progress import progress
from cellformers.revisions import REVISIONS
from cellformers.selection import encode, flags, read_column

MEASURED = ("cell_id", "n_counts", "n_genes", "mito_fraction")
SCORED = ("cell_id", "doublet_score", "predicted_doublet")
METHODS = ("sd", "mad", "fixed", "none")
DRAWN = ("n_counts", "n_genes", "mito_fraction", "doublet_score")
MAD_TO_SD = 1.4826  # 1 / the 75 % quantile of the standard normal: a MAD times this estimates an SD


@dataclass(frozen=True, kw_only=True)
class QCParameters:
    """Which cells pass.

    Parameters
    ----------
    method
        `sd`: n_counts and mito_fraction within n_sd population standard deviations of the mean; `mad`: the same
        with medians and 1.4826 x median absolute deviation, of log(1 + n_counts) and mito_fraction; `fixed`: the
        bounds given here; `none`: neither.
    n_sd
        Width for `sd` and `mad`.
    min_genes
        Detected features that a cell must have, with every method.
    max_genes, min_counts, max_counts, max_mito_fraction
        Bounds (inclusive) for `fixed`.
    where
        Values to keep by metadata column, compared as text; a cell needs one of the values in every column.
    max_cells, seed
        Keep so many of the cells that pass all else, drawn by a hash of cell_id and seed.
    """

    method: str = "sd"
    n_sd: float = 3.0
    min_genes: int = 7
    max_genes: int | None = None
    min_counts: float | None = None
    max_counts: float | None = None
    max_mito_fraction: float | None = None
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    max_cells: int | None = None
    seed: int = 0


def qc_metrics(shard: str | Path, output: str | Path, *, quiet: bool = True) -> None:
    """Write cell_id, n_counts (all features), n_genes (features detected) and mito_fraction of a shard's cells.

    mito_fraction is null where the file has no mitochondrial genes, and in a cell without counts.

    Raises
    ------
    UserError
        If the file is not a counts shard.
    """
    digest = shard_digest(shard)
    with open_counts(shard) as source, progress("qc", source.n_cells, quiet=quiet) as advance:
        mitochondrial = is_mitochondrial(source.feature_ids, source.feature_symbols)
        n_counts, n_mito = np.zeros((2, source.n_cells), np.int64)
        n_genes = np.zeros(source.n_cells, np.int32)
        for block in canonical_blocks(source):
            rows = slice(block.start, block.start + block.n_cells)
            n_counts[rows] = row_totals(block.indptr, block.data)
            n_genes[rows] = np.diff(block.indptr)
            if mitochondrial.any():
                n_mito[rows] = row_totals(block.indptr, np.where(mitochondrial[block.indices], block.data, 0))
            advance(block.n_cells)
        known = n_counts > 0 if mitochondrial.any() else np.zeros(source.n_cells, bool)
        table = pa.table(
            {
                "cell_id": source.names,
                "n_counts": n_counts,
                "n_genes": n_genes,
                "mito_fraction": pa.array(n_mito / np.maximum(n_counts, 1), mask=~known),
            }
        )
    write_table(table, output, stamp("qc", REVISIONS["qc"], parameters={}, inputs={"dataset": digest}))


def qc(
    metrics: Sequence[str | Path],
    metadata: str | Path,
    *,
    output: str | Path,
    thresholds: str | Path,
    parameters: QCParameters | None = None,
    doublets: str | Path | None = None,
) -> dict[str, Any]:
    """Decide which cells pass; write all cells with their metadata, and the thresholds.

    Criteria come in order, and each counts the cells that those before it left: `where`, one for each reason in the
    metadata column `excluded`, then the measures and flags (side by side: a cell may fail several), then `max_cells`.
    Thresholds are computed on the cells that `where` selects and nothing excludes.

    Parameters
    ----------
    metrics
        What `qc_metrics` wrote, for all shards in order.
    metadata
        The dataset's metadata, by `ingest`. Cells whose `filter_pass` is false do not pass, nor those with a reason
        in the column `excluded` (text; missing: the cell stays).
    output, thresholds
        The table of cells (Parquet) and the thresholds (JSON, also returned).
    doublets
        What `doublets.score_doublets` wrote: predicted doublets do not pass.

    Raises
    ------
    UserError
        If no cell passes, if no cell has a column or value of `where`, or if the tables are not about the same cells.
    """
    parameters = parameters or QCParameters()
    _check(parameters)
    digest, table = _gather(metrics, metadata)
    labels = read_table(metadata).drop_columns(["cell_id"])
    columns = {name: table.column(name) for name in MEASURED}
    if doublets is not None:
        scores = _same_dataset(doublets, digest, SCORED)
        if not scores.column("cell_id").equals(columns["cell_id"]):
            raise UserError(
                "is not about the cells of the metadata in order", path=doublets, fix="make it again"
            )
        columns |= {name: scores.column(name) for name in SCORED}
    if "filter_pass" in labels.column_names:
        columns["filter_pass"] = labels.column("filter_pass")
        labels = labels.drop_columns(["filter_pass"])
    selected, criteria = _select(metadata, parameters.where)
    passed, more = _judge(pa.table(columns), selected, parameters)
    criteria |= more
    summary = {
        **stamp("qc", REVISIONS["qc"], parameters=_recorded(parameters), inputs={"dataset": digest}),
        "n_cells": table.num_rows,
        "n_selected": int(selected.sum()),
        "n_pass": int(passed.sum()),
        "criteria": criteria,
    }
    if not passed.any():
        raise UserError(
            f"no cell passes QC ({_blame(criteria, table.num_rows)})",
            path=metadata,
            fix="change the keys of qc:",
        )
    columns["qc_pass"] = pa.array(passed)
    taken = [name for name in labels.column_names if name in columns or name in RESERVED]
    if taken:
        raise UserError(
            f"column {taken[0]!r} has a name that QC gives", path=metadata, fix="make it by `ingest`"
        )
    cells = pa.table({**columns, **{name: labels.column(name) for name in labels.column_names}})
    with atomic_path(output) as part:
        made = {key: summary[key] for key in ("cellformers", "step", "revision", "parameters", "inputs")}
        write_table(cells, part, made)
        write_json(summary, thresholds)
    return summary


def _check(parameters: QCParameters) -> None:
    if parameters.method not in METHODS:
        raise UserError(f"no QC method {parameters.method!r}", fix=did_you_mean(parameters.method, METHODS))
    if parameters.max_cells is not None and parameters.max_cells < 1:
        raise UserError(f"can't keep {parameters.max_cells} cells", fix="give max_cells of 1 or more")


def _recorded(parameters: QCParameters) -> dict[str, Any]:
    """The parameters as artefacts name them: the order in which conditions were given does not show."""
    where = {column: sorted(set(values)) for column, values in sorted(parameters.where.items())}
    return {**asdict(parameters), "where": where}


def _gather(metrics: Sequence[str | Path], metadata: str | Path) -> tuple[str, pa.Table]:
    """The shards' metrics one below the other, checked to be those of the metadata's cells in order."""
    digest = read_metadata(metadata).get("inputs", {}).get("dataset")
    if digest is None:
        raise UserError(
            "not the metadata of a dataset", path=metadata, fix="make it with `cellformers ingest`"
        )
    with whole(metrics[0]):
        table = pa.concat_tables([_same_dataset(path, digest, MEASURED) for path in metrics])
    if not table.column("cell_id").equals(read_table(metadata, ["cell_id"]).column("cell_id")):
        raise UserError(
            f"the {len(metrics)} shards' metrics are not those of its cells in order",
            path=metadata,
            fix="give the metrics of all shards in order",
        )
    return digest, table


def _same_dataset(path: str | Path, digest: str, columns: Sequence[str]) -> pa.Table:
    """The columns of a table about the dataset: names of cells, then numbers."""
    if read_metadata(path).get("inputs", {}).get("dataset") != digest:
        raise UserError("was made from another dataset than the metadata", path=path, fix="make it again")
    table = read_table(path, list(columns))
    for name in columns[1:]:
        kind = table.column(name).type
        real = pa.types.is_floating(kind)
        if not (real or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
            raise UserError(f"its column {name!r} holds {kind}, no numbers", path=path, fix="make it again")
        if real and pc.any(pc.greater(pc.abs(table.column(name).cast("double")), 1e18)).as_py():
            raise UserError(f"its column {name!r} has huge values", path=path, fix="make it again")
    return table


def _select(table: str | Path, where: Mapping[str, Sequence[str]]) -> tuple[Array, dict[str, dict[str, Any]]]:
    """Which cells of a table of cells the metadata leave, bool[n_cells], and how many each reason took."""
    with open_parquet(table) as file:
        n_cells, columns = file.metadata.num_rows, file.schema_arrow.names
    selected = np.ones(n_cells, bool)
    criteria: dict[str, dict[str, Any]] = {}
    for column, values in where.items():
        labels = read_column(table, column)
        for value in values:
            if value not in labels.names:
                raise UserError(
                    f"no cell has {column} {value!r}", path=table, fix=did_you_mean(value, labels.names)
                )
        selected &= np.isin(labels.codes, [labels.names.index(value) for value in values])
    if where:
        criteria["where"] = {"n_fail": int((~selected).sum())}
    if "excluded" in columns:
        codes, reasons = _reasons(table)
        for code, reason in enumerate(reasons):
            criteria[f"excluded: {reason}"] = {"n_fail": int((selected & (codes == code)).sum())}
        selected &= codes < 0
    return selected, criteria


def _reasons(table: str | Path) -> tuple[Array, list[str]]:
    """The column `excluded`: which of the reasons each cell has (-1: none), and the reasons."""
    column = read_table(table, ["excluded"]).column("excluded")
    if column.null_count == len(column):  # the type of a column without values is anyone's guess
        return np.full(len(column), -1), []
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_boolean(kind):
        return np.where(column.fill_null(False).to_numpy(), 0, -1), ["yes"]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(
            f"column 'excluded' holds {kind}, no reasons to leave cells out",
            path=table,
            fix="write reasons as text, or give the column another name",
        )
    return encode(column, name="excluded", path=table)


def _judge(
    cells: pa.Table, selected: Array, parameters: QCParameters
) -> tuple[Array, dict[str, dict[str, Any]]]:
    """Which of all cells pass, bool[n_cells], and the criteria that the selected ones had to meet."""
    cells = cells.filter(pa.array(selected))
    criteria = _criteria({name: cells.column(name) for name in cells.column_names}, parameters)
    passed = np.ones(cells.num_rows, bool)
    for criterion in criteria.values():
        passed &= ~criterion.pop("fails")
    if parameters.max_cells is not None:
        rows = np.flatnonzero(passed)
        criteria["max_cells"] = {"n_fail": max(0, len(rows) - parameters.max_cells)}
        names = cells.column("cell_id").take(pa.array(rows)).to_pylist()
        # a salt of its own: later draws by the same seed are independent of this one
        drawn = hash_order(names, seed=parameters.seed, salt="qc")[: parameters.max_cells]
        passed = np.zeros(cells.num_rows, bool)
        passed[rows[drawn]] = True
    result = np.zeros(len(selected), bool)
    result[np.flatnonzero(selected)[passed]] = True
    return result, criteria


def _criteria(columns: Mapping[str, Any], parameters: QCParameters) -> dict[str, dict[str, Any]]:
    """Each criterion's bounds, the cells below and above, and `fails`, bool[n_cells]."""
    n_counts = columns["n_counts"].to_numpy().astype(np.float64)
    mito = columns["mito_fraction"].to_numpy()  # NaN where null
    p = parameters
    most = p.max_genes if p.method == "fixed" else None
    criteria = {"n_genes": _between(columns["n_genes"].to_numpy(), low=p.min_genes or None, high=most)}
    if p.method == "fixed":
        criteria["n_counts"] = _between(n_counts, low=p.min_counts, high=p.max_counts)
        criteria["mito_fraction"] = _between(mito, high=p.max_mito_fraction)
    elif p.method == "sd":
        criteria["n_counts"] = _about_mean(n_counts, p.n_sd)
        criteria["mito_fraction"] = _about_mean(mito, p.n_sd)
    elif p.method == "mad":
        criteria["n_counts"] = _about_median(n_counts, p.n_sd, logarithmic=True)
        criteria["mito_fraction"] = _about_median(mito, p.n_sd)
    if p.method != "none" and np.isnan(mito).all():
        criteria["mito_fraction"]["skipped"] = "the file has no mitochondrial genes"
    for name, column in (("filter_pass", "filter_pass"), ("doublets", "predicted_doublet")):
        if column in columns:
            values = columns[column].to_numpy(zero_copy_only=False).astype(object)
            bad = column != "filter_pass"
            fails = np.array([flag is not None and bool(flag) == bad for flag in values], bool)
            criteria[name] = {"n_fail": int(fails.sum()), "fails": fails}
    return criteria


def _between(values: Array, *, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Inclusive bounds; missing values pass."""
    below = np.zeros(len(values), bool) if low is None else values < low
    above = np.zeros(len(values), bool) if high is None else values > high
    fails = below | above
    return {
        "low": low,
        "high": high,
        "n_below": int(below.sum()),
        "n_above": int(above.sum()),
        "n_fail": int(fails.sum()),
        "skipped": "no bound is set" if low is None and high is None else None,
        "fails": fails,
    }


def _about_mean(values: Array, width: float) -> dict[str, Any]:
    """Bounds mean +- width x SD (population SD). Sums are exactly rounded, so any order of cells gives the same."""
    known = values[~np.isnan(values)]
    if not len(known):
        return _between(values)
    mean = math.fsum(known) / len(known)
    sd = math.sqrt(math.fsum((known - mean) ** 2) / len(known))
    if known.min() == known.max():  # the mean of equal values may differ from them in the last bit
        return {**_between(values), "mean": float(known[0]), "sd": 0.0, "skipped": "SD 0 keeps all cells"}
    return {**_between(values, low=mean - width * sd, high=mean + width * sd), "mean": mean, "sd": sd}


def _about_median(values: Array, width: float, *, logarithmic: bool = False) -> dict[str, Any]:
    """Bounds median +- width x 1.4826 x MAD, on the scale of log(1 + x) if `logarithmic`; reported as they are used.

    The reported bounds and median are in the values' own units, the MAD is on the scale it was taken on.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return _between(values)
    scaled = np.log1p(known) if logarithmic else known
    median = float(np.median(scaled))
    mad = float(np.median(np.abs(scaled - median)))
    back = math.expm1 if logarithmic else float
    about = {"median": float(np.median(known)), "mad": mad}
    if mad == 0:
        return {**_between(values), **about, "skipped": "MAD 0 keeps all cells"}
    reach = width * MAD_TO_SD * mad
    return {**_between(values, low=back(median - reach), high=back(median + reach)), **about}


def _blame(criteria: Mapping[str, Mapping[str, Any]], n_cells: int) -> str:
    """How many cells each criterion removed, the worst first."""
    worst = sorted(criteria.items(), key=lambda item: -item[1]["n_fail"])
    parts = [f"{name} removes {c['n_fail']:,} of {n_cells:,}" for name, c in worst if c["n_fail"]]
    return ", ".join(parts)


class Distribution(NamedTuple):
    """One QC measure for a figure: values[n_selected] (NaN where null), which cells pass, the bounds that apply."""

    values: Array
    passes: Array
    low: float | None
    high: float | None
    skipped: str | None


def distributions(cells: str | Path, thresholds: str | Path) -> dict[str, Distribution]:
    """n_counts, n_genes, mito_fraction and doublet_score (where there) with their thresholds.

    Of the cells that QC was asked to look at: what `where` or a reason in `excluded` left out has no thresholds.
    """
    made = read_json(thresholds)
    with whole(thresholds):
        where = {
            str(column): list(map(str, values))
            for column, values in (made["parameters"].get("where") or {}).items()
        }
        bounds = {name: _recorded_bounds(made["criteria"].get(name, {})) for name in DRAWN}
    selected, _ = _select(cells, where)
    table = read_table(cells).filter(pa.array(selected))
    with whole(cells):
        passes = flags(table, "qc_pass")
        there = [name for name in DRAWN if name in table.column_names]
        values = {name: table.column(name).to_numpy().astype(np.float64) for name in there}
    return {name: Distribution(values[name], passes, *bounds[name]) for name in there}


def _recorded_bounds(criterion: Mapping[str, Any]) -> tuple[float | None, float | None, str | None]:
    """Low, high and why it was skipped, of one of the criteria that `qc` recorded."""
    low, high = (None if criterion.get(key) is None else float(criterion[key]) for key in ("low", "high"))
    skipped = criterion.get("skipped")
    return low, high, None if skipped is None else str(skipped)


def passing(cells: str | Path, names: pa.Array | None = None) -> Array:
    """Which cells pass QC, bool[n].

    Parameters
    ----------
    cells
        The dataset's table of cells, by `qc`.
    names
        Names of consecutive cells of the dataset, such as a shard's; None: all cells.

    Raises
    ------
    UserError
        If `names` are not consecutive cells of the table.
    """
    table = read_table(cells, ["cell_id", "qc_pass"])
    with whole(cells):
        passed = flags(table, "qc_pass")
    if names is None or not len(names):
        return passed if names is None else passed[:0]
    ids = table.column("cell_id")
    first = pc.index(ids, names[0]).as_py()
    if first < 0 or not ids.slice(first, len(names)).equals(pa.chunked_array([names])):
        raise UserError(
            f"does not hold the cells from {names[0].as_py()!r} to {names[-1].as_py()!r} in order",
            path=cells,
            fix="give the cells.parquet of the same dataset",
        )
    return passed[first : first + len(names)]
