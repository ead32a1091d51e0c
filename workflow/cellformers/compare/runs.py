"""A run to be compared: a results folder, or a provenance.json alone.

Nothing outside a results folder is opened, whatever its links or its record say.
"""

import os
import stat
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellformers.errors import UserError
from cellformers.io.files import read_json
from cellformers.provenance import FORMAT, NAME, file_entry, is_measured

_LARGEST_RECORD = 1 << 28  # bytes
SECTIONS = ("versions", "code", "machine", "config", "sources", "inputs", "artefacts")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run.

    Parameters
    ----------
    shown
        How the user called it.
    folder
        Its results; None where there is a record alone.
    record
        What `provenance` wrote; None where there is none.
    names
        Its artefacts, below the folder.
    """

    shown: str
    folder: Path | None
    record: dict[str, Any] | None
    names: frozenset[str]

    def section(self, name: str) -> dict[str, Any]:
        """A part of the record, empty where there is none."""
        return {} if self.record is None else dict(self.record[name])

    def path(self, name: str) -> Path | None:
        """Where an artefact lies; None where it is not there, leads out of the folder, or is no plain file."""
        if self.folder is None:
            return None
        try:
            real = (self.folder / name).resolve(strict=True)
            plain = stat.S_ISREG(real.stat().st_mode)
        except (OSError, RuntimeError, ValueError):
            return None
        return real if plain and real.is_relative_to(self.folder.resolve()) else None

    def digests(self, pool: Executor) -> dict[str, str | None]:
        """sha256 of the artefacts as they are now; as recorded where there is a record alone. None: can't be read."""
        names = sorted(self.names)
        if self.folder is None:
            return {name: str(entry["sha256"]) for name, entry in self.section("artefacts").items()}
        return dict(zip(names, pool.map(self._digest, names), strict=True))

    def _digest(self, name: str) -> str | None:
        path = self.path(name)
        if path is None:
            return None
        try:
            return str(file_entry(path)["sha256"])
        except UserError:
            return None


def open_run(path: str | Path) -> Run:
    """A run by its results folder or its provenance.json.

    Raises
    ------
    UserError
        If there is neither, or the record is damaged.
    """
    path = Path(path)
    if path.is_dir():
        record = _read(path / NAME) if (path / NAME).exists() else None
        names = frozenset(_found(path) if record is None else record["artefacts"])
        if not names:
            raise UserError("holds no artefacts", path=path, fix="give the results folder of a run")
        return Run(shown=str(path), folder=path, record=record, names=names)
    if not path.exists():
        raise UserError("no such folder or file", path=path)
    record = _read(path)
    return Run(shown=str(path), folder=None, record=record, names=frozenset(record["artefacts"]))


def _found(folder: Path) -> Iterator[str]:
    """Artefacts of a folder without a record: all files but logs, measurements and unfinished ones."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in files:
            name = (Path(parent) / file).relative_to(folder).as_posix()
            if not file.startswith(".") and not is_measured(name):
                yield name


def _read(path: Path) -> dict[str, Any]:
    try:
        info = path.stat()
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", path=path) from None
    if not stat.S_ISREG(info.st_mode) or info.st_size > _LARGEST_RECORD:
        raise UserError("is no record of a run", path=path, fix="give a results folder or a provenance.json")
    record = read_json(path)
    if not isinstance(record, dict) or not all(isinstance(record.get(name), dict) for name in SECTIONS):
        raise UserError("is no record of a run", path=path, fix="give a results folder or a provenance.json")
    if record.get("format") != FORMAT:
        raise UserError(
            f"has format {record.get('format')!r}, not {FORMAT}", path=path, fix="record it again"
        )
    for name in ("artefacts", "inputs"):
        for file, entry in record[name].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
                raise UserError(f"{file!r} has no digest", path=path, fix="record it again")
    if any(file.startswith("/") or ".." in file.split("/") or "\0" in file for file in record["artefacts"]):
        raise UserError("names an artefact outside the results", path=path)
    return record
