"""The layers of the encoder, by backend: plain ones, or TransformerEngine's.

Both kinds hold the same parameters under the same names (weight, bias), so one state dict fits all backends. The
only place that decides between them.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from cellformers.errors import UserError
from cellformers.models.attention import Packing, attend
from cellformers.models.bert_config import Config

FP8_UNIT = 16  # both sizes of a matrix in fp8 are multiples of it


def linear(backend: str, inputs: int, outputs: int) -> nn.Module:
    """x Wᵀ + b on the last dimension; W is [outputs, inputs]."""
    if backend == "te":
        from cellformers.models import te

        return te.Linear(inputs, outputs, device=_device())
    return nn.Linear(inputs, outputs)


def norm(backend: str, width: int, *, eps: float) -> nn.Module:
    """Layer norm of the last dimension (Ba et al. 2016)."""
    if backend == "te":
        from cellformers.models import te

        return te.LayerNorm(width, eps=eps, device=_device())
    return nn.LayerNorm(width, eps=eps)


def attention(backend: str, heads: int, head_dim: int, *, dropout: float) -> nn.Module:
    """Self-attention without parameters, called as `Attention.forward`; `dropout` is that of training."""
    if backend == "te":
        from cellformers.models import te

        return te.Attention(heads, head_dim, dropout=dropout)
    return Attention()


def in_fp8(wanted: bool) -> AbstractContextManager[object]:
    """Within it, where wanted, TransformerEngine's linear layers multiply in fp8."""
    if not wanted:
        return nullcontext()
    from cellformers.models import te

    return te.in_fp8()


def check_fp8(config: Config) -> None:
    """UserError where the matrices of a model can't be multiplied in fp8."""
    for name in ("hidden_size", "intermediate_size"):
        size = getattr(config, name)
        if size % FP8_UNIT:
            raise UserError(
                f"fp8 needs sizes that are multiples of {FP8_UNIT}, and the model's {name} is {size}",
                fix="choose dtype bfloat16",
            )


def _device() -> str:
    """Where tensors are made now, also under `with torch.device("meta")`, which TransformerEngine does not ask."""
    return str(torch.empty(0).device)


class Attention(nn.Module):
    """Attention by torch's kernels, "varlen" or "sdpa"."""

    def forward(
        self, qkv: Tensor, keys: Packing, queries: Packing | None, rows: Tensor | None, *, backend: str,
        dropout: float,
    ) -> Tensor:  # fmt: skip
        """Mixed values of every token, or of the wanted rows.

        Parameters
        ----------
        qkv
            [tokens, heads, 3, head_dim], contiguous: query, key and value of each head.
        keys
            The sequences; rows behind the last bound are padding.
        queries, rows
            Where only some positions are wanted: these positions (int64, on the device), and which belong to
            which sequence.
        backend
            "varlen" or "sdpa".
        dropout
            Probability at which attention weights are dropped; 0 for inference.

        Returns
        -------
        Tensor
            [tokens or len(rows), heads * head_dim]; zeros for padding.
        """
        query, key, value = qkv.unbind(2)
        if rows is not None:
            query = query[rows]
        mixed = attend(
            query, key, value, queries=queries or keys, keys=keys, backend=backend, dropout=dropout
        )
        return mixed.reshape(mixed.shape[0], -1)
