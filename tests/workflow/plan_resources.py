"""What every rule and job asks for, under several command lines of Snakemake, as JSON.

Run: python tests/workflow/plan_resources.py < RUNS.json > PLANS.json

RUNS.json: {name: [arguments of snakemake]}, dry runs. PLANS.json: {"options": [all options of Snakemake and of the
plugins], "plans": {name: {"status": 0, "rules": {rule: [resources of an empty input, of the same at the second attempt,
of 10 GB]}, "jobs": {rule: [resources of each planned job]}, "scores": {method: resources of its score in the benchmark
"cells", of 10 GB}}}}. One process for all, because starting Snakemake takes longer than planning.
"""

import contextlib
import json
import sys
from types import SimpleNamespace
from typing import Any

from snakemake.cli import get_argument_parser, main
from snakemake.iocontainers import Wildcards
from snakemake.workflow import Workflow

LARGE = 10_240
CASES = [(0, 1), (0, 2), (LARGE, 1)]  # MB of input, attempt
METHODS = ("v1", "log_counts", "harmony")
execute = Workflow.execute
plan: dict[str, Any] = {}


def asked(resources: Any) -> dict[str, Any]:
    return {name: value for name, value in resources.items() if name not in ("_nodes", "tmpdir")}


def watched(self: Workflow, *args: Any, **kwargs: Any) -> None:
    """Plan as usual; before, ask every rule, and after, every planned job."""
    for rule in self.rules:
        plan["rules"][rule.name] = [
            asked(rule.expand_resources({}, SimpleNamespace(size_mb=size), attempt))
            for size, attempt in CASES
        ]
    for method in METHODS:
        wildcards = Wildcards(fromdict={"benchmark": "cells", "method": method})
        rule, large = self.get_rule("evaluate"), SimpleNamespace(size_mb=LARGE)
        plan["scores"][method] = asked(rule.expand_resources(wildcards, large, 1))
    execute(self, *args, **kwargs)
    for job in self._dag.jobs:
        plan["jobs"].setdefault(job.rule.name, []).append(asked(job.resources))


def run(arguments: list[str]) -> dict[str, Any]:
    plan.update(rules={}, jobs={}, scores={})
    status: Any = 0
    try:
        main(arguments)
    except SystemExit as end:
        status = end.code or 0
    return {"status": status, **plan}


if __name__ == "__main__":
    Workflow.execute = watched
    with contextlib.redirect_stdout(sys.stderr):
        plans = {name: run(arguments) for name, arguments in json.load(sys.stdin).items()}
    options = [word for action in get_argument_parser()._actions for word in action.option_strings]
    json.dump({"options": options, "plans": plans}, sys.stdout, default=str)
