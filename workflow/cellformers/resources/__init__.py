"""Registries that belong to the package: what is published where, with sizes and digests.

    resource("checkpoints.yaml")         # the file, in a checkout and in an installed wheel alike
    listed("datasets", "*.yaml")         # {"gse129096": its file, ...}

CELLFORMERS_RESOURCES names a folder whose files stand in for those of the package that have the same name, and join
them: an institute's own registry. What is registered is downloaded, never copied into the project. `resources` at the
root of a checkout is a link to this folder.
"""

import os
from pathlib import Path, PurePosixPath
from typing import Any

from cellformers.errors import UserError

VARIABLE = "CELLFORMERS_RESOURCES"
MAX_BYTES = 256 << 10  # of a YAML file; the longest here has 11 kB
_FOLDER = Path(__file__).parent


def resource(name: str) -> Path:
    """Path of a registry file, given relative to the folder of the package (`datasets/gse129096.yaml`).

    Raises
    ------
    FileNotFoundError
        If there is none of that name.
    UserError
        If CELLFORMERS_RESOURCES names no folder.
    """
    _check_inside(name)
    for folder in _folders():
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"the installation of cellformers lacks {_FOLDER / name}")


def listed(folder: str, pattern: str) -> dict[str, Path]:
    """Files of a folder of registries by their stem, in order of it; errors as `resource`."""
    _check_inside(folder)
    found: dict[str, Path] = {}
    for root in reversed(_folders()):
        found |= {path.stem: path for path in (root / folder).glob(pattern) if path.is_file()}
    return dict(sorted(found.items()))


def _folders() -> list[Path]:
    """Where registries are looked for, in this order."""
    named = os.environ.get(VARIABLE)
    if not named:
        return [_FOLDER]
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"is no folder, but {VARIABLE} names it", path=folder, fix=f"correct or unset {VARIABLE}"
        )
    return [folder, _FOLDER]


def _check_inside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise FileNotFoundError(f"{name} is no name of a registry")


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file of plain values: a config, a registry, a search space.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        In one line, if it is no plain file, not UTF-8, not YAML or larger than 256 KiB; if it has tags, which could
        make objects, a key twice, of which YAML would take the last without a word, or aliases that repeat each other
        without end.
    """
    from cellformers.resources.loading import load_yaml

    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("it is no plain file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 10} KiB")
    return load_yaml(path.read_text(encoding="utf-8"))
