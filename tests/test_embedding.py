"""Embeddings of cells, and that they depend on nothing but the cell and the model."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from token_files import make_cells, make_config, make_model, make_vocabulary, write_shards, write_tokens

from cellformers.embedding import default_mode, embed_cells
from cellformers.errors import UserError
from cellformers.io.files import read_metadata
from cellformers.models import checkpoints, layouts
from cellformers.models.directory import open_model
from cellformers.selection import choose_cells

LENGTHS = (40, 7, 60, 1, 13, 25, 9, 50)


@pytest.fixture(params=["v1", "v2"])
def setup(request, tmp_path):
    vocabulary = make_vocabulary(special=request.param)
    cells = make_cells(vocabulary, LENGTHS)
    model = make_model(tmp_path / "model", vocabulary)
    return vocabulary, cells, model, write_tokens(tmp_path / "tokens.parquet", cells, vocabulary)


@pytest.fixture
def v2(tmp_path):
    vocabulary = make_vocabulary(special="v2")
    cells = make_cells(vocabulary, LENGTHS)
    model = make_model(tmp_path / "model", vocabulary)
    return vocabulary, cells, model, write_tokens(tmp_path / "tokens.parquet", cells, vocabulary)


@pytest.fixture
def labelled(v2, tmp_path):
    """Cells of two types and three donors; the first two of every four are of type A."""
    table = pa.table(
        {
            "cell_id": [f"cell{i}" for i in range(len(LENGTHS))],
            "type": ["A", "A", "B", "B"] * 2,
            "donor": ["d1", "d2", "d3", None] * 2,
        }
    )
    pq.write_table(table, tmp_path / "cells.parquet")
    return tmp_path / "cells.parquet"


def vectors(path):
    table = pq.read_table(path)
    return table["cell_id"].to_pylist(), np.array(table["embedding"].to_pylist(), dtype=np.float32)


def hidden_states(model, cells, layer):
    network = checkpoints.load(model)
    with torch.inference_mode():
        return [
            network(torch.from_numpy(c.astype(np.int64)), torch.tensor([0, len(c)]), layer=layer).numpy()
            for c in cells
        ]


@pytest.mark.parametrize("layer", [0, -1, -3])
def test_cell_mode_is_the_mean_without_special_tokens(setup, tmp_path, layer):
    vocabulary, cells, model, tokens = setup
    result = embed_cells(tokens, model, tmp_path / "e.parquet", mode="cell", layer=layer)
    ids, found = vectors(tmp_path / "e.parquet")
    inner = slice(1, -1) if vocabulary.has_cls else slice(None)
    wanted = [h[inner].mean(0) for h in hidden_states(model, cells, layer)]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert ids == [f"cell{i}" for i in range(len(cells))]
    assert (result.n_cells, result.n_tokens, result.n_empty) == (8, sum(map(len, cells)), 0)


def test_cls_mode_is_the_first_position(v2, tmp_path):
    _, cells, model, tokens = v2
    assert default_mode(model) == "cls"
    embed_cells(tokens, model, tmp_path / "e.parquet", mode="cls", layer=-1)
    wanted = [h[0] for h in hidden_states(model, cells, -1)]
    np.testing.assert_allclose(vectors(tmp_path / "e.parquet")[1], wanted, atol=2e-6)


def test_cls_mode_needs_cls(tmp_path):
    vocabulary = make_vocabulary()
    model = make_model(tmp_path / "model", vocabulary)
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, (9,)), vocabulary)
    assert default_mode(model) == "cell"
    with pytest.raises(UserError, match="choose mode cell"):
        embed_cells(tokens, model, tmp_path / "e.parquet", mode="cls")
    assert not (tmp_path / "e.parquet").exists()


@pytest.mark.parametrize("mode", ["cls", "cell"])
def test_a_cell_has_the_same_vector_alone_in_any_shard_and_with_any_threads(v2, tmp_path, mode):
    vocabulary, cells, model, tokens = v2
    embed_cells(tokens, model, tmp_path / "all.parquet", mode=mode, threads=1)
    together = vectors(tmp_path / "all.parquet")[1]
    embed_cells(tokens, model, tmp_path / "two.parquet", mode=mode, threads=2)
    assert (tmp_path / "all.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    parts = []
    for i, shard in enumerate(write_shards(tmp_path, cells, vocabulary, len(cells))):
        embed_cells(shard, model, tmp_path / f"{i}.parquet", mode=mode)
        parts.append(vectors(tmp_path / f"{i}.parquet")[1])
    assert np.array_equal(np.concatenate(parts), together)


def test_blocks_of_cells_do_not_show(v2, tmp_path, monkeypatch):
    _, _, model, tokens = v2
    embed_cells(tokens, model, tmp_path / "a.parquet")
    monkeypatch.setattr("cellformers.embedding.BLOCK", 3)
    done = []
    embed_cells(tokens, model, tmp_path / "b.parquet", progress=done.append)
    assert np.array_equal(vectors(tmp_path / "a.parquet")[1], vectors(tmp_path / "b.parquet")[1])
    assert sum(done) == len(LENGTHS)


def test_a_cell_without_genes_gets_zeros_and_is_counted(setup, tmp_path):
    vocabulary, _, model, _ = setup
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, (5, 0, 6)), vocabulary)
    assert embed_cells(tokens, model, tmp_path / "e.parquet", mode="cell").n_empty == 1
    found = vectors(tmp_path / "e.parquet")[1]
    assert not found[1].any()
    assert found[[0, 2]].any(1).all()
    assert np.isfinite(found).all()


def test_no_cells_at_all(v2, tmp_path):
    vocabulary, _, model, _ = v2
    tokens = write_tokens(tmp_path / "t.parquet", [], vocabulary)
    assert embed_cells(tokens, model, tmp_path / "e.parquet").n_cells == 0
    assert pq.read_table(tmp_path / "e.parquet").num_rows == 0


def test_bfloat16_is_near_and_stored_as_float32(v2, tmp_path):
    _, _, model, tokens = v2
    for dtype in ("float32", "bfloat16"):
        embed_cells(tokens, model, tmp_path / dtype, mode="cell", dtype=dtype)
    exact, near = (vectors(tmp_path / dtype)[1] for dtype in ("float32", "bfloat16"))
    assert pq.read_schema(tmp_path / "bfloat16").field("embedding").type.value_type == "float"
    assert 0 < np.linalg.norm(exact - near) / np.linalg.norm(exact) < 0.03


def test_metadata_names_inputs_and_parameters_only(v2, tmp_path):
    vocabulary, _, model, tokens = v2
    embed_cells(tokens, model, tmp_path / "e.parquet", mode="cell", layer=0, threads=2)
    metadata = read_metadata(tmp_path / "e.parquet")
    assert metadata["step"] == "embed"
    assert metadata["parameters"] == {"mode": "cell", "layer": 0, "dtype": "float32"}
    assert metadata["inputs"]["dataset"] == "sha256:d"
    assert metadata["inputs"]["vocabulary"] == vocabulary.digest
    assert metadata["inputs"]["model"].startswith("sha256:")
    assert str(tmp_path) not in str(metadata)


def test_tokens_of_another_vocabulary_are_refused(v2, tmp_path):
    _, cells, model, _ = v2
    other = make_vocabulary(61, special="v2")
    tokens = write_tokens(tmp_path / "t.parquet", cells, other)
    with pytest.raises(UserError, match="wrong vocabulary"):
        embed_cells(tokens, model, tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ([2, 5, 64, 3], "token outside 0 to 63"),
        ([2, -1, 3], "token outside"),
        ([2, *[5] * 130, 3], "has 132 tokens, the model takes 128"),
        ([5, 6, 7], "does not begin with <cls>"),
        ([], "does not begin with <cls>"),
    ],
)
def test_cells_that_do_not_fit_are_named(v2, tmp_path, cell, words):
    vocabulary, cells, model, _ = v2
    bad = [*cells[:3], np.array(cell, dtype=np.int32)]
    tokens = write_tokens(tmp_path / "t.parquet", bad, vocabulary)
    with pytest.raises(UserError, match=words) as error:
        embed_cells(tokens, model, tmp_path / "e.parquet", mode="cls")
    assert "'cell3'" in str(error.value)
    assert not list(tmp_path.glob("*e.parquet"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "cel"}, "did you mean 'cell'"),
        ({"layer": 1}, "no layer 1"),
        ({"dtype": "float8"}, "float8"),
        ({"dtype": "fp8"}, "fp8 does not work here"),
        ({"backend": "sdp"}, "did you mean 'sdpa'"),
    ],
)
def test_options_that_do_not_exist(v2, tmp_path, options, words):
    _, _, model, tokens = v2
    with pytest.raises(UserError, match=words):
        embed_cells(tokens, model, tmp_path / "e.parquet", **options)


# --- which cells, which model, which precision --------------------------------------------------------------


@pytest.mark.parametrize("n_shards", [1, 3])
def test_chosen_cells_have_the_rows_they_have_among_all(v2, labelled, tmp_path, n_shards):
    vocabulary, cells, model, tokens = v2
    embed_cells(tokens, model, tmp_path / "all.parquet")
    ids, everything = vectors(tmp_path / "all.parquet")
    found = []
    for i, shard in enumerate(write_shards(tmp_path, cells, vocabulary, n_shards)):
        choice = choose_cells(shard, cells=labelled, where={"type": ["A"], "donor": ["d2", "d1"]})
        result = embed_cells(shard, model, tmp_path / f"{i}.parquet", choice=choice)
        found.append(pq.read_table(tmp_path / f"{i}.parquet"))
        assert result.n_cells == len(found[-1])
        metadata = read_metadata(tmp_path / f"{i}.parquet")
        assert metadata["parameters"]["where"] == {"donor": ["d1", "d2"], "type": ["A"]}
        assert metadata["inputs"]["cells"] == choice.digest
    joined = pa.concat_tables(found)
    assert joined["cell_id"].to_pylist() == ["cell0", "cell1", "cell4", "cell5"]
    rows = [ids.index(cell) for cell in joined["cell_id"].to_pylist()]
    assert np.array_equal(np.array(joined["embedding"].to_pylist(), np.float32), everything[rows])


def test_a_shard_without_a_chosen_cell_is_empty(v2, labelled, tmp_path):
    vocabulary, cells, model, _ = v2
    first = write_shards(tmp_path, cells, vocabulary, 4)[1]  # cells 2 and 3
    choice = choose_cells(first, cells=labelled, where={"type": ["A"]})
    assert embed_cells(first, model, tmp_path / "e.parquet", choice=choice).n_cells == 0
    assert pq.read_table(tmp_path / "e.parquet").num_rows == 0


def test_rows_are_written_in_groups_of_so_many_chosen_cells(v2, labelled, tmp_path, monkeypatch):
    _, _, model, tokens = v2
    monkeypatch.setattr("cellformers.embedding.BLOCK", 3)
    choice = choose_cells(tokens, cells=labelled, where={"type": ["A"]})
    embed_cells(tokens, model, tmp_path / "e.parquet", choice=choice)
    groups = pq.ParquetFile(tmp_path / "e.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [3, 1]


@pytest.mark.parametrize(
    "head",
    [
        {"head": "cell", "labels": ("a", "b", "c")},
        {"head": "gene", "labels": ("a", "b")},
        {"head": "tasks", "tasks": (("type", ("a", "b")), ("age", ("old", "young"))), "pooling": "attention"},
        {"head": "none"},
    ],
    ids=lambda head: head["head"],
)
def test_a_model_with_another_head_embeds_as_its_encoder_does(v2, tmp_path, head):
    vocabulary, _, model, tokens = v2
    network = checkpoints.load(model)
    config = make_config(vocabulary, **head)
    other = layouts.random_model(config, seed=5)
    encoder = {name: value for name, value in network.state_dict().items() if not name.startswith("head.")}
    missing, unexpected = other.load_state_dict(encoder, strict=False)
    assert not unexpected
    assert all(name.startswith("head.") for name in missing)
    (tmp_path / "tuned").mkdir()
    checkpoints.save(other, tmp_path / "tuned")
    vocabulary.save(tmp_path / "tuned" / "vocabulary")
    for mode in ("cls", "cell"):
        embed_cells(tokens, model, tmp_path / "plain.parquet", mode=mode, layer=0)
        embed_cells(tokens, tmp_path / "tuned", tmp_path / "tuned.parquet", mode=mode, layer=0)
        plain, tuned = (vectors(tmp_path / f"{name}.parquet")[1] for name in ("plain", "tuned"))
        assert plain.any()
        assert np.array_equal(plain, tuned)


@pytest.mark.parametrize(("short", "full"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_metadata_name_the_precision_in_full(v2, tmp_path, short, full):
    _, _, model, tokens = v2
    for dtype in (short, full):
        embed_cells(tokens, model, tmp_path / dtype, dtype=dtype)
        assert read_metadata(tmp_path / dtype)["parameters"]["dtype"] == full
    assert (tmp_path / short).read_bytes() == (tmp_path / full).read_bytes()


@pytest.mark.parametrize("mode", ["cls", "cell"])
def test_numbers_that_overflow_in_float16_are_refused(v2, tmp_path, mode):
    _, _, model, tokens = v2
    network = checkpoints.load(model)
    network.layers[-1].output_norm.weight.fill_(6e4)
    network.layers[-1].output_norm.bias.fill_(6e4)
    checkpoints.save(network, model)
    embed_cells(tokens, model, tmp_path / "e.parquet", mode=mode, layer=0, dtype="bf16")
    assert np.abs(vectors(tmp_path / "e.parquet")[1]).max() > 65504
    with pytest.raises(UserError, match=r"'cell0' is not finite; float16 .* --dtype bf16"):
        embed_cells(tokens, model, tmp_path / "half.parquet", mode=mode, layer=0, dtype="fp16")
    assert not list(tmp_path.glob("*half*"))


def test_the_first_cell_that_is_not_finite_is_named(v2, tmp_path):
    vocabulary, _, model, _ = v2
    cells = [np.array([2, gene, 3], np.int32) for gene in (5, 6, 7, 8, 7)]
    tokens = write_tokens(tmp_path / "t.parquet", cells, vocabulary)
    opened = open_model(model)
    opened.network.words.weight[7] = float("nan")
    with pytest.raises(UserError, match="'cell2' is not finite; are these weights"):
        embed_cells(tokens, opened, tmp_path / "e.parquet")
    assert not (tmp_path / "e.parquet").exists()
