"""Embedding on the CPU: cells/s of cellformers beside the way Geneformer's own package goes about it.

    python benchmarks/embed_cpu.py --tokens tokens.parquet --model v1-10m --cells 200
    python benchmarks/embed_cpu.py --model v2-104m --cells 40 --dtype bfloat16

The peer is transformers' BertForMaskedLM as the reference calls it: with its language-model head, all hidden
states, all cells of the file sorted by length and cut into batches of 100, padded to their longest. Of these
batches some at even distances are computed, and of each only the first --batch cells: less padding and smaller
logits than the reference has, so in its favour (--batch 100 is the real thing; 100 cells of 2,048 tokens need
21 GB for the logits). Both have the same random weights, threads and cells, in fp32 unless ours is asked for
bfloat16, take turns batch by batch, and must agree. Timed from tokens in memory to embeddings in memory, best of
--repeats for each batch. Without --tokens the golden tokens of blood_sorted in CELLFORMERS_REFERENCE_DATA are
taken.

Needs transformers.
"""

# ruff: noqa: E402
import sys

del sys.path[0]  # this folder holds a tokenize.py, which would hide the standard library's

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertForMaskedLM

from cellformers.embedding import cell_step
from cellformers.models import checkpoints, layouts
from cellformers.models.batches import DTYPES, runner
from cellformers.models.bert_config import Config
from cellformers.tokens import read_tokens

COMMON = {"hidden_act": "relu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
MODELS: dict[str, dict[str, Any]] = {
    "v1-10m": {
        "config": Config(
            vocab_size=25426, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
            intermediate_size=512, max_position_embeddings=2048, **COMMON,
        ),
        "mode": "cell", "special": (0, 1), "tokens": "blood_sorted.V1.parquet", "goal": 3.0,
    },
    "v2-104m": {
        "config": Config(
            vocab_size=20275, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            intermediate_size=3072, max_position_embeddings=4096, **COMMON,
        ),
        "mode": "cls", "special": (0, 1, 2, 3), "tokens": "blood_sorted.V2.parquet", "goal": 1.3,
    },
}  # fmt: skip
LAYER = -1
BATCH = 100


def read_batches(path: Path, n_cells: int, batch: int) -> list[list[np.ndarray]]:
    """About `n_cells` cells: the first `batch` of some of the reference's batches, longest first."""
    cells = [
        tokens.tokens[a:b]
        for tokens in read_tokens(path)
        for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    ]
    cells.sort(key=len, reverse=True)
    whole = [cells[start : start + BATCH] for start in range(0, len(cells), BATCH)]
    n = min(len(whole), max(1, round(n_cells / batch)))
    return [whole[int((i + 0.5) * len(whole) / n)][:batch] for i in range(n)]


def reference(
    model: BertForMaskedLM, batch: list[np.ndarray], mode: str, special: tuple[int, ...]
) -> torch.Tensor:
    """The peer: a padded batch through the whole model, then cls or the mean over genes."""
    longest = len(batch[0])
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros(len(batch), longest, dtype=torch.int64)
    for row, cell in enumerate(batch):
        ids[row, : len(cell)] = torch.from_numpy(cell.astype(np.int64))
        mask[row, : len(cell)] = 1
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        hidden = states[len(states) - 1 + LAYER]
        if mode == "cls":
            return hidden[:, 0].clone()
        genes = (mask.bool() & ~torch.isin(ids, torch.tensor(special)))[..., None]
        return (hidden * genes).sum(1) / genes.sum(1)


def timed(work: Callable[[], torch.Tensor], repeats: int) -> tuple[float, torch.Tensor]:
    """Best seconds, and the result."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def main() -> int:
    """Run the benchmark; exit status 1 where outputs differ or the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="v1-10m")
    parser.add_argument("--tokens", type=Path, help="tokens of the model's vocabulary (cell_id, input_ids)")
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of cellformers; the peer is fp32")
    parser.add_argument("--batch", type=int, default=20, help="cells taken of each batch of the peer")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--output", "-o", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    chosen = MODELS[options.model]
    data = Path(os.environ.get("CELLFORMERS_REFERENCE_DATA", "../shared/data"))
    path = options.tokens or data / "golden" / chosen["tokens"]
    chunks = read_batches(path, options.cells, options.batch)
    n_cells, n_tokens = sum(map(len, chunks)), sum(len(cell) for chunk in chunks for cell in chunk)

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(layouts.random_model(chosen["config"], seed=0), folder)
        theirs = BertForMaskedLM.from_pretrained(folder).eval()
        ours = checkpoints.load(folder, dtype=DTYPES[options.dtype])
    step = cell_step(ours, mode=chosen["mode"], layer=LAYER, special=chosen["special"])

    def run_theirs(batch: list[np.ndarray]) -> torch.Tensor:
        torch.set_num_threads(options.threads)
        return reference(theirs, batch, chosen["mode"], chosen["special"])

    def run_ours(batch: list[np.ndarray]) -> torch.Tensor:
        with runner(torch.device("cpu"), threads=options.threads) as run:
            return torch.cat([result for _, result in run(batch, step)])

    run_theirs(chunks[-1][:2])
    run_ours(chunks[-1][:2])
    spent = {"reference": 0.0, "cellformers": 0.0}
    difference, scale = 0.0, 0.0
    for batch in chunks:
        seconds, wanted = timed(lambda batch=batch: run_theirs(batch), options.repeats)  # type: ignore[misc]
        spent["reference"] += seconds
        seconds, found = timed(lambda batch=batch: run_ours(batch), options.repeats)  # type: ignore[misc]
        spent["cellformers"] += seconds
        difference = max(difference, float((wanted - found).abs().max()))
        scale = max(scale, float(wanted.abs().max()))
        print(f"{len(batch)} cells of up to {len(batch[0])} tokens: {spent}", file=sys.stderr, flush=True)

    ratio = spent["reference"] / spent["cellformers"]
    figures = {
        "model": options.model, "dtype": options.dtype, "threads": options.threads, "cells": n_cells,
        "tokens": n_tokens,
        "reference_cells_per_s": round(n_cells / spent["reference"], 3),
        "cellformers_cells_per_s": round(n_cells / spent["cellformers"], 3),
        "cellformers_tokens_per_s": round(n_tokens / spent["cellformers"]),
        "ratio": round(ratio, 2), "goal": chosen["goal"],
        "max_abs_difference": difference, "largest_value": scale,
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")
    same = difference <= (2e-5 if options.dtype == "float32" else 0.05 * scale)
    if not same:
        print("the outputs differ", file=sys.stderr)
    return 0 if same and ratio >= chosen["goal"] else 1


if __name__ == "__main__":
    sys.exit(main())
