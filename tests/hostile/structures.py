"""HDF5 files of odd structure: valid ones with twists that change nothing, and one that a reader must not fall for.

`build_h5ad`, `build_loom` and `build_tenx` write a file and say what must come of it: the counts, `Refused`, or
`Anything` that is sound. A twist is a function of the open file and a source of chance.
"""

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from hostile_cases import Anything, Refused

N_CELLS, N_GENES = 9, 11
CELLS = [f"ACGTACGTAC-{i}" for i in range(N_CELLS)]
GENES = [f"ENSG{i:011d}" for i in range(1, N_GENES + 1)]
BILLION = 1_000_000_000
Twist = Callable[[h5py.File, random.Random], Any]


def dense_counts(rng: random.Random) -> Any:
    """Small counts; now and then one above 65,535."""
    table = np.array([[rng.choice((0, 0, 1, 2, 7)) for _ in range(N_GENES)] for _ in range(N_CELLS)])
    table[0, 0] = rng.choice((1, 100))
    return table


def truth_of(table: Any) -> Any:
    """What `read_counts` gives for a table."""
    found = [(int(i), int(j), int(table[i, j])) for i, j in np.argwhere(table)]
    return CELLS, GENES, found


def replace(group: Any, name: str, data: Any, **options: Any) -> None:
    """Put another dataset in the place of one; attributes stay."""
    kept = {}
    if name in group and not isinstance(group.get(name, getlink=True), h5py.SoftLink | h5py.ExternalLink):
        kept = dict(group[name].attrs)
    if name in group:
        del group[name]
    made = group.create_dataset(name, data=data, **options)
    for key, value in kept.items():
        made.attrs[key] = value


# --- twists that change nothing ---------------------------------------------------------------------------

NUMBERS = (
    "u1",
    "<u2",
    "<u4",
    "<u8",
    "i1",
    "<i2",
    "<i4",
    "<i8",
    "<f4",
    "<f8",
    ">u2",
    ">i4",
    ">f4",
    ">f8",
    "<f2",
    ">i8",
)
INDEX = ("<i4", "<i8", "<u4", "<u8", "<i2", "u1", ">i4", ">i8", ">u2")


def storage(rng: random.Random, shape: Sequence[int]) -> dict[str, Any]:
    """How a dataset is stored, by chance."""
    if rng.random() < 0.3 or 0 in shape:
        return {}
    options: dict[str, Any] = {"chunks": tuple(rng.randint(1, n) for n in shape)}
    options["shuffle"] = rng.random() < 0.5
    options["fletcher32"] = rng.random() < 0.3
    options["compression"] = rng.choice((None, "gzip", "lzf"))
    if rng.random() < 0.3:
        options["maxshape"] = tuple(None for _ in shape)
    return options


def _values(file: h5py.File) -> list[tuple[Any, str]]:
    """Where counts are stored: (group, name)."""
    if "matrix" in file and isinstance(file["matrix"], h5py.Dataset):
        return [(file, "matrix")]
    if "matrix" in file:
        return [(file["matrix"], "data")]
    return [(file, "X")] if isinstance(file["X"], h5py.Dataset) else [(file["X"], "data")]


def _sparse(file: h5py.File) -> Any:
    """The group of a sparse matrix; None where there is none."""
    node = file["matrix"] if "matrix" in file else file["X"]
    return node if isinstance(node, h5py.Group) else None


def other_numbers(file: h5py.File, rng: random.Random) -> None:
    for group, name in _values(file):
        data = group[name][()]
        replace(group, name, data.astype(rng.choice(NUMBERS)), **storage(rng, data.shape))


def other_indices(file: h5py.File, rng: random.Random) -> None:
    group = _sparse(file)
    for name in () if group is None else ("indices", "indptr"):
        data = group[name][()]
        replace(group, name, data.astype(rng.choice(INDEX)), **storage(rng, data.shape))


def unsorted(file: h5py.File, rng: random.Random) -> None:
    group = _sparse(file)
    if group is None:
        return
    indptr = group["indptr"][:].astype(int)
    order = np.concatenate([rng.sample(range(lo, hi), hi - lo) for lo, hi in pairwise(indptr.tolist())])
    for name in ("indices", "data"):
        replace(group, name, group[name][:][order.astype(int)])


