"""Low-rank adapters (LoRA) on a frozen encoder, also one quantised to 4 bits (QLoRA).

    network = attach(network, Adapter(rank=16), seed=0)     # in place: base frozen, adapters and head trainable
    ...                                                      # train as any network
    model = layouts.assemble(network.config, merged_state(network))

An adapter adds scaling · B A to a weight matrix, with A [rank, in] and B [out, rank] and scaling = alpha / rank (Hu et
al. 2021); the modules are those of the package peft. `merged_state` adds them to the base, so a model fine-tuned this
way is saved, loaded and used like any other; `write_adapter` saves the small matrices beside it as peft reads them.

QLoRA (Dettmers et al. 2023): the matrices of the encoder's layers are held in NF4, 4 bits a number with double
quantisation, computed in bfloat16 by the package bitsandbytes. Adapters learn on top of what the quantised matrices
compute, so the merge adds them to the quantised base, read back in fp32: the saved model computes what was trained,
and held-out figures are its own. (Added to the original matrices they'd meet a base that they have never seen.)
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import atomic_path, write_json
from cellformers.models.geneformer import Geneformer
from cellformers.models.layouts import to_published

TARGETS = ("qkv", "attention_out", "up", "down")
QUANTIZE = ("none", "nf4")

_NAME = "default"  # peft can hold several adapters on a network; there is one here
# The modules of transformers' BERT that a target stands for: query, key and value share the A of `qkv`.
_PUBLISHED = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_out": ("attention.output.dense",),
    "up": ("intermediate.dense",),
    "down": ("output.dense",),
}
_TASK_TYPES = {"cell": "SEQ_CLS", "gene": "TOKEN_CLS"}
_HEAD_MODULES = {"cell": ["pooler", "classifier"], "gene": ["classifier"]}


@dataclass(frozen=True)
class Adapter:
    """What is attached; the defaults are those of Geneformer's quantised fine-tuning.

    `targets` are the matrices of each layer that are adapted; `quantize` "nf4" holds all four of them in 4 bits.
    """

    rank: int = 64
    alpha: float = 128
    dropout: float = 0.1
    targets: tuple[str, ...] = TARGETS
    quantize: str = "none"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"an adapter of rank {self.rank}, alpha {self.alpha:g} and dropout {self.dropout:g} is impossible",
                fix="rank is at least 1, alpha above 0, dropout from 0 to below 1",
            )
        for target in self.targets:
            if target not in TARGETS:
                raise UserError(f"adapters have no target {target!r}", fix=did_you_mean(target, TARGETS))
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError("an adapter names each of its targets once, and one at least")
        if self.quantize not in QUANTIZE:
            raise UserError(f"no quantisation {self.quantize!r}", fix=did_you_mean(self.quantize, QUANTIZE))


def _package(name: str, purpose: str) -> Any:
    """An optional package; UserError where it, or what it needs, is not there."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{purpose} needs the package {name} ({error})", fix=f"pip install {name}") from error


def attach(network: Geneformer, adapter: Adapter, *, seed: int) -> Geneformer:
    """Put adapters on the layers of `network`, in place; the same seed gives the same bits on every device.

    The base no longer asks for gradients; adapters (fp32, B zero, so the network computes what it did) and head do.

    Raises
    ------
    UserError
        If peft is missing, or for "nf4" bitsandbytes or a CUDA device; if the network is one of TransformerEngine
        modules, as an adapter needs matrices of its own to stand beside.
    """
    peft = _package("peft", "an adapter")
    if network.backend == "te":
        raise UserError("adapters don't go with the backend te", fix="choose the backend varlen or sdpa")
    if adapter.quantize == "nf4":
        _package("bitsandbytes", "quantize nf4")
        # its kernels for the CPU repack matrices when they predict, and can't train on those afterwards
        if network.words.weight.device.type != "cuda":
            raise UserError(
                "quantize nf4 needs a CUDA device", fix="choose the accelerator cuda, or quantize none"
            )
        quantize_layers(network)
    config = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, bias="none",
        target_modules=rf"layers\.\d+\.({'|'.join(adapter.targets)})",
    )  # fmt: skip
    # peft draws A on the host from the global generator, which is left as it was found
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(config, network, adapter_name=_NAME)
    if network.head is not None:
        network.head.requires_grad_(True)
    return network.train(network.training)  # new modules begin in training mode, whatever the rest is in


