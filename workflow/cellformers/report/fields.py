"""Values of files that the report shows, of the types that it shows; what is of another type is refused as it is read.

    with whole(path):
        found = part(training, "parameters")     # {} where it is not there
        steps = count(found, "steps")            # None where it is not there

All raise ValueError, which names the key.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

MOST = 1e18  # no count, time or loss of a run is beyond it
Object = Mapping[str, Any]


def part(found: Object, key: str) -> dict[str, Any]:
    """The object of a key; {} where there is none."""
    return dict(_of(found, key, dict) or {})


def items(found: Object, key: str) -> list[Any]:
    """The list of a key; [] where there is none."""
    return list(_of(found, key, list) or [])


def texts(found: Object, key: str) -> list[str]:
    """The list of texts of a key; [] where there is none."""
    values = items(found, key)
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key!r} holds what is no text")
    return values


def text(found: Object, key: str) -> str | None:
    """The text of a key; None where there is none."""
    value: str | None = _of(found, key, str)
    return value


def count(found: Object, key: str) -> int | None:
    """The integer of a key; None where there is none."""
    value = _of(found, key, int)
    return None if value is None else int(_bounded(value, key))


def number(found: Object, key: str) -> float | None:
    """The number of a key; None where there is none."""
    value = _of(found, key, (int, float))
    return None if value is None else float(_bounded(value, key))


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers as float64; NaN where missing."""
    kind = table[name].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise ValueError(f"its column {name!r} holds {kind}, no numbers")
    return np.asarray(table[name].cast(pa.float64(), safe=False).to_numpy())


def measures(table: pa.Table, name: str) -> np.ndarray:
    """The same of what is never negative."""
    found = numbers(table, name)
    known = found[~np.isnan(found)]
    if len(known) and not (known.min() >= 0 and known.max() < MOST):
        raise ValueError(f"its column {name!r} has {known.min():g} to {known.max():g}")
    return found


def _of(found: Object, key: str, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(found, Mapping):
        raise ValueError(f"{key!r} is looked for in what is no object")
    value = found.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise ValueError(f"{key!r} has another type")
    return value


def _bounded(value: float, key: str) -> float:
    if not -MOST < value < MOST:
        raise ValueError(f"{key!r} is {value:g}" if isinstance(value, float) else f"{key!r} is too large")
    return value
