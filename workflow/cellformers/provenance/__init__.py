"""What a run was made by, from what, and what it made: `provenance.json`, the same bytes for the same run."""

from cellformers.provenance.artefacts import artefacts, inputs
from cellformers.provenance.record import (
    FORMAT,
    NAME,
    file_entry,
    is_measured,
    open_artefact,
    record,
    write_record,
)

__all__ = [
    "FORMAT", "NAME", "artefacts", "file_entry", "inputs", "is_measured", "open_artefact", "record", "write_record",
]  # fmt: skip
