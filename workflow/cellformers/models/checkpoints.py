"""Weights on disk, of any published layout and kind of file, checked against the config.json beside them.

    model = checkpoints.load("models/gf", dtype=torch.float32)
    checkpoints.save(model, "models/copy", layout="te")

Names, shapes and values are compared with what config.json promises before anything is used; no code in a file is
run. A model directory of this package holds config.json and model.safetensors; see `weight_files` for what else is
read.
"""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import read_json, write_json
from cellformers.models.attention import choose
from cellformers.models.bert_config import Config, for_layout
from cellformers.models.geneformer import Geneformer
from cellformers.models.layouts import (
    ENCODER,
    assemble,
    detect,
    from_published,
    is_ignored,
    published_shapes,
    tied_tensors,
    to_published,
)  # fmt: skip
from cellformers.models.weight_files import WEIGHTS_FILE, Tensors, open_tensors, write_tensors

CONFIG_FILE = "config.json"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Weights(NamedTuple):
    """Tensors under their published names, of one layout, complete and of the promised shapes.

    `unused` are a pooler's, which a file may hold though the network has no place for it.
    """

    tensors: dict[str, Tensor]
    layout: str
    unused: dict[str, Tensor]


def read_config(folder: str | Path) -> Config:
    """The config of a model directory; UserError where it is missing or not a BERT encoder's."""
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise UserError("no such model directory", path=folder)
    return Config.from_dict(read_json(path), path=path)


def read_weights(folder: str | Path, *, dtype: torch.dtype | None = None) -> Weights:
    """Read the weights of a model directory, checked against its config; `dtype` None keeps theirs.

    Raises
    ------
    UserError
        If a file is missing or broken, or a tensor is missing, extra, misshapen or not finite (it is named).
    """
    config = read_config(folder)
    with open_tensors(folder) as stored:
        tensors = _with_prefix(stored, config)
        layout = _check(tensors, config)
        unused = [name for name in tensors.shapes if ".pooler." in f".{name}" and is_ignored(name, config)]
        read = {name: _take(tensors, name, dtype) for name in (*published_shapes(config, layout), *unused)}
        for name, tied in tied_tensors(config).items():
            if name in tensors.shapes:
                twin = tensors.get(name)
                if not torch.equal(twin, tensors.get(tied).to(twin.dtype)):
                    raise UserError(
                        f"{name} differs from {tied}", path=tensors.path, fix="a Geneformer's decoder is tied"
                    )
        return Weights(read, layout, {name: read.pop(name) for name in unused})


def _with_prefix(stored: Tensors, config: Config) -> Tensors:
    """The same tensors with the names of an encoder's parts as the class of the config has them.

    A bare encoder is saved without "bert." before the names, or with it when it was cut from a larger model.
    """
    if config.head != "none":
        return stored
    given = {name.removeprefix(ENCODER): name for name in stored.shapes}
    if len(given) < len(stored.shapes):
        raise UserError(f"holds tensors with and without {ENCODER!r} before one name", path=stored.path)
    shapes = {name: stored.shapes[old] for name, old in given.items()}
    return Tensors(stored.path, shapes, lambda name: stored.get(given[name]))


def _check(found: Tensors, config: Config) -> str:
    """Names and shapes against what the config promises; the layout of the file."""
    layout = detect(found.shapes)
    wanted = published_shapes(config, layout)
    tied = tied_tensors(config)
    extra = [
        name
        for name in found.shapes
        if name not in wanted and name not in tied and not is_ignored(name, config)
    ]
    missing = sorted(set(wanted) - set(found.shapes))
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(f"lacks the tensor {missing[0]}{others}", path=found.path, fix=_hint(missing, extra))
    if extra:
        raise UserError(
            f"has a tensor that {CONFIG_FILE} does not account for: {extra[0]} {list(found.shapes[extra[0]])}",
            path=found.path, fix="config and weights must come from the same model, with as many layers",
        )  # fmt: skip
    for name, shape in found.shapes.items():
        expected = wanted.get(tied.get(name, name), shape)
        if shape != expected:
            raise UserError(
                f"tensor {name} is {list(shape)}, {CONFIG_FILE} promises {list(expected)}", path=found.path,
                fix="config and weights must come from the same model",
            )  # fmt: skip
    return layout


def _hint(missing: list[str], extra: Collection[str]) -> str:
    """What may be the matter with a file that lacks tensors."""
    if any(".layernorm_qkv." in name for name in extra):
        return "these are layers that normalise before attention, another architecture than Geneformer's"
    if any(name.startswith("embeddings.") for name in extra):
        return f"these are the names of a bare encoder: name BertModel in architectures of {CONFIG_FILE}"
    for name in missing:
        for other in extra:
            if other.endswith("." + name):
                return f"there is {other}: take {other.removesuffix(name)!r} off such names"
            if name.endswith("." + other):
                return f"there is {other}: put {name.removesuffix(other)!r} before such names"
    if all(name.startswith("cls.") for name in missing) and not extra:
        return f"without the masked-gene head, name BertModel in architectures of {CONFIG_FILE}"
    return did_you_mean(missing[0], extra) if extra else "the file is not complete: fetch or make it again"


def _take(stored: Tensors, name: str, dtype: torch.dtype | None) -> Tensor:
    """Read a tensor in `dtype` (None: its own), all of it finite numbers."""
    tensor = stored.get(name)
    if tensor.dtype not in DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"tensor {name} is of {kind}", path=stored.path, fix="weights are float32, float16 or bfloat16"
        )
    tensor = tensor.to(dtype=dtype).contiguous()
    if not bool(torch.stack(torch.aminmax(tensor)).isfinite().all()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"tensor {name} has values that are no finite numbers in {kind}", path=stored.path,
            fix="the file is damaged, or its training diverged; fetch or train it again",
        )  # fmt: skip
    return tensor


def load(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    backend: str = "auto", fp8: bool = False,
) -> Geneformer:  # fmt: skip
    """Read a model directory of any layout and head, ready for inference; errors as `read_weights`.

    `backend` and `fp8` as in `attention.choose`.
    """
    config = read_config(folder)
    chosen = choose(backend, torch.device(device), dtype, fp8=fp8)
    weights = read_weights(folder, dtype=dtype)
    state = from_published(weights.tensors, config, layout=weights.layout)
    return assemble(config, state, backend=chosen, fp8=fp8).to(device).eval().requires_grad_(False)


def save(model: Geneformer, folder: str | Path, *, layout: str = "hf") -> None:
    """Write config.json and model.safetensors in a published layout, each whole or not at all."""
    write_json(for_layout(model.config.to_dict(), layout), Path(folder) / CONFIG_FILE)
    tensors = to_published(model.state_dict(), model.config, layout=layout)
    write_tensors(tensors, Path(folder) / WEIGHTS_FILE)
