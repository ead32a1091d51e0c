"""AnnData's data frames (obs, var) on disk, in the encodings there have been, without anndata.

A frame is a group of columns (since 0.7; categories since 0.8 in a group of their own, before in `__categories`) or one
compound dataset (before 0.7; categories in `uns`). h5py and zarr groups look the same here.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError
from cellformers.io.hdf5 import child as hdf5_child
from cellformers.io.names import Strings, as_strings

Array = np.ndarray[Any, Any]


def is_group(node: Any) -> bool:
    """Whether an h5py or zarr object holds others."""
    return hasattr(node, "keys")


def child(node: Any, name: str) -> Any:
    """The object `name` ("a/b") under an h5py or zarr group; None where there is none."""
    if type(node).__module__.startswith("h5py"):
        return hdf5_child(node, name)
    for part in name.strip("/").split("/"):
        if not is_group(node) or part not in node:
            return None
        node = node[part]
    return node


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute, bytes decoded."""
    value = node.attrs.get(name, default)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def texts(values: Any) -> Strings:
    """Any array of strings, bytes or numbers as Python strings."""
    return as_strings(
        value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)
        for value in np.asarray(values).tolist()
    )


def values_of(array: Any, lo: int = 0, hi: int | None = None) -> Array:
    """Items of a one-dimensional array: numbers as they are, strings as object."""
    part = np.asarray(array[lo:hi])
    return part if part.dtype.kind in "biufc" else texts(part)


class Frame:
    """obs or var of an AnnData file.

    Parameters
    ----------
    root
        The file's root group (for categories kept in `uns`).
    name
        Where the frame is: "obs", "raw/var".
    """

    def __init__(self, root: Any, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self._root, self._node = root, child(root, name)
        if self._node is None:
            raise UserError(
                f"has no {name}", path=path, fix="is it an AnnData file? write it again with anndata"
            )
        if is_group(self._node):
            self.index_name = str(attribute(self._node, "_index", "_index"))
            for fallback in ("_index", "index"):
                if child(self._node, self.index_name) is None:
                    self.index_name = fallback
            index = child(self._node, self.index_name)
            if index is None:
                raise UserError(f"{name} has no index", path=path, fix="write the file again with anndata")
            self._index = child(index, "values") if is_group(index) else index
            order = attribute(self._node, "column-order")
            listed = list(self._node.keys()) if order is None else [str(c) for c in texts(order)]
            self.columns = [c for c in listed if c not in (self.index_name, "__categories")]
            self.n = int(self._index.shape[0])
        elif self._node.dtype.names:
            fields = self._node.dtype.names
            self.index_name = next((f for f in ("index", "_index") if f in fields), fields[0])
            self.columns = [f for f in fields if f != self.index_name]
            self.n = int(self._node.shape[0])
        else:
            raise UserError(f"{name} is no data frame", path=path, fix="write the file again with anndata")

    def index(self, lo: int = 0, hi: int | None = None) -> Strings:
        """Names of rows lo to hi."""
        if is_group(self._node):
            return texts(self._index[lo:hi])
        return texts(self._node[lo:hi][self.index_name])

    def strings(self, column: str) -> Strings:
        """A column as strings, "" where a value is missing."""
        if column == self.index_name:
            return self.index()
        codes, categories, mask = self._parts(column)
        if categories is not None:
            return as_strings("" if c < 0 else categories[c] for c in codes.tolist())
        return as_strings(
            "" if missing else str(value)
            for value, missing in zip(
                texts(codes), mask if mask is not None else _missing(codes), strict=True
            )
        )

    def column(self, column: str) -> Any:
        """A column for pandas: numpy array, Categorical or nullable array; None where it can't be read."""
        import pandas as pd

        try:
            codes, categories, mask = self._parts(column)
        except _UnknownEncodingError:
            return None
        if categories is not None:
            values = codes.astype(np.int64)
            if len(set(map(str, categories))) < len(categories):
                return as_strings(None if c < 0 else categories[c] for c in values)
            return pd.Categorical.from_codes(values, categories=categories)
        if mask is None:
            return codes
        mask = np.asarray(mask, dtype=bool)
        if codes.dtype.kind == "b":
            return pd.arrays.BooleanArray(codes.astype(bool), mask)
        if codes.dtype.kind in "iu":
            return pd.arrays.IntegerArray(codes, mask)
        return as_strings(None if missing else v for v, missing in zip(codes.tolist(), mask, strict=True))

    def read(self) -> dict[str, Any]:
        """All columns that can be read."""
        read = {column: self.column(column) for column in self.columns}
        return {
            column: values for column, values in read.items() if values is not None and len(values) == self.n
        }

    def _parts(self, column: str) -> tuple[Array, Any, Any]:
        """(codes, categories, None) of a categorical, (values, None, mask or None) of anything else."""
        if not is_group(self._node):
            values = self._node[:][column]
            categories = child(self._root, f"uns/{column}_categories")
            values = values if values.dtype.kind in "biuf" else texts(values)
            if categories is not None and values.dtype.kind in "iu":
                return values, texts(np.atleast_1d(np.asarray(categories[()]))), None
            return values, None, None
        node = child(self._node, column)
        if node is None:
            raise UserError(f"{self.name} lists a column {column!r} that is not there", path=self.path)
        if is_group(node):
            parts = {key: child(node, key) for key in ("codes", "categories", "values", "mask")}
            if parts["codes"] is not None and parts["categories"] is not None:
                return values_of(parts["codes"]), _categories(parts["categories"]), None
            if parts["values"] is not None and parts["mask"] is not None:
                return values_of(parts["values"]), None, np.asarray(parts["mask"][:], dtype=bool)
            raise _UnknownEncodingError(column)
        if len(node.shape) != 1:
            raise _UnknownEncodingError(column)
        old = child(self._node, f"__categories/{column}")
        return values_of(node), None if old is None else _categories(old), None


class _UnknownEncodingError(Exception):
    """A column in an encoding that is not known here; obs goes without it."""


def _categories(node: Any) -> Any:
    return values_of(child(node, "values") if is_group(node) else node)


def _missing(values: Array) -> Iterable[bool]:
    return (
        np.isnan(values) if values.dtype.kind == "f" else [v in ("nan", "NaN", "NA", "None") for v in values]
    )
