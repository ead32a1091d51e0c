"""The record of a run: versions, config, digests of what was read and of what was made.

    write_record(given, results="results", output="results/provenance.json", threads=4)

The same run gives the same bytes. Files are found by the config (`artefacts`), never by looking around, so leftovers
of other runs in the folder are passed over. What was measured (time, memory) is no result: `logs/`, `runtime/`, and
in the report the section of cost and its figure.
"""

import hashlib
import io
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import cellformers
from cellformers.config import Config, load
from cellformers.errors import UserError
from cellformers.io.files import write_json
from cellformers.progress import progress
from cellformers.provenance.artefacts import FOLDERS, artefacts, inputs
from cellformers.provenance.checkout import checkout_state
from cellformers.provenance.surroundings import code_digest, machine, versions

NAME, FORMAT = "provenance.json", 1
UNFINISHED = (".part-", ".old-", ".git")
"""How names of files begin that are being written, or are no data."""
MEASURED_FIGURES = ("figures/runtime.png", "figures/runtime.svg")
_COST = re.compile(rb'<section id="cost">.*?</section>', re.DOTALL)
_LARGEST_PAGE = 1 << 26  # a larger file is no report
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^/@\s]*@")
_SECRET = re.compile(r"(?i)([?&][^=&\s]*(?:token|key|secret|signature|password|sig)=)[^&\s]+")


def write_record(
    given: Mapping[str, Any],
    *,
    results: str | Path,
    output: str | Path,
    root: str | Path = ".",
    threads: int = 1,
    quiet: bool = False,
) -> None:
    """Write the record of a run as JSON, whole or not at all; `record` says what is raised."""
    write_json(record(given, results=results, root=root, threads=threads, quiet=quiet), output)


def record(
    given: Mapping[str, Any],
    *,
    results: str | Path,
    root: str | Path = ".",
    threads: int = 1,
    quiet: bool = False,
) -> dict[str, Any]:
    """The record of a complete run.

    Parameters
    ----------
    given
        The config as it was given.
    results
        Folder of the run's results.
    root
        Folder that paths of the config are relative to; it is not recorded.
    threads
        Files that are read at a time; the record does not depend on it.

    Raises
    ------
    UserError
        If the config is wrong, or a file that it reads or makes is not there.
    """
    config, results = load(given), Path(results)
    package = Path(cellformers.__file__).parent
    made = [(path.relative_to(results).as_posix(), path) for path in _made(config, results)]
    read = [
        (_without_secrets(shown.as_posix()), file)
        for name in inputs(config)
        for shown, file in _as_written(name, Path(root))
    ]
    with progress("provenance", len(made) + len(read), unit="files", quiet=quiet) as advance:

        def entry(item: tuple[str, Path]) -> dict[str, Any]:
            found = file_entry(item[1])
            advance(1)
            return found

        with ThreadPoolExecutor(threads) as pool:
            entries = list(pool.map(entry, [*made, *read]))
    names = [name for name, _ in [*made, *read]]
    pairs = list(zip(names, entries, strict=True))
    return {
        "format": FORMAT,
        "versions": versions(),
        "code": {**checkout_state(package.parents[1]), "sha256": code_digest(package)},
        "machine": machine(),
        "config": {"given": _plain(given), "validated": _plain(config.model_dump(mode="json"))},
        "sources": sources(config),
        "inputs": dict(sorted(pairs[len(made) :])),
        "artefacts": dict(sorted(pairs[: len(made)])),
    }


def is_measured(name: str) -> bool:
    """Whether a file of a results folder holds what was measured, or is the config: no artefact."""
    return name in (*MEASURED_FIGURES, NAME, "config.yaml") or name.split("/")[0] in ("logs", "runtime")


def open_artefact(path: Path) -> IO[bytes]:
    """A file as it is compared: the report without its section of cost, anything else as it is."""
    file = path.open("rb")
    if path.name != "report.html" or os.fstat(file.fileno()).st_size > _LARGEST_PAGE:
        return file
    with file:
        return io.BytesIO(_COST.sub(b"", file.read()))


def file_entry(path: Path) -> dict[str, Any]:
    """Size in bytes and sha256 of a file as `open_artefact` reads it.

    Raises
    ------
    UserError
        If it can't be read.
    """
    try:
        with open_artefact(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            return {"size": file.tell(), "sha256": digest}
    except OSError as error:
        raise UserError(f"can't be read ({error.strerror})", path=path) from error


def _made(config: Config, results: Path) -> Iterator[Path]:
    """Every file that the run made, but for those of measurements."""
    for name in artefacts(config):
        path = results / name
        if not path.exists():
            raise UserError("is not there, so the run is not complete", path=path, fix="run snakemake first")
        folder = name in FOLDERS or name.startswith("deposits/")
        for file in _inside(path) if folder else [path]:
            if not is_measured(file.relative_to(results).as_posix()):
                yield file


def _inside(path: Path) -> Iterator[Path]:
    """A file itself, or the files under a folder; UserError where there is neither."""
    if path.is_file():
        yield path
        return
    if not path.is_dir():
        raise UserError("no such file", path=path)
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(UNFINISHED) for part in file.relative_to(path).parts):
            yield file


def _as_written(name: str, root: Path) -> Iterator[tuple[Path, Path]]:
    """An input as the config writes it, or each file in it, and where that lies."""
    there = root / name
    for file in _inside(there):
        yield Path(name) / file.relative_to(there), file


def _without_secrets(text: str) -> str:
    """The text without the user and password of an address, and without keys among its parameters."""
    return _SECRET.sub(r"\1***", _CREDENTIALS.sub(r"\1", text))


def _plain(value: Any) -> Any:
    """Parsed YAML as JSON has it, keys in order, without secrets; what JSON has no number for as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, bool | int | float | None) else _without_secrets(str(value))


def sources(config: Config) -> dict[str, Any]:
    """Where registered models, their vocabularies and deposits come from: revision, and the digests demanded."""
    from cellformers.deposits import read_deposit
    from cellformers.registry import read_registry

    found: dict[str, dict[str, Any]] = {"models": {}, "vocabularies": {}, "deposits": {}}
    registry = read_registry() if any(model.checkpoint for model in config.models.values()) else None
    for name, model in config.models.items():
        if registry is None or model.checkpoint is None:
            continue
        entry = registry.models[model.checkpoint]
        words = registry.vocabularies[entry.vocabulary]
        found["models"][name] = {
            "checkpoint": entry.name,
            "repository": entry.repository,
            "revision": model.revision or entry.revision,
            "files": {file.path: file.sha256 for file in entry.files},
        }
        found["vocabularies"][entry.vocabulary] = {
            "repository": words.repository,
            "revision": words.revision,
            "files": {file.path: file.sha256 for file in words.files},
        }
    for name in sorted({file.split("/")[1] for file in artefacts(config) if file.startswith("deposits/")}):
        files = read_deposit(name).files
        found["deposits"][name] = {file.name: file.sha256 for file in files.values()}
    return found
