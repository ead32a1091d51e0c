"""AnnData's data frames (obs, var) on disk, in the encodings there have been, without anndata.

A frame is a group of columns (since 0.7; categories since 0.8 in a group of their own, before in `__categories`) or one
compound dataset (before 0.7; categories in `uns`). h5py and zarr groups look the same here.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellformers.errors import UserError
from cellformers.io.hdf5 import child as hdf5_child
from cellformers.io.hdf5 import names_in
from cellformers.io.inflate import check_names, check_packed
from cellformers.io.names import Strings, as_strings
from cellformers.io.source import MOST_NAMES

Array = np.ndarray[Any, Any]


def is_group(node: Any) -> bool:
    """Whether an h5py or zarr object holds others."""
    return hasattr(node, "keys")


def one_dimensional(node: Any) -> bool:
    """Whether an h5py or zarr object is an array of one dimension."""
    return len(getattr(node, "shape", None) or ()) == 1


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
    try:
        value = node.attrs.get(name, default)
    except (TypeError, ValueError) as error:  # a type that numpy doesn't have
        raise OSError(f"attribute {name!r} can't be read: {error}") from error
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def texts(values: Any) -> Strings:
    """Any array of strings, bytes or numbers as Python strings."""
    return as_strings(
        value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)
        for value in np.asarray(values).tolist()
    )


def values_of(array: Any, lo: int = 0, hi: int | None = None) -> Array:
    """Items of a one-dimensional array: numbers as they are, strings as object."""
    return _plain(np.asarray(array[lo:hi]))


def _plain(values: Array) -> Array:
    """Numbers in the machine's own byte order and size, which Arrow takes; anything else as strings."""
    if values.dtype.kind == "f" and values.dtype.itemsize > 8:
        return values.astype(np.float64)
    if values.dtype.kind not in "biuf":
        return texts(values)
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def column_of(node: Any, *, most: int = MOST_NAMES) -> Array | None:
    """All items of a one-dimensional array as `values_of` gives them; None where it is none, or longer than `most`."""
    if not one_dimensional(node) or node.shape[0] > most:
        return None
    if isinstance(node, h5py.Dataset):
        check_packed(node)
    return values_of(node)


class Frame:
    """obs or var of an AnnData file.

    Parameters
    ----------
    root
        The file's root group (for categories kept in `uns`).
    name
        Where the frame is: "obs", "raw/var".

    Raises
    ------
    UserError
        If there is no such frame, or it has no index.
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
            self._index = child(index, "values") if is_group(index) else index
            order = attribute(self._node, "column-order")
            if order is None:
                listed = names_in(self._node)
            else:  # of JSON: a list of anything
                listed = (
                    [str(o) for o in order]
                    if isinstance(order, list)
                    else texts(np.atleast_1d(order)).tolist()
                )
            self.columns = [c for c in dict.fromkeys(listed) if c not in (self.index_name, "__categories")]
        elif self._node.dtype.names:
            fields = self._node.dtype.names
            self.index_name = next((f for f in ("index", "_index") if f in fields), fields[0])
            self.columns = [f for f in fields if f != self.index_name]
            self._index = self._node
        else:
            raise UserError(f"{name} is no data frame", path=path, fix="write the file again with anndata")
        if not one_dimensional(self._index):
            raise UserError(f"{name} has no index", path=path, fix="write the file again with anndata")
        check_names(self._index)
        self.n = int(self._index.shape[0])

    def index(self, lo: int = 0, hi: int | None = None) -> Strings:
        """Names of rows lo to hi."""
        if is_group(self._node):
            return texts(self._index[lo:hi])
        return texts(self._node[lo:hi][self.index_name])

    def strings(self, column: str) -> Strings:
        """A column as strings, "" where a value is missing."""
        if column == self.index_name:
            return self.index()
        try:
            codes, categories, mask = self._parts(column)
        except _UnknownEncodingError as error:
            raise self._broken(column, str(error)) from error
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
            if categories.dtype.kind == "f" and np.isnan(categories).any():  # no category of pandas
                return np.where(codes < 0, np.nan, categories[codes])
            if len(set(map(str, categories))) < len(categories):
                return as_strings(None if c < 0 else categories[c] for c in codes)
            return pd.Categorical.from_codes(codes, categories=categories)
        if mask is None:
            return codes
        if codes.dtype.kind == "b":
            return pd.arrays.BooleanArray(codes.astype(bool), mask)
        if codes.dtype.kind in "iu":
            return pd.arrays.IntegerArray(codes.astype(codes.dtype.newbyteorder("=")), mask)
        return as_strings(None if missing else v for v, missing in zip(codes.tolist(), mask, strict=True))

    def read(self) -> dict[str, Any]:
        """All columns that can be read."""
        read = {column: self.column(column) for column in self.columns}
        return {
            column: values for column, values in read.items() if values is not None and len(values) == self.n
        }

    def _parts(self, column: str) -> tuple[Array, Any, Any]:
        """(codes, categories, None) of a categorical, (values, None, mask or None) of anything else; all of n rows."""
        if not is_group(self._node):
            values = self._node[:][column]
            categories = child(self._root, f"uns/{column}_categories")
            values = _plain(values)
            if categories is not None and values.dtype.kind in "iu":
                return self._coded(column, values, texts(np.atleast_1d(np.asarray(categories[()]))))
            return values, None, None
        node = child(self._node, column)
        if node is None:
            raise UserError(f"{self.name} lists a column {column!r} that is not there", path=self.path)
        if is_group(node):
            parts = {key: child(node, key) for key in ("codes", "categories", "values", "mask")}
            if parts["codes"] is not None and parts["categories"] is not None:
                return self._coded(column, self._rows(parts["codes"]), _categories(parts["categories"]))
            if parts["values"] is not None and parts["mask"] is not None:
                return self._rows(parts["values"]), None, self._rows(parts["mask"]).astype(bool)
            raise _UnknownEncodingError("of an unknown encoding")
        values = self._rows(node)
        old = child(self._node, f"__categories/{column}")
        return (values, None, None) if old is None else self._coded(column, values, _categories(old))

    def _rows(self, node: Any) -> Array:
        """Items of an array that must have one for each row."""
        values = column_of(node, most=self.n)
        if values is None or len(values) != self.n:
            raise _UnknownEncodingError(f"not of {self.n} values")
        return values

    def _coded(self, column: str, codes: Array, categories: Array | None) -> tuple[Array, Array, None]:
        """A categorical, checked: codes are int64 from -1 to below the number of categories."""
        if categories is None or codes.dtype.kind not in "iu":
            raise _UnknownEncodingError("no categorical")
        if len(codes) and (int(codes.min()) < -1 or int(codes.max()) >= len(categories)):
            raise self._broken(column, f"numbers of categories outside of {len(categories)}")
        return codes.astype(np.int64), categories, None

    def _broken(self, column: str, what: str) -> UserError:
        return UserError(
            f"column {column!r} of {self.name} is damaged: {what}",
            path=self.path,
            fix="write or download the file again",
        )


class _UnknownEncodingError(Exception):
    """A column in an encoding that is not known here; obs goes without it."""


def _categories(node: Any) -> Array | None:
    return column_of(child(node, "values") if is_group(node) else node)


def _missing(values: Array) -> Iterable[bool]:
    return (
        np.isnan(values) if values.dtype.kind == "f" else [v in ("nan", "NaN", "NA", "None") for v in values]
    )
