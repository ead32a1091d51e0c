"""One file in, the same file with an embedding out: the whole analysis without a config.

    cellformers embed-file my.h5ad --model models/v2-104m -o my_embedded.h5ad

The result is a copy of the user's file with obsm["X_{name}"], a neighbour graph and a UMAP. Cells are embedded in
blocks that are kept in `{output}.parts` until the result is whole, so that a run that was stopped goes on where it
was; the time is estimated after the first block. A block is known by its tokens, the model and the options, so
what was changed in between is computed anew. Vectors are copied a block at a time; of many cells the neighbours are
searched among principal components.
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
from cellformers.gather import Ordered, check_name, ordered
from cellformers.io.files import atomic_path, digest_arrays, digest_file, open_parquet
from cellformers.io.locks import exclusive
from cellformers.io.source import ReadOptions, open_counts
from cellformers.progress import progress, say
from cellformers.revisions import REVISIONS
from cellformers.vectors import blocks as vector_blocks
from cellformers.vectors import principal_components

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

BLOCK_CELLS = 512
FEWEST_CELLS = 15  # of a neighbour graph worth the name
NEIGHBOURS = 15
EXACT = 8192  # of so many cells and more, neighbours are approximate, as scanpy's are
WHOLE = 50_000  # of more cells, neighbours are searched among this many principal components:
COMPONENTS = 50


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
        obsm["X_umap_{name}"]. Of more than 50,000 cells neighbours are those in the first 50 principal components,
        from two of which UMAP starts; uns says so.

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
                    about = f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"
                    say(f"embed-file: about {about} to go ({left} blocks of cells)", quiet=quiet)
        vectors = ordered(source.names, embedded)
        graph = _neighbours(vectors, seed=seed) if umap else None
        if graph is not None and graph.components:
            say(
                f"embed-file: neighbours and UMAP in {graph.components} principal components, as cells are many",
                quiet=quiet,
            )
        _write(path, output, vectors, graph, name=name, seed=seed, options=options)
        say(
            f"{output}: {vectors.n_cells:,} cells, obsm['X_{name}'] of width {vectors.embeddings.dim}",
            quiet=quiet,
        )


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

    def busy() -> None:
        raise UserError("another process is writing this file", path=output, fix="wait for it, or end it")

    with exclusive(output.with_name(f".{output.name}.lock"), busy):
        try:
            yield parts
        except BaseException:
            if not list(parts.glob("embedding-*.parquet")):
                _clear(parts)
            raise
        _clear(parts)


def _clear(parts: Path) -> None:
    """Remove a folder of intermediate files, but for what somebody else has put there."""
    if not parts.is_dir():
        return
    for path in parts.iterdir():
        if path.name.startswith(("tokens", "embedding-", ".part-", ".old-")):
            path.unlink()
    if not any(parts.iterdir()):
        parts.rmdir()


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
    components: int
    """Principal components that neighbours were searched in; 0: the vectors themselves."""


def _write(
    path: Path,
    output: Path,
    vectors: Ordered,
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
            _write_vectors(file["obsm"], f"X_{name}", vectors)
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
                    }
                    | ({"principal_components": graph.components} if graph.components else {}),
                }
                _replace(file["uns"], name, described)


def _takes_elements(path: Path) -> bool:
    """Whether a copy of the file can be added to: an h5ad in the layout that anndata has written since 0.7."""
    import h5py

    from cellformers.io.h5ad import open_h5ad
    from cellformers.io.hdf5 import child, open_hdf5
    from cellformers.io.sniff import opener

    if opener(path) is not open_h5ad:
        return False
    with open_hdf5(path) as file:  # links to other files, which would be written to, are refused
        nodes = [child(file, key) for key in ("obs", "obsm", "obsp", "uns")]
        return all(node is None or isinstance(node, h5py.Group) for node in nodes)


def _replace(group: Any, key: str, value: Any) -> None:
    from anndata.io import write_elem

    if key in group:
        del group[key]
    write_elem(group, key, value)


def _write_vectors(group: Any, key: str, vectors: Ordered) -> None:
    """What `write_elem` makes of an array, block after block."""
    if key in group:
        del group[key]
    table = group.create_dataset(key, shape=(vectors.n_cells, vectors.embeddings.dim), dtype=np.float32)
    table.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    start = 0
    for block in vectors.blocks():
        table[start : start + len(block)] = block
        start += len(block)


def _neighbours(vectors: Ordered, *, seed: int) -> Graph | None:
    """Neighbours and UMAP by scanpy, over the cells that have a vector; None where these are too few."""
    import scanpy as sc
    from anndata import AnnData
    from scipy import sparse

    n, rows = vectors.n_cells, vectors.rows
    if len(rows) < FEWEST_CELLS:
        return None
    many = len(rows) > WHOLE and vectors.embeddings.dim > COMPONENTS
    if many:
        some = AnnData(obsm={"X": principal_components(vectors.embeddings, COMPONENTS)})
        some.obsm["start"] = some.obsm["X"][:, :2]
    else:
        some = AnnData(obsm={"X": np.concatenate(list(vector_blocks(vectors.embeddings, BLOCK_CELLS)))})
    neighbours = min(NEIGHBOURS, len(rows) - 1)
    search = _approximate(len(rows), neighbours, seed=seed) if len(rows) >= EXACT else None
    sc.pp.neighbors(some, use_rep="X", n_neighbors=neighbours, random_state=seed, transformer=search)
    sc.tl.umap(some, random_state=seed, init_pos="start" if many else "spectral")
    coordinates = np.full((n, 2), np.nan, np.float32)
    coordinates[rows] = some.obsm["X_umap"]

    def spread(key: str) -> "csr_matrix":
        graph = some.obsp[key].tocoo()
        return sparse.csr_matrix((graph.data, (rows[graph.row], rows[graph.col])), shape=(n, n))

    return Graph(
        spread("distances"), spread("connectivities"), coordinates, neighbours, COMPONENTS if many else 0
    )


def _approximate(n: int, neighbours: int, *, seed: int) -> Any:
    """Nearest neighbour descent with the settings of scanpy and umap-learn.

    scanpy 1.11 can't use what pynndescent 0.6 and later return, sparse arrays, so these are made matrices.
    """
    from pynndescent import PyNNDescentTransformer  # type: ignore[import-untyped]
    from scipy import sparse

    class Search(PyNNDescentTransformer):  # type: ignore[misc]
        def fit_transform(self, X: np.ndarray, y: None = None, **parameters: Any) -> "csr_matrix":
            return sparse.csr_matrix(super().fit_transform(X, y, **parameters))

    trees, rounds = min(64, 5 + round(n**0.5 / 20)), max(5, round(float(np.log2(n))))
    return Search(
        n_neighbors=neighbours, metric="euclidean", metric_kwds={}, random_state=seed, n_trees=trees, n_iters=rounds,
    )  # fmt: skip


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
