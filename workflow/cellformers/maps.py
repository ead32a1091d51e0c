"""Two-dimensional maps of cells by UMAP, for looking at an embedding.

    maps.umap("embeddings/small.h5ad", "maps/small.parquet", seed=0)

A map is for the eye only: distances and densities in it mean little, and no score is computed from it. UMAP runs on
one thread from a fixed start, the first two principal components, so that the same cells give the same map on one
machine with one set of library versions. Of many cells some are drawn; vectors are read a block at a time, so that
memory depends on the cells on the map alone.
"""

import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from cellformers.errors import UserError, did_you_mean
from cellformers.io.arrow import numbers, strings
from cellformers.io.files import Pieces, digest_arrays, stamp, write_table
from cellformers.revisions import REVISIONS

MAX_CELLS = 50_000
COMPONENTS, NEIGHBOURS, MIN_DISTANCE = 50, 15, 0.3
ROWS = 4096  # vectors read at a time
MIN_CELLS = 15  # fewer have no neighbourhoods to speak of: their map is that of the principal components


def principal_components(X: np.ndarray, n: int) -> np.ndarray:
    """First `n` principal components of the rows of X, float64[rows, n]; zeros where there is no such component.

    The sign of a component is that which makes its largest loading positive, so that it is defined.
    """
    centred = X.astype(np.float64) - X.mean(axis=0, dtype=np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, ::-1][:, :n]
    top = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[top, np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    result = np.zeros((len(X), n))
    result[:, : axes.shape[1]] = centred @ axes
    return result


def layout(X: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """UMAP of the rows of X (McInnes et al. 2018), float32[n, 2]; principal components below MIN_CELLS rows.

    Neighbours are the exact nearest ones in the first 50 principal components, by Euclidean distance; for them
    umap-learn's approximate search would compile longer than the exact one takes.

    Parameters
    ----------
    X
        float[n, dim], finite.
    seed
        Of the negative samples.
    """
    with threadpool_limits(1):  # sums in one order, whatever the number of threads
        components = principal_components(X, min(COMPONENTS, max(2, X.shape[1])))
        start = components[:, :2]
        spread = start.std()
        if len(X) < MIN_CELLS or not spread > 0:
            return start.astype(np.float32)
        from sklearn.neighbors import NearestNeighbors

        near = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(X) - 1), algorithm="brute")
        distance, index = near.fit(components).kneighbors(components)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import: tensorflow, which nothing here needs, is not installed
        from umap.umap_ import find_ab_params, fuzzy_simplicial_set, simplicial_set_embedding

    random = np.random.RandomState(seed)
    graph, _, _ = fuzzy_simplicial_set(
        components,
        index.shape[1],
        random,
        "euclidean",
        knn_indices=index,
        knn_dists=distance.astype(np.float32),
    )
    a, b = find_ab_params(1.0, MIN_DISTANCE)
    # Equal cells would stay on one spot: the start is spread by a hair, as umap-learn's own starts are.
    start = start / spread + np.random.default_rng(seed).normal(0, 1e-4, start.shape)
    xy, _ = simplicial_set_embedding(
        components, graph, 2, 1.0, a, b, 1.0, 5, 500 if len(X) <= 10_000 else 200, start.astype(np.float32), random,
        "euclidean", {}, False, {}, False,
    )  # fmt: skip
    return np.asarray(xy, dtype=np.float32)


def _drawn(
    embeddings: Path, name: str, *, max_cells: int, seed: int
) -> tuple[pa.StringArray, np.ndarray, int, str]:
    """Names and vectors of the cells to show, string[n] and float[n, dim]; cells in all; the digest of all."""
    if not embeddings.is_file():
        raise UserError("no such file", path=embeddings)
    try:
        return _read(embeddings, name, max_cells=max_cells, seed=seed)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError("not a readable h5ad of embeddings", path=embeddings, fix="make it again") from error


def _read(
    embeddings: Path, name: str, *, max_cells: int, seed: int
) -> tuple[pa.StringArray, np.ndarray, int, str]:
    from cellformers.io.frames import Frame
    from cellformers.io.hdf5 import child, open_hdf5
    from cellformers.io.inflate import check_packed

    key = f"X_{name}"
    with closing(open_hdf5(embeddings)) as file:
        there = list(child(file, "obsm") or ())
        if key not in there:
            raise UserError(f"has no obsm[{key!r}]", path=embeddings, fix=did_you_mean(key, there))
        frame = Frame(file, "obs", embeddings)
        ids = strings(frame.strings("cell_id") if "cell_id" in frame.columns else frame.index())
        table = child(file, f"obsm/{key}")
        if getattr(table, "ndim", 0) != 2 or len(table) != len(ids) or not len(ids):
            raise UserError(
                f"obsm[{key!r}] is empty or no matrix", path=embeddings, fix="embed the cells again"
            )
        check_packed(table)
        chosen = np.arange(len(ids))
        if len(ids) > max_cells:
            chosen = np.sort(np.random.default_rng(seed).choice(len(ids), max_cells, replace=False))
        vectors = np.empty((len(chosen), table.shape[1]), table.dtype)

        def parts() -> Iterator[np.ndarray]:
            for start in range(0, len(ids), ROWS):
                part = table[start : start + ROWS]
                if not np.isfinite(part).all():
                    raise UserError(
                        f"obsm[{key!r}] is not finite", path=embeddings, fix="embed the cells again"
                    )
                first, last = np.searchsorted(chosen, (start, start + ROWS))
                vectors[first:last] = part[chosen[first:last] - start]
                yield part

        digest = digest_arrays(ids, Pieces(table.dtype, tuple(table.shape), parts()))
        return ids.take(numbers(chosen)), vectors, len(ids), digest


def umap(
    embeddings: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    seed: int = 0,
    max_cells: int = MAX_CELLS,
) -> int:
    """Write a map of the cells of an embedding: cell_id, umap_1, umap_2 (float32), in the order of the input.

    Parameters
    ----------
    embeddings
        AnnData file with obsm["X_{name}"], as `cellformers gather` writes it.
    output
        Parquet file; its metadata say how many cells there were, how many were drawn, and by which method.
    name
        Name of the embedding; default: the name of the file.
    max_cells
        Of more cells than this, so many are drawn at random (seed).

    Returns
    -------
    Number of cells on the map.

    Raises
    ------
    UserError
        If the file is missing, is not AnnData, lacks the embedding or holds values that are not finite.
    """
    embeddings = Path(embeddings)
    ids, vectors, total, digest = _drawn(embeddings, name or embeddings.stem, max_cells=max_cells, seed=seed)
    xy = layout(vectors, seed=seed)
    parameters: dict[str, Any] = {
        "method": "umap" if len(ids) >= MIN_CELLS else "principal components",
        "seed": seed,
        "max_cells": max_cells,
        "n_cells": total,
        "n_shown": len(ids),
        "subsampled": total > len(ids),
    }
    table = pa.table(
        {
            "cell_id": ids,
            "umap_1": pa.array(xy[:, 0], pa.float32()),
            "umap_2": pa.array(xy[:, 1], pa.float32()),
        }
    )
    made = stamp("map", REVISIONS["map"], parameters=parameters, inputs={"embeddings": digest})
    write_table(table, output, made)
    return len(ids)
