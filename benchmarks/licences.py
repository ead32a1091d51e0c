"""The licence of every pinned package, as its own metadata state it.

    python benchmarks/licences.py                 # writes docs/licences.md
    python benchmarks/licences.py --check         # 1 where that is not what is pinned and installed

Needs an environment in which everything of envs/constraints.txt is installed, and the plugins of envs/executors.txt in
.venv/executors (`make test` puts them there).
"""

import sys

sys.path.pop(0)  # this folder: tokenize.py in it is not the standard library's

import argparse
import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "licences.md"
# What asks for a package: the installation itself, then its extras.
EXTRAS = {
    "": "cellformers",
    "workflow": "workflow",
    "training": "training",
    "benchmarks": "benchmarks",
    "test": "test",
}
# The trove classifiers and texts that stand for a name of SPDX.
SPDX = {
    "Apache 2.0": "Apache-2.0", "Apache License, Version 2.0": "Apache-2.0", "Apache License Version 2.0": "Apache-2.0",
    "3-Clause BSD": "BSD-3-Clause",
    "Apache Software License": "Apache-2.0", "Apache 2.0 License": "Apache-2.0", "MIT License": "MIT",
    "The MIT License (MIT)": "MIT", "ISC License (ISCL)": "ISC", "BSD License": "BSD",
    "BSD 3-Clause License": "BSD-3-Clause", "3-Clause BSD License": "BSD-3-Clause",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0", "GNU General Public License (GPL)": "GPL",
    "Copyright (c) 2016-2020 Leland McInnes": "BSD-3-Clause",
}  # fmt: skip
HEAD = """# Licences

Of every package that `envs/constraints.txt` pins, as the package itself states it; written by
`python benchmarks/licences.py`. None of them is part of this project or passed on with it: pip fetches them from where
their authors publish them. "BSD" stands where a package does not say which.

`asked for by` is the part of the installation that brings a package: `cellformers` alone, or an extra
(`workflow`, `training`, `benchmarks`, `test`). {copyleft}

| package | version | licence | asked for by |
| --- | --- | --- | --- |
"""
PLUGINS = """
## Plugins for clusters and clouds

Of what `envs/executors.txt` (the tests) and `envs/plugins.txt` (the images) name beside these: executors and storage of
Snakemake, and what they ask for. None of it is installed with cellformers: you choose what your site needs.{unread}

| package | version | licence |
| --- | --- | --- |
"""


def pins(file: str = "constraints.txt") -> dict[str, str]:
    """Version of each pinned package, by its name as the file has it."""
    lines = (ROOT / "envs" / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def licence(package: Distribution) -> str:
    """What the metadata say: the expression, a classifier, the text, or the first line of the licence file."""
    about = package.metadata
    expression = about.get("License-Expression")
    if expression:
        return expression
    classified = [
        line.rpartition(" :: ")[2]
        for line in about.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    named = [name for name in classified if name != "OSI Approved"]
    text = (about.get("License") or "").strip().splitlines()
    found = named or text[:1] or list(first_lines(package))
    return " AND ".join(SPDX.get(name, name) for name in found[:2]) or "not stated"


def first_lines(package: Distribution) -> Iterator[str]:
    """The first line of each licence file that is installed with a package."""
    for file in package.files or ():
        if re.match(r"(LICEN[CS]E|COPYING)", file.name, re.IGNORECASE):
            content = Path(str(file.locate())).read_text(encoding="utf-8", errors="replace")
            yield next((line.strip() for line in content.splitlines() if line.strip()), "")


def asked_for(extra: str) -> set[str]:
    """Everything that the installation with an extra brings, by canonical name."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [("cellformers", frozenset({extra}))]
    while waiting:
        asked = waiting.pop()
        if asked in seen:
            continue
        seen.add(asked)
        try:
            requires = distribution(asked[0]).requires or ()
        except PackageNotFoundError:
            continue
        for need in map(Requirement, requires):
            if need.marker is None or any(need.marker.evaluate({"extra": each}) for each in asked[1] or {""}):
                waiting.append((canonicalize_name(need.name), frozenset(need.extras)))
    return {name for name, _ in seen}


def page() -> str:
    """The whole page."""
    brings = {extra: asked_for(extra) for extra in EXTRAS}
    rows, copyleft = [], []
    for name, version in sorted(pins().items(), key=lambda pin: pin[0].lower()):
        stated = licence(distribution(name))
        key = canonicalize_name(name)
        by = next((EXTRAS[extra] for extra in EXTRAS if key in brings[extra]), "plugins of Snakemake")
        rows.append(f"| {name} | {version} | {stated} | {by} |")
        if "GPL" in stated:
            copyleft.append(f"{name} ({stated}, {by})")
    said = f"Under a copyleft licence: {', '.join(copyleft)}." if copyleft else ""
    return HEAD.format(copyleft=said) + "\n".join(rows) + "\n"


def plugins(folder: Path) -> str:
    """The section on the packages that stand in `folder`, apart from the others."""
    here = {canonicalize_name(found.name): found for found in distributions(path=[str(folder)])}
    asked: dict[str, list[str]] = {}
    for file in ("executors.txt", "plugins.txt"):
        for name, version in pins(file).items():
            if version not in asked.setdefault(name, []) and pins().get(name) != version:
                asked[name].append(version)
    rows, unread = [], []
    for name, versions in sorted(asked.items(), key=lambda pin: pin[0].lower()):
        found = here.get(canonicalize_name(name))
        if versions and found is not None:
            rows.append(f"| {name} | {', '.join(versions)} | {licence(found)} |")
        elif versions:
            unread.append(name)
    note = f" Not looked into, since no test installs it: {', '.join(unread)}." if unread else ""
    return PLUGINS.format(unread=note) + "\n".join(rows) + "\n"


def main() -> int:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--plugins", type=Path, default=ROOT / ".venv" / "executors", help="where they are")
    options = parser.parse_args()
    there = PAGE.read_text(encoding="utf-8")
    made = page()
    if options.plugins.is_dir():
        made += plugins(options.plugins)
    elif options.check:
        there = there.partition("\n## ")[0]
    else:
        parser.error(f"{options.plugins} is not there: make test puts the plugins into it")
    if options.check:
        return int(made != there)
    PAGE.write_text(made, encoding="utf-8")
    print(f"{PAGE}: {len(pins())} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
