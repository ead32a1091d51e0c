"""Maps of cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cellformers.plots.style import (
    MISSING,
    MUTED,
    PAPER,
    WIDTH,
    dots,
    draw_figure,
    legend_below,
    palette,
    shorten,
)


def _legend_columns(names: Sequence[str]) -> int:
    longest = max((len(name) for name in names), default=1)
    return int(np.clip(58 // (longest + 5), 1, 5))


def umap_categories(
    xy: ArrayLike,
    categories: Sequence[str | None],
    stem: str | Path,
    *,
    title: str,
    colours: Mapping[str, str] | None = None,
    numbered: bool = False,
) -> None:
    """A map of cells coloured by a categorical column.

    Parameters
    ----------
    xy
        float[n, 2], coordinates of the cells.
    categories
        One name a cell, None where it is missing (grey, drawn first).
    colours
        Colour by category, to be shared between maps; default: `palette`, most frequent first.
        Beyond the palette, categories are drawn in grey and counted in the legend.
    numbered
        Write the number of a category at the median of its cells: tells them apart without colour.
    """
    points = np.asarray(xy, dtype=np.float64).reshape(-1, 2)
    names = np.array(["" if c is None else str(c) for c in categories], dtype=object)
    missing = np.array([c is None for c in categories], dtype=bool)
    present, counts = np.unique(names[~missing].astype(str), return_counts=True)
    frequency = dict(zip(present.tolist(), counts.tolist(), strict=True))
    if colours is None:
        colours = palette(sorted(present.tolist(), key=lambda c: (-frequency[c], c)))
    shown = [c for c in colours if c in frequency and colours[c] != MISSING]
    others = [c for c in present.tolist() if c not in shown]
    rank = {c: i for i, c in enumerate(shown)}
    label = {c: shorten(f"{rank[c] + 1} {c}" if numbered else c, 24) for c in shown}
    entries = [(label[c], colours[c]) for c in shown]
    if others:
        entries.append((f"{len(others)} other{'s' if len(others) > 1 else ''}", MISSING))
    if missing.any():
        entries.append((f"missing ({missing.sum():,})", MISSING))
    columns = _legend_columns([name for name, _ in entries])
    rows = -(-len(entries) // columns)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        grey = missing | ~np.isin(names.astype(str), shown)
        # One fixed shuffle for all colours: no category lies on top of another by its name alone.
        order = np.random.default_rng(0).permutation(len(points))
        order = np.concatenate([order[grey[order]], order[~grey[order]]])
        ink = [MISSING if g else colours[n] for n, g in zip(names[order], grey[order], strict=True)]
        size = float(np.clip(16000 / max(len(points), 1), 0.8, 22))
        axes.scatter(points[order, 0], points[order, 1], s=size, c=ink, linewidths=0, rasterized=True)
        if numbered:
            for name in shown:
                x, y = np.median(points[(names == name) & ~missing], axis=0)
                axes.text(
                    x, y, str(rank[name] + 1), ha="center", va="center", fontsize=8, fontweight="bold",
                    bbox={"boxstyle": "circle,pad=0.18", "facecolor": PAPER, "edgecolor": MUTED, "linewidth": 0.6},
                )  # fmt: skip
        axes.set(title=title, xticks=[], yticks=[])
        axes.set_xlabel("UMAP 1", loc="left", color=MUTED, fontsize=8.5)
        axes.set_ylabel("UMAP 2", loc="bottom", color=MUTED, fontsize=8.5)
        axes.spines[:].set_visible(False)
        axes.margins(0.03)
        if entries:
            legend_below(axes, dots(entries), columns)

    draw_figure(stem, (WIDTH, 4.3 + 0.2 * rows), draw)
