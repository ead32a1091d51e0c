"""Figures of tables: confusion matrices, and methods against units or metrics."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cellformers.plots.scores import two_lines
from cellformers.plots.style import ACCENT, GRID, INK, MUTED, WHITE, WIDTH, draw_figure, shorten

VALUES_TO_WRITE = 14  # with more columns, values are colours only


def _head(figure: Figure, title: str) -> None:
    """A heading over the names of the rows, too, which leave little room over the table alone."""
    figure.suptitle(shorten(title, 48), x=0.0, ha="left", fontsize=10.5, fontweight="bold")


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
        font = 9 if n <= 14 else 7 if n <= 30 else 5 if n <= 60 else 4.5
        axes.set_xticks(range(n), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=font)
        axes.set_yticks(range(n), names, fontsize=font)
        axes.tick_params(length=0)
        axes.set_ylim(n - 0.5, -0.5)
        axes.set_aspect("equal")
        axes.spines[:].set_visible(False)
        axes.set(xlabel="Predicted", ylabel="True")
        _head(figure, title)

    side = float(np.clip(1.9 + 0.34 * n, 3.4, 9.0 if n <= 60 else 11.0))
    draw_figure(stem, (max(side, WIDTH), side), draw)


def grid(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    stem: str | Path,
    *,
    title: str,
    dots: bool = False,
    bold: Sequence[bool] = (),
) -> None:
    """Values of methods (rows) by unit or metric (columns): the darker, the higher; written out where few.

    Parameters
    ----------
    values
        float[rows, columns] in 0..1; NaN where there is none.
    dots
        Dots, larger where a value is higher; else tiles.
    bold
        Rows whose names are set in bold.
    """
    numbers = np.asarray(values, dtype=np.float64).reshape(len(rows), len(columns))
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    strength = (numbers - low) / (high - low) if high > low else np.where(np.isfinite(numbers), 0.5, np.nan)
    shades = LinearSegmentedColormap.from_list("shades", [f"{ACCENT}14", f"{ACCENT}ff"])
    names = [two_lines(name) for name in rows]
    write = len(columns) <= VALUES_TO_WRITE

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        edges = [np.arange(n + 1) - 0.5 for n in (len(columns), len(rows))]
        y, x = np.nonzero(np.isfinite(numbers))
        if dots:
            size = (30 if len(columns) > 24 else 90) * (0.35 + strength[y, x])
            axes.scatter(x, y, s=size, c=shades(strength[y, x]), linewidths=0)
        else:
            shown = np.ma.masked_invalid(strength)
            axes.pcolormesh(*edges, shown, cmap=shades, vmin=0, vmax=1, edgecolors=GRID, linewidth=0.4)
        if write:
            _write(axes, numbers, strength, dots=dots)
        font = 8.5 if len(columns) <= 14 else 7 if len(columns) <= 30 else 5.5
        axes.set_xticks(
            range(len(columns)), [shorten(c, 20) for c in columns], rotation=45, ha="right",
            rotation_mode="anchor", fontsize=font,
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        for tick, strong in zip(axes.get_yticklabels(), bold, strict=False):
            tick.set_fontweight("bold" if strong else "normal")
        axes.tick_params(length=0)
        axes.set_xlim(-0.55, len(columns) - 0.45)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.spines[:].set_visible(False)
        _head(figure, title)
        axes.set_xlabel(f"from {low:.2f} (faint) to {high:.2f} (full colour)", fontsize=8, color=MUTED)

    height = sum(0.34 + 0.06 * ("\n" in name) for name in names)
    width = WIDTH + max(len(columns) - 8, 0) * (0.3 if write else 0.12)
    draw_figure(stem, (min(width, 9.0), 1.9 + height), draw)


def _write(axes: object, numbers: np.ndarray, strength: np.ndarray, *, dots: bool) -> None:
    """The values themselves: in tiles, or beside dots, where they don't depend on a colour to be legible."""
    for i, j in np.argwhere(np.isfinite(numbers)):
        dark = not dots and strength[i, j] > 0.55
        axes.text(  # type: ignore[attr-defined]
            j, i + (0.36 if dots else 0), f"{numbers[i, j]:.2f}", ha="center", va="center", fontsize=6.5,
            color=WHITE if dark else INK,
        )  # fmt: skip
