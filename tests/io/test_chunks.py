"""Gzipped chunks read directly, against the library's slices."""

import zlib

import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from cellformers.io import chunks, dense, inflate
from cellformers.io.chunks import open_chunks
from cellformers.io.source import open_counts

SHAPE = (211, 137)  # no multiple of any chunk


@pytest.fixture(params=["zlib", "zlib_ng"])
def inflater(request, monkeypatch):
    """Both libraries that decompress, where both are installed."""
    module = zlib if request.param == "zlib" else pytest.importorskip("zlib_ng.zlib_ng")
    monkeypatch.setattr(inflate, "inflater", module)


def table(dtype, *, share: float = 0.1, seed: int = 0):
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 120, SHAPE) * (rng.random(SHAPE) < share)
    values[:, 5], values[9] = 0, 0
    values[7] = 1 + rng.integers(0, 100, SHAPE[1])
    return values.astype(dtype)


def store(path, values, **how):
    with h5py.File(path, "w") as file:
        file.create_dataset("m", data=values, **{"compression": "gzip", **how})
    return h5py.File(path)["m"]


def all_of(reader):
    """All columns of chunks one below the other, as a cells x genes CSR."""
    parts = [reader.read(number) for number in range(reader.n_bands)]
    genes = reader._n_genes
    return sp.vstack([sp.csr_matrix((v, i, p), (len(p) - 1, genes)) for p, i, v in parts], format="csr")


