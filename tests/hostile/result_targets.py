"""Targets for `hostile_cases`: what later steps read of earlier ones and of others, and the files of deposits.

Fine-tuned models with predictions and splits, what a training goes on from, spaces of a search, labels and sides,
deposits of genes and cells.
"""

import json
import random
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from hostile_cases import Anything, Target, register
from loader_targets import (
    CELLS,
    GENES,
    N_CELLS,
    SMALL,
    change,
    fine,
    names_fault,
    odd_json,
    odd_parquet,
    rounded,
)
from token_files import make_cells, make_model, make_vocabulary, write_tokens

from cellformers.deposits.entries import GenePart, read_deposit
from cellformers.deposits.parts import open_part
from cellformers.deposits.readers import GENE_READERS
from cellformers.evaluate.finetuned import finetuned_cells
from cellformers.evaluate.finetuned_genes import read_finetuned
from cellformers.evaluate.splitfile import read_split
from cellformers.evaluate.tables import read_cells
from cellformers.io import open_counts
from cellformers.io.files import digest_arrays, read_table, write_json, write_table
from cellformers.simulate.deposits.run import simulate_deposits
from cellformers.training.answers import pool_folds
from cellformers.training.corpus import open_corpus
from cellformers.training.predict import predict
from cellformers.training.sides import SplitSpec, assign
from cellformers.training.space import read_space
from cellformers.training.targets import encode, read_cell_targets

TYPES = ["t0", "t1"] * (N_CELLS // 2)
DONORS = [f"d{i // 6}" for i in range(N_CELLS)]


# --- fine-tuned models ------------------------------------------------------------------------------------


def _write_split(folder: Path, **content: Any) -> None:
    folder.mkdir()
    common = {"kind": "held-out", "seed": 0, "inputs": {"cells": "sha256:0"}, "notes": [], "dataset": "a"}
    write_json({**common, "excluded": {}, **content}, folder / "split.json")


def _sides(folder: Path, by: str, train: list[str], test: list[str], **training: Any) -> None:
    folder.mkdir()
    write_json(
        {"by": by, "train": train, "heldout": [], "test": test, "n": {"train": 6}}, folder / "split.json"
    )
    write_json({"step": "finetune", "metrics": {"test": {"accuracy": 0.5, "n": 6}}, **training},
               folder / "training.json")  # fmt: skip


def _probabilities(n: int, *classes: str) -> dict[str, pa.Array]:
    first = np.linspace(0.1, 0.9, n, dtype=np.float32)
    return {f"probability_{name}": pa.array(abs(i - first)) for i, name in enumerate(classes)}


def make_tuned_cells(folder: Path) -> None:
    folds = [{"name": "d1", "train": None, "test": ["d1"]}]
    _write_split(folder / "given", task="cells", by="unit", unit="donor", label="kind", folds=folds,
                 classes=["t0", "t1"], n=N_CELLS)  # fmt: skip
    table = {"cell_id": CELLS, "kind": TYPES, "donor": DONORS, "qc_pass": [True] * N_CELLS}
    write_table(pa.table(table), folder / "given" / "cells.parquet")
    _sides(
        folder / "m", "unit", ["d0"], ["d1"], task="cells", labels=[{"name": "kind", "classes": ["t0", "t1"]}]
    )
    rows = {"cell_id": CELLS[6:], "side": ["test"] * 6, "label": TYPES[6:], **_probabilities(6, "t0", "t1")}
    write_table(pa.table(rows), folder / "m" / "predictions.parquet")


def read_tuned_cells(folder: Path) -> Any:
    split = read_split(folder / "given" / "split.json", task="cells")
    cells, _ = read_cells({"a": folder / "given" / "cells.parquet"}, label="kind", unit="donor")
    found = finetuned_cells([folder / "m"], split, cells, [(np.arange(6), np.arange(6, N_CELLS))])
    pooled, figures = pool_folds([folder / "m"])
    return [rounded(part.probability) for part in found.folds], found.notes, pooled.num_rows, repr(figures)


def build_tuned_cells(rng: random.Random, folder: Path) -> Any:
    make_tuned_cells(folder)
    return twist(rng, folder / "m")


def make_tuned_genes(folder: Path) -> None:
    train, test = GENES[:4], GENES[4:]
    labels = {gene: "yes" if i % 2 else "no" for i, gene in enumerate(GENES)}
    folds = [{"name": "1", "train": train, "test": test}, {"name": "2", "train": test, "test": train}]
    _write_split(folder / "given", task="genes", by="gene", unit=None, label="label", folds=folds,
                 classes=["no", "yes"], positive="yes", genes=labels, groups=None, n=8, class_sizes={"no": 4, "yes": 4},
                 inputs={"genes": digest_arrays(*map(list, zip(*labels.items(), strict=True)))})  # fmt: skip
    (folder / "m").mkdir()
    for number, fold in enumerate(folds, start=1):
        place = folder / "m" / str(number)
        _sides(place, "gene", fold["train"], fold["test"], task="genes", genes={"outside the vocabulary": []},
               labels=[{"name": "label", "classes": ["no", "yes"]}])  # fmt: skip
        for name, times in (("predictions", 1), ("predictions_pooled", 3)):
            ids = fold["test"] * times
            rows = {"gene_id": ids, "side": ["test"] * len(ids), "label": [labels[gene] for gene in ids]}
            table = pa.table(rows | _probabilities(len(ids), "no", "yes"))
            write_table(table, place / f"{name}.parquet")


def read_tuned_genes(folder: Path) -> Any:
    split = read_split(folder / "given" / "split.json", task="genes")
    found = read_finetuned([folder / "m" / "1", folder / "m" / "2"], split)
    return rounded(found.score), found.token_gene.tolist(), rounded(found.token_score), found.notes


def build_tuned_genes(rng: random.Random, folder: Path) -> Any:
    make_tuned_genes(folder)
    return twist(rng, folder / "m")


def twist(rng: random.Random, folder: Path) -> Any:
    """Another content for one of the JSON files and tables of a folder."""
    path = rng.choice(sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".parquet")))
    (odd_json if path.suffix == ".json" else odd_parquet)(rng, path)
    return Anything


