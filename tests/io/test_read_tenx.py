"""10x: .h5 written by hand as Cell Ranger does, mtx by scipy."""

import gzip
import tempfile

import h5py
import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from cellformers.io import open_counts

EXTRA = ["CD3_TotalSeqB", "CD4_TotalSeqB"]


def write_v3(path, truth, gene_ids, symbols, cell_ids, *, extra=(), dtype="int32", compression="gzip"):
    n_extra = len(extra)
    antibodies = sp.csr_matrix(np.full((truth.shape[0], n_extra), 500.0))
    # antibodies first: features left out are not always the last
    X = sp.hstack([antibodies, truth]).tocsr() if n_extra else truth
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(cell_ids, dtype="S")
        for part in ("indices", "indptr"):
            group.create_dataset(part, data=getattr(X, part).astype(np.int64), compression=compression)
        group.create_dataset("data", data=X.data.astype(dtype), compression=compression)
        group["shape"] = np.array([X.shape[1], X.shape[0]], np.int32)
        group["features/id"] = np.array([*extra, *gene_ids], dtype="S")
        group["features/name"] = np.array([*extra, *symbols], dtype="S")
        kinds = ["Antibody Capture"] * n_extra + ["Gene Expression"] * len(gene_ids)
        group["features/feature_type"] = np.array(kinds, dtype="S")


@pytest.mark.parametrize("compression", ["gzip", None])
def test_h5_v3(tmp_path, truth, gene_ids, symbols, cell_ids, agrees, compression):
    write_v3(tmp_path / "a.h5", truth, gene_ids, symbols, cell_ids, compression=compression)
    source = agrees(tmp_path / "a.h5")
    assert list(source.feature_symbols) == symbols
    assert source.notes == []
    agrees(tmp_path / "a.h5", genes=symbols, gene_column="name")


def test_h5_v3_keeps_gene_expression(tmp_path, truth, gene_ids, symbols, cell_ids, agrees):
    write_v3(tmp_path / "a.h5", truth, gene_ids, symbols, cell_ids, extra=EXTRA)
    source = agrees(tmp_path / "a.h5")
    assert source.notes == [
        "only the 211 features of type 'Gene Expression' are read; left out: 2 of type 'Antibody Capture'"
    ]


def write_v2(path, truth, gene_ids, symbols, cell_ids, genome="GRCh38"):
    with h5py.File(path, "a") as file:
        group = file.create_group(genome)
        group["barcodes"] = np.array(cell_ids, dtype="S")
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(truth, part)
        group["shape"] = np.array(truth.shape[::-1])
        group["genes"] = np.array(gene_ids, dtype="S")
        group["gene_names"] = np.array(symbols, dtype="S")


def test_h5_v2(tmp_path, truth, gene_ids, symbols, cell_ids, agrees, refuses):
    write_v2(tmp_path / "a.h5", truth, gene_ids, symbols, cell_ids)
    assert list(agrees(tmp_path / "a.h5").feature_symbols) == symbols
    write_v2(tmp_path / "a.h5", truth, gene_ids, symbols, cell_ids, genome="mm10")
    assert "GRCh38 is read" in agrees(tmp_path / "a.h5").notes[0]
    write_v2(tmp_path / "a.h5", truth, gene_ids, symbols, cell_ids, genome="hg19")
    refuses(tmp_path / "a.h5", "several genomes")


def test_h5_refusals(tmp_path, truth, gene_ids, symbols, cell_ids, refuses):
    path = tmp_path / "a.h5"
    write_v3(path, truth, gene_ids, symbols, cell_ids)
    refuses(path, "layer: has no meaning", layer="x")
    refuses(path, "no gene column 'ensembl'", gene_column="ensembl")
    with h5py.File(path, "r+") as file:
        del file["matrix/indptr"]
    refuses(path, "without indptr")
    write_v3(path, truth, gene_ids[:-1], symbols, cell_ids)
    refuses(path, "features")
    write_v3(path, truth[:0], gene_ids, symbols, [])
    refuses(path, "empty")
    with h5py.File(path, "w") as file:
        file["matrix/barcodes"] = [b"a"]
    refuses(path, "no complete 10x file")


def write_mtx(
    folder,
    truth,
    gene_ids,
    symbols,
    cell_ids,
    *,
    version=3,
    zipped=True,
    field="integer",
    prefix="",
    order=None,
):
    folder.mkdir(exist_ok=True)
    X = truth.T.tocoo()
    if order is not None:
        X = sp.coo_matrix((X.data[order], (X.row[order], X.col[order])), X.shape)
    files = {
        "barcodes.tsv": [[c] for c in cell_ids],
        ("features.tsv" if version == 3 else "genes.tsv"): [
            [g, s, "Gene Expression"][:version] for g, s in zip(gene_ids, symbols, strict=True)
        ],
    }
    for name, rows in files.items():
        text = "".join("\t".join(row) + "\n" for row in rows).encode()
        (folder / (prefix + name + ".gz" * zipped)).write_bytes(gzip.compress(text) if zipped else text)
    target = folder / f"{prefix}matrix.mtx"
    scipy.io.mmwrite(target, X.astype(int if field == "integer" else float), field=field)
    if zipped:
        (folder / f"{prefix}matrix.mtx.gz").write_bytes(gzip.compress(target.read_bytes()))
        target.unlink()
    return folder / f"{prefix}matrix.mtx{'.gz' * zipped}"


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("field", ["integer", "real"])
def test_folders(tmp_path, truth, gene_ids, symbols, cell_ids, agrees, version, zipped, field):
    mtx = write_mtx(
        tmp_path / "f", truth, gene_ids, symbols, cell_ids, version=version, zipped=zipped, field=field
    )
    source = agrees(tmp_path / "f")
    assert list(source.feature_symbols) == symbols
    agrees(mtx)


