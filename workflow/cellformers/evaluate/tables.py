"""Reading what evaluation compares: labelled cells, embeddings of cells and genes, tables of gene labels.

Used by `cellformers split` and `cellformers evaluate`. Rows always come in one order, datasets by name and
cells as in `cells.parquet`, so that nothing depends on the order or the number of the files of an embedding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import check_plain, open_parquet, read_json, read_metadata, read_table, whole
from cellformers.io.frames import Frame
from cellformers.io.hdf5 import child, open_hdf5
from cellformers.io.inflate import check_packed
from cellformers.io.names import strip_version
from cellformers.selection import MISSING, as_text

STRETCH = 16_384  # rows of an embedding read at a time


@dataclass(frozen=True)
class Cells:
    """The labelled cells of a benchmark: object arrays of str, all of one length."""

    dataset: np.ndarray
    cell_id: np.ndarray
    label: np.ndarray
    unit: np.ndarray | None

    def __len__(self) -> int:
        return len(self.cell_id)

    def keys(self) -> np.ndarray:
        """Names that are unique over all datasets: the cell_id, behind `dataset:` where there are several."""
        if len(set(self.dataset)) < 2:
            return self.cell_id
        return np.array([f"{d}:{c}" for d, c in zip(self.dataset, self.cell_id, strict=True)], dtype=object)


def require_column(names: Sequence[str], column: str, *, path: str | Path) -> None:
    """UserError, with the nearest name, unless `column` is one of `names`."""
    if column not in names:
        raise UserError(f"has no column {column!r}", path=path, fix=did_you_mean(column, names))


def read_cells(
    cells: Mapping[str, Path], *, label: str, unit: str | None = None
) -> tuple[Cells, dict[str, int]]:
    """Read the labels of all cells that passed QC and have a label (and a unit, where one is asked for).

    Parameters
    ----------
    cells
        `cells.parquet` by dataset name.
    label, unit
        Columns of the label to predict and of the donor or batch.

    Returns
    -------
    The cells, and how many were left out for which reason.

    Raises
    ------
    UserError
        If a file or column is missing (the nearest name is given) or no labelled cell is left.
    """
    if not cells:
        raise UserError("no dataset to evaluate", fix="name at least one cells.parquet")
    excluded = {"failed QC": 0, "no label": 0} | ({"no unit": 0} if unit else {})
    parts: list[tuple[np.ndarray, ...]] = []
    for dataset, path in sorted(cells.items()):
        with open_parquet(path) as file:
            names = file.schema_arrow.names
        for column in filter(None, ("cell_id", label, unit)):
            require_column(names, column, path=path)
        wanted = [c for c in ("cell_id", label, unit, "qc_pass") if c is not None and c in names]
        table = read_table(path, columns=list(dict.fromkeys(wanted)))
        ids = as_text(table["cell_id"])
        labels = as_text(table[label])
        units = as_text(table[unit]) if unit else np.full(len(ids), "", dtype=object)
        passed = np.ones(len(ids), dtype=bool)
        if "qc_pass" in table.column_names:
            if not pa.types.is_boolean(table["qc_pass"].type):
                raise UserError("column 'qc_pass' is not true or false in every row", path=path)
            passed = table["qc_pass"].combine_chunks().fill_null(False).to_numpy(zero_copy_only=False)
        labelled = np.array([v is not None for v in labels], dtype=bool)
        placed = np.array([v is not None for v in units], dtype=bool)
        excluded["failed QC"] += int((~passed).sum())
        excluded["no label"] += int((passed & ~labelled).sum())
        if unit:
            excluded["no unit"] += int((passed & labelled & ~placed).sum())
        keep = passed & labelled & placed
        if not keep.any():
            raise UserError(f"no cell that passed QC has a {label!r}", path=path, fix="check the label table")
        parts.append((np.full(int(keep.sum()), dataset, dtype=object), ids[keep], labels[keep], units[keep]))
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Cells(joined[0], joined[1], joined[2], joined[3] if unit else None), excluded


def take_cells(cells: Cells, rows: np.ndarray) -> Cells:
    """Some of the cells, by row number or mask."""
    unit = None if cells.unit is None else cells.unit[rows]
    return Cells(cells.dataset[rows], cells.cell_id[rows], cells.label[rows], unit)


def tokenised(cells: Cells, tokens: Mapping[str, Sequence[Path]]) -> np.ndarray:
    """Which cells have tokens in every vocabulary, bool[n]: the others have too few genes of one for any model.

    Parameters
    ----------
    tokens
        Token shards by dataset, of one vocabulary or of several; datasets without any are passed over.
    """
    result = np.ones(len(cells), dtype=bool)
    for dataset, paths in tokens.items():
        found: dict[str, list[np.ndarray]] = {}
        for path in paths:
            vocabulary = str(read_metadata(path).get("inputs", {}).get("vocabulary"))
            found.setdefault(vocabulary, []).append(as_text(read_table(path, ["cell_id"])["cell_id"]))
        own = np.flatnonzero(cells.dataset == dataset)
        for parts in found.values():
            result[own] &= pd.Index(np.concatenate(parts)).get_indexer(pd.Index(cells.cell_id[own])) >= 0
    return result


def column_of(cells: Cells, files: Mapping[str, Path], column: str) -> np.ndarray:
    """Another column of the tables that `cells` were read from, object[n] of str.

    Raises
    ------
    UserError
        If a table lacks the column, or a cell a value.
    """
    parts = []
    for dataset in dict.fromkeys(cells.dataset):
        with open_parquet(files[dataset]) as file:
            require_column(file.schema_arrow.names, column, path=files[dataset])
        table = read_table(files[dataset], columns=list(dict.fromkeys(["cell_id", column])))
        rows = locate(
            cells.cell_id[cells.dataset == dataset],
            as_text(table["cell_id"]),
            what="cells",
            path=files[dataset],
        )
        values = as_text(table[column])[rows]
        missing = sum(value is None for value in values)
        if missing:
            raise UserError(
                f"{missing} cells have no {column!r}", path=files[dataset], fix="name another column"
            )
        parts.append(values)
    return np.concatenate(parts)


def _parquet_blocks(path: Path, key: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    with open_parquet(path) as file, whole(path):
        for name in (key, "embedding"):
            require_column(file.schema_arrow.names, name, path=path)
        kind = file.schema_arrow.field("embedding").type
        if not pa.types.is_fixed_size_list(kind) or kind.value_type != pa.float32() or not kind.list_size:
            raise UserError("column 'embedding' is not a list of one fixed length in every row", path=path)
        if not file.num_row_groups:
            yield np.empty(0, dtype=object), np.empty((0, kind.list_size), np.float32)
        for group in range(file.num_row_groups):  # read as a whole, a file would be in memory as a whole
            for batch in file.iter_batches(STRETCH, row_groups=[group], columns=[key, "embedding"]):
                column = batch.column("embedding")
                if column.null_count:
                    raise UserError(
                        "column 'embedding' is not a list of one fixed length in every row", path=path
                    )
                batch.validate(full=True)
                if batch.column(key).null_count:
                    raise ValueError(f"a row without a {key}")
                flat = column.flatten().to_numpy(zero_copy_only=False)
                yield (
                    as_text(pa.chunked_array([batch.column(key)])),
                    flat.reshape(len(column), kind.list_size),
                )


def _h5ad_blocks(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    check_plain(path)
    with closing(open_hdf5(path)) as file, whole(path):
        names = np.asarray(Frame(file, "obs", path).index(), dtype=object)
        keys = list(child(file, "obsm") or ())
        named = f"X_{path.stem}"
        own = [k for k in keys if k not in ("X_umap", "X_pca")]
        if named not in keys and len(own) != 1:
            raise UserError(
                f"which of {', '.join(keys) or 'no obsm entries'} is the embedding is not clear",
                path=path,
                fix=f"name the entry {named}",
            )
        table = child(file, f"obsm/{named if named in keys else own[0]}")
        if len(table.shape) != 2 or len(table) != len(names) or table.dtype.kind != "f":
            raise ValueError("no row of numbers for every cell")
        check_packed(table)
        for start in range(0, max(len(names), 1), STRETCH):
            yield names[start : start + STRETCH], table[start : start + STRETCH]


def vector_blocks(
    paths: Sequence[Path], *, key: str = "cell_id", wanted: pd.Index | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Names, object[n] of str, and vectors, float[n, dim], some rows at a time; errors as of `read_vectors`."""
    for path in map(Path, paths):
        for names, values in _h5ad_blocks(path) if path.suffix == ".h5ad" else _parquet_blocks(path, key):
            if wanted is not None:
                keep = np.asarray(pd.Index(names).isin(wanted))
                names, values = names[keep], values[keep]
            if not np.isfinite(values).all():
                bad = names[int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])]
                raise UserError(f"the embedding of {bad} is not finite", path=path, fix="embed again")
            yield names, values


