"""Maps of cells: each drawn once, on the page where it is first needed, and linked from elsewhere."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cellformers import plots
from cellformers.io.arrow import as_numbers
from cellformers.io.files import open_parquet, read_metadata, read_table, whole
from cellformers.report import fields, words
from cellformers.report.cells import categories
from cellformers.report.figures import Figure, Figures
from cellformers.report.spec import MapFile, ReportSpec

CATEGORIES_TO_NUMBER = 8  # with more colours than this, clusters on a map are numbered as well


def _coordinates(table: pa.Table, name: str) -> np.ndarray:
    """A coordinate of every cell, float64[n]; ValueError where one is none."""
    found = np.asarray(as_numbers(table[name]), dtype=np.float64)
    if not (np.abs(found) < fields.MOST).all():
        raise ValueError(f"its column {name!r} has what is no coordinate")
    return found


class Maps:
    """Draws the maps of a report.

    Parameters
    ----------
    spec
        The report; one map a dataset and embedding.
    figures
        Where the figures go.
    """

    def __init__(self, spec: ReportSpec, figures: Figures) -> None:
        self.files = {(m.dataset, m.embedding): m for m in spec.maps if m.dataset in spec.datasets}
        self.cells = {name: spec.datasets[name].folder / "cells.parquet" for name, _ in self.files}
        self.own = {
            name: [c for c in (spec.datasets[name].label, spec.datasets[name].batch) if c]
            for name in self.cells
        }
        self.figures = figures
        self.values: dict[tuple[str, str], dict[str, str | None]] = {}
        self.colours: dict[str, dict[str, str]] = {}
        self.drawn: dict[tuple[str, str, str], tuple[Figure, str]] = {}

    def has(self, dataset: str, column: str) -> bool:
        """Whether the cells of a dataset have a column."""
        with open_parquet(self.cells[dataset]) as file:
            return column in file.schema_arrow.names

    def plan(self, columns: Sequence[str]) -> None:
        """Read columns that will be drawn: a value has one colour on all maps of a column, whatever the dataset."""
        wanted = [(name, c) for name in self.cells for c in [*self.own[name], *columns]]
        for name, column in dict.fromkeys(wanted):
            if column in self.own[name] or self.has(name, column):
                ids, values = categories(self.cells[name], column)
                self.values[name, column] = dict(zip(ids, values, strict=True))
        for column in {column for _, column in self.values}:
            frequency: dict[str, int] = {}
            for (_, other), cells in self.values.items():
                for value in cells.values() if other == column else ():
                    if value is not None:
                        frequency[value] = frequency.get(value, 0) + 1
            self.colours[column] = plots.palette(sorted(frequency, key=lambda c: (-frequency[c], c)))

    def show(self, place: str, dataset: str, embedding: str, columns: Sequence[str]) -> dict[str, Any] | None:
        """Maps for a place of the page (its id): figures drawn for it, and places of those drawn before."""
        file = self.files.get((dataset, embedding))
        if file is None:
            return None
        entry = self._describe(file)
        for column in dict.fromkeys(columns or [""]):
            if column and (dataset, column) not in self.values:
                continue
            key = (dataset, embedding, column)
            if key in self.drawn:
                entry["elsewhere"].append({"column": column, "place": self.drawn[key][1]})
            else:
                self.drawn[key] = (self._draw(file, column), place)
                entry["figures"].append(self.drawn[key][0])
        return entry if entry["figures"] or entry["elsewhere"] else None

    def rest(self) -> list[dict[str, Any]]:
        """Every map by the dataset's own columns, where no benchmark has drawn it."""
        found = [self.show("maps", name, embedding, self.own[name]) for name, embedding in self.files]
        return [entry for entry in found if entry is not None]

    def _describe(self, file: MapFile) -> dict[str, Any]:
        made = read_metadata(file.path)
        with whole(file.path):
            parameters = fields.part(made, "parameters")
            cells, method = fields.count(parameters, "n_cells"), fields.text(parameters, "method")
        shown = read_table(file.path, ["cell_id"]).num_rows
        return {
            "dataset": file.dataset,
            "embedding": file.embedding,
            "shown": shown,
            "cells": shown if cells is None else cells,
            "method": method or "umap",
            "figures": [],
            "elsewhere": [],
        }

    def _draw(self, file: MapFile, column: str) -> Figure:
        table = read_table(file.path, ["cell_id", "umap_1", "umap_2"])
        ids = table["cell_id"].to_pylist()
        with whole(file.path):
            xy = np.column_stack([_coordinates(table, name) for name in ("umap_1", "umap_2")])
        text = f"Map of the cells of {file.dataset} by embedding {file.embedding}"
        name = f"{file.dataset}-map-{file.embedding}"
        if not column:
            return self.figures.add(
                name, text, lambda stem: plots.umap_categories(xy, ["cells"] * len(ids), stem, title="Cells")
            )
        cells = self.values[file.dataset, column]
        shown = [cells.get(cell) for cell in ids]
        several = len({v for v in shown if v is not None}) > CATEGORIES_TO_NUMBER
        number = several and column not in self.own[file.dataset][1:]
        return self.figures.add(
            f"{name}-{column}",
            f"{text}, coloured by {column}",
            lambda stem: plots.umap_categories(
                xy, shown, stem, title=f"{words.title(column)}, {file.dataset}", colours=self.colours[column],
                numbered=number,
            ),
        )  # fmt: skip
