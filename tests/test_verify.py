"""Comparison with transformers: what passes, what does not, what is refused."""

import json
import math
import sys

import pytest
import torch
from command_line import run
from published_models import as_pickle, as_shards, publish, publish_te
from token_files import make_cells, make_vocabulary, write_tokens

from cellformers import verify
from cellformers.errors import UserError
from cellformers.models import attention, checkpoints
from cellformers.models.directory import model_digest
from cellformers.models.layouts import replace_head

pytest.importorskip("transformers")


@pytest.fixture
def vocabulary():
    return make_vocabulary(80, special="v2")


def model_in(folder, vocabulary, make=publish, **options):
    make(folder, **options)
    vocabulary.save(folder / "vocabulary")
    return folder


@pytest.mark.parametrize("make", [publish, publish_te], ids=["hf", "te"])
@pytest.mark.parametrize(
    "kind", ["ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "Model"]
)
def test_every_layout_and_head_passes(make, kind, tmp_path, vocabulary):
    folder = model_in(tmp_path / "m", vocabulary, make, kind=kind)
    report = verify.verify(folder, tmp_path / "v.json", n_cells=5)
    assert json.loads((tmp_path / "v.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "v.json"]
    assert report["model"] == model_digest(folder)
    assert report["n_cells"] == 5
    sdpa = report["backends"]["sdpa"]
    assert (report["passed"], sdpa["passed"], sdpa["dtype"]) == (True, True, "float32")
    names = [row["layer"] for row in sdpa["layers"]]
    assert names == ["embedding", "1", "2", "3", *([] if kind == "Model" else ["logits"])]
    for row in sdpa["layers"]:
        assert 0 <= row["mean_abs"] <= row["max_abs"] <= 5e-5
        assert row["scale"] > 0.01
    assert any(row["max_abs"] > 0 for row in sdpa["layers"])


def test_pickles_shards_and_several_tasks_are_compared_too(tmp_path, vocabulary):
    for change in (as_pickle, as_shards):
        folder = model_in(tmp_path / change.__name__, vocabulary)
        change(folder)
        assert verify.verify(folder, tmp_path / "v.json", n_cells=3)["passed"]
    network = replace_head(checkpoints.load(folder), seed=0, head="tasks", tasks=(("type", ("a", "b")),))
    checkpoints.save(network, tmp_path / "tasks")
    vocabulary.save(tmp_path / "tasks" / "vocabulary")
    report = verify.verify(tmp_path / "tasks", tmp_path / "v.json", n_cells=3)
    assert report["passed"]
    assert [row["layer"] for row in report["backends"]["sdpa"]["layers"]] == ["embedding", "1", "2", "3"]


def test_half_precision_is_judged_by_its_norm(tmp_path, vocabulary):
    folder = model_in(tmp_path / "m", vocabulary)
    for dtype in ("bf16", "float16"):
        report = verify.verify(folder, tmp_path / "v.json", n_cells=4, dtype=dtype)
        rows = report["backends"]["sdpa"]["layers"]
        assert report["passed"]
        assert rows[-2]["max_abs"] > 5e-5
        assert 1e-4 < rows[-2]["relative"] < 4e-2


def test_a_network_that_computes_something_else_does_not_pass(tmp_path, vocabulary, monkeypatch):
    folder = model_in(tmp_path / "m", vocabulary)
    honest = attention.attend

    def leaky(query, key, value, **options):
        return honest(query, key, value, **options) + 1e-3

    monkeypatch.setattr("cellformers.models.layers.attend", leaky)
    ran = run("verify", folder, "-o", tmp_path / "v.json", "--cells", "3")
    assert ran.code == 1
    assert "NOT PASSED" in ran.out
    report = json.loads((tmp_path / "v.json").read_text())
    passed = {row["layer"]: row["passed"] for row in report["backends"]["sdpa"]["layers"]}
    assert passed["embedding"]
    assert not passed["1"]
    assert not report["passed"]
    monkeypatch.setattr("cellformers.models.layers.attend", lambda *a, **o: honest(*a, **o) * torch.nan)
    ran = run("verify", folder, "-o", tmp_path / "v.json", "--cells", "3")
    assert ran.code == 1
    assert "not finite" in ran.out
    assert json.loads((tmp_path / "v.json").read_text())["backends"]["sdpa"]["layers"][1]["max_abs"] is None


def test_swapped_tensors_of_one_shape_are_found(tmp_path, vocabulary, monkeypatch):
    folder = model_in(tmp_path / "m", vocabulary)
    honest = checkpoints.from_published

    def swapped(tensors, config, **options):
        query, key = (f"bert.encoder.layer.0.attention.self.{part}.weight" for part in ("query", "key"))
        value = query.replace("query", "value")
        return honest({**tensors, key: tensors[value], value: tensors[key]}, config, **options)

    monkeypatch.setattr(checkpoints, "from_published", swapped)
    report = verify.verify(folder, tmp_path / "v.json", n_cells=3)
    assert not report["passed"]


def test_the_verb_prints_a_table(tmp_path, vocabulary):
    folder = model_in(tmp_path / "m", vocabulary, publish_te)
    ran = run("verify", folder, "-o", tmp_path / "v.json", "--cells", "4", "--backend", "sdpa", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert "4 cells" in lines[0]
    assert "sdpa, float32" in lines
    assert lines[-1] == "passed"
    assert sum(line.split()[:1] in (["1"], ["2"], ["3"], ["embedding"], ["logits"]) for line in lines) == 5


def test_convert_and_back_by_the_verb(tmp_path, vocabulary):
    folder = model_in(tmp_path / "m", vocabulary)
    for source, layout in ((folder, "te"), (tmp_path / "te", "hf"), (tmp_path / "hf", "hf")):
        ran = run("convert", source, "--to", layout, "-o", tmp_path / layout)
        assert ran.code == 0
    assert "layout hf already" in ran.err
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    ran = run("convert", folder, "--to", "onnx", "-o", tmp_path / "x")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)


# --- cells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", ["v1", "v2"])
def test_random_cells_are_short_to_long_and_of_the_vocabulary(special):
    vocabulary = make_vocabulary(80, special=special)
    config = checkpoints.Config(
        vocab_size=90, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=64,
    )  # fmt: skip
    cells = verify.random_cells(vocabulary, config, n_cells=6, seed=1)
    ends = 2 if special == "v2" else 0
    assert [len(cell) for cell in cells] == sorted(len(cell) for cell in cells)
    assert (len(cells[0]), len(cells[-1])) == (7 + ends, 64)
    genes = set(vocabulary.token_ids.tolist())
    for cell in cells:
        inner = cell[1:-1] if ends else cell
        assert set(inner.tolist()) <= genes
        assert len(set(cell.tolist())) == len(cell)
        if ends:
            special_tokens = vocabulary.special_tokens
            assert (cell[0], cell[-1]) == (special_tokens["<cls>"], special_tokens["<eos>"])
    again, other = (verify.random_cells(vocabulary, config, n_cells=6, seed=seed) for seed in (1, 2))
    assert all((a == b).all() for a, b in zip(cells, again, strict=True))
    assert any((a != b).any() for a, b in zip(cells, other, strict=True))


def test_cells_of_a_file_are_taken_from_its_beginning(tmp_path, vocabulary):
    folder = model_in(tmp_path / "m", vocabulary)
    cells = make_cells(vocabulary, (5, 30, 12, 40))
    cells.insert(1, cells[0][:0])
    tokens = write_tokens(tmp_path / "t.parquet", cells, vocabulary)
    report = verify.verify(folder, tmp_path / "v.json", tokens=tokens, n_cells=3)
    assert (report["n_cells"], report["n_tokens"]) == (3, 5 + 30 + 12 + 6)
    assert report["passed"]
    other = make_vocabulary(70, special="v2")
    for chosen, found, words in (
        (vocabulary, make_cells(vocabulary, (80,)), "82 tokens, the model takes 64"),
        (vocabulary, [cells[1]], "no cell with a token"),
        (other, make_cells(other, (5,)), "wrong vocabulary"),
    ):
        write_tokens(tokens, found, chosen)
        with pytest.raises(UserError, match=words):
            verify.verify(folder, tmp_path / "v.json", tokens=tokens)


def test_batches_are_padded_up_to_a_limit(monkeypatch):
    cells = [torch.arange(n).numpy() for n in (3, 9, 20, 64, 64, 64)]
    monkeypatch.setattr(verify, "PADDED_TOKENS", 128)
    assert [[len(cell) for cell in batch] for batch in verify._batches(cells)] == [[3, 9, 20], [64, 64], [64]]


# --- refusals ---------------------------------------------------------------------------------------------


def test_what_does_not_do_is_said_in_one_line(tmp_path, vocabulary, monkeypatch):
    folder = model_in(tmp_path / "m", vocabulary)
    for options, words in (
        ({"backends": ["varlen"]}, "varlen"),
        ({"backends": ["spda"]}, "did you mean 'sdpa'"),
        ({"dtype": "fp8"}, "no backend here computes in fp8"),
        ({"dtype": "float12"}, "float12"),
    ):
        if "varlen" in words and torch.cuda.is_available():
            continue
        with pytest.raises(UserError, match=words):
            verify.verify(folder, tmp_path / "v.json", **options)
    publish(tmp_path / "bare")
    with pytest.raises(UserError, match="carries no vocabulary"):
        verify.verify(tmp_path / "bare", tmp_path / "v.json")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        verify.verify(folder, tmp_path / "v.json")
    assert not (tmp_path / "v.json").exists()


def test_differences_add_up():
    difference = verify.Difference()
    difference.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    difference.add(torch.tensor([-3.0]), torch.tensor([-2.0]))
    row = difference.row("1", "float32")
    assert (row["max_abs"], row["mean_abs"], row["scale"], row["passed"]) == (2.0, 1.0, 4.0, False)
    assert math.isclose(row["relative"], math.sqrt(5 / 21))
    near = verify.Difference()
    near.add(torch.tensor([100.001]), torch.tensor([100.0]))
    assert not near.row("3", "float32")["passed"]
    assert near.row("logits", "float32")["passed"]
    assert near.row("3", "bfloat16")["passed"]
    broken = verify.Difference()
    broken.add(torch.tensor([math.nan, 0.0]), torch.tensor([1.0, 0.0]))
    assert not broken.row("3", "bfloat16")["passed"]
    assert broken.row("3", "bfloat16")["max_abs"] is None
