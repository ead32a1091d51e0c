"""The outside world: reading count files, writing artefacts."""

from cellformers.io.source import Block, CountSource, ReadOptions, open_counts

__all__ = ["Block", "CountSource", "ReadOptions", "open_counts"]