def quantize_layers(network: Geneformer) -> None:
    """Replace the matrices of every layer by NF4 ones with double quantisation and bfloat16 products, in place."""
    bnb = _package("bitsandbytes", "quantize nf4")
    for layer in network.layers:
        for name in TARGETS:
            linear: nn.Linear = getattr(layer, name)
            device = linear.weight.device
            small = bnb.nn.Linear4bit(
                linear.in_features, linear.out_features, compute_dtype=torch.bfloat16,
                compress_statistics=True, quant_type="nf4",
            )  # fmt: skip
            small.weight = bnb.nn.Params4bit(
                linear.weight.detach(), requires_grad=False, compress_statistics=True, quant_type="nf4"
            )
            small.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
            setattr(layer, name, small.to(device))  # quantised on the way to the device
    # how peft is told; a module takes any attribute
    network.is_loaded_in_4bit = True  # type: ignore[assignment]


def _adapted(network: Geneformer) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Name, A, B and scaling of every adapted matrix."""
    for name, module in network.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (getattr(module, part)[_NAME].weight.detach() for part in ("lora_A", "lora_B"))
            yield f"{name}.weight", a, b, module.scaling[_NAME]


def _full(parameter: nn.Parameter) -> Tensor:
    """A parameter in fp32; of a quantised matrix, what it stands for."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach().float()
    bnb = _package("bitsandbytes", "quantize nf4")
    weight: Tensor = bnb.functional.dequantize_4bit(parameter.detach(), state)
    return weight.float()


def merged_state(network: Geneformer) -> dict[str, Tensor]:
    """The state dict, in fp32, of a plain `Geneformer` that computes what `network` with its adapters does."""
    state = {
        name.replace(".base_layer", ""): _full(parameter)
        for name, parameter in network.named_parameters()
        if ".lora_" not in name
    }
    for name, a, b, scaling in _adapted(network):
        state[name] = state[name] + scaling * (b.float() @ a.float())
    return state


def adapter_state(network: Geneformer) -> dict[str, Tensor]:
    """Copies, on the host, of everything that is trained: adapters and head, under the names of `network`."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    }


def load_adapter_state(network: Geneformer, state: Mapping[str, Tensor]) -> None:
    """Put back what `adapter_state` took; UserError where it is of another network."""
    own = {name: p for name, p in network.named_parameters() if p.requires_grad}
    wrong = sorted(own.keys() ^ state.keys()) or [n for n, p in own.items() if p.shape != state[n].shape]
    if wrong:
        raise UserError(
            f"the saved weights are of another network: {wrong[0]} differs", fix="begin again in a new folder"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def trainable_share(network: Geneformer) -> float:
    """Numbers that are trained, as a share of all those of `network`; a quantised one counts as one."""
    counts = [0, 0]
    for parameter in network.parameters():
        quantised = getattr(parameter, "quant_state", None)
        n = parameter.numel() if quantised is None else quantised.shape.numel()
        counts[parameter.requires_grad] += n
    return counts[True] / sum(counts)


def write_adapter(network: Geneformer, adapter: Adapter, folder: str | Path) -> None:
    """Write the adapters as peft saves those of transformers' BERT: adapter_config.json, adapter_model.safetensors.

    `PeftModel.from_pretrained(base, folder)` puts them, with the head of a cell or gene classifier, on a
    BertForSequenceClassification or BertForTokenClassification of the base; heads of several tasks, which
    transformers has no class for, are in the merged model alone. On "nf4", load that base in NF4 as well.
    """
    state = merged_state(network) | {name: b for name, _, b, _ in _adapted(network)}
    published = to_published(state, network.config)
    tensors = {n: t for n, t in published.items() if n.startswith(("classifier.", "bert.pooler."))}
    for name, a, _, _ in _adapted(network):
        _, number, target, _ = name.split(".")
        for module in _PUBLISHED[target]:
            stem = f"bert.encoder.layer.{number}.{module}"
            tensors[f"{stem}.lora_A.weight"] = a.cpu().clone()  # a file holds no tensor twice
            tensors[f"{stem}.lora_B.weight"] = published[f"{stem}.weight"]
    modules = "|".join(m.replace(".", r"\.") for target in adapter.targets for m in _PUBLISHED[target])
    config = {
        "peft_type": "LORA", "task_type": _TASK_TYPES.get(network.config.head),
        "base_model_name_or_path": None, "r": adapter.rank, "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout, "bias": "none", "inference_mode": True,
        "target_modules": rf".*bert\.encoder\.layer\.\d+\.({modules})",
        "modules_to_save": _HEAD_MODULES.get(network.config.head),
    }  # fmt: skip
    write_json(config, Path(folder) / "adapter_config.json")
    with atomic_path(Path(folder) / "adapter_model.safetensors") as temporary:
        named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
        save_file(named, temporary, metadata={"format": "pt"})
