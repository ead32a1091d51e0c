"""Pretraining: tokens/s of cellformers beside a plain loop around transformers' BertForMaskedLM.

    python benchmarks/pretrain.py
    python benchmarks/pretrain.py --accelerator cuda --precision bf16 --model v2-104m --tokens shards/*.parquet

The peer does what the published trainings did: batches of cells of about one length (random groups of 50 batches,
sorted within), padded to their longest, logits of the whole vocabulary at every position, AdamW, clipping. Ours
takes as many cells a step from the same file, packed. Both have the same architecture, precision, dropout, threads
and optimiser and take turns step by step, each step from drawing its cells to new weights. Tokens are counted
without padding. Without --tokens cells are drawn with lengths like those of a blood atlas.

Needs transformers.
"""

# ruff: noqa: E402
import sys

del sys.path[0]  # this folder holds a tokenize.py, which would hide the standard library's

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import BertConfig, BertForMaskedLM

from cellformers.io.files import stamp, write_table
from cellformers.models import layouts
from cellformers.models.attention import choose
from cellformers.models.batches import DTYPES
from cellformers.models.bert_config import Config
from cellformers.models.devices import pick_device
from cellformers.tokens import vocabulary_digest
from cellformers.training.corpus import TokenStore, open_corpus
from cellformers.training.curves import Curve
from cellformers.training.distributed import World
from cellformers.training.optimiser import adamw, set_rate
from cellformers.training.presets import Settings, resolve
from cellformers.training.pretrain_loop import COLUMNS, Checkpoints, Data, Training
from cellformers.vocabulary import SPECIAL_TOKENS, Vocabulary

# name: settings, genes of a vocabulary made here, median genes of a cell made here
MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "tiny": (
        {"preset": "small", "layers": 3, "max_positions": 512, "batch_cells": 8, "dropout": 0.02,
         "batch_tokens": 4096, "learning_rate": 1e-4},
        5_000, 150,
    ),
    "v1-10m": ({"preset": "geneformer-v1-10m", "batch_tokens": 32_768}, 25_424, 900),
    "v2-104m": ({"preset": "geneformer-v2-104m", "batch_tokens": 32_768}, 20_271, 900),
}  # fmt: skip


def make_shard(
    folder: Path, n_genes: int, positions: int, median: int, n_cells: int
) -> tuple[Path, Vocabulary]:
    """Random cells with log-normal numbers of genes, cut at the positions."""
    ids = [f"ENSG{i:011d}" for i in range(n_genes)]
    special = SPECIAL_TOKENS["v1"]
    vocabulary = Vocabulary(
        name="random", gene_ids=np.array(ids, dtype=object),
        token_ids=np.arange(len(special), len(special) + n_genes, dtype=np.int32), medians=np.ones(n_genes),
        symbols=np.array(ids, dtype=object), special_tokens=dict(special), context_length=positions,
        alias_source=pa.table({"alias": ids, "gene_id": ids}),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), 0.6, n_cells), 7, positions).astype(int)
    cells = [rng.choice(vocabulary.token_ids, n, replace=False) for n in lengths]
    table = pa.table(
        {
            "cell_id": [f"cell{i}" for i in range(n_cells)],
            "input_ids": pa.array([cell.tolist() for cell in cells], pa.list_(pa.int32())),
            "length": pa.array(lengths.tolist(), pa.int32()),
        }
    )
    inputs = {"dataset": "random", "vocabulary": vocabulary.digest}
    write_table(table, folder / "tokens.parquet", stamp("tokenize", 1, parameters={}, inputs=inputs))
    return folder / "tokens.parquet", vocabulary


# --- the peer ---------------------------------------------------------------------------------------------


