"""What differs within two artefacts of the same name, by the kind of file."""

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any, AnyStr

import numpy as np

from cellformers.compare import columns
from cellformers.compare.tally import Difference, Tally, hold_together
from cellformers.errors import UserError
from cellformers.provenance import open_artefact

TABLES = {
    ".parquet": columns.parquet, ".h5ad": columns.hdf5, ".loom": columns.hdf5, ".h5": columns.hdf5,
    ".safetensors": columns.safetensors,
}  # fmt: skip
DRAWN = (".svg", ".png", ".html")
"""Pictures and pages of what other artefacts hold: with a tolerance, those are judged in their place."""
SEPARATORS = {".tsv": "\t", ".csv": ","}
_LARGEST_JSON = 1 << 26  # bytes
_LONGEST_LINE = 1 << 24  # characters
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_MOST = 1000  # differences told of one file
_SHORT = 60  # characters of a value


def differences(left: Sequence[Path], right: Sequence[Path], tolerance: float) -> list[Difference]:
    """What differs between two files, or between two sets of shards as rows one after the other.

    Parameters
    ----------
    left, right
        One file each, or all shards of a dataset in order (Parquet and h5ad only).
    tolerance
        Largest difference of floats, in units of the largest magnitude of the column, that is accepted.

    Raises
    ------
    UserError
        If a file can't be read as what its name says.
    """
    suffix = left[0].suffix
    recut = len(left) != len(right)
    if suffix in TABLES:
        read = partial(columns.hdf5, recut=True) if recut and suffix == ".h5ad" else TABLES[suffix]
        found = _tables(read(left), read(right), tolerance, recut=recut)
    elif suffix == ".json":
        found = list(of_values(_json(left[0]), _json(right[0]), tolerance))
    elif suffix in SEPARATORS:
        found = _texts_in_columns(left[0], right[0], SEPARATORS[suffix], tolerance)
    elif suffix in DRAWN and tolerance > 0:
        return [Difference("", "drawn from other artefacts, which are judged instead", accepted=True)]
    else:
        found = _lines(left[0], right[0])
    return found[:_MOST]


def _tables(
    left: columns.Content, right: columns.Content, tolerance: float, *, recut: bool
) -> list[Difference]:
    found = []
    for name in sorted({*left.columns, *right.columns}):
        a, b = left.columns.get(name), right.columns.get(name)
        if a is None or b is None:
            found.append(
                Difference(f"column {name}", f"only in {'the second' if a is None else 'the first'}")
            )
            continue
        # integers are stored as small as the rows of a shard allow
        if a.kind != b.kind and not recut:
            found.append(Difference(f"column {name}", f"type {a.kind} -> {b.kind}"))
        tally, n, m = hold_together(a.blocks(), b.blocks())
        if n != m:
            found.append(Difference(f"column {name}", f"{n:,} -> {m:,} values"))
        difference = tally.difference(f"column {name}", tolerance)
        if difference is not None:
            found.append(difference)
    if not recut:  # what a shard says of itself is of its rows
        found += of_values(left.facts, right.facts, tolerance)
    return found


def _json(path: Path) -> Any:
    if path.stat().st_size > _LARGEST_JSON:
        raise UserError("is too large to be compared as JSON", path=path)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"not readable as JSON ({error})", path=path) from None


def of_values(left: Any, right: Any, tolerance: float, place: tuple[str, ...] = ()) -> Iterator[Difference]:
    """What differs between two values as JSON has them, key by key."""
    if isinstance(left, dict) and isinstance(right, dict):
        for key in sorted({*left, *right}, key=str):
            where = (*place, str(key))
            if key not in left or key not in right:
                there = "only in the second" if key not in left else "only in the first"
                yield Difference(_key(where), f"{there} ({_short((left | right)[key])})")
            else:
                yield from of_values(left[key], right[key], tolerance, where)
    elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        for number, pair in enumerate(zip(left, right, strict=True)):
            yield from of_values(*pair, tolerance, (*place, str(number)))
    elif not _same(left, right):
        yield _leaf(left, right, tolerance, _key(place))


def _same(left: Any, right: Any) -> bool:
    both_nan = isinstance(left, float) and isinstance(right, float) and math.isnan(left) and math.isnan(right)
    return both_nan or (type(left) is type(right) and bool(left == right))


def _leaf(left: Any, right: Any, tolerance: float, place: str) -> Difference:
    text = f"{_short(left)} -> {_short(right)}"
    if isinstance(left, float) and isinstance(right, float):
        tally = Tally()
        tally.add(np.array([left]), np.array([right]))
        told = tally.difference(place, tolerance)
        accepted = told is not None and told.accepted
        return Difference(place, text, accepted, told.largest if told else None)
    # digests of what was read: with a tolerance, that is judged itself
    followed = all(isinstance(value, str) and _DIGEST.fullmatch(value) for value in (left, right))
    return Difference(place, text, accepted=followed and tolerance > 0)


def _key(place: tuple[str, ...]) -> str:
    return "key " + ".".join(place) if place else "the whole"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def _texts_in_columns(left: Path, right: Path, separator: str, tolerance: float) -> list[Difference]:
    """Tables of text: by the columns of their first line, numbers as numbers."""
    tallies: dict[int, Tally] = {}
    with _opened(left) as first, _opened(right) as second:
        try:
            rows = zip_longest(
                csv.reader(_pieces(first), delimiter=separator),
                csv.reader(_pieces(second), delimiter=separator),
            )
            names, others = next(rows, ([], []))
            if names != others:
                return [Difference("header", f"{_short(names)} -> {_short(others)}")]
            lines = [1, 1]
            for a, b in rows:
                lines = [lines[0] + (a is not None), lines[1] + (b is not None)]
                if a is not None and b is not None:
                    for at, pair in enumerate(zip_longest(a, b)):
                        tallies.setdefault(at, Tally()).add(*_cells(*pair))
        except csv.Error as error:
            raise UserError(f"is not a table ({error})", path=left) from None
    found = [] if lines[0] == lines[1] else [Difference("rows", f"{lines[0]:,} -> {lines[1]:,}")]
    for at, tally in tallies.items():
        name = names[at] if names and at < len(names) else str(at + 1)
        found += [told] if (told := tally.difference(f"column {name}", tolerance)) else []
    return found


def _opened(path: Path) -> Any:
    return path.open(newline="", encoding="utf-8", errors="surrogateescape")


def _pieces(file: IO[AnyStr]) -> Iterator[AnyStr]:
    """Lines, the longest ones in pieces."""
    while piece := file.readline(_LONGEST_LINE):
        yield piece


def _cells(left: str | None, right: str | None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Two cells of a table: floats (equal ones too, which tell how large their column is), else their words."""
    pair = left or "", right or ""
    if left == right or not all(_WHOLE.fullmatch(text) for text in pair):
        try:
            return np.array([float(pair[0])]), np.array([float(pair[1])])
        except ValueError:
            pass  # words, at least one of them
    return np.array([left], dtype=object), np.array([right], dtype=object)


def _lines(left: Path, right: Path) -> list[Difference]:
    """Anything else: lines of text, or bytes."""
    sizes = f"{left.stat().st_size:,} -> {right.stat().st_size:,} bytes"
    if left.suffix == ".png":
        return [Difference("", f"another picture ({sizes})")]
    first, count = 0, 0
    with open_artefact(left) as a, open_artefact(right) as b:
        for number, (x, y) in enumerate(zip_longest(_pieces(a), _pieces(b)), start=1):
            if x != y:
                first, count = first or number, count + 1
    return [Difference("", f"{count:,} lines differ, the first is line {first:,} ({sizes})")] if count else []
