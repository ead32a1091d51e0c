"""Fields of registries, validated: each function returns the value it was given or raises ValueError in a few words.

positive(entry["size"], "gse129096: table.tsv: size")
"""

import re
from collections.abc import Mapping
from typing import Any

from cellformers.errors import did_you_mean

SHA256 = re.compile(r"[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""Of an entry or a file: no folder in it, and no hidden file."""


def table(value: Any, where: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """A mapping of exactly these keys."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is no mapping")
    for key in value:
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}; {did_you_mean(key, keys)}")
    for key in keys:
        if key not in value:
            raise ValueError(f"{where} lacks {key}")
    return value


def text(value: Any, where: str, pattern: re.Pattern[str] | None = None) -> str:
    """A text that is not blank, or matches `pattern` as a whole."""
    if not isinstance(value, str) or not (pattern.fullmatch(value) if pattern else value.strip()):
        raise ValueError(f"{where} is {value!r}")
    return value


def maybe(value: Any, where: str, pattern: re.Pattern[str] | None = None) -> str | None:
    """A text, or None."""
    return None if value is None else text(value, where, pattern)


def positive(value: Any, where: str) -> int:
    """A whole number above 0."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{where} is {value!r}, not a positive whole number")
    return value


def one_of(value: Any, where: str, known: tuple[str, ...]) -> str:
    """One of some words."""
    if value not in known:
        raise ValueError(f"{where} is {value!r}; {did_you_mean(str(value), known)}")
    return str(value)
