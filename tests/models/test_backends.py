"""Networks of every backend against transformers; TransformerEngine's by a stand-in that checks how it is called."""

import fake_engine
import numpy as np
import pytest
import torch
from token_files import make_config, make_vocabulary

from cellformers.errors import UserError
from cellformers.models import checkpoints, layouts

pytest.importorskip("transformers")
import precision

LENGTHS = (20, 30, 0, 3, 1)


@pytest.fixture(params=["packed", "views"])
def te(request, monkeypatch):
    """The module over the stand-in, of a release that takes packed buffers, and of one before."""
    return fake_engine.install(monkeypatch, older=request.param == "views")


@pytest.fixture
def packed_te(monkeypatch):
    return fake_engine.install(monkeypatch)


def small(**changes):
    return make_config(make_vocabulary(), hidden_size=64, initializer_range=0.3, **changes)


def twins(config, *, fp8=False):
    """The same weights with plain layers and with TransformerEngine's."""
    plain = layouts.random_model(config, seed=1).eval()
    return plain, layouts.assemble(config, plain.state_dict(), backend="te", fp8=fp8).eval()


def batch(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 60, (sum(lengths),), generator=generator)
    return tokens, torch.tensor([0, *lengths]).cumsum(0)


# --- TransformerEngine, by the stand-in ---------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, -1, -3])
@pytest.mark.parametrize("lengths", [LENGTHS, (2,), (0, 0), (16, 16)])
def test_te_computes_what_plain_layers_compute(te, lengths, layer):
    plain, network = twins(small())
    tokens, bounds = batch(lengths)
    with torch.inference_mode():
        wanted = plain(tokens, bounds, layer=layer)
        assert torch.allclose(network(tokens, bounds, layer=layer), wanted, atol=1e-5)
        rows = torch.arange(0, len(tokens), 3)
        found = network(tokens, bounds, layer=layer, rows=rows)
    assert torch.allclose(found, wanted[rows], atol=1e-5)


def test_the_packed_buffer_goes_in_uncopied_but_for_the_queries_of_the_last_layer(packed_te):
    _, network = twins(small())
    tokens, bounds = batch()
    network(tokens, bounds, rows=torch.tensor([0, 20, 53]))
    assert [call["packed"] for call in fake_engine.calls] == [True, True, False]
    assert [call["queries"] for call in fake_engine.calls] == [54, 54, 3]
    assert {call["keys"] for call in fake_engine.calls} == {54}


def test_state_dicts_and_files_know_nothing_of_te(te, tmp_path):
    plain, network = twins(small())
    assert list(network.state_dict()) == list(plain.state_dict())
    assert isinstance(network.layers[0].qkv, te.Linear)
    assert isinstance(network.norm, te.LayerNorm)
    for layout in layouts.LAYOUTS:
        written = []
        for name, model in (("a", plain), ("b", network)):
            checkpoints.save(model, tmp_path / layout / name, layout=layout)
            written.append((tmp_path / layout / name / "model.safetensors").read_bytes())
        assert written[0] == written[1]


def test_loading_with_te(packed_te, monkeypatch, tmp_path):
    plain, _ = twins(small())
    checkpoints.save(plain, tmp_path)
    monkeypatch.setattr(checkpoints, "choose", lambda *_, **__: "te")
    network = checkpoints.load(tmp_path, backend="te", dtype=torch.bfloat16, fp8=True)
    assert (network.backend, network.fp8, network.training) == ("te", True, False)
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in network.parameters())
    tokens, bounds = batch()
    with torch.inference_mode():
        assert network(tokens, bounds).isfinite().all()


