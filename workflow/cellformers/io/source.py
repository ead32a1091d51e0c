"""Count files of any format as a stream of cells: `open_counts(path)` gives a `CountSource`.

    with open_counts("my.h5ad") as source:
        for block in source.blocks():
            ...                                # block.indptr, block.indices, block.data: CSR of some cells

Which format a file has is told by what is in it, not by its name. Memory depends on the block, not on the file;
the file is opened read-only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from cellformers.errors import DiskFullError, UserError, full_disk
from cellformers.io.names import Strings, as_strings, check_texts

if TYPE_CHECKING:
    import pandas as pd

    from cellformers.io.validate import Checker

Array = np.ndarray[Any, Any]
DEFAULT_BLOCK = 16 << 20
MOST_COUNTS = 2**53  # above it floats skip integers
MOST_NAMES = 10_000_000
"""Genes, or categories of a column, that a file may have."""


class Block(NamedTuple):
    """Some consecutive cells as CSR; the arrays belong to the block and are never written again.

    Entries may be zero, repeated or unsorted within a cell: consumers sum them.
    """

    start: int
    """Number of the first cell."""
    indptr: Array
    """int64[cells + 1], from 0."""
    indices: Array
    """int32[entries]: features."""
    data: Array
    """uint16, int32 or int64 [entries]: counts; the dtype may differ between blocks."""

    @property
    def n_cells(self) -> int:
        """Cells in the block."""
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return int(self.indptr.nbytes + self.indices.nbytes + self.data.nbytes)


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What the user may say about a file.

    Parameters
    ----------
    layer
        Read this layer (h5ad, zarr, loom) instead of X.
    raw
        Read `raw/X` with its own genes (h5ad, zarr).
    round
        Round fractions, halves up: for estimated counts (alevin, SoupX).
    make_unique
        Number duplicate cell names instead of refusing them.
    genes_in_rows
        Orientation of dense text; None: find out.
    gene_column, cell_column
        Column of var / row attribute (obs / column attribute) that holds gene ids (cell names); of 10x: id or name.
    """

    layer: str | None = None
    raw: bool = False
    round: bool = False
    make_unique: bool = False
    genes_in_rows: bool | None = None
    gene_column: str | None = None
    cell_column: str | None = None


class Head(NamedTuple):
    """The first stored values of a matrix, for a first look."""

    values: Array
    locate: Callable[[int], tuple[int, int]]
    by_cell: bool


class Matrix(ABC):
    """Counts in some storage layout."""

    name: str
    n_cells: int
    n_features: int

    @abstractmethod
    def head(self) -> Head:
        """The first values, raw and unchecked."""

    @abstractmethod
    def blocks(self, max_bytes: int, check: "Checker") -> Iterator[Block]:
        """All cells in order, in blocks of at most `max_bytes` (but at least one cell)."""

    def close(self) -> None:  # noqa: B027  (most layouts hold nothing)
        """Free what the matrix holds."""


@dataclass(kw_only=True)
class CountSource:
    """A count file, opened: names, cell metadata, and counts as a stream of blocks."""

    path: Path
    matrix: Matrix
    names: pa.StringArray
    """Cell names as a compact Arrow array; `cell_ids` is the same as Python strings."""
    feature_ids: Strings
    """Ids as read, the version stripped from Ensembl ids only; duplicates stay apart."""
    feature_symbols: Strings | None = None
    filter_pass: Array | None = None
    """bool[n_cells]: the file's own `filter_pass` column == 1; None where it has none."""
    notes: list[str] = field(default_factory=list)
    """What was decided about the file and may surprise."""
    elsewhere: str = ""
    """Where raw counts may be, for error messages: which keys help, which layers there are."""
    options: ReadOptions = field(default_factory=ReadOptions)
    read_obs: Callable[[], "dict[str, Any]"] = dict
    """Columns of cell metadata: name to numpy array, pandas array or list."""
    resources: ExitStack = field(default_factory=ExitStack)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.matrix.n_cells

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.matrix.n_features

    @cached_property
    def cell_ids(self) -> Strings:
        """Unique cell names, object[n_cells] of str: some 60 bytes a cell; `names` is the same in a quarter."""
        return as_strings(self.names.to_pylist())

    def obs(self) -> "pd.DataFrame":
        """Cell metadata of the file, index = cell_ids."""
        import pandas as pd

        with reading(self.path):
            columns = self.read_obs()
            "".join(map(str, columns)).encode()  # names of columns are written as UTF-8
        index = as_strings(self.names.to_pylist())  # cell_ids would stay in memory
        return pd.DataFrame(columns, index=pd.Index(index, name="cell_id", dtype=object), copy=False)

    def checker(self) -> "Checker":
        """What turns raw values of this file into counts or refuses them."""
        from cellformers.io.validate import Checker

        return Checker(
            self.path,
            name=self.matrix.name,
            cell_id=lambda i: str(self.names[i].as_py()),
            feature_id=lambda j: str(self.feature_ids[j]),
            round_values=self.options.round,
            elsewhere=self.elsewhere,
        )

    def blocks(self, *, max_bytes: int = DEFAULT_BLOCK) -> Iterator[Block]:
        """All cells in order as blocks of at most `max_bytes` bytes, but at least one cell.

        While a block is made, about twice as much is held. Storage by gene is read once from end to end and spilled
        to a temporary file (in TMPDIR), from which this and later calls read.

        Raises
        ------
        UserError
            At the first value that isn't a count, where large counts add up to more than 2^53, or where the file is
            damaged.
        """
        total = 0.0
        with reading(self.path):
            for block in self.matrix.blocks(max_bytes, self.checker()):
                if block.data.dtype == np.int64:  # only where a count is above 2^31: sums could overflow
                    total += float(block.data.sum(dtype=np.float64))
                    if total > MOST_COUNTS:
                        raise UserError(
                            f"{self.matrix.name} holds {total:.3g} counts in all: too many to be added up exactly",
                            path=self.path,
                            fix="give a file of raw counts",
                        )
                yield block

    def close(self) -> None:
        """Close the file and remove temporary ones."""
        self.matrix.close()
        self.resources.close()

    def __enter__(self) -> "CountSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_size(matrix: Matrix, n_names: int, n_features: int, path: Path) -> None:
    """Refuse a matrix without cells or genes, or one whose names are not as many.

    Raises
    ------
    UserError
        In those cases.
    """
    if matrix.n_cells == 0 or matrix.n_features == 0:
        raise UserError(
            f"is empty ({matrix.n_cells} cells, {matrix.n_features} genes)",
            path=path,
            fix="give a file with counts",
        )
    check_cells(matrix.name, (matrix.n_cells, matrix.n_features), n_names, path)
    if n_features != matrix.n_features:
        raise UserError(
            f"{matrix.name} is {matrix.n_cells} cells x {matrix.n_features} genes, but there are names of "
            f"{n_features} genes",
            path=path,
            fix="the file is damaged or belongs to other name files",
        )


