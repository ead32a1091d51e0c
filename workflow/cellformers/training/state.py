"""The state of an unfinished training, so that an interrupted one goes on where it was.

    save_state(work, step=500, network_state=network.state_dict(), optimizer=optimizer, extra={}, settings=settings)
    state = load_state(work, settings=settings)

A state is one safetensors file: weights, the moments of the optimiser, and the rest as JSON in its header. States
of one set of settings share a folder named after a digest of them, so a training with other settings neither
takes nor overwrites them. Learning rates and the like belong to the settings and are not restored.
"""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cellformers.io.files import atomic_path

KEPT = 2  # should the last one be damaged, the one before it is there
_NETWORK, _OPTIMIZER = "network/", "optimizer/"


class State(NamedTuple):
    """Where a training was."""

    step: int
    """Optimiser steps taken."""
    network: dict[str, Tensor]
    """Tensors as they were given, on the host."""
    optimizer: dict[int, dict[str, Tensor]]
    """Moments of each parameter, by its number in the optimiser."""
    extra: dict[str, Any]
    """What else was given."""


def _folder(folder: str | Path, settings: Mapping[str, Any]) -> Path:
    text = json.dumps(settings, sort_keys=True)
    return Path(folder) / f"states-{sha256(text.encode()).hexdigest()[:16]}"


def _files(folder: Path) -> list[Path]:
    """States, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def save_state(
    folder: str | Path,
    *,
    step: int,
    network_state: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    extra: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Path:
    """Write a state, whole or not at all, and remove all but the last two of these settings; its file.

    `network_state` may hold any tensors that don't share memory; `extra` and `settings` what JSON can express, with
    finite numbers. `settings` is everything that decides what the training gives, digests of inputs included.
    UserError where the disk is full.
    """
    target = _folder(folder, settings)
    tensors = {_NETWORK + name: tensor for name, tensor in network_state.items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{number}/{name}": tensor for name, tensor in moments.items()}
    header = {"step": step, "extra": dict(extra), "settings": dict(settings)}
    path = target / f"step-{step:012d}.safetensors"
    with atomic_path(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary, metadata={"state": json.dumps(header, allow_nan=False)},
        )  # fmt: skip
    for old in _files(target)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def load_state(
    folder: str | Path, *, settings: Mapping[str, Any], note: Callable[[str], None] | None = None
) -> State | None:
    """The newest readable state of a training with these settings, None where there is none.

    `note` is told of a damaged state, and of states of other settings, which are passed over.
    """
    note = note or (lambda _: None)
    own = _folder(folder, settings)
    for path in _files(own):
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            note(f"{path}: damaged ({error}), passed over")
    for path in sorted(Path(folder).glob("states-*/step-*.safetensors"), reverse=True):
        if path.parent != own:
            note(f"{path.parent}: {_difference(path, settings)}; starting anew")
            break
    return None


def has_state(folder: str | Path) -> bool:
    """Whether there is a state of any settings."""
    return any(Path(folder).glob("states-*/step-*.safetensors"))


def restore_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Put the moments of a state into an optimiser of the same parameters in the same order."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state.optimizer, "param_groups": groups})


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads((file.metadata() or {})["state"])
    kinds = {"step": int, "extra": dict, "settings": dict}
    if not isinstance(header, dict) or not all(isinstance(header.get(k), kind) for k, kind in kinds.items()):
        raise ValueError("it is no state of a training")
    return header


def _read(path: Path) -> State:
    header = _header(path)
    network: dict[str, Tensor] = {}
    moments: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith(_NETWORK):
                network[name.removeprefix(_NETWORK)] = file.get_tensor(name)
            else:
                _, number, moment = name.split("/")
                moments.setdefault(int(number), {})[moment] = file.get_tensor(name)
    return State(header["step"], network, moments, header["extra"])


def _difference(path: Path, settings: Mapping[str, Any]) -> str:
    """What an interrupted training had set otherwise, in words."""
    try:
        header = _header(path)
    except (SafetensorError, OSError, ValueError, KeyError):
        return "a damaged state of another training"
    theirs, ours = _flat(header["settings"]), _flat(json.loads(json.dumps(settings)))
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    return f"a training stopped at step {header['step']} had other settings ({', '.join(names)})"


def _flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings as one table, with dots in the names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = isinstance(value, Mapping)
        found |= _flat(value, f"{before}{name}.") if inner else {before + name: value}
    return found