def agree(dataset, expected, *, cells_in_rows, threads=1):
    """The reader finds what scipy finds in the dense table: entries, their order and their type."""
    reader = open_chunks(dataset, cells_in_rows=cells_in_rows, threads=threads)
    found = all_of(reader)
    wanted = sp.csr_matrix(expected if cells_in_rows else expected.T)
    assert found.data.dtype == expected.dtype
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize("cells_in_rows", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("chunk", [(64, 64), (7, 3), (1, 137), (211, 1), (211, 137), (33, 100)])
def test_any_shape_of_chunks(tmp_path, inflater, chunk, shuffle, cells_in_rows):
    for dtype in ("uint8", "int32", "float64"):
        values = table(dtype)
        with store(tmp_path / f"{dtype}.h5", values, chunks=chunk, shuffle=shuffle).file as file:
            agree(file["m"], values, cells_in_rows=cells_in_rows)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32"])
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_any_type_and_density(tmp_path, dtype, share):
    values = table(dtype, share=share)
    for shuffle in (True, False):
        with store(tmp_path / f"{shuffle}.h5", values, chunks=(64, 64), shuffle=shuffle).file as file:
            agree(file["m"], values, cells_in_rows=False)


def test_what_is_not_zero_stays_as_it_is(tmp_path):
    values = table("float32")
    values[0, :4] = np.nan, -0.0, -1.5, np.inf
    values[0, 4:6] = 1e-42, 0.5
    for shuffle in (True, False):
        with store(tmp_path / f"{shuffle}.h5", values, chunks=(64, 64), shuffle=shuffle).file as file:
            found = all_of(open_chunks(file["m"], cells_in_rows=True, threads=1))
        np.testing.assert_array_equal(found.toarray(), values)
        assert found[0].nnz == np.count_nonzero(values[0])


def test_threads_do_not_matter(tmp_path):
    values = table("int32")
    with store(tmp_path / "a.h5", values, chunks=(8, 64)).file as file:
        for threads in (1, 2, 5, 100):
            agree(file["m"], values, cells_in_rows=False, threads=threads)


def test_chunks_that_were_never_written_are_zeros(tmp_path):
    values = table("int32")
    values[64:128, :64] = values[128:, 64:] = 0
    with h5py.File(tmp_path / "a.h5", "w") as file:
        matrix = file.create_dataset("m", SHAPE, "i4", chunks=(64, 64), compression="gzip")
        matrix[:64], matrix[64:128, 64:], matrix[128:, :64] = (
            values[:64],
            values[64:128, 64:],
            values[128:, :64],
        )
        assert matrix.id.get_num_chunks() == 4 * 3 - 5
        agree(matrix, values, cells_in_rows=False)
        agree(matrix, values, cells_in_rows=True)
        file.create_dataset("none", SHAPE, "i4", chunks=(64, 64), compression="gzip")
        agree(file["none"], 0 * values, cells_in_rows=False)


def test_what_lies_beyond_the_table_is_left_out(tmp_path):
    values = table("uint16")
    junk = np.full((64, 64), 7, np.uint16)
    junk[: 211 - 192, : 137 - 128] = values[192:, 128:]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        matrix = file.create_dataset("m", data=values, chunks=(64, 64), compression="gzip")
        matrix.id.write_direct_chunk((192, 128), zlib.compress(junk.tobytes()))
        np.testing.assert_array_equal(matrix[:], values)
        agree(matrix, values, cells_in_rows=False)
        agree(matrix, values, cells_in_rows=True)


@pytest.mark.parametrize("shuffle", [True, False])
def test_chunks_without_a_filter_are_left_to_the_library(tmp_path, shuffle):
    values = table("int32")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        matrix = file.create_dataset("m", SHAPE, "i4", chunks=(64, 64), compression="gzip", shuffle=shuffle)
        matrix[:64], matrix[128:], matrix[64:128, 64:] = values[:64], values[128:], values[64:128, 64:]
        plain = np.ascontiguousarray(values[64:128, :64])
        matrix.id.write_direct_chunk((64, 0), plain.tobytes(), 3 if shuffle else 1)
    with h5py.File(tmp_path / "a.h5") as file:
        matrix = file["m"]
        assert matrix.id.read_direct_chunk((64, 0))[0] != 0
        np.testing.assert_array_equal(matrix[:], values)
        agree(matrix, values, cells_in_rows=False)


@pytest.mark.parametrize(
    "how",
    [
        {"compression": None},
        {"compression": "lzf"},
        {"fletcher32": True},
        {"scaleoffset": 0},
        {"fillvalue": 3},
        {"dtype": ">i4"},
        {"dtype": "f2"},
        {"dtype": "bool"},
        {"chunks": None, "compression": None},
    ],
)
def test_the_rest_is_sliced(tmp_path, how):
    how = {"chunks": (64, 64), "compression": "gzip", "dtype": "i4", **how}
    with h5py.File(tmp_path / "a.h5", "w") as file:
        matrix = file.create_dataset("m", data=table("int32") > 0, **how)
        assert open_chunks(matrix, cells_in_rows=False) is None
    assert open_chunks(np.zeros((3, 3)), cells_in_rows=False) is None


def test_a_wide_column_of_chunks_is_not_read_at_once(tmp_path, monkeypatch):
    with store(tmp_path / "a.h5", table("int32"), chunks=(64, 64)).file as file:
        monkeypatch.setattr(chunks, "_MOST_BYTES", 211 * 64 * 4)
        assert open_chunks(file["m"], cells_in_rows=False) is not None
        monkeypatch.setattr(chunks, "_MOST_BYTES", 211 * 64 * 4 - 1)
        assert open_chunks(file["m"], cells_in_rows=False) is None


def loom(path, values, **how):
    with h5py.File(path, "w") as file:
        file.create_dataset("matrix", data=values, **{"compression": "gzip", "chunks": (64, 64), **how})
        file["row_attrs/Gene"] = [f"G{i}".encode() for i in range(SHAPE[0])]
        file["col_attrs/CellID"] = [f"c{i}".encode() for i in range(SHAPE[1])]
    return path


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32"])
@pytest.mark.parametrize("max_bytes", [1, 5000, 1 << 20])
def test_the_same_bytes_as_by_the_library(tmp_path, monkeypatch, dtype, max_bytes):
    path = loom(tmp_path / "a.loom", table(dtype))

    def read():
        with open_counts(path) as source:
            direct = source.matrix._direct is not None
            blocks = list(source.blocks(max_bytes=max_bytes))
        assert all(block.nbytes <= max_bytes or block.n_cells == 1 for block in blocks)
        sizes = np.concatenate([np.diff(block.indptr) for block in blocks])
        arrays = [np.concatenate([getattr(block, name) for block in blocks]) for name in ("indices", "data")]
        return direct, [(array.dtype, array.tobytes()) for array in (sizes, *arrays)]

    direct, found = read()
    monkeypatch.setattr(dense, "open_chunks", lambda *_, **__: None)
    sliced, expected = read()
    assert (direct, sliced) == (True, False)
    assert found == expected


def test_fractions_are_refused_by_cell_and_gene(tmp_path, refuses):
    values = table("float32")
    values[40, 70], values[200, 3] = 0.25, 2.5
    refuses(loom(tmp_path / "a.loom", values), "non-integer values", "2.5 in cell 'c3', gene 'G200'")


def test_damaged_files_say_so(tmp_path, refuses):
    path = loom(tmp_path / "a.loom", table("int32"))
    with h5py.File(path) as file:
        info = file["matrix"].id.get_chunk_info(7)
    whole = path.read_bytes()
    middle = info.byte_offset + info.size // 2
    path.write_bytes(whole[:middle] + bytes(8) + whole[middle + 8 :])
    refuses(path, "can't be read: damaged or truncated?", "download it again")
    path.write_bytes(whole[: len(whole) // 2])
    refuses(path, "is truncated", "download it again")
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:  # a stream that is well in itself, but too short
        file["matrix"].id.write_direct_chunk((64, 64), zlib.compress(b"few"))
    refuses(path, "damaged or truncated? (a chunk of /matrix has 3 bytes, not 16384)")
