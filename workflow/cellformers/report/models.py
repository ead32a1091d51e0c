"""Sections about models: their shape and training, what was fine-tuned, and their outputs beside transformers'."""

import json
import math
import operator
from pathlib import Path
from typing import Any

from cellformers import plots
from cellformers.errors import UserError
from cellformers.io.files import read_json, whole
from cellformers.report import fields, words
from cellformers.report.figures import Figure, Figures
from cellformers.report.runs import columns
from cellformers.report.spec import ReportSpec

SHAPE = {  # what the report calls a field of config.json
    "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
    "context": "max_position_embeddings", "tokens": "vocab_size",
}  # fmt: skip
GAPS = ("max_abs", "mean_abs", "scale")
LARGEST_HEADER = 100 << 20  # of a safetensors file, in bytes; the library has the same bound


def models(spec: ReportSpec, figures: Figures) -> list[dict[str, Any]]:
    """One entry a model: its shape, and its training where it was trained here."""
    return [_model(name, folder, figures) for name, folder in spec.models.items()]


def _model(name: str, folder: Path, figures: Figures) -> dict[str, Any]:
    path = folder / "config.json"
    config = read_json(path)
    with whole(path):
        shape = {key: fields.count(config, field) for key, field in SHAPE.items()}
    training = _training(folder)
    heldout, unigram, finetuned = training["heldout"], training["unigram"], training["origin"] == "fine-tuned"
    return {
        "name": name,
        **shape,
        "weights": _parameters(folder / "model.safetensors"),
        **training,
        "gain": None if heldout is None or unigram is None else unigram - heldout,
        "figure": _curve(name, folder / "loss.tsv", unigram, figures, finetuned=finetuned),
    }


def _read_training(path: Path) -> Any:
    return read_json(path) if path.is_file() else {}


def _training(folder: Path) -> dict[str, Any]:
    """What training.json says of a model; all None where it was not trained here."""
    path = folder / "training.json"
    found = _read_training(path)
    with whole(path):
        steps = fields.count(found, "steps")
        finetuned = fields.text(found, "step") == "finetune"
        return {
            "origin": ("fine-tuned" if finetuned else "trained") if found else None,
            "steps": fields.count(fields.part(found, "parameters"), "steps") if steps is None else steps,
            "cells": fields.count(found, "n_cells"),
            "seen": fields.count(found, "n_tokens"),
            "heldout": fields.number(found, "heldout_loss"),
            "unigram": fields.number(found, "unigram_entropy"),
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
        path = folder / "training.json"
        training = _read_training(path)
        with whole(path):
            if fields.text(training, "step") == "finetune":
                entries += [{"model": name, **task} for task in _tasks(training)]
    return entries


def _tasks(training: dict[str, Any]) -> list[dict[str, Any]]:
    metrics, split = fields.part(training, "metrics"), fields.part(training, "split")
    return [
        {
            "label": fields.text(task, "name"),
            "classes": len(fields.items(task, "classes")),
            "split": fields.text(split, "kind"),
            "unit": fields.text(split, "unit"),
            "sides": [
                row
                for side in ("heldout", "test")
                for row in _sides(side, fields.part(metrics, side), fields.text(task, "name") or "")
            ],
        }
        for task in fields.items(training, "labels")
    ]


def _sides(side: str, found: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """Scores of one side: of cells (one task, or one among several), or of genes, pooled over cells and each once."""
    name = "held-out" if side == "heldout" else side
    if "per_gene" in found:
        cells, genes = fields.part(found, "pooled"), fields.part(found, "per_gene")
        parts = {f"{name}, genes in cells": cells, f"{name}, genes": genes}
    else:
        parts = {name: fields.part(found, task) if task in found else found}
    return [
        {
            "side": side, "n": fields.count(scores, "n"),
            **{key: fields.number(scores, key) for key in ("accuracy", "macro_f1", "auc")},
        }
        for side, scores in parts.items() if scores
    ]  # fmt: skip


def verified(spec: ReportSpec) -> list[dict[str, Any]]:
    """How far the outputs of models are from those of transformers, one entry a model and backend."""
    entries = []
    for name, path in spec.verified.items():
        found = read_json(path)
        with whole(path):
            backends = fields.part(found, "backends")
            for backend in backends:
                result = fields.part(backends, backend)
                rows = [
                    {"layer": str(row["layer"]), **{key: fields.number(row, key) for key in GAPS}}
                    for row in fields.items(result, "layers")
                ]
                gaps = [row["max_abs"] for row in rows if row["max_abs"] is not None]
                entries.append(
                    {
                        "model": name, "backend": backend, "dtype": fields.text(result, "dtype"),
                        "passed": result["passed"] is True, "layers": rows,
                        "transformers": fields.text(found, "transformers"),
                        "cells": fields.count(found, "n_cells"), "tokens": fields.count(found, "n_tokens"),
                        "largest": max(gaps, default=None),
                    }
                )  # fmt: skip
    return entries


def _parameters(weights: Path) -> int | None:
    """Number of weights, from the header of a safetensors file."""
    if not weights.is_file():
        return None
    with open(weights, "rb") as file, whole(weights):
        length = int.from_bytes(file.read(8), "little")
        if length > min(weights.stat().st_size, LARGEST_HEADER):
            raise UserError("not a whole safetensors file", path=weights, fix="make it again")
        header = json.loads(file.read(length))
        shapes = [fields.items(header[name], "shape") for name in header if name != "__metadata__"]
        return fields.count(
            {"weights": sum(math.prod(map(operator.index, shape)) for shape in shapes)}, "weights"
        )
