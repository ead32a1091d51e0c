"""A stand-in for TransformerEngine on machines without a GPU: same signatures (of 2.20), plain torch inside.

It refuses what the real one refuses or would compute wrongly (bounds that are not int32, a longest length that is
not the longest, buffers that are not packed as declared, rows that fp8 can't take). `install(monkeypatch)` puts it
in the place of the real package.
"""

# ruff: noqa: D101, D102 (what they do is told by the real ones)

import importlib
import sys
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3_MAX = 448.0
calls: list[dict[str, Any]] = []  # of attention: what it was given
state: dict[str, Any] = {"recipe": None}


class Float8CurrentScaling:
    """The recipe: scale of each tensor from its own largest value."""

    def __init__(self) -> None:
        self.fp8_quant_fwd_inp = self.fp8_quant_fwd_weight = self.fp8_quant_bwd_grad = QParams()


class QParams:
    def __init__(self, power_2_scale: bool = False, amax_epsilon: float = 0.0) -> None:
        self.power_2_scale, self.amax_epsilon = power_2_scale, amax_epsilon


@contextmanager
def autocast(
    enabled: bool = True, calibrating: bool = False, recipe: Any = None, amax_reduction_group: Any = None
):
    assert isinstance(recipe, Float8CurrentScaling)
    before, state["recipe"] = state["recipe"], recipe if enabled else None
    try:
        yield
    finally:
        state["recipe"] = before


def quantized(x: Tensor, params: QParams) -> Tensor:
    """x rounded to e4m3 after scaling, as fp8 products take it."""
    assert x.isfinite().all(), "fp8 would take its scale from garbage"
    assert x.shape[:-1].numel() % 8 == 0, "fp8 takes rows by the 8"
    assert x.shape[-1] % 16 == 0, "fp8 takes columns by the 16"
    scale = E4M3_MAX / x.abs().max().float().clamp(min=1e-12)
    if params.power_2_scale:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return ((x.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(x.dtype)


class WithState(nn.Module):
    """Modules with fp8 bookkeeping in their state dicts, as the real ones."""

    def get_extra_state(self) -> Tensor:
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        assert isinstance(state, Tensor)


class Linear(WithState):
    def __init__(
        self, in_features: int, out_features: int, sequence_parallel: bool = False, *, bias: bool = True,
        params_dtype: Any = None, device: Any = "cuda",
    ) -> None:  # fmt: skip
        super().__init__()
        assert isinstance(device, str), "the real one compares it with the string 'meta'"
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, device=device))
        if device != "meta":
            nn.init.normal_(self.weight, 0.0, 0.023)
            nn.init.zeros_(self.bias)

    def forward(self, inp: Tensor) -> Tensor:
        recipe, weight = state["recipe"], self.weight
        if not torch.is_autocast_enabled(inp.device.type):
            assert inp.dtype == weight.dtype, "data types for parameters must match"
        if recipe is not None:
            inp = quantized(inp, recipe.fp8_quant_fwd_inp)
            weight = quantized(weight, recipe.fp8_quant_fwd_weight)
        return F.linear(inp, weight, self.bias)


class LayerNorm(WithState):
    def __init__(self, normalized_shape: int, eps: float = 1e-5, *, device: Any = None) -> None:
        super().__init__()
        assert device is not None, "the real one would take CUDA"
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, device=device))
        self.bias = nn.Parameter(torch.zeros(normalized_shape, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def checked(cu: Tensor, longest: int, tokens: int) -> list[int]:
    assert cu.dtype == torch.int32
    assert cu.ndim == 1
    bounds = cu.tolist()
    lengths = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0
    assert min(lengths) >= 0
    assert bounds[-1] == tokens, "rows of no sequence, which not every kernel writes, or their gradient"
    assert type(longest) is int, "read from the device, the kernel would wait for it"
    assert longest == max(lengths)
    return bounds


class DotProductAttention(WithState):
    def __init__(
        self, num_attention_heads: int, kv_channels: int, num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
    ) -> None:  # fmt: skip
        super().__init__()
        assert (qkv_format, attn_mask_type) == ("thd", "padding")
        self.heads, self.channels, self.attention_dropout = (
            num_attention_heads,
            kv_channels,
            attention_dropout,
        )

    def forward(
        self, query_layer: Tensor | None = None, key_layer: Tensor | None = None,
        value_layer: Tensor | None = None, attention_mask: Any = None, qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None, cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None, cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None, max_seqlen_kv: int | None = None, *,
        qkv_layer: Tensor | None = None, qkv_interleave_dim: int = -3,
    ) -> Tensor:  # fmt: skip
        if qkv_layer is not None:
            assert query_layer is key_layer is value_layer is None
            assert qkv_interleave_dim == -2
            assert qkv_layer.is_contiguous(), "what is declared packed is read as packed"
            assert qkv_layer.shape[1:] == (self.heads, 3, self.channels)
            q, k, v = qkv_layer.unbind(2)
        else:
            q, k, v = query_layer, key_layer, value_layer
            packed = q.shape == k.shape and q.stride() == k.stride() == (
                3 * self.heads * self.channels, 3 * self.channels, 1
            )  # fmt: skip
            assert packed or all(x.is_contiguous() for x in (q, k, v)), "no layout of the kernels: copied"
        of_q = checked(cu_seqlens_q, max_seqlen_q, len(q))
        of_k = checked(cu_seqlens_kv, max_seqlen_kv, len(k))
        assert len(of_q) == len(of_k)
        calls.append({"packed": qkv_layer is not None, "queries": len(q), "keys": len(k), "dtype": q.dtype})
        parts = []
        for (a, b), (c, d) in zip(pairwise(of_q), pairwise(of_k), strict=True):
            if b > a:
                x = F.scaled_dot_product_attention(
                    *(t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])),
                    dropout_p=self.attention_dropout if self.training else 0.0,
                )
                parts.append(x[0].transpose(0, 1))
        return torch.cat(parts).reshape(len(q), -1)


class OlderDotProductAttention(DotProductAttention):
    """Of a release that takes no packed buffer."""

    def forward(  # type: ignore[override]
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor,
        cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, max_seqlen_q: int, max_seqlen_kv: int,
    ) -> Tensor:  # fmt: skip
        return super().forward(
            query_layer, key_layer, value_layer, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv,
            max_seqlen_q=max_seqlen_q, max_seqlen_kv=max_seqlen_kv,
        )  # fmt: skip


def install(monkeypatch: Any, *, older: bool = False) -> ModuleType:
    """Make `import transformer_engine` find this; returns cellformers.models.te, imported with it."""
    import cellformers.models

    attention = OlderDotProductAttention if older else DotProductAttention
    parts = {
        "transformer_engine": {},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {"Float8CurrentScaling": Float8CurrentScaling, "QParams": QParams},
        "transformer_engine.pytorch": {
            "Linear": Linear, "LayerNorm": LayerNorm, "DotProductAttention": attention, "autocast": autocast
        },
    }  # fmt: skip
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    monkeypatch.setitem(sys.modules, "cellformers.models.te", None)  # so that what was there comes back
    monkeypatch.setattr(cellformers.models, "te", None, raising=False)
    del sys.modules["cellformers.models.te"]
    calls.clear()
    return importlib.import_module("cellformers.models.te")


def pretend_gpu(monkeypatch: Any, capability: tuple[int, int] = (9, 0)) -> None:
    """Let the choice of backends believe in a GPU; nothing may be computed on it."""
    from cellformers.models import attention

    monkeypatch.setattr(attention, "compute_capability", lambda: capability)
