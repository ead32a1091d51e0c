"""Embedding on a GPU: cells/s of every backend beside transformers, and beside what the device can do at most.

    python benchmarks/embed_gpu.py --output results/embed_gpu
    python benchmarks/embed_gpu.py --models v1-10m --lengths lengths.parquet
    python benchmarks/embed_gpu.py --tiny --device cpu      # seconds, no numbers: that it runs

Cells are drawn at random, as long as the model takes ("full") and of real lengths ("real": those in --lengths, a
Parquet file with a column `length` or a text file; else log-normal, SD 0.6 of the logarithm, median 1,500 tokens or
half of what the model takes where that is less, cut at what it takes). All contenders have the same random weights
and cells and take turns; times are from tokens in memory to embeddings in memory, by CUDA events, medians of
--repeats after a warm-up.

Peers, both transformers, cells sorted by length, in padded batches:

- "reference": as Geneformer's own package calls it: fp32, TF32 as torch has it, language-model head, all hidden
  states, batches of 100 (halved until they fit, which is said). One batch in the middle is timed, at most two.
- "best": bf16, scaled_dot_product_attention, no head, no layer behind the one that is wanted.

Next to each figure: unpadded tokens/s; TFLOP/s by the arithmetic a cell of L tokens needs (per layer, of width d and
inner width f: L(8d² + 4df) for the matrix products and 4L²d for attention; with cls the last layer needs key and
value of all tokens and the rest of one), and its share of the rate of a large bf16 product measured in the same run;
and two lower bounds of the time: that arithmetic at the measured rate, and the bytes (weights once a batch, and per
token and layer 14d + 2f numbers: everything between products fused) at the measured rate of a copy.

Needs transformers and CUDA; TransformerEngine where its backends are to be measured. Nothing else of this package's
dependencies is needed but numpy, pyarrow and safetensors: PYTHONPATH=workflow will do. Exit status 1 where outputs
differ or a goal is missed.
"""

# ruff: noqa: E402
import sys

del sys.path[0]  # this folder holds a tokenize.py, which would hide the standard library's

import argparse
import datetime
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import BertForMaskedLM, BertModel

from cellformers.embedding import cell_step
from cellformers.errors import UserError
from cellformers.models import checkpoints, layouts
from cellformers.models.batches import TOKEN_BUDGET, Budget, packed, pick_precision
from cellformers.models.bert_config import Config

COMMON = {"hidden_act": "relu", "layer_norm_eps": 1e-12, "pad_token_id": 0}
V2 = {"vocab_size": 20275, "max_position_embeddings": 4096, **COMMON}


@dataclass(frozen=True)
class Setup:
    """A model, how it is commonly used, and the goal: cells/s at full length."""

    config: Config
    mode: str
    goal: float
    special: tuple[int, ...]


MODELS = {
    "v1-10m": Setup(
        Config(
            vocab_size=25426, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
            intermediate_size=512, max_position_embeddings=2048, **COMMON,
        ), "cell", 6000.0, (0, 1),
    ),
    "v2-104m": Setup(
        Config(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, **V2
        ), "cls", 300.0, (0, 1, 2, 3),
    ),
    "v2-316m": Setup(
        Config(
            hidden_size=1152, num_hidden_layers=18, num_attention_heads=18, intermediate_size=4608, **V2
        ), "cls", 100.0, (0, 1, 2, 3),
    ),
}  # fmt: skip
PLANS = {
    "te bf16": ("te", "bf16"),
    "te fp8": ("te", "fp8"),
    "varlen bf16": ("varlen", "bf16"),
    "sdpa bf16": ("sdpa", "bf16"),
}
LIMITS = {"bf16": 4e-2, "fp8": 0.2}  # relative error of an embedding against the reference's
LAYER = -1
REFERENCE_BATCH = 100
TIMES_REFERENCE = 10.0  # goal: as many times the reference's cells/s


# --- cells --------------------------------------------------------------------------------------------


