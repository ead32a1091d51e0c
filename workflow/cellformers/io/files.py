"""Files that are whole or absent, and the metadata every artefact carries.

An artefact is written beside its final name and moved into place when it is complete; a failure leaves
nothing under the final name. Metadata names the package version, the step, its parameters and digests of its
inputs, and nothing that differs between machines or runs: no paths, times, hosts, threads or shard counts.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellformers import __version__
from cellformers.errors import DISK_FULL, UserError

METADATA_KEY = b"cellformers"
NAMES_AT_ONCE = 1 << 16


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _prepare(target: Path) -> str:
    """Make the folder of `target`, remove what killed writers of `target` left there; the prefix for a new part."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name = glob.escape(target.name)
    for stale in [p for end in ("", ".[0-9]*") for p in target.parent.glob(f".part-*-{name}{end}")]:
        pid = stale.name.split("-")[1]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    return f".part-{os.getpid()}-"


def _unwritable(target: Path, error: OSError) -> UserError:
    return UserError(
        f"can't write here ({error.strerror or error})",
        path=target,
        fix="choose an --output you may write to",
    )


@contextmanager
def _disk_may_be_full(target: Path) -> Iterator[None]:
    """Say so in one line, with the name of the file that was asked for; libraries name none or a temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"can't be written ({os.strerror(error.errno)})",
            path=target,
            fix="make room, or choose another --output",
        ) from error


def _refuse_folder(target: Path) -> None:
    if target.is_dir():
        raise UserError(
            "is a folder, a file is to be written here", path=target, fix="choose another --output"
        )


def _temporary(target: Path) -> Path:
    """A fresh name in the folder of `target`, with the same suffixes so that writers pick the same format."""
    try:
        prefix = _prepare(target)
        _refuse_folder(target)
        handle, name = tempfile.mkstemp(prefix=prefix, suffix="-" + target.name, dir=target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error
    os.close(handle)
    os.chmod(name, 0o666 & ~_umask())  # mkstemp makes private files; results are as readable as any other
    return Path(name)


def _umask() -> int:
    current = os.umask(0o022)
    os.umask(current)
    return current


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `target` when the block ends, and vanishes if it fails.

    Raises
    ------
    UserError
        If the folder of `target` can't be made or written to, or the disk is full.
    """
    target = Path(target)
    temporary = _temporary(target)
    mode = temporary.stat().st_mode
    try:
        with _disk_may_be_full(target):
            yield temporary
            os.chmod(temporary, mode)  # some writers put a private file of their own in its place
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces the folder `target` when the block ends, and vanishes if it fails."""
    target = Path(target)
    try:
        prefix = _prepare(target)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix="-" + target.name, dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        with _disk_may_be_full(target):
            yield temporary
        if target.is_dir():
            stale = Path(tempfile.mkdtemp(prefix=".old-", dir=target.parent))
            os.replace(target, stale / target.name)
            os.replace(temporary, target)
            shutil.rmtree(stale)
        elif target.exists():
            raise UserError(
                "is a file, a folder is to be written here", path=target, fix="choose another --output"
            )
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def temporary_folder(target: str | Path) -> Iterator[Path]:
    """Yield a folder beside the file `target` for intermediate files; it vanishes when the block ends."""
    target = Path(target)
    try:
        prefix = _prepare(target)
        _refuse_folder(target)
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix="-" + target.name, dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from error
    try:
        with _disk_may_be_full(target):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(text: str, path: str | Path) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(value: Any, path: str | Path) -> None:
    """Write `value` as indented JSON with a final newline, whole or not at all; NaN is refused."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


def read_json(path: str | Path) -> Any:
    """Read JSON; UserError where the file is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("no such file", path=path) from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"not readable as JSON ({error})", path=path) from error


def write_table(table: pa.Table, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a table as zstd Parquet, whole or not at all, with `metadata` as JSON in the schema."""
    if metadata is not None:
        kept = {k: v for k, v in (table.schema.metadata or {}).items() if k != METADATA_KEY}
        table = table.replace_schema_metadata({**kept, METADATA_KEY: json.dumps(metadata).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Open a Parquet file; UserError where it is missing or not Parquet."""
    path = Path(path)
    if not path.is_file():
        raise UserError("no such file", path=path)
    try:
        # pre-buffering would keep the whole compressed file in memory while its row groups are read one by one
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError("not a readable Parquet file (truncated?)", path=path, fix="make it again") from error


def read_table(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet table; UserError where it is missing, broken or lacks one of `columns`."""
    with open_parquet(path) as file:
        for column in columns or ():
            if column not in file.schema_arrow.names:
                raise UserError(
                    f"has no column {column!r}",
                    path=path,
                    fix=f"columns are {', '.join(file.schema_arrow.names)}",
                )
        return file.read(columns=columns)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `write_table` put into a Parquet file; {} where there is none."""
    with open_parquet(path) as file:
        raw = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
    return {} if raw is None else json.loads(raw)


def stamp(
    step: str, revision: int, *, parameters: Mapping[str, Any], inputs: Mapping[str, str]
) -> dict[str, Any]:
    """The metadata of an artefact: what made it, from what (digests), with which science parameters."""
    return {
        "cellformers": __version__,
        "step": step,
        "revision": revision,
        "parameters": dict(parameters),
        "inputs": dict(inputs),
    }


def digest_file(path: str | Path) -> str:
    """sha256 of a file's bytes, as "sha256:<hex>"."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def digest_arrays(*arrays: Any) -> str:
    """sha256 of arrays' contents in order (strings as UTF-8, numbers as little-endian), as "sha256:<hex>".

    Arrow string arrays are taken in pieces, so that a million names cost no memory; the digest is that of the same
    strings in a list.
    """
    sha = hashlib.sha256()
    for array in arrays:
        if isinstance(array, pa.StringArray):
            _add_names(sha, array)
            continue
        values = np.asarray(array)
        if values.dtype.kind in "OUST":
            encoded = "\0".join(map(str, values.tolist())).encode()
            sha.update(f"str{len(values)}:{len(encoded)}:".encode() + encoded)
        else:
            little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
            sha.update(f"{little.dtype.str}{little.shape}:".encode())
            sha.update(little.tobytes())
    return "sha256:" + sha.hexdigest()


def _add_names(sha: "hashlib._Hash", names: pa.StringArray) -> None:
    """Add the names, joined by zero bytes, after their number and the length of the whole."""
    length = (pc.sum(pc.binary_length(names)).as_py() or 0) + max(len(names) - 1, 0)
    sha.update(f"str{len(names)}:{length}:".encode())
    for start in range(0, len(names), NAMES_AT_ONCE):
        piece = names.slice(start, NAMES_AT_ONCE).to_pylist()
        sha.update(("\0" if start else "").encode() + "\0".join(piece).encode())
