"""The page of licences names every pinned package, and says of each what the package itself does."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_pinned_package_is_on_the_page_of_licences() -> None:
    """`python benchmarks/licences.py` writes it anew."""
    pins = dict(
        line.split("==")
        for line in (ROOT / "envs" / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| (\S+) \| (.+?) \| .+ \|$", page, flags=re.MULTILINE)
    listed = {name: version for name, version, _ in rows if name not in ("package", "---")}
    assert listed == pins
    assert all(licence.strip() not in ("", "not stated") for _, _, licence in rows)


def test_every_plugin_that_tests_or_images_install_is_on_the_page() -> None:
    texts = [(ROOT / "envs" / name).read_text(encoding="utf-8") for name in ("executors.txt", "plugins.txt")]
    asked = {pin for text in texts for pin in re.findall(r"^([^#\s=]+)==(\S+)", text, flags=re.MULTILINE)}
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8")
    pinned = re.findall(r"^\| (\S+) \| (\S+) \| .+ \| .+ \|$", page, flags=re.MULTILINE)
    section = page.partition("## Plugins")[2]
    rows = re.findall(r"^\| (\S+) \| ([^|]+) \| ([^|]+) \|$", section, flags=re.MULTILINE)
    listed = {(name, version) for name, versions, _ in rows for version in versions.split(", ")}
    unread = re.findall(r"[\w-]+", re.sub(r"(?s).*no test installs it: |\.\n.*", "", section))
    assert {pin for pin in asked - listed - set(pinned) if pin[0] not in unread} == set()
    assert all(licence.strip() not in ("", "not stated") for _, _, licence in rows)


def test_the_page_says_what_the_installed_packages_say() -> None:
    pins = re.findall(
        r"^([^#\s=]+)==(\S+)", (ROOT / "envs" / "constraints.txt").read_text(), flags=re.MULTILINE
    )
    for name, pinned in pins:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
        if found.split("+")[0] != pinned.split("+")[0]:
            pytest.skip(f"{name} {found} is installed, {pinned} is pinned")
    command = [sys.executable, str(ROOT / "benchmarks" / "licences.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr or "write it anew: python benchmarks/licences.py"
