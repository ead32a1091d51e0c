# What the report shows, and the config it prints.


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
