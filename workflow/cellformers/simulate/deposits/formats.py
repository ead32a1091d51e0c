"""Bytes of text, gzip and tar that depend on nothing but their content: no times, names or owners."""

import gzip
import io
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import sparse

Writer = Callable[[Path], None]
"""Writes one file under a name it is given."""


@dataclass(frozen=True)
class Drawn:
    """A simulated deposit: what writes each of its files, by name, and the truth about them as JSON."""

    files: Mapping[str, Writer]
    truth: Mapping[str, Any]


def as_file(data: bytes) -> Writer:
    """Write bytes."""
    return lambda path: _write(path, data)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def gzipped(data: bytes) -> bytes:
    """A gzip file without time and name."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as file:
        file.write(data)
    return buffer.getvalue()


def tarred(members: Mapping[str, bytes]) -> bytes:
    """A tar file of members in this order, without times and owners."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def separated(rows: Iterable[Sequence[Any]], *, separator: str = ",", end: str = "\n") -> bytes:
    """Rows of text; fields hold no separators or quotes, and are written as they are."""
    return "".join(separator.join(map(str, row)) + end for row in rows).encode()


def dense_text(
    counts: sparse.csr_array, genes: Sequence[str], cells: Sequence[str], *, corner: str | None
) -> bytes:
    """Tab-separated text of genes x cells.

    Parameters
    ----------
    counts
        Integers, CSR [n_cells, n_genes].
    corner
        What stands above the names of the genes; None: nothing, not even a field, so that the header is one field
        shorter than the rows, as R writes it.
    """
    lines = ["\t".join([*([] if corner is None else [corner]), *cells])]
    for gene, row in zip(genes, counts.T.toarray().tolist(), strict=True):
        lines.append(gene + "\t" + "\t".join(map(str, row)))
    return ("\n".join(lines) + "\n").encode()
