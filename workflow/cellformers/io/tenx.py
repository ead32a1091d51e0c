"""10x Genomics' `.h5` of Cell Ranger 2 (a group per genome) and since 3 (`matrix`); its mtx folders are in `mtx`.

Only features of the type "Gene Expression" are kept; what else there is (antibodies, guides) is named in the notes.
"""

import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cellformers.errors import UserError
from cellformers.io import hdf5
from cellformers.io.frames import column_of, one_dimensional, texts, values_of
from cellformers.io.inflate import check_names
from cellformers.io.names import Strings, as_strings, cell_names, strip_version
from cellformers.io.source import (
    CountSource,
    Matrix,
    ReadOptions,
    check_cells,
    check_size,
    refuse_options,
)
from cellformers.io.sparse import CsrMatrix

Array = np.ndarray[Any, Any]
GENES = "Gene Expression"
_SYMBOLS = ("name", "gene_names", "symbol")


def kept_features(kinds: Strings | None, path: Path, notes: list[str]) -> Array | None:
    """Numbers of the gene expression features, int64; None where that is all of them."""
    if kinds is None or all(kind == GENES for kind in kinds):
        return None
    kept = np.flatnonzero(kinds == GENES)
    others = Counter(kind for kind in kinds if kind != GENES)
    listed = ", ".join(f"{n} of type {kind[:40]!r}" for kind, n in sorted(others.items())[:8])
    if len(kept) == 0:
        raise UserError(
            f"has no features of type {GENES!r} ({listed})", path=path, fix="give a gene expression matrix"
        )
    notes.append(f"only the {len(kept)} features of type {GENES!r} are read; left out: {listed}")
    return kept


def positions_of(kept: Array | None, n: int) -> Array | None:
    """int32[n]: number of each feature among the `kept`, -1 for the others; None where all are kept."""
    if kept is None:
        return None
    position = np.full(n, -1, dtype=np.int32)
    position[kept] = np.arange(len(kept), dtype=np.int32)
    return position


def open_tenx_h5(path: Path, options: ReadOptions) -> CountSource:
    """Open a Cell Ranger .h5 of version 2 or 3."""
    refuse_options(path, options, "layer", "raw", "cell_column", format_name="10x files")
    notes: list[str] = []
    with ExitStack() as stack:
        root = stack.enter_context(hdf5.open_hdf5(path))
        group = hdf5.child(root, "matrix")
        if isinstance(group, h5py.Group):
            features = {
                name: hdf5.child(group, f"features/{name}") for name in ("id", "name", "feature_type")
            }
        else:
            group = _genome(root, path, notes)
            features = {
                "id": hdf5.child(group, "genes"),
                "name": hdf5.child(group, "gene_names"),
                "feature_type": None,
            }
        parts = {name: hdf5.child(group, name) for name in ("barcodes", "data", "indices", "indptr", "shape")}
        absent = [name for name, node in (parts | {"feature ids": features["id"]}).items() if node is None]
        if absent:
            raise UserError(
                f"is no complete 10x file (without {', '.join(absent)})", path=path, fix="download it again"
            )
        n_stored, n_cells = _shape(parts, path)
        read = {
            name: None if node is None else column_of(node, most=n_stored) for name, node in features.items()
        }
        for name, node in features.items():
            column = read[name]
            if node is not None and (column is None or len(column) != n_stored):
                raise UserError(
                    f"does not hold the {name} of {n_stored} features", path=path, fix="download it again"
                )
        ids = texts(read["id"])
        symbols, kinds = (None if read[k] is None else texts(read[k]) for k in ("name", "feature_type"))
        kept = kept_features(kinds, path, notes)
        matrix = CsrMatrix(
            path,
            name="matrix",
            shape=(n_cells, n_stored if kept is None else len(kept)),
            indptr=parts["indptr"],
            indices=hdf5.stretch(parts["indices"]),
            data=hdf5.stretch(parts["data"]),
            position=positions_of(kept, n_stored),
        )
        source = tenx_source(
            path, matrix, ids, symbols, kept, texts(values_of(parts["barcodes"])), options, notes
        )
        source.resources = stack.pop_all()
    return source


def _shape(parts: dict[str, Any], path: Path) -> tuple[int, int]:
    """Features and cells of a file whose parts may be anything.

    Raises
    ------
    UserError
        If they are not arrays of one dimension, or disagree on the number of cells.
    """
    wrong = [name for name, node in parts.items() if not one_dimensional(node)]
    shape = column_of(parts["shape"], most=2) if not wrong else None
    if shape is None or len(shape) != 2 or shape.dtype.kind not in "iu" or (shape < 0).any():
        raise UserError(
            f"is no 10x file (what should be its {', '.join(wrong) or 'shape'} is something else)",
            path=path,
            fix="download it again",
        )
    check_cells("matrix", (int(shape[1]), int(shape[0])), len(parts["barcodes"]), path)
    check_names(parts["barcodes"])
    return int(shape[0]), int(shape[1])


def _genome(root: Any, path: Path, notes: list[str]) -> Any:
    """The group of the one genome, or of the human one."""
    genomes = [name for name in hdf5.names_in(root) if hdf5.child(root, f"{name}/barcodes") is not None]
    human = [name for name in genomes if re.match(r"(GRCh|hg)\d", name, flags=re.IGNORECASE)]
    if len(genomes) > 1 and len(human) == 1:
        notes.append(f"holds several genomes ({', '.join(genomes)}); {human[0]} is read")
        return hdf5.child(root, human[0])
    if len(genomes) != 1:
        found = f"holds several genomes ({', '.join(genomes)})" if genomes else "is no 10x file"
        raise UserError(found, path=path, fix="give a file with one genome")
    return hdf5.child(root, genomes[0])


def tenx_source(
    path: Path,
    matrix: Matrix,
    ids: Strings,
    symbols: Strings | None,
    kept: Array | None,
    barcodes: Strings,
    options: ReadOptions,
    notes: list[str],
) -> CountSource:
    """A source of the `kept` features; `gene_column` may ask for symbols instead of ids."""
    if kept is not None:
        ids, symbols = ids[kept], None if symbols is None else symbols[kept]
    if options.gene_column in _SYMBOLS and symbols is not None:
        ids, symbols = symbols, None
    elif options.gene_column not in (None, "id"):
        raise UserError(
            f"has no gene column {options.gene_column!r}",
            path=path,
            fix="gene_column: id or name, or leave it out",
        )
    check_size(matrix, len(barcodes), len(ids), path)
    return CountSource(
        path=path,
        matrix=matrix,
        names=cell_names(
            len(barcodes),
            lambda lo, hi: barcodes[lo:hi],
            make_unique=options.make_unique,
            path=path,
            notes=notes,
        ),
        feature_ids=as_strings(map(strip_version, ids)),
        feature_symbols=symbols,
        notes=notes,
        options=options,
    )
