"""Attention over packed sequences, and which backend computes it.

A batch is one flat run of tokens, sequence after sequence, without padding; no token attends beyond its own
sequence. Three backends:

- "te": TransformerEngine's modules for attention, linear layers and norms (models/te.py); a GPU, half precision, fp8;
- "varlen": torch's variable-length attention, the whole batch in one call; a GPU, half precision;
- "sdpa": torch's scaled_dot_product_attention, sequence by sequence; every device and precision.

    choose("auto", torch.device("cuda"), torch.bfloat16)      # the first of them that works
"""

import importlib
from importlib.util import find_spec
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cellformers.errors import UserError, did_you_mean

BACKENDS = ("te", "varlen", "sdpa")  # the fastest first
HALF = (torch.bfloat16, torch.float16)
HALF_CAPABILITY = (8, 0)  # bfloat16 and the flash kernels
FP8_CAPABILITY = (8, 9)
VARLEN = "torch.nn.attention.varlen"  # imported when needed: it takes seconds
MOST_MERGED = 512  # sequences of one call of sdpa: batch times heads is a dimension of a launch, below 65,536


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


# --- which backend ------------------------------------------------------------------------------------


def compute_capability() -> tuple[int, int] | None:
    """That of the GPU in use, such as (9, 0); None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def _too_old(needed: tuple[int, int]) -> str | None:
    found = compute_capability()
    if found is None:
        return "for a GPU, in half precision"
    if found < needed:
        return f"for GPUs of compute capability {needed[0]}.{needed[1]} and above, this one has {found[0]}.{found[1]}"
    return None


def refusal(backend: str) -> str | None:
    """Why a backend does not work here, or None where it does."""
    if backend == "sdpa":
        return None
    too_old = _too_old(HALF_CAPABILITY)
    if too_old is not None:
        return too_old
    if backend == "varlen":
        return "torch before 2.10 has none" if find_spec(VARLEN) is None else None
    try:
        importlib.import_module("cellformers.models.te")
    except ModuleNotFoundError as error:
        return f"TransformerEngine is not installed ({error})"
    except (ImportError, OSError, AssertionError, AttributeError, RuntimeError) as error:
        # a build for another torch or CUDA: what it says is all there is to know
        return f"TransformerEngine can't be imported ({' '.join(str(error).split())[:200]})"
    return None


def available_backends() -> dict[str, str | None]:
    """The backends by name: None for one that works here, else why it does not."""
    return {name: refusal(name) for name in BACKENDS}


def fp8_refusal(device: torch.device) -> str | None:
    """Why matrix products in fp8 do not work on a device, or None where they do."""
    if device.type != "cuda":
        return "for a GPU"
    return _too_old(FP8_CAPABILITY) or refusal("te")


def choose(requested: str, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> str:
    """The backend of a network: the one requested, or for "auto" the fastest that works here.

    Parameters
    ----------
    requested
        "auto", "te", "varlen" or "sdpa".
    device, dtype
        Where, and in what precision, the activations will be (under autocast: its dtype).
    fp8
        Whether matrix products are to be in fp8, which "te" alone does.

    Raises
    ------
    UserError
        If what is requested does not work on this device or in this precision.
    """
    if requested not in ("auto", *BACKENDS):
        raise UserError(f"no backend {requested!r}", fix=did_you_mean(requested, ["auto", *BACKENDS]))
    if fp8:
        return _choose_for_fp8(requested, device, dtype)
    fast = device.type == "cuda" and dtype in HALF
    if requested == "auto":
        return next(name for name in BACKENDS if name == "sdpa" or (fast and refusal(name) is None))
    reason = refusal(requested)
    if reason is not None:
        raise UserError(f"backend {requested} does not work here ({reason})", fix="choose auto")
    if requested != "sdpa" and not fast:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"backend {requested} computes on a GPU in half precision, not on {device.type} in {name}",
            fix="choose accelerator cuda with dtype bfloat16, or backend sdpa",
        )
    return requested


def _choose_for_fp8(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    if requested not in ("auto", "te"):
        raise UserError(f"backend {requested} has no fp8", fix="choose backend te or auto, or dtype bfloat16")
    if dtype not in HALF:
        raise UserError("fp8 goes with weights in half precision", fix="choose bfloat16 weights")
    reason = fp8_refusal(device)
    if reason is not None:
        raise UserError(f"fp8 does not work here ({reason})", fix="choose dtype bfloat16")
    return "te"


def kernel(backend: str, device: torch.device, dtype: torch.dtype, *, dropout: float = 0.0) -> str:
    """What `attend` calls for one batch, "varlen" or "sdpa": the former has no dropout and no single precision."""
    fits = device.type == "cuda" and dtype in HALF and not dropout
    return "varlen" if backend == "varlen" and fits else "sdpa"


# --- the computation ----------------------------------------------------------------------------------


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, queries: Packing, keys: Packing, backend: str = "sdpa",
    dropout: float = 0.0,
) -> Tensor:  # fmt: skip
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
    backend
        "varlen" or "sdpa"; what the former can't do (dropout, single precision) the latter does.
    dropout
        Probability at which attention weights are dropped (training only).

    Returns
    -------
    Tensor
        [rows, heads, head_dim].
    """
    if not queries.bounds[-1]:
        return query.new_zeros(query.shape)
    if kernel(backend, query.device, query.dtype, dropout=dropout) == "varlen":
        return _varlen(query, key, value, queries, keys)
    return _by_sequence(query, key, value, queries, keys, dropout)


