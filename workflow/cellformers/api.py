"""The same steps in Python, for a notebook: `cellformers.tokenize` and `cellformers.embed`.

    import anndata, cellformers

    adata = anndata.read_h5ad("my.h5ad")
    tokens = cellformers.tokenize(adata, vocabulary="vocabularies/gc104M")
    cellformers.embed(adata, model="models/v2-104m")          # adata.obsm["X_v2-104m"]

An AnnData object goes through the very reader that files go through, so the result is the same.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from cellformers.errors import UserError

if TYPE_CHECKING:
    from anndata import AnnData

    from cellformers.io.source import CountSource


@contextmanager
def _opened(adata: "AnnData", folder: Path, *, layer: str | None, raw: bool) -> Iterator["CountSource"]:
    """The counts of an AnnData object as a count file, without what tokenization does not read."""
    import anndata

    from cellformers.io.source import ReadOptions, open_counts

    wanted = {layer} if layer is not None else {"counts"}
    columns = [name for name in ("filter_pass",) if name in adata.obs]
    slim = anndata.AnnData(
        X=adata.X,
        obs=adata.obs[columns],
        var=adata.var,
        layers={name: values for name, values in adata.layers.items() if name in wanted},
    )
    if adata.raw is not None:
        slim.raw = adata.raw.to_adata()
    path = folder / "adata.h5ad"
    slim.write_h5ad(path)
    try:
        with open_counts(path, options=ReadOptions(layer=layer, raw=raw)) as source:
            yield source
    except UserError as error:
        raise UserError(str(error).replace(str(path), "adata")) from error


def tokenize(
    adata: "AnnData",
    *,
    vocabulary: str | Path,
    layer: str | None = None,
    raw: bool = False,
    threads: int = 2,
) -> pa.Table:
    """Rank the genes of every cell.

    Parameters
    ----------
    adata
        Raw integer counts in X, or in `layers["counts"]` or `raw` where X holds none.
    vocabulary
        A vocabulary folder.
    layer, raw
        Read the counts from this layer, or from `raw`.
    threads
        Threads that rank.

    Returns
    -------
    pyarrow.Table
        cell_id (string), input_ids (list<int32>), length (int32), one row a cell in the order of `adata`; cells whose
        `filter_pass` is 0 are left out.

    Raises
    ------
    UserError
        If there are no counts, or they are not of known human genes.
    """
    from cellformers.tokens import tokenize as run
    from cellformers.vocabulary import Vocabulary

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        output = folder / "tokens.parquet"
        with _opened(adata, folder, layer=layer, raw=raw) as source:
            run(source, Vocabulary.load(vocabulary), output=output, threads=threads)
        return pq.read_table(output)


def embed(
    adata: "AnnData",
    *,
    model: str | Path,
    name: str | None = None,
    mode: str | None = None,
    layer: int = -1,
    dtype: str = "float32",
    backend: str = "auto",
    counts_layer: str | None = None,
    raw: bool = False,
    accelerator: str = "cpu",
    threads: int = 2,
) -> None:
    """Add the embedding of every cell to `adata.obsm["X_{name}"]`, float32[n_cells, dim].

    Parameters
    ----------
    adata
        As for `tokenize`; changed in place.
    model
        A model folder (config, weights, vocabulary/), or the name of a registered model, which is downloaded.
    name
        Default: the name of the model's folder.
    mode
        `cls` or `cell`; None: cls where the vocabulary has <cls>.
    layer
        0 = last, -1 = second to last, and so on.
    dtype, backend
        `float32`, or `bfloat16`, `float16`, `fp8` where the device has it; `auto`, `te`, `varlen` or `sdpa`.
    counts_layer, raw
        Read the counts from this layer, or from `raw`.

    Cells whose `filter_pass` is 0, and cells without a gene of the vocabulary, get NaN.

    Raises
    ------
    UserError
        If there are no counts, they are not of known human genes, or the model is damaged.
    """
    from cellformers.embedding import default_mode, embed_cells, load_model
    from cellformers.gather import in_order
    from cellformers.registry import find_model
    from cellformers.tokens import tokenize as run

    model = find_model(model, fetch=True)
    mode = mode or default_mode(model)
    opened = load_model(model, mode=mode, layer=layer, dtype=dtype, backend=backend, accelerator=accelerator)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokens, embedded = folder / "tokens.parquet", folder / "embedding.parquet"
        with _opened(adata, folder, layer=counts_layer, raw=raw) as source:
            cell_ids = source.cell_ids
            run(source, opened.vocabulary, output=tokens, min_genes=1, threads=threads)
        embed_cells(tokens, opened, embedded, mode=mode, layer=layer, dtype=dtype, threads=threads)
        adata.obsm[f"X_{name or model.resolve().name}"] = in_order(cell_ids, [embedded])
