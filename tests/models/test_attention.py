"""Which backend computes, and that attention stays within its sequence whatever is padded, merged or left out."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import fake_engine
import pytest
import torch
import torch.nn.functional as F

from cellformers.errors import UserError
from cellformers.models import attention
from cellformers.models.attention import attend, available_backends, choose, kernel, merge, packing

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture
def without_te(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.delitem(sys.modules, "cellformers.models.te", raising=False)


def bounds(*lengths):
    return packing(torch.tensor([0, *lengths]).cumsum(0), CPU)


def naive(q, k, v, of_q, of_k):
    """Attention spelled out, in float64."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for (a, b), (c, d) in zip(pairwise(of_q), pairwise(of_k), strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[a:b].double(), k[c:d].double()) / q.shape[-1] ** 0.5
        out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[c:d].double())
    return out


# --- the choice ---------------------------------------------------------------------------------------


def test_on_the_cpu_there_is_sdpa_alone():
    works = available_backends()
    assert list(works) == ["te", "varlen", "sdpa"]
    assert works["sdpa"] is None
    for dtype in (FP32, BF16, FP16):
        assert choose("auto", CPU, dtype) == "sdpa"
        assert choose("sdpa", CPU, dtype) == "sdpa"


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_on_a_gpu_te_comes_before_varlen_before_sdpa(monkeypatch, dtype):
    fake_engine.pretend_gpu(monkeypatch)
    fake_engine.install(monkeypatch)
    assert choose("auto", CUDA, dtype) == "te"
    assert choose("auto", CUDA, FP32) == "sdpa"
    assert choose("varlen", CUDA, dtype) == "varlen"
    assert choose("sdpa", CUDA, dtype) == "sdpa"


def test_without_te_varlen_is_taken_and_without_both_sdpa(monkeypatch, without_te):
    fake_engine.pretend_gpu(monkeypatch)
    assert "not installed" in available_backends()["te"]
    assert choose("auto", CUDA, BF16) == "varlen"
    monkeypatch.setattr(attention, "VARLEN", "torch.nn.attention.nothing")
    assert choose("auto", CUDA, BF16) == "sdpa"
    with pytest.raises(UserError, match=r"varlen does not work here \(torch before 2.10"):
        choose("varlen", CUDA, BF16)


def test_a_te_for_another_torch_is_told_apart_from_none(monkeypatch):
    fake_engine.pretend_gpu(monkeypatch)
    fake_engine.install(monkeypatch)
    del sys.modules["cellformers.models.te"]
    monkeypatch.delattr(sys.modules["transformer_engine.pytorch"], "DotProductAttention")
    assert "can't be imported" in available_backends()["te"]
    assert choose("auto", CUDA, BF16) == "varlen"


def test_an_old_gpu_has_sdpa_alone(monkeypatch):
    fake_engine.pretend_gpu(monkeypatch, (7, 5))
    fake_engine.install(monkeypatch)
    assert choose("auto", CUDA, FP16) == "sdpa"
    with pytest.raises(UserError, match=r"8\.0 and above, this one has 7\.5"):
        choose("te", CUDA, FP16)


@pytest.mark.parametrize(
    ("requested", "device", "dtype", "words"),
    [
        ("t", CUDA, BF16, "did you mean 'te'"),
        ("flash", CUDA, BF16, "no backend 'flash'"),
        ("te", CUDA, FP32, "half precision, not on cuda in float32"),
        ("varlen", CPU, BF16, "not on cpu in bfloat16"),
    ],
)
def test_a_backend_that_does_not_fit_is_refused(monkeypatch, requested, device, dtype, words):
    fake_engine.pretend_gpu(monkeypatch)
    fake_engine.install(monkeypatch)
    with pytest.raises(UserError, match=words) as error:
        choose(requested, device, dtype)
    assert "\n" not in str(error.value)


def test_fp8_is_for_te_on_a_recent_gpu(monkeypatch):
    fake_engine.install(monkeypatch)
    with pytest.raises(UserError, match="fp8 does not work here"):
        choose("auto", CPU, BF16, fp8=True)
    fake_engine.pretend_gpu(monkeypatch)
    assert choose("auto", CUDA, BF16, fp8=True) == choose("te", CUDA, BF16, fp8=True) == "te"
    with pytest.raises(UserError, match="varlen has no fp8"):
        choose("varlen", CUDA, BF16, fp8=True)
    with pytest.raises(UserError, match="half precision"):
        choose("te", CUDA, FP32, fp8=True)
    fake_engine.pretend_gpu(monkeypatch, (8, 0))
    with pytest.raises(UserError, match=r"8\.9 and above, this one has 8\.0"):
        choose("auto", CUDA, BF16, fp8=True)


def test_fp8_without_te_says_so(monkeypatch, without_te):
    fake_engine.pretend_gpu(monkeypatch)
    with pytest.raises(UserError, match="TransformerEngine is not installed"):
        choose("auto", CUDA, BF16, fp8=True)


