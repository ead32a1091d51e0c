"""Every figure, in one house style, as PNG (150 dpi) and SVG.

Each function takes tidy data and a `stem` and writes `stem.png` and `stem.svg`; the same data give the same bytes
(one machine, one set of library versions). Nothing here reads a file or touches matplotlib's global state, and text
from the user is never read as mathematics. Figures are about 5 inches wide, so that they stay readable on a phone
and in half a page; text in the SVG files is text, and clouds of points are embedded as pixels.

    plots.loss_curve(steps, train, heldout, Path("figures/loss"), unigram_entropy=6.2)
"""

from cellformers.plots.cells import umap_categories
from cellformers.plots.curves import Curve, precision_recall, roc
from cellformers.plots.grids import confusion, grid
from cellformers.plots.quality import qc_histogram, qc_overview, qc_scatter, tokens_per_cell
from cellformers.plots.runs import loss_curve, runtime_bars
from cellformers.plots.scores import Pair, Published, Score, forest, plane
from cellformers.plots.style import palette

__all__ = [
    "Curve", "Pair", "Published", "Score", "confusion", "forest", "grid", "loss_curve", "palette", "plane",
    "precision_recall", "qc_histogram", "qc_overview", "qc_scatter", "roc", "runtime_bars", "tokens_per_cell",
    "umap_categories",
]  # fmt: skip
