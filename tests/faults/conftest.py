"""One warm process and one chain of all verbs for the tests of this folder."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import Chain, build
from forks import Forks


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    with Forks() as made:
        yield made


@pytest.fixture(scope="session")
def chain(forks: Forks) -> Iterator[Chain]:
    folder = Path(tempfile.mkdtemp(prefix="cellformers-faults-"))
    yield build(folder, forks)
    shutil.rmtree(folder)
