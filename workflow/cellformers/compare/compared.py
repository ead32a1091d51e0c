"""Two runs held against each other: what was asked, by what it was computed, from what, and what came out.

    comparison = compare("run_a/results", "run_b/results", tolerance=0.0)

Equal means: the same inputs, the same config, and the same bytes of every artefact; the shards of a dataset that was
cut up otherwise are equal if their rows, one after the other, are. Versions, commit, machine, the number of shards and
the accelerator are circumstances: they are told and decide nothing, unless asked to.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellformers.compare.contents import differences, of_values
from cellformers.compare.runs import Run, open_run
from cellformers.compare.tally import Difference
from cellformers.errors import UserError

SHARD = re.compile(r"(?P<folder>.*)/(?P<number>\d{4,9})-of-(?P<total>\d{4,9})(?P<suffix>\.\w+)")

PARTIAL = re.compile(r"[^/]+/(gene_embeddings/[^/]+|medians)/\*\.parquet")


@dataclass(frozen=True)
class Unlike:
    """An artefact, or all shards of one, that is not the same in both runs.

    Parameters
    ----------
    name
        Below the results folder.
    differences
        What differs inside, as far as it could be found out.
    accepted
        Whether a tolerance covers all of it.
    """

    name: str
    differences: tuple[Difference, ...]
    accepted: bool


@dataclass(kw_only=True)
class Comparison:
    """What differs between two runs; every list is in order of its names."""

    runs: tuple[str, str]
    tolerance: float
    circumstances: list[Difference] = field(default_factory=list)
    config: list[Difference] = field(default_factory=list)
    inputs: list[Difference] = field(default_factory=list)
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    unlike: list[Unlike] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    """Artefacts that are not as the record of their run has them."""
    notes: list[str] = field(default_factory=list)
    equal: int = 0
    """Artefacts with the same bytes."""
    joined: list[str] = field(default_factory=list)
    """Shards with the same rows, cut up otherwise."""

    def differs(self, *, strict: bool = False) -> bool:
        """Whether anything but circumstances differs beyond the tolerance; `strict`: or circumstances do."""
        beyond = any(not each.accepted for each in self.unlike)
        decisive = (self.config, self.inputs, self.only_first, self.only_second)
        return beyond or any(decisive) or (strict and bool(self.circumstances))


def compare(first: str | Path, second: str | Path, *, tolerance: float = 0.0, threads: int = 1) -> Comparison:
    """Compare two runs.

    Parameters
    ----------
    first, second
        A results folder, whose files are read as they are now, or a provenance.json, whose digests are believed.
    tolerance
        Largest difference of floats that is accepted, in units of the largest magnitude in their column, tensor or
        array. Words and whole numbers have to be equal.
    threads
        Files that are read at a time.

    Raises
    ------
    UserError
        If a run is not there, or its record is damaged.
    """
    runs = open_run(first), open_run(second)
    found = Comparison(runs=(runs[0].shown, runs[1].shown), tolerance=tolerance)
    _compare_records(*runs, found)
    with ThreadPoolExecutor(threads) as pool:
        digests = runs[0].digests(pool), runs[1].digests(pool)
    for run, now in zip(runs, digests, strict=True):
        written = {name: entry["sha256"] for name, entry in run.section("artefacts").items()}
        found.changed += [
            f"{run.shown}: {name}" for name in sorted(written) if written[name] != now.get(name)
        ]
    recut = _recut_shards(*runs)
    aside = [{name for sets in recut.values() for name in sets[side]} for side in (0, 1)]
    found.only_first = sorted(runs[0].names - runs[1].names - aside[0])
    found.only_second = sorted(runs[1].names - runs[0].names - aside[1])
    for name in sorted(runs[0].names & runs[1].names):
        a, b = digests[0][name], digests[1][name]
        if a is not None and a == b:
            found.equal += 1
        else:
            found.unlike.append(_inside(runs, name, ([name], [name]), tolerance))
    for name, sets in sorted(recut.items()):
        if PARTIAL.fullmatch(name):  # sums over a shard: what is merged from them is compared
            continue
        unlike = _inside(runs, name, sets, tolerance)
        if unlike.differences:
            found.unlike.append(unlike)
        else:
            found.joined.append(name)
    return found


def _compare_records(first: Run, second: Run, found: Comparison) -> None:
    """Everything that a record has but the artefacts."""
    missing = [run.shown for run in (first, second) if run.record is None]
    if missing:
        found.notes.append(
            f"no record of {' and '.join(missing)}: versions, config and inputs are not compared"
        )
        return
    for name in ("versions", "code", "machine"):
        found.circumstances += of_values(first.section(name), second.section(name), 0, (name,))
    configs = [run.section("config").get("validated") for run in (first, second)]
    plain = [_asked(config) for config in configs]
    found.config += of_values(plain[0][0], plain[1][0], 0)
    found.circumstances += of_values(plain[0][1], plain[1][1], 0, ("config",))
    found.inputs += of_values(first.section("inputs"), second.section("inputs"), 0)
    found.inputs += of_values(first.section("sources"), second.section("sources"), 0, ("sources",))


def _asked(config: Any) -> tuple[Any, dict[str, Any]]:
    """The config without what says how to compute rather than what; and that, by itself."""
    if not isinstance(config, Mapping) or not isinstance(config.get("datasets"), Mapping):
        return config, {}
    how: dict[str, Any] = {"accelerator": config.get("accelerator"), "shards": {}}
    what = {key: value for key, value in config.items() if key not in ("accelerator", "datasets")}
    what["datasets"] = {}
    for name, dataset in config["datasets"].items():
        if isinstance(dataset, Mapping):
            how["shards"][name] = dataset.get("shards")
            dataset = {key: value for key, value in dataset.items() if key != "shards"}
        what["datasets"][name] = dataset
    return what, how


def _recut_shards(first: Run, second: Run) -> dict[str, tuple[list[str], list[str]]]:
    """Shards that both runs have whole, in other numbers: their names in order, by what is common to them."""
    sets = _shards(first), _shards(second)
    return {
        name: (sets[0][name], sets[1][name])
        for name in sorted(sets[0].keys() & sets[1].keys())
        if len(sets[0][name]) != len(sets[1][name])
    }


def _shards(run: Run) -> dict[str, list[str]]:
    """Complete sets of shards of one cut, in order; a run that has several cuts of one artefact is left as it is."""
    found: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name in run.names:
        match = SHARD.fullmatch(name)
        if match:
            place = f"{match['folder']}/*{match['suffix']}"
            found[place].append((int(match["number"]), int(match["total"]), name))
    whole = {}
    for place, parts in found.items():
        parts.sort()
        total = parts[0][1]
        if [part[:2] for part in parts] == [(number, total) for number in range(1, total + 1)]:
            whole[place] = [part[2] for part in parts]
    return whole


def _inside(runs: tuple[Run, Run], name: str, names: tuple[list[str], list[str]], tolerance: float) -> Unlike:
    """What differs between two artefacts; why not known, where the files are not there to be read."""
    if any(run.folder is None for run in runs):
        return Unlike(name, (Difference("", "not looked into: that takes both results folders"),), False)
    paths = [list(_paths(run, each)) for run, each in zip(runs, names, strict=True)]
    for run, found, wanted in zip(runs, paths, names, strict=True):
        if len(found) < len(wanted):
            text = f"not compared: in {run.shown} it is missing, leads out of the folder or is no file"
            return Unlike(name, (Difference("", text),), False)
    try:
        told = differences(paths[0], paths[1], tolerance)
    except UserError as error:
        return Unlike(name, (Difference("", f"not compared: {error}"),), False)
    if not told and len(names[0]) == len(names[1]):
        told = [Difference("", "stored otherwise, with the same content", accepted=tolerance > 0)]
    return Unlike(name, tuple(told), all(each.accepted for each in told))


def _paths(run: Run, names: list[str]) -> Iterator[Path]:
    for name in names:
        path = run.path(name)
        if path is not None:
            yield path
