"""Every backend of a GPU against transformers in fp32, at the shapes of published models.

The lengths of the cells are drawn, or read from the file that CELLFORMERS_LENGTHS names (Parquet with a column
`length`, or text): real ones are worth a run.
"""

import os
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("transformers")
import precision
from precision import LIMITS, MODES, SHAPES

from cellformers.models import attention
from cellformers.models.batches import packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

HALF = ("te", "varlen", "sdpa")
PLANS = (*HALF, "te fp8")
ALONE = 5e-3  # relative, a cell alone against the same cell in a batch


@pytest.fixture(autouse=True)
def exact_products():
    """The fp32 reference without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def need(plan: str) -> None:
    """Skip, with the reason, what this machine does not have."""
    reason = attention.fp8_refusal(torch.device("cuda")) if "fp8" in plan else attention.refusal(plan)
    if reason is not None:
        pytest.skip(f"{plan}: {reason}")


def limits(plan: str) -> precision.Limits:
    return LIMITS["fp8" if "fp8" in plan else "bf16"]


def lengths(most: int) -> list[int]:
    """A short cell before a long one, where a leak shows best, then a mixture with a full-length cell."""
    path = os.environ.get("CELLFORMERS_LENGTHS")
    if path is None:
        rest = np.random.default_rng(0).lognormal(np.log(600), 0.8, 12)
    elif path.endswith(".parquet"):
        rest = pq.read_table(path, columns=["length"])["length"].to_numpy()[:40]
    else:
        rest = np.loadtxt(path, ndmin=1)[:40]
    return [40, 700, most, 1, *np.clip(rest, 1, most).astype(int).tolist()]


@cache
def reference(shape: str):
    """Model, cells, and their embeddings in fp32 on this device, by both modes."""
    theirs = precision.sharp_model(shape).to("cuda")
    cells = precision.draw_cells(
        lengths(SHAPES[shape]["max_position_embeddings"]), SHAPES[shape]["vocab_size"]
    )
    wanted = {mode: precision.reference(theirs, cells, mode=mode) for mode in ("cls", "cell")}
    return theirs.cpu(), cells, wanted


def make(shape: str, plan: str, dtype: torch.dtype = torch.bfloat16):
    backend, _, fp8 = plan.partition(" ")
    assert attention.choose(backend, torch.device("cuda"), dtype, fp8=bool(fp8)) == backend
    network = precision.network(reference(shape)[0], backend=backend, fp8=bool(fp8))
    return network.to("cuda", dtype).requires_grad_(False)


# --- numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_embeddings_are_those_of_transformers_and_a_leak_would_show(shape, plan):
    need(plan)
    _, cells, wanted = reference(shape)
    network = make(shape, plan)
    for mode in ("cls", "cell"):
        found = precision.embed(network, cells, mode=mode)
        print(shape, plan, mode, precision.distances(found, wanted[mode]))
        assert limits(plan).hold(found, wanted[mode]), (mode, precision.distances(found, wanted[mode]))
    for leak in (precision.merged, precision.moved)[: 1 if "fp8" in plan else 2]:
        with precision.leaking(leak):
            found = precision.embed(network, cells, mode="cls")
        assert not limits(plan).hold(found, wanted["cls"]), (leak.__name__, "went unnoticed")


@pytest.mark.parametrize("backend", HALF)
def test_float16_like_bfloat16(backend):
    need(backend)
    _, cells, wanted = reference("V1-10M")
    network = make("V1-10M", backend, torch.float16)
    assert LIMITS["bf16"].hold(precision.embed(network, cells, mode="cell"), wanted["cell"])


@pytest.mark.parametrize("shape", SHAPES)
def test_in_fp32_sdpa_is_exact(shape):
    _, cells, wanted = reference(shape)
    network = make(shape, "sdpa", torch.float32)
    for mode in ("cls", "cell"):
        assert precision.distances(precision.embed(network, cells, mode=mode), wanted[mode])[0] <= 1e-3


def test_the_reference_is_that_of_the_cpu():
    theirs, cells, wanted = reference("V1-10M")
    on_cpu = precision.reference(theirs, cells[:2], mode="cell")
    assert precision.distances(wanted["cell"][:2], on_cpu)[0] <= 1e-3


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cell_alone_equals_the_same_cell_in_a_batch(shape, plan):
    need(plan)
    cells, mode = reference(shape)[1], MODES[shape]
    network = make(shape, plan)
    together = precision.embed(network, cells, mode=mode)
    alone = np.concatenate([precision.embed(network, [cell], mode=mode) for cell in cells])
    # fp8 rounds to 3 bits, so a last bit of the sums before it, which the size of a batch may change, is seen
    most = LIMITS["fp8"].error if "fp8" in plan else ALONE
    assert precision.distances(alone, together)[0] <= most


def test_fp8_does_not_remember_earlier_batches():
    need("te fp8")
    _, cells, _ = reference("V1-10M")
    network = make("V1-10M", "te fp8")
    before = precision.embed(network, cells[:2], mode="cell")
    weight = network.layers[0].output_norm.weight
    weight.mul_(64.0)  # later layers see much larger numbers
    precision.embed(network, cells[2:], mode="cell")
    weight.div_(64.0)  # exact: a power of two
    np.testing.assert_array_equal(precision.embed(network, cells[:2], mode="cell"), before)


@pytest.mark.parametrize("backend", HALF)
def test_empty_cells_and_batches_of_nothing(backend):
    need(backend)
    network = make("V1-10M", backend)
    some = torch.arange(4, 40, device="cuda")
    with torch.inference_mode():
        alone = network(some, torch.tensor([0, 36]))
        among = network(some, torch.tensor([0, 0, 36, 36]))
        assert float((alone - among).norm() / alone.norm()) <= ALONE
        assert network(some[:0], torch.tensor([0, 0, 0])).shape == (0, 256)


# --- the device is kept busy --------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [False, True], ids=["all", "first"])
@pytest.mark.parametrize("plan", PLANS)
def test_nothing_waits_for_the_device(plan, rows):
    need(plan)
    network = make("V1-10M", plan)
    tokens, bounds = torch.randint(4, 2000, (1096,), device="cuda"), torch.tensor([0, 40, 740, 1096])
    wanted = bounds[:-1] if rows else None
    with torch.inference_mode():
        network(tokens, bounds, rows=wanted)  # kernels are prepared
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            network(tokens, bounds, rows=wanted)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_batch_starts_before_the_last_one_is_fetched():
    """Results come over pinned memory, and nothing in the loop but the fetching itself waits."""
    from cellformers.models.batches import Budget

    network = make("V1-10M", "sdpa")
    cells = precision.draw_cells([300] * 12, 2000)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(packed(
            cells, lambda tokens, cu: network(tokens, cu, rows=cu[:-1]).float(),
            device=torch.device("cuda"), budget=Budget(900),
        ))  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [n for n, _ in found] == [3] * 4
    assert all(result.device.type == "cpu" and result.is_pinned() for _, result in found)
    wanted = precision.embed(network, cells, mode="cls", layer=0)
    assert precision.distances(torch.cat([r for _, r in found]).numpy(), wanted)[0] <= ALONE


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("backend", HALF)
def test_a_step_of_training_has_gradients_like_fp32(backend, dropout):
    need(backend)
    changes = {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": dropout}
    torch.manual_seed(0)
    theirs = precision.transformers.BertForMaskedLM(
        precision.transformers.BertConfig(**{**SHAPES["V1-10M"], **changes})
    )
    tokens = torch.randint(4, 2000, (37 + 500,), device="cuda")
    grads = []
    for name, dtype in (("sdpa", torch.float32), (backend, torch.bfloat16)):
        network = precision.network(theirs, backend=name).to("cuda").train().requires_grad_(True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            hidden = network(tokens, torch.tensor([0, 37, 537]))
        (hidden.float() * torch.linspace(-1, 1, 256, device="cuda")).mean().backward()
        grads.append(network.layers[0].qkv.weight.grad.double())
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)
    if not dropout:
        assert float((grads[1] - grads[0]).norm() / grads[0].norm()) <= 0.1
