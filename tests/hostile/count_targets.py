"""Targets for `hostile_cases`: every reader of counts, of tables about cells, and of what `ingest` and `tokenize` make.

Truth is 12 cells x 15 genes, small enough that half of a file's bytes are structure.
"""

import gzip
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
import zarr
from hostile_cases import Target, register
from structures import build_h5ad, build_loom, build_tenx

from cellformers.counts import Sample, ingest, shard_digest
from cellformers.io import ReadOptions, open_counts
from cellformers.io.labels import LabelTable, join_labels, read_labels
from cellformers.io.samples import read_sample_table
from cellformers.tokens import count_cells, read_tokens, token_lengths, vocabulary_digest

N_CELLS, N_GENES = 12, 15
CELLS = [f"{'ACGT'[i % 4]}{'CGTA'[i // 4]}ACGTACGTAC-{i}" for i in range(N_CELLS)]
GENES = [f"ENSG{i:011d}" for i in range(1, N_GENES + 1)]
SYMBOLS = [f"GENE{i}" for i in range(1, N_GENES + 1)]
Counts = tuple[list[str], list[str], list[tuple[int, int, int]]]


def counts() -> sp.csr_matrix:
    """Counts with an empty cell, a gene of no cell and a count above 65,535."""
    dense = np.random.default_rng(0).poisson(1.5, (N_CELLS, N_GENES))
    dense[3], dense[:, 5], dense[7, 2] = 0, 0, 70_000
    return sp.csr_matrix(dense.astype(np.float32))


def adata() -> anndata.AnnData:
    """The counts as AnnData with columns of several kinds."""
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(["a", "b", None, "a"] * 3),
            "age": np.arange(12.0),
            "passed": [True, False] * 6,
            "n": pd.array([1, None, 3] * 4, dtype="Int64"),
            "text": [f"t{i}" for i in range(12)],
        },
        index=CELLS,
    )
    return anndata.AnnData(counts(), obs=obs, var=pd.DataFrame({"symbol": SYMBOLS}, index=GENES))


# --- reading ----------------------------------------------------------------------------------------------


def entries(matrix: Any) -> list[tuple[int, int, int]]:
    """Non-zeros of a matrix, cells in rows, in order."""
    coo = sp.coo_matrix(matrix)
    total = sp.csr_matrix((coo.data.astype(np.int64), (coo.row, coo.col)), shape=coo.shape)
    total.sum_duplicates()
    total.eliminate_zeros()
    coo = total.tocoo()
    return list(zip(coo.row.tolist(), coo.col.tolist(), coo.data.tolist(), strict=True))


def read_counts(path: Path, **options: Any) -> Counts:
    """Names of cells and genes, and the counts; what every block must be is asserted."""
    found: list[tuple[int, int, int]] = []
    with open_counts(path, options=ReadOptions(**options)) as source:
        assert len(source.obs()) == len(source.names) == source.n_cells
        assert len(source.feature_ids) == source.n_features
        assert source.feature_symbols is None or len(source.feature_symbols) == source.n_features
        assert source.filter_pass is None or len(source.filter_pass) == source.n_cells
        at = 0
        for block in source.blocks(max_bytes=1 << 10):
            assert block.start == at
            assert block.indptr[0] == 0
            assert (np.diff(block.indptr) >= 0).all()
            assert len(block.indices) == len(block.data) == block.indptr[-1]
            assert (block.data >= 0).all()
            assert ((block.indices >= 0) & (block.indices < source.n_features)).all()
            rows = np.repeat(np.arange(block.n_cells), np.diff(block.indptr))
            shape = (block.n_cells, source.n_features)
            part = entries(sp.coo_matrix((block.data.astype(np.int64), (rows, block.indices)), shape))
            found += [(at + i, j, n) for i, j, n in part]
            at += block.n_cells
        assert at == source.n_cells
        return list(source.cell_ids), list(source.feature_ids), found


def valid_counts(value: Counts) -> str | None:
    """What must hold for counts whatever was damaged."""
    cells, genes, found = value
    if not cells or not genes:
        return "no cells or genes"
    if len(set(cells)) < len(cells):
        return "cell names repeat"
    if not all(type(name) is str for name in (*cells, *genes)):
        return "names are no strings"
    if any(not (0 <= i < len(cells) and 0 <= j < len(genes) and n > 0) for i, j, n in found):
        return "entries outside"
    return None


def _file(name: str) -> Callable[[Path], Path]:
    return lambda folder: folder / name


def read_h5ad(folder: Path) -> Counts:
    return read_counts(folder / "a.h5ad")


def read_h5ad_layer(folder: Path) -> Counts:
    return read_counts(folder / "a.h5ad", layer="counts")


