# What the report shows, and the config it prints; what the record of a run has.
from cellformers.provenance import artefacts
from cellformers.provenance import inputs as raw_inputs


def report_inputs(wildcards):
    """Everything the report shows."""
    vocabularies = dict.fromkeys(vocabulary_of(name) for name in CONFIG.models)
    datasets = list(CONFIG.datasets)
    return {
        "cells": [f"<results>/{name}/cells.parquet" for name in datasets],
        "thresholds": [f"<results>/{name}/qc/thresholds.json" for name in datasets],
        "genes": [f"<results>/{name}/qc/genes.{v}.json" for name in datasets for v in vocabularies],
        "tokens": [
            f"<results>/{name}/tokens/{v}/{shard}.parquet"
            for name in datasets
            for v in vocabularies
            for shard in shard_names(name)
        ],
        "models": [path for name in CONFIG.models for path in model_files(name)],
        "verified": [f"<results>/models/{name}.verify.json" for name in models_by("verify")],
        "maps": [
            f"<results>/{name}/embeddings/{embedding}.map.parquet"
            for embedding in CONFIG.embeddings
            for name in datasets_of(embedding)
        ],
        "summary": "<results>/benchmarks.tsv",
    }


def score_options(wildcards, input):
    return flags(score=list(input.scores))


def resolved_config():
    """The validated config with every default filled in, as YAML."""
    return yaml.safe_dump(CONFIG.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def given_config():
    """The config as it was given, as YAML with its keys in order."""
    return yaml.safe_dump({key: value for key, value in config.items() if key != "pathvars"})


def config_root(wildcards, input):
    """The folder that paths of the config are relative to: a module's prefix, or the copy of a remote storage."""
    raw = raw_inputs(CONFIG)
    return flags(root=input.raw[0].removesuffix(raw[0]) or None) if raw else ""
