"""AnnData zarr stores, of zarr format 2 and 3: a folder, or the same zipped."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cellformers.errors import UserError
from cellformers.io.frames import child
from cellformers.io.h5ad import open_anndata
from cellformers.io.source import CountSource, ReadOptions
from cellformers.io.stretch import ChunkedStretch


def open_zarr(path: Path, options: ReadOptions) -> CountSource:
    """Open an AnnData zarr store."""
    import zarr

    with ExitStack() as stack:
        store: Any = str(path)
        if path.is_file():
            store = stack.enter_context(zarr.storage.ZipStore(path, mode="r"))
        try:
            root = zarr.open_group(store, mode="r")
        except Exception as error:  # (zarr has errors of many kinds for a damaged store)
            text = " ".join(str(error).split())
            raise UserError(
                f"is no readable zarr group ({text[:120]})", path=path, fix="write it again"
            ) from error
        if child(root, "obs") is None:
            raise UserError(
                "is a zarr store, but not of AnnData (no obs)", path=path, fix="give an AnnData store"
            )
        source = open_anndata(root, path, options, ChunkedStretch)
        source.resources = stack.pop_all()
    return source
