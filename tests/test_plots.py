"""Figures: both files, the same bytes again, text as text, odd data, colours that can be told apart."""

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from cellformers import plots
from cellformers.plots import scores, style

RNG = np.random.default_rng(0)
N = 200
COUNTS = np.exp(RNG.normal(8, 0.5, N)).astype(np.int64)
GENES = (COUNTS**0.8).astype(np.int64)
MITO = np.clip(RNG.normal(0.07, 0.03, N), 0, 1)
PASSED = COUNTS < 6000
XY = RNG.normal(size=(N, 2))
NAMES = [f"type {i % 12}" for i in range(N)]
STEPS = np.arange(10, 210, 10)
LOSS = 6 - STEPS / 100
HELDOUT = np.where(STEPS % 40 == 0, LOSS, np.nan)
SCORES = [
    plots.Score("small", "model", 0.9, 0.85, 0.95),
    plots.Score("log counts", "baseline", 0.93, units=[0.9, 0.95, 0.94]),
    plots.Score("permuted", "control", 0.1, 0.05, 0.2),
    plots.Score("oracle", "oracle", 0.99),
]
GRID = np.linspace(0, 1, 11)
CURVES = [plots.Curve(s.name, s.kind, GRID, GRID**0.5, s.value) for s in SCORES]

