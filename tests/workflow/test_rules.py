"""The rules without running them: plans, resources, modules, mistakes in the config."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEMO = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
Run = Callable[..., subprocess.CompletedProcess[str]]
MODEL_RULES = ("pretrain_model", "embed_cells", "embed_genes")


def planned_jobs(output: str) -> dict[str, int]:
    """Rule names and numbers of jobs from the table that a dry run prints."""
    return {name: int(number) for name, number in re.findall(r"^(\w+)\s+(\d+)$", output, flags=re.MULTILINE)}


def resources_of(output: str, rule: str) -> str:
    jobs = re.split(r"\n(?=\[|(?:local)?rule )", output)
    blocks = [job for job in jobs if re.search(rf"^(local)?rule {rule}:", job, re.MULTILINE)]
    assert blocks, f"no job of rule {rule} in the plan"
    return "\n".join(re.findall(r"resources: .*", "\n".join(blocks)))


def test_dry_run_shows_every_rule(snakemake: Run, tmp_path: Path) -> None:
    done = snakemake(tmp_path, DEMO, "--dry-run")
    assert done.returncode == 0, done.stderr
    jobs = planned_jobs(done.stdout + done.stderr)
    assert jobs["tokenize"] == 3
    assert jobs["embed_cells"] == 6  # 3 shards, trained and with random weights
    assert jobs["pretrain_model"] == jobs["report"] == jobs["provenance"] == 1


def published_models() -> dict[str, Any]:
    """A config with models of every origin: checkpoints, pretrained further, fine-tuned."""
    return {
        "datasets": {"mine": {"path": "mine.h5ad", "shards": 2}, "other": {"path": "other.h5ad"}},
        "models": {
            "v2": {"checkpoint": "geneformer-v2-104m", "verify": True},
            "xlarge": {"checkpoint": "geneformer-v2-316m"},
            "further": {"pretrain": {"continue_from": "v2", "datasets": ["mine"], "steps": 10}},
            "disease": {
                "finetune": {
                    "model": "v2", "datasets": ["mine"], "label": "disease", "unit": "donor",
                    "preset": "cardiomyopathy", "lora": {"rank": 8}, "predict": ["other"],
                }
            },
            "dosage": {
                "finetune": {
                    "model": "further", "datasets": ["mine"], "task": "genes", "labels": "genes.csv",
                    "label": "dosage_sensitive", "key": "gene",
                }
            },
        },
        "embeddings": {"v2": {"model": "v2"}, "disease": {"model": "disease", "layer": 0}},
    }  # fmt: skip


PUBLISHED = yaml.safe_load((ROOT / "config" / "benchmarks.yaml").read_text())


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_the_published_benchmarks_are_planned_whole(snakemake: Run, tmp_path: Path, accelerator: str) -> None:
    """Every rule, a job a method and fold, GPUs for what computes with a model and for nothing else."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    done = snakemake(
        tmp_path, {**PUBLISHED, "accelerator": accelerator}, "--dry-run", "--verbose", "--printshellcmds"
    )
    plan = done.stdout + done.stderr
    assert done.returncode == 0, plan
    jobs = planned_jobs(plan)
    assert jobs["download_deposit"] == 7
    assert jobs["download"] == 2
    assert jobs["gene_labels"] == 7
    assert jobs["mixing"] == 2 * (4 + 3 + 1)
    assert jobs["finetune_fold_genes"] == 5 * (2 + 2 + 1 + 1)
    assert jobs["finetune_fold"] == 2 + 3 + 2 + 2
    assert {f"ingest_{name}" for name in PUBLISHED["datasets"]} <= set(jobs)
    trainings = [line for line in plan.splitlines() if "cellformers finetune " in line]
    assert len(trainings) == jobs["finetune_fold_genes"] + jobs["finetune_fold"]
    for line in trainings:  # layers with random weights are not frozen
        assert ("--freeze-layers 0" in line) == ("/v1-random/" in line)
    for rule in ("finetune_fold", "finetune_fold_genes", "embed_cells", "embed_genes"):
        assert ("gpu=1" in resources_of(plan, rule)) == (accelerator == "cuda")
    for rule in ("download_deposit", "gene_labels", "split", "evaluate", "mixing"):
        assert "gpu" not in resources_of(plan, rule)


def test_a_split_that_is_not_there_is_told_before_anything_runs(snakemake: Run, tmp_path: Path) -> None:
    done = snakemake(tmp_path, PUBLISHED, "--dry-run")  # in a folder without config/splits
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "config/splits/cardiomyopathy.json" in said
    assert "Traceback" not in said


@pytest.fixture
def own_files(tmp_path: Path) -> Path:
    for name in ("mine.h5ad", "other.h5ad", "genes.csv"):
        (tmp_path / name).touch()
    return tmp_path


