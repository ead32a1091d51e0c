"""How far a backend may be from transformers in fp32, on models whose attention would show a leak between cells.

With a random model's weights attention is all but uniform, and a token that sees the neighbouring cell changes little.
So query and key weights are scaled until it does: `leaking` plants such a leak, and tests assert that it is found.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers

from cellformers.models import geneformer, layouts
from cellformers.models.attention import Packing
from cellformers.models.bert_config import Config
from cellformers.models.geneformer import Geneformer

COMMON = {"hidden_act": "relu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
SHAPES: dict[str, dict[str, Any]] = {
    "V1-10M": {
        "vocab_size": 25426, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
        "intermediate_size": 512, "max_position_embeddings": 2048, **COMMON,
    },
    "V2-104M": {
        "vocab_size": 20275, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "max_position_embeddings": 4096, **COMMON,
    },
}  # fmt: skip
SHARPER = {"V1-10M": 16.0, "V2-104M": 4.0}  # factor of query and key weights
MODES = {"V1-10M": "cell", "V2-104M": "cls"}
SPECIAL = 4  # tokens below are no genes


class Limits(NamedTuple):
    """Of a cell's embedding against fp32: largest relative error, smallest cosine."""

    error: float
    cosine: float

    def hold(self, found: np.ndarray, wanted: np.ndarray) -> bool:
        """Whether all cells are within both, and finite."""
        error, cosine = distances(found, wanted)
        return bool(np.isfinite(found).all() and error <= self.error and cosine >= self.cosine)


LIMITS = {"bf16": Limits(4e-2, 0.999), "fp8": Limits(0.2, 0.98)}


def distances(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Largest relative error and smallest cosine over the rows."""
    norms = np.linalg.norm(wanted, axis=1)
    error = np.linalg.norm(found - wanted, axis=1) / norms
    cosine = (found * wanted).sum(1) / norms / np.maximum(np.linalg.norm(found, axis=1), 1e-30)
    return float(error.max()), float(cosine.min())


def sharp_model(name: str, *, seed: int = 3, **changes: Any) -> transformers.BertForMaskedLM:
    """A transformers model of a published shape, no weight 0 or 1, with query and key weights scaled."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**{**SHAPES[name], **changes})
    model = transformers.BertForMaskedLM(config).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(1.0 if key.endswith("LayerNorm.weight") else 0.0, 0.1)
        if key.endswith(("query.weight", "key.weight")):
            parameter *= SHARPER[name]
    return model


def network(theirs: transformers.BertForMaskedLM, **options: Any) -> Geneformer:
    """Our network with the same weights, on the host."""
    names = Config.__dataclass_fields__
    config = Config(**{key: value for key, value in theirs.config.to_dict().items() if key in names})
    published = layouts.published_shapes(config)
    state = layouts.from_published({k: v for k, v in theirs.state_dict().items() if k in published}, config)
    return layouts.assemble(config, {k: v.clone() for k, v in state.items()}, **options).eval()


def draw_cells(lengths: Sequence[int], vocab_size: int, *, seed: int = 0) -> list[np.ndarray]:
    """Cells of so many tokens, each token at most once in a cell."""
    rng = np.random.default_rng(seed)
    return [(rng.permutation(vocab_size - SPECIAL)[:length] + SPECIAL).astype(np.int32) for length in lengths]


def reference(
    theirs: transformers.BertForMaskedLM, cells: Sequence[np.ndarray], *, mode: str, layer: int = -1
) -> np.ndarray:
    """Embeddings by transformers, cell by cell, in the precision of its weights: float64 [n, dim]."""
    found = []
    for cell in cells:
        tokens = torch.from_numpy(cell.astype(np.int64)).to(theirs.device)[None]
        with torch.inference_mode():
            states = theirs.bert(tokens, output_hidden_states=True).hidden_states
        hidden = states[len(states) - 1 + layer][0].double()
        found.append((hidden[0] if mode == "cls" else hidden.mean(0)).cpu().numpy())
    return np.stack(found)


def embed(ours: Geneformer, cells: Sequence[np.ndarray], *, mode: str, layer: int = -1) -> np.ndarray:
    """Embeddings of one packed batch, float64 [n, dim]."""
    lengths = [len(cell) for cell in cells]
    tokens = torch.from_numpy(np.concatenate(cells).astype(np.int64)).to(ours.words.weight.device)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with torch.inference_mode():
        if mode == "cls":
            return ours(tokens, bounds, layer=layer, rows=bounds[:-1]).double().cpu().numpy()
        hidden = ours(tokens, bounds, layer=layer).double().cpu().split(lengths)
    return np.stack([part.mean(0).numpy() for part in hidden])


def merged(packing: Packing, first: int) -> Packing:
    """The sequences `first` and the next as one, followed by an empty one."""
    bounds = list(packing.bounds)
    bounds[first + 1] = bounds[first + 2]
    return _packing(bounds, packing)


def moved(packing: Packing, first: int) -> Packing:
    """The last quarter of the sequence `first` given to the next."""
    bounds = list(packing.bounds)
    bounds[first + 1] -= (bounds[first + 1] - bounds[first]) // 4
    return _packing(bounds, packing)


def _packing(bounds: list[int], like: Packing) -> Packing:
    longest = max(np.diff(bounds).tolist())
    return Packing(bounds, torch.tensor(bounds, dtype=torch.int32, device=like.cu_seqlens.device), longest)


@contextmanager
def leaking(change: Callable[[Packing, int], Packing], first: int = 0) -> Iterator[None]:
    """Within it, attention of every network has wrong bounds; positions and pooling have the right ones."""
    honest = geneformer.Layer.forward

    def forward(self: Any, x: Any, keys: Packing, queries: Packing | None, *rest: Any) -> Any:
        queries = queries if queries is None else change(queries, first)
        return honest(self, x, change(keys, first), queries, *rest)

    with mock.patch.object(geneformer.Layer, "forward", forward):
        yield
