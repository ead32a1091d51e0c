"""The house style: colours, type, and how a figure becomes files."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from cellformers.io.files import atomic_path

# The report swaps these four for the colours of its light or dark page, so no data are drawn in them.
INK, MUTED, GRID, PAPER = "#1f2933", "#616e7c", "#dde2e8", "#ffffff"
ACCENT, SECOND, WARN, FAILED = "#0072b2", "#009e73", "#d55e00", "#9aa5b1"
WHITE = "#fefefe"  # on a dark colour, whatever the page
MISSING = "#b4bcc5"
# The first six are Okabe and Ito's (2008); each further one is as far as possible, in CIELAB, from all before it to a
# normal, a protan and a deutan eye (Machado et al. 2009), so that twenty can be told apart as well as twenty can be.
PALETTE = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#0b37ca", "#97121f", "#c1dc86", "#693d59",
    "#ffc1ca", "#497fff", "#0046a5", "#ea2f55", "#6a3679", "#9bdafa", "#f99951", "#b8210f", "#1d7741", "#6dc286",
)  # fmt: skip
KIND_STYLE: dict[str, tuple[str, str]] = {  # colour, marker
    "model": (ACCENT, "o"),
    "baseline": ("#7b8794", "s"),
    "control": ("#b0b8c1", "D"),
    "oracle": (SECOND, "^"),
}
DPI = 150
WIDTH = 5.0

_RC: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 9.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "path.simplify": True,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "cellformers",
    "text.color": INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "ytick.labelsize": 9,
}


def draw_figure(stem: str | Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> None:
    """Make a figure of `size` inches in the house style, let `draw` fill it, write it as PNG and as SVG."""
    stem = Path(stem)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_RC}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")  # names in any script are welcome
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        with atomic_path(stem.with_name(stem.name + ".png")) as path:
            figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})
        figure.set_layout_engine("none")  # what has been laid out stays in its place, which is slow to find
        with atomic_path(stem.with_name(stem.name + ".svg")) as path:
            figure.savefig(path, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None})


def shorten(text: str, length: int = 30) -> str:
    """The text, or its start and an ellipsis where it is longer than `length`."""
    text = " ".join(str(text).split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def count_text(value: float, _position: object = None) -> str:
    """1234 as 1.2k, 2000000 as 2M: short tick labels."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """72.4 as 1 min 12 s: what a person would say."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def palette(categories: Sequence[str]) -> dict[str, str]:
    """A colour for each category in the order given; past the 20 colours, that of missing values."""
    unique = list(dict.fromkeys(categories))
    return {name: PALETTE[i] if i < len(PALETTE) else MISSING for i, name in enumerate(unique)}


def _ticks_1_2_5(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones, sparse enough for a log axis."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    span = np.log10(high / low)
    steps = (1,) if span > 3 else (1, 3) if span > 1.7 else (1, 2, 5)
    return [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]


def log_axis(axis: Any, low: float, high: float) -> None:
    """Round ticks in short words on a logarithmic axis that shows `low` to `high`."""
    axis.set_major_locator(FixedLocator(_ticks_1_2_5(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(count_text))


def legend_below(axes: Axes, handles: list[Any], columns: int | None = None) -> None:
    """A legend under the axes, where it covers no data on any screen."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns or len(handles),
        handlelength=1.4,
        columnspacing=1.4,
        handletextpad=0.5,
    )


def dots(entries: Sequence[tuple[str, str]], marker: str = "o") -> list[Any]:
    """Legend entries for (name, colour) pairs."""
    return [
        Line2D([], [], linestyle="none", marker=marker, markersize=5, markeredgewidth=0, color=c, label=name)
        for name, c in entries
    ]
