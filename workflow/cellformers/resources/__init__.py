"""Registries that belong to the package: what is published where, with sizes and digests.

    resource("checkpoints.yaml")         # the file, in a checkout and in an installed wheel alike

What is registered is downloaded, never copied into the project. `resources` at the root of a checkout is a link to
this folder.
"""

from pathlib import Path

_FOLDER = Path(__file__).parent


def resource(name: str) -> Path:
    """Path of a registry file of the package; FileNotFoundError where there is none of that name."""
    path = _FOLDER / name
    if not path.is_file():
        raise FileNotFoundError(f"the installation of cellformers lacks {path}")
    return path
