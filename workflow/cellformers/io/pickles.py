"""Dictionaries out of pickles that were downloaded, without running what a pickle can ask for.

A pickle is a program: it may import any function and call it. This unpickler knows two functions, the ones a numpy
scalar is made of, and has its own harmless versions of both; everything else is refused by name. What comes out is a
dict of str to int, float or str (`read_dictionary`), or to lists of str (`read_lists`).
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError

MAX_BYTES = 256 << 20
_FIX = "use the dictionaries as published"


class _ForbiddenError(Exception):
    """Names what a pickle asked for."""


class _Dtype:
    """Stands for numpy.dtype while a scalar is read: a code such as "f8", and a byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if not (isinstance(code, str) and code[:1] in {"i", "u", "f"} and code[1:] in {"1", "2", "4", "8"}):
            raise _ForbiddenError(f"a numpy scalar of type {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in {"<", ">", "|", "="}:
            self.order = state[1]


def _scalar(dtype: _Dtype, content: bytes) -> int | float:
    value = np.frombuffer(content, np.dtype(dtype.order + dtype.code))
    if len(value) != 1:
        raise _ForbiddenError("a numpy scalar of several values")
    return value[0].item()


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,  # numpy 1
    ("numpy._core.multiarray", "scalar"): _scalar,  # numpy 2
}


class _Unpickler(pickle.Unpickler):
    """Builtin containers and numbers come by opcodes; of functions there are two."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _ForbiddenError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _ForbiddenError(f"the persistent object {pid!r}")


def read_dictionary(path: str | Path) -> dict[str, int | float | str]:
    """Read a pickled dict of str to int, float or str (numpy scalars become Python's).

    Raises
    ------
    UserError
        If the file is missing, damaged or larger than 256 MiB, asks for anything but builtin containers and numpy
        numbers (the message names it), or holds something else.
    """
    path = Path(path)
    value = _load(path)
    for key, item in value.items():
        if type(key) is not str or type(item) not in {int, float, str}:
            raise UserError(
                f"its entry {str(key)[:40]!r} is a {type(item).__name__}, not a number or a name",
                path=path,
                fix=_FIX,
            )
    return value


def read_lists(path: str | Path) -> dict[str, list[str]]:
    """Read a pickled dict of str to lists of str: names of classes, and the genes of each. Sets come out sorted.

    Raises
    ------
    UserError
        As `read_dictionary`.
    """
    path = Path(path)
    value = _load(path)
    lists: dict[str, list[str]] = {}
    for key, items in value.items():
        plain = type(items) in {list, tuple, set, frozenset} and all(type(item) is str for item in items)
        if type(key) is not str or not plain:
            raise UserError(
                f"its entry {str(key)[:40]!r} is no list of names ({type(items).__name__})",
                path=path,
                fix="use the file as published",
            )
        lists[key] = sorted(items) if isinstance(items, set | frozenset) else list(items)
    return lists


def _load(path: Path) -> dict[Any, Any]:
    """The dict in a pickle, its keys and values unchecked."""
    if not path.is_file():
        raise UserError("no such file", path=path)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(
            f"is larger than {MAX_BYTES >> 20} MiB, no dictionary of genes is", path=path, fix=_FIX
        )
    try:
        with path.open("rb") as file:
            value = _Unpickler(file).load()
    except _ForbiddenError as error:
        raise UserError(
            f"forbidden in a pickle from outside: {error}; nothing was run", path=path, fix=_FIX
        ) from None
    except Exception as error:  # a damaged pickle may raise anything
        text = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(
            f"not a readable pickle, damaged or truncated? ({text})", path=path, fix=_FIX
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"holds a {type(value).__name__}, a dictionary is expected", path=path, fix=_FIX)
    return value
