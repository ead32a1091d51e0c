"""Geneformer: a post-norm BERT encoder over ranked genes, on packed sequences.

Reads and writes the published layout of Hugging Face's BertForMaskedLM (config.json, model.safetensors) and
computes what transformers computes with it, without padding, without the language-model head unless asked, and
without the layers behind the one that is wanted:

    model = geneformer.load("models/gf", dtype=torch.float32)
    hidden = model(tokens, cu_seqlens, layer=-1)        # [len(tokens), hidden_size]

Layers are counted as the field does: 0 is the last, -1 the second to last, -n_layers the embedding layer.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cellformers.errors import UserError, did_you_mean
from cellformers.io.files import atomic_path, read_json, write_json
from cellformers.models.attention import Packing, attend, packing
from cellformers.models.bert_config import Config

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}

# fp32 matrix products of under about 12 rows take another path through the BLAS and round differently, so a
# short cell alone would not equal the same cell in a batch; with 16 rows or more they agree.
MIN_ROWS = 16

# What older releases saved beside the weights, and what heads other than the masked-gene one leave behind.
IGNORED = {"bert.embeddings.position_ids", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward, each followed by residual sum and layer norm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.dropout = config.num_attention_heads, config.hidden_dropout_prob
        self.attention_dropout = config.attention_probs_dropout_prob
        self.activation = ACTIVATIONS[config.hidden_act]
        self.qkv = nn.Linear(width, 3 * width)  # rows as [heads, 3, head_dim]
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.output_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, keys: Packing, queries: Packing | None, rows: Tensor | None) -> Tensor:
        """x [tokens, width] to [tokens, width], or to [len(rows), width] where only those rows are wanted."""
        query, key, value = self.qkv(x).view(x.shape[0], self.heads, 3, -1).unbind(2)
        if rows is not None:
            x, query = x[rows], query[rows]
        mixed = attend(
            query, key, value, queries=queries or keys, keys=keys,
            dropout=self.attention_dropout if self.training else 0.0,
        )  # fmt: skip
        x = self.attention_norm(x + self._drop(self.attention_out(mixed.reshape(x.shape))))
        return self.output_norm(x + self._drop(self.down(self.activation(self.up(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Geneformer(nn.Module):
    """The network: packed encoder and masked-gene head. Parameters are on one device, of one dtype."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.layer_norm_eps
        self.words = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.types = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head_transform = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=eps)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self, tokens: Tensor, cu_seqlens: Tensor, *, layer: int = 0, rows: Tensor | None = None
    ) -> Tensor:
        """Hidden states of one layer.

        Parameters
        ----------
        tokens
            int64 [T] on the model's device: the sequences one after the other.
        cu_seqlens
            int [n + 1] on the host: 0, then the cumulative lengths, the last one T.
        layer
            0 (last) to -n_layers (embedding layer); those behind it are not computed.
        rows
            int64, ascending, on the host: the positions of the flat batch that are wanted (default: all). The
            last computed layer then computes its queries and what follows for these alone.

        Returns
        -------
        Tensor
            [T, hidden_size], or [len(rows), hidden_size].
        """
        device = self.words.weight.device
        keys = packing(cu_seqlens, device)
        depth = self.config.depth(layer)
        queries, wanted, n_wanted = None, None, tokens.shape[0]
        if rows is not None:
            queries = packing(torch.searchsorted(rows, cu_seqlens.to(torch.int64)), device)
            n_wanted = rows.shape[0]
            wanted = F.pad(rows, (0, max(0, MIN_ROWS - n_wanted))).to(device, non_blocking=True)
        places = torch.arange(tokens.shape[0]) - torch.repeat_interleave(
            cu_seqlens[:-1].to(torch.int64), torch.as_tensor(keys.lengths)
        )
        shortfall = (0, max(0, MIN_ROWS - tokens.shape[0]))
        tokens, places = F.pad(tokens, shortfall), F.pad(places.to(device, non_blocking=True), shortfall)

        # the order of this sum is transformers', so that it rounds alike
        x = self.norm(self.words(tokens) + self.types.weight[0] + self.positions(places))
        if self.training and self.config.hidden_dropout_prob:
            x = F.dropout(x, self.config.hidden_dropout_prob)
        for number in range(depth):
            last = number == depth - 1
            x = self.layers[number](x, keys, queries if last else None, wanted if last else None)
        if depth == 0 and wanted is not None:
            x = x[wanted]
        return x[:n_wanted]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token, [n, vocab_size], from hidden states [n, hidden_size] of the last layer."""
        activation = ACTIVATIONS[self.config.hidden_act]
        x = self.head_norm(activation(self.head_transform(hidden)))
        return F.linear(x, self.words.weight, self.head_bias)


# --- the published layout -----------------------------------------------------------------------------


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a BertForMaskedLM with tied decoder, in the order of the network."""
    d, f = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (config.vocab_size, d),
        "bert.embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
        "bert.embeddings.token_type_embeddings.weight": (config.type_vocab_size, d),
        "bert.embeddings.LayerNorm.weight": (d,),
        "bert.embeddings.LayerNorm.bias": (d,),
    }
    for number in range(config.num_hidden_layers):
        stem = f"bert.encoder.layer.{number}"
        for part, out, width in (
            ("attention.self.query", d, d), ("attention.self.key", d, d), ("attention.self.value", d, d),
            ("attention.output.dense", d, d), ("attention.output.LayerNorm", d, 0),
            ("intermediate.dense", f, d), ("output.dense", d, f), ("output.LayerNorm", d, 0),
        ):  # fmt: skip
            shapes[f"{stem}.{part}.weight"] = (out, width) if width else (out,)
            shapes[f"{stem}.{part}.bias"] = (out,)
    shapes["cls.predictions.transform.dense.weight"] = (d, d)
    for name in ("transform.dense.bias", "transform.LayerNorm.weight", "transform.LayerNorm.bias"):
        shapes[f"cls.predictions.{name}"] = (d,)
    shapes["cls.predictions.bias"] = (config.vocab_size,)
    return shapes


