"""Dictionaries out of pickles that were downloaded, without running what a pickle can ask for.

A pickle is a program: it may import any function and call it, and ask for any amount of memory. This unpickler reads
its opcodes first, and refuses all but those of builtin containers and numbers. It knows the functions that sets and
numpy scalars are made of, and has its own harmless versions of them; everything else is refused by name. What comes
out is a dict of str to int, float or str (`read_dictionary`), or to lists of str (`read_lists`).
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError

MAX_BYTES = 64 << 20  # published ones have up to 4 MB
MAX_OBJECTS = 2_000_000  # containers and numpy scalars: some hundred bytes each, from a few bytes of the file
_FIX = "use the dictionaries as published"

# What dictionaries, lists, tuples and sets of numbers and names are made of, in any protocol.
_PLACES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_TEXTS = frozenset((
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING",
))  # fmt: skip
_MAKING = frozenset((
    "EMPTY_DICT", "DICT", "EMPTY_LIST", "LIST", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_SET", "FROZENSET",
    "REDUCE",
))  # fmt: skip
_OPCODES = _PLACES | _TEXTS | _MAKING | frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
    "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "EMPTY_TUPLE", "ADDITEMS",
    "GLOBAL", "STACK_GLOBAL", "BUILD",
))  # fmt: skip


class _ForbiddenError(Exception):
    """Names what a pickle asked for."""


class _Dtype:
    """Stands for numpy.dtype while a scalar is read: a code such as "f8", and a byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if not (isinstance(code, str) and code[:1] in {"i", "u", "f"} and code[1:] in {"1", "2", "4", "8"}):
            raise _ForbiddenError(f"a numpy scalar of type {code!r:.40}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in {"<", ">", "|", "="}:
            self.order = state[1]


def _scalar(dtype: _Dtype, content: bytes) -> int | float:
    value = np.frombuffer(content, np.dtype(dtype.order + dtype.code))
    if len(value) != 1:
        raise _ForbiddenError("a numpy scalar of several values")
    return value[0].item()


def _set(items: list[Any]) -> set[Any]:
    """A set of what a list holds, as older protocols write it."""
    if not isinstance(items, list):
        raise _ForbiddenError(f"a set of a {type(items).__name__}")
    return set(items)


def _encode(text: str, encoding: str) -> bytes:
    """The bytes of a numpy scalar, as older protocols write them."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _ForbiddenError(f"bytes of a {type(text).__name__}")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,  # numpy 1
    ("numpy._core.multiarray", "scalar"): _scalar,  # numpy 2
}


class _Unpickler(pickle.Unpickler):
    """Builtin containers and numbers come by opcodes; of functions there are those of sets and numpy scalars."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise _ForbiddenError(f"{module}.{name}") from None


def _check_opcodes(content: bytes) -> None:
    """Refuse opcodes that no dictionary needs, and those that make more than the file can hold."""
    if content[:1] not in (b"\x80", b"(", b"}", b"c"):
        raise ValueError("it does not begin like one")
    made, last, called = 0, ["", ""], ""
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _TEXTS:
            last = [last[1], str(argument)]
        elif name in ("GLOBAL", "INST"):
            called = str(argument).replace(" ", ".")
        elif name == "STACK_GLOBAL":
            called = ".".join(last)
        if name in ("PERSID", "BINPERSID"):
            raise _ForbiddenError(f"the persistent object {argument or last[1]!r:.40}")
        if name not in _OPCODES:
            raise _ForbiddenError(f"{name} {called}" if called else name)
        made += name in _MAKING
        if made > MAX_OBJECTS:
            raise _ForbiddenError(f"more than {MAX_OBJECTS:,} containers")
        # each place of the memo costs 8 bytes, used or not
        if name in _PLACES and int(argument or 0) > len(content):
            raise _ForbiddenError(f"place {argument} of a memo")


def read_dictionary(path: str | Path) -> dict[str, int | float | str]:
    """Read a pickled dict of str to int, float or str (numpy scalars become Python's).

    Raises
    ------
    UserError
        If the file is missing, damaged or larger than 64 MiB, asks for anything but builtin containers and numpy
        numbers (the message names it), or holds something else, or a whole number of more than 64 bits.
    """
    path = Path(path)
    value = _load(path)
    for key, item in value.items():
        if type(key) is not str or type(item) not in {int, float, str}:
            raise UserError(
                f"its entry {_short(key)!r} is a {type(item).__name__}, not a number or a name",
                path=path,
                fix=_FIX,
            )
        _check_text(key, path)
        if type(item) is str:
            _check_text(item, path)
        if type(item) is int and not -(1 << 63) <= item < 1 << 63:
            raise UserError(f"its entry {key[:40]!r} is a number of more than 64 bits", path=path, fix=_FIX)
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
                f"its entry {_short(key)!r} is no list of names ({type(items).__name__})",
                path=path,
                fix="use the file as published",
            )
        for text in (key, *items):
            _check_text(text, path)
        lists[key] = sorted(items) if isinstance(items, set | frozenset) else list(items)
    return lists


def _short(key: Any) -> str:
    """A key as messages name it; numbers may have more digits than Python is willing to print."""
    try:
        return str(key)[:40]
    except ValueError:
        return type(key).__name__


def _check_text(text: str, path: Path) -> None:
    """Refuse halves of characters, which no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"its name {text[:40]!r} is no text", path=path, fix=_FIX) from None


def _load(path: Path) -> dict[Any, Any]:
    """The dict in a pickle, its keys and values unchecked."""
    if not path.is_file():
        raise UserError("no such file", path=path)
    if path.stat().st_size > MAX_BYTES:
        raise UserError(
            f"is larger than {MAX_BYTES >> 20} MiB, no dictionary of genes is", path=path, fix=_FIX
        )
    try:
        content = path.read_bytes()
        _check_opcodes(content)
        value = _Unpickler(io.BytesIO(content)).load()
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
