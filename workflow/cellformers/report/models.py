"""Sections about models: their shape and training, what was fine-tuned, and their outputs beside transformers'."""

import json
import math
from pathlib import Path
from typing import Any

from cellformers import plots
from cellformers.errors import UserError
from cellformers.io.files import read_json
from cellformers.report import words
from cellformers.report.figures import Figure, Figures
from cellformers.report.runs import columns
from cellformers.report.spec import ReportSpec


def models(spec: ReportSpec, figures: Figures) -> list[dict[str, Any]]:
    """One entry a model: its shape, and its training where it was trained here."""
    return [_model(name, folder, figures) for name, folder in spec.models.items()]


def _model(name: str, folder: Path, figures: Figures) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    training_file = folder / "training.json"
    training = dict(read_json(training_file)) if training_file.is_file() else {}
    finetuned = training.get("step") == "finetune"
    heldout, unigram = training.get("heldout_loss"), training.get("unigram_entropy")
    return {
        "name": name,
        "layers": config.get("num_hidden_layers"),
        "width": config.get("hidden_size"),
        "heads": config.get("num_attention_heads"),
        "context": config.get("max_position_embeddings"),
        "tokens": config.get("vocab_size"),
        "weights": _parameters(folder / "model.safetensors"),
        "origin": ("fine-tuned" if finetuned else "trained") if training else None,
        "steps": training.get("steps", training.get("parameters", {}).get("steps")),
        "cells": training.get("n_cells"),
        "seen": training.get("n_tokens"),
        "heldout": heldout,
        "unigram": unigram,
        "gain": None if heldout is None or unigram is None else unigram - heldout,
        "figure": _curve(name, folder / "loss.tsv", unigram, figures, finetuned=finetuned),
    }


def _curve(
    name: str, path: Path, unigram: float | None, figures: Figures, *, finetuned: bool
) -> Figure | None:
    """The figure of a model's training; None where it was not trained here."""
    found = columns(path, ("step", "train_loss", "heldout_loss")) if path.is_file() else {}
    if not found or not len(found["step"]):
        return None
    return figures.add(
        f"model-{name}-loss",
        f"Loss of the model {name} over training, on training and on held-out cells",
        lambda stem: plots.loss_curve(
            found["step"],
            found["train_loss"],
            found["heldout_loss"],
            stem,
            unigram_entropy=unigram,
            title=f"{words.title(name)}: loss of {'labels' if finetuned else 'masked genes'}",
        ),
    )


def classifiers(spec: ReportSpec) -> list[dict[str, Any]]:
    """One entry a task of every model that was fine-tuned here: its split, and how right it is on each side."""
    entries = []
    for name, folder in spec.models.items():
        training = read_json(folder / "training.json") if (folder / "training.json").is_file() else {}
        if training.get("step") != "finetune":
            continue
        metrics = {side: training["metrics"].get(side) or {} for side in ("heldout", "test")}
        for task in training["labels"]:
            entries.append(
                {
                    "model": name,
                    "label": task["name"],
                    "classes": len(task["classes"]),
                    "split": training["split"]["kind"],
                    "unit": training["split"].get("unit"),
                    "sides": [
                        row for side, found in metrics.items() for row in _sides(side, found, task["name"])
                    ],
                }
            )
    return entries


def _sides(side: str, found: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """Scores of one side: of cells (one task, or one among several), or of genes, pooled over cells and each once."""
    name = "held-out" if side == "heldout" else side
    if "per_gene" in found:
        parts = {f"{name}, genes in cells": found["pooled"], f"{name}, genes": found["per_gene"]}
    else:
        parts = {name: found.get(task) if task in found else found or None}
    keys = ("n", "accuracy", "macro_f1", "auc")
    return [
        {"side": part, **{key: scores.get(key) for key in keys}} for part, scores in parts.items() if scores
    ]


def verified(spec: ReportSpec) -> list[dict[str, Any]]:
    """How far the outputs of models are from those of transformers, one entry a model and backend."""
    entries = []
    for name, path in spec.verified.items():
        found = read_json(path)
        for backend, result in found["backends"].items():
            gaps = [row["max_abs"] for row in result["layers"] if row["max_abs"] is not None]
            entries.append(
                {
                    "model": name, "backend": backend, "dtype": result["dtype"], "passed": result["passed"],
                    "layers": result["layers"], "transformers": found["transformers"],
                    "cells": found["n_cells"], "tokens": found["n_tokens"],
                    "largest": max(gaps, default=None),
                }
            )  # fmt: skip
    return entries


def _parameters(weights: Path) -> int | None:
    """Number of weights, from the header of a safetensors file."""
    if not weights.is_file():
        return None
    with open(weights, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > weights.stat().st_size:
            raise UserError("not a whole safetensors file", path=weights, fix="make it again")
        header = json.loads(file.read(length))
    return sum(math.prod(t["shape"]) for k, t in header.items() if k != "__metadata__")
