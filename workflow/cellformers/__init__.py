"""cellformers: from raw single-cell counts to benchmarked embeddings of cell foundation models."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cellformers")
except PackageNotFoundError:  # imported from a folder on PYTHONPATH, without an installation
    __version__ = "0+unknown"
