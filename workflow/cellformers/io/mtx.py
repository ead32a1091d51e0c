"""10x Genomics' mtx folders: a MatrixMarket file, names of genes and of cells, gzipped or not.

An mtx may lie alone beside its name files, whose names then share its prefix (`GSM1_matrix.mtx.gz`,
`GSM1_barcodes.tsv.gz`).
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from cellformers.errors import UserError
from cellformers.io.lines import first_line, is_blank, one_line, open_bytes, various, whole_lines
from cellformers.io.names import as_strings
from cellformers.io.source import (
    Block,
    CountSource,
    Head,
    Matrix,
    ReadOptions,
    check_size,
    reading,
    refuse_options,
)
from cellformers.io.spill import Spill
from cellformers.io.tenx import GENES, kept_features, positions_of, tenx_source
from cellformers.io.validate import Checker

Array = np.ndarray[Any, Any]
_HEAD_LINES = 1 << 14
_MOST_ROWS = 100_000_000


def find_mtx(folder: Path) -> Path | None:
    """The one mtx in a folder, None where there is none.

    Raises
    ------
    UserError
        If there are several.
    """
    found = sorted(p for p in folder.iterdir() if p.name.lower().endswith((".mtx", ".mtx.gz")))
    plain = [p for p in found if p.name in ("matrix.mtx", "matrix.mtx.gz")]
    if len(found) > 1 and len(plain) != 1:
        raise UserError(
            f"holds several matrices ({', '.join(p.name for p in found[:3])}, ...)",
            path=folder,
            fix="name one of them",
        )
    return next(iter(plain or found), None)


def open_mtx(path: Path, options: ReadOptions) -> CountSource:
    """Open a 10x mtx folder, or an mtx beside its name files."""
    refuse_options(path, options, "layer", "raw", "cell_column", format_name="10x files")
    mtx = path
    if path.is_dir():
        found = find_mtx(path)
        if found is None:
            raise UserError(
                "holds no matrix.mtx or matrix.mtx.gz", path=path, fix="give the folder that does"
            )
        mtx = found
    notes: list[str] = []
    barcodes = as_strings(row[0] for row in _table(_beside(mtx, ("barcodes",)), columns=1))
    genes = _table(_beside(mtx, ("features", "genes")))
    ids = as_strings(row[0] for row in genes)
    symbols = as_strings(row[1] for row in genes) if genes and all(len(row) > 1 for row in genes) else None
    kinds = as_strings(row[2] for row in genes) if genes and all(len(row) > 2 for row in genes) else None
    if kinds is not None and GENES not in kinds and not any(" " in kind for kind in kinds):
        kinds = None  # a third column that is no 10x feature type
    matrix = MtxMatrix(mtx, n_cells=len(barcodes), n_features=len(genes), notes=notes)
    if len(barcodes) and len(barcodes) == matrix.n_cells + 1 and len(genes) == matrix.n_features + 1:
        barcodes, ids = barcodes[1:], ids[1:]
    kept = kept_features(kinds, mtx, notes)
    if kept is not None:
        check_size(matrix, len(barcodes), len(ids), mtx)
        matrix.keep(positions_of(kept, len(ids)), len(kept))
    return tenx_source(mtx, matrix, ids, symbols, kept, barcodes, options, notes)


def _beside(mtx: Path, kinds: tuple[str, ...]) -> Path:
    """The name file of an mtx: in the same folder, with the longest beginning in common."""
    candidates = [
        p
        for p in sorted(mtx.parent.iterdir())
        if any(kind in p.name.lower() for kind in kinds)
        and p.name.lower().removesuffix(".gz").endswith((".tsv", ".txt", ".csv"))
    ]
    if not candidates:
        raise UserError(
            f"has no {' or '.join(kinds)}.tsv (or .tsv.gz) beside it",
            path=mtx,
            fix="put it into the same folder",
        )
    common = [_common_start(p.name, mtx.name) for p in candidates]
    best = [p for p, n in zip(candidates, common, strict=True) if n == max(common)]
    if len(best) > 1:
        plain = [p for p in best if p.name.split(".")[0] in kinds]
        stems = {p.name.removesuffix(".gz") for p in plain or best}
        if len(stems) > 1:
            raise UserError(
                f"has several name files beside it ({', '.join(p.name for p in best[:3])})",
                path=mtx,
                fix="leave one in the folder",
            )
        best = plain or best
    return best[0]


def _common_start(one: str, other: str) -> int:
    """Characters two names begin with in common."""
    return next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _table(path: Path, *, columns: int = 3) -> list[list[str]]:
    """The first columns of the rows of a small tsv; csv by its name.

    Raises
    ------
    UserError
        If it is damaged, or its rows are no names.
    """
    separator = "," if path.name.lower().removesuffix(".gz").endswith(".csv") else "\t"
    rows: list[list[str]] = []

    def first(row: list[str]) -> str:
        rows.append(row[:columns])
        return row[0]

    try:
        with reading(path), open_bytes(path) as file:
            text = io.TextIOWrapper(cast(BinaryIO, file), encoding="utf-8-sig", errors="replace", newline="")
            for _ in various(first(row) for row in csv.reader(text, delimiter=separator) if row):
                if len(rows) > _MOST_ROWS:
                    raise OSError(f"it has more than {_MOST_ROWS:,} rows")
    except csv.Error as error:
        raise UserError(
            f"can't be split into fields ({error})", path=path, fix="copy or download it again"
        ) from error
    return rows


class MtxMatrix(Matrix):
    """A MatrixMarket coordinate file in any order of entries: spilled on the first call of `blocks`."""

    name = "matrix"

    def __init__(self, path: Path, *, n_cells: int, n_features: int, notes: list[str]) -> None:
        self.path = path
        self._spill: Spill | None = None
        self._position: Array | None = None
        with open_bytes(path) as file:
            head = one_line(file).decode(errors="replace").lower().split()
            if len(head) < 5 or head[0] != "%%matrixmarket":
                raise UserError("is no MatrixMarket file", path=path, fix="give an .mtx file")
            if (
                head[2] != "coordinate"
                or head[3] not in ("integer", "real", "unsigned-integer")
                or head[4] != "general"
            ):
                raise UserError(
                    f"is a MatrixMarket file of another kind ({' '.join(head[2:5])})",
                    path=path,
                    fix="write it as 'coordinate integer general'",
                )
            line, skipped = first_line(file, skip=lambda line: line.startswith(b"%") or is_blank(line))
            self._skip = 2 + skipped
            try:
                rows, columns, self._n_entries = (int(x) for x in line.split())
            except ValueError:
                raise UserError(
                    f"line {self._skip} does not give the size", path=path, fix="download it again"
                ) from None
        # genes in rows is the custom; the other way round only where nothing else fits
        self._cells_in_rows = (rows, columns) == (n_cells, n_features) != (n_features, n_cells)
        if self._cells_in_rows:
            notes.append("cells are in the rows of the mtx")
        self.n_cells, self.n_features = (rows, columns) if self._cells_in_rows else (columns, rows)

    def keep(self, position: Array | None, n_features: int) -> None:
        """Read only features whose `position` is not -1, and number them so."""
        self._position, self.n_features = position, n_features

    def _pieces(self) -> Iterator[tuple[Array, Array, Array]]:
        """(cells, features, values) of piece after piece of the file."""
        from cellformers.io import kernels

        line = self._skip
        n_read = 0
        stored = self.n_features if self._position is None else len(self._position)
        with open_bytes(self.path) as file:
            for _ in range(self._skip):
                one_line(file)
            for piece in whole_lines(file):
                text = np.frombuffer(piece, dtype=np.uint8)
                n = piece.count(b"\n")
                rows, columns, values = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.float64)
                found, bad = kernels.parse_entries(text, rows, columns, values)
                if bad >= 0:
                    number = line + 1 + piece[:bad].count(b"\n")
                    shown = piece[bad : bad + 60].split(b"\n")[0].decode(errors="replace").strip()
                    raise UserError(
                        f"line {number} is no entry: {shown!r}", path=self.path, fix="download it again"
                    )
                cells, features = (rows, columns) if self._cells_in_rows else (columns, rows)
                cells, features, values = cells[:found], features[:found], values[:found]
                if found and (int(cells.max()) >= self.n_cells or int(features.max()) >= stored):
                    raise UserError(
                        f"has an entry outside {stored} genes x {self.n_cells} cells near line {line + 1}",
                        path=self.path,
                        fix="download it again",
                    )
                line += n
                n_read += found
                if self._position is not None:
                    features = self._position[features]
                    kept = features >= 0
                    cells, features, values = cells[kept], features[kept], values[kept]
                yield cells, features, values
        if n_read != self._n_entries:
            raise UserError(
                f"has {n_read} entries where {self._n_entries} are announced (truncated?)",
                path=self.path,
                fix="download it again",
            )

    def head(self) -> Head:
        """The first values."""
        cells = features = np.empty(0, np.int32)
        values = np.empty(0)
        pieces = self._pieces()
        for cells, features, values in pieces:  # noqa: B007  (used below)
            break
        pieces.close()  # type: ignore[attr-defined]
        n = min(len(values), _HEAD_LINES)
        return Head(values[:n], lambda k: (int(cells[k]), int(features[k])), True)

    def blocks(self, max_bytes: int, check: Checker) -> Iterator[Block]:
        """All cells in order."""
        if self._spill is None:
            spill = Spill(self.n_cells)
            try:
                for cells, features, values in self._pieces():

                    def locate(k: int, cells: Array = cells, features: Array = features) -> tuple[int, int]:
                        return int(cells[k]), int(features[k])

                    spill.add(cells, features, check(values, locate))
            except BaseException:
                spill.close()
                raise
            self._spill = spill
        yield from self._spill.blocks(max_bytes)

    def close(self) -> None:
        """Remove the temporary file."""
        if self._spill is not None:
            self._spill.close()
            self._spill = None
