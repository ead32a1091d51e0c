"""One file in, the same file with an embedding out: the whole analysis without a config.

    cellformers embed-file my.h5ad --model models/v2-104m -o my_embedded.h5ad

The result is a copy of the user's file with obsm["X_{name}"], a neighbour graph and a UMAP. Cells are embedded in
blocks that are kept in `{output}.parts` until the result is whole, so that a run that was stopped goes on where it
was; the time is estimated after the first block.
"""

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellformers.errors import UserError
from cellformers.gather import in_order
from cellformers.genes import Vocabulary
from cellformers.io.files import atomic_path, open_parquet, read_metadata
from cellformers.io.source import ReadOptions, open_counts
from cellformers.progress import progress, say

if TYPE_CHECKING:
    from anndata import AnnData

BLOCK_CELLS = 512
FEWEST_CELLS = 15  # of a neighbour graph worth the name


def embed_file(
    path: str | Path,
    model: str | Path,
    output: str | Path,
    *,
    name: str | None = None,
    mode: str | None = None,
    layer: int = -1,
    dtype: str = "float32",
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
        A count file or folder, a model directory, the .h5ad to write.
    name
        obsm key after `X_`; default: the name of the model's folder.
    mode, layer, dtype
        As in `embedding.embed_cells`; mode None is cls where the vocabulary has <cls>, else cell.
    umap
        Also write neighbours (obsp, uns) and obsm["X_umap_{name}"].

    Cells that the file's own `filter_pass` excludes, and cells without a gene of the vocabulary, get NaN.

    Raises
    ------
    UserError
        For what `open_counts`, `tokenize` and `embed_cells` refuse, and where the output is the input.
    """
    from cellformers.embedding import default_mode, embed_cells
    from cellformers.tokens import tokenize

    path, model, output = Path(path), Path(model), Path(output)
    name = name or model.resolve().name
    if output.exists() and path.exists() and output.samefile(path):
        raise UserError("is the input, which is never changed", path=output, fix="choose another --output")
    if output.suffix != ".h5ad":
        raise UserError("the result is an .h5ad file", path=output, fix="name it so")
    vocabulary = Vocabulary.load(model / "vocabulary")
    with open_counts(path, options=options) as source:
        for note in source.notes:
            say(f"{path}: {note}", quiet=quiet)
        cell_ids = source.cell_ids
        parts = output.with_name(output.name + ".parts")
        tokens = parts / "tokens.parquet"
        with progress("tokenize", source.n_cells, quiet=quiet) as advance:
            report = tokenize(source, vocabulary, output=tokens, threads=threads, advance=advance)
    blocks = _split_tokens(tokens, parts)
    started, done = time.monotonic(), 0
    with progress("embed", report["cells"]["kept"], quiet=quiet) as advance:
        for number, block in enumerate(blocks):
            embedded = block.with_name(block.name.replace("tokens", "embedding"))
            wanted = {"mode": mode or default_mode(model), "layer": layer, "dtype": dtype}
            if _is_done(embedded, block, wanted):
                advance(open_parquet(embedded).metadata.num_rows)
                continue
            embed_cells(
                block, model, embedded, **wanted, accelerator=accelerator, threads=threads, progress=advance
            )
            done += 1
            if done == 1 and len(blocks) > number + 1:
                left = (time.monotonic() - started) * (len(blocks) - number - 1)
                say(
                    f"embed-file: about {left / 60:.0f} minutes to go ({len(blocks)} blocks of cells)",
                    quiet=quiet,
                )
    vectors = in_order(cell_ids, [b.with_name(b.name.replace("tokens", "embedding")) for b in blocks])
    _write(path, output, vectors, cell_ids, name=name, umap=umap, seed=seed, options=options, quiet=quiet)
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


def _is_done(embedded: Path, block: Path, wanted: dict[str, Any]) -> bool:
    """Whether a block was embedded before, from the same tokens' dataset and with the same options."""
    if not embedded.is_file():
        return False
    made, source = read_metadata(embedded), read_metadata(block)
    same = all(made["inputs"].get(key) == source["inputs"].get(key) for key in ("dataset", "vocabulary"))
    return same and made["parameters"] == wanted


def _write(
    path: Path,
    output: Path,
    vectors: np.ndarray,
    cell_ids: np.ndarray,
    *,
    name: str,
    umap: bool,
    seed: int,
    options: ReadOptions | None,
    quiet: bool,
) -> None:
    """The user's file with the vectors added; other formats than h5ad become one, counts and cell metadata."""
    import h5py
    from anndata.io import write_elem

    extra = _neighbours(vectors, name=name, seed=seed) if umap else None
    with atomic_path(output) as temporary:
        if h5py.is_hdf5(path) and path.suffix in (".h5ad", ".h5"):
            shutil.copyfile(path, temporary)
        else:
            _as_h5ad(path, temporary, options)
        with h5py.File(temporary, "r+") as file:
            for group in ("obsm", "obsp", "uns"):
                if group not in file:
                    write_elem(file, group, {})
            _replace(file["obsm"], f"X_{name}", vectors)
            if extra is not None:
                _replace(file["obsm"], f"X_umap_{name}", extra.obsm["X_umap"])
                for key in ("distances", "connectivities"):
                    _replace(file["obsp"], f"{name}_{key}", extra.obsp[key])
                graph = {
                    "connectivities_key": f"{name}_connectivities",
                    "distances_key": f"{name}_distances",
                    "params": {
                        "method": "umap",
                        "use_rep": f"X_{name}",
                        "random_state": seed,
                        "n_neighbors": 15,
                    },
                }
                _replace(file["uns"], name, graph)
    say(f"{output}: {len(cell_ids):,} cells, obsm['X_{name}'] of width {vectors.shape[1]}", quiet=quiet)


def _replace(group: Any, key: str, value: Any) -> None:
    from anndata.io import write_elem

    if key in group:
        del group[key]
    write_elem(group, key, value)


def _neighbours(vectors: np.ndarray, *, name: str, seed: int) -> "AnnData | None":
    """Neighbours and UMAP by scanpy, over the cells that have a vector; the others get none and NaN."""
    import scanpy as sc
    from anndata import AnnData
    from scipy import sparse

    rows = np.flatnonzero(np.isfinite(vectors[:, 0]))
    if len(rows) < FEWEST_CELLS:
        return None
    some = AnnData(obsm={f"X_{name}": vectors[rows]})
    sc.pp.neighbors(some, use_rep=f"X_{name}", n_neighbors=min(15, len(rows) - 1), random_state=seed)
    sc.tl.umap(some, random_state=seed)
    n = len(vectors)
    full = AnnData(obsm={f"X_{name}": vectors})
    coordinates = np.full((n, 2), np.nan, np.float32)
    coordinates[rows] = some.obsm["X_umap"]
    full.obsm["X_umap"] = coordinates
    for key in ("distances", "connectivities"):
        graph = some.obsp[key].tocoo()
        full.obsp[key] = sparse.csr_matrix((graph.data, (rows[graph.row], rows[graph.col])), shape=(n, n))
    return full


def _as_h5ad(path: Path, output: Path, options: ReadOptions | None) -> None:
    """Any count file as an .h5ad of its counts and its cell metadata."""
    import anndata
    import pandas as pd
    from scipy import sparse

    with open_counts(path, options=options) as source:
        blocks = [
            sparse.csr_matrix((b.data, b.indices, b.indptr), shape=(len(b.indptr) - 1, source.n_features))
            for b in source.blocks()
        ]
        var = pd.DataFrame(index=pd.Index(source.feature_ids.astype(str)))
        if source.feature_symbols is not None:
            var["symbol"] = source.feature_symbols
        adata = anndata.AnnData(X=sparse.vstack(blocks, format="csr"), obs=source.obs(), var=var)
    adata.write_h5ad(output)
