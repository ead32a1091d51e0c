"""Embedding and training on a CUDA device, from files to files, against the CPU in fp32."""

import logging

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from token_files import make_cells, make_config, make_model, make_vocabulary, write_tokens

from cellformers.embedding import embed_cells
from cellformers.gene_embedding import merge_gene_sums, sum_genes
from cellformers.models import layouts
from cellformers.models.attention import refusal
from cellformers.models.batches import TOKEN_BUDGET, runner
from cellformers.training.pretrain import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
LENGTHS = (40, 7, 60, 1, 13, 25, 9, 50)


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("dtype", "most"), [("float32", 5e-3), ("bfloat16", 4e-2), ("float16", 4e-2)])
@pytest.mark.parametrize("mode", ["cls", "cell"])
def test_embeddings_are_those_of_the_cpu(tmp_path, mode, dtype, most):
    vocabulary = make_vocabulary(special="v2")
    model = make_model(tmp_path / "m", vocabulary, hidden_size=64)
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, LENGTHS), vocabulary)
    found = []
    for accelerator, precision in (("cpu", "float32"), ("cuda", dtype)):
        output = tmp_path / f"{accelerator}.parquet"
        embed_cells(tokens, model, output, mode=mode, dtype=precision, accelerator=accelerator)
        found.append(np.array(pq.read_table(output)["embedding"].to_pylist()))
    assert relative(found[1], found[0]) <= most


@pytest.mark.parametrize(("dtype", "most"), [("float32", 5e-3), ("bfloat16", 4e-2)])
def test_gene_embeddings_are_those_of_the_cpu(tmp_path, dtype, most):
    vocabulary = make_vocabulary(special="v2")
    model = make_model(tmp_path / "m", vocabulary, hidden_size=64)
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, LENGTHS), vocabulary)
    found = []
    for accelerator, precision in (("cpu", "float32"), ("cuda", dtype)):
        sum_genes(tokens, model, tmp_path / "s.parquet", dtype=precision, accelerator=accelerator)
        merge_gene_sums([tmp_path / "s.parquet"], tmp_path / "g.parquet")
        found.append(np.array(pq.read_table(tmp_path / "g.parquet")["embedding"].to_pylist()))
    assert relative(found[1], found[0]) <= most


def test_full_memory_halves_the_budget_and_loses_no_cell(caplog):
    """A limit on this process's memory that a batch of the whole file does not keep."""
    config = make_config(make_vocabulary(), hidden_size=256, intermediate_size=1024, num_hidden_layers=2,
                         max_position_embeddings=1024)  # fmt: skip
    device = torch.device("cuda")
    model = layouts.random_model(config, seed=1).to(device, torch.bfloat16).eval()
    model.backend = "varlen" if refusal("varlen") is None else "sdpa"
    rng = np.random.default_rng(0)
    cells = [rng.integers(2, 60, 1024).astype(np.int32) for _ in range(512)]

    def embed(budget):
        with runner(device, batch_tokens=budget) as run:
            work = run(cells, lambda tokens, cu: model(tokens, cu, rows=cu[:-1]).float())
            return torch.cat([found for _, found in work]).numpy()

    wanted = embed(TOKEN_BUDGET // 8)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        with caplog.at_level(logging.WARNING):
            found = embed(10**9)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert "out of device memory" in caplog.text
    assert found.shape == (512, 256)
    assert relative(found, wanted) <= 5e-3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_falls_on_cuda(tmp_path, precision):
    vocabulary = make_vocabulary(special="v2", context_length=64)
    vocabulary.save(tmp_path / "v")
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [30] * 200), vocabulary)
    result = pretrain(
        [tokens], tmp_path / "v", tmp_path / "m", steps=40, layers=2, hidden_size=32, heads=2,
        intermediate_size=64, precision=precision, accelerator="cuda",
    )  # fmt: skip
    assert np.isfinite(result["heldout_loss"])
    assert result["heldout_loss"] < np.log(vocabulary.size)
