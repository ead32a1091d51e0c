"""The profiles of the executors: what they may hold, and what every rule asks for under each. Nothing runs.

A profile whose plugin is not installed is checked but for the plugin's own options. Plugins that want other packages
than envs/constraints.txt pins lie in folders apart, which CELLFORMERS_PLUGINS names (`make test` does it):

    pip install --no-deps --target .venv/executors -r envs/executors.txt
    CELLFORMERS_PLUGINS=.venv/executors pytest tests/workflow/test_profiles.py
"""

import importlib.machinery
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
APART = list(filter(None, os.environ.get("CELLFORMERS_PLUGINS", "").split(os.pathsep)))
PROFILES = ("default", "slurm", "kubernetes", "googlebatch", "aws-batch", "htcondor", "lsf")
GPU_RULES = {
    "pretrain_model", "finetune_model", "predict", "verify", "embed_cells", "embed_genes", "finetune_fold",
    "finetune_fold_genes",
}  # fmt: skip
TARGETS = {"all", "tokens", "models", "pretrain", "finetune", "embed"}

STORAGE = ["--default-storage-provider", "fs", "--default-storage-prefix", "{folder}/storage"]
PLACEHOLDERS = {
    "kubernetes": STORAGE,
    "googlebatch": [*STORAGE, "--googlebatch-project", "p", "--googlebatch-region", "r"],
    "aws-batch": [
        *STORAGE, "--aws-batch-region", "r", "--aws-batch-job-queue", "q", "--aws-batch-job-role", "j"
    ],
}  # fmt: skip
SITE = {
    "default-resources": {"slurm_partition": "day", "slurm_account": "lab", "lsf_extra": "-app lab"},
    "set-resources": {"gather": {"site_scratch": 7}},
}

# what an executor reads beside the resources that every rule states, from those
SPELLED = {
    "googlebatch": {
        "nvidia_gpu": lambda asked: asked.get("gpu"),
        "googlebatch_cpu_milli": lambda asked: 1000 * asked["_cores"],
        "googlebatch_memory": lambda asked: asked["mem_mb"],
        "googlebatch_max_run_duration": lambda asked: f"{60 * asked['runtime']}s",
    },
    "aws-batch": {"_gpus": lambda asked: asked.get("gpu")},
    "htcondor": {
        "request_gpus": lambda asked: asked.get("gpu"),
        "htcondor_request_mem_mb": lambda asked: asked["mem_mb"],
        "allowed_execute_duration": lambda asked: 60 * asked["runtime"],
    },
    "lsf": {"lsf_extra": lambda asked: f"-gpu num={asked['gpu']}" if "gpu" in asked else None},
}
STANDARD = {"_cores", "mem_mb", "mem", "mem_mib", "runtime", "gpu", "gpu_manufacturer"}
IMPLIED = {"disk_mb", "disk", "disk_mib"}  # Snakemake's own defaults for what runs elsewhere


def config(accelerator: str) -> dict[str, Any]:
    """Every rule that computes with a model, on simulated cells."""
    cells = {"task": "cells", "train": ["atlas"], "label": "cell_type", "unit": "donor"}
    tuned = {"models": ["v1"]}
    return {
        "accelerator": accelerator,
        "datasets": {"atlas": {"simulated": "atlas", "shards": 2, "label": "cell_type", "batch": "donor"}},
        "models": {
            "v1": {"checkpoint": "geneformer-v1-10m", "verify": True},
            "more": {"pretrain": {"continue_from": "v1", "datasets": ["atlas"], "steps": 10}},
            "types": {
                "finetune": {"model": "v1", "datasets": ["atlas"], "label": "cell_type", "predict": ["atlas"]}
            },
        },
        "embeddings": {"v1": {"model": "v1"}},
        "benchmarks": {
            "cells": {**cells, "finetune": tuned},
            "genes": {
                "task": "genes",
                "dataset": "atlas",
                "labels": {"simulated": True},
                "finetune": tuned,
            },
        },
    }


def content(profile: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "profiles" / profile / "profile.yaml").read_text())


def plugin(profile: str) -> str | None:
    executor = content(profile).get("executor")
    return f"snakemake_executor_plugin_{executor.replace('-', '_')}" if executor else None


def installed(profile: str) -> bool:
    name = plugin(profile)
    return name is None or importlib.machinery.PathFinder.find_spec(name, [*APART, *sys.path]) is not None


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(APART)} if APART else dict(os.environ)