def read_h5ad_raw(folder: Path) -> Counts:
    return read_counts(folder / "a.h5ad", raw=True)


def read_loom(folder: Path) -> Counts:
    return read_counts(folder / "a.loom")


def read_tenx_h5(folder: Path) -> Counts:
    return read_counts(folder / "a.h5")


def read_folder(folder: Path) -> Counts:
    return read_counts(folder)


def read_zarr(folder: Path) -> Counts:
    return read_counts(folder / "a.zarr")


def read_zarr_zip(folder: Path) -> Counts:
    return read_counts(folder / "a.zarr.zip")


def read_text(folder: Path) -> Counts:
    return read_counts(next(folder.glob("a.*")))


# --- the same with other readers --------------------------------------------------------------------------


def agrees_anndata(folder: Path, value: Counts) -> bool:
    """Whether anndata finds the same counts in one of the places there may be."""
    with h5py.File(folder / "a.h5ad") as file:
        places = [name for name in ("X", "layers/counts", "raw/X") if name in file]
        return any(entries(anndata.io.read_elem(file[name])) == value[2] for name in places)


def agrees_zarr(folder: Path, value: Counts) -> bool:
    root = zarr.open_group(str(folder / "a.zarr"), mode="r")
    return entries(anndata.io.read_elem(root["X"])) == value[2]


def agrees_loom(folder: Path, value: Counts) -> bool:
    with h5py.File(folder / "a.loom") as file:
        return entries(file["matrix"][:].T) == value[2]


def agrees_tenx_h5(folder: Path, value: Counts) -> bool:
    with h5py.File(folder / "a.h5") as file:
        group = file["matrix"]
        parts = tuple(group[name][:] for name in ("data", "indices", "indptr"))
        kinds = group["features/feature_type"][:] == b"Gene Expression"
        matrix = sp.csc_matrix(parts, shape=tuple(group["shape"][:]))
        return entries(matrix.toarray()[kinds].T) == value[2]


def agrees_mtx(folder: Path, value: Counts) -> bool:
    if len(value[1]) != N_GENES:
        raise ValueError("a feature type was damaged, and these features are left out")
    return entries(scipy.io.mmread(str(folder / "matrix.mtx")).T) == value[2]


def agrees_csv(folder: Path, value: Counts) -> bool:
    table = pd.read_csv(folder / "a.csv", index_col=0)
    return entries(table.to_numpy(dtype=np.float64)) == value[2]


# --- writing ----------------------------------------------------------------------------------------------


def make_h5ad(folder: Path) -> None:
    adata().write_h5ad(folder / "a.h5ad")


def make_h5ad_csc(folder: Path) -> None:
    data = adata()
    data.X = data.X.tocsc()
    data.write_h5ad(folder / "a.h5ad", compression="gzip")


def make_h5ad_dense(folder: Path) -> None:
    data = adata()
    data.X = data.X.toarray()
    data.write_h5ad(folder / "a.h5ad", compression="gzip")


def make_h5ad_layers(folder: Path) -> None:
    data = adata()
    data.layers["counts"] = data.X.astype(np.int32)
    data.X = np.log1p(data.X)
    data.raw = adata()
    data.write_h5ad(folder / "a.h5ad")


def make_loom(folder: Path, **chunked: Any) -> None:
    with h5py.File(folder / "a.loom", "w") as file:
        file.attrs["LOOM_SPEC_VERSION"] = "3.0.0"
        options = chunked or {"chunks": (4, 4), "compression": "gzip", "shuffle": True}
        file.create_dataset("matrix", data=counts().toarray().T.astype(np.int32), **options)
        file["row_attrs/Accession"] = np.array(GENES, dtype="S")
        file["row_attrs/Gene"] = np.array(SYMBOLS, dtype="S")
        file["col_attrs/CellID"] = np.array(CELLS, dtype="S")
        file["col_attrs/age"] = np.arange(12.0)
        file.create_group("layers")


def make_loom_plain(folder: Path) -> None:
    make_loom(folder, chunks=None)


