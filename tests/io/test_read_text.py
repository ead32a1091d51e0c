"""Dense text against the table it was written from, and pandas on real files."""

import csv
import gzip
import tempfile

import numpy as np
import pandas as pd
import pytest

from cellformers.io import ReadOptions, open_counts


def write(
    path, columns, labels, values, *, separator=",", corner="", quote=False, end="\n", start=b"", tail=""
):
    """A table; corner=None leaves the field above the row names out."""
    lines = []
    quoting = csv.QUOTE_NONNUMERIC if quote else csv.QUOTE_MINIMAL

    class Line:
        def write(self, text):
            lines.append(text.removesuffix("\r\n") + tail + end)

    writer = csv.writer(Line(), delimiter=separator, quoting=quoting)
    writer.writerow(columns if corner is None else [corner, *columns])
    for label, row in zip(labels, values, strict=True):
        writer.writerow([label, *row])
    content = start + "".join(lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def values(truth):
    return truth.toarray().astype(int)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
@pytest.mark.parametrize("corner", [None, "", "gene"])
@pytest.mark.parametrize("separator", [",", "\t", ";", " "])
@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_forms(tmp_path, values, gene_ids, cell_ids, agrees, name, corner, separator, genes_in_rows):
    names = (cell_ids, gene_ids, values.T) if genes_in_rows else (gene_ids, cell_ids, values)
    quote = corner == ""  # blanks need quotes around an empty corner
    path = write(tmp_path / name, *names, separator=separator, corner=corner, quote=quote)
    source = agrees(path)
    assert source.notes == [f"genes are in {'rows' if genes_in_rows else 'columns'}"]


@pytest.mark.parametrize("genes_in_rows", [True, False])
@pytest.mark.parametrize(
    "how", [{"end": "\r\n"}, {"start": b"\xef\xbb\xbf"}, {"quote": True, "end": "\r\n"}, {"tail": ","}]
)
def test_quirks(tmp_path, values, gene_ids, cell_ids, agrees, how, genes_in_rows):
    names = (cell_ids, gene_ids, values.T) if genes_in_rows else (gene_ids, cell_ids, values)
    agrees(write(tmp_path / "a.txt", *names, **how))


def test_no_line_end_at_the_end_and_blank_lines(tmp_path, values, gene_ids, cell_ids, agrees):
    path = write(tmp_path / "a.csv", cell_ids, gene_ids, values.T)
    text = path.read_text()
    path.write_text(text.removesuffix("\n"))
    agrees(path)
    path.write_text(text.replace("\n", "\n\n") + "\n\n")
    agrees(path)


def test_floats_and_quoted_numbers(tmp_path, values, gene_ids, cell_ids, agrees):
    agrees(write(tmp_path / "a.csv", cell_ids, gene_ids, values.T.astype(float)))
    words = [[f"{v:.1e}" if v < 10 else f"{v}.00" for v in row] for row in values.T]
    agrees(write(tmp_path / "b.csv", cell_ids, gene_ids, words, quote=True))


def test_quoted_names_with_separators(tmp_path, values, gene_ids, cell_ids):
    genes = [f'a "b", {g}' for g in gene_ids]
    path = write(tmp_path / "a.csv", cell_ids, genes, values.T)
    with open_counts(path, options=ReadOptions(genes_in_rows=True)) as source:
        assert list(source.feature_ids) == genes


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_symbols_are_told_from_cells(tmp_path, values, agrees, gene_ids, cell_ids, genes_in_rows):
    genes = [f"Q{i}X" for i in range(len(gene_ids))]
    known = "MALAT1 B2M ACTB MT-CO1 GAPDH RPLP1 FTL TMSB4X EEF1A1 AC012345.1 LINC01128 HLA-A"
    genes[:12] = known.split()
    names = (cell_ids, genes, values.T) if genes_in_rows else (genes, cell_ids, values)
    agrees(write(tmp_path / "a.csv", *names), genes=genes)


def test_orientation_by_barcodes_or_by_key(tmp_path, values, gene_ids, cell_ids, agrees, refuses):
    genes = [f"q{i}" for i in range(len(gene_ids))]
    agrees(write(tmp_path / "a.csv", cell_ids, genes, values.T), genes=genes)
    agrees(write(tmp_path / "b.csv", genes, cell_ids, values), genes=genes)
    cells = [f"x{i}" for i in range(len(cell_ids))]
    path = write(tmp_path / "c.csv", cells, genes, values.T)
    refuses(path, "can't tell", "genes_in_rows: true or false")
    for genes_in_rows in (True, False):
        with open_counts(path, options=ReadOptions(genes_in_rows=genes_in_rows)) as source:
            assert source.n_features == len(genes if genes_in_rows else cells)


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_refusals(tmp_path, values, gene_ids, cell_ids, refuses, genes_in_rows, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    columns, labels = (cell_ids, gene_ids) if genes_in_rows else (gene_ids, cell_ids)
    table = (values.T if genes_in_rows else values).astype(object)
    path = tmp_path / "a.csv"

    def cell(value):
        changed = table.copy()
        changed[99, 33] = value
        return write(path, columns, labels, changed)

    where = f"line 101, column {columns[33]!r}: "
    refuses(cell("abc"), where + "'abc' is no number")
    refuses(cell(""), where + "'' is no number")
    refuses(cell("1e"), where)
    refuses(cell("1.2.3"), where)
    names = [repr(columns[33]), repr(labels[99])]
    refuses(cell("NA"), "NaN", *names)
    refuses(cell("nan"), "NaN", *names)
    refuses(cell("-3"), "negative", *names)
    refuses(cell("0.693"), "non-integer", "0.693", "round: true", *names)
    refuses(cell("inf"), "infinite", *names)
    lines = write(path, columns, labels, table).read_text().splitlines(keepends=True)
    for broken, found in ((lines[50].rsplit(",", 3)[0] + "\n", -3), (lines[50].strip() + ",1,2\n", 2)):
        path.write_text("".join([*lines[:50], broken, *lines[51:]]))
        refuses(path, f"line 51 has {len(columns) + 1 + found} fields where {len(columns) + 1} belong")
    path.write_text("".join(lines[:60]) + lines[60][:50])
    refuses(path, "line 61 has")
    path.write_text(lines[0])
    refuses(path, "header but no rows")
    path.write_text("\n\n")
    refuses(path, "is empty")
    path.write_text("hello\nworld\n")
    refuses(path, "is no table")
    twice = cell_ids.copy()
    twice[7] = twice[1]
    write(path, *((twice, gene_ids) if genes_in_rows else (gene_ids, twice)), table)
    refuses(path, "more than once", "make_unique: true")
    refuses(path, "layer: has no meaning", layer="x")
    write(path, columns, labels, table)
    path.with_suffix(".csv.gz").write_bytes(gzip.compress(path.read_bytes())[:2000])
    refuses(path.with_suffix(".csv.gz"), "truncated")
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["sc_dropseq", "sc_celseq2", "sc_celseq2_5cl_p1"])
def test_real_files(name, reference_data, collect):
    path = reference_data / "counts" / "lung_lines" / f"{name}.count.csv.gz"
    expected = pd.read_csv(path, index_col=0).T
    with open_counts(path) as source:
        assert list(source.cell_ids) == list(expected.index)
        assert list(source.feature_ids) == list(expected.columns)
        np.testing.assert_array_equal(collect(source, 1 << 20), expected.to_numpy())