def test_varlen_gives_way_where_it_can_not():
    assert kernel("varlen", CUDA, BF16) == "varlen"
    assert kernel("varlen", CUDA, BF16, dropout=0.1) == "sdpa"
    assert kernel("varlen", CUDA, FP32) == "sdpa"
    assert kernel("varlen", CPU, BF16) == "sdpa"
    assert kernel("sdpa", CUDA, BF16) == "sdpa"


# --- the computation ----------------------------------------------------------------------------------


def draw(tokens, heads=2, dim=8, seed=0):
    """[tokens, heads, 3, dim], as a fused projection gives it."""
    return torch.randn(tokens, heads, 3, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("most", [1, 512])
@pytest.mark.parametrize("lengths", [(5, 1, 9), (4, 4, 4), (4, 4, 0, 4, 7, 7), (0, 0, 3), (6,)])
def test_each_sequence_attends_to_itself(monkeypatch, lengths, most):
    keys = bounds(*lengths)
    q, k, v = draw(keys.bounds[-1]).unbind(2)
    plain = merge  # as a GPU would merge, too
    monkeypatch.setattr(attention, "merge", lambda a, b, _: plain(a, b, most))
    found = attend(q, k, v, queries=keys, keys=keys)
    assert torch.allclose(found, naive(q, k, v, keys.bounds, keys.bounds).float(), atol=1e-6)


def test_fewer_queries_than_keys_and_padding_behind_both(monkeypatch):
    keys, queries = bounds(4, 4, 6, 6, 0), bounds(2, 2, 0, 3, 0)
    _, k, v = draw(24).unbind(2)  # four rows of padding
    q = draw(10, seed=1)[:, :, 0]  # three
    k[20:], v[20:], q[7:] = 1e4, 1e4, 1e4
    wanted = naive(q[:7], k, v, queries.bounds, keys.bounds).float()
    for most in (1, 512):
        plain = merge
        monkeypatch.setattr(attention, "merge", lambda a, b, _, p=plain, m=most: p(a, b, m))
        found = attend(q, k, v, queries=queries, keys=keys)
        monkeypatch.undo()
        assert torch.allclose(found[:7], wanted, atol=1e-6)
        assert not found[7:].any()


def test_a_batch_without_queries_is_zeros():
    nothing = bounds(0, 0)
    q, k, v = draw(16).unbind(2)
    assert not attend(q, k, v, queries=nothing, keys=nothing).any()


def test_runs_of_equal_lengths():
    assert merge([3, 3, 3, 2], [3, 3, 3, 2], 512) == [(3, 3, 3), (1, 2, 2)]
    assert merge([3, 3, 3, 2], [3, 3, 3, 2], 2) == [(2, 3, 3), (1, 3, 3), (1, 2, 2)]
    assert merge([1, 1], [4, 5], 512) == [(1, 1, 4), (1, 1, 5)]
    assert merge([3, 3], [3, 3], 1) == [(1, 3, 3), (1, 3, 3)]


def test_varlen_gets_the_sequences_alone_and_bounds_it_takes(monkeypatch):
    keys, queries = bounds(4, 6), bounds(1, 2)
    q, k, v = (*draw(5, seed=1)[:, :, :1].unbind(2), *draw(16)[:, :, 1:].unbind(2))
    seen = {}

    def flash(query, key, value, cu_q, cu_k, longest_q, longest_k):
        seen.update(rows=len(query), tokens=len(key), longest=(longest_q, longest_k))
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert all(x.stride(-1) == 1 for x in (query, key, value))
        return naive(query, key, value, cu_q.tolist(), cu_k.tolist()).float()

    monkeypatch.setitem(sys.modules, attention.VARLEN, SimpleNamespace(varlen_attn=flash))
    monkeypatch.setattr(attention, "kernel", lambda *_, **__: "varlen")
    found = attend(q, k, v, queries=queries, keys=keys, backend="varlen")
    assert seen == {"rows": 3, "tokens": 10, "longest": (2, 6)}
    assert torch.allclose(found[:3], naive(q, k, v, queries.bounds, keys.bounds)[:3].float(), atol=1e-6)
    assert found.shape == (5, 2, 8)
    assert not found[3:].any()


def test_varlen_of_torch_takes_these_arguments():
    varlen = pytest.importorskip(attention.VARLEN)
    import inspect

    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


def test_gradients_pass_through_merged_sequences(monkeypatch):
    plain = merge
    monkeypatch.setattr(attention, "merge", lambda a, b, _: plain(a, b, 512))
    keys = bounds(4, 4, 3)
    qkv = draw(14).requires_grad_()
    attend(*qkv.unbind(2), queries=keys, keys=keys).square().sum().backward()
    merged = qkv.grad.clone()
    qkv.grad = None
    for a, b in pairwise(keys.bounds):
        q, k, v = (x[None].transpose(1, 2) for x in qkv[a:b].unbind(2))
        F.scaled_dot_product_attention(q, k, v).square().sum().backward()
    assert torch.allclose(merged, qkv.grad, atol=1e-5)
    assert not merged[11:].any()
