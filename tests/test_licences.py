"""The page of licences names every pinned package."""

import re
from pathlib import Path

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
