"""AnnData files: .h5ad, and what zarr stores share with them.

Where X holds no counts but `raw/X` or `layers["counts"]` does (as CELLxGENE has it), that is read instead, and noted;
`raw` comes with genes of its own. An explicit `layer` or `raw` is taken at its word.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.io import hdf5
from cellformers.io.dense import DenseMatrix
from cellformers.io.frames import Frame, attribute, child, is_group
from cellformers.io.names import as_pass, cell_names, choose_features
from cellformers.io.source import CountSource, Matrix, ReadOptions, check_size
from cellformers.io.sparse import CscMatrix, CsrMatrix
from cellformers.io.stretch import Stretch
from cellformers.io.validate import to_counts


def open_h5ad(path: Path, options: ReadOptions) -> CountSource:
    """Open an .h5ad file."""
    with ExitStack() as stack:
        root = stack.enter_context(hdf5.open_hdf5(path))
        source = open_anndata(root, path, options, hdf5.stretch)
        source.resources = stack.pop_all()
    return source


def open_anndata(
    root: Any, path: Path, options: ReadOptions, stretch: Callable[[Any], Stretch]
) -> CountSource:
    """An AnnData object in an open HDF5 file or zarr store.

    Parameters
    ----------
    root
        h5py or zarr group.
    stretch
        Makes a reader of a one-dimensional array of that library.
    """
    notes: list[str] = []
    obs = Frame(root, "obs", path)
    where = _choose(root, path, options, stretch, notes)
    matrix = _matrix(root, where, path, stretch)
    raw_var = {"raw/X": "raw/var", "raw.X": "raw.var"}.get(where)
    var = Frame(root, raw_var or "var", path)
    check_size(matrix, obs.n, var.n, path)
    ids, symbols = choose_features(
        var.index(),
        var.columns,
        var.strings,
        requested=options.gene_column,
        path=path,
        index_name=var.index_name,
        notes=notes,
    )
    column = options.cell_column
    if column is not None and column not in obs.columns and column != obs.index_name:
        raise UserError(
            f"has no cell column {column!r}",
            path=path,
            fix="cell_column: " + did_you_mean(column, obs.columns),
        )
    read_names = obs.index if column is None else _slices(obs.strings(column))
    names = cell_names(obs.n, read_names, make_unique=options.make_unique, path=path, notes=notes)
    passed = obs.column("filter_pass") if "filter_pass" in obs.columns else None
    return CountSource(
        path=path,
        matrix=matrix,
        names=names,
        feature_ids=ids,
        feature_symbols=symbols,
        filter_pass=None if passed is None else as_pass(np.asarray(passed)),
        notes=notes,
        elsewhere=_elsewhere(root),
        options=options,
        read_obs=obs.read,
    )


def _slices(values: Any) -> Callable[[int, int], Any]:
    return lambda lo, hi: values[lo:hi]


def _layers(root: Any) -> list[str]:
    layers = child(root, "layers")
    return sorted(layers.keys()) if layers is not None and is_group(layers) else []


def _raw(root: Any) -> str | None:
    return next((name for name in ("raw/X", "raw.X") if child(root, name) is not None), None)


def _elsewhere(root: Any) -> str:
    layers = ", ".join(_layers(root)) or "none"
    return f"name the raw counts with layer: or raw: true (layers: {layers}; raw: {'yes' if _raw(root) else 'none'})"


def _choose(
    root: Any, path: Path, options: ReadOptions, stretch: Callable[[Any], Stretch], notes: list[str]
) -> str:
    """Where the counts are: "X", "raw/X", "layers/..."."""
    raw = _raw(root)
    if options.raw:
        if raw is None:
            raise UserError(
                "has no raw", path=path, fix=f"leave out raw: true (layers: {_listed(_layers(root))})"
            )
        return raw
    if options.layer is not None and options.layer != "X":
        layers = _layers(root)
        if options.layer not in layers:
            raise UserError(
                f"has no layer {options.layer!r}",
                path=path,
                fix="layer: " + did_you_mean(options.layer, layers),
            )
        return f"layers/{options.layer}"
    there = child(root, "X") is not None
    if options.layer == "X" or (there and _holds_counts(_matrix(root, "X", path, stretch))):
        if not there:
            raise UserError("has no X", path=path, fix=_elsewhere(root))
        return "X"
    counts = "layers/counts" if "counts" in _layers(root) else None
    for other in (raw, counts):
        if other is not None:
            matrix = _matrix(root, other, path, stretch)
            if _holds_counts(matrix):
                notes.append(
                    f"X {'holds no counts' if there else 'is missing'}; {matrix.name} does and is used"
                )
                return other
    if not there:
        raise UserError("has no X", path=path, fix=_elsewhere(root))
    return "X"  # opening it refuses what it holds, or rounds it


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _holds_counts(matrix: Matrix) -> bool:
    if matrix.n_cells == 0 or matrix.n_features == 0:
        return True
    values = matrix.head().values
    return to_counts(values) is not None


def _matrix(root: Any, where: str, path: Path, stretch: Callable[[Any], Stretch]) -> Matrix:
    node = child(root, where)
    name = (
        f"layers[{where.removeprefix('layers/')!r}]"
        if where.startswith("layers/")
        else where.replace(".", "/")
    )
    if not is_group(node):
        return DenseMatrix(path, node, name=name, cells_in_rows=True)
    kind = str(attribute(node, "encoding-type") or attribute(node, "h5sparse_format") or "")
    shape = attribute(node, "shape")
    shape = attribute(node, "h5sparse_shape") if shape is None else shape
    parts = {part: child(node, part) for part in ("indptr", "indices", "data")}
    absent = [part for part, value in parts.items() if value is None or is_group(value)]
    if absent or shape is None or len(shape) != 2 or kind[:3] not in ("csr", "csc"):
        lacking = ", ".join(absent) or ("its shape" if shape is None else "a known encoding")
        raise UserError(
            f"{name} is no count matrix (without {lacking})",
            path=path,
            fix="write the file again with anndata",
        )
    layout = CsrMatrix if kind.startswith("csr") else CscMatrix
    return layout(
        path,
        name=name,
        shape=(int(shape[0]), int(shape[1])),
        indptr=np.asarray(parts["indptr"][:]),
        indices=stretch(parts["indices"]),
        data=stretch(parts["data"]),
    )