def soft_linked(file: h5py.File, rng: random.Random) -> None:
    group, name = _values(file)[0]
    group.move(name, "/elsewhere" if rng.random() < 0.5 else f"{group.name.rstrip('/')}/elsewhere")
    where = "/elsewhere" if "/elsewhere" in file else f"{group.name.rstrip('/')}/elsewhere"
    group[name] = h5py.SoftLink(where) if rng.random() < 0.5 else file[where]


def more_objects(file: h5py.File, rng: random.Random) -> None:
    file["uns/more/deeper"] = rng.random()
    file["uns/loop"] = h5py.SoftLink("/uns/loop")
    file["uns/self"] = file["uns"]
    file["uns/elsewhere"] = h5py.ExternalLink("/etc/passwd", "/x")
    file["uns/nowhere"] = h5py.SoftLink("/not/there")
    file.create_dataset("uns/huge", (BILLION, 1000), "f8", chunks=(1000, 10))
    file["uns/reference"] = file.ref


SAME = (other_numbers, other_indices, unsorted, soft_linked, more_objects)

# --- twists that must be refused --------------------------------------------------------------------------


def bad_value(file: h5py.File, rng: random.Random) -> Any:
    group, name = _values(file)[0]
    data = group[name][()].astype(np.float64)
    data.flat[rng.randrange(data.size) if data.size else 0] = rng.choice(
        (-1, np.nan, np.inf, -np.inf, 0.5, 1e300, 2.0**54, -1e-300)
    )
    replace(group, name, data, **storage(rng, data.shape))
    return Refused


def huge_integer(file: h5py.File, rng: random.Random) -> Any:
    group, name = _values(file)[0]
    data = group[name][()].astype(np.uint64)
    data.flat[rng.randrange(data.size)] = rng.choice((2**64 - 1, 2**63, 2**53 + 1))
    replace(group, name, data)
    return Refused


def odd_type(file: h5py.File, rng: random.Random) -> Any:
    group, name = _values(file)[0]
    shape = group[name].shape
    dtype = rng.choice(
        (
            "S4", h5py.string_dtype(), [("a", "i4"), ("b", "f4")], h5py.ref_dtype, h5py.regionref_dtype, "c8", "V3",
            h5py.vlen_dtype("i4"), ("i4", (2,)), "<f16",
        )
    )  # fmt: skip
    attributes = dict(group[name].attrs)
    del group[name]
    made = group.create_dataset(name, shape, dtype)
    for key, value in attributes.items():
        made.attrs[key] = value
    # a long double can hold counts, but nothing was written: all are 0
    return Anything if dtype == "<f16" else Refused


def enum_type(file: h5py.File, rng: random.Random) -> Any:
    group, name = _values(file)[0]
    data = group[name][()]
    dtype = h5py.enum_dtype({"a": 0, "b": 1}, rng.choice(("i1", "i4")))
    replace(group, name, data.astype("i1"), dtype=dtype)
    return Anything


def bad_index(file: h5py.File, rng: random.Random) -> Any:
    group = _sparse(file)
    if group is None:
        return bad_value(file, rng)
    indices = group["indices"][:].astype(np.int64)
    indices[rng.randrange(len(indices))] = rng.choice((-1, N_GENES + N_CELLS, 2**31, -(2**31), 2**62, 2**32))
    replace(group, "indices", indices, **storage(rng, indices.shape))
    return Refused


def unsigned_index(file: h5py.File, rng: random.Random) -> Any:
    group = _sparse(file)
    if group is None:
        return huge_integer(file, rng)
    indices = group["indices"][:].astype(np.uint64)
    indices[rng.randrange(len(indices))] = rng.choice((2**64 - 1, 2**63, 2**63 + 1, 2**32 + 1))
    replace(group, "indices", indices)
    return Refused