_OUTSIDE = {
    "words": "bert.embeddings.word_embeddings",
    "positions": "bert.embeddings.position_embeddings",
    "types": "bert.embeddings.token_type_embeddings",
    "norm": "bert.embeddings.LayerNorm",
    "head_transform": "cls.predictions.transform.dense",
    "head_norm": "cls.predictions.transform.LayerNorm",
}
_INSIDE = {
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_QKV = ("query", "key", "value")


def _published_name(own: str) -> str:
    """The published name of a parameter other than `qkv`."""
    if own == "head_bias":
        return "cls.predictions.bias"
    stem, kind = own.rsplit(".", 1)
    if stem.startswith("layers."):
        _, number, part = stem.split(".")
        return f"bert.encoder.layer.{number}.{_INSIDE[part]}.{kind}"
    return f"{_OUTSIDE[stem]}.{kind}"


def from_published(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """State dict of `Geneformer` from tensors under their published names; query, key and value are fused."""
    state = {}
    with torch.device("meta"):
        names = list(Geneformer(config).state_dict())
    for own in names:
        stem, _, kind = own.rpartition(".")
        if stem.endswith(".qkv"):
            place = f"bert.encoder.layer.{stem.split('.')[1]}.attention.self"
            parts = [tensors[f"{place}.{part}.{kind}"] for part in _QKV]
            by_head = torch.stack(
                [p.view(config.num_attention_heads, -1, *p.shape[1:]) for p in parts], dim=1
            )
            state[own] = by_head.reshape(-1, *parts[0].shape[1:])
        else:
            state[own] = tensors[_published_name(own)]
    return state


def to_published(model: Geneformer) -> dict[str, Tensor]:
    """The inverse of `from_published`: contiguous tensors on the host under their published names."""
    config, tensors = model.config, {}
    for own, tensor in model.state_dict().items():
        stem, _, kind = own.rpartition(".")
        if stem.endswith(".qkv"):
            place = f"bert.encoder.layer.{stem.split('.')[1]}.attention.self"
            split = tensor.view(config.num_attention_heads, 3, -1, *tensor.shape[1:]).unbind(1)
            for part, rows in zip(_QKV, split, strict=True):
                tensors[f"{place}.{part}.{kind}"] = rows.reshape(-1, *tensor.shape[1:])
        else:
            tensors[_published_name(own)] = tensor
    return {name: tensors[name].cpu().contiguous() for name in published_shapes(config)}


def _check(found: Mapping[str, tuple[int, ...]], config: Config, path: Path) -> None:
    """Names and shapes against what the config promises."""
    wanted = published_shapes(config)
    for name in sorted(set(wanted) - set(found)):
        raise UserError(
            f"lacks the tensor {name}", path=path, fix=did_you_mean(name, set(found) - set(wanted))
        )
    for name, shape in found.items():
        if name in IGNORED:
            continue
        if name not in wanted and name not in TIED:
            raise UserError(
                f"has a tensor that {CONFIG_FILE} does not account for: {name} {list(shape)}", path=path,
                fix="is this a BertForMaskedLM with as many layers as the config says?",
            )  # fmt: skip
        expected = wanted[TIED.get(name, name)]
        if shape != expected:
            raise UserError(
                f"tensor {name} is {list(shape)}, {CONFIG_FILE} promises {list(expected)}", path=path,
                fix="config and weights must come from the same model",
            )  # fmt: skip


def read_config(folder: str | Path) -> Config:
    """The config of a model directory; UserError where it is missing or not a BERT encoder's."""
    path = Path(folder) / CONFIG_FILE
    if not Path(folder).is_dir():
        raise UserError("no such model directory", path=folder)
    return Config.from_dict(read_json(path), path=path)


def load(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Geneformer:
    """Read a model directory, ready for inference.

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
            _check(found, config, path)
            tensors = {name: file.get_tensor(name).to(dtype) for name in published_shapes(config)}
            for name, tied in TIED.items():
                if name in found and not torch.equal(file.get_tensor(name).to(dtype), tensors[tied]):
                    raise UserError(
                        f"{name} differs from {tied}", path=path, fix="a Geneformer's decoder is tied"
                    )
    except SafetensorError as error:
        raise UserError(f"not readable as safetensors ({error})", path=path, fix="fetch it again") from error
    return _assemble(config, tensors).to(device).eval().requires_grad_(False)


def _assemble(config: Config, tensors: Mapping[str, Tensor]) -> Geneformer:
    with torch.device("meta"):
        model = Geneformer(config)
    model.load_state_dict(from_published(tensors, config), assign=True)
    return model


def random_model(config: Config, *, seed: int) -> Geneformer:
    """A network with BERT's initial weights: normal of SD `initializer_range`, biases 0, norms 1, <pad> 0.

    The same seed gives the same weights on any machine of one torch version.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in published_shapes(config).items():
        if name.endswith("LayerNorm.weight"):
            tensors[name] = torch.ones(shape)
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)
    tensors["bert.embeddings.word_embeddings.weight"][config.pad_token_id] = 0
    return _assemble(config, tensors)


def save(model: Geneformer, folder: str | Path) -> None:
    """Write config.json and model.safetensors in the published layout, each whole or not at all."""
    write_json(model.config.to_dict(), Path(folder) / CONFIG_FILE)
    path = Path(folder) / WEIGHTS_FILE
    with atomic_path(path) as temporary:
        try:
            save_file(to_published(model), temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise UserError(f"can't be written ({error})", path=path, fix="make room") from error
