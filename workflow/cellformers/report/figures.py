"""Figures of the report: kept as files, and put into the page.

A figure goes into the page as SVG in the page's own colours, so that it follows its light or dark design. Pictures
inside it (clouds of points) are reduced to a palette, and made smaller where a page has many.
"""

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup, escape
from PIL import Image

from cellformers.io.files import write_text
from cellformers.plots import style

PICTURES_BYTES = 2_500_000  # of all pictures of a page together, as base64
LEAST_BYTES = 25_000  # of one picture
LONGEST_STEM = 100  # characters; file systems have 255 bytes
PAGE_COLOURS = {
    style.INK: "var(--ink)",
    style.MUTED: "var(--muted)",
    style.GRID: "var(--line)",
    style.PAPER: "var(--card)",
}
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
_PICTURE = re.compile(r'"data:image/png;base64,([^"]+)"')


class Figure(NamedTuple):
    """A figure of the page: its name, which is that of its files, and what to read aloud in its place."""

    name: str
    text: str


def without_controls(text: str) -> str:
    """A text without characters that show nothing, move a cursor or turn the direction of what is around them."""
    return _CONTROL.sub("", text)


def file_stem(name: str) -> str:
    """A file name, without its suffix, made of any text."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", name)[:LONGEST_STEM].strip("-.") or "figure"


class Figures:
    """Draws figures into a folder and puts them into a page.

    Parameters
    ----------
    folder
        Where NAME.png and NAME.svg go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self.pictures = 0  # figures that hold one

    def add(self, name: str, text: str, draw: Callable[[Path], None]) -> Figure:
        """Draw a figure by `draw(stem)`; `name` may be any text, its file name is made of it."""
        stem = file_stem(name)
        number = 2
        unique = stem
        while unique in self.names:
            unique, number = f"{stem}-{number}", number + 1
        draw(self.folder / unique)
        self.names.append(unique)
        path = self.folder / f"{unique}.svg"
        svg = path.read_text(encoding="utf-8")
        if without_controls(svg) != svg:  # which no XML may hold
            write_text(without_controls(svg), path)
        self.pictures += "data:image/png" in svg
        return Figure(unique, without_controls(text))

    def inline(self, figure: Figure) -> Markup:
        """The SVG element of a figure, safe to put into a page beside others."""
        svg = (self.folder / f"{figure.name}.svg").read_text(encoding="utf-8")
        share = max(PICTURES_BYTES // max(self.pictures, 1), LEAST_BYTES)
        return inline_svg(
            svg, prefix=f"f{self.names.index(figure.name)}-", text=figure.text, picture_bytes=share
        )


def inline_svg(svg: str, *, prefix: str, text: str, picture_bytes: int) -> Markup:
    """An SVG file of `plots` as an element of a page.

    Parameters
    ----------
    prefix
        Put before every id, so that figures don't borrow each other's clips and markers.
    text
        What the figure shows, for those who can't see it.
    picture_bytes
        Most bytes of its pictures together.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL
    )  # is for all of a page, not for a figure
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = re.sub(rf"(?<=: ){colour}\b", variable, svg)
    pictures = len(_PICTURE.findall(svg))
    if pictures:
        svg = _PICTURE.sub(lambda m: f'"{_smaller(m[1], picture_bytes // pictures)}"', svg)
    svg = re.sub(r">\s+<", "><", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(text)}"', 1))


def _smaller(encoded: str, limit: int) -> str:
    """A PNG of at most about `limit` bytes as base64 data: fewer colours first, then fewer pixels."""
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGBA")
    scale = 1.0
    while True:
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        resized = picture if scale == 1.0 else picture.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        resized.quantize(128, method=Image.Quantize.FASTOCTREE).save(buffer, "PNG", optimize=True)
        data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(data) <= limit or scale < 0.3:
            return data
        scale *= 0.8
