"""The texts about the configuration, made from its models.

    python -m cellformers.config_docs

writes `config/README.md` and `workflow/schemas/config.schema.json`; a test fails when they drift.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cellformers.config import (
    QC,
    BenchmarkFinetune,
    CellBenchmark,
    Config,
    Corpus,
    Dataset,
    Embedding,
    Finetune,
    GeneBenchmark,
    GeneLabels,
    Labels,
    Lora,
    MixingBenchmark,
    Model,
    Pretrain,
    Published,
    Section,
    Simulate,
    VocabularySource,
)


def _type_text(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " \\| ".join(f"`{v}`" for v in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        return " or ".join(_type_text(s) for s in schema["anyOf"] if s.get("type") != "null")
    if "$ref" in schema:
        return "section"
    if schema.get("type") == "array":
        return f"list of {_type_text(schema['items'])}"
    if schema.get("type") == "object":
        return "table"
    if schema.get("format") == "path":
        return "path"
    return str(schema.get("type", "value"))


def readme() -> str:
    """The text of config/README.md: every key of every section."""
    lines = [
        "# The configuration",
        "",
        "Written by `python -m cellformers.config_docs` from the models in `workflow/cellformers/config/`; don't",
        "edit it by hand.",
        "",
        "`config.yaml` is the quickstart, `example-own-data.yaml` a template for files of your own. Paths are",
        "relative to the folder the run works in. Threads, memory and clusters are set by profiles, never here.",
    ]
    sections: list[tuple[str, type[Section]]] = [
        ("top level", Config), ("simulate", Simulate), ("datasets.NAME", Dataset), ("datasets.NAME.qc", QC),
        ("datasets.NAME.labels", Labels), ("corpora.NAME", Corpus), ("vocabularies.NAME", VocabularySource),
        ("models.NAME", Model), ("models.NAME.pretrain", Pretrain), ("models.NAME.finetune", Finetune),
        ("models.NAME.finetune.lora", Lora), ("embeddings.NAME", Embedding),
        ("benchmarks.NAME, task cells", CellBenchmark), ("benchmarks.NAME, task genes", GeneBenchmark),
        ("benchmarks.NAME, task mixing", MixingBenchmark), ("benchmarks.NAME.labels", GeneLabels),
        ("benchmarks.NAME.published", Published), ("benchmarks.NAME.finetune", BenchmarkFinetune),
    ]  # fmt: skip
    for title, model in sections:
        schema = model.model_json_schema()
        lines += ["", f"## {title}", "", (model.__doc__ or "").strip(), "", "| key | type | default | what |"]
        lines += ["| --- | --- | --- | --- |"]
        for key, field in model.model_fields.items():
            if field.is_required():
                default = "(required)"
            elif field.default_factory is not None:
                default = ""
            else:
                default = "" if field.default is None else f"`{field.default}`"
            lines.append(
                f"| `{key}` | {_type_text(schema['properties'][key])} | {default} | {field.description} |"
            )
    return "\n".join(lines) + "\n"


def schema_text() -> str:
    """The JSON schema of the configuration (draft 2020-12)."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    (root / "config" / "README.md").write_text(readme(), encoding="utf-8")
    (root / "workflow" / "schemas" / "config.schema.json").write_text(schema_text(), encoding="utf-8")
