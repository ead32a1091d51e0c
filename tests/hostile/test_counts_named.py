"""Count files that are hostile in a way that has a name: each is read right, or refused in one line."""

import gzip
import json
import os
import tempfile
from pathlib import Path

import anndata
import forked
import h5py
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import structures
from command_line import run
from count_targets import read_counts, read_h5ad
from hostile_cases import COMPILED
from token_files import make_vocabulary

from cellformers.counts import Sample, ingest
from cellformers.errors import UserError
from cellformers.io import open_counts
from cellformers.io.hdf5 import open_hdf5
from cellformers.io.labels import read_labels
from cellformers.io.samples import read_sample_table
from cellformers.tokens import read_tokens

GENES = [f"ENSG{i:011d}" for i in range(1, 31)]


def write(path: Path, table, cells=None, genes=None, dtype=np.float32) -> Path:
    table = sp.csr_matrix(np.asarray(table), dtype=dtype)
    n, m = table.shape
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n)] if cells is None else cells)
    var = pd.DataFrame(index=GENES[:m] if genes is None else genes)
    anndata.AnnData(table, obs=obs, var=var).write_h5ad(path)
    return path


def within(folder, task, *arguments, **options):
    """Call a task whose temporary files go into a folder."""
    tempfile.tempdir = str(folder)
    return task(*arguments, **options)


def refusal(task, *arguments, folder: Path, **options) -> str:
    """The line that a task is refused with, in a watched process."""
    outcome = forked.run(
        within, folder, task, *arguments, writable=[folder, *COMPILED], seconds=60, **options
    )
    assert outcome.kind == "user_error", f"{outcome.kind} {outcome.text} {outcome.value!r:.200}"
    assert not outcome.deeds
    assert "\n" not in outcome.text
    assert len(outcome.text) < 1000
    assert outcome.peak_mb < 2048
    assert "memory" not in outcome.text
    return outcome.text


@pytest.fixture
def counts(tmp_path) -> Path:
    return write(
        tmp_path / "a.h5ad", np.random.default_rng(0).poisson(2, (9, 11)), structures.CELLS, structures.GENES
    )


# --- HDF5 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["X", "X/data", "obs", "obs/_index", "var"])
@pytest.mark.parametrize("other", ["/etc/passwd", "other.h5"])
def test_links_to_other_files_are_refused(tmp_path, counts, place, other):
    with h5py.File(counts, "r+") as file:
        with h5py.File(tmp_path / "other.h5", "w") as target:
            file.copy(file[place], target, "x")
        del file[place]
        file[place] = h5py.ExternalLink(other, "/x")
    line = refusal(read_h5ad, tmp_path, folder=tmp_path)
    assert "is a link to another file" in line
    assert str(counts) in line


def test_data_kept_in_other_files_are_refused(tmp_path, counts):
    with h5py.File(counts, "r+") as file:
        del file["obs/_index"]
        file["obs"].create_dataset("_index", (9,), "S4", external=[("/etc/passwd", 0, 36)])
    line = refusal(read_h5ad, tmp_path, folder=tmp_path)
    assert "is stored in another file (/etc/passwd)" in line
    assert "root:" not in line


def test_virtual_data_of_other_files_are_refused(tmp_path, counts):
    with h5py.File(counts, "r+") as file:
        layout = h5py.VirtualLayout(shape=file["X/data"].shape, dtype="f4")
        layout[:] = h5py.VirtualSource("other.h5", "x", shape=layout.shape)
        del file["X/data"]
        file["X"].create_virtual_dataset("data", layout)
    assert "is stored in another file (other.h5)" in refusal(read_h5ad, tmp_path, folder=tmp_path)


def test_embeddings_are_not_written_through_a_link(tmp_path, counts):
    from cellformers.embed_file import _takes_elements

    with h5py.File(tmp_path / "victim.h5", "w") as other:
        other.create_group("obsm")
    with h5py.File(counts, "r+") as file:
        del file["obsm"]
        file["obsm"] = h5py.ExternalLink("victim.h5", "/obsm")
    assert "is a link to another file" in refusal(_takes_elements, counts, folder=tmp_path)


@pytest.mark.parametrize(
    "twist",
    [structures.cycle, structures.billions, structures.bad_indptr, structures.bad_index, structures.unsigned_index,
     structures.wrong_shape, structures.huge_integer, structures.odd_type, structures.unknown_filter],
    ids=lambda twist: twist.__name__,
)  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_twisted_files_are_refused(tmp_path, counts, twist, seed):
    import random

    with h5py.File(counts, "r+") as file:
        if twist(file, random.Random(seed)) is not structures.Refused:
            pytest.skip("may be read")
    assert str(counts) in refusal(read_h5ad, tmp_path, folder=tmp_path)