def check_cells(name: str, shape: tuple[int, int], n_names: int, path: Path) -> None:
    """Refuse a matrix whose cells are not as many as their names, or that has more genes than there can be.

    Raises
    ------
    UserError
        In those cases.
    """
    if shape[1] > MOST_NAMES:
        raise UserError(
            f"{name} has {shape[1]:,} genes", path=path, fix="is it the right file? genes are columns"
        )
    if n_names != shape[0]:
        raise UserError(
            f"{name} is {shape[0]} cells x {shape[1]} genes, but there are names of {n_names} cells",
            path=path,
            fix="the file is damaged or belongs to other name files",
        )


def refuse_options(path: Path, options: ReadOptions, *keys: str, format_name: str) -> None:
    """Refuse options that mean nothing in a format, rather than ignore them.

    Raises
    ------
    UserError
        If one of the fields `keys` of `options` is set.
    """
    for key in keys:
        if getattr(options, key):
            raise UserError(f"{key}: has no meaning for {format_name}", path=path, fix=f"leave out {key}:")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the libraries raise about a damaged file into one line; errors of the system keep their text."""
    import zlib

    try:
        yield
    except MemoryError as error:
        raise UserError("does not fit into memory", path=path, fix="use smaller blocks") from error
    except PermissionError as error:
        raise UserError("may not be read (permission denied)", path=path) from error
    except (OSError, EOFError, KeyError, RuntimeError, zlib.error, UnicodeError) as error:
        text = " ".join(str(error).split())
        if full_disk(error):
            raise DiskFullError(
                "no space left for temporary files", path=path, fix="set TMPDIR to a folder with space"
            ) from error
        raise UserError(
            f"can't be read: damaged or truncated? ({text[:160]})", path=path, fix="copy or download it again"
        ) from error


def open_counts(path: str | Path, *, options: ReadOptions | None = None) -> CountSource:
    """Open a count file or folder of any supported format.

    AnnData h5ad and zarr, loom, 10x `.h5`, 10x folders of mtx, a bare `.mtx`, dense text. Dense text with genes in
    rows is parsed here already, as its genes are known only then.

    Raises
    ------
    UserError
        If it does not exist, has no known format, is damaged, is empty, has duplicate cell names, or holds no counts
        in what was asked for.
    """
    from cellformers.io.sniff import opener

    path = Path(path)
    options = options or ReadOptions()
    if options.layer is not None and options.raw:
        raise UserError("layer: and raw: true exclude each other", path=path, fix="give one of them")
    with reading(path):
        source = opener(path)(path, options)
    try:
        check_texts(source.feature_ids, "gene", path)
        check_texts(source.feature_symbols if source.feature_symbols is not None else (), "gene", path)
        with reading(path):
            head = source.matrix.head()
            source.checker()(head.values, head.locate, by_cell=head.by_cell)
            _refuse_logged(source, head)
    except BaseException:
        source.close()
        raise
    return source


def _refuse_logged(source: CountSource, head: Head) -> None:
    """Logs are no estimates of counts: `round` would turn them into nonsense silently."""
    from cellformers.io.validate import looks_logged

    if not (source.options.round and head.by_cell and head.values.size):
        return
    cell, feature = head.locate(0)
    stop = 1
    while stop < head.values.size and head.locate(stop)[0] == cell:
        stop += 1
    if looks_logged(head.values[:stop]):
        raise source.checker().refusal(head.values[0], cell, feature, head.values[:stop])