def make_tenx_h5(folder: Path) -> None:
    matrix = counts().T.tocsc()
    with h5py.File(folder / "a.h5", "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(CELLS, dtype="S")
        group.create_dataset("data", data=matrix.data.astype(np.int32), chunks=(20,), compression="gzip")
        group["indices"], group["indptr"] = matrix.indices.astype(np.int64), matrix.indptr.astype(np.int64)
        group["shape"] = np.array(matrix.shape, np.int32)
        group["features/id"] = np.array(GENES, dtype="S")
        group["features/name"] = np.array(SYMBOLS, dtype="S")
        kinds = ["Gene Expression"] * 13 + ["Antibody Capture"] * 2
        group["features/feature_type"] = np.array(kinds, dtype="S")


def make_mtx(folder: Path, end: str = "") -> None:
    kinds = "\tGene Expression\n"
    texts = {
        "features.tsv": "".join(f"{g}\t{s}{kinds}" for g, s in zip(GENES, SYMBOLS, strict=True)),
        "barcodes.tsv": "".join(f"{name}\n" for name in CELLS),
    }
    lines = [f"{j + 1} {i + 1} {n}\n" for i, j, n in entries(counts())]
    head = "%%MatrixMarket matrix coordinate integer general\n%\n"
    texts["matrix.mtx"] = f"{head}{N_GENES} {N_CELLS} {len(lines)}\n" + "".join(lines)
    for name, text in texts.items():
        data = text.encode()
        (folder / f"{name}{end}").write_bytes(gzip.compress(data, mtime=0) if end else data)


def make_mtx_gz(folder: Path) -> None:
    make_mtx(folder, ".gz")


def make_zarr(folder: Path) -> None:
    adata().write_zarr(folder / "a.zarr")


def make_zarr_zip(folder: Path) -> None:
    make_zarr(folder)
    shutil.make_archive(str(folder / "a.zarr"), "zip", folder / "a.zarr")
    shutil.rmtree(folder / "a.zarr")


def _frame() -> pd.DataFrame:
    return pd.DataFrame(counts().toarray().astype(int), index=CELLS, columns=GENES)


def make_csv(folder: Path) -> None:
    _frame().to_csv(folder / "a.csv")


def make_tsv(folder: Path) -> None:
    _frame().T.to_csv(folder / "a.tsv", sep="\t", quoting=2)


def make_tsv_gz(folder: Path) -> None:
    text = _frame().T.to_csv(sep="\t").encode()
    (folder / "a.tsv.gz").write_bytes(gzip.compress(text, mtime=0))


def _count_target(name: str, make: Any, read: Any, oracle: Any = None, build: Any = None) -> None:
    register(lambda: Target(name, make, read, valid_counts, oracle, build))


_count_target("h5ad-csr", make_h5ad, read_h5ad, agrees_anndata, build_h5ad)
_count_target("h5ad-csc", make_h5ad_csc, read_h5ad, agrees_anndata)
_count_target("h5ad-dense", make_h5ad_dense, read_h5ad, agrees_anndata)
_count_target("h5ad-found", make_h5ad_layers, read_h5ad, agrees_anndata)
_count_target("h5ad-layer", make_h5ad_layers, read_h5ad_layer)
_count_target("h5ad-raw", make_h5ad_layers, read_h5ad_raw)
_count_target("loom", make_loom, read_loom, agrees_loom, build_loom)
_count_target("loom-plain", make_loom_plain, read_loom, agrees_loom)
_count_target("10x-h5", make_tenx_h5, read_tenx_h5, agrees_tenx_h5, build_tenx)
_count_target("10x-mtx", make_mtx, read_folder, agrees_mtx)
_count_target("10x-mtx-gz", make_mtx_gz, read_folder)
_count_target("zarr", make_zarr, read_zarr, agrees_zarr)
_count_target("zarr-zip", make_zarr_zip, read_zarr_zip)
_count_target("csv", make_csv, read_text, agrees_csv)
_count_target("tsv", make_tsv, read_text)
_count_target("tsv-gz", make_tsv_gz, read_text)


# --- ingest and what it makes -----------------------------------------------------------------------------


def _ingest(folder: Path, source: Path, labels: LabelTable | None = None) -> None:
    shards = [folder / "0.h5ad", folder / "1.h5ad"]
    ingest(
        [Sample(source)], shards, metadata=folder / "metadata.parquet", features=folder / "features.parquet",
        labels=labels,
    )  # fmt: skip


def read_ingested(folder: Path) -> Any:
    """The digest, the shards and the metadata of what `ingest` makes of a file."""
    import pyarrow.parquet as pq

    out = folder / "out"
    out.mkdir()
    _ingest(out, folder / "a.h5ad")
    shards = [out / "0.h5ad", out / "1.h5ad"]
    metadata = pq.read_table(out / "metadata.parquet").column("cell_id").to_pylist()
    return shard_digest(shards[0]), metadata, [read_counts(shard) for shard in shards]


def valid_ingested(value: Any) -> str | None:
    digest, metadata, shards = value
    if not digest.startswith("sha256:"):
        return "no digest"
    if metadata != [name for shard in shards for name in shard[0]]:
        return "metadata and shards have other cells"
    return next((fault for shard in shards if (fault := valid_counts(shard))), None)


def make_shard(folder: Path) -> None:
    made = folder / "made"
    made.mkdir()
    make_h5ad(made)
    _ingest(made, made / "a.h5ad")
    (made / "0.h5ad").rename(folder / "a.h5ad")
    shutil.rmtree(made)


def read_shard(folder: Path) -> Any:
    return shard_digest(folder / "a.h5ad"), *read_counts(folder / "a.h5ad")


def valid_shard(value: Any) -> str | None:
    return valid_counts(value[1:])


register(lambda: Target("ingest", make_h5ad, read_ingested, valid_ingested))
register(lambda: Target("shard", make_shard, read_shard, valid_shard))


# --- tables -----------------------------------------------------------------------------------------------

LABELS = "barcode,kind,age\n" + "".join(f'{name},"type {i % 3}",{i}.5\n' for i, name in enumerate(CELLS))


def make_labels(folder: Path) -> None:
    (folder / "labels.csv").write_text(LABELS, encoding="utf-8")


def make_labels_gz(folder: Path) -> None:
    (folder / "labels.csv.gz").write_bytes(gzip.compress(LABELS.encode(), mtime=0))


def make_labels_parquet(folder: Path) -> None:
    table = pd.DataFrame({"barcode": CELLS, "kind": pd.Categorical(["a", "b", "c"] * 4), "age": range(12)})
    table.to_parquet(folder / "labels.parquet")


def read_label_table(folder: Path) -> Any:
    """The whole table, and joined to the cells."""
    import pyarrow as pa

    path = next(folder.glob("labels.*"))
    table = read_labels(path, text_columns=["barcode"])
    joined, note = join_labels(LabelTable(path, "barcode"), pa.array(CELLS))
    streamed = read_labels(path, text_columns=["barcode"], categories=["kind"], columns=["barcode", "kind"])
    columns = {name: column.to_pylist() for name, column in joined.items()}
    return table.num_rows, table.column_names, repr(columns), note, streamed.num_rows


def valid_label_table(value: Any) -> str | None:
    rows, names, _, _, streamed = value
    if rows != streamed:
        return f"{rows} rows, {streamed} rows streamed"
    return None if len(set(names)) == len(names) else "columns repeat"


def make_samples(folder: Path) -> None:
    (folder / "samples.tsv").write_text(
        "sample\tpath\tdonor\ns1\ta.h5ad\td1\ns2\tb.h5ad\td2\n", encoding="utf-8"
    )


def read_samples(folder: Path) -> Any:
    return [{**row, "path": Path(row["path"]).name} for row in read_sample_table(folder / "samples.tsv")]


def valid_samples(rows: Any) -> str | None:
    names = [row["sample"] for row in rows]
    return None if names and all(names) and len(set(names)) == len(names) else "sample names repeat"


register(lambda: Target("labels-csv", make_labels, read_label_table, valid_label_table))
register(lambda: Target("labels-csv-gz", make_labels_gz, read_label_table, valid_label_table))
register(lambda: Target("labels-parquet", make_labels_parquet, read_label_table, valid_label_table))
register(lambda: Target("samples", make_samples, read_samples, valid_samples))


# --- tokens -----------------------------------------------------------------------------------------------


def make_tokens(folder: Path) -> None:
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    lists = [[rng.randrange(4, 20) for _ in range(i)] for i in range(1, 13)]
    element = pa.field("element", pa.int32())
    table = pa.table(
        {
            "cell_id": pa.array(CELLS),
            "input_ids": pa.array(lists, pa.list_(element)),
            "length": pa.array([len(x) for x in lists], pa.int32()),
        }
    )
    made = {b"cellformers": json.dumps({"inputs": {"vocabulary": "sha256:0"}}).encode()}
    pq.write_table(table.replace_schema_metadata(made), folder / "tokens.parquet", row_group_size=5)


def read_token_file(folder: Path) -> Any:
    path = folder / "tokens.parquet"
    found = []
    for batch in read_tokens(path, cells=4):
        assert batch.offsets[0] == 0
        assert (np.diff(batch.offsets) >= 0).all()
        assert len(batch.tokens) == batch.offsets[-1]
        assert len(batch.cell_ids) == len(batch.offsets) - 1
        found.append((batch.cell_ids.tolist(), batch.tokens.tolist(), batch.offsets.tolist()))
    return count_cells(path), token_lengths(path).tolist(), vocabulary_digest(path), found


def valid_token_file(value: Any) -> str | None:
    n, lengths, _, found = value
    names = [name for part in found for name in part[0]]
    return (
        None
        if len(names) == len(lengths) == n
        else f"{len(names)} names, {len(lengths)} lengths of {n} cells"
    )


register(lambda: Target("tokens", make_tokens, read_token_file, valid_token_file))