def test_gradients_of_te_are_those_of_plain_layers(te):
    config = small(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    plain, network = twins(config)
    grads = []
    for model in (plain, network):
        model.load_state_dict({k: v.clone() for k, v in plain.state_dict().items()}, assign=True)
        model.train().requires_grad_(True)
        model(*batch((5, 3))).square().sum().backward()  # with padding behind
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert list(grads[0]) == list(grads[1])
    assert all(torch.allclose(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-3) for name in grads[0])


def test_dropout_of_te_is_that_it_was_made_with(packed_te):
    _, network = twins(small(attention_probs_dropout_prob=0.5))
    network.train()
    tokens, bounds = batch()
    assert not torch.equal(network(tokens, bounds), network(tokens, bounds))
    network.layers[0].attention_dropout = 0.1
    with pytest.raises(ValueError, match="another backend or dropout"):
        network(tokens, bounds)


# --- fp8 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (0,), (31, 2), (200,)])
def test_fp8_gets_rows_it_takes_and_stays_finite(packed_te, lengths):
    _, network = twins(small(max_position_embeddings=256), fp8=True)
    network.to(torch.bfloat16)
    tokens, bounds = batch(lengths)
    with torch.inference_mode():
        for rows in (None, torch.arange(0, len(tokens), 7)):
            found = network(tokens, bounds, rows=rows)
            assert len(found) == len(tokens if rows is None else rows)
            assert found.isfinite().all()


def test_fp8_is_fp8_and_only_when_asked(packed_te):
    plain, network = twins(small(), fp8=True)
    tokens, bounds = batch()
    with torch.inference_mode():
        wanted, found = plain(tokens, bounds), network(tokens, bounds)
        error = float((found - wanted).norm() / wanted.norm())
        assert 1e-3 < error < 0.2
        network.fp8 = False
        assert torch.allclose(network(tokens, bounds), wanted, atol=1e-5)


def test_fp8_scales_are_powers_of_two(packed_te):
    recipe = packed_te.RECIPE
    parts = (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad)
    assert all(part.power_2_scale for part in parts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"intermediate_size": 72}, "intermediate_size is 72"), ({"hidden_size": 40}, "hidden_size is 40")],
)
def test_fp8_needs_sizes_divisible_by_16(packed_te, changes, words):
    config = make_config(make_vocabulary(), **changes)
    state = layouts.random_model(config, seed=0).state_dict()
    with pytest.raises(UserError, match=words) as error:
        layouts.assemble(config, state, backend="te", fp8=True)
    assert "multiples of 16" in str(error.value)


def test_fp8_on_the_cpu_is_refused_before_anything_is_read(tmp_path):
    checkpoints.save(layouts.random_model(small(), seed=0), tmp_path)
    with pytest.raises(UserError, match=r"fp8 does not work here \(for a GPU\)"):
        checkpoints.load(tmp_path, dtype=torch.bfloat16, fp8=True)


# --- against transformers, and a leak between cells ---------------------------------------------------


CELLS = (40, 300, 60, 200)


@pytest.fixture(scope="module")
def sharp():
    """A model of V1's shape, its cells, and their embeddings in fp32."""
    theirs = precision.sharp_model("V1-10M")
    cells = precision.draw_cells(CELLS, theirs.config.vocab_size)
    return theirs, cells, {mode: precision.reference(theirs, cells, mode=mode) for mode in ("cls", "cell")}


@pytest.mark.parametrize("backend", ["sdpa", "te", "te fp8"])
def test_embeddings_are_those_of_transformers_and_a_leak_would_show(monkeypatch, sharp, backend):
    fake_engine.install(monkeypatch)
    theirs, cells, wanted = sharp
    limits = precision.LIMITS["fp8" if backend == "te fp8" else "bf16"]
    options = {"backend": backend.split()[0], "fp8": backend == "te fp8"}
    network = precision.network(theirs, **options).to(torch.bfloat16)
    for mode in ("cls", "cell"):
        found = precision.embed(network, cells, mode=mode)
        assert limits.hold(found, wanted[mode]), precision.distances(found, wanted[mode])
    for leak in (precision.merged, precision.moved)[: 1 if options["fp8"] else 2]:
        with precision.leaking(leak):
            found = precision.embed(network, cells, mode="cls")
        assert not limits.hold(found, wanted["cls"]), (
            leak.__name__,
            precision.distances(found, wanted["cls"]),
        )


def test_in_fp32_nothing_is_lost(sharp):
    theirs, cells, wanted = sharp
    network = precision.network(theirs)
    for mode in ("cls", "cell"):
        assert precision.distances(precision.embed(network, cells, mode=mode), wanted[mode])[0] <= 1e-5


def test_limits_know_good_from_bad():
    good = np.ones((3, 4))
    limits = precision.LIMITS["bf16"]
    assert limits.hold(good * 1.03, good)
    assert not limits.hold(good * 1.05, good)
    assert not limits.hold(np.where(np.eye(3, 4) > 0, np.nan, good), good)
    assert not limits.hold(good + np.array([0.0, 0.09, 0.0, 0.0]), good)