def _varlen(query: Tensor, key: Tensor, value: Tensor, queries: Packing, keys: Packing) -> Tensor:
    rows, stop = queries.bounds[-1], keys.bounds[-1]
    out: Tensor = importlib.import_module(VARLEN).varlen_attn(
        query[:rows],
        key[:stop],
        value[:stop],
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.longest,
        keys.longest,
    )
    return pad_rows(out, query.shape[0])


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """x with zeros behind it, up to `rows` rows."""
    return x if x.shape[0] == rows else F.pad(x, (0, 0) * (x.ndim - 1) + (0, rows - x.shape[0]))


def merge(query_lengths: list[int], key_lengths: list[int], most: int) -> list[tuple[int, int, int]]:
    """Runs of successive sequences of equal lengths, at most `most` long: (sequences, queries, keys of each)."""
    runs: list[tuple[int, int, int]] = []
    for lengths in zip(query_lengths, key_lengths, strict=True):
        if runs and runs[-1][1:] == lengths and runs[-1][0] < most:
            runs[-1] = (runs[-1][0] + 1, *lengths)
        else:
            runs.append((1, *lengths))
    return runs


def _by_sequence(
    query: Tensor, key: Tensor, value: Tensor, queries: Packing, keys: Packing, dropout: float
) -> Tensor:
    # On a GPU a call costs more than the work of a short cell, and cells cut at the model's length are equally
    # long; on the CPU nothing is gained, and cells one by one round alike in any batch.
    runs = merge(queries.lengths, keys.lengths, MOST_MERGED if query.is_cuda else 1)
    rest = query.shape[0] - queries.bounds[-1]
    # One split, whose gradient is one concatenation; a slice a sequence would cost a full-size gradient each.
    at = [n * length for n, length, _ in runs]
    over = [n * length for n, _, length in runs]
    parts = zip(
        runs,
        torch.split(query, [*at, rest])[:-1],
        torch.split(key, [*over, key.shape[0] - keys.bounds[-1]])[:-1],
        torch.split(value, [*over, key.shape[0] - keys.bounds[-1]])[:-1],
        strict=True,
    )
    outs = []
    for (n, *_), q, k, v in parts:
        if q.shape[0]:
            q, k, v = (x.view(n, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            outs.append(
                F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).flatten(0, 1)
            )
    if rest:
        outs.append(query.new_zeros((rest, *query.shape[1:])))
    return outs[0] if len(outs) == 1 else torch.cat(outs)
