"""Dense text: csv, tsv or blanks, gzipped or not, genes x cells or cells x genes.

The header may have a field above the row names or not, fields may be quoted, lines may end in CR LF, a byte-order
mark is skipped. Where genes are is told by the names (Ensembl ids, genes that every tissue expresses, barcodes)
unless `genes_in_rows` says it. Genes in rows are parsed on opening, in one pass, and spilled; cells in rows are
streamed, after a pass that only collects their names.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError
from cellformers.io import kernels
from cellformers.io.lines import first_line, is_blank, open_bytes, various, whole_lines
from cellformers.io.names import as_strings, cell_names, looks_ensembl, strip_version
from cellformers.io.source import Block, CountSource, Head, Matrix, ReadOptions, check_size, refuse_options
from cellformers.io.spill import Spill, split
from cellformers.io.validate import Checker

Array = np.ndarray[Any, Any]
_BOM = b"\xef\xbb\xbf"
_PEEK = 60  # lines
_BARCODE = re.compile(r"(?:.*[^A-Z])?[ACGTN]{8,}(?:[^A-Z].*)?")
# what every tissue expresses, what marks blood cells, and with what lists of genes begin
_COMMON_GENES = """
ACTB ACTG1 ATP5F1B B2M CALM1 CD3D CD3E CD4 CD8A CD14 CD19 CD79A CFL1 COX4I1 EEF1A1 EEF2 ENO1 EPCAM FTH1 FTL
GAPDH GNB1 HMGB1 HNRNPA1 HSP90AA1 HSP90AB1 HSPA8 JUN KRT18 LDHA LYZ MALAT1 MS4A1 MYH9 NACA NEAT1 NKG7 NPM1
PABPC1 PFN1 PKM PPIA PTMA PTPRC RACK1 RPL10 RPL13 RPL13A RPL3 RPL4 RPL7 RPLP0 RPLP1 RPS18 RPS2 RPS3 RPS6
S100A4 SERF2 TMSB10 TMSB4X TPT1 TUBA1B TUBB UBA52 UBC VIM XIST YBX1 MT-CO1 MT-ND1 A1BG A1BG-AS1 A1CF A2M
A2M-AS1 A2ML1 A4GALT AAAS AACS AAGAB AAK1 AAMDC AAMP AAR2 MIR1302-2HG FAM138A OR4F5 OR4F29 OR4F16 SAMD11
NOC2L KLHL17 PLEKHN1 HES4 ISG15 AGRN XKR4 RP1 SOX17 MRPL15 LYPLA1 TCEA1
"""
_COMMON = frozenset(_COMMON_GENES.split())
_FAMILY = re.compile(
    r"(?:A[CLPF]\d{6}\.\d+|LINC\d{5}|RP\d+-\d+[A-Z]+\d+\.\d+|MT-.+|HLA-.+|RP[LS]\d+[ALXY]?|ZNF\d+|SLC\d+A\d+|MIR\d+\w*|"
    r"ERCC-\d{5}|TMEM\d+|KIAA\d{4}|CCDC\d+|C\d+ORF\d+)",
    re.IGNORECASE,
)


def open_text(path: Path, options: ReadOptions) -> CountSource:
    """Open a dense table of text."""
    refuse_options(path, options, "layer", "raw", "gene_column", "cell_column", format_name="dense text")
    notes: list[str] = []
    table = _Table(path)
    if options.genes_in_rows is None:
        genes_in_rows = _genes_in_rows(table.columns, table.peek(), path)
        notes.append(f"genes are in {'rows' if genes_in_rows else 'columns'}")
    else:
        genes_in_rows = options.genes_in_rows
    matrix: Matrix
    if genes_in_rows:
        matrix = by_gene = _GenesInRows(table, options)
        genes, cells = as_strings(by_gene.labels), as_strings(table.columns)
    else:
        genes, cells = as_strings(table.columns), as_strings(table.labels())
        matrix = _CellsInRows(table, len(cells))
    try:
        check_size(matrix, len(cells), len(genes), path)
        names = cell_names(
            len(cells), lambda lo, hi: cells[lo:hi], make_unique=options.make_unique, path=path, notes=notes
        )
    except BaseException:
        matrix.close()
        raise
    return CountSource(
        path=path,
        matrix=matrix,
        names=names,
        feature_ids=as_strings(map(strip_version, genes)),
        notes=notes,
        options=options,
    )


def _gene_share(names: Sequence[str]) -> float:
    """Share of names that are surely genes."""
    hits = sum(name.upper() in _COMMON or _FAMILY.fullmatch(name) is not None for name in names)
    return hits / max(1, len(names))


def _genes_in_rows(columns: Sequence[str], labels: Sequence[str], path: Path) -> bool:
    """Whether the names of the rows, not of the columns, are genes."""
    for are_genes in (looks_ensembl, lambda names: _gene_share(names) > 0.02):
        there, here = are_genes(columns), are_genes(labels)
        if there != here:
            return here
    barcodes = [
        np.mean([_BARCODE.fullmatch(n) is not None for n in names] or [False]) > 0.5
        for names in (columns, labels)
    ]
    if barcodes[0] != barcodes[1]:
        return bool(barcodes[0])
    raise UserError(
        f"can't tell whether genes are in rows ({labels[0] if labels else 'none'!r}, ...) or in columns "
        f"({columns[0]!r}, ...)",
        path=path,
        fix="set genes_in_rows: true or false",
    )


class _Table:
    """A text table: separator, header, and passes over its lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_bytes(path) as file:
            header = self._header(file)
            first, _ = first_line(file, skip=is_blank)
        if not header.strip():
            raise UserError("is empty", path=path, fix="give a table of counts")
        if not first:
            raise UserError("has a header but no rows", path=path, fix="give a table of counts")
        self.separator, top, row = self._sniff(header, first)
        if len(top) == len(row):
            top = top[1:]
        elif len(top) > len(row) or len(top) < len(row) - 1:
            raise UserError(
                f"line 2 has {len(row)} fields, the header {len(top)}",
                path=path,
                fix="give each line as many fields",
            )
        self.columns: list[str] = top
        if not top:
            raise UserError(
                "has no columns of counts", path=path, fix="give a table separated by tabs or commas"
            )

    def _sniff(self, header: bytes, first: bytes) -> tuple[int, list[str], list[str]]:
        best: tuple[int, list[str], list[str]] | None = None
        for separator in "\t,; ":
            top, row = (_fields(line, separator, self.path) for line in (header, first))
            fits = len(row) > 1 and len(row) - 1 <= len(top) <= len(row)
            if fits and (best is None or len(row) > len(best[2])):
                best = (ord(separator), top, row)
        if best is not None:
            return best
        for separator in "\t,; ":
            top, row = (_fields(line, separator, self.path) for line in (header, first))
            if len(row) > 1:
                return ord(separator), top, row
        raise UserError(
            "is no table: neither tabs, commas, semicolons nor blanks separate fields",
            path=self.path,
            fix="give csv or tsv, or another format",
        )

    def _body(self) -> Iterator[bytes]:
        with open_bytes(self.path) as file:
            self._header(file)
            yield from whole_lines(file)

    @staticmethod
    def _header(file: Any) -> bytes:
        line, _ = first_line(file, skip=lambda line: is_blank(line.removeprefix(_BOM)))
        return line.removeprefix(_BOM)

    def peek(self) -> list[str]:
        """Names of the first rows."""
        labels: list[str] = []
        for piece in self._body():
            labels += [self._label(line) for line in piece.split(b"\n")[: _PEEK + 1] if line.strip()]
            if len(labels) >= _PEEK:
                break
        return labels[:_PEEK]

    def labels(self) -> list[str]:
        """Names of all rows."""
        return list(
            various(
                self._label(line) for piece in self._body() for line in piece.split(b"\n") if line.strip()
            )
        )

    def _label(self, line: bytes) -> str:
        if line.startswith(b'"'):
            end = re.compile(rb'"((?:[^"]|"")*)"').match(line)
            if end:
                return end.group(1).decode(errors="replace").replace('""', '"')
        return line.split(bytes([self.separator]), 1)[0].strip(b"\r").decode(errors="replace")

    def pieces(self) -> Iterator[tuple[list[str], Array, Array, Array]]:
        """(row names, non-zeros of each row, columns, values) of piece after piece."""
        line_number = 1
        width = len(self.columns)
        for piece in self._body():
            text = np.frombuffer(piece, dtype=np.uint8)
            n = piece.count(b"\n")
            room = min(n * width, len(piece) // 2 + 1)
            labels, starts = np.empty((n, 2), np.int64), np.empty(n, np.int64)
            counts, columns, values = np.zeros(n, np.int64), np.empty(room, np.int32), np.empty(room)
            lines, code, field, found = kernels.parse_table(
                text, self.separator, width, labels, starts, counts, columns, values
            )
            if code != kernels.OK:
                begin = int(starts[lines])
                bad = piece[begin : piece.index(b"\n", begin)]
                raise self._refusal(bad, line_number + 1 + piece[:begin].count(b"\n"), code, field)
            names = [
                piece[a:b].decode(errors="replace").replace('""', '"') for a, b in labels[:lines].tolist()
            ]
            yield names, counts[:lines], columns[:found], values[:found]
            line_number += n

    def _refusal(self, line: bytes, number: int, code: int, field: int) -> UserError:
        fields = _fields(line, chr(self.separator), self.path)
        if code == kernels.RAGGED or len(fields) != len(self.columns) + 1:
            return UserError(
                f"line {number} has {len(fields)} fields where {len(self.columns) + 1} belong",
                path=self.path,
                fix="give each line as many fields (truncated?)",
            )
        return UserError(
            f"line {number}, column {self.columns[field - 1]!r}: {fields[field][:40]!r} is no number",
            path=self.path,
            fix="only the first column may hold names",
        )


def _fields(line: bytes, separator: str, path: Path) -> list[str]:
    before = csv.field_size_limit(len(line) + 1)
    try:
        fields = next(csv.reader([line.decode(errors="replace").rstrip("\r\n")], delimiter=separator), [])
    except csv.Error as error:
        raise UserError(f"has a line that can't be split into fields ({error})", path=path) from error
    finally:
        csv.field_size_limit(before)  # of the whole process
    # one separator too many at the end of a line is common and harmless
    return fields[:-1] if len(fields) > 1 and fields[-1] == "" else fields


def _head_of(counts: Array, columns: Array, values: Array, *, genes_in_rows: bool) -> Head:
    rows = np.repeat(np.arange(len(counts)), counts)
    n = min(len(values), 1 << 16)
    cells, features = (columns, rows) if genes_in_rows else (rows, columns)
    return Head(values[:n], lambda k: (int(cells[k]), int(features[k])), not genes_in_rows)


class _CellsInRows(Matrix):
    name = "the table"

    def __init__(self, table: _Table, n_cells: int) -> None:
        self._table, self.n_cells, self.n_features = table, n_cells, len(table.columns)

    def head(self) -> Head:
        """The values of the first lines."""
        pieces = self._table.pieces()
        for piece in pieces:
            return _head_of(*piece[1:], genes_in_rows=False)
        raise UserError("has no rows", path=self._table.path)

    def blocks(self, max_bytes: int, check: Checker) -> Iterator[Block]:
        """All cells in order, a piece of the text at a time."""
        start = 0
        for names, counts, columns, values in self._table.pieces():
            indptr = np.concatenate([[0], np.cumsum(counts)])

            def locate(
                k: int, start: int = start, indptr: Array = indptr, columns: Array = columns
            ) -> tuple[int, int]:
                return start + int(np.searchsorted(indptr, k, side="right")) - 1, int(columns[k])

            # copies: the piece's arrays are as long as the text
            yield from split(Block(start, indptr, columns.copy(), check(values, locate)), max_bytes)
            start += len(names)


class _GenesInRows(Matrix):
    name = "the table"

    def __init__(self, table: _Table, options: ReadOptions) -> None:
        self._table, self.n_cells = table, len(table.columns)
        self.labels: list[str] = []
        self._spill = Spill(self.n_cells)
        check = Checker(
            table.path,
            name=self.name,
            cell_id=lambda i: table.columns[i],
            feature_id=lambda j: self.labels[j],
            round_values=options.round,
        )
        try:
            for names, counts, columns, values in table.pieces():
                features = np.repeat(
                    np.arange(len(self.labels), len(self.labels) + len(names), dtype=np.int32), counts
                )
                self.labels += names

                def locate(k: int, columns: Array = columns, features: Array = features) -> tuple[int, int]:
                    return int(columns[k]), int(features[k])

                self._spill.add(columns.copy(), features, check(values, locate, by_cell=False))
        except BaseException:
            self._spill.close()
            raise
        self.n_features = len(self.labels)

    def head(self) -> Head:
        """Nothing: all values were looked at on opening."""
        return Head(np.empty(0), lambda _: (0, 0), False)

    def blocks(self, max_bytes: int, check: Checker) -> Iterator[Block]:  # noqa: ARG002  (checked on opening)
        """All cells in order."""
        yield from self._spill.blocks(max_bytes)

    def close(self) -> None:
        """Remove the temporary file."""
        self._spill.close()
