"""One file in, the same file with an embedding out: the whole analysis without a config.

    cellformers embed-file my.h5ad --model models/v2-104m -o my_embedded.h5ad

The result is a copy of the user's file with obsm["X_{name}"], a neighbour graph and a UMAP. Cells are embedded in
blocks that are kept in `{output}.parts` until the result is whole, so that a run that was stopped goes on where it
was; the time is estimated after the first block. A block is known by its tokens, the model and the options, so
what was changed in between is computed anew.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellformers.errors import UserError
from cellformers.gather import check_name, in_order
from cellformers.io.files import atomic_path, digest_arrays, digest_file, open_parquet
from cellformers.io.source import ReadOptions, open_counts
from cellformers.progress import progress, say
from cellformers.revisions import REVISIONS

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BLOCK_CELLS = 512
FEWEST_CELLS = 15  # of a neighbour graph worth the name
NEIGHBOURS = 15


def embed_file(
    path: str | Path,
    model: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    mode: str | None = None,
    layer: int = -1,
    dtype: str = "float32",
    backend: str = "auto",
    umap: bool = True,
    seed: int = 0,
    accelerator: str = "cpu",
    threads: int = 2,
    options: ReadOptions | None = None,
    quiet: bool = False,
) -> None:
    """Embed every cell of a count file, in file order.

    Parameters
    ----------
    path, model, output
        A count file or folder; a model directory, or a registered name, which is downloaded; the .h5ad to write.
    name
        obsm key after `X_`; default: the name of the model's folder.
    mode, layer, dtype, backend
        As in `embedding.embed_cells`; mode None is cls where the vocabulary has <cls>, else cell.
    umap
        Also write neighbours (obsp and uns under `name`, as `scanpy.pp.neighbors(..., key_added=name)` has them) and
        obsm["X_umap_{name}"].

    Cells that the file's own `filter_pass` excludes, and cells without a gene of the vocabulary, get NaN.

    Raises
    ------
    UserError
        For what `open_counts`, `tokenize` and `embed_cells` refuse, and where the output is the input.
    """
    from cellformers.embedding import default_mode, embed_cells, load_model
    from cellformers.registry import find_model
    from cellformers.tokens import tokenize

    path, output = Path(path), Path(output)
    model = find_model(model, fetch=True, quiet=quiet)
    name = check_name(name or model.resolve().name)
    _check_output(path, output)
    wanted: dict[str, Any] = {"mode": mode or default_mode(model), "layer": layer, "dtype": dtype}
    opened = load_model(model, **wanted, backend=backend, accelerator=accelerator)
    with open_counts(path, options=options) as source, _parts_folder(output) as parts:
        for note in source.notes:
            say(f"{path}: {note}", quiet=quiet)
        cell_ids = source.cell_ids
        tokens = parts / "tokens.parquet"
        with progress("tokenize", source.n_cells, quiet=quiet) as advance:
            report = tokenize(
                source, opened.vocabulary, output=tokens, min_genes=1, threads=threads, advance=advance
            )
        if report["cells"]["few_genes"]:
            say(
                f"tokenize: {report['cells']['few_genes']:,} cells without a gene of the vocabulary",
                quiet=quiet,
            )
        blocks = _split_tokens(tokens, parts)
        revision = f"{REVISIONS['embed']} {wanted} {opened.digest}"
        embedded = [
            parts / f"embedding-{digest_arrays([digest_file(block), revision])[7:39]}.parquet"
            for block in blocks
        ]
        left = sum(not done.is_file() for done in embedded)
        said = False
        with progress("embed", report["cells"]["kept"], quiet=quiet) as advance:
            for block, done in zip(blocks, embedded, strict=True):
                if done.is_file():
                    advance(open_parquet(done).metadata.num_rows)
                    continue
                begun = time.monotonic()
                embed_cells(block, opened, done, **wanted, threads=threads, progress=advance)
                left -= 1
                if not said and left:
                    said = True
                    minutes = (time.monotonic() - begun) * left / 60
                    say(
                        f"embed-file: about {minutes:.0f} minutes to go ({left} blocks of cells)", quiet=quiet
                    )
        vectors = in_order(cell_ids, embedded)
        graph = _neighbours(vectors, seed=seed) if umap else None
        _write(path, output, vectors, graph, name=name, seed=seed, options=options)
    say(f"{output}: {len(cell_ids):,} cells, obsm['X_{name}'] of width {vectors.shape[1]}", quiet=quiet)


def _check_output(path: Path, output: Path) -> None:
    """Refuse outputs that would be found impossible only when everything is computed."""
    if output.exists() and path.exists() and output.samefile(path):
        raise UserError("is the input, which is never changed", path=output, fix="choose another --output")
    if output.suffix != ".h5ad":
        raise UserError("the result is an .h5ad file", path=output, fix="name it so")
    if output.is_dir():
        raise UserError(
            "is a folder, a file is to be written here", path=output, fix="choose another --output"
        )


@contextmanager
def _parts_folder(output: Path) -> Iterator[Path]:
    """The folder of intermediate files; it goes when the result is whole, or when there is nothing to go on from."""
    parts = output.with_name(output.name + ".parts")
    try:
        yield parts
    except BaseException:
        if not list(parts.glob("embedding-*.parquet")):
            shutil.rmtree(parts, ignore_errors=True)
        raise
    shutil.rmtree(parts)


def _split_tokens(tokens: Path, parts: Path) -> list[Path]:
    """Token files of `BLOCK_CELLS` cells each, with the metadata of the whole."""
    blocks = []
    with open_parquet(tokens) as file:
        for number, batch in enumerate(file.iter_batches(BLOCK_CELLS)):
            block = parts / f"tokens-{number:06d}.parquet"
            with atomic_path(block) as temporary:
                pq.write_table(
                    pa.Table.from_batches([batch], file.schema_arrow), temporary, compression="zstd"
                )
            blocks.append(block)
    return blocks


class Graph(NamedTuple):
    """Neighbours and their map; cells without a vector have no neighbours and NaN coordinates."""

    distances: "csr_matrix"
    connectivities: "csr_matrix"
    umap: np.ndarray
    n_neighbours: int


def _write(
    path: Path,
    output: Path,
    vectors: np.ndarray,
    graph: Graph | None,
    *,
    name: str,
    seed: int,
    options: ReadOptions | None,
) -> None:
    """The user's file with the vectors added; other formats than h5ad become one, counts and cell metadata."""
    import h5py
    from anndata.io import write_elem

    with atomic_path(output) as temporary:
        if _takes_elements(path):
            shutil.copyfile(path, temporary)
        else:
            _as_h5ad(path, temporary, options)
        with h5py.File(temporary, "r+") as file:
            for group in ("obsm", "obsp", "uns"):
                if group not in file:
                    write_elem(file, group, {})
            _replace(file["obsm"], f"X_{name}", vectors)
            if graph is not None:
                _replace(file["obsm"], f"X_umap_{name}", graph.umap)
                _replace(file["obsp"], f"{name}_distances", graph.distances)
                _replace(file["obsp"], f"{name}_connectivities", graph.connectivities)
                described = {
                    "connectivities_key": f"{name}_connectivities",
                    "distances_key": f"{name}_distances",
                    "params": {
                        "method": "umap",
                        "metric": "euclidean",
                        "n_neighbors": graph.n_neighbours,
                        "random_state": seed,
                        "use_rep": f"X_{name}",
                    },
                }
                _replace(file["uns"], name, described)


