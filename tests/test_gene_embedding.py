"""Mean embeddings of genes: exact, whatever the shards."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from token_files import make_cells, make_model, make_vocabulary, write_shards, write_tokens

from cellformers.errors import UserError
from cellformers.gene_embedding import merge_gene_sums, sum_genes
from cellformers.io.files import read_metadata
from cellformers.models import checkpoints
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


def hidden_states(model, cells, layer):
    network = checkpoints.load(model)
    with torch.inference_mode():
        return [
            network(torch.from_numpy(c.astype(np.int64)), torch.tensor([0, len(c)]), layer=layer).numpy()
            for c in cells
        ]


def rows(path):
    return {row["gene_id"]: row for row in pq.read_table(path).to_pylist()}


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


def test_no_cells_make_no_genes(v2, tmp_path):
    vocabulary, _, model, _ = v2
    tokens = write_tokens(tmp_path / "t.parquet", [], vocabulary)
    sum_genes(tokens, model, tmp_path / "s.parquet")
    assert merge_gene_sums([tmp_path / "s.parquet"], tmp_path / "g.parquet") == 0


def test_tokens_of_another_vocabulary_are_refused(v2, tmp_path):
    _, cells, model, _ = v2
    tokens = write_tokens(tmp_path / "t.parquet", cells, make_vocabulary(61, special="v2"))
    with pytest.raises(UserError, match="wrong vocabulary"):
        sum_genes(tokens, model, tmp_path / "s.parquet")
    assert not (tmp_path / "s.parquet").exists()


def test_states_beyond_the_range_of_exact_sums_are_refused(v2, tmp_path):
    vocabulary, _, model, _ = v2
    cells = [np.array([2, gene, 3], np.int32) for gene in (5, 6, 7)]
    tokens = write_tokens(tmp_path / "t.parquet", cells, vocabulary)
    opened = open_model(model)
    opened.network.words.weight[6] = float("nan")
    with pytest.raises(UserError, match="'cell1' is not finite; are these weights"):
        sum_genes(tokens, opened, tmp_path / "s.parquet")
    opened = open_model(model)
    opened.network.layers[-2].output_norm.weight.fill_(1e4)
    with pytest.raises(UserError, match=r"'cell0' has an entry of .* beyond the range of 256"):
        sum_genes(tokens, opened, tmp_path / "s.parquet", layer=-1)
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize("n_shards", [1, 3])
def test_the_means_of_a_state_are_those_over_its_cells(v2, tmp_path, n_shards):
    vocabulary, cells, model, _ = v2
    kinds = [*"aabbabba"]
    pq.write_table(
        pa.table({"cell_id": [f"cell{i}" for i in range(8)], "kind": kinds}), tmp_path / "cells.parquet"
    )
    sums = []
    for i, shard in enumerate(write_shards(tmp_path, cells, vocabulary, n_shards)):
        sums.append(tmp_path / f"s{i}.parquet")
        choice = choose_cells(shard, cells=tmp_path / "cells.parquet", where={"kind": ["b"]})
        sum_genes(shard, model, sums[-1], choice=choice)
    merge_gene_sums(sums, tmp_path / "g.parquet")
    others = [cell for cell, kind in zip(cells, kinds, strict=True) if kind == "b"]
    sum_genes(write_tokens(tmp_path / "b.parquet", others, vocabulary), model, tmp_path / "s.parquet")
    merge_gene_sums([tmp_path / "s.parquet"], tmp_path / "wanted.parquet")
    assert rows(tmp_path / "g.parquet") == rows(tmp_path / "wanted.parquet")
    assert read_metadata(tmp_path / "g.parquet")["parameters"]["where"] == {"kind": ["b"]}


def test_special_tokens_have_rows_where_asked_for(v2, tmp_path):
    _, cells, model, tokens = v2
    for name, special in (("plain", False), ("more", True)):
        sum_genes(tokens, model, tmp_path / "s.parquet", special=special)
        merge_gene_sums([tmp_path / "s.parquet"], tmp_path / name)
    plain, more = rows(tmp_path / "plain"), rows(tmp_path / "more")
    assert more.keys() - plain.keys() == {"<cls>", "<eos>"}
    assert {gene: more[gene] for gene in plain} == plain
    first = np.mean([h[0] for h in hidden_states(model, cells, -1)], axis=0)
    np.testing.assert_allclose(more["<cls>"]["embedding"], first, atol=1e-6)
    assert (more["<eos>"]["n_cells"], more["<eos>"]["symbol"]) == (8, None)


def test_a_gene_that_a_cell_holds_twice_counts_twice(v2, tmp_path):
    vocabulary, _, model, _ = v2
    cells = [np.array([2, 7, 8, 7, 3], np.int32), np.array([2, 7, 3], np.int32)]
    tokens = write_tokens(tmp_path / "t.parquet", cells, vocabulary)
    sum_genes(tokens, model, tmp_path / "s.parquet")
    merge_gene_sums([tmp_path / "s.parquet"], tmp_path / "g.parquet")
    one, two = hidden_states(model, cells, -1)
    found = rows(tmp_path / "g.parquet")[str(vocabulary.gene_ids[3])]
    assert found["n_cells"] == 3
    np.testing.assert_allclose(found["embedding"], (one[1] + one[3] + two[1]) / 3, atol=1e-6)
