"""Embeddings of cells and genes, and that they depend on nothing but the cell and the model."""

import hashlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from token_files import make_cells, make_model, make_vocabulary, write_shards, write_tokens

from cellformers.embedding import default_mode, embed_cells, merge_gene_sums, sum_genes
from cellformers.errors import UserError
from cellformers.io.files import read_metadata
from cellformers.models import checkpoints

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
    sum_genes(tokens, model, tmp_path / "s.parquet")
    assert merge_gene_sums([tmp_path / "s.parquet"], tmp_path / "g.parquet") == 0


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
    for work in (embed_cells, sum_genes):
        with pytest.raises(UserError, match="wrong vocabulary"):
            work(tokens, model, tmp_path / "e.parquet")
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
    [({"mode": "cel"}, "did you mean 'cell'"), ({"layer": 1}, "no layer 1"), ({"dtype": "float8"}, "float8")],
)
def test_options_that_do_not_exist(v2, tmp_path, options, words):
    _, _, model, tokens = v2
    with pytest.raises(UserError, match=words):
        embed_cells(tokens, model, tmp_path / "e.parquet", **options)


# --- genes --------------------------------------------------------------------------------------------


def gene_embeddings(folder, shards, model, **options):
    sums = []
    for i, shard in enumerate(shards):
        sums.append(folder / f"sums-{len(shards)}-{i}.parquet")
        sum_genes(shard, model, sums[-1], **options)
    output = folder / f"genes-{len(shards)}.parquet"
    merge_gene_sums(sums[::-1], output)
    return output


def test_gene_embeddings_are_means_over_the_cells_with_the_gene(setup, tmp_path):
    vocabulary, cells, model, tokens = setup
    table = pq.read_table(gene_embeddings(tmp_path, [tokens], model, layer=-1)).to_pylist()
    states = hidden_states(model, cells, -1)
    by_id = dict(
        zip(vocabulary.gene_ids, zip(vocabulary.token_ids, vocabulary.symbols, strict=True), strict=True)
    )
    occurring = np.setdiff1d(np.concatenate(cells), list(vocabulary.special_tokens.values()))
    assert [row["gene_id"] for row in table] == sorted(row["gene_id"] for row in table)
    assert len(table) == len(occurring)
    for row in table:
        token, symbol = by_id[row["gene_id"]]
        found = [h[list(c).index(token)] for c, h in zip(cells, states, strict=True) if token in c]
        assert (row["symbol"], row["n_cells"]) == (symbol, len(found))
        np.testing.assert_allclose(row["embedding"], np.mean(found, axis=0), atol=1e-6)


def test_gene_embeddings_are_the_same_bytes_for_any_shards_and_threads(v2, tmp_path):
    vocabulary, _, model, _ = v2
    cells = make_cells(vocabulary, [10 + i % 40 for i in range(30)], seed=4)
    digests = set()
    for n, threads in ((1, 1), (2, 2), (7, 1)):
        shards = write_shards(tmp_path, cells, vocabulary, n)
        output = gene_embeddings(tmp_path, shards, model, threads=threads)
        digests.add(hashlib.sha256(output.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_sums_of_different_models_do_not_merge(v2, tmp_path):
    vocabulary, _, model, tokens = v2
    other = make_model(tmp_path / "other", vocabulary, seed=1)
    sum_genes(tokens, model, tmp_path / "a.parquet")
    sum_genes(tokens, other, tmp_path / "b.parquet")
    with pytest.raises(UserError, match="inputs not as in"):
        merge_gene_sums([tmp_path / "a.parquet", tmp_path / "b.parquet"], tmp_path / "g.parquet")
    with pytest.raises(UserError, match="at least one"):
        merge_gene_sums([], tmp_path / "g.parquet")


def test_states_beyond_the_range_of_exact_sums_are_refused(v2, tmp_path):
    _, _, model, tokens = v2
    network = checkpoints.load(model)
    network.layers[-2].output_norm.weight.fill_(1e4)
    checkpoints.save(network, model)
    with pytest.raises(UserError, match="beyond the range"):
        sum_genes(tokens, model, tmp_path / "s.parquet", layer=-1)
    network.layers[-2].output_norm.weight.fill_(float("nan"))
    checkpoints.save(network, model)
    with pytest.raises(UserError, match="beyond the range"):
        sum_genes(tokens, model, tmp_path / "s.parquet", layer=-1)
