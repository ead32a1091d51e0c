"""What needs a CUDA device: its kernels against the CPU in fp32."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from token_files import make_cells, make_config, make_model, make_vocabulary, write_tokens

from cellformers.embedding import embed_cells, merge_gene_sums, sum_genes
from cellformers.models import layouts
from cellformers.models.attention import backend
from cellformers.training.pretrain import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
LENGTHS = (40, 7, 60, 1, 13, 25, 9, 50)


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("dtype", "most"), [("float32", 5e-3), ("bfloat16", 4e-2)])
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


def test_gene_embeddings_are_those_of_the_cpu(tmp_path):
    vocabulary = make_vocabulary(special="v2")
    model = make_model(tmp_path / "m", vocabulary)
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, LENGTHS), vocabulary)
    found = []
    for accelerator in ("cpu", "cuda"):
        sum_genes(tokens, model, tmp_path / "s.parquet", accelerator=accelerator)
        merge_gene_sums([tmp_path / "s.parquet"], tmp_path / "g.parquet")
        found.append(np.array(pq.read_table(tmp_path / "g.parquet")["embedding"].to_pylist()))
    assert relative(found[1], found[0]) <= 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_alone_equals_the_same_cell_in_a_batch(dtype):
    config = make_config(make_vocabulary(), hidden_size=64, initializer_range=0.5)
    model = layouts.random_model(config, seed=1).to("cuda", dtype).eval()
    parts = [torch.randint(2, 60, (n,), device="cuda") for n in LENGTHS]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    with torch.inference_mode():
        together = model(torch.cat(parts), bounds).float().split(list(LENGTHS))
        for part, mine in zip(parts, together, strict=True):
            alone = model(part, torch.tensor([0, len(part)])).float()
            assert relative(alone.cpu().numpy(), mine.cpu().numpy()) <= (
                5e-3 if dtype == torch.float32 else 2e-2
            )


def test_the_variable_length_kernel_is_taken_in_half_precision():
    pytest.importorskip("torch.nn.attention.varlen")
    assert backend(torch.device("cuda"), torch.bfloat16) == "varlen"
    assert backend(torch.device("cuda"), torch.float32) == "sdpa"


def test_no_layer_waits_for_the_device():
    config = make_config(make_vocabulary(), hidden_size=64)
    model = layouts.random_model(config, seed=1).to("cuda", torch.bfloat16).eval()
    tokens, bounds = torch.randint(2, 60, (96,), device="cuda"), torch.tensor([0, 40, 96])
    with torch.inference_mode():
        model(tokens, bounds)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(tokens, bounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_training_falls_on_cuda(tmp_path):
    vocabulary = make_vocabulary(special="v2", context_length=64)
    vocabulary.save(tmp_path / "v")
    tokens = write_tokens(tmp_path / "t.parquet", make_cells(vocabulary, [30] * 200), vocabulary)
    result = pretrain(
        [tokens], tmp_path / "v", tmp_path / "m", steps=40, layers=2, hidden_size=32, heads=2,
        intermediate_size=64, batch_tokens=512, accelerator="cuda",
    )  # fmt: skip
    assert np.isfinite(result["heldout_loss"])
