"""Running Snakemake in a folder of its own."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def snakemake() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that runs the workflow in a folder with a config (a mapping) and gives the finished process."""

    def run(
        folder: Path, config: dict[str, object] | None, *arguments: str, snakefile: Path = ROOT / "Snakefile"
    ) -> subprocess.CompletedProcess[str]:
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--snakefile",
            str(snakefile),
            "--directory",
            str(folder),
        ]
        if config is not None:
            path = folder / "config.yaml"
            path.write_text(yaml.safe_dump(config), encoding="utf-8")
            command += ["--configfile", str(path)]
        return subprocess.run(
            [*command, "--cores", "2", *arguments],
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )

    return run
