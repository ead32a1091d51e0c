"""Figures of classifiers: ROC and precision-recall curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from cellformers.plots.style import KIND_STYLE, MUTED, WIDTH, draw_figure, legend_below, shorten


class Curve(NamedTuple):
    """One curve: x and y ascending in x, and the area under it that the legend says."""

    name: str
    kind: str
    x: ArrayLike
    y: ArrayLike
    area: float


def roc(curves: Sequence[Curve], stem: str | Path, *, title: str) -> None:
    """Receiver operating characteristic of each method, best first in the legend; guessing as a dotted line."""
    _curves(
        curves, stem, title=title, xlabel="False positive rate", ylabel="True positive rate", guess=((0, 1), (0, 1))
    )  # fmt: skip


def precision_recall(curves: Sequence[Curve], stem: str | Path, *, title: str, share: float) -> None:
    """Precision against recall of each method; `share` of positives is the precision of guessing, a dotted line."""
    _curves(
        curves, stem, title=title, xlabel="Recall", ylabel="Precision", guess=((0, 1), (share, share))
    )  # fmt: skip


def _curves(
    curves: Sequence[Curve], stem: str | Path, *, title: str, xlabel: str, ylabel: str, guess: Any
) -> None:
    ordered = sorted(curves, key=lambda c: (-c.area, c.name))
    of_kind = {kind: [c.name for c in ordered if c.kind == kind] for kind in {c.kind for c in ordered}}
    dashes = ["-", (0, (5, 1.5)), (0, (3, 1.2, 1, 1.2)), (0, (1, 1))]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(*guess, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        handles: list[Any] = []
        for curve in ordered:
            colour = KIND_STYLE.get(curve.kind, KIND_STYLE["baseline"])[0]
            dash: Any = dashes[of_kind[curve.kind].index(curve.name) % len(dashes)]
            model = curve.kind == "model"
            style = {"color": colour, "linestyle": dash, "linewidth": 2 if model else 1.3}
            axes.plot(np.asarray(curve.x), np.asarray(curve.y), zorder=3 if model else 2, **style)
            handles.append(Line2D([], [], **style, label=f"{shorten(curve.name, 40)} ({curve.area:.2f})"))
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, title=title, ylabel=ylabel)
        axes.set_aspect("equal")
        if handles:
            narrow = all(len(c.name) <= 24 for c in ordered)
            legend_below(axes, handles, min(2 if narrow else 1, len(handles)))

    draw_figure(stem, (WIDTH, 4.2 + 0.2 * len(ordered)), draw)
