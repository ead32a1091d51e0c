"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of public reference data, which is not part of the project; tests skip without it."""
    folder = Path(os.environ.get("CELLFORMERS_REFERENCE_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"no reference data at {folder} (set CELLFORMERS_REFERENCE_DATA)")
    return folder