def test_any_order_of_entries(tmp_path, truth, gene_ids, symbols, cell_ids, agrees):
    order = np.random.default_rng(0).permutation(truth.nnz)
    write_mtx(tmp_path / "f", truth, gene_ids, symbols, cell_ids, order=order)
    agrees(tmp_path / "f")


def test_antibodies_in_a_folder(tmp_path, truth, gene_ids, symbols, cell_ids, agrees, refuses):
    X = sp.hstack([truth, sp.csr_matrix(np.ones((truth.shape[0], 2)))]).tocsr()
    write_mtx(tmp_path / "f", X, gene_ids + EXTRA, symbols + EXTRA, cell_ids)
    text = gzip.decompress((tmp_path / "f" / "features.tsv.gz").read_bytes())
    for name in EXTRA:
        text = text.replace(
            f"{name}\t{name}\tGene Expression".encode(), f"{name}\t{name}\tAntibody Capture".encode()
        )
    (tmp_path / "f" / "features.tsv.gz").write_bytes(gzip.compress(text))
    assert "left out: 2 of type" in agrees(tmp_path / "f").notes[0]
    lines = text.splitlines(keepends=True)
    more = b"".join(
        [*lines, lines[-1].replace(EXTRA[-1].encode(), b"CD9")]
    )  # as many genes, one antibody more
    (tmp_path / "f" / "features.tsv.gz").write_bytes(gzip.compress(more))
    refuses(tmp_path / "f", f"names of {len(lines) + 1} genes")


def test_prefixes_and_cells_in_rows(tmp_path, truth, gene_ids, symbols, cell_ids, agrees):
    for prefix in ("GSM1_a_", "GSM2_b_"):
        path = write_mtx(tmp_path / "f", truth, gene_ids, symbols, cell_ids, prefix=prefix)
    agrees(path)
    folder = tmp_path / "g"
    path = write_mtx(folder, truth, gene_ids, symbols, cell_ids, zipped=False)
    scipy.io.mmwrite(path, truth.astype(int), field="integer")
    assert agrees(folder).notes == ["cells are in the rows of the mtx"]


def test_refusals(tmp_path, truth, gene_ids, symbols, cell_ids, refuses, monkeypatch):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    path = write_mtx(tmp_path / "f", truth, gene_ids, symbols, cell_ids, zipped=False)
    lines = path.read_text().splitlines(keepends=True)

    def with_line(number, text):
        path.write_text("".join([*lines[: number - 1], text, *lines[number:]]))

    with_line(2000, "1 2\n")
    refuses(path, "line 2000 is no entry: '1 2'")
    with_line(2000, "1 2 x\n")
    refuses(path, "line 2000 is no entry")
    with_line(2000, "212 2 1\n")
    refuses(path, "outside 211 genes x 137 cells")
    with_line(2000, "8 9 -1\n")
    refuses(path, "negative", repr(gene_ids[7]), repr(cell_ids[8]))
    with_line(2000, "8 9 1.5\n")
    refuses(path, "non-integer", "round: true")
    path.write_text("".join(lines[:-7]))
    refuses(path, "are announced (truncated?)")
    with_line(1, "%%MatrixMarket matrix array real general\n")
    refuses(path, "another kind")
    with_line(3, "1 2\n")
    refuses(path, "does not give the size")
    path.write_text("".join(lines))
    (tmp_path / "f" / "barcodes.tsv").write_text("".join(f"{c}\n" for c in cell_ids[:-1]))
    refuses(path, "names of 136 cells")
    (tmp_path / "f" / "barcodes.tsv").unlink()
    refuses(path, "has no barcodes.tsv")
    assert list(temporary.iterdir()) == []
    (tmp_path / "outs" / "f").mkdir(parents=True)
    (tmp_path / "outs" / "f" / "matrix.mtx").write_text("")
    refuses(tmp_path / "outs", "further down")


def test_truncated_gzip(tmp_path, truth, gene_ids, symbols, cell_ids, refuses):
    path = write_mtx(tmp_path / "f", truth, gene_ids, symbols, cell_ids)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refuses(path, "damaged or truncated")


def test_duplicate_features_stay_apart(tmp_path, truth, gene_ids, symbols, cell_ids):
    names = gene_ids.copy()
    names[4] = names[0]
    write_mtx(tmp_path / "f", truth, names, symbols, cell_ids)
    with open_counts(tmp_path / "f") as source:
        assert list(source.feature_ids) == names
        assert source.n_features == len(names)
