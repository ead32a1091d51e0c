"""Weights on disk: config.json beside model.safetensors or pytorch_model.bin, in either published layout.

    model = checkpoints.load("models/gf", dtype=torch.float32)
    checkpoints.save(model, "models/copy", layout="te")

Names and shapes are compared with what config.json promises before anything is used; nothing is unpickled.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import atomic_path, read_json, write_json
from cellformers.models.attention import choose
from cellformers.models.bert_config import Config
from cellformers.models.geneformer import Geneformer
from cellformers.models.layouts import (
    TIED,
    assemble,
    detect,
    from_published,
    is_ignored,
    published_shapes,
    to_published,
)  # fmt: skip

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def read_config(folder: str | Path) -> Config:
    """The config of a model directory; UserError where it is missing or not a BERT encoder's."""
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise UserError("no such model directory", path=folder)
    return Config.from_dict(read_json(path), path=path)


def _check(found: Mapping[str, tuple[int, ...]], config: Config, path: Path) -> str:
    """Names and shapes against what the config promises; the layout of the file."""
    layout = detect(found)
    wanted = published_shapes(config, layout)
    tied = TIED if config.head == "masked" else {}
    for name in sorted(set(wanted) - set(found)):
        raise UserError(
            f"lacks the tensor {name}", path=path, fix=did_you_mean(name, set(found) - set(wanted))
        )
    for name, shape in found.items():
        if name not in wanted and is_ignored(name, config):
            continue
        if name not in wanted and name not in tied:
            raise UserError(
                f"has a tensor that {CONFIG_FILE} does not account for: {name} {list(shape)}", path=path,
                fix="config and weights must come from the same model, with as many layers",
            )  # fmt: skip
        expected = wanted[tied.get(name, name)]
        if shape != expected:
            raise UserError(
                f"tensor {name} is {list(shape)}, {CONFIG_FILE} promises {list(expected)}", path=path,
                fix="config and weights must come from the same model",
            )  # fmt: skip
    return layout


class Weights(NamedTuple):
    """Tensors under their published names, of one layout, complete and of the promised shapes."""

    tensors: dict[str, Tensor]
    layout: str


def read_weights(folder: str | Path, *, dtype: torch.dtype | None = None) -> Weights:
    """Read the weights of a model directory, checked against its config; `dtype` None keeps theirs.

    Raises
    ------
    UserError
        If a file is missing or broken, or a tensor is missing, extra or misshapen (it is named).
    """
    config = read_config(folder)
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise UserError("no such file", path=path, fix="a model directory holds its weights as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return _take(found, file.get_tensor, config, path, dtype)
    except SafetensorError as error:
        raise UserError(f"not readable as safetensors ({error})", path=path, fix="fetch it again") from error


def _take(
    found: Mapping[str, tuple[int, ...]], get: Callable[[str], Tensor], config: Config, path: Path,
    dtype: torch.dtype | None,
) -> Weights:  # fmt: skip
    layout = _check(found, config, path)
    tensors = {name: get(name).to(dtype=dtype) for name in published_shapes(config, layout)}
    for name, tied in TIED.items():
        if name in found and config.head == "masked" and not torch.equal(
            get(name).to(dtype=dtype), tensors[tied]
        ):  # fmt: skip
            raise UserError(f"{name} differs from {tied}", path=path, fix="a Geneformer's decoder is tied")
    return Weights(tensors, layout)


def load(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Geneformer:  # fmt: skip
    """Read a model directory of any layout and head, ready for inference; errors as `read_weights`."""
    config = read_config(folder)
    chosen = choose(backend, torch.device(device), dtype)
    weights = read_weights(folder, dtype=dtype)
    state = from_published(weights.tensors, config, layout=weights.layout)
    return assemble(config, state, backend=chosen).to(device).eval().requires_grad_(False)


def save(model: Geneformer, folder: str | Path, *, layout: str = "hf") -> None:
    """Write config.json and model.safetensors in a published layout, each whole or not at all."""
    write_json(model.config.to_dict(), Path(folder) / CONFIG_FILE)
    path = Path(folder) / WEIGHTS_FILE
    tensors = to_published(model.state_dict(), model.config, layout=layout)
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"can't be written ({error})", path=path, fix="make room") from error
