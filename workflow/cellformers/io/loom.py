"""Loom files: genes in rows, cells in columns, read in whole columns of chunks.

Deposits hold dense, gzipped chunks of 64 x 64, so a block is a multiple of the chunk's width. Attributes are named
as people named them: see `CELL_NAMES`; for genes, `names.ID_COLUMNS` and `names.SYMBOL_COLUMNS`.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.io import hdf5
from cellformers.io.dense import DenseMatrix
from cellformers.io.frames import one_dimensional, texts, values_of
from cellformers.io.inflate import check_names
from cellformers.io.names import Strings, as_pass, as_strings, cell_names, choose_features
from cellformers.io.source import CountSource, ReadOptions, check_size

CELL_NAMES = (
    "cellid",
    "cell_id",
    "obs_names",
    "cell_names",
    "cellids",
    "barcode",
    "barcodes",
    "cell",
    "sample",
    "index",
)
_CELLS_AT_A_TIME = 1 << 16
GENE_NAMES = (
    "gene",
    "genes",
    "var_names",
    "gene_name",
    "gene_names",
    "gene_short_name",
    "symbol",
    "accession",
)


def open_loom(path: Path, options: ReadOptions) -> CountSource:
    """Open a loom file."""
    with ExitStack() as stack:
        root = stack.enter_context(hdf5.open_hdf5(path))
        source = _open(root, path, options)
        source.resources = stack.pop_all()
    return source


def _open(root: Any, path: Path, options: ReadOptions) -> CountSource:
    notes: list[str] = []
    layers = hdf5.child(root, "layers")
    known = sorted(hdf5.names_in(layers)) if isinstance(layers, h5py.Group) else []
    if options.raw:
        raise UserError(
            "loom files have no raw", path=path, fix=f"use layer: (layers: {', '.join(known) or 'none'})"
        )
    where, name = "matrix", "matrix"
    if options.layer not in (None, "X", "matrix", ""):
        if options.layer not in known:
            raise UserError(
                f"has no layer {options.layer!r}",
                path=path,
                fix="layer: " + did_you_mean(str(options.layer), known),
            )
        where, name = f"layers/{options.layer}", f"layers[{options.layer!r}]"
    table = hdf5.child(root, where)
    if not isinstance(table, h5py.Dataset):
        raise UserError(f"{name} is no table", path=path, fix="write the file again")
    matrix = DenseMatrix(path, table, name=name, cells_in_rows=False)
    n_genes, n_cells = matrix.n_features, matrix.n_cells
    rows, columns = _attributes(root, "row_attrs"), _attributes(root, "col_attrs")

    def row(attribute: str) -> Strings:
        values = values_of(rows[attribute])
        return as_strings("" if v == "nan" else v for v in texts(values))

    index_name = _called(rows, GENE_NAMES)
    if options.gene_column in rows:
        index_name = options.gene_column
    if index_name is None and not rows:
        raise UserError("has no names of genes (row_attrs is empty)", path=path, fix="write the file again")
    if index_name is not None:
        check_size(matrix, n_cells, len(rows[index_name]), path)
    # numbers stand in where no attribute has a name for genes; an id column is still found by its values
    index = row(index_name) if index_name is not None else as_strings(map(str, range(n_genes)))
    ids, symbols = choose_features(
        index,
        [a for a, node in rows.items() if len(node) == n_genes],
        row,
        requested=options.gene_column,
        path=path,
        index_name=index_name or "",
        notes=notes,
    )
    if options.gene_column is None and index_name is None and (ids == index).all():
        raise UserError(
            "no row attribute names the genes", path=path, fix="gene_column: " + did_you_mean("", rows)
        )
    cell = options.cell_column or _called(columns, CELL_NAMES)
    if cell is None or cell not in columns:
        what = "no column attribute names the cells" if cell is None else f"has no cell column {cell!r}"
        raise UserError(what, path=path, fix="cell_column: " + did_you_mean(cell or "", columns))
    check_size(matrix, len(columns[cell]), len(ids), path)
    check_names(columns[cell])
    names = cell_names(
        n_cells,
        lambda lo, hi: texts(columns[cell][lo:hi]),
        make_unique=options.make_unique,
        path=path,
        notes=notes,
    )
    passed = columns.get("filter_pass")
    if passed is not None:
        check_size(matrix, len(passed), n_genes, path)
    return CountSource(
        path=path,
        matrix=matrix,
        names=names,
        feature_ids=ids,
        feature_symbols=symbols,
        filter_pass=None if passed is None else as_pass(values_of(passed)),
        notes=notes,
        elsewhere=f"name the raw counts with layer: (layers: {', '.join(known) or 'none'})",
        options=options,
        read_obs=lambda: {
            a: _column(node) for a, node in columns.items() if a != cell and len(node) == n_cells
        },
    )


def _attributes(root: Any, group: str) -> dict[str, Any]:
    """What a loom file says about its genes or its cells, one-dimensional."""
    node = hdf5.child(root, group)
    if not isinstance(node, h5py.Group):
        return {}
    children = {name: hdf5.child(node, name) for name in hdf5.names_in(node)}
    return {name: c for name, c in children.items() if one_dimensional(c)}


def _column(node: Any) -> Any:
    """An attribute of all cells: numbers as they are, texts as object, equal ones the same object.

    Of millions of cells each has one of a few dozen types or donors: a text for each cell would fill the memory.
    """
    if node.dtype.kind in "biuf":
        return values_of(node)
    known: dict[Any, str] = {}
    out = np.empty(len(node), dtype=object)
    for lo in range(0, len(node), _CELLS_AT_A_TIME):
        part = node[lo : lo + _CELLS_AT_A_TIME].tolist()
        new = [value for value in dict.fromkeys(part) if value not in known]
        known.update(zip(new, texts(np.array([*new, None], dtype=object)[:-1]), strict=True))
        out[lo : lo + len(part)] = [known[value] for value in part]
        if len(known) > _CELLS_AT_A_TIME:  # names rather than labels
            known.clear()
    return out


def _called(attributes: dict[str, Any], wanted: tuple[str, ...]) -> str | None:
    return next((a for name in wanted for a in attributes if a.lower() == name), None)
