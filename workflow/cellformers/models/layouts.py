"""Names and shapes of the weights as they are published, and conversions from and to the network's own.

Two layouts of the same numbers:

- "hf": Hugging Face's BertForMaskedLM (or ...ForSequenceClassification, ...ForTokenClassification), with query, key and
  value apart;
- "te": as NVIDIA's BioNeMo exports it for TransformerEngine, with one `self_attention.qkv` whose rows are
  [heads, 3, head_dim].

Embeddings and heads are named alike in both. The network's own state dict has the fused rows too, so "te" differs from
it by names alone.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cellformers.errors import UserError
from cellformers.models.bert_config import Config
from cellformers.models.geneformer import Geneformer

LAYOUTS = ("hf", "te")

# What older releases saved beside the weights, and what TransformerEngine saves beside its own.
IGNORED_SUFFIXES = ("embeddings.position_ids", "_extra_state")
_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}

ENCODER = "bert."  # before the names of an encoder's tensors, where it is part of a larger model

_OUTSIDE = {
    "words": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "norm": "bert.embeddings.LayerNorm",
}
_HEADS = {
    "masked": {
        "head.transform": "cls.predictions.transform.dense",
        "head.norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions",
    },
    "cell": {"head.pooler": "bert.pooler.dense", "head.classifier": "classifier"},
    "gene": {"head.classifier": "classifier"},
    "tasks": {"head.attention": "attention_pool"},
    "none": {},
}
_INSIDE = {
    "hf": {
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "output_norm": "output.LayerNorm",
    },
    "te": {
        "qkv": "self_attention.qkv",
        "attention_out": "self_attention.proj",
        "attention_norm": "layernorm",
        "up": "layernorm_mlp.fc1",
        "down": "layernorm_mlp.fc2",
        "output_norm": "layernorm_mlp.layer_norm",
    },
}
_QKV = ("query", "key", "value")


def tied_tensors(config: Config) -> dict[str, str]:
    """Copies that a file may hold of other tensors: name of the copy, name of what it equals."""
    return _TIED if config.head == "masked" else {}


def is_ignored(name: str, config: Config) -> bool:
    """Whether a file may hold this tensor though the network has no place for it."""
    unused_pooler = config.head != "cell" and name.removeprefix(ENCODER).startswith("pooler.dense.")
    return name.endswith(IGNORED_SUFFIXES) or unused_pooler


def _own_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of `Geneformer`."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Geneformer(config).state_dict().items()}


def _name(own: str, config: Config, layout: str) -> str:
    """The published name of a parameter; with layout "hf" not of `qkv`."""
    stem, kind = own.rsplit(".", 1)
    if stem.startswith("layers."):
        _, number, part = stem.split(".")
        name = f"bert.encoder.layer.{number}.{_INSIDE[layout][part]}.{kind}"
    elif stem.startswith("head.classifiers."):
        name = f"classifiers.{stem.removeprefix('head.classifiers.')}.{kind}"
    else:
        name = f"{(_OUTSIDE | _HEADS[config.head])[stem]}.{kind}"
    return name.removeprefix(ENCODER) if config.head == "none" else name


def _is_split(own: str, layout: str) -> bool:
    return layout == "hf" and own.rpartition(".")[0].endswith(".qkv")


def _split_names(own: str, config: Config) -> list[str]:
    """The published names of query, key and value, for a `qkv` parameter."""
    _, number, _, kind = own.split(".")
    prefix = "" if config.head == "none" else ENCODER
    return [f"{prefix}encoder.layer.{number}.attention.self.{part}.{kind}" for part in _QKV]


def published_shapes(config: Config, layout: str = "hf") -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a file of this layout holds (tied ones once), in the order of the network."""
    shapes: dict[str, tuple[int, ...]] = {}
    for own, shape in _own_shapes(config).items():
        if _is_split(own, layout):
            shapes |= dict.fromkeys(_split_names(own, config), (shape[0] // 3, *shape[1:]))
        else:
            shapes[_name(own, config, layout)] = shape
    return shapes


def detect(names: Collection[str]) -> str:
    """The layout of a file with tensors of these names."""
    return "te" if any(".self_attention.qkv." in name for name in names) else "hf"


def from_published(tensors: Mapping[str, Tensor], config: Config, *, layout: str = "hf") -> dict[str, Tensor]:
    """State dict of `Geneformer` from tensors under their published names.

    Raises
    ------
    UserError
        If query, key and value of a layer are of several dtypes, so that one matrix would change some of them.
    """
    state = {}
    for own in _own_shapes(config):
        if _is_split(own, layout):
            parts = [tensors[name] for name in _split_names(own, config)]
            if len({part.dtype for part in parts}) > 1:
                raise UserError(f"{_split_names(own, config)[0]} and its key and value differ in dtype")
            by_head = [p.reshape(config.num_attention_heads, -1, *p.shape[1:]) for p in parts]
            state[own] = torch.stack(by_head, dim=1).reshape(-1, *parts[0].shape[1:])
        else:
            state[own] = tensors[_name(own, config, layout)]
    return state


def to_published(state: Mapping[str, Tensor], config: Config, *, layout: str = "hf") -> dict[str, Tensor]:
    """The inverse of `from_published`: contiguous tensors on the host under their published names."""
    tensors = {}
    for own in _own_shapes(config):
        tensor = state[own].detach()
        if _is_split(own, layout):
            parts = tensor.reshape(config.num_attention_heads, 3, -1, *tensor.shape[1:]).unbind(1)
            for name, rows in zip(_split_names(own, config), parts, strict=True):
                tensors[name] = rows.reshape(-1, *tensor.shape[1:]).cpu().contiguous()
        else:
            tensors[_name(own, config, layout)] = tensor.cpu().contiguous()
    return tensors


def assemble(
    config: Config, state: Mapping[str, Tensor], *, backend: str = "sdpa", fp8: bool = False
) -> Geneformer:
    """A network whose parameters are these tensors."""
    with torch.device("meta"):
        model = Geneformer(config, backend=backend, fp8=fp8)
    model.load_state_dict(dict(state), assign=True)
    return model


def _random(name: str, shape: tuple[int, ...], sd: float, generator: torch.Generator) -> Tensor:
    if name.endswith("LayerNorm.weight"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    return torch.empty(shape).normal_(0.0, sd, generator=generator)


def random_model(config: Config, *, seed: int) -> Geneformer:
    """A network with BERT's initial weights: normal of SD `initializer_range`, biases 0, norms 1, <pad> 0.

    The same seed gives the same weights on any machine of one torch version.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: _random(name, shape, config.initializer_range, generator)
        for name, shape in published_shapes(config).items()
    }
    state = from_published(tensors, config)
    state["words.weight"][config.pad_token_id] = 0
    return assemble(config, state)


def replace_head(
    model: Geneformer, *, seed: int, head: str, labels: Sequence[str] = (),
    tasks: Sequence[tuple[str, tuple[str, ...]]] = (), pooling: str = "first",
    classifier_dropout: float | None = None,
) -> Geneformer:  # fmt: skip
    """The encoder of `model`, sharing its weights, with a new head of random weights; keywords as in `Config`."""
    config = replace(
        model.config, head=head, labels=tuple(labels), tasks=tuple(tasks), pooling=pooling,
        classifier_dropout=classifier_dropout,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    weight = model.words.weight
    for name, shape in _own_shapes(config).items():
        if name.startswith("head."):
            made = _random(_name(name, config, "hf"), shape, config.initializer_range, generator)
            state[name] = made.to(weight.device, weight.dtype)
    return assemble(config, state, backend=model.backend, fp8=model.fp8)
