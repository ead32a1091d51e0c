"""Which format a file or folder has, by what is in it."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py

from cellformers.errors import UserError
from cellformers.io import hdf5
from cellformers.io.mtx import find_mtx
from cellformers.io.source import CountSource, ReadOptions

_FORMATS = "h5ad, loom, AnnData zarr, 10x .h5, a 10x mtx folder, dense text (csv, tsv)"
_HDF5_NAMES = (".h5ad", ".loom", ".h5", ".hdf5")
_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
Opener = Callable[[Path, ReadOptions], CountSource]


def opener(path: Path) -> Opener:
    """The function that opens `path`.

    Raises
    ------
    UserError
        If it does not exist or has no known format.
    """
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UserError("no such file or folder", path=path, fix="check the path")
    with path.open("rb") as file:
        start = file.read(4096)
    if not start:
        raise UserError("is an empty file", path=path, fix="copy or download it again")
    if start.startswith(_HDF5_MAGIC) or h5py.is_hdf5(path):
        return _hdf5(path)
    if path.suffix.lower() in _HDF5_NAMES:
        raise UserError(
            f"is not an HDF5 file, despite its name {path.suffix}", path=path, fix="download it again"
        )
    if start.startswith(b"PK\x03\x04"):
        if path.name.lower().endswith((".zarr.zip", ".zip")):
            from cellformers.io.zarr import open_zarr

            return open_zarr
        raise UserError("is an Excel or zip file", path=path, fix="save it as csv, or unpack it")
    if start.startswith(b"\x1f\x8b"):
        try:
            with gzip.open(path, "rb") as unzipped:
                start = unzipped.read(4096)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError("is a damaged gzip file", path=path, fix="download it again") from error
        if start.startswith(_HDF5_MAGIC):
            raise UserError("is a gzipped HDF5 file", path=path, fix="gunzip it first")
    if start.startswith(b"PAR1"):
        raise UserError("is a Parquet table, not a count file", path=path, fix=f"known are: {_FORMATS}")
    for magic, name in ((b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if start.startswith(magic):
            raise UserError(f"is packed with {name}", path=path, fix="unpack it first, or pack it with gzip")
    if start.startswith((b"X\n", b"RDX", b"RDA")):
        raise UserError("is an R data file", path=path, fix="write the counts from R as mtx, csv or h5ad")
    if start[257:262] == b"ustar":
        raise UserError("is a tar archive", path=path, fix="unpack it and give what is inside")
    if start.lower().startswith(b"%%matrixmarket"):
        from cellformers.io.mtx import open_mtx

        return open_mtx
    if b"\0" in start:
        raise UserError("has no known format", path=path, fix=f"known are: {_FORMATS}")
    from cellformers.io.text import open_text

    return open_text


def _folder(path: Path) -> Opener:
    names = {p.name for p in path.iterdir()}
    if names & {".zgroup", "zarr.json", ".zmetadata"}:
        from cellformers.io.zarr import open_zarr

        return open_zarr
    if find_mtx(path) is not None:
        from cellformers.io.mtx import open_mtx

        return open_mtx
    below = [
        str(p.parent.relative_to(path))
        for pattern in ("*/matrix.mtx*", "*/*/matrix.mtx*", "*/*/*/matrix.mtx*")
        for p in sorted(path.glob(pattern))
    ]
    if below:
        raise UserError("has the matrix in a folder further down", path=path, fix=f"give {path / below[0]}")
    raise UserError(
        "is a folder without matrix.mtx (10x) or .zgroup or zarr.json (zarr)",
        path=path,
        fix=f"known are: {_FORMATS}",
    )


def _hdf5(path: Path) -> Opener:
    with hdf5.open_hdf5(path) as root:
        names = set(hdf5.names_in(root))
        if isinstance(hdf5.child(root, "matrix"), h5py.Dataset) and names & {"row_attrs", "col_attrs"}:
            from cellformers.io.loom import open_loom

            return open_loom
        if "obs" in names and "var" in names:
            from cellformers.io.h5ad import open_h5ad

            return open_h5ad
        tenx = [n for n in names if hdf5.child(root, f"{n}/barcodes") is not None]
        if tenx:
            from cellformers.io.tenx import open_tenx_h5

            return open_tenx_h5
    held = ", ".join(name[:40] for name in sorted(names)[:6]) or "nothing"
    raise UserError(
        f"is HDF5, but neither AnnData nor loom nor 10x (it holds: {held})",
        path=path,
        fix=f"known are: {_FORMATS}",
    )