def arguments(profile: str, folder: Path, *more: str, accelerator: str = "cuda") -> list[str]:
    """A dry run through a profile; without its plugin, through what of the profile is Snakemake's own."""
    used = ROOT / "profiles" / profile
    places = PLACEHOLDERS.get(profile, [])
    if not installed(profile):
        own = content(profile)
        executor = own.pop("executor")
        used = folder / f"{profile}.yaml"
        kept = {key: value for key, value in own.items() if not key.startswith(executor)}
        used.write_text(yaml.safe_dump(kept))
        places = []
    return [
        "--snakefile", str(ROOT / "Snakefile"), "--directory", str(folder), "--dry-run", "--quiet", "all",
        "--cores", "8",
        "--configfile", str(folder / f"{accelerator}.yaml"), "--workflow-profile", str(used),
        *[word.format(folder=folder) for word in places], *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What plan_resources.py says of every profile and case."""
    folder = tmp_path_factory.mktemp("profiles")
    for accelerator in ("cpu", "cuda"):
        (folder / f"{accelerator}.yaml").write_text(yaml.safe_dump(config(accelerator)))
    (folder / "site").mkdir()
    (folder / "site" / "profile.yaml").write_text(yaml.safe_dump(SITE))
    runs = {}
    for profile in PROFILES:
        runs[f"{profile} cpu"] = arguments(profile, folder, accelerator="cpu")
        runs[f"{profile} cuda"] = arguments(profile, folder)
        runs[f"{profile} site"] = arguments(profile, folder, "--profile", str(folder / "site"))
        four = ["pretrain_model:gpu=4", "embed_genes:gpu=None"]
        runs[f"{profile} four"] = arguments(profile, folder, "--set-resources", *four)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("plan_resources.py"))],
        input=json.dumps(runs), capture_output=True, text=True, timeout=600, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    failed = [name for name, plan in found["plans"].items() if plan["status"] != 0]
    assert not failed, f"{failed}\n{done.stderr[-3000:]}"
    return found


@pytest.fixture(scope="module")
def plans(planned: dict[str, Any]) -> dict[str, Any]:
    """What rules and jobs ask for, by profile and case."""
    return planned["plans"]


def gpu_words(asked: dict[str, Any]) -> set[str]:
    named = {name for name in asked if "gpu" in name or name == "gres"}
    return named | {name for name, value in asked.items() if "gpu" in str(value)}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_holds_nothing_of_a_site_and_nothing_that_hides_a_sites_own(profile: str) -> None:
    held = content(profile)
    hiding = {"default-resources", "set-threads", "set-resources", "config", "configfile", "resources"}
    assert not hiding & set(held)
    names = ("account", "partition", "queue", "project", "region", "prefix", "image", "qos", "namespace")
    assert not [key for key in held if key.endswith(names)]
    assert held["rerun-incomplete"] is held["show-failed-logs"] is True
    assert held["scheduler"] == "greedy"
    if profile != "default":
        assert held["retries"] >= 1
        assert held["jobs"] >= 1
        assert held["latency-wait"] >= 30
        assert held["executor"] == profile


@pytest.mark.parametrize("profile", PROFILES)
def test_every_key_of_a_profile_is_an_option(profile: str, planned: dict[str, Any]) -> None:
    if not installed(profile):
        pytest.skip(f"{plugin(profile)} is not installed, it names the options")
    assert {f"--{key}" for key in content(profile)} <= set(planned["options"])


@pytest.mark.parametrize("case", ["cpu", "cuda", "site", "four"])
@pytest.mark.parametrize("profile", PROFILES)
def test_rules_ask_in_the_words_of_the_executor(plans: dict[str, Any], profile: str, case: str) -> None:
    words = SPELLED.get(profile, {})
    rules = plans[f"{profile} {case}"]["rules"]
    assert set(rules) > GPU_RULES | TARGETS
    for rule in set(rules) - TARGETS:
        for asked in rules[rule]:
            assert asked["_cores"] >= 1
            assert asked["mem_mb"] >= 500
            assert asked["runtime"] >= 5
            expected = {word: spell(asked) for word, spell in words.items()}
            if case == "site":  # a site's own words stay, in front of the rule's
                own = SITE["default-resources"] | ({"site_scratch": 7} if rule == "gather" else {})
                joined = [own["lsf_extra"], expected.get("lsf_extra")]
                expected |= own | {"lsf_extra": " ".join(word for word in joined if word)}
            expected = {word: value for word, value in expected.items() if value is not None}
            assert {
                word: value for word, value in asked.items() if word not in STANDARD | IMPLIED
            } == expected


@pytest.mark.parametrize("profile", PROFILES)
def test_gpus_for_what_computes_with_a_model_and_nothing_else(plans: dict[str, Any], profile: str) -> None:
    spelled = {word for word in SPELLED.get(profile, {}) if "gpu" in word or word == "lsf_extra"}
    for rule, cases in plans[f"{profile} cuda"]["rules"].items():
        for asked in [*cases, *plans[f"{profile} cuda"]["jobs"].get(rule, [])]:
            expected = {"gpu", "gpu_manufacturer", *spelled} if rule in GPU_RULES else set()
            assert gpu_words(asked) == expected, rule
            assert asked.get("gpu") == (1 if rule in GPU_RULES else None)
            assert asked.get("gpu_manufacturer") == ("nvidia" if rule in GPU_RULES else None)
    for cases in plans[f"{profile} cpu"]["rules"].values():
        assert not set().union(*map(gpu_words, cases)), (
            "a GPU resource, even 0, is a request to some executors"
        )
    jobs = plans[f"{profile} cuda"]["jobs"]
    assert GPU_RULES & set(jobs) == GPU_RULES, "every one of them is planned"


@pytest.mark.parametrize("profile", PROFILES)
def test_several_gpus_and_none_are_followed(plans: dict[str, Any], profile: str) -> None:
    rules = plans[f"{profile} four"]["rules"]
    assert rules["pretrain_model"][0]["gpu"] == 4
    assert rules["embed_cells"][0]["gpu"] == 1
    for word in SPELLED.get(profile, {}):
        if "gpu" in word:
            assert rules["pretrain_model"][0][word] == 4
            assert rules["embed_cells"][0][word] == 1
            assert word not in rules["embed_genes"][0]
        if word == "lsf_extra":
            assert rules["pretrain_model"][0][word] == "-gpu num=4"
            assert word not in rules["embed_genes"][0]


def test_memory_and_time_double_at_a_retry_and_grow_with_the_input(plans: dict[str, Any]) -> None:
    rules = plans["slurm cuda"]["rules"]
    for rule in set(rules) - TARGETS:
        first, second, large = rules[rule]
        assert second["mem_mb"] == 2 * first["mem_mb"], rule
        assert second["runtime"] == 2 * first["runtime"], rule
        assert second["_cores"] == first["_cores"], rule
        assert large["mem_mb"] >= first["mem_mb"], rule
    assert rules["tokenize"][0]["_cores"] == rules["embed_cells"][0]["_cores"] == 2
    for rule in ("embed_cells", "pretrain_model", "qc", "evaluate", "gather_genes", "map"):
        assert rules[rule][2]["mem_mb"] > rules[rule][0]["mem_mb"], rule
    for rule in ("embed_cells", "tokenize", "ingest_atlas", "sketch", "evaluate", "predict"):
        assert rules[rule][2]["runtime"] > rules[rule][0]["runtime"], rule


def test_what_learns_from_some_of_many_cells_asks_for_no_more_than_it_takes(plans: dict[str, Any]) -> None:
    needed = {method: asked["mem_mb"] for method, asked in plans["slurm cpu"]["scores"].items()}
    assert needed["v1"] == needed["log_counts"] == 8000
    assert needed["harmony"] > 200_000, "it holds all"


@pytest.mark.parametrize("profile", ["kubernetes", "googlebatch", "aws-batch"])
def test_what_a_site_must_name_is_asked_for(profile: str, plans: dict[str, Any], tmp_path: Path) -> None:
    """Without storage these executors can't run; Snakemake says so before anything starts."""
    if not installed(profile):
        pytest.skip(f"{plugin(profile)} is not installed")
    (tmp_path / "cuda.yaml").write_text(yaml.safe_dump(config("cuda")))
    words = arguments(profile, tmp_path)
    words = words[: words.index("--default-storage-provider")]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *words], capture_output=True, text=True, timeout=300, check=False,
        env=environment(),
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "storage" in said or "required" in said or "must be" in said.lower(), said
