"""Readers that do what none may do, once their file is damaged: what `test_fuzz` tests the judge with."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from cellformers.errors import UserError

CONTENT = bytes(range(200))


def make(folder: Path) -> None:
    (folder / "a.bin").write_bytes(CONTENT)


def _damaged(folder: Path) -> bool:
    return (folder / "a.bin").read_bytes() != CONTENT


def wrong(folder: Path) -> Any:
    return (folder / "a.bin").read_bytes()


def raises(folder: Path) -> Any:
    if _damaged(folder):
        raise KeyError("a")


def writes(folder: Path) -> Any:
    if _damaged(folder):
        (folder.parent / "outside").write_text("x", encoding="utf-8")


def starts(folder: Path) -> Any:
    if _damaged(folder):
        subprocess.run(["true"], check=True)


def dies(folder: Path) -> Any:
    if _damaged(folder):
        os.abort()


def hangs(folder: Path) -> Any:
    if _damaged(folder):
        time.sleep(60)


def takes(folder: Path) -> Any:
    return len(bytearray(400 << 20)) if _damaged(folder) else 0


def takes_and_says_so(folder: Path) -> Any:
    try:
        return takes(folder)
    except MemoryError as error:
        raise UserError("damaged", path=folder) from error
