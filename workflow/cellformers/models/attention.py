"""Attention over packed sequences: the only module that knows the kernels apart.

A batch is one flat run of tokens, sequence after sequence, without padding; no token attends beyond its own
sequence. On CUDA, in half precision, torch's variable-length kernel takes the whole batch at once where the
installed torch has it; everywhere else scaled_dot_product_attention runs sequence by sequence.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cellformers.errors import UserError, did_you_mean

varlen_attn: Any
try:
    from torch.nn.attention import varlen

    varlen_attn = varlen.varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None


class Packing(NamedTuple):
    """Where the sequences of a packed batch begin and end; made once a forward pass, on the host."""

    bounds: list[int]  # [n + 1], from 0; what lies behind the last bound belongs to no sequence
    cu_seqlens: Tensor  # int32 [n + 1], the same on the device of the computation
    longest: int  # tokens of the longest sequence

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [stop - start for start, stop in pairwise(self.bounds)]


def packing(cu_seqlens: Tensor, device: torch.device) -> Packing:
    """Read cumulative lengths (int [n + 1], best kept on the host) for a computation on `device`."""
    bounds: list[int] = cu_seqlens.tolist()
    longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
    return Packing(bounds, cu_seqlens.to(device, torch.int32, non_blocking=True), longest)


def backend(device: torch.device, dtype: torch.dtype, *, dropout: float = 0.0) -> str:
    """The kernel that `attend` takes: "varlen" or "sdpa"."""
    half = dtype in (torch.float16, torch.bfloat16)
    return "varlen" if device.type == "cuda" and half and varlen_attn is not None and not dropout else "sdpa"


def choose(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend of a network: the one requested, or for "auto" the fastest that works here."""
    works = available_backends()
    if requested == "auto":
        return backend(device, dtype)
    if requested not in works:
        raise UserError(f"no backend {requested!r}", fix=did_you_mean(requested, ["auto", *works]))
    if works[requested] is not None:
        raise UserError(f"backend {requested} does not work here ({works[requested]})", fix="choose auto")
    return requested


def available_backends() -> dict[str, str | None]:
    """The kernels by name: None for one that works here, else why it does not."""
    varlen = None
    if varlen_attn is None:
        varlen = "torch before 2.10 has none"
    elif not torch.cuda.is_available():
        varlen = "for a GPU, in half precision"
    return {"sdpa": None, "varlen": varlen}


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, queries: Packing, keys: Packing, dropout: float = 0.0
) -> Tensor:
    """softmax(q kᵀ / √head_dim) v within every sequence (Vaswani et al. 2017, eq. 1).

    Parameters
    ----------
    query
        [rows, heads, head_dim]; the queries of sequence i are the rows queries.bounds[i] to [i + 1].
    key, value
        [tokens, heads, head_dim], same dtype; likewise with `keys`. Only the last dimension need be contiguous.
    queries, keys
        Bounds of as many sequences each. Rows behind the last bound are padding: not attended, and zero in
        the result.
    dropout
        Probability at which attention weights are dropped (training only).

    Returns
    -------
    Tensor
        [rows, heads, head_dim].
    """
    if backend(query.device, query.dtype, dropout=dropout) == "varlen":
        return _varlen(query, key, value, queries, keys)
    return _per_sequence(query, key, value, queries, keys, dropout)


def _varlen(query: Tensor, key: Tensor, value: Tensor, queries: Packing, keys: Packing) -> Tensor:
    rows = queries.bounds[-1]
    cu_q, cu_k = queries.cu_seqlens, keys.cu_seqlens
    stop = keys.bounds[-1]
    out: Tensor = varlen_attn(
        query[:rows], key[:stop], value[:stop], cu_q, cu_k, queries.longest, keys.longest
    )
    return out if rows == query.shape[0] else F.pad(out, (0, 0, 0, 0, 0, query.shape[0] - rows))


def _per_sequence(
    query: Tensor, key: Tensor, value: Tensor, queries: Packing, keys: Packing, dropout: float
) -> Tensor:
    rest_q = query.shape[0] - queries.bounds[-1]
    rest_k = key.shape[0] - keys.bounds[-1]
    # One split, whose gradient is one concatenation; a slice a sequence would cost a full-size gradient each.
    parts = zip(
        torch.split(query, [*queries.lengths, rest_q]),
        torch.split(key, [*keys.lengths, rest_k]),
        torch.split(value, [*keys.lengths, rest_k]),
        strict=True,
    )
    outs = []
    for number, (q, k, v) in enumerate(parts):
        if number == len(queries.bounds) - 1:
            if rest_q:
                outs.append(torch.zeros_like(q))
        elif q.shape[0]:
            mixed = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], dropout_p=dropout
            )
            outs.append(mixed[0].transpose(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs) if outs else query