def test_models_of_every_origin_are_planned(snakemake: Run, own_files: Path) -> None:
    done = snakemake(own_files, published_models(), "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    plan = done.stdout + done.stderr
    jobs = planned_jobs(plan)
    assert jobs["download"] == 2
    assert jobs["tokenize"] == 3, "all models read one vocabulary: every shard is tokenized once"
    assert (jobs["pretrain_model"], jobs["finetune_model"], jobs["predict"], jobs["verify"]) == (1, 2, 1, 1)
    assert "vocabulary" not in jobs, "the vocabulary comes with the checkpoint"
    assert "results/models/v2/vocabulary/tokens.parquet" in plan
    assert "results/mine/tokens/gc104M/0002-of-0002.parquet" in plan


@pytest.mark.parametrize(
    ("target", "there", "absent"),
    [
        ("pretrain", {"pretrain_model": 1, "download": 1}, ("finetune_model", "embed_cells", "report")),
        ("finetune", {"finetune_model": 2, "predict": 1}, ("embed_cells", "report")),
        ("embed", {"embed_cells": 6, "gather": 4}, ("report", "embed_genes", "predict")),
        ("models", {"download": 2, "finetune_model": 2}, ("embed_cells", "predict")),
    ],
)
def test_targets_plan_what_they_name(
    snakemake: Run, own_files: Path, target: str, there: dict[str, int], absent: tuple[str, ...]
) -> None:
    done = snakemake(own_files, published_models(), "--dry-run", target)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = planned_jobs(done.stdout + done.stderr)
    assert {name: jobs.get(name) for name in there} == there
    assert not set(absent) & set(jobs)


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_gpu_resources_only_where_asked_for(snakemake: Run, tmp_path: Path, accelerator: str) -> None:
    done = snakemake(tmp_path, {**DEMO, "accelerator": accelerator}, "--dry-run", "--verbose")
    assert done.returncode == 0, done.stderr
    plan = done.stdout + done.stderr
    for rule in MODEL_RULES:
        assert ("gpu=1" in resources_of(plan, rule)) == (accelerator == "cuda")
        assert ("gpu_manufacturer=nvidia" in resources_of(plan, rule)) == (accelerator == "cuda")
    for rule in ("tokenize", "gather", "qc", "sketch"):
        assert "gpu" not in resources_of(plan, rule)


def test_more_shards_make_more_jobs(snakemake: Run, tmp_path: Path) -> None:
    datasets = {**DEMO["datasets"], "atlas": {**DEMO["datasets"]["atlas"], "shards": 7}}
    done = snakemake(tmp_path, {**DEMO, "datasets": datasets}, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert planned_jobs(done.stdout + done.stderr)["tokenize"] == 8


def test_another_installation_in_front_is_told(
    snakemake: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Path(sys.executable).parent
    other = tmp_path / "other" / "cellformers"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    for folder, told in ((other.parent, True), (beside, False)):
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        planned = snakemake(tmp_path / "run", DEMO, "--dry-run", "tokens")
        assert planned.returncode == 0, planned.stderr
        assert (f"Rules call {other}" in planned.stdout + planned.stderr) == told


def test_misspelt_key_is_named(snakemake: Run, tmp_path: Path) -> None:
    done = snakemake(tmp_path, {**DEMO, "embedings": {}}, "--dry-run")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "unknown key 'embedings'; did you mean 'embeddings'?" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("prefix", [None, "sub"])
def test_used_as_a_module(snakemake: Run, tmp_path: Path, prefix: str | None) -> None:
    outer = tmp_path / "Snakefile"
    prefix_line = f'    prefix: "{prefix}"\n' if prefix else ""
    outer.write_text(
        f'configfile: "config.yaml"\nmodule cells:\n    snakefile: "{ROOT / "Snakefile"}"\n    config: config\n'
        f"{prefix_line}use rule * from cells as cells_*\n"
        "rule all:\n    default_target: True\n    input: rules.cells_all.input\n"
    )
    done = snakemake(tmp_path, DEMO, "--dry-run", snakefile=outer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{prefix}/results/report.html" if prefix else "results/report.html" in done.stdout + done.stderr


def test_every_rule_has_log_benchmark_and_environment() -> None:
    for path in sorted((ROOT / "workflow" / "rules").glob("*.smk")):
        text = path.read_text()
        for name, body in re.findall(
            r"^(?:    )?rule ?(\w*):\n(.*?)(?=^(?:    )?rule|\Z)", text, re.DOTALL | re.MULTILINE
        ):
            if path.name == "targets.smk":
                assert "shell:" not in body, "targets only name files"
                continue
            for directive in ("log:", "benchmark:", "conda:", "threads:", "mem_mb=", "runtime=", "revision="):
                assert directive in body, f"{path.name}: rule {name or '(ingest)'} lacks {directive}"


def test_snakefile_stays_a_table_of_contents() -> None:
    assert len((ROOT / "Snakefile").read_text().splitlines()) < 50
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        assert len(path.read_text().splitlines()) <= 150, path.name