def draw_lengths(kind: str, n: int, most: int, path: Path | None) -> np.ndarray:
    """int64[n]: "full", or "real" from a file or a distribution."""
    if kind == "full":
        return np.full(n, most)
    rng = np.random.default_rng(0)
    if path is None:
        found = rng.lognormal(np.log(min(1500.0, most / 2)), 0.6, n)
    elif path.suffix == ".parquet":
        found = rng.choice(pq.read_table(path, columns=["length"])["length"].to_numpy(), n)
    else:
        found = rng.choice(np.loadtxt(path, ndmin=1), n)
    return np.clip(found, min(most, 16), most).astype(np.int64)


def draw_cells(lengths: Sequence[int], setup: Setup) -> list[np.ndarray]:
    """Cells of so many different genes, the first token <cls> where the mode needs it."""
    rng = np.random.default_rng(1)
    first = max(setup.special) + 1
    cells = []
    for length in lengths:
        cell = (rng.permutation(setup.config.vocab_size - first)[:length] + first).astype(np.int32)
        if setup.mode == "cls":
            cell[0] = 2
        cells.append(cell)
    return cells


# --- contenders ---------------------------------------------------------------------------------------


def padded(cells: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids [cells, longest], and their mask where there is padding."""
    ids = torch.zeros(len(cells), max(map(len, cells)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, cell in enumerate(cells):
        ids[row, : len(cell)] = torch.from_numpy(cell.astype(np.int64))
        mask[row, : len(cell)] = 1
    return ids.to(device), None if bool(mask.all()) else mask.to(device)


def pooled(hidden: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None, setup: Setup) -> torch.Tensor:
    """Embeddings, float32 on the host, of padded hidden states."""
    if setup.mode == "cls":
        return hidden[:, 0].float().cpu()
    genes = ~torch.isin(ids, torch.tensor(setup.special, device=ids.device))
    weight = (genes if mask is None else genes & mask.bool())[..., None].to(hidden.dtype)
    return ((hidden * weight).sum(1) / weight.sum(1)).float().cpu()


def run_reference(
    model: BertForMaskedLM, cells: list[np.ndarray], setup: Setup, batch: int, device: torch.device
) -> torch.Tensor:
    """Embeddings as the reference computes them, in the order of `cells`."""
    found = []
    for start in range(0, len(cells), batch):
        ids, mask = padded(cells[start : start + batch], device)
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        found.append(pooled(states[len(states) - 1 + LAYER], ids, mask, setup))
        del states
    return torch.cat(found)


def run_best(
    model: BertModel, cells: list[np.ndarray], setup: Setup, tokens: int, device: torch.device
) -> torch.Tensor:
    """Embeddings by the fastest way transformers has, batches of up to so many padded tokens of sorted cells."""
    order = sorted(range(len(cells)), key=lambda i: -len(cells[i]))
    found = torch.zeros(len(cells), setup.config.hidden_size)
    start = 0
    while start < len(order):
        rows = order[start : start + max(1, tokens // len(cells[order[start]]))]
        ids, mask = padded([cells[i] for i in rows], device)
        with torch.inference_mode():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            found[rows] = pooled(hidden, ids, mask, setup)
        start += len(rows)
    return found


def fitting_batch(run: Callable[[int], torch.Tensor], batch: int) -> int:
    """The largest of batch, batch / 2, ... that the device's memory holds."""
    while True:
        try:
            run(batch)
            return batch
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        torch.cuda.empty_cache()
        batch //= 2


@dataclass(frozen=True)
class Contender:
    """A way to embed some of the cells, and what is to be known about it."""

    name: str
    cells: list[np.ndarray]
    run: Callable[[], torch.Tensor]
    rows: list[int]  # of the embeddings that can be compared, in the reference's order
    note: str = ""


# --- measuring ----------------------------------------------------------------------------------------


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def device_rates(device: torch.device, tiny: bool) -> tuple[float, float]:
    """FLOP/s of a large bf16 product of random matrices, bytes/s (read and written) of a large copy."""
    size, n_bytes = (128, 2**20) if tiny else (8192, 2**32)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    product, copy = (lambda: a @ b), (lambda: target.copy_(source))
    seconds = []
    for work in (product, copy):
        timed(work, device)
        seconds.append(median(timed(work, device) for _ in range(20)))
    return 2 * size**3 / seconds[0], 2 * n_bytes / seconds[1]


def arithmetic(setup: Setup, lengths: Sequence[int]) -> float:
    """FLOP that embeddings of cells of these lengths need."""
    d, f = setup.config.hidden_size, setup.config.intermediate_size
    L = np.asarray(lengths, dtype=np.float64)
    whole = setup.config.depth(LAYER) - (setup.mode == "cls")
    total = whole * (L * (8 * d * d + 4 * d * f) + 4 * L * L * d).sum()
    if setup.mode == "cls":
        total += (L * 4 * d * d + (4 * d * d + 4 * d * f) + 4 * L * d).sum()
    return float(total)


def traffic(setup: Setup, lengths: Sequence[int], batch_tokens: int) -> float:
    """Bytes that can't be kept on the chip, in bf16: see the top."""
    d, f = setup.config.hidden_size, setup.config.intermediate_size
    tokens, depth = float(np.sum(lengths)), setup.config.depth(LAYER)
    whole = depth - (setup.mode == "cls")
    numbers = tokens * (whole * (14 * d + 2 * f) + (5 * d if setup.mode == "cls" else 0))
    weights = depth * (4 * d * d + 2 * d * f) * max(1.0, np.ceil(tokens / batch_tokens))
    return float(2 * (numbers + weights))


def measure(
    contenders: list[Contender], device: torch.device, repeats: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, torch.Tensor]]:
    """Seconds of each turn, peak GiB beside the weights of all, embeddings; contenders take turns."""
    seconds: dict[str, list[float]] = {c.name: [] for c in contenders}
    memory, found = {}, {}
    for contender in contenders:  # the warm-up
        before = 0
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        found[contender.name] = contender.run()
        most = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        memory[contender.name] = (most - before) / 2**30
    for _ in range(repeats):
        for contender in contenders:
            seconds[contender.name].append(timed(contender.run, device))
    return seconds, memory, found


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest over the cells."""
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


# --- the runs -----------------------------------------------------------------------------------------


def our_contenders(
    folder: str, cells: list[np.ndarray], rows: list[int], setup: Setup, options: argparse.Namespace
) -> list[Contender]:
    """Those of --plans that work here; the others are told why not."""
    contenders = []
    for plan in options.plans:
        backend, name = PLANS[plan]
        precision = pick_precision(name)
        try:
            network = checkpoints.load(
                folder, dtype=precision.dtype, fp8=precision.fp8, device=options.device, backend=backend
            )
        except UserError as error:
            print(f"{plan} is left out: {error}", file=sys.stderr)
            continue
        step = cell_step(network, mode=setup.mode, layer=LAYER, special=setup.special)
        budget = Budget(options.batch_tokens)  # where memory runs out, the warm-up finds out

        def run(step: Any = step, budget: Budget = budget) -> torch.Tensor:
            work = packed(cells, step, device=options.device, budget=budget)
            return torch.cat([result for _, result in work])

        contenders.append(Contender(plan, cells, run, rows))
    return contenders


def peer_contenders(
    folder: str, cells: list[np.ndarray], setup: Setup, options: argparse.Namespace
) -> tuple[list[Contender], list[int]]:
    """Both peers, and which cells the reference computes."""
    device = options.device
    order = sorted(range(len(cells)), key=lambda i: -len(cells[i]))
    whole = [order[a : a + options.reference_batch] for a in range(0, len(order), options.reference_batch)]
    rows = [i for batch in (whole if len(whole) < 3 else [whole[len(whole) // 2]]) for i in batch]
    theirs = BertForMaskedLM.from_pretrained(folder).to(device, torch.float32).eval()
    chosen = [cells[i] for i in rows]
    batch = fitting_batch(
        lambda batch: run_reference(theirs, chosen[:batch], setup, batch, device), options.reference_batch
    )
    note = "" if batch == options.reference_batch else f"batches of {batch}, as memory holds no more"
    reference = Contender(
        "reference", chosen, lambda: run_reference(theirs, chosen, setup, batch, device), rows, note
    )
    config = theirs.config.__class__.from_dict(theirs.config.to_dict())
    config.num_hidden_layers = setup.config.depth(LAYER)
    state = {
        name: tensor for name, tensor in theirs.bert.state_dict().items() if not name.startswith("pooler")
    }
    best_model = BertModel(config, add_pooling_layer=False)
    best_model.load_state_dict({k: v for k, v in state.items() if k in best_model.state_dict()})
    best_model = best_model.to(device, torch.bfloat16).eval()
    best = Contender(
        "best", cells, lambda: run_best(best_model, cells, setup, options.batch_tokens, device), rows
    )
    return [reference, best], rows


def benchmark(
    name: str, kind: str, setup: Setup, rates: tuple[float, float], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row of figures for each contender."""
    most = setup.config.max_position_embeddings
    n = max(options.reference_batch, options.tokens // (most if kind == "full" else min(most, 1500)))
    cells = draw_cells(draw_lengths(kind, n, most, options.lengths).tolist(), setup)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(layouts.random_model(setup.config, seed=0), folder)
        peers, rows = peer_contenders(folder, cells, setup, options)
        contenders = [*peers, *our_contenders(folder, cells, rows, setup, options)]
    seconds, memory, found = measure(contenders, options.device, options.repeats)
    wanted = found["reference"]
    figures = []
    for contender in contenders:
        lengths = [len(cell) for cell in contender.cells]
        spent, work = median(seconds[contender.name]), arithmetic(setup, lengths)
        compared = (
            found[contender.name] if contender.name == "reference" else found[contender.name][contender.rows]
        )
        figures.append({
            "model": name, "cells": kind, "contender": contender.name, "n_cells": len(lengths),
            "cells_per_s": len(lengths) / spent, "tokens_per_s": sum(lengths) / spent,
            "tflop_per_s": work / spent / 1e12, "share_of_peak": work / spent / rates[0],
            "peak_gib": memory[contender.name], "seconds": spent, "turns": seconds[contender.name],
            "bound_arithmetic_s": work / rates[0],
            "bound_bytes_s": traffic(setup, lengths, options.batch_tokens) / rates[1],
            "relative_error": relative_error(compared, wanted), "note": contender.note,
        })  # fmt: skip
        print(f"{name}, {kind}, {contender.name}: {figures[-1]['cells_per_s']:.1f} cells/s", file=sys.stderr)
    return figures


# --- reporting ----------------------------------------------------------------------------------------


def verdicts(figures: list[dict[str, Any]], tiny: bool) -> list[tuple[bool, str]]:
    """Whether outputs agree and goals are met."""
    lines = []
    for row in figures:
        if row["contender"] in PLANS:
            most = LIMITS[PLANS[row["contender"]][1]]
            error = row["relative_error"]
            what = f"{row['model']}, {row['cells']}, {row['contender']}: error {error:.2g}, at most {most}"
            lines.append((error <= most, what))
    for name in dict.fromkeys(row["model"] for row in figures):
        rows = {r["contender"]: r for r in figures if r["model"] == name and r["cells"] == "full"}
        ours = [row for contender, row in rows.items() if contender in PLANS]
        if tiny or not ours:
            continue
        fastest = max(ours, key=lambda row: row["cells_per_s"])
        rate = fastest["cells_per_s"]
        goal, times = MODELS[name].goal, rate / rows["reference"]["cells_per_s"]
        lines.append((rate >= goal, f"{name}: {rate:.0f} cells/s ({fastest['contender']}), goal {goal:.0f}"))
        lines.append(
            (times >= TIMES_REFERENCE, f"{name}: {times:.1f} times the reference, goal {TIMES_REFERENCE:.0f}")
        )
    return lines


def markdown(about: dict[str, Any], figures: list[dict[str, Any]], lines: list[tuple[bool, str]]) -> str:
    """The report."""
    heads = ["model", "cells", "contender", "cells/s", "tokens/s", "TFLOP/s", "of peak", "GiB", "ms per 1,000 cells",
             "bound: arithmetic", "bound: bytes", "error", "note"]  # fmt: skip
    table = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in figures:
        each = 1e6 / row["n_cells"]
        columns = [
            row["model"], row["cells"], row["contender"], f"{row['cells_per_s']:,.1f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['tflop_per_s']:.1f}", f"{row['share_of_peak']:.0%}", f"{row['peak_gib']:.1f}",
            f"{row['seconds'] * each:,.0f}", f"{row['bound_arithmetic_s'] * each:,.0f}",
            f"{row['bound_bytes_s'] * each:,.0f}", f"{row['relative_error']:.2g}", row["note"],
        ]  # fmt: skip
        table.append(f"| {' | '.join(columns)} |")
    facts = [f"- {key}: {value}" for key, value in about.items()]
    goals = [f"- {'yes' if met else 'NO'}: {what}" for met, what in lines]
    return "\n".join(
        ["# Embedding on a GPU", "", *facts, "", *table, "", "Agreement and goals:", "", *goals, ""]
    )


def describe(options: argparse.Namespace, rates: tuple[float, float]) -> dict[str, Any]:
    """Date, device, versions and settings."""
    device = options.device
    versions = {}
    for package in ("torch", "transformers", "transformer_engine", "flash-attn"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": options.date, "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        **versions, "CUDA of torch": torch.version.cuda,
        "fp32 products of the reference": f"precision {torch.get_float32_matmul_precision()!r}",
        "large bf16 product": f"{rates[0] / 1e12:.1f} TFLOP/s", "copy": f"{rates[1] / 1e12:.2f} TB/s",
        "tokens of a batch": options.batch_tokens, "layer": LAYER, "turns": options.repeats,
        "real lengths": options.lengths.name if options.lengths else "log-normal (see the script)",
    }  # fmt: skip


def shrink(setup: Setup) -> Setup:
    """A model of the same kind that takes milliseconds."""
    config = replace(
        setup.config, vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    return replace(setup, config=config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit status 1 where outputs differ or a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--plans", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--cells", nargs="+", choices=("full", "real"), default=["full", "real"])
    parser.add_argument("--lengths", type=Path, help="tokens of real cells: Parquet (length) or text")
    parser.add_argument("--tokens", type=int, default=2**20, help="of the cells of one turn")
    parser.add_argument("--batch-tokens", type=int, default=TOKEN_BUDGET)
    parser.add_argument(
        "--reference-batch", type=int, default=REFERENCE_BATCH, help="cells, of the reference"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--tiny", action="store_true", help="small models: that it runs")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    parser.add_argument("--output", "-o", type=Path, help="write OUTPUT.md and OUTPUT.json")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.tokens, options.batch_tokens, options.reference_batch = 640, 256, 4
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device (--tiny --device cpu shows that the script runs)", file=sys.stderr)
        return 1

    rates = device_rates(options.device, options.tiny)
    figures = []
    for name in options.models:
        setup = shrink(MODELS[name]) if options.tiny else MODELS[name]
        for kind in options.cells:
            figures += benchmark(name, kind, setup, rates, options)
            if options.device.type == "cuda":
                torch.cuda.empty_cache()
    lines = verdicts(figures, options.tiny)
    about = describe(options, rates)
    report = markdown(about, figures, lines)
    print(report)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(report)
        options.output.with_suffix(".json").write_text(
            json.dumps({"about": about, "figures": figures}, indent=2, default=str) + "\n"
        )
    return 0 if all(met for met, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
