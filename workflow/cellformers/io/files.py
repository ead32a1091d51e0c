"""Files that are whole or absent, and the metadata every artefact carries.

An artefact is written beside its final name and moved into place when it is complete; a failure leaves
nothing under the final name. Metadata names the package version, the step, its parameters and digests of its
inputs, and nothing that differs between machines or runs: no paths, times, hosts, threads or shard counts.
"""

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cellformers import __version__
from cellformers.errors import DiskFullError, UserError, full_disk, printable
from cellformers.io.pages import asked_for, most

METADATA_KEY = b"cellformers"
NAMES_AT_ONCE = 1 << 16
_NUMBER = re.compile(r"[+-]?(\d[\d.,]*([eE][+-]?\d+)?|inf|nan)?")
NAMES = ("alias", "cell_id", "gene_id")
MAX_JSON = 256 << 20  # the split of a million cells into five folds has half of it
MAX_NODES = 4_000_000  # lists and objects in a JSON file
MAX_VALUES = 20_000_000  # a name of every cell in each of five folds, of four million cells
# What code raises over files that are damaged, or no files of its kind at all.
DAMAGES = (
    pa.ArrowException, ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


_own: dict[Path, Path] = {}
"""Parts that this process writes at present, and what they are to become."""


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_left(part: Path) -> bool:
    """Whether nobody writes a part any more. In a container every process may have the same number."""
    pid = part.name.split("-")[1]
    own = part in _own or part.with_suffix("") in _own
    return pid.isdigit() and not own and (int(pid) == os.getpid() or not _alive(int(pid)))


def _prepare(target: Path) -> None:
    """Make the folder of `target`, and remove what killed writers of `target` left there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    name = glob.escape(target.name)
    for part in [p for end in ("", ".[0-9]*") for p in target.parent.glob(f".part-*-{name}{end}")]:
        if _is_left(part):
            _remove(part)


def _remove(part: Path) -> None:
    if os.path.isdir(part):  # which knows names that are too long
        shutil.rmtree(part, ignore_errors=True)
    elif os.path.lexists(part):
        part.unlink(missing_ok=True)


def _full(target: Path, error: BaseException, number: int) -> DiskFullError:
    """Of several files that are written at once, the one that the error is about, by its final name."""
    named = next((whole for part, whole in _own.items() if str(part) in str(error)), target)
    for part, whole in reversed(_own.items()):
        if named.is_relative_to(part):
            named = whole / named.relative_to(part)
    return DiskFullError(
        f"can't be written ({os.strerror(number)})", path=named, fix="make room, or choose another --output"
    )


def _unwritable(target: Path, error: OSError) -> UserError:
    number = full_disk(error)
    if number is not None:
        return _full(target, error, number)
    return UserError(
        f"can't write here ({error.strerror or error})",
        path=target,
        fix="choose an --output you may write to",
    )


@contextmanager
def _disk_may_be_full(target: Path) -> Iterator[None]:
    """Say so in one line, with the name of the file that was asked for; libraries name none or a temporary one.

    HDF5 can only mention a write that fails as a handle goes: such a file must not pass for whole.
    """
    lost: list[tuple[BaseException, int]] = []
    before = sys.unraisablehook

    def note(found: "sys.UnraisableHookArgs") -> None:
        number = full_disk(found.exc_value)
        if found.exc_value is not None and number is not None:
            lost.append((found.exc_value, number))
        else:
            before(found)

    sys.unraisablehook = note
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = full_disk(error)
        if number is None:
            raise
        raise _full(target, error, number) from error
    finally:
        sys.unraisablehook = before
    if lost:
        raise _full(target, *lost[0]) from lost[0][0]


def _refuse_folder(target: Path) -> None:
    if target.is_dir():
        raise UserError(
            "is a folder, a file is to be written here", path=target, fix="choose another --output"
        )


def _refuse_device(target: Path) -> None:
    """Refuse to put a file in the place of a device or a pipe: root may, and /dev/null would be lost to all."""
    device = target.exists() and not (target.is_file() or target.is_dir())
    if device or os.path.realpath(target.parent) == "/dev":
        raise UserError("is no plain file", path=target, fix="choose another --output")


@contextmanager
def _part(target: Path, *, folder: bool = False, file_wanted: bool = False) -> Iterator[Path]:
    """Yield a fresh file or folder beside `target`, with the same suffixes so that writers pick the same format.

    What is left of it at the end goes. It is made after its name is known, so that a signal finds none without owner.
    """
    part = target.parent / f".part-{os.getpid()}-{secrets.token_hex(4)}-{target.name}"
    _own[part] = target
    try:
        try:
            _refuse_device(target)
            _prepare(target)
            if file_wanted:
                _refuse_folder(target)
            if folder:
                part.mkdir()
            else:
                part.touch(exist_ok=False)
        except OSError as error:
            raise _unwritable(target, error) from error
        yield part
    finally:
        try:
            _remove(part)
        except BaseException:  # a signal while it went; those that follow are ignored
            _remove(part)
            raise
        finally:
            _own.pop(part, None)


@contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `target` when the block ends, and vanishes if it fails.

    Raises
    ------
    UserError
        If the folder of `target` can't be made or written to, or the disk is full.
    """
    target = Path(target)
    with _part(target, file_wanted=True) as part:
        mode = part.stat().st_mode
        with _disk_may_be_full(target):
            yield part
        os.chmod(part, mode)  # some writers put a private file of their own in its place
        os.replace(part, target)


@contextmanager
def atomic_dir(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces the folder `target` when the block ends, and vanishes if it fails."""
    target = Path(target)
    with _part(target, folder=True) as part:
        with _disk_may_be_full(target):
            yield part
        if target.is_dir():
            _replace_folder(target, part)
        elif target.exists():
            raise UserError(
                "is a file, a folder is to be written here", path=target, fix="choose another --output"
            )
        else:
            os.replace(part, target)


def _replace_folder(target: Path, part: Path) -> None:
    """Put `part` in the place of the folder `target`, or leave all as it was."""
    with _part(target, folder=True) as old:
        kept = old / target.name
        try:
            os.replace(target, kept)
            os.replace(part, target)
        except BaseException:
            if kept.exists() and not target.exists():
                os.replace(kept, target)
            raise


@contextmanager
def temporary_folder(target: str | Path) -> Iterator[Path]:
    """Yield a folder beside the file `target` for intermediate files; it vanishes when the block ends."""
    target = Path(target)
    with _part(target, folder=True, file_wanted=True) as folder, _disk_may_be_full(target):
        yield folder


def write_text(text: str, path: str | Path) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def as_field(text: str) -> str:
    """A text as a field of a tsv file that people open: one line, no tabs, and nothing that a spreadsheet would run.

    What begins like a formula, and is no number, gets an apostrophe in front, which spreadsheets take away.
    """
    plain = printable(text)
    return f"'{plain}" if plain[:1] in ("=", "+", "-", "@") and not _NUMBER.fullmatch(plain) else plain


def write_json(value: Any, path: str | Path) -> None:
    """Write `value` as indented JSON with a final newline, whole or not at all; NaN is refused."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", path)


@contextmanager
def whole(path: str | Path, *, fix: str = "make it again") -> Iterator[None]:
    """Within it, whatever the content of a damaged or foreign file makes the code stumble over is said of the file.

    For the reading of files that somebody else may have made or changed, and for nothing else: a mistake in the code
    of the block is said of the file as well.
    """
    try:
        yield
    except DAMAGES as error:
        if full_disk(error):
            raise
        text = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"damaged, or another file than expected ({text})", path=path, fix=fix) from error