def _tuned_target(name: str, make: Any, read: Any, build: Any) -> None:
    register(lambda: Target(name, make, read, fine, None, build, "m/**/*"))


_tuned_target("finetuned-cells", make_tuned_cells, read_tuned_cells, build_tuned_cells)
_tuned_target("finetuned-genes", make_tuned_genes, read_tuned_genes, build_tuned_genes)


def make_classifier(folder: Path) -> None:
    words = make_vocabulary(12)
    make_model(folder / "m", words, max_position_embeddings=8, head="cell", labels=("<a>", "b"), **SMALL)
    write_tokens(folder / "x.parquet", make_cells(words, [3, 0, 5, 2]), words)


def predict_cells(folder: Path) -> Any:
    predict(folder / "x.parquet", folder / "m", folder / "p.parquet", threads=1)
    table = read_table(folder / "p.parquet")
    numbers = [rounded(table[name].fill_null(-1)) for name in table.column_names if "probability" in name]
    return table.column_names, table["cell_id"].to_pylist(), table["predicted"].to_pylist(), numbers


def valid_predictions(value: Any) -> str | None:
    ranged = all(x == -1 or 0 <= x <= 1 for numbers in value[3] for x in numbers)
    return names_fault(value[1]) or (None if ranged else "no probabilities")


def build_classifier(rng: random.Random, folder: Path) -> Any:
    make_classifier(folder)
    odd_json(rng, folder / "m" / "config.json")
    return Anything


register(
    lambda: Target(
        "classifier", make_classifier, predict_cells, valid_predictions, None, build_classifier, "m/*"
    )
)


# --- what a training goes on from, and what a search may vary ---------------------------------------------


def make_corpus(folder: Path) -> None:
    words = make_vocabulary(12)
    write_tokens(folder / "x.parquet", make_cells(words, [3, 0, 5, 2]), words)


def read_corpus(folder: Path) -> Any:
    """Laid out from shards; a record that was there, of whatever, is no reason to fail."""
    found = open_corpus([folder / "x.parquet"], make_vocabulary(12), folder / "work")
    cells = [found.store.tokens.tolist(), found.store.offsets.tolist()]
    return cells, found.counts.tolist(), found.longest, found.digest


