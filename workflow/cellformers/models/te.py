"""TransformerEngine's layers, as models/layers.py builds them: the only file that imports it.

It can be imported where TransformerEngine for PyTorch is installed and a CUDA device is there (written against
2.20). Its modules keep fp8 bookkeeping in their state dicts, under `_extra_state`; the recipe used here has none
that would outlive a call, so it is left out, and state dicts are those of plain layers.
"""

import inspect
from contextlib import AbstractContextManager

import transformer_engine.pytorch as engine
from torch import Tensor, nn
from transformer_engine.common.recipe import Float8CurrentScaling, QParams

from cellformers.models.attention import Packing, pad_rows

# Releases that do not take the packed buffer as it is find out from pointers and strides that they got one.
TAKES_PACKED = "qkv_layer" in inspect.signature(engine.DotProductAttention.forward).parameters


def _recipe() -> Float8CurrentScaling:
    """Every tensor scaled by its own largest value, at each call, by a power of two.

    Delayed scaling would take the scale from earlier batches, and a cell's embedding would depend on what was
    computed before it. Powers of two leave the rounding of normal numbers the same whatever the scale is, so it
    hardly depends on the other cells of the batch either.
    """
    recipe = Float8CurrentScaling()
    for part in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        setattr(recipe, part, QParams(power_2_scale=True, amax_epsilon=0.0))
    return recipe


RECIPE = _recipe()


def in_fp8() -> AbstractContextManager[object]:
    """Within it linear layers multiply in fp8; attention stays in half precision."""
    return engine.autocast(enabled=True, recipe=RECIPE)


class _Stateless:
    """State dicts without `_extra_state`: torch looks whether a class has these methods of its own."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class Linear(_Stateless, engine.Linear):  # type: ignore[misc]
    """Parameters weight and bias; the bias is added within the matrix product."""


class LayerNorm(_Stateless, engine.LayerNorm):  # type: ignore[misc]
    """Parameters weight and bias."""


class Attention(_Stateless, engine.DotProductAttention):  # type: ignore[misc]
    """Attention over packed sequences; called as `layers.Attention`."""

    def __init__(self, heads: int, head_dim: int, *, dropout: float) -> None:
        super().__init__(
            heads, head_dim, attention_dropout=dropout, qkv_format="thd", attn_mask_type="padding"
        )

    def forward(
        self, qkv: Tensor, keys: Packing, queries: Packing | None, rows: Tensor | None, *, backend: str,
        dropout: float,
    ) -> Tensor:  # fmt: skip
        """As `layers.Attention.forward`; `backend` and `dropout` can only be those it was made for."""
        if (backend, dropout) != ("te", self.attention_dropout if self.training else 0.0):
            raise ValueError("TransformerEngine's attention was made for another backend or dropout")
        queries = queries or keys
        n = qkv.shape[0] if rows is None else rows.shape[0]
        if not queries.bounds[-1]:
            return qkv.new_zeros(n, qkv.shape[1] * qkv.shape[3])
        # What lies behind the last bound stays out: not every kernel writes it, or its gradient.
        sequences = qkv[: keys.bounds[-1]]
        mixed: Tensor = super().forward(
            **_inputs(sequences, None if rows is None else rows[: queries.bounds[-1]]),
            cu_seqlens_q=queries.cu_seqlens, cu_seqlens_kv=keys.cu_seqlens,
            max_seqlen_q=queries.longest, max_seqlen_kv=keys.longest,
        )  # fmt: skip
        return pad_rows(mixed, n)


def _inputs(qkv: Tensor, rows: Tensor | None) -> dict[str, object]:
    """How the kernel takes query, key and value: the packed buffer uncopied, where all queries are wanted."""
    if rows is None and TAKES_PACKED:
        return {"qkv_layer": qkv, "qkv_interleave_dim": -2}
    query, key, value = qkv.unbind(2)
    if rows is not None:
        # a query apart, with key and value still in one buffer of three, is no layout of the kernels
        query, key, value = query[rows], key.contiguous(), value.contiguous()
    return {"query_layer": query, "key_layer": key, "value_layer": value}
