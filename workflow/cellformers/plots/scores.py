"""Figures of the scores of one benchmark: forest plots, and two metrics against each other."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from cellformers.plots.style import (
    GRID,
    KIND_STYLE,
    MUTED,
    PAPER,
    WARN,
    WIDTH,
    draw_figure,
    legend_below,
    shorten,
)

LINE = 30  # characters of a method's name in one line; longer names have two


class Score(NamedTuple):
    """One row of a forest plot: `low` and `high` where there is an interval, else one value a unit or fold."""

    name: str
    kind: str
    value: float
    low: float | None = None
    high: float | None = None
    units: Sequence[float] = ()


class Published(NamedTuple):
    """A number from the literature: what the legend says, the value, and its standard deviation where one is given."""

    text: str
    value: float
    sd: float | None = None


class Pair(NamedTuple):
    """A method in the plane of two metrics."""

    name: str
    kind: str
    x: float
    y: float


def two_lines(name: str, length: int = LINE) -> str:
    """A name in at most two lines, broken behind a comma if that is early enough to fit."""
    text = shorten(name, 2 * length)
    first, comma, rest = text.partition(", ")
    if len(text) > length and comma and max(len(first) + 1, len(rest)) <= length + 4:
        return f"{first},\n{rest}"
    lines = textwrap.wrap(text, length, max_lines=2, placeholder="…")
    return "\n".join(lines) or text


def forest(
    scores: Sequence[Score],
    stem: str | Path,
    *,
    title: str,
    xlabel: str,
    published: Sequence[Published] = (),
    chance: float | None = None,
) -> None:
    """Scores of the methods of one benchmark: best on top, controls and the oracle below the line.

    Parameters
    ----------
    scores
        A method each; intervals are drawn where there are any, else its units or folds as small dots.
    published
        Published numbers, drawn as vertical lines, and as bands of one standard deviation where one is known.
    chance
        What guessing scores, drawn as a dotted line.
    """
    contest = sorted((s for s in scores if s.kind in ("model", "baseline")), key=lambda s: (-s.value, s.name))
    checks = sorted((s for s in scores if s not in contest), key=lambda s: (-s.value, s.name))
    rows = [*contest, *checks]
    names = [two_lines(s.name) for s in rows]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="x")
        handles: list[Any] = [
            Line2D([], [], linestyle="none", marker=m, color=c, markersize=6, markeredgewidth=0, label=kind)
            for kind, (c, m) in KIND_STYLE.items()
            if any(s.kind == kind for s in rows)
        ]
        for number, entry in enumerate(published):
            dashes: Any = (0, (4, 2)) if number == 0 else (0, (1 + 2 * number, 1.5))
            if entry.sd:
                axes.axvspan(
                    entry.value - entry.sd, entry.value + entry.sd, color=WARN, alpha=0.13, linewidth=0
                )
            axes.axvline(entry.value, color=WARN, linewidth=1.3, linestyle=dashes)
            handles.append(Line2D([], [], color=WARN, linestyle=dashes, label=shorten(entry.text, 40)))
        if any(entry.sd for entry in published):
            handles.append(Patch(color=WARN, alpha=0.13, linewidth=0, label="± its standard deviation"))
        if chance is not None:
            axes.axvline(chance, color=MUTED, linewidth=1, linestyle=(0, (1, 2)))
            handles.append(Line2D([], [], color=MUTED, linestyle=(0, (1, 2)), label="chance"))
        for y, score in enumerate(rows):
            _draw_row(axes, y, score)
        if contest and checks:
            axes.axhline(len(contest) - 0.5, color=GRID, linewidth=1.2)
        axes.set_yticks(range(len(rows)), names)
        for tick, score in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if score.kind == "model" else "normal")
            tick.set_fontsize(8.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set(title=title, xlabel=xlabel)
        if handles:
            legend_below(axes, handles, min(3, len(handles)))

    height = sum(0.3 + 0.08 * ("\n" in name) for name in names)
    draw_figure(stem, (WIDTH, 1.5 + height + 0.2 * len(published)), draw)


def _draw_row(axes: Any, y: int, score: Score) -> None:
    """A method: its value, and its interval, else its units or folds."""
    colour, marker = KIND_STYLE.get(score.kind, KIND_STYLE["baseline"])
    if score.low is not None and score.high is not None:
        axes.plot([score.low, score.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
    elif len(score.units):
        axes.plot(score.units, [y] * len(score.units), "o", color=colour, markersize=3.5, alpha=0.45, mew=0)
    axes.plot([score.value], [y], marker, color=colour, markersize=7, markeredgecolor=PAPER, mew=0.8)


def plane(
    pairs: Sequence[Pair], stem: str | Path, *, title: str, xlabel: str, ylabel: str, note: str = ""
) -> None:
    """Methods in the plane of two metrics, each a number that the legend explains; up and to the right is better."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="both")
        handles = []
        for number, pair in enumerate(pairs, start=1):
            colour, marker = KIND_STYLE.get(pair.kind, KIND_STYLE["baseline"])
            axes.plot([pair.x], [pair.y], marker, color=colour, markersize=8, markeredgecolor=PAPER, mew=0.8)
            # neighbours in the list of numbers are on different sides, so that close points stay legible
            across, up = ((1, 1), (-1, -1), (-1, 1), (1, -1))[number % 4]
            axes.annotate(
                str(number), (pair.x, pair.y), xytext=(7 * across, 6 * up), textcoords="offset points",
                ha="center", va="center", fontsize=8.5,
            )  # fmt: skip
            handles.append(
                Line2D(
                    [], [], linestyle="none", marker=marker, color=colour, markersize=5.5, markeredgewidth=0,
                    label=f"{number} {shorten(pair.name, 34)}",
                )
            )  # fmt: skip
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
        if note:
            axes.text(
                0.99, 0.99, note, transform=axes.transAxes, ha="right", va="top", fontsize=8, color=MUTED
            )
        if handles:
            legend_below(axes, handles, 2 if len(handles) > 3 else 1)

    draw_figure(stem, (WIDTH, 4.0 + 0.2 * (-(-len(pairs) // 2))), draw)
