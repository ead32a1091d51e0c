"""The Dockerfile as far as it can be checked without docker: what it copies, installs, pins and leaves out."""

import os
import re
import shlex
import shutil
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "envs" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(instruction, its text), with continued lines joined and comments gone."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, text in instructions():
        if word == "FROM":
            name = text.split()[-1]
            found[name] = []
        found[name].append((word, text))
    return found


def all_of(word: str, stage: str) -> str:
    return "\n".join(text for found, text in stages()[stage] if found == word)


def copied() -> list[str]:
    """What is taken from the project."""
    return [
        source
        for word, text in instructions()
        if word == "COPY" and "--from=" not in text
        for source in shlex.split(text)[:-1]
    ]


def in_context(path: str) -> bool:
    """Whether the build gets to see a file, by the rules of .dockerignore: the last pattern that matches decides."""
    kept = True
    parts = path.split("/")
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        names = parts if "**/" in line else ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        if line and not line.startswith("#") and any(fnmatch(name, pattern) for name in names):
            kept = line.startswith("!")
    return kept


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "envs" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_what_is_copied_is_there_and_in_the_context() -> None:
    assert len(copied()) > 10
    for source in copied():
        assert (ROOT / source).exists(), source
        assert in_context(source), source
    assert in_context("workflow/cellformers/models/devices.py")


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", "results/report.html", ".snakemake/log", "logs/a.log", "data.h5ad",
        ".env", "tests/test_cli.py", "envs/notes.txt", "workflow/cellformers/__pycache__/cli.pyc",
        "workflow/cellformers.egg-info/PKG-INFO",
    ],
)  # fmt: skip
def test_nothing_else_is_in_the_context(path: str) -> None:
    assert not in_context(path)


def test_both_targets_have_what_workers_of_cloud_executors_need() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for stage in ("cpu-build", "gpu"):
        installed = all_of("RUN", stage)
        asked = re.search(r'"\.\[([\w,]+)\]"', installed)
        assert asked, stage
        assert "workflow" in asked[1].split(",")
        assert set(asked[1].split(",")) <= set(extras)
        assert "--requirement envs/plugins.txt" in installed
    assert {"snakemake-storage-plugin-s3", "snakemake-storage-plugin-gcs"} <= set(pins("plugins.txt"))
    assert 'transformer_engine[pytorch,core-cu13]==2.20.2"' in all_of("RUN", "gpu")
    assert "transformer_engine" not in all_of("RUN", "cpu-build")


def test_images_are_pinned_and_nobody_is_root() -> None:
    assert set(stages()) == {"cpu-build", "cpu", "gpu"}
    for name in stages():
        base = all_of("FROM", name).split()[0]
        assert re.search(r":\d+\.\d+\.\d+-", base), f"{base}: a tag that stays what it is"
    for name in ("cpu", "gpu"):
        words = [word for word, _ in stages()[name]]
        assert all_of("USER", name) == "cellformers"
        assert "RUN" not in words[words.index("USER") :]
        assert "useradd" in all_of("RUN", name)
    said = DOCKERFILE.read_text().lower()
    assert not any(word in said for word in ("password", "token", "secret", "--build-arg"))


def test_versions_are_the_projects() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"-t cellformers:([\d.]+)-", DOCKERFILE.read_text()) == [version] * 2
    own = pins("constraints.txt")
    others = {name for name, pin in pins("plugins.txt").items() if own.get(name, pin) != pin}
    assert others == {"python-dateutil"}, "a name pinned twice is pinned alike, but for this one"
    # whatever else is given a version: nothing but TransformerEngine, which is in no list
    found = re.findall(r"[\w\[\],.-]+==[\w.]+", "\n".join(text for _, text in instructions()))
    assert found == ["transformer_engine[pytorch,core-cu13]==2.20.2"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_pins_are_put_together_as_the_dockerfile_does(tmp_path: Path) -> None:
    commands = [
        text for stage in ("cpu-build", "gpu") for w, text in stages()[stage] if "/tmp/others" in text
    ]
    assert len(commands) == 2
    assert commands[0] == commands[1]
    shutil.copytree(ROOT / "envs", tmp_path / "envs")
    command = commands[0].replace("/tmp/", f"{tmp_path}/")
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True, env=dict(os.environ))
    lines = [
        line for line in (tmp_path / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    ]
    assert dict(line.split("==") for line in lines) == pins("constraints.txt") | pins("plugins.txt")
    assert len(lines) == len({line.split("==")[0].lower() for line in lines}), "one pin a name"
