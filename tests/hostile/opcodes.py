"""Pickles that ask for what no dictionary of genes needs, put together opcode by opcode.

`DANGEROUS` import or call something, `BOMBS` want memory or time, `MALFORMED` break the machine that reads them. A
pickle that ran would make the file that `PWNED` names.
"""

import io
import pickle
import struct
from pathlib import Path

import numpy as np

PWNED = "pwned-by-a-pickle"
_COMMAND = f"touch {PWNED}".encode()


def _text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _global(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def _dict(value: bytes) -> bytes:
    """A pickle of {"A": what `value` puts on the stack}."""
    return b"\x80\x04}" + _text("A") + value + b"s."


def _stack_global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


_CALL = _text(_COMMAND.decode()) + b"\x85R"  # one argument, REDUCE
_DTYPE = _global("numpy", "dtype") + b"(" + _text("f8") + b"I00\nI01\ntR"
_SCALAR = _global("numpy._core.multiarray", "scalar")


class _Evil:
    """Asks to run a command, as a class of a module that is not there may."""

    def __reduce__(self):
        import os

        return os.system, (_COMMAND.decode(),)


def _of_each_protocol() -> dict[str, bytes]:
    return {f"system, protocol {n}": pickle.dumps({"A": _Evil()}, protocol=n) for n in range(6)}


def _out_of_band() -> bytes:
    return pickle.dumps({"A": pickle.PickleBuffer(b"x" * 9)}, protocol=5, buffer_callback=lambda _: False)


DANGEROUS: dict[str, bytes] = {
    **_of_each_protocol(),
    "GLOBAL os.system": _dict(_global("os", "system") + _CALL),
    "GLOBAL posix.system": _dict(_global("posix", "system") + _CALL),
    "GLOBAL builtins.eval": _dict(_global("builtins", "eval") + _CALL),
    "GLOBAL builtins.getattr": _dict(_global("builtins", "getattr") + _CALL),
    "GLOBAL __builtin__.eval": b"(dp0\nS'A'\n" + _global("__builtin__", "eval") + b"(S'1'\ntRs.",
    "GLOBAL alone": _global("os", "system") + b".",
    "GLOBAL importlib.import_module": _dict(_global("importlib", "import_module") + _text("antigravity") + b"\x85R"),
    "GLOBAL of a dotted name": _dict(_global("numpy", "dtype.mro") + b")R"),
    "GLOBAL numpy.load": _dict(_global("numpy", "load") + _CALL),
    "GLOBAL numpy.core.multiarray._reconstruct": pickle.dumps({"A": np.array([1, "x"], object)}, protocol=2),
    "STACK_GLOBAL os.system": _dict(_stack_global("os", "system") + _CALL),
    "STACK_GLOBAL dotted": _dict(_stack_global("numpy", "dtype.__class__") + _CALL),
    "STACK_GLOBAL of no text": _dict(b"K\x01K\x02\x93"),
    "INST os.system": b"(dp0\nS'A'\n(" + f"S'{_COMMAND.decode()}'\n".encode() + b"ios\nsystem\ns.",
    "OBJ os.system": _dict(b"(" + _global("os", "system") + _text(_COMMAND.decode()) + b"o"),
    "NEWOBJ subprocess.Popen": _dict(_global("subprocess", "Popen") + _text("true") + b"\x85\x81"),
    "NEWOBJ of what is known": _dict(_global("numpy", "dtype") + b")\x81"),
    "NEWOBJ_EX subprocess.Popen": _dict(_global("subprocess", "Popen") + b"(" + _text("true") + b"t}\x92"),
    "NEWOBJ_EX of what is known": _dict(_global("numpy", "dtype") + b"(" + _text("f8") + b"t}\x92"),
    "REDUCE of a number": _dict(b"K\x01)R"),
    "REDUCE of what came out": _dict(_DTYPE + b")R"),
    "REDUCE of scalar without arguments": _dict(_SCALAR + b")R"),
    "REDUCE of scalar with others": _dict(_SCALAR + _text("f8") + _text("x") + b"\x86R"),
    "scalar of objects": _dict(_SCALAR + _global("numpy", "dtype") + _text("O") + b"\x85R" + _text("x") + b"\x86R"),
    "scalar of text": _dict(_SCALAR + _global("numpy", "dtype") + _text("S8") + b"\x85R" + _text("x") + b"\x86R"),
    "dtype of a list": _dict(_global("numpy", "dtype") + b"](" + _text("f8") + b"e\x85R"),
    "dtype of a billion": _dict(_global("numpy", "dtype") + _text("1000000000f8") + b"\x85R"),
    "BUILD of slots": _dict(_DTYPE + b"(N}" + _text("code") + _text("O") + b"stb"),
    "BUILD of a dict": _dict(_DTYPE + b"}" + _text("code") + _text("O") + b"sb"),
    "BUILD of __class__": _dict(_DTYPE + b"(N}" + _text("__class__") + _global("os", "system") + b"stb"),
    "BUILD of a class": _dict(_global("numpy", "dtype") + b"(N}" + _text("__init__") + b"K\x01stb"),
    "BUILD of a function": _dict(_SCALAR + b"}" + _text("__code__") + b"K\x01sb"),
    "BUILD of a dict of builtins": _dict(b"}}" + _text("x") + b"K\x01sb"),
    "EXT1": _dict(b"\x82\x01"),
    "EXT2": _dict(b"\x83\x01\x00"),
    "EXT4": _dict(b"\x84\x01\x00\x00\x00"),
    "EXT of a negative code": _dict(b"\x84\xff\xff\xff\xff"),
    "PERSID": b"(dp0\nS'A'\nPos.system\ns.",
    "BINPERSID": _dict(_text("os.system") + b"Q"),
    "an array": pickle.dumps({"A": np.arange(9.0)}),
    "an array, protocol 5": pickle.dumps({"A": np.arange(9.0)}, protocol=5),
    "an array of objects": pickle.dumps({"A": np.array([{}, []], object)}),
    "out of band": _out_of_band(),
    "NEXT_BUFFER": _dict(b"\x97"),
    "READONLY_BUFFER": _dict(b"K\x01\x98"),
    "a set that calls": _dict(b"\x8f(" + _global("os", "system") + b"\x90"),
    "a frozenset": _dict(b"(K\x01\x91"),
    "a bytearray": _dict(b"\x96" + struct.pack("<Q", 3) + b"abc"),
    "a type": pickle.dumps({"A": dict}),
    "an exception": pickle.dumps({"A": ValueError("x")}),
    "a path": pickle.dumps({"A": Path("x")}),
    "two pickles behind each other": pickle.dumps([]) + pickle.dumps({"A": _Evil()}),
    "a key that is called": b"\x80\x04}" + _global("os", "system") + _CALL + b"K\x01s.",
}  # fmt: skip


def _deep(depth: int, opening: bytes, closing: bytes) -> bytes:
    return b"\x80\x04}" + _text("A") + opening * depth + closing * depth + b"s."


def _laughs(levels: int) -> bytes:
    """Lists of ten times the list before, by the memo: 10**levels items if anything ran over them."""
    out = io.BytesIO()
    out.write(b"\x80\x04}" + _text("A") + b"]\x94(" + b"K\x01" * 10 + b"e")
    for level in range(levels):
        out.write(b"0]" + b"(" + b"h" + bytes([level]) * 1 + (b"h" + bytes([level])) * 9 + b"e\x94")
    out.write(b"s.")
    return out.getvalue()


BOMBS: dict[str, bytes] = {
    "a memo of four billion": _dict(b"K\x01r\xff\xff\xff\xff"),
    "a memo of a billion": _dict(b"K\x01r" + struct.pack("<I", 10**9)),
    "a memo of a hundred million": _dict(b"K\x01r" + struct.pack("<I", 10**8)),
    "PUT of a trillion": _dict(b"K\x01p1000000000000\n"),
    "lists in lists": _deep(100_000, b"]", b"a"),
    "tuples in tuples": _dict(b")" + b"\x85" * 200_000),
    "dicts in dicts": b"\x80\x04}" + (_text("A") + b"}") * 100_000 + b"s" * 100_001 + b".",
    "marks": b"\x80\x04" + b"(" * 2_000_000 + b".",
    "duplicates": _dict(b"]" + b"2" * 2_000_000),
    "a billion laughs": _laughs(9),
    "LONG4 of two billion": _dict(b"\x8b\xff\xff\xff\x7f"),
    "LONG4 of minus one": _dict(b"\x8b\xff\xff\xff\xff"),
    "LONG1 of 255 bytes": _dict(b"\x8a\xff" + b"\x7f" * 255),
    "LONG4 of a megabyte": _dict(b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20)),
    "LONG of a million digits": b"(dp0\nS'A'\nL" + b"9" * 1_000_000 + b"L\ns.",
    "INT of a million digits": b"(dp0\nS'A'\nI" + b"9" * 1_000_000 + b"\ns.",
    "BINBYTES8 of 2**62": _dict(b"\x8e" + struct.pack("<Q", 1 << 62) + b"x"),
    "BINBYTES8 of 2**63": _dict(b"\x8e" + struct.pack("<Q", 1 << 63) + b"x"),
    "BINBYTES8 of 3 GB": _dict(b"\x8e" + struct.pack("<Q", 3 << 30) + b"x"),
    "BINBYTES of 4 GB": _dict(b"B\xff\xff\xff\xff" + b"x"),
    "BINUNICODE8 of 2**62": _dict(b"\x8d" + struct.pack("<Q", 1 << 62) + b"x"),
    "BINUNICODE of 4 GB": _dict(b"X\xff\xff\xff\xff" + b"x"),
    "BYTEARRAY8 of 2**62": _dict(b"\x96" + struct.pack("<Q", 1 << 62) + b"x"),
    "BYTEARRAY8 of 3 GB": _dict(b"\x96" + struct.pack("<Q", 3 << 30) + b"x"),
    "FRAME of 2**62": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
    "FRAME of 3 GB": b"\x80\x04\x95" + struct.pack("<Q", 3 << 30) + b"}.",
    "an infinity of keys": _dict(b"F" + b"9" * 1_000_000 + b"\n"),
}

MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "only a protocol": b"\x80\x04",
    "protocol 9": b"\x80\x09}.",
    "no end": b"\x80\x04}",
    "an empty stack": b".",
    "a mark as the value": b"\x80\x04(.",
    "an opcode that is none": b"\x80\x04\xff.",
    "GET of what is not there": _dict(b"g7\n"),
    "LONG_BINGET of what is not there": _dict(b"j\xff\xff\xff\x7f"),
    "GET of no number": _dict(b"gx\n"),
    "POP of nothing": b"\x80\x04000.",
    "POP_MARK of nothing": b"\x80\x041.",
    "SETITEMS of an odd number": b"\x80\x04}(K\x01u.",
    "SETITEM of a number": b"\x80\x04K\x01K\x02K\x03s.",
    "APPENDS to a number": b"\x80\x04K\x01(K\x02e.",
    "ADDITEMS to a dict": b"\x80\x04}(K\x02\x90.",
    "a dict as a key": b"\x80\x04}}K\x01s.",
    "a list as a key": b"\x80\x04}]K\x01s.",
    "a frame that is too short": b"\x80\x04\x95" + struct.pack("<Q", 1) + b"}" + _text("A") + b"K\x01s.",
    "a frame in a frame": b"\x80\x04\x95" + struct.pack("<Q", 12) + b"\x95" + struct.pack("<Q", 2) + b"}.",
    "text that is no UTF-8": _dict(b"X\x02\x00\x00\x00\xff\xfe"),
    "text that is half a character": b"\x80\x04}" + b"X\x03\x00\x00\x00\xed\xa0\x80" + b"K\x01s.",
    "a string without quotes": b"(dp0\nSA\nI1\ns.",
    "a string with an escape that is none": b"(dp0\nS'\\x'\nI1\ns.",
    "a float that is none": _dict(b"Fnumber\n"),
    "a dictionary that holds itself": b"\x80\x04}\x94" + _text("A") + b"h\x00s.",
    "a key of numbers": pickle.dumps({1: 2}),
    "a key that is nothing": pickle.dumps({None: 2}),
    "a value that is nothing": pickle.dumps({"A": None}),
    "a value that is true": pickle.dumps({"A": True}),
    "a value that is complex": pickle.dumps({"A": 1j}),
    "bytes as values": pickle.dumps({"A": b"x"}),
    "a list": pickle.dumps([1]),
    "a text": pickle.dumps("A"),
    "json": b'{"A": 1}',
    "a page": b"<!DOCTYPE html><html>",
}