def read_vectors(
    paths: Sequence[Path], *, key: str = "cell_id", wanted: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read the rows of embedding shards (Parquet), of gene embeddings (`key="gene_id"`) or of an embeddings .h5ad.

    With `wanted` only rows of these names are kept, and no more than they are in memory.

    Returns
    -------
    ids, object[n] of str; vectors, float32[n, dim], in the order of the files.

    Raises
    ------
    UserError
        If a file is missing or broken, files differ in dimension, a name repeats or a value isn't finite.
    """
    if not paths:
        raise UserError("no embedding files given")
    ids: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    only = None if wanted is None else pd.Index(wanted)
    for path in map(Path, paths):
        for names, values in vector_blocks([path], key=key, wanted=only):
            if vectors and values.shape[1] != vectors[0].shape[1]:
                raise UserError(
                    f"has {values.shape[1]} dimensions, the files before have {vectors[0].shape[1]}",
                    path=path,
                )
            ids.append(names)
            vectors.append(values)
    if not ids:
        raise UserError("holds no embeddings", path=paths[0], fix="embed some cells")
    joined = np.concatenate(ids)
    repeated = pd.Index(joined).duplicated()
    if repeated.any():
        raise UserError(f"{key} {joined[repeated][0]!r} is there twice", path=paths[0])
    return joined, np.concatenate(vectors).astype(np.float32, copy=False)


def locate(wanted: np.ndarray, present: np.ndarray, *, what: str, path: str | Path) -> np.ndarray:
    """Positions int64[n] of `wanted` names among `present` ones; UserError counts and names those missing."""
    found = pd.Index(present).get_indexer(pd.Index(wanted))
    if (found < 0).any():
        raise lacking(np.asarray(wanted)[found < 0], len(wanted), what=what, path=path)
    return np.asarray(found, dtype=np.int64)


def lacking(missing: np.ndarray, n: int, *, what: str, path: str | Path | None) -> UserError:
    """The error of a file that lacks some of `n` cells or genes."""
    return UserError(
        f"lacks {len(missing)} of the {n} {what} of the split, e.g. {missing[0]}",
        path=path,
        fix="make embeddings, counts and split from the same dataset",
    )


def aligned_vectors(cells: Cells, files: Mapping[str, Sequence[Path]]) -> np.ndarray:
    """The embeddings of `cells`, float32[n, dim], in their order, from the files of each dataset.

    Raises
    ------
    UserError
        If a dataset has no files, or its files lack cells of the benchmark.
    """
    parts: list[np.ndarray] = []
    for dataset in dict.fromkeys(cells.dataset):
        if dataset not in files:
            raise UserError(f"no embedding files given for dataset {dataset!r}")
        wanted = cells.cell_id[cells.dataset == dataset]
        ids, vectors = read_vectors(files[dataset], wanted=wanted)
        rows = locate(wanted, ids, what="cells", path=files[dataset][0])
        if parts and vectors.shape[1] != parts[0].shape[1]:
            raise UserError(
                f"has {vectors.shape[1]} dimensions, the other dataset {parts[0].shape[1]}",
                path=files[dataset][0],
                fix="embed all datasets with one model",
            )
        parts.append(vectors[rows])
    return np.concatenate(parts)


def _read_records(path: Path, gene: str) -> pd.DataFrame:
    """The first list of objects with the key `gene` in a JSON file, as text."""
    content = read_json(path)
    lists = content.values() if isinstance(content, dict) else [content]
    for records in lists:
        if isinstance(records, list) and records and isinstance(records[0], dict) and gene in records[0]:
            with whole(path):
                rows = [{k: "" if v is None else str(v) for k, v in row.items()} for row in records]
                return pd.DataFrame(rows).fillna("")
    raise UserError(f"holds no list of objects with the key {gene!r}", path=path)


def read_gene_table(path: str | Path, *, gene: str, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Gene ids (Ensembl versions stripped) and one column of a table, as text, None where missing.

    The table is csv or tsv, gzipped or not, or JSON that holds a list of objects.

    Raises
    ------
    UserError
        If the file or a column is missing, or a gene appears twice with different values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", path=path)
    suffixes = [s for s in path.suffixes if s != ".gz"]
    try:
        if suffixes and suffixes[-1] == ".json":
            table = _read_records(path, gene)
        else:
            separator = "\t" if suffixes and suffixes[-1] in (".tsv", ".txt") else ","
            table = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"not readable as a table ({error})", path=path) from error
    for name in (gene, column):
        require_column([str(c) for c in table.columns], name, path=path)
    known: dict[str, str | None] = {}
    for raw, text in zip(table[gene].tolist(), table[column].tolist(), strict=True):
        name, value = strip_version(str(raw).strip()), None if text.strip() in MISSING else text.strip()
        if name not in MISSING and known.setdefault(name, value) != value:
            raise UserError(f"gene {name} has two values in column {column!r}", path=path, fix="keep one row")
    return np.array(list(known), dtype=object), np.array([*known.values(), None], dtype=object)[:-1]
