"""Write simulated deposits: the mirror that serves them, the registry that describes them, the truth."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import yaml

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import atomic_path, digest_file, read_json, stamp, write_json, write_text
from cellformers.resources import resource
from cellformers.revisions import REVISIONS
from cellformers.simulate.deposits import checkpoints, gene_sets, gse129096, gse155468, gse156793, scp1303
from cellformers.simulate.deposits.formats import Drawn, Writer
from cellformers.simulate.deposits.genome import Genome, draw_genome

ALL = "all"
CHECKPOINTS = "checkpoints.yaml"
LEAST_CELLS = 150


class _Simulated(NamedTuple):
    """What draws a deposit, and its cells (of each part) unless told otherwise."""

    draw: Callable[[Genome, int], Drawn]
    cells: int


_DEPOSITS = {
    "gse155468": _Simulated(gse155468.draw, 330),
    "gse129096": _Simulated(gse129096.draw, 288),
    "gse156793": _Simulated(gse156793.draw, 400),
    "scp1303": _Simulated(scp1303.draw, 420),
    "collins2022": _Simulated(gene_sets.draw_collins, 0),
    "geneformer-labels": _Simulated(gene_sets.draw_labels, 0),
    "tf-range": _Simulated(gene_sets.draw_ranges, 0),
}
SIMULATED = tuple(_DEPOSITS)
"""Names of the deposits that can be simulated."""


def simulate_deposits(
    names: Iterable[str], output: str | Path, *, cells: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Write deposits as the real ones are stored and registered, with known truth; other files there are left alone.

    Every file is whole or absent; the entry of a deposit, which has the digests of its files, is written after them.

    Parameters
    ----------
    names
        Registered deposits; "all": every one of them, and two tiny models with their dictionaries.
    output
        Folder for www, resources, home and truth (see `cellformers.simulate.deposits`).
    cells
        Cells of each part, at least 150 (a third of that in the heart of gse129096); None: 288 to 420, see
        truth/<name>.json.
    seed
        Non-negative. Deposits of one seed share their genes, and don't depend on each other or on `cells` but for
        the cells themselves.

    Returns
    -------
    dict
        Contents of truth/<name>.json by name.

    Raises
    ------
    UserError
        If no such deposit is registered, a number is out of range, the folder holds deposits of another seed or
        can't be written to.
    """
    output = Path(output)
    names = list(dict.fromkeys(names))
    chosen = list(_DEPOSITS) if ALL in names else names
    _check([*chosen, *(name for name in names if name != ALL)], output, cells=cells, seed=seed)
    genome = draw_genome(seed)
    truths = {}
    for name in chosen:
        simulated = _DEPOSITS[name]
        size = simulated.cells and (cells or simulated.cells)
        drawn = simulated.draw(genome, size)
        _write_deposit(name, drawn, output)
        truths[name] = {**_stamp(name, seed, size), **drawn.truth}
        write_json(truths[name], output / "truth" / f"{name}.json")
    if ALL in names:
        _write_checkpoints(genome, output)
    return truths


def _check(names: Iterable[str], output: Path, *, cells: int | None, seed: int) -> None:
    for name in names:
        if name not in _DEPOSITS:
            raise UserError(f"no deposit {name!r} is simulated", fix=did_you_mean(name, (*_DEPOSITS, ALL)))
    if seed < 0:
        raise UserError(f"seed {seed} is negative", fix="give 0 or more")
    if cells is not None and cells < LEAST_CELLS:
        raise UserError(
            f"{cells} cells can't hold all donors and types", fix=f"ask for at least {LEAST_CELLS}"
        )
    for path in sorted((output / "truth").glob("[!.]*.json")):
        found = read_json(path).get("parameters", {}).get("seed")
        if found != seed:
            raise UserError(
                f"is of seed {found}, and deposits of two seeds don't share their genes", path=path,
                fix=f"give --seed {found} or another --output",
            )  # fmt: skip


def _stamp(name: str, seed: int, cells: int) -> dict[str, Any]:
    parameters = {"deposit": name, "seed": seed, "cells": cells}
    return stamp("simulate", REVISIONS["simulate"], parameters=parameters, inputs={})


def _registered(name: str) -> dict[str, Any]:
    """The content of a registry file of the package."""
    content: dict[str, Any] = yaml.safe_load(resource(name).read_text(encoding="utf-8"))
    return content


def _place(url: str, output: Path) -> Path:
    """Where a server of static files finds a URL: it undoes the escapes in the path."""
    parts = urlsplit(url)
    return output / "www" / parts.netloc / unquote(parts.path).lstrip("/")


def _write_deposit(name: str, drawn: Drawn, output: Path) -> None:
    """The files of a deposit, then its entry with their sizes and digests."""
    entry = _registered(f"datasets/{name}.yaml")
    for file, described in entry["files"].items():
        described |= {"size": None, "sha256": None}
        if file in drawn.files:
            by_hand = output / "home" / "manual" / name / file
            path = by_hand if described["url"] is None else _place(described["url"], output)
            described |= _write(drawn.files[file], path)
    missing = [file for file, known in entry["files"].items() if known["needed"] and file not in drawn.files]
    if missing:
        raise UserError(f"the file {missing[0]} of {name} is registered, but not simulated")
    _write_entry(entry, output / "resources" / "datasets" / f"{name}.yaml")


def _write(writer: Writer, path: Path) -> dict[str, Any]:
    """Write a file; its size and digest."""
    with atomic_path(path) as temporary:
        writer(temporary)
    return {"size": path.stat().st_size, "sha256": digest_file(path).removeprefix("sha256:")}


def _write_entry(entry: Mapping[str, Any], path: Path) -> None:
    text = yaml.dump(dict(entry), Dumper=_Plain, sort_keys=False, allow_unicode=True, width=110)
    write_text("# Simulated by cellformers: stands in for the package's file of this name.\n" + text, path)


class _Plain(yaml.SafeDumper):
    """Without anchors: every entry is written out."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        """Never name a part that occurs twice."""
        return True


def _write_checkpoints(genome: Genome, output: Path) -> None:
    """The tiny models and dictionaries, then the registry that has them alone."""
    registered = _registered(CHECKPOINTS)
    missing = [name for name in checkpoints.MODELS if name not in registered["models"]]
    if missing:
        raise UserError(
            f"registers no model {missing[0]}", path=resource(CHECKPOINTS), fix="unset CELLFORMERS_RESOURCES"
        )
    made, writers = checkpoints.draw_files(genome, registered)
    known = {url: _write(writer, _place(url, output)) for url, writer in writers.items()}
    for entry in (*made["vocabularies"].values(), *made["models"].values()):
        entry["files"] = {file: known[checkpoints.url_of(entry, file)] for file in entry["files"]}
    _write_entry(made, output / "resources" / CHECKPOINTS)