def bad_indptr(file: h5py.File, rng: random.Random) -> Any:
    group = _sparse(file)
    if group is None:
        return bad_value(file, rng)
    indptr = group["indptr"][:].astype(np.int64)
    how = rng.randrange(9)
    if how == 0:
        indptr[len(indptr) // 2] = indptr[-1] + 1
    elif how == 1:
        indptr[1] = -5
    elif how == 2:
        indptr = indptr[:-1]
    elif how == 3:
        indptr = np.append(indptr, indptr[-1])
    elif how == 4:
        indptr[-1] += BILLION
    elif how == 5:
        indptr[0] = 1
    elif how == 6:
        indptr = indptr.astype(np.float64)
    elif how == 7:
        indptr = indptr.astype(np.uint64)
        indptr[-1] = 2**64 - 1
    else:
        indptr = indptr.reshape(1, -1)
    replace(group, "indptr", indptr, **storage(rng, indptr.shape))
    return Refused


def billions(file: h5py.File, rng: random.Random) -> Any:
    """A billion rows, entries or names are declared, and none is stored."""
    places = [*_values(file)]
    group = _sparse(file)
    if group is not None:
        places += [(group, "indices"), (group, "indptr")]
    if "obs" in file:
        places += [(file["obs"], "_index"), (file["var"], "_index")]
    elif "col_attrs" in file:
        places += [(file["col_attrs"], "CellID"), (file["row_attrs"], "Accession")]
    else:
        places += [(file["matrix"], "barcodes"), (file["matrix/features"], "id"), (file["matrix"], "shape")]
    group, name = rng.choice(places)
    node = group[name]
    shape = list(node.shape)
    shape[rng.randrange(len(shape))] = rng.choice((BILLION, 10**12, 2**31, 2**40))
    attributes, dtype = dict(node.attrs), node.dtype
    del group[name]
    chunks = tuple(min(n, 10_000) for n in shape) if rng.random() < 0.7 else True
    made = group.create_dataset(
        name, tuple(shape), dtype, chunks=chunks, compression=rng.choice((None, "gzip"))
    )
    for key, value in attributes.items():
        made.attrs[key] = value
    return Refused


SHAPES: tuple[Any, ...] = (
    [N_CELLS + 1, N_GENES], [N_CELLS, BILLION], [BILLION, N_GENES], [-1, N_GENES], [N_CELLS], [N_CELLS, N_GENES, 1],
    "a shape", [2.5, 3.5], [], [2**62, 2**62], [0, 0], [N_CELLS, N_GENES - 1], [np.nan, 1], h5py.Empty("i4"),
)  # fmt: skip


def wrong_shape(file: h5py.File, rng: random.Random) -> Any:
    value = rng.choice(SHAPES)
    group = _sparse(file)
    if group is None:
        where, name = _values(file)[0]
        data = where[name][()]
        replace(
            where, name, rng.choice((data[:-1], data[:, :-1], data.ravel(), data[0, 0], data[None], data[:0]))
        )
    elif "shape" in group:
        del group["shape"]
        group["shape"] = value
    else:
        group.attrs["shape"] = value
    return Refused


def to_another_file(file: h5py.File, rng: random.Random) -> Any:
    """What a reader needs lies in another file, by a link, as raw data or as a virtual source."""
    folder = Path(file.filename).parent
    with h5py.File(folder / "other.hdf5", "w") as other:
        other["data"] = np.ones(5)
    group, name = rng.choice([*_values(file), _names(file)])
    shape, attributes = group[name].shape, dict(group[name].attrs)
    del group[name]
    how = rng.randrange(3)
    if how == 0:
        group[name] = h5py.ExternalLink(
            rng.choice((str(folder / "other.hdf5"), "/etc/passwd", "other.hdf5")), "/data"
        )
        return Refused
    if how == 1:
        made = group.create_dataset(name, (10,), "S8", external=[("/etc/passwd", 0, 80)])
    else:
        layout = h5py.VirtualLayout(shape=shape or (5,), dtype="f8")
        layout[(0,) * len(layout.shape)] = h5py.VirtualSource("other.hdf5", "data", shape=(5,))[0]
        made = group.create_virtual_dataset(name, layout)
    for key, value in attributes.items():
        made.attrs[key] = value
    return Refused


def _names(file: h5py.File) -> tuple[Any, str]:
    if "obs" in file:
        return file["obs"], "_index"
    return (file["col_attrs"], "CellID") if "col_attrs" in file else (file["matrix"], "barcodes")


def cycle(file: h5py.File, rng: random.Random) -> Any:
    group, name = rng.choice([*_values(file), _names(file)])
    del group[name]
    how = rng.randrange(3)
    if how == 0:
        group[name] = h5py.SoftLink(f"{group.name.rstrip('/')}/{name}")
    elif how == 1:
        group[name] = h5py.SoftLink(f"{group.name.rstrip('/')}/round")
        group["round"] = h5py.SoftLink(f"{group.name.rstrip('/')}/{name}")
    else:
        group[name] = group
    return Refused


def missing(file: h5py.File, rng: random.Random) -> Any:
    group, name = rng.choice([*_values(file), _names(file)])
    del group[name]
    if rng.random() < 0.5:
        group.create_group(name)
    return Refused


def odd_names(file: h5py.File, rng: random.Random) -> Any:
    group, name = _names(file)
    attributes = dict(group[name].attrs)
    del group[name]
    how = rng.randrange(9)
    data: Any = [
        ["same"] * N_CELLS,
        CELLS[:-1],
        [f"cell {i}" for i in range(N_CELLS + 1)],
        np.arange(N_CELLS * 2).reshape(N_CELLS, 2),
        "one",
        np.arange(N_CELLS) + 0.5,
        [b"\xff\xfe" + bytes([65 + i]) for i in range(N_CELLS)],
        np.array([("a\0" * i).encode() + b"b" for i in range(N_CELLS)]),
        np.zeros(N_CELLS, dtype="c8"),
    ][how]
    if how == 6:
        made = group.create_dataset(name, (N_CELLS,), h5py.string_dtype())
        made[:] = np.array(data, dtype=object)
    else:
        made = group.create_dataset(name, data=data)
    for key, value in attributes.items():
        made.attrs[key] = value
    return Anything if how in (5, 6, 7) else Refused


def unknown_filter(file: h5py.File, rng: random.Random) -> Any:
    """Stored with a filter that is not there."""
    group, name = rng.choice([*_values(file), _names(file)])
    data, attributes = group[name][()], dict(group[name].attrs)
    del group[name]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(data.shape)
    plist.set_filter(32_000 + rng.randrange(5, 30), h5py.h5z.FLAG_OPTIONAL, ())
    kind = h5py.h5t.py_create(np.dtype("<f4"), logical=True)
    space = h5py.h5s.create_simple(data.shape)
    made = h5py.Dataset(h5py.h5d.create(group.id, name.encode(), kind, space, dcpl=plist))
    made.id.write_direct_chunk((0,) * data.ndim, rng.randbytes(40), 0)
    for key, value in attributes.items():
        made.attrs[key] = value
    return Refused


def bad_chunk(file: h5py.File, rng: random.Random) -> Any:
    """A compressed chunk that is no compressed one, has other bytes than it should, or many more."""
    import zlib

    group, name = _values(file)[0]
    data = group[name][()]
    replace(group, name, data.astype("<i4"), chunks=data.shape, compression="gzip")
    content = rng.choice(
        (rng.randbytes(50), zlib.compress(b""), zlib.compress(bytes(7)), zlib.compress(bytes(10**8)))
    )
    group[name].id.write_direct_chunk((0,) * data.ndim, content, 0)
    # what the library makes of a stream that is too long is its beginning: zeros
    return Anything


BAD = (
    bad_value, huge_integer, odd_type, enum_type, bad_index, unsigned_index, bad_indptr, billions, wrong_shape,
    to_another_file, cycle, missing, odd_names, unknown_filter, bad_chunk,
)  # fmt: skip


# --- twists of frames: whatever comes of them, it must be sound ---------------------------------------------


def odd_column(file: h5py.File, rng: random.Random) -> Any:
    """A column of a kind that no table has; or one that lies about itself."""
    obs = file["obs"]
    n = N_CELLS
    kind = rng.randrange(12)
    if kind == 0:
        obs["more"] = np.zeros((n, 3))
    elif kind == 1:
        obs["more"] = 5
    elif kind == 2:
        obs["more"] = h5py.Empty(rng.choice(("f8", "S3")))
    elif kind == 3:
        obs["more"] = np.zeros(n, dtype=rng.choice(("c16", "V5", "<f2", ">f8", "?", "u8", "<f16")))
    elif kind == 4:
        obs["more"] = np.zeros(n, dtype=[("a", "i4"), ("b", "S3")])
    elif kind == 5:
        obs.create_dataset(
            "more", (n,), rng.choice((h5py.ref_dtype, h5py.regionref_dtype, h5py.vlen_dtype("i4")))
        )
    elif kind == 6:
        obs.create_dataset("more", (BILLION,), rng.choice(("f8", h5py.string_dtype())), chunks=(1000,))
    elif kind == 7:
        obs["more"] = np.arange(n + rng.choice((-1, 1)))
    elif kind == 8:
        obs["more"] = h5py.SoftLink("/obs/more")
    elif kind == 9:
        obs["more"] = obs
    elif kind == 10:
        obs["more"] = np.array([0x110000, 7] * n, dtype=h5py.enum_dtype({"a": 0}, "i4"))[:n]
    else:
        obs["more/values"] = np.arange(n + rng.choice((-1, 0, 1)))
        obs["more/mask"] = rng.choice((np.zeros(n, bool), np.zeros(n - 1, bool), np.zeros(n), 1))
    if "more" in obs and rng.random() < 0.8:
        obs.attrs["column-order"] = np.array(["kind", "more"], dtype=object)
    return Anything


def odd_categories(file: h5py.File, rng: random.Random) -> Any:
    obs = file["obs"]
    codes = np.zeros(N_CELLS, dtype=rng.choice(("i1", "i8", "u8", "f4")))
    codes[rng.randrange(N_CELLS)] = rng.choice((5, 100, 2, 120))
    if codes.dtype.kind == "i" and rng.random() < 0.5:
        codes[0] = -100
    replace(obs["kind"], "codes", codes if rng.random() < 0.8 else codes[:-1])
    if rng.random() < 0.5:
        names = rng.choice((["a", "a"], [], ["a", ""], np.arange(3.0), "one", [[1, 2]], np.zeros(2, "c8")))
        del obs["kind/categories"]
        obs["kind/categories"] = names if len(names) else np.array([], dtype="S1")
    return Anything


def odd_attribute(file: h5py.File, rng: random.Random) -> Any:
    node = file[rng.choice(("X", "obs", "var", "obs/kind"))]
    name = rng.choice(("encoding-type", "shape", "_index", "column-order", "h5sparse_format"))
    value = rng.choice(
        (
            5, "text", b"\xff\xfe", [1, 2, 3], h5py.Empty("S1"), np.zeros(2, [("a", "i4")]), 1e300, "obs", "/", "..",
            "", "csr_matrix", "csc_matrix", ["kind", "kind"], ["not there"], [b"\xff"], "a\x01b",
        )
    )  # fmt: skip
    if rng.random() < 0.1:
        node.attrs.create(name, file.ref, dtype=h5py.ref_dtype)
    else:
        node.attrs[name] = value
    return Anything


FRAMES = (odd_column, odd_categories, odd_attribute)

# --- files ------------------------------------------------------------------------------------------------


def _finish(path: Path, rng: random.Random, table: Any, bad: Sequence[Twist]) -> Any:
    """Twist a file; what must come of it."""
    with h5py.File(path, "r+") as file:
        for twist in rng.sample(SAME, rng.randrange(4)):
            twist(file, rng)
        if rng.random() < 0.2:
            return truth_of(table)
        return rng.choice(bad)(file, rng)


def build_h5ad(rng: random.Random, folder: Path) -> Any:
    """AnnData with CSR, CSC or a full table."""
    table = dense_counts(rng)
    make = rng.choice((sp.csr_matrix, sp.csc_matrix, np.asarray))
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b", None] * 3)}, index=CELLS)
    data = anndata.AnnData(make(table.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))
    data.write_h5ad(folder / "a.h5ad")
    return _finish(folder / "a.h5ad", rng, table, (*BAD, *FRAMES, *FRAMES))


def build_loom(rng: random.Random, folder: Path) -> Any:
    """Loom, genes in rows."""
    table = dense_counts(rng)
    with h5py.File(folder / "a.loom", "w") as file:
        file.create_dataset("matrix", data=table.T.astype(np.int32), **storage(rng, table.T.shape))
        file["row_attrs/Accession"] = np.array(GENES, dtype="S")
        file["col_attrs/CellID"] = np.array(CELLS, dtype="S")
        file["col_attrs/other"] = np.arange(N_CELLS)
    return _finish(folder / "a.loom", rng, table, BAD)


def build_tenx(rng: random.Random, folder: Path) -> Any:
    """10x, cells in compressed columns."""
    table = dense_counts(rng)
    matrix = sp.csr_matrix(table)
    with h5py.File(folder / "a.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(CELLS, dtype="S")
        group["features/id"] = np.array(GENES, dtype="S")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name).astype(np.int64)
        group["shape"] = np.array([N_GENES, N_CELLS], np.int32)
    return _finish(folder / "a.h5", rng, table, BAD)