def check_plain(path: str | Path) -> Path:
    """The path of a file; UserError where there is none, or a folder, a pipe or a device in its place."""
    path = Path(path)
    if not path.is_file():
        raise UserError("is no plain file" if path.exists() else "no such file", path=path)
    return path


def read_json(path: str | Path) -> Any:
    """Read JSON; UserError where the file is missing, not JSON, or larger than any that this package makes."""
    path = check_plain(path)
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON >> 20} MiB")
        content = path.read_bytes()
        if content.count(b"{") + content.count(b"[") > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES:,} lists and objects")
        if content.count(b",") > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        value = json.loads(content.decode("utf-8"))
        if b"\\ud" in content.lower():  # halves of characters can't be written anywhere
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"not readable as JSON ({error})", path=path, fix="make it again") from error
    return value


def write_table(table: pa.Table, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a table as zstd Parquet, whole or not at all, with `metadata` as JSON in the schema."""
    if metadata is not None:
        kept = {k: v for k, v in (table.schema.metadata or {}).items() if k != METADATA_KEY}
        table = table.replace_schema_metadata({**kept, METADATA_KEY: json.dumps(metadata).encode()})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def open_parquet(path: str | Path) -> pq.ParquetFile:
    """Open a Parquet file; UserError where it is missing, not Parquet, or a column of it unpacks to no end."""
    path = check_plain(path)
    try:
        asked_for(path)
        # pre-buffering would keep the whole compressed file in memory while its row groups are read one by one
        file = pq.ParquetFile(path, pre_buffer=False)
    except DAMAGES as error:
        text = " ".join(str(error).split())[:160]
        raise UserError(
            f"not a readable Parquet file (truncated? {text})", path=path, fix="make it again"
        ) from error
    try:
        with whole(path):
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError("it has two columns of one name")
    except BaseException:
        file.close()
        raise
    return file


def read_table(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet table; UserError where it is missing, broken or lacks one of `columns`.

    Names of cells and genes that are asked for come as string[n], without nulls.
    """
    path = Path(path)
    with open_parquet(path) as file, whole(path):
        for column in columns or ():
            if column not in file.schema_arrow.names:
                raise UserError(
                    f"has no column {column!r}",
                    path=path,
                    fix=f"columns are {', '.join(file.schema_arrow.names)}",
                )
        asked = asked_for(path)
        total = sum(asked.get(column, 0) for column in (asked if columns is None else set(columns)))
        if total > most(path.stat().st_size):
            raise ValueError(f"it would take {total / 1e9:.1f} GB of memory")
        table = file.read(columns=columns)
        table.validate(full=True)
        for column in set(columns or ()).intersection(NAMES):
            place = table.schema.get_field_index(column)
            table = table.set_column(place, column, _names(table[column], column))
        return table


def _names(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A column of names of cells or genes as string[n]."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)) or column.null_count:
        raise ValueError(f"its column {name!r} is not a name in every row")
    return column if pa.types.is_string(column.type) else column.cast(pa.string())


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `write_table` put into a Parquet file; {} where there is none."""
    with open_parquet(path) as file:
        raw = (file.schema_arrow.metadata or {}).get(METADATA_KEY)
    if raw is None:
        return {}
    with whole(path):
        found = json.loads(raw)
        if not isinstance(found, dict) or not all(
            isinstance(found.get(key, {}), dict) for key in ("inputs", "parameters")
        ):
            raise ValueError("its metadata is not of this package")
        return found


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


class Pieces(NamedTuple):
    """An array of numbers of which some rows at a time are in memory, for `digest_arrays`."""

    dtype: "np.dtype[Any]"
    shape: tuple[int, ...]
    parts: Iterable["np.ndarray[Any, Any]"]


def digest_arrays(*arrays: Any) -> str:
    """sha256 of arrays' contents in order (strings as UTF-8, numbers as little-endian), as "sha256:<hex>".

    Arrow string arrays and `Pieces` are taken bit by bit, so that a million names or vectors cost no memory; the
    digest is that of the same strings in a list, or of the whole array.
    """
    sha = hashlib.sha256()
    for array in arrays:
        if isinstance(array, pa.StringArray):
            _add_names(sha, array)
            continue
        if isinstance(array, Pieces):
            dtype = np.dtype(array.dtype).newbyteorder("<")
            sha.update(f"{dtype.str}{array.shape}:".encode())
            for part in array.parts:
                sha.update(_bytes(np.ascontiguousarray(part, dtype=dtype)))
            continue
        values = np.asarray(array)
        if values.dtype.kind in "OUST":
            encoded = "\0".join(map(str, values.tolist())).encode()
            sha.update(f"str{len(values)}:{len(encoded)}:".encode() + encoded)
        else:
            little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
            sha.update(f"{little.dtype.str}{little.shape}:".encode())
            sha.update(_bytes(little))
    return "sha256:" + sha.hexdigest()


def _bytes(array: "np.ndarray[Any, Any]") -> memoryview:
    """The bytes of an array in one piece, which are not copied."""
    return array.reshape(-1).view(np.uint8).data


def _add_names(sha: "hashlib._Hash", names: pa.StringArray) -> None:
    """Add the names, joined by zero bytes, after their number and the length of the whole."""
    length = (pc.sum(pc.binary_length(names)).as_py() or 0) + max(len(names) - 1, 0)
    sha.update(f"str{len(names)}:{length}:".encode())
    for start in range(0, len(names), NAMES_AT_ONCE):
        piece = names.slice(start, NAMES_AT_ONCE).to_pylist()
        sha.update(("\0" if start else "").encode() + "\0".join(piece).encode())