def _takes_elements(path: Path) -> bool:
    """Whether a copy of the file can be added to: an h5ad in the layout that anndata has written since 0.7."""
    import h5py

    from cellformers.io.h5ad import open_h5ad
    from cellformers.io.sniff import opener

    if opener(path) is not open_h5ad:
        return False
    with h5py.File(path, "r") as file:
        return all(isinstance(file.get(key, {}), h5py.Group | dict) for key in ("obs", "obsm", "obsp", "uns"))


def _replace(group: Any, key: str, value: Any) -> None:
    from anndata.io import write_elem

    if key in group:
        del group[key]
    write_elem(group, key, value)


def _neighbours(vectors: np.ndarray, *, seed: int) -> Graph | None:
    """Neighbours and UMAP by scanpy, over the cells that have a vector; None where these are too few."""
    import scanpy as sc
    from anndata import AnnData
    from scipy import sparse

    n, rows = len(vectors), np.flatnonzero(np.isfinite(vectors[:, 0]))
    if len(rows) < FEWEST_CELLS:
        return None
    some = AnnData(obsm={"X": vectors[rows]})
    neighbours = min(NEIGHBOURS, len(rows) - 1)
    sc.pp.neighbors(some, use_rep="X", n_neighbors=neighbours, random_state=seed)
    sc.tl.umap(some, random_state=seed)
    coordinates = np.full((n, 2), np.nan, np.float32)
    coordinates[rows] = some.obsm["X_umap"]

    def spread(key: str) -> "csr_matrix":
        graph = some.obsp[key].tocoo()
        return sparse.csr_matrix((graph.data, (rows[graph.row], rows[graph.col])), shape=(n, n))

    return Graph(spread("distances"), spread("connectivities"), coordinates, neighbours)


def _as_h5ad(path: Path, output: Path, options: ReadOptions | None) -> None:
    """Any count file as an .h5ad of its counts and its cell metadata."""
    import anndata
    import pandas as pd
    from scipy import sparse

    from cellformers.counts import canonical_blocks

    with open_counts(path, options=options) as source:
        blocks = [
            sparse.csr_matrix((b.data, b.indices, b.indptr), shape=(b.n_cells, source.n_features))
            for b in canonical_blocks(source)
        ]
        var = pd.DataFrame(index=pd.Index(source.feature_ids.astype(str)))
        if source.feature_symbols is not None:
            var["symbol"] = source.feature_symbols
        obs = source.obs()
        obs.index.name = None
        adata = anndata.AnnData(X=sparse.vstack(blocks, format="csr"), obs=obs, var=var)
    adata.write_h5ad(output)
