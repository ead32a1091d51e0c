"""AnnData files: .h5ad, and what zarr stores share with them.

Where X holds no counts but `raw/X` or `layers["counts"]` does (as CELLxGENE has it), that is read instead, and noted;
`raw` comes with genes of its own. An explicit `layer` or `raw` is taken at its word.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.io import hdf5
from cellformers.io.dense import DenseMatrix
from cellformers.io.frames import Frame, attribute, child, is_group, one_dimensional
from cellformers.io.names import as_pass, cell_names, choose_features
from cellformers.io.source import CountSource, Matrix, ReadOptions, check_cells, check_size
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
    matrix, where = _choose(_Matrices(root, path, obs.n, stretch), options, notes)
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
    if passed is None and "filter_pass" in obs.columns:
        raise UserError(
            "obs has a filter_pass that can't be read", path=path, fix="remove or mend that column"
        )
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
    return sorted(hdf5.names_in(layers)) if layers is not None and is_group(layers) else []


def _raw(root: Any) -> str | None:
    return next((name for name in ("raw/X", "raw.X") if child(root, name) is not None), None)


def _elsewhere(root: Any) -> str:
    layers = ", ".join(_layers(root)) or "none"
    return f"name the raw counts with layer: or raw: true (layers: {layers}; raw: {'yes' if _raw(root) else 'none'})"


class _Matrices(NamedTuple):
    """What is needed to open a matrix of a file."""

    root: Any
    path: Path
    n_cells: int
    """How many cells have names: what each matrix must have."""
    stretch: Callable[[Any], Stretch]


def _choose(file: _Matrices, options: ReadOptions, notes: list[str]) -> tuple[Matrix, str]:
    """Where the counts are: "X", "raw/X", "layers/..."; the matrix, opened."""
    root, path = file.root, file.path
    raw = _raw(root)
    if options.raw:
        if raw is None:
            raise UserError(
                "has no raw", path=path, fix=f"leave out raw: true (layers: {_listed(_layers(root))})"
            )
        return _matrix(file, raw), raw
    if options.layer is not None and options.layer != "X":
        layers = _layers(root)
        if options.layer not in layers:
            raise UserError(
                f"has no layer {options.layer!r}",
                path=path,
                fix="layer: " + did_you_mean(options.layer, layers),
            )
        return _matrix(file, f"layers/{options.layer}"), f"layers/{options.layer}"
    X = None if child(root, "X") is None else _matrix(file, "X")
    if X is not None and (options.layer == "X" or _holds_counts(X)):
        return X, "X"
    if options.layer == "X":
        raise UserError("has no X", path=path, fix=_elsewhere(root))
    counts = "layers/counts" if "counts" in _layers(root) else None
    for other in (raw, counts):
        if other is not None:
            matrix = _matrix(file, other)
            if _holds_counts(matrix):
                notes.append(
                    f"X {'is missing' if X is None else 'holds no counts'}; {matrix.name} does and is used"
                )
                return matrix, other
            matrix.close()
    if X is None:
        raise UserError("has no X", path=path, fix=_elsewhere(root))
    return X, "X"  # opening it refuses what it holds, or rounds it


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _holds_counts(matrix: Matrix) -> bool:
    if matrix.n_cells == 0 or matrix.n_features == 0:
        return True
    try:
        values = matrix.head().values
        return to_counts(values) is not None
    except BaseException:
        matrix.close()
        raise


def _matrix(file: _Matrices, where: str) -> Matrix:
    path, node = file.path, child(file.root, where)
    name = (
        f"layers[{where.removeprefix('layers/')!r}]"
        if where.startswith("layers/")
        else where.replace(".", "/")
    )
    if node is None:
        raise UserError(f"{name} leads nowhere", path=path, fix="write the file again with anndata")
    if not is_group(node):
        matrix = DenseMatrix(path, node, name=name, cells_in_rows=True)
        check_cells(matrix.name, (matrix.n_cells, matrix.n_features), file.n_cells, path)
        return matrix
    kinds = [attribute(node, name) for name in ("encoding-type", "h5sparse_format")]
    kind = next((given for given in kinds if isinstance(given, str)), "")
    shape = attribute(node, "shape")
    shape = attribute(node, "h5sparse_shape") if shape is None else shape
    parts = {part: child(node, part) for part in ("indptr", "indices", "data")}
    absent = [part for part, value in parts.items() if not one_dimensional(value)]
    try:
        sizes = np.asarray(shape)
    except ValueError:  # lists of unequal lengths, which JSON may hold
        sizes = np.zeros(0)
    good = sizes.shape == (2,) and sizes.dtype.kind in "iuf" and bool(((sizes >= 0) & (sizes < 2**31)).all())
    if absent or not good or kind[:3] not in ("csr", "csc"):
        lacking = ", ".join(absent) or ("a known encoding" if good else "a possible shape")
        raise UserError(
            f"{name} is no count matrix (without {lacking})",
            path=path,
            fix="write the file again with anndata",
        )
    check_cells(name, (int(sizes[0]), int(sizes[1])), file.n_cells, path)
    layout = CsrMatrix if kind.startswith("csr") else CscMatrix
    return layout(
        path,
        name=name,
        shape=(int(sizes[0]), int(sizes[1])),
        indptr=parts["indptr"],
        indices=file.stretch(parts["indices"]),
        data=file.stretch(parts["data"]),
    )
