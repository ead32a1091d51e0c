"""Figures of quality control and of tokens per cell."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import ArrayLike

from cellformers.plots.style import (
    ACCENT,
    FAILED,
    INK,
    MUTED,
    WARN,
    WIDTH,
    count_text,
    dots,
    draw_figure,
    legend_below,
    log_axis,
)


def _histogram(
    axes: Axes,
    values: ArrayLike,
    passed: ArrayLike,
    *,
    title: str,
    xlabel: str,
    low: float | None,
    high: float | None,
    log: bool,
    legend: bool = True,
) -> None:
    x = np.asarray(values, dtype=np.float64)
    ok = np.asarray(passed, dtype=bool)[np.isfinite(x)]
    x = x[np.isfinite(x)]
    shown = np.maximum(x, 1.0) if log else x  # a cell without counts stands at 1 on a log axis
    first, last = (float(shown.min()), float(shown.max())) if len(shown) else (1.0, 10.0)
    if last <= first:
        first, last = (first / 2, first * 2) if log else (first - 0.5, first + 0.5)
    n_bins = int(np.clip(np.sqrt(max(len(x), 1)) * 1.5, 10, 60))
    edges = np.geomspace(first, last, n_bins + 1) if log else np.linspace(first, last, n_bins + 1)
    groups: list[np.ndarray] = [shown[ok], shown[~ok]]
    axes.hist(
        groups, bins=edges.tolist(), stacked=True, histtype="stepfilled", color=[ACCENT, FAILED], linewidth=0
    )
    bounds = [b for b in (low, high) if b is not None and np.isfinite(b) and (b > 0 or not log)]
    for bound in bounds:
        axes.axvline(bound, color=WARN, linewidth=1.3, linestyle=(0, (4, 2)))
    if log:
        axes.set_xscale("log")
        inside = [b for b in bounds if first / 10 < b < last * 10]
        log_axis(axes.xaxis, min([first, *inside]), max([last, *inside]))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(count_text))
    axes.set(title=title, xlabel=xlabel, ylabel="Cells")
    if legend:
        handles: list[Any] = [Patch(color=ACCENT, label=f"pass ({ok.sum():,})")]
        if (~ok).any():
            handles.append(Patch(color=FAILED, label=f"fail ({(~ok).sum():,})"))
        if bounds:
            handles.append(Line2D([], [], color=WARN, linestyle=(0, (4, 2)), label="threshold"))
        legend_below(axes, handles)


def qc_histogram(
    values: ArrayLike,
    passed: ArrayLike,
    stem: str | Path,
    *,
    title: str,
    xlabel: str,
    low: float | None = None,
    high: float | None = None,
    log: bool = False,
) -> None:
    """Distribution of one QC metric over cells, passing and failing, with its thresholds marked.

    Parameters
    ----------
    values
        One number a cell; not finite ones are left out.
    passed
        bool, one a cell: passed all criteria.
    low, high
        Thresholds in the units of `values`.
    log
        Logarithmic axis, bins equal in the logarithm.
    """

    def draw(figure: Figure) -> None:
        _histogram(figure.subplots(), values, passed, title=title, xlabel=xlabel, low=low, high=high, log=log)

    draw_figure(stem, (WIDTH, 3.3), draw)


def _scatter(axes: Axes, n_counts: ArrayLike, n_genes: ArrayLike, passed: ArrayLike, *, title: str) -> None:
    x = np.maximum(np.asarray(n_counts, dtype=np.float64), 1.0)
    y = np.maximum(np.asarray(n_genes, dtype=np.float64), 1.0)
    ok = np.asarray(passed, dtype=bool)
    size = float(np.clip(3000 / max(len(x), 1), 1.5, 12))
    for mask, colour in ((ok, ACCENT), (~ok, WARN)):  # failing cells on top: they are what one looks for
        axes.scatter(
            x[mask],
            y[mask],
            s=size,
            c=colour,
            alpha=0.6 if len(x) > 300 else 0.9,
            linewidths=0,
            rasterized=True,
        )
    axes.set(xlabel="Total counts", ylabel="Detected genes", title=title)
    if len(x):
        axes.set(xscale="log", yscale="log")
        log_axis(axes.xaxis, float(x.min()), float(max(x.max(), x.min() * 2)))
        log_axis(axes.yaxis, float(y.min()), float(max(y.max(), y.min() * 2)))


def qc_scatter(
    n_counts: ArrayLike, n_genes: ArrayLike, passed: ArrayLike, stem: str | Path, *, title: str
) -> None:
    """Detected genes against total counts, one point a cell, coloured by whether the cell passes."""
    ok = np.asarray(passed, dtype=bool)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _scatter(axes, n_counts, n_genes, ok, title=title)
        entries = [(f"pass ({ok.sum():,})", ACCENT)]
        if (~ok).any():
            entries.append((f"fail ({(~ok).sum():,})", WARN))
        legend_below(axes, dots(entries))

    draw_figure(stem, (WIDTH, 3.3), draw)


def qc_overview(
    metrics: Mapping[str, ArrayLike],
    passed: ArrayLike,
    stem: str | Path,
    *,
    bounds: Mapping[str, tuple[float | None, float | None]],
) -> None:
    """The QC of a dataset on one sheet: each metric with its thresholds, and genes against counts.

    Parameters
    ----------
    metrics
        Columns n_counts, n_genes and, where the dataset has mitochondrial genes, mito_fraction.
    bounds
        (low, high) by metric, None where there is no bound.
    """
    ok = np.asarray(passed, dtype=bool)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2, 2)
        panels = [
            ("n_counts", "Total counts", True),
            ("n_genes", "Detected genes", True),
            ("mito_fraction", "Mitochondrial fraction", False),
        ]
        for axes, (key, text, log) in zip(grid.flat[:3], panels, strict=True):
            values = metrics.get(key)
            if values is None or not np.isfinite(np.asarray(values, dtype=np.float64)).any():
                axes.set_axis_off()
                axes.text(0.5, 0.5, f"{text}:\nnot measured", ha="center", va="center", color=MUTED)
                continue
            low, high = bounds.get(key, (None, None))
            _histogram(axes, values, ok, title=text, xlabel=text, low=low, high=high, log=log, legend=False)
        _scatter(grid.flat[3], metrics["n_counts"], metrics["n_genes"], ok, title="Genes against counts")
        entries = [(f"pass ({ok.sum():,})", ACCENT)]
        if (~ok).any():
            entries.append((f"fail ({(~ok).sum():,})", FAILED))
        line = Line2D([], [], color=WARN, linestyle=(0, (4, 2)), label="threshold")
        legend_below(grid.flat[0], [*dots(entries, "s"), line])

    draw_figure(stem, (8.0, 6.2), draw)


def draw_thresholds(cells: str | Path, thresholds: str | Path, stem: str | Path) -> None:
    """Draw the QC of a dataset on one sheet from what `qc` wrote: cells.parquet and thresholds.json."""
    from cellformers.qc import distributions

    found = distributions(cells, thresholds)
    qc_overview(
        {name: measure.values for name, measure in found.items()},
        next(iter(found.values())).passes,
        stem,
        bounds={name: (measure.low, measure.high) for name, measure in found.items()},
    )


def tokens_per_cell(
    lengths: ArrayLike, stem: str | Path, *, title: str, context_length: int | None = None
) -> None:
    """Distribution of tokens per cell, its median, and the longest sequence the model reads."""
    n = np.asarray(lengths, dtype=np.int64)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        last = max(int(n.max(initial=1)), context_length or 1)
        axes.hist(
            n, bins=np.linspace(0, last + 1, 45).tolist(), histtype="stepfilled", color=ACCENT, linewidth=0
        )
        handles = []
        if len(n):
            median = float(np.median(n))
            axes.axvline(median, color=INK, linewidth=1.2)
            handles.append(Line2D([], [], color=INK, label=f"median {median:,.0f}"))
        if context_length is not None:
            full = float((n >= context_length).mean()) if len(n) else 0.0
            axes.axvline(context_length, color=WARN, linewidth=1.3, linestyle=(0, (4, 2)))
            label = f"context length {context_length:,} ({full:.1%} of cells reach it)"
            handles.append(Line2D([], [], color=WARN, linestyle=(0, (4, 2)), label=label))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(count_text))
        axes.set(title=title, xlabel="Tokens per cell", ylabel="Cells")
        if handles:
            legend_below(axes, handles)

    draw_figure(stem, (WIDTH, 3.3), draw)
