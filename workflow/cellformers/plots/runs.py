"""Figures of training and of what a run cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator
from numpy.typing import ArrayLike

from cellformers.plots.style import (
    ACCENT,
    FAILED,
    MUTED,
    SECOND,
    WARN,
    WIDTH,
    count_text,
    draw_figure,
    duration,
    legend_below,
    shorten,
)


def loss_curve(
    steps: ArrayLike,
    train: ArrayLike,
    heldout: ArrayLike,
    stem: str | Path,
    *,
    unigram_entropy: float | None = None,
    title: str = "Masked-gene loss",
) -> None:
    """Training and held-out loss over optimiser steps, in nats a masked gene.

    Parameters
    ----------
    steps, train, heldout
        One value a step; NaN where it was not measured.
    unigram_entropy
        What always guessing by the genes' frequencies costs, in nats: the line to be under.
    """
    x = np.asarray(steps, dtype=np.float64)
    y, z = np.asarray(train, dtype=np.float64), np.asarray(heldout, dtype=np.float64)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="y")
        known = np.isfinite(y)
        handles: list[Any] = []
        if known.any():
            axes.plot(x[known], y[known], color=FAILED, linewidth=0.9, alpha=0.9)
            handles.append(Line2D([], [], color=FAILED, label="training"))
        known = np.isfinite(z)
        if known.any():
            axes.plot(x[known], z[known], color=ACCENT, linewidth=1.8, marker="o", markersize=3.2)
            handles.append(Line2D([], [], color=ACCENT, linewidth=1.8, label="held-out"))
        if unigram_entropy is not None:
            axes.axhline(unigram_entropy, color=WARN, linewidth=1.3, linestyle=(0, (4, 2)))
            handles.append(
                Line2D([], [], color=WARN, linestyle=(0, (4, 2)), label=f"unigram ({unigram_entropy:.2f})")
            )
        axes.xaxis.set_major_formatter(FuncFormatter(count_text))
        axes.set(title=title, xlabel="Optimiser step", ylabel="Loss (nats)")
        if handles:
            legend_below(axes, handles)

    draw_figure(stem, (WIDTH, 3.4), draw)


def runtime_bars(
    steps: Sequence[str], seconds: ArrayLike, peak_mb: ArrayLike, stem: str | Path, *, title: str
) -> None:
    """Time (summed over jobs) and peak memory (of the largest job) of every step, in the order given.

    Parameters
    ----------
    seconds
        float[n].
    peak_mb
        float[n], in megabytes; NaN where it was not measured.
    """
    time, memory = np.asarray(seconds, dtype=np.float64), np.asarray(peak_mb, dtype=np.float64)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        y = [float(i) for i in range(len(steps))]
        megabytes = np.nan_to_num(memory)
        panels: list[tuple[Axes, Any, str, list[str]]] = [
            (left, time, ACCENT, [duration(v) for v in time]),
            (
                right, megabytes, SECOND,
                ["" if not np.isfinite(v) else f"{v / 1000:.1f} GB" if v >= 1000 else f"{v:.0f} MB" for v in memory],
            ),
        ]  # fmt: skip
        for axes, values, colour, texts in panels:
            axes.barh(y, values, color=colour, height=0.62)
            for position, value, text in zip(y, values, texts, strict=True):
                axes.text(value, position, " " + text, va="center", ha="left", fontsize=7.5)
            axes.set_xlim(0, max(float(np.max(values, initial=0)), 1e-9) * 1.5)
            axes.xaxis.set_major_locator(NullLocator())
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
        left.set_yticks(y, [shorten(s, 24) for s in steps])
        left.set_ylim(len(steps) - 0.4, -0.6)
        left.set_title("Time, all jobs", fontsize=9, fontweight="normal", color=MUTED)
        right.set_title("Peak memory of a job", fontsize=9, fontweight="normal", color=MUTED)
        figure.suptitle(title, x=0.0, ha="left", fontsize=10.5, fontweight="bold")

    draw_figure(stem, (WIDTH, 1.0 + 0.24 * len(steps)), draw)
