"""Pickles that ask for more than a dictionary: every dangerous opcode, bombs, and what is no pickle at all."""

import pickle
import pickletools
import time
from pathlib import Path
from typing import Any

import forked
import opcodes
import pytest

from cellformers.errors import UserError
from cellformers.io.pickles import read_dictionary, read_lists

READERS = (read_dictionary, read_lists)
# What a dictionary may well hold, if in an odd way.
FINE = {"LONG1 of 255 bytes": False, "a frame that is too short": True}


def read_all(folder: Path, group: str) -> list[tuple[str, str, str]]:
    """What each pickle of a group came to with each reader: its name, how it ended, the text."""
    found = []
    path = folder / "x.pkl"
    for name, content in getattr(opcodes, group).items():
        path.write_bytes(content)
        for read in READERS:
            started = time.monotonic()
            try:
                found.append((name, "value", repr(read(path))[:200]))
            except UserError as error:
                found.append((name, "user_error", str(error)))
            except BaseException as error:  # noqa: BLE001  (whatever it was, the test is to know it)
                found.append((name, "error", repr(error)))
            if time.monotonic() - started > 10:
                found.append((name, "hang", ""))
    return found


@pytest.mark.parametrize("group", ["DANGEROUS", "BOMBS", "MALFORMED"])
def test_hostile_pickles_end_in_one_line(group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = forked.run(read_all, tmp_path, group, writable=tmp_path, seconds=60, memory_mb=1024)
    assert outcome.kind == "value", outcome.text
    assert not outcome.deeds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pkl"]  # nothing was touched
    assert len(outcome.value) == 2 * len(getattr(opcodes, group))
    for name, ended, text in outcome.value:
        if ended == "value":
            assert name in FINE, (name, text)
            continue
        assert ended == "user_error", (name, text)
        assert "\n" not in text
    if group == "DANGEROUS":
        forbidden = [name for name, _, text in outcome.value if "nothing was run" in text]
        assert len(forbidden) > 0.7 * len(outcome.value)  # the others are refused for what they hold


def test_every_opcode_is_either_of_a_dictionary_or_refused_by_name(tmp_path: Path) -> None:
    """A new protocol's opcodes are refused until somebody has looked at them."""
    from cellformers.io.pickles import _OPCODES

    dangerous = {
        "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "NEXT_BUFFER",
        "READONLY_BUFFER", "BYTEARRAY8", "DUP",
    }  # fmt: skip
    assert {opcode.name for opcode in pickletools.opcodes} - _OPCODES == dangerous


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_dictionaries_of_any_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    import numpy as np

    numbers: dict[str, Any] = {
        "A": 1,
        "B": 2.5,
        "C": "x",
        "D": np.float64(0.25),
        "E": np.int32(-7),
        "é": 1 << 40,
    }
    (tmp_path / "n.pkl").write_bytes(pickle.dumps(numbers, protocol=protocol))
    assert read_dictionary(tmp_path / "n.pkl") == {
        k: getattr(v, "item", lambda v=v: v)() for k, v in numbers.items()
    }
    lists = {"a": ["x", "y"], "b": {"q", "p"}, "c": ("z",), "d": []}
    (tmp_path / "l.pkl").write_bytes(pickle.dumps(lists, protocol=protocol))
    assert read_lists(tmp_path / "l.pkl") == {"a": ["x", "y"], "b": ["p", "q"], "c": ["z"], "d": []}


def test_special_files_in_place_of_a_pickle_do_not_hang(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "x.pkl")
    assert forked.run(read_dictionary, tmp_path / "x.pkl").kind == "user_error"
    assert forked.run(read_dictionary, Path("/dev/zero")).kind == "user_error"
    assert forked.run(read_dictionary, tmp_path).kind == "user_error"