def grouped_batches(store: TokenStore, cells: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Cells of batches: random groups of 50 batches, each sorted by length."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(cells)
        for start in range(0, len(order), 50 * size):
            group = order[start : start + 50 * size]
            group = group[np.argsort(-store.lengths_of(group), kind="stable")]
            yield from (group[i : i + size] for i in range(0, len(group), size))


class Peer:
    """BertForMaskedLM with AdamW."""

    def __init__(self, config: Config, data: Data, world: World) -> None:
        own = ("head", "labels", "tasks", "pooling", "classifier_dropout")
        fields = {k: v for k, v in config.to_dict().items() if k not in (*own, "architectures", "model_type")}
        torch.manual_seed(0)
        self.model = BertForMaskedLM(BertConfig(**fields)).to(world.device).train()
        self.optimizer = adamw(self.model.named_parameters(), weight_decay=data.settings.weight_decay)
        self.batches = grouped_batches(data.corpus.store, data.train, data.settings.batch_cells or 1)
        self.data, self.world = data, world
        self.padded = 0

    def batch(self, cells: np.ndarray) -> dict[str, torch.Tensor]:
        """A padded batch with masks as transformers' collator makes them."""
        rows = [self.data.corpus.store.gather(cells[i : i + 1])[0] for i in range(len(cells))]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        attention = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.from_numpy(row)
            attention[number, : len(row)] = 1
        chosen = (torch.rand(ids.shape) < self.data.settings.mask_probability) & attention.bool()
        labels = torch.where(chosen, ids, -100)
        fate = torch.rand(ids.shape)
        ids = torch.where(chosen & (fate < 0.8), self.data.special["<mask>"], ids)
        other = torch.randint(len(self.data.corpus.counts), ids.shape)
        ids = torch.where(chosen & (fate >= 0.8) & (fate < 0.9), other, ids)
        self.padded += ids.numel()  # of the step
        return {"input_ids": ids, "attention_mask": attention, "labels": labels}

    def step(self) -> int:
        """One optimiser step, in as many equal parts as ours takes; its tokens."""
        cells = next(self.batches)
        lengths = self.data.corpus.store.lengths_of(cells)
        parts = np.array_split(cells, -(-int(lengths.sum()) // self.data.settings.batch_tokens))
        half, self.padded = self.data.settings.precision != "float32", 0
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            batch = {name: value.to(self.world.device) for name, value in self.batch(part).items()}
            with torch.autocast(self.world.device.type, torch.bfloat16) if half else nullcontext():
                loss = self.model(**batch).loss / len(parts)
            loss.backward()
        set_rate(self.optimizer, self.data.settings.learning_rate)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.data.settings.clip)
        self.optimizer.step()
        return int(lengths.sum())


# --- taking turns -----------------------------------------------------------------------------------------


class Turns:
    """Times our steps, which `Training.run` reports, and takes a step of the peer after each."""

    def __init__(self, peer: Peer, world: World, *, steps: int) -> None:
        self.peer, self.world, self.steps = peer, world, steps
        self.seconds = {"cellformers": 0.0, "transformers": 0.0}
        self.tokens = {"cellformers": 0, "transformers": 0}
        self.padded = 0
        self.done = 0
        self.training: Training | None = None
        self.before = 0
        self.start = self.now()

    def now(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def after(self, steps: int) -> None:
        """Called when ours has taken a step."""
        end = self.now()
        assert self.training is not None
        taken, self.before = self.training.tokens - self.before, self.training.tokens
        self.done += steps
        if steps and self.done <= self.steps:  # the last step has a measurement behind it
            tokens = self.peer.step()
            after = self.now()
            if self.done > 1:  # the first one warms up
                self.seconds["cellformers"] += end - self.start
                self.seconds["transformers"] += after - end
                self.tokens["cellformers"] += taken
                self.tokens["transformers"] += tokens
                self.padded += self.peer.padded
        self.start = self.now()


def network(config: Config, settings: Settings, world: World, backend: str) -> Any:
    """Ours, to be trained."""
    random = layouts.random_model(config, seed=0).state_dict()
    chosen = choose(backend, world.device, DTYPES[settings.precision])
    print(f"backend {chosen}", file=sys.stderr)
    return layouts.assemble(config, random, backend=chosen).to(world.device).train().requires_grad_(True)


def main() -> int:
    """Run the benchmark; exit status 1 where ours is slower than the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--tokens", type=Path, nargs="+", help="token shards; with --vocabulary")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary of the shards")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each")
    parser.add_argument("--batch-cells", type=int, help="cells of a step")
    parser.add_argument("--batch-tokens", type=int, help="most tokens of a micro-batch")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--goal", type=float, default=1.5, help="ratio that is expected")
    parser.add_argument("--output", "-o", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen, n_genes, median = MODELS[options.model]
    given = {name: getattr(options, name) for name in ("batch_cells", "batch_tokens", "dropout", "precision")}
    changes = {**chosen, **{name: value for name, value in given.items() if value is not None}}
    preset = changes.pop("preset")
    settings = resolve(preset, {**changes, "steps": options.steps + 2, "warmup": 0, "measurements": 1})
    world = World(0, 1, pick_device(options.accelerator))

    with tempfile.TemporaryDirectory() as folder:
        if options.tokens:
            shards, vocabulary = options.tokens, Vocabulary.load(options.vocabulary)
            if vocabulary_digest(shards[0]) != vocabulary.digest:
                parser.error("--vocabulary is not that of --tokens")
        else:
            n_cells = 50 * (settings.batch_cells or 1)
            shard, vocabulary = make_shard(
                Path(folder), n_genes, settings.max_positions or 2048, median, n_cells
            )
            shards = [shard]
        config = Config(
            vocab_size=vocabulary.size, hidden_size=settings.hidden_size, num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads, intermediate_size=settings.intermediate_size,
            max_position_embeddings=settings.max_positions or vocabulary.context_length, hidden_act="relu",
            hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout,
        )  # fmt: skip
        data = Data(open_corpus(shards, vocabulary, Path(folder) / "corpus"), vocabulary, settings)
        peer = Peer(config, data, world)
        turns = Turns(peer, world, steps=options.steps + 1)
        turns.training = Training(
            network(config, settings, world, options.backend), data, steps=options.steps + 2, world=world,
            curve=Curve(None, COLUMNS), checkpoints=Checkpoints(Path(folder), {}),
        )  # fmt: skip
        turns.training.run(turns.after)

    speed = {name: turns.tokens[name] / turns.seconds[name] for name in turns.tokens}
    ratio = speed["cellformers"] / speed["transformers"]
    figures = {
        "model": options.model, "precision": settings.precision, "device": str(world.device),
        "threads": options.threads, "steps": options.steps, "cells_per_step": settings.batch_cells,
        "transformers_tokens_per_s": round(speed["transformers"]),
        "cellformers_tokens_per_s": round(speed["cellformers"]),
        "transformers_tokens_that_are_padding": round(1 - turns.tokens["transformers"] / turns.padded, 3),
        "ratio": round(ratio, 2), "goal": options.goal,
    }  # fmt: skip
    print(json.dumps(figures, indent=2))
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2) + "\n")
    return 0 if ratio >= options.goal else 1


if __name__ == "__main__":
    sys.exit(main())
