"""Figures of benchmarks: forest plots, confusion matrices, ROC curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from cellformers.plots.style import (
    GRID,
    INK,
    KIND_STYLE,
    MUTED,
    PAPER,
    WARN,
    WHITE,
    WIDTH,
    draw_figure,
    legend_below,
    shorten,
)


class Score(NamedTuple):
    """One row of a forest plot: `low` and `high` where there is an interval, else one value a unit or fold."""

    name: str
    kind: str
    value: float
    low: float | None = None
    high: float | None = None
    units: Sequence[float] = ()


class Curve(NamedTuple):
    """One ROC curve; `auc` is what the legend says."""

    name: str
    kind: str
    fpr: ArrayLike
    tpr: ArrayLike
    auc: float


def forest(
    scores: Sequence[Score],
    stem: str | Path,
    *,
    title: str,
    xlabel: str,
    published: Sequence[tuple[str, float]] = (),
    chance: float | None = None,
) -> None:
    """Scores of the methods of one benchmark: best on top, controls and the oracle below the line.

    Parameters
    ----------
    scores
        A method each; intervals are drawn where there are any, else its units or folds as small dots.
    published
        (text, value) of published numbers, drawn as vertical lines.
    chance
        What guessing scores, drawn as a dotted line.
    """
    contest = sorted((s for s in scores if s.kind in ("model", "baseline")), key=lambda s: (-s.value, s.name))
    checks = sorted((s for s in scores if s not in contest), key=lambda s: (-s.value, s.name))
    rows = [*contest, *checks]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="x")
        for y, score in enumerate(rows):
            colour, marker = KIND_STYLE.get(score.kind, KIND_STYLE["baseline"])
            if score.low is not None and score.high is not None:
                axes.plot(
                    [score.low, score.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round"
                )
            elif len(score.units):
                axes.plot(
                    score.units, [y] * len(score.units), "o", color=colour, markersize=3.5, alpha=0.45, mew=0
                )
            axes.plot([score.value], [y], marker, color=colour, markersize=7, markeredgecolor=PAPER, mew=0.8)
        if contest and checks:
            axes.axhline(len(contest) - 0.5, color=GRID, linewidth=1.2)
        handles: list[Any] = [
            Line2D([], [], linestyle="none", marker=m, color=c, markersize=6, markeredgewidth=0, label=kind)
            for kind, (c, m) in KIND_STYLE.items()
            if any(s.kind == kind for s in rows)
        ]
        for text, value in published:
            axes.axvline(value, color=WARN, linewidth=1.3, linestyle=(0, (4, 2)))
            handles.append(Line2D([], [], color=WARN, linestyle=(0, (4, 2)), label=shorten(text, 34)))
        if chance is not None:
            axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            handles.append(Line2D([], [], color=MUTED, linestyle=(0, (1, 2)), label="chance"))
        axes.set_yticks(range(len(rows)), [shorten(s.name, 24) for s in rows])
        for tick, score in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if score.kind == "model" else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(title=title, xlabel=xlabel)
        if handles:
            legend_below(axes, handles, min(3, len(handles)))

    draw_figure(stem, (WIDTH, 1.5 + 0.3 * len(rows) + 0.2 * len(published)), draw)


def confusion(counts: ArrayLike, classes: Sequence[str], stem: str | Path, *, title: str) -> None:
    """Share of each true class (rows) that was predicted as each class (columns).

    Parameters
    ----------
    counts
        int[n, n]: cells of true class i that were predicted as class j.
    """
    numbers = np.asarray(counts, dtype=np.float64)
    share = numbers / np.maximum(numbers.sum(axis=1, keepdims=True), 1)
    n = len(classes)
    shades = LinearSegmentedColormap.from_list("shades", ["#0072b200", "#0072b2ff"])  # clear to blue

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        edges = np.arange(n + 1) - 0.5
        mesh = axes.pcolormesh(
            edges, edges, share, cmap=shades, vmin=0, vmax=1, edgecolors=GRID, linewidth=0.4
        )
        mesh.set_rasterized(n > 30)
        if n <= 12:
            for i, j in np.argwhere(share >= 0.005):
                text = f"{share[i, j]:.0%}"
                axes.text(
                    j,
                    i,
                    text,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=WHITE if share[i, j] > 0.6 else INK,
                )
        names = [shorten(c, 22) for c in classes]
        font = 9 if n <= 14 else 7 if n <= 30 else 5
        axes.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=font)
        axes.set_yticks(range(n), names, fontsize=font)
        axes.tick_params(length=0)
        axes.set_ylim(n - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        axes.set(title=title, xlabel="Predicted", ylabel="True")

    side = float(np.clip(1.9 + 0.34 * n, 3.4, 9.0))
    draw_figure(stem, (max(side, WIDTH), side), draw)


def roc(curves: Sequence[Curve], stem: str | Path, *, title: str) -> None:
    """Receiver operating characteristic of each method, best first in the legend."""
    ordered = sorted(curves, key=lambda c: (-c.auc, c.name))
    models = [c.name for c in ordered if c.kind == "model"]
    baselines = [c.name for c in ordered if c.kind == "baseline"]
    dashes = ["-", (0, (5, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1, 1))]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        handles: list[Any] = []
        for curve in ordered:
            colour = KIND_STYLE.get(curve.kind, KIND_STYLE["baseline"])[0]
            same = {"model": models, "baseline": baselines}.get(curve.kind, [curve.name])
            dash: Any = dashes[same.index(curve.name) % len(dashes)]
            style = {"color": colour, "linestyle": dash, "linewidth": 2 if curve.kind == "model" else 1.3}
            axes.plot(
                np.asarray(curve.fpr),
                np.asarray(curve.tpr),
                zorder=3 if curve.kind == "model" else 2,
                **style,
            )
            handles.append(Line2D([], [], **style, label=f"{shorten(curve.name, 24)} ({curve.auc:.2f})"))
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel="False positive rate", title=title)
        axes.set_ylabel("True positive rate")
        axes.set_aspect("equal")
        if handles:
            legend_below(axes, handles, min(2, len(handles)))

    draw_figure(stem, (WIDTH, 4.2 + 0.2 * (-(-len(ordered) // 2))), draw)