DRAW: dict[str, Callable[[Path], None]] = {
    "histogram": lambda stem: plots.qc_histogram(
        COUNTS, PASSED, stem, title="Total counts", xlabel="Total counts", high=6000, log=True
    ),
    "scatter": lambda stem: plots.qc_scatter(COUNTS, GENES, PASSED, stem, title="Genes against counts"),
    "overview": lambda stem: plots.qc_overview(
        {"n_counts": COUNTS, "n_genes": GENES, "mito_fraction": MITO}, PASSED, stem, bounds={"n_counts": (None, 6000)}
    ),
    "tokens": lambda stem: plots.tokens_per_cell(GENES, stem, title="Tokens per cell", context_length=512),
    "loss": lambda stem: plots.loss_curve(STEPS, LOSS, HELDOUT, stem, unigram_entropy=6),
    "umap": lambda stem: plots.umap_categories(XY, NAMES, stem, title="Cell type", numbered=True),
    "forest": lambda stem: plots.forest(
        SCORES, stem, title="Cell types", xlabel="Macro F1", chance=0.1,
        published=[plots.Published("published 0.9", 0.9), plots.Published("published 0.8 ± 0.02", 0.8, 0.02)],
    ),
    "confusion": lambda stem: plots.confusion(np.eye(3) * 9 + 1, ["a", "b", "c"], stem, title="Confusion matrix"),
    "roc": lambda stem: plots.roc(CURVES, stem, title="ROC"),
    "precision-recall": lambda stem: plots.precision_recall(CURVES, stem, title="PR", share=0.3),
    "tiles": lambda stem: plots.grid([[0.1, 0.9], [0.5, np.nan]], ["a", "b"], ["x", "y"], stem, title="Tiles"),
    "dots": lambda stem: plots.grid(
        [[0.1, 0.9], [0.5, np.nan]], ["a", "b"], ["x", "y"], stem, title="Dots", dots=True, bold=[True, False]
    ),
    "plane": lambda stem: plots.plane(
        [plots.Pair(s.name, s.kind, s.value, 1 - s.value) for s in SCORES], stem, title="P", xlabel="x", ylabel="y"
    ),
    "runtime": lambda stem: plots.runtime_bars(
        ["ingest", "embed"], [3, 4000], [200, np.nan], stem, title="Cost of the run"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_is_two_files_and_the_same_ones_again(name: str, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    DRAW[name](tmp_path / "a")
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "red"}
    ):  # the user's own style changes nothing
        DRAW[name](tmp_path / "b")
    for suffix in ("png", "svg"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert dict(matplotlib.rcParams) == before
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 5
    svg = (tmp_path / "a.svg").read_text()
    assert "<dc:date>" not in svg
    assert "<text" in svg
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "a.svg", "b.png", "b.svg"}


def words_of(svg: Path) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8")))


def test_text_of_the_user_is_text(tmp_path: Path) -> None:
    names: list[str | None] = ["<script>alert(1)</script>", "$x^2$ & co", "T細胞", None]
    plots.umap_categories(RNG.normal(size=(4, 2)), names, tmp_path / "m", title="</svg><b>")
    svg = (tmp_path / "m.svg").read_text(encoding="utf-8")
    assert "<script" not in svg
    assert "</svg><b>" not in svg
    text = words_of(tmp_path / "m.svg")
    assert "$x^2$ &amp; co" in text
    assert "T細胞" in text
    assert "missing (1)" in text


def test_a_map_counts_what_it_has_no_colour_for(tmp_path: Path) -> None:
    names = [f"type {i % 30}" for i in range(300)]
    plots.umap_categories(RNG.normal(size=(300, 2)), names, tmp_path / "m", title="M", numbered=True)
    text = words_of(tmp_path / "m.svg")
    assert "10 others" in text
    assert "20 type" in text
    assert (tmp_path / "m.svg").read_text().count("<image") == 1  # the points are pixels, the text is not


def test_maps_share_colours(tmp_path: Path) -> None:
    colours = plots.palette(["a", "b"])
    plots.umap_categories(XY[:2], ["b", "b"], tmp_path / "m", title="M", colours=colours)
    svg = (tmp_path / "m.svg").read_text()
    assert colours["b"] in svg
    assert colours["a"] not in svg
    assert words_of(tmp_path / "m.svg").split()[-1] == "b"


def linear(colour: str) -> np.ndarray:
    """sRGB to linear light."""
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def test_colours_can_be_told_apart() -> None:
    """Also by a deutan and a protan eye (Machado et al. 2009, severity 1), as distances in CIELAB."""
    from skimage.color import xyz2lab

    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    eyes = [
        np.eye(3),
        np.array(
            [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
        ),
        np.array(
            [
                [0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998],
            ]
        ),
    ]
    assert len(set(style.PALETTE)) == 20
    light = np.array([linear(c) for c in style.PALETTE])
    for eye in eyes:
        lab = xyz2lab(np.clip(light @ eye.T, 0, 1) @ to_xyz.T)
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(20) * 100
        assert distance[:8, :8].min() > 15
        assert distance.min() > 10


def test_page_colours_are_no_data_colours() -> None:
    page = {style.INK, style.MUTED, style.GRID, style.PAPER}
    data = {*style.PALETTE, style.ACCENT, style.SECOND, style.WARN, style.FAILED, style.MISSING, style.WHITE}
    assert not page & data
    assert not page & {colour for colour, _ in style.KIND_STYLE.values()}


@pytest.mark.parametrize("values", [[], [0], [5, 5, 5], [0, 1e6]])
def test_odd_data_have_figures(values: list[float], tmp_path: Path) -> None:
    passed = [True] * len(values)
    for log in (False, True):
        plots.qc_histogram(values, passed, tmp_path / "h", title="T", xlabel="x", low=-3, high=2, log=log)
    plots.qc_scatter(values, values, passed, tmp_path / "s", title="T")
    plots.tokens_per_cell(np.array(values, dtype=int), tmp_path / "t", title="T")
    plots.umap_categories(np.zeros((len(values), 2)), [None] * len(values), tmp_path / "u", title="T")
    assert (tmp_path / "u.svg").is_file()


def test_missing_measures_are_left_out(tmp_path: Path) -> None:
    nothing = np.full(N, np.nan)
    metrics = {"n_counts": COUNTS, "n_genes": GENES, "mito_fraction": nothing}
    plots.qc_overview(metrics, PASSED, tmp_path / "q", bounds={})
    assert "not measured" in words_of(tmp_path / "q.svg")
    plots.loss_curve(STEPS, LOSS, np.full(len(STEPS), np.nan), tmp_path / "l")
    assert "held-out" not in words_of(tmp_path / "l.svg")
    assert "unigram" not in words_of(tmp_path / "l.svg")


def test_a_forest_plot_ranks_models_with_baselines(tmp_path: Path) -> None:
    plots.forest(SCORES, tmp_path / "f", title="Cell types", xlabel="Macro F1")
    text = words_of(tmp_path / "f.svg")
    assert re.search(r"log counts.*small.*oracle.*permuted", text)


def test_many_classes_are_drawn_as_pixels(tmp_path: Path) -> None:
    plots.confusion(np.eye(40), [f"t{i}" for i in range(40)], tmp_path / "c", title="C")
    assert (tmp_path / "c.svg").stat().st_size < 200_000
    assert "100%" not in words_of(tmp_path / "c.svg")


def test_numbers_are_short() -> None:
    assert style.count_text(950) == "950"
    assert style.count_text(12_340) == "12.3k"
    assert style.count_text(2_000_000) == "2M"
    assert style.duration(3.04) == "3.0 s"
    assert style.duration(72.4) == "1 min 12 s"
    assert style.duration(3960) == "1 h 6 min"
    assert style.shorten("a  b\nc") == "a b c"
    assert style.shorten("abcdefghij", 5) == "abcd…"


def test_published_numbers_are_lines_and_their_deviations_bands(tmp_path: Path) -> None:
    published = [
        plots.Published("published 0.91 ± 0.02", 0.91, 0.02),
        plots.Published("published 0.89", 0.89),
    ]
    plots.forest(SCORES, tmp_path / "f", title="T", xlabel="AUC", published=published)
    text = words_of(tmp_path / "f.svg")
    assert "published 0.91 ± 0.02" in text
    assert "published 0.89" in text
    assert "± its standard deviation" in text
    plots.forest(SCORES, tmp_path / "g", title="T", xlabel="AUC", published=published[1:])
    assert "deviation" not in words_of(tmp_path / "g.svg")


def test_long_names_have_two_lines() -> None:
    assert scores.two_lines("small") == "small"
    assert (
        scores.two_lines("a-network-with-a-long-name, fine-tuned")
        == "a-network-with-a-long-name,\nfine-tuned"
    )
    assert scores.two_lines("PCA of " * 12).endswith("…")


@pytest.mark.parametrize("dots", [False, True])
def test_a_grid_writes_few_values_only(dots: bool, tmp_path: Path) -> None:
    values = RNG.uniform(0.5, 1, (3, 40))
    names = [f"donor {i}" for i in range(40)]
    plots.grid(values[:, :3], ["a", "b", "c"], names[:3], tmp_path / "few", title="T", dots=dots)
    assert f"{values[1, 2]:.2f}" in words_of(tmp_path / "few.svg")
    plots.grid(values, ["a", "b", "c"], names, tmp_path / "many", title="T", dots=dots)
    assert f"{values[1, 2]:.2f}" not in words_of(tmp_path / "many.svg").replace("from", "").split("donor")[0]
    plots.grid(np.full((2, 2), np.nan), ["a", "b"], ["x", "y"], tmp_path / "none", title="T", dots=dots)
    plots.grid(np.full((2, 2), 0.5), ["a", "b"], ["x", "y"], tmp_path / "same", title="T", dots=dots)
