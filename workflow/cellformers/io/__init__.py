"""The outside world: reading count files, writing artefacts."""
