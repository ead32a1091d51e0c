"""One warm process, and one chain of all verbs, for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Chain, build
from forks import Forks

from cellformers.io.locks import exclusive


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as made:
        yield made


@pytest.fixture(scope="session")
def chain(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Made once, also where several processes of pytest share the work."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    return _made(shared / "chain", forks)


def _made(folder: Path, forks: Forks) -> Chain:
    done = folder / ".done"
    with exclusive(folder.with_name(".lock-chain")):
        if not done.exists():
            build(folder, forks)
            done.touch()
    return Chain(folder)