def test_texts_overwritten_with_zeros_do_not_hang(tmp_path, counts):
    """HDF5 never leaves a heap of texts in which an object takes no room."""
    data = bytearray(counts.read_bytes())
    heap = data.index(b"GCOL")
    data[heap + 128 : heap + 640] = bytes(512)
    counts.write_bytes(data)
    assert "texts have been overwritten" in refusal(read_h5ad, tmp_path, folder=tmp_path)


def test_large_heaps_of_texts_are_looked_at_to_their_end(tmp_path):
    """The library reads the first 4 kB of a heap, then the rest."""
    path, texts = tmp_path / "texts.h5", [f"{number:040d}" for number in range(2000)]
    with h5py.File(path, "w") as file:
        file.create_dataset("texts", data=texts, dtype=h5py.string_dtype())
    with open_hdf5(path) as file:
        assert list(file["texts"].asstr()[:]) == texts
    data = bytearray(path.read_bytes())
    inside = data.index(b"GCOL") + 40_000
    data[inside : inside + 256] = bytes(256)
    path.write_bytes(data)
    with open_hdf5(path) as file, pytest.raises(OSError, match="texts have been overwritten"):
        file["texts"][:]


@pytest.mark.parametrize("name", ["data", "indices"])
@pytest.mark.parametrize(
    ("chunk", "says"), [(1 << 20, "has more bytes, not"), (None, "stored in more bytes than it holds")]
)
def test_a_chunk_that_unpacks_to_gigabytes_is_refused(tmp_path, counts, name, chunk, says):
    import zlib

    squeeze = zlib.compressobj(9)
    start, piece = (squeeze.compress(bytes(1 << 20)) + squeeze.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    bomb = start + piece * (3 << 10)  # 3 GiB of zeros
    with h5py.File(counts, "r+") as file:
        values = file["X"][name][:]
        del file["X"][name]
        made = file["X"].create_dataset(
            name, data=values, chunks=(chunk or len(values),), maxshape=(None,), compression="gzip"
        )
        made.id.write_direct_chunk((0,), bomb, 0)
    assert says in refusal(read_h5ad, tmp_path, folder=tmp_path)


@pytest.mark.parametrize("codec", ["pickle", "base64"])
def test_zarr_codecs_that_may_run_code_are_refused(tmp_path, codec):
    path = tmp_path / "a.zarr"
    anndata.AnnData(sp.csr_matrix(np.ones((3, 4), np.float32))).write_zarr(path)
    described = json.loads((path / "X" / "data" / ".zarray").read_text())
    described |= {"compressor": {"id": codec}}
    (path / "X" / "data" / ".zarray").write_text(json.dumps(described))
    (path / ".zmetadata").unlink(missing_ok=True)
    call = f"cos\nsystem\n(S'touch {tmp_path / 'x'}'\ntR."
    (path / "X" / "data" / "0").write_bytes(call.encode())
    assert codec in refusal(read_counts, path, folder=tmp_path)
    assert not (tmp_path / "x").exists()


# --- text -------------------------------------------------------------------------------------------------


def bomb(path: Path, content: bytes, gigabytes: int = 10) -> Path:
    """A gzip file of some MB that unpacks to gigabytes: one member, again and again."""
    piece = gzip.compress(content * ((64 << 20) // len(content)), 6, mtime=0)
    path.write_bytes(piece * (gigabytes << 4))
    assert path.stat().st_size < 20 << 20
    return path


def mtx(folder: Path, lines: str, *, size: str, cells: bytes | None = None) -> Path:
    (folder / "matrix.mtx").write_text(f"%%MatrixMarket matrix coordinate integer general\n{size}\n{lines}")
    (folder / "features.tsv").write_text("".join(f"{g}\tG{i}\n" for i, g in enumerate(GENES[:3])))
    (folder / "barcodes.tsv").write_bytes(b"AAA\nCCC\nGGG\nTTT\n" if cells is None else cells)
    return folder


@pytest.mark.parametrize(
    ("size", "lines", "said"),
    [
        ("1000000000000 1000000000000 1", "1 1 1\n", "genes"),
        ("3 4 1000000000000", "1 1 1\n", "1000000000000 are announced"),
        ("3 4 2", "1 1 1\n", "has 1 entries where 2"),
        ("3 4 1", "1 1 1\n2 1 1\n", "has 2 entries where 1"),
        ("3 4 1", "0 1 1\n", "is no entry"),
        ("3 4 1", "4 1 1\n", "outside 3 genes x 4 cells"),
        ("3 4 1", "1 5 1\n", "outside 3 genes x 4 cells"),
        ("3 4 1", "-1 1 1\n", "is no entry"),
        ("3 4 1", "99999999999999999999 1 1\n", "is no entry"),
        ("3 4 1", "1 1 1e400\n", "infinite"),
        ("3 4 1", "1 1 -7\n", "negative"),
        ("3 4 1", "1 1 nan\n", "NaN"),
        ("-3 4 1", "1 1 1\n", "names of"),
        ("3 4", "1 1 1\n", "does not give the size"),
    ],
)
def test_mtx_that_lie_are_refused(tmp_path, size, lines, said):
    assert said in refusal(read_counts, mtx(tmp_path, lines, size=size), folder=tmp_path)


@pytest.mark.parametrize(
    "content", [b"0", b"\n", b"1 1 1\n", b"%\n"], ids=["line", "lines", "entries", "comments"]
)
def test_an_mtx_of_gigabytes_is_refused(tmp_path, content):
    mtx(tmp_path, "", size="3 4 1")
    (tmp_path / "matrix.mtx").unlink()
    bomb(tmp_path / "matrix.mtx.gz", content)
    start = gzip.compress(b"%%MatrixMarket matrix coordinate integer general\n3 4 9\n", mtime=0)
    rest = (tmp_path / "matrix.mtx.gz").read_bytes()
    (tmp_path / "matrix.mtx.gz").write_bytes(start + rest)
    refusal(read_counts, tmp_path, folder=tmp_path)


def test_names_of_gigabytes_are_refused(tmp_path):
    mtx(tmp_path, "1 1 1\n", size="3 4 1")
    (tmp_path / "barcodes.tsv").unlink()
    bomb(tmp_path / "barcodes.tsv.gz", b"AAA\n")
    assert "names in a row 1 differ" in refusal(read_counts, tmp_path, folder=tmp_path)


@pytest.mark.parametrize("start", [b"", b"gene,c1,c2\n", b"cell,ENSG00000000001,ENSG00000000002\n"])
@pytest.mark.parametrize("content", [b"0", b"a,1,2\n", b"\n"], ids=["line", "lines", "empty"])
def test_a_table_of_gigabytes_is_refused(tmp_path, start, content):
    path = bomb(tmp_path / "a.csv.gz", content)
    path.write_bytes(gzip.compress(start, mtime=0) + path.read_bytes() if start else path.read_bytes())
    refusal(read_counts, path, folder=tmp_path)


@pytest.mark.parametrize("content", [b"0", b"a,1,2\n"], ids=["line", "lines"])
def test_a_label_table_of_gigabytes_is_refused(tmp_path, content):
    path = bomb(tmp_path / "a.csv.gz", content)
    path.write_bytes(gzip.compress(b"k,a,b\n", mtime=0) + path.read_bytes())
    refusal(read_labels, path, folder=tmp_path)
    refusal(read_labels, path, text_columns=["k"], columns=["k"], folder=tmp_path)


@pytest.mark.parametrize("text", ['"c1,1,2\n', 'c1,"1,2\n', 'c1,1,2\n"c2,3,4\nc3,5,6\n'])
def test_quotes_that_never_close_are_refused(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text("x,ENSG00000000001,ENSG00000000002\n" + text)
    refusal(read_counts, path, folder=tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks(tmp_path, end, bom):
    path = tmp_path / "a.csv"
    lines = ["x,ENSG00000000001,ENSG00000000002", "AAAACCCC,1,2", "CCCCGGGG,0,3", ""]
    path.write_bytes(bom + end.join(lines).encode())
    expected = [(0, 0, 1), (0, 1, 2), (1, 1, 3)]
    assert read_counts(path) == (["AAAACCCC", "CCCCGGGG"], GENES[:2], expected)


def test_other_encodings_are_read_or_refused(tmp_path):
    path = tmp_path / "a.csv"
    text = "x,ENSG00000000001,ENSG00000000002\nM\u00fcller-AAAACCCC,1,2\n"
    path.write_bytes(text.encode("latin-1"))
    assert read_counts(path)[2] == [(0, 0, 1), (0, 1, 2)]
    path.write_bytes(text.encode("utf-16"))
    assert "has no known format" in refusal(read_counts, path, folder=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"sample\n", b"sample,path\na,x\na,y\n", b'sample,path\n"a,b\n', b"sample,path\n,\n", b""],
)
def test_broken_sample_tables_are_refused(tmp_path, content):
    path = tmp_path / "samples.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples\.csv"):
        read_sample_table(path)


def test_a_sample_whose_path_has_a_zero_byte_is_refused(tmp_path):
    path = tmp_path / "samples.csv"
    path.write_bytes(b"sample,path\na,\x00\n")
    with pytest.raises(UserError):
        open_counts(read_sample_table(path)[0]["path"])


# --- names ------------------------------------------------------------------------------------------------

NAMES = [
    "/etc/passwd", "../../up", "..", "a\nb", "a\tb", "<script>alert(1)</script>", "a&b<c>\"d'", "\u202eabc",
    "e\u0301\u0327", "\U0001f9ec", "", " ", "nan", "a:b", "C:\\x", "%s%n", "{x}", "$(touch x)", "-o", "=1+1",
    "a" * 4096,
]  # fmt: skip


def chain(folder: Path, path: Path, *options: str | Path, genes: int = 60) -> Path:
    """A file through ingest, QC, sketch, medians and tokenize, by the command line; the folder of what was made."""
    out, shard = folder / "out", folder / "out" / "counts" / "0001-of-0001.h5ad"
    make_vocabulary(genes, context_length=64).save(folder / "v")
    steps = [
        ("ingest", path, "-o", out, *options),
        ("qc-metrics", shard, "-o", out / "metrics.parquet"),
        ("qc", out / "metrics.parquet", "--metadata", out / "metadata.parquet", "-o", out / "cells.parquet",
         "--report", out / "qc", "--method", "none"),
        ("sketch", shard, "--cells", out / "cells.parquet", "-o", out / "sketch.parquet"),
        ("medians", out / "sketch.parquet", "-o", out / "medians.parquet"),
        ("tokenize", shard, "--vocabulary", folder / "v", "--cells", out / "cells.parquet", "-o", out / "t.parquet"),
    ]  # fmt: skip
    for step in steps:
        ran = run(*step, "-q")
        assert ran.code == 0, ran.err
    return out


def test_names_of_cells_are_data(tmp_path):
    table = np.random.default_rng(0).poisson(3, (len(NAMES), 30)) + 1
    path = write(tmp_path / "a.h5ad", table, cells=NAMES)
    before = {p for p in tmp_path.rglob("*") if p != path}
    out = chain(tmp_path, path)
    assert pq.read_table(out / "metadata.parquet")["cell_id"].to_pylist() == NAMES
    assert [name for batch in read_tokens(out / "t.parquet") for name in batch.cell_ids] == NAMES
    made = set(tmp_path.rglob("*")) - before - {path}
    assert all(p.is_relative_to(out) or p.is_relative_to(tmp_path / "v") for p in made)
    assert not (Path.cwd() / "x").exists()


def test_names_of_genes_are_data(tmp_path):
    table = np.random.default_rng(0).poisson(3, (5, len(NAMES) + 30)) + 1
    path = write(tmp_path / "a.h5ad", table, genes=[*NAMES, *GENES])
    out = chain(tmp_path, path)
    assert pq.read_table(out / "features.parquet")["feature_id"].to_pylist() == [*NAMES, *GENES]


@pytest.mark.parametrize("where", ["obs", "var"])
@pytest.mark.parametrize("name", [b"a\0b", b"a" * 10_000_000], ids=["zero", "long"])
def test_names_that_no_file_holds_are_refused(tmp_path, counts, where, name):
    with h5py.File(counts, "r+") as file:
        names = list(file[where]["_index"].asstr()[:])
        del file[where]["_index"]
        file[where]["_index"] = np.array([name, *(n.encode() for n in names[1:])])
    line = refusal(read_h5ad, tmp_path, folder=tmp_path)
    assert "is called" in line


def test_names_that_are_no_unicode_stay_apart(tmp_path, counts):
    with h5py.File(counts, "r+") as file:
        made = np.array([bytes([0xF0 + i, 0x80]) + b"%d" % i for i in range(9)], dtype=object)
        del file["obs/_index"]
        file["obs"].create_dataset("_index", (9,), h5py.string_dtype())[:] = made
        file["obs"][b"\xff\xfe"] = np.arange(9)
        file["obs"].attrs["column-order"] = np.array([b"\xff\xfe"], dtype="S2")
    outcome = forked.run(read_h5ad, tmp_path, writable=[tmp_path, *COMPILED])
    assert outcome.kind in ("value", "user_error"), outcome.text
    if outcome.kind == "value":
        assert len(set(outcome.value[0])) == 9


# --- sizes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_no_cells_or_no_genes(tmp_path, shape):
    path = write(tmp_path / "a.h5ad", np.zeros(shape))
    assert f"is empty ({shape[0]} cells, {shape[1]} genes)" in refusal(read_h5ad, tmp_path, folder=tmp_path)
    ran = run("ingest", path, "-o", tmp_path / "out", "-q")
    assert ran.code == 2
    assert ran.err.count("\n") == 1


def test_one_cell(tmp_path):
    out = chain(tmp_path, write(tmp_path / "a.h5ad", np.arange(1, 31)[None]))
    (batch,) = read_tokens(out / "t.parquet")
    assert len(batch.cell_ids) == 1


def test_a_gene_of_no_cell(tmp_path):
    table = np.ones((4, 30), int)
    table[:, 3] = 0
    out = chain(tmp_path, write(tmp_path / "a.h5ad", table))
    features = pq.read_table(out / "features.parquet").to_pydict()
    assert (features["n_cells"][3], features["n_counts"][3]) == (0, 0)
    medians = pq.read_table(out / "medians.parquet").to_pydict()
    found = dict(zip(medians["gene_id"], medians["median"], strict=True))
    assert not found.get(GENES[3])


def test_a_cell_of_60000_genes(tmp_path):
    table = np.ones((2, 60_000), np.float32)
    table[0] = np.arange(60_000) % 977 + 1
    genes = [f"ENSG{i:011d}" for i in range(60_000)]
    out = chain(tmp_path, write(tmp_path / "a.h5ad", table, genes=genes), genes=60_000)
    cells = pq.read_table(out / "cells.parquet").to_pydict()
    assert cells["n_genes"] == [60_000, 60_000]
    assert cells["n_counts"][0] == table[0].sum(dtype=np.int64)
    tokens = [len(row) for row in pq.read_table(out / "t.parquet")["input_ids"].to_pylist()]
    assert tokens == [64, 64]


def test_counts_above_two_to_the_31(tmp_path):
    """Counts up to 2^53 in all are kept exactly, as int64; what floats can't add up exactly is refused."""
    table = np.ones((3, 30), np.float64)
    table[0, 2], table[1, 4] = 2**31 + 5, 2**40 + 1
    out = chain(tmp_path, write(tmp_path / "a.h5ad", table, dtype=np.float64))
    assert read_counts(out / "counts" / "0001-of-0001.h5ad")[2][2] == (0, 2, 2**31 + 5)
    cells = pq.read_table(out / "cells.parquet").to_pydict()
    assert cells["n_counts"] == [2**31 + 34, 2**40 + 30, 30]
    features = pq.read_table(out / "features.parquet").to_pydict()
    assert features["n_counts"][4] == 2**40 + 3
    first = pq.read_table(out / "t.parquet")["input_ids"].to_pylist()[1][0]
    assert first == make_vocabulary(60).token_ids[5]  # gene 5 of the vocabulary is the fifth in the file


@pytest.mark.parametrize("value", [2.0**53 + 2, 2.0**62, 1e300])
def test_counts_that_are_too_large_are_refused(tmp_path, value):
    table = np.ones((3, 30), np.float64)
    table[1, 4] = value
    write(tmp_path / "a.h5ad", table, dtype=np.float64)
    assert "too large to be counts" in refusal(read_h5ad, tmp_path, folder=tmp_path)


def test_counts_that_do_not_add_up_are_refused(tmp_path):
    write(tmp_path / "a.h5ad", np.full((3, 30), 2.0**52), dtype=np.float64)
    assert "too many to be added up exactly" in refusal(read_h5ad, tmp_path, folder=tmp_path)


def test_nothing_is_left_of_a_refused_ingest(tmp_path, counts):
    with h5py.File(counts, "r+") as file:
        file["X/data"][-1] = -1
    out = tmp_path / "o"
    with pytest.raises(UserError):
        ingest([Sample(counts)], [out / "0.h5ad"], metadata=out / "m", features=out / "f")
    assert not out.exists() or os.listdir(out) == []