register(lambda: Target("corpus", make_corpus, read_corpus, fine))


def make_space(folder: Path) -> None:
    content = {
        "learning_rate": {"low": 1e-6, "high": 1e-3, "log": True}, "warmup": {"low": 100, "high": 2000},
        "schedule": ["linear", "cosine"], "epochs": {"low": 1, "high": 3},
    }  # fmt: skip
    (folder / "space.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def read_space_file(folder: Path) -> Any:
    return repr(read_space(folder / "space.yaml"))


def build_space(rng: random.Random, folder: Path) -> Any:
    make_space(folder)
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(change(rng, yaml.safe_load(path.read_text())), sort_keys=False))
    return Anything


register(lambda: Target("space", make_space, read_space_file, fine, None, build_space))


# --- labels and sides -------------------------------------------------------------------------------------


def make_sides(folder: Path) -> None:
    frame = pd.DataFrame({"cell_id": CELLS, "kind": TYPES, "donor": DONORS})
    frame.to_csv(folder / "labels.csv", index=False)
    write_json({"train": CELLS[:6], "heldout": CELLS[6:9], "test": CELLS[9:]}, folder / "sides.json")


def read_sides(folder: Path) -> Any:
    targets = read_cell_targets(folder / "labels.csv", ["kind"])
    labels, classes = encode(targets)
    side, said = assign(targets, labels, SplitSpec(file=folder / "sides.json"))
    return targets.keys.tolist(), labels.tolist(), classes, side.tolist(), json.dumps(said)


def build_sides(rng: random.Random, folder: Path) -> Any:
    make_sides(folder)
    odd_json(rng, folder / "sides.json")
    return Anything


register(lambda: Target("sides", make_sides, read_sides, fine, None, build_sides))


# --- deposits ---------------------------------------------------------------------------------------------


def _simulated(name: str, folder: Path) -> None:
    """The files of a simulated deposit, small ones."""
    simulate_deposits([name], folder / "sim", cells=150 if name in CELL_PARTS else None)
    given = [*(folder / "sim" / "www").rglob("*"), *(folder / "sim" / "home" / "manual").rglob("*")]
    for path in given:
        if path.is_file():
            path.rename(folder / path.name)
    shutil.rmtree(folder / "sim")


GENE_DEPOSITS = ("tf-range", "geneformer-labels", "collins2022")
CELL_PARTS = {"gse155468": "all", "gse156793": "all", "scp1303": "all", "gse129096": "drop"}


def read_gene_deposit(name: str, folder: Path) -> Any:
    """Genes and classes of every part."""
    found = []
    for part in read_deposit(name).parts.values():
        assert isinstance(part, GenePart)
        labelled = GENE_READERS[part.reader](part, {file: folder / file for file in part.files})
        found.append((labelled.names, labelled.positive, labelled.notes))
    return found


def valid_gene_deposit(value: Any) -> str | None:
    plain = all(isinstance(gene, str) for names, _, _ in value for gene in names)
    whole = all(len(names) == len(positive) for names, positive, _ in value)
    return None if plain and whole else "no names, or classes of other genes"


def read_cell_deposit(name: str, folder: Path) -> Any:
    """How many cells and genes every sample has, and the counts of its first block."""
    work = folder / "work"
    work.mkdir()
    part = open_part(name, CELL_PARTS[name], folder, work)
    found = []
    for sample in part.samples:
        with open_counts(sample.path, options=part.options) as source:
            block = next(iter(source.blocks(max_bytes=1 << 16)))
            found.append((len(source.cell_ids), source.n_features, int(block.data.sum())))
    return found


def _deposit_target(name: str, read: Any, valid: Any) -> None:
    register(lambda: Target(f"deposit-{name}", partial(_simulated, name), partial(read, name), valid))


for _name in GENE_DEPOSITS:
    _deposit_target(_name, read_gene_deposit, valid_gene_deposit)
for _name in CELL_PARTS:
    _deposit_target(_name, read_cell_deposit, fine)
