"""What differs between two runs: versions, config, inputs, and the artefacts down to their numbers."""

from cellformers.compare.compared import Comparison, compare
from cellformers.compare.listing import as_json, as_text

__all__ = ["Comparison", "as_json", "as_text", "compare"]
