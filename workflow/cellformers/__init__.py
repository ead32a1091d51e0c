"""cellformers: from raw single-cell counts to benchmarked embeddings of cell foundation models."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cellformers.api import embed, tokenize

__all__ = ["__version__", "embed", "tokenize"]

try:
    __version__ = version("cellformers")
except PackageNotFoundError:  # imported from a folder on PYTHONPATH, without an installation
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used: the command line starts without them."""
    if name in ("embed", "tokenize"):
        from cellformers import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
