"""Fine-tuning on real cells: what a small model learns, beside logistic regression on the same cells and split.

    python benchmarks/finetune.py
    python benchmarks/finetune.py --model models/v1-10m --context 2048 --only lines --output figures.json

Three tasks on the public data of CELLFORMERS_REFERENCE_DATA, all on one thread of the CPU:

- lines: three lung cancer cell lines, trained on Drop-seq and tested on CEL-seq2, and back;
- blood: ten sorts of blood cells, a stratified split of --blood cells;
- genes: dosage-sensitive transcription factors against insensitive ones, five folds over genes.

Without --model a network of two layers is taken twice, with random weights and pretrained for --pretrain-steps on
masked genes of the blood cells that the tasks don't use, both cut at --context tokens: small numbers for a small
network, to be compared with each other. Logistic regression trains on what the network has for training and for
stopping together. Its features of cells are rank values (1 for the first gene down to 0 behind the last, 0 for genes
that are not there) and log counts; of genes, their mean rank value and detection, and their loadings in a PCA of the
rank values over cells.
"""

# ruff: noqa: E402
import sys

del sys.path[0]  # this folder holds a tokenize.py, which would hide the standard library's

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch
from sklearn.decomposition import PCA

from cellformers import metrics
from cellformers.evaluate.classify import predict_folds
from cellformers.folds import hash_order
from cellformers.genes import map_features
from cellformers.io import open_counts
from cellformers.io.files import read_json, read_table, write_table
from cellformers.io.source import ReadOptions
from cellformers.models.checkpoints import read_config
from cellformers.tokens import read_tokens, tokenize
from cellformers.training.answers import pool_folds, pooled_auc
from cellformers.training.finetune import Settings, SplitSpec, finetune
from cellformers.training.pretrain import pretrain
from cellformers.training.targets import read_cell_targets, read_columns, read_gene_targets
from cellformers.vocabulary import Vocabulary, read_published

COUNTS = {
    "dropseq": "lung_lines/sc_dropseq.count.csv.gz",
    "celseq2": "lung_lines/sc_celseq2.count.csv.gz",
    "blood": "blood_sorted.h5ad",
}
MOST_FEATURES = 3000
Array = np.ndarray[Any, Any]


def tokens_of(data: Path, work: Path, vocabulary: Vocabulary) -> dict[str, Path]:
    """Tokens of every data set."""
    paths = {}
    for name, file in COUNTS.items():
        paths[name] = work / f"{name}.tokens.parquet"
        with open_counts(data / "counts" / file, options=ReadOptions()) as source:
            tokenize(source, vocabulary, output=paths[name], threads=1)
    return paths


def cells_of(path: Path) -> tuple[Array, list[Array]]:
    """Names and tokens of all cells."""
    blocks = list(read_tokens(path))
    cells = [b.tokens[i:j] for b in blocks for i, j in zip(b.offsets[:-1], b.offsets[1:], strict=True)]
    return np.concatenate([b.cell_ids for b in blocks]), cells


def rank_values(cells: Sequence[Array], vocabulary: Vocabulary) -> sp.csr_matrix:
    """float64 [cells, vocabulary]: (context - place) / context of each gene."""
    special = list(vocabulary.special_tokens.values())
    genes = [cell[~np.isin(cell, special)] for cell in cells]
    indptr = np.cumsum([0, *map(len, genes)])
    values = [1 - np.arange(len(g)) / vocabulary.context_length for g in genes]
    shape = (len(cells), vocabulary.size)
    return sp.csr_matrix((np.concatenate(values), np.concatenate(genes), indptr), shape=shape)


def log_counts(data: Path, names: Sequence[str], vocabulary: Vocabulary) -> tuple[Array, sp.csr_matrix]:
    """Names and log(1 + 10,000 x share) of the vocabulary's genes, float64 [cells, vocabulary], of data sets."""
    parts, ids = [], []
    for name in names:
        with open_counts(data / "counts" / COUNTS[name], options=ReadOptions()) as source:
            token = map_features(source.feature_ids, source.feature_symbols, vocabulary).token_of_feature
            blocks = [
                sp.csr_matrix(
                    (b.data.astype(np.float64), b.indices, b.indptr), shape=(b.n_cells, source.n_features)
                )
                for b in source.blocks()
            ]
            counts = sp.vstack(blocks, format="csr")
            total = np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1)
            known = np.flatnonzero(token >= 0)
            place = sp.csr_matrix(
                (np.ones(len(known)), (known, token[known])), shape=(len(token), vocabulary.size)
            )
            X = sp.diags(10_000 / total) @ counts @ place
            parts.append(X.log1p())
            ids.append(np.array([f"{name}:{i}" for i in source.cell_ids], dtype=object))
    return np.concatenate(ids), sp.vstack(parts, format="csr")


def regression(
    X: sp.csr_matrix | Array, y: Array, train: Array, test: Array, names: Array, n_classes: int
) -> Array:
    """Probabilities of the test rows, of logistic regression on the most variable features of the training rows."""
    if sp.issparse(X):
        part = X[train]
        mean = np.asarray(part.mean(axis=0)).ravel()
        variance = np.asarray(part.power(2).mean(axis=0)).ravel() - mean**2
        chosen = np.sort(np.argsort(-variance, kind="stable")[:MOST_FEATURES])
        X = X[:, chosen].toarray()
    (found,) = predict_folds(
        lambda a, b: (X[a], X[b]), y, [(train, test)], names=names, units=None, n_classes=n_classes, seed=0
    )
    return found.probability


def cell_figures(y: Array, p: Array) -> dict[str, float]:
    """Accuracy and macro F1 of probabilities."""
    counts = metrics.confusion(y, p.argmax(axis=1), p.shape[1])
    return {"accuracy": float(metrics.accuracy(counts)), "macro_f1": float(metrics.macro_f1(counts))}


class Bench:
    """The data in a work folder, the models to fine-tune, and the table that grows."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.data = Path(options.data)
        if options.model is not None:
            self.vocabulary = Vocabulary.load(options.model / "vocabulary")
            longest = read_config(options.model).max_position_embeddings
        else:
            self.vocabulary = read_published(self.data / "geneformer" / "gc104M")
            longest = options.context
        context = min(longest, options.context, self.vocabulary.context_length)
        if context < self.vocabulary.context_length and options.model is None:
            self.vocabulary = replace(self.vocabulary, context_length=context)
        self.vocabulary.save(work / "vocabulary")
        self.tokens = tokens_of(self.data, work, self.vocabulary)
        self.blood = self._blood_cells()
        self.rows: list[dict[str, Any]] = []
        self.models = self._models()

    def _blood_cells(self) -> Path:
        """A table of the sorts of --blood cells."""
        import anndata

        obs = anndata.read_h5ad(self.data / "counts" / COUNTS["blood"], backed="r").obs
        names = np.array(obs.index, dtype=object)
        chosen = np.sort(hash_order(names, seed=0, salt="benchmark")[: self.options.blood])
        table = pa.table(
            {
                "cell_id": names[chosen].tolist(),
                "type": obs["celltype"].astype(str).to_numpy()[chosen].tolist(),
            }
        )
        write_table(table, self.work / "blood.parquet")
        return self.work / "blood.parquet"

    def _models(self) -> dict[str, Path]:
        if self.options.model is not None:
            return {self.options.model.name: self.options.model}
        _, (chosen,) = read_columns(self.blood)
        names, cells = cells_of(self.tokens["blood"])
        others = [i for i, name in enumerate(names) if name not in set(chosen)]
        table = pa.table(
            {
                "cell_id": names[others].tolist(),
                "input_ids": pa.array([cells[i] for i in others], pa.list_(pa.int32())),
                "length": pa.array([len(cells[i]) for i in others], pa.int32()),
            }
        )
        metadata = {"inputs": {"dataset": "blood, other cells", "vocabulary": self.vocabulary.digest}}
        write_table(table, self.work / "others.parquet", metadata)
        made = {}
        for name, steps in (("random", 0), ("pretrained", self.options.pretrain_steps)):
            start = time.perf_counter()
            made[name] = self.work / name
            pretrain(
                [self.work / "others.parquet"], self.work / "vocabulary", made[name], preset="small",
                max_positions=self.vocabulary.context_length, steps=steps, dropout=0.0, threads=1,
                measurements=1, heldout_fraction=0.02, initializer_range=0.05,
            )  # fmt: skip
            self.say(f"{name} model: {steps} steps in {time.perf_counter() - start:.0f} s")
        return made

    def say(self, text: str) -> None:
        """A line on stderr."""
        print(text, file=sys.stderr, flush=True)

    def add(self, task: str, method: str, figures: dict[str, float], seconds: float) -> None:
        """A row of the table."""
        self.rows.append({"task": task, "method": method, **figures, "seconds": round(seconds, 1)})
        shown = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
        self.say(f"{task}: {method}: {shown} ({seconds:.0f} s)")

    def settings(self, **changes: Any) -> Settings:
        """Those of a small network; of a given model, milder."""
        own: dict[str, Any] = {"learning_rate": 1e-4}
        if self.options.model is None:  # dropout of attention takes torch's slow way on the CPU
            own = {"learning_rate": 1e-3, "dropout": 0.0, "classifier_dropout": 0.1}
        return Settings(**{**own, "epochs": self.options.epochs, "patience": 4, **changes})

    def fit(self, name: str, output: str, **given: Any) -> tuple[dict[str, Any], Path, float]:
        """Fine-tune one model."""
        start = time.perf_counter()
        done = finetune(given.pop("tokens"), self.models[name], self.work / output, threads=1, **given)
        return done, self.work / output, time.perf_counter() - start

    # --- the tasks ---------------------------------------------------------------------------------------

    def cells(self, task: str, targets: Any, tokens: dict[str, list[Path]], spec: SplitSpec) -> None:
        """A task about cells: every model, then logistic regression on the sides that were written down."""
        split: dict[str, Any] = {}
        for name in self.models:
            given = {"tokens": tokens, "targets": targets, "split": spec, "settings": self.settings()}
            done, folder, seconds = self.fit(name, f"{task}-{name}", **given)
            test = done["metrics"]["test"]
            self.add(task, f"fine-tuned, {name}", {k: test[k] for k in ("accuracy", "macro_f1")}, seconds)
            split = read_json(folder / "split.json")
        label = dict(zip(targets.keys, targets.labels[:, 0], strict=True))
        classes = sorted(set(label.values()))
        names, X = [], []
        for dataset, paths in tokens.items():
            ids, cells = cells_of(paths[0])
            names.append(np.array([f"{dataset}:{i}" if dataset else i for i in ids], dtype=object))
            X.append(rank_values(cells, self.vocabulary))
        ranked = np.concatenate(names), sp.vstack(X, format="csr")
        counted_ids, counted = log_counts(self.data, [d or "blood" for d in tokens], self.vocabulary)
        if "" in tokens:
            counted_ids = np.array([i.split(":", 1)[1] for i in counted_ids], dtype=object)
        for method, (ids, features) in (
            ("rank values", ranked),
            ("log counts", (counted_ids, counted)),
        ):
            start = time.perf_counter()
            place = {name: i for i, name in enumerate(ids)}
            sides = [sorted({*split["train"], *split["heldout"]}), split["test"]]
            train, test = (np.array([place[name] for name in side]) for side in sides)
            y = np.array([classes.index(label[name]) if name in label else 0 for name in ids])
            p = regression(features, y, train, test, ids, len(classes))
            self.add(
                task, f"logistic regression, {method}", cell_figures(y[test], p), time.perf_counter() - start
            )

    def lines(self) -> None:
        """Cell lines from one platform to the other and back."""
        folder = self.data / "counts" / "lung_lines"
        tables = {name: folder / f"sc_{name}.metadata.csv.gz" for name in ("dropseq", "celseq2")}
        targets = read_cell_targets(tables, ["cell_line_demuxlet"], key="")
        tokens = {name: [self.tokens[name]] for name in tables}
        for train, test in (("dropseq", "celseq2"), ("celseq2", "dropseq")):
            split = {
                "by": "dataset", "label": "cell_line_demuxlet",
                "folds": [{"name": f"{train} to {test}", "train": [train], "test": [test]}],
            }  # fmt: skip
            file = self.work / f"{train}.split.json"
            file.write_text(json.dumps(split))
            self.cells(f"{train} to {test}", targets, tokens, SplitSpec(file=file, fold=1, heldout=0.15))

    def sorts(self) -> None:
        """Sorts of blood cells, stratified."""
        targets = read_cell_targets(self.blood, ["type"])
        self.cells("blood sorts", targets, {"": [self.tokens["blood"]]}, SplitSpec(heldout=0.1, test=0.3))

    def genes(self) -> None:
        """Dosage-sensitive transcription factors, five folds over genes."""
        table = self.data / "labels" / "dosage_sens_tf_labels.csv"
        targets = read_gene_targets(table, "dosage_sensitive", key="ensembl_id", positive="Yes")
        settings = self.settings(
            epochs=self.options.gene_epochs,
            max_cells=self.options.gene_cells,
            class_weights="balanced",
            keep="last",
        )
        folders: list[Path] = []
        for name in self.models:
            folders, spent = [], 0.0
            for fold in range(1, 6):
                spec = SplitSpec(folds=5, fold=fold, heldout=0.0)
                given = {
                    "tokens": [self.tokens["blood"]],
                    "targets": targets,
                    "split": spec,
                    "settings": settings,
                }
                _, folder, seconds = self.fit(name, f"genes-{name}-{fold}", **given)
                folders.append(folder)
                spent += seconds
            rows, figures = pool_folds(folders)
            found = {
                "auc": figures["per_gene.auc"]["mean"], "auc_sd": figures["per_gene.auc"]["sd"],
                "auc_all_folds": pooled_auc(rows, "Yes"), "auc_cell_gene_pairs": figures["pooled.auc"]["mean"],
            }  # fmt: skip
            self.add("dosage", f"fine-tuned, {name}", found, spent)
        self._gene_regression(folders)

    def _gene_regression(self, folders: Sequence[Path]) -> None:
        """Logistic regression on the genes and folds of fine-tuned models."""
        _, cells = cells_of(self.tokens["blood"])
        ranks = rank_values(cells, self.vocabulary)
        detected = np.asarray((ranks > 0).mean(axis=0)).ravel()
        mean = np.asarray(ranks.mean(axis=0)).ravel()
        pca = PCA(n_components=50, svd_solver="arpack", random_state=0).fit(ranks)
        loadings = pca.components_.T * np.sqrt(pca.explained_variance_)
        splits = [read_json(folder / "split.json") for folder in folders]
        truth = read_json(folders[0] / "training.json")["labels"][0]["classes"]
        label: dict[str, str] = {}
        for folder in folders:
            t = read_table(folder / "predictions.parquet")
            label |= dict(zip(t["gene_id"].to_pylist(), t["label"].to_pylist(), strict=True))
        names = np.array(sorted(label), dtype=object)
        token = dict(zip(self.vocabulary.gene_ids, self.vocabulary.token_ids, strict=True))
        rows = np.array([token[name] for name in names])
        y = np.array([truth.index(label[name]) for name in names])
        positive = truth.index("Yes")
        for method, X in (
            ("mean rank value and detection", np.stack([mean, detected], axis=1)),
            ("loadings of rank values", loadings),
        ):
            start = time.perf_counter()
            folds = [
                (
                    np.flatnonzero(~np.isin(names.astype(str), s["test"])),
                    np.flatnonzero(np.isin(names.astype(str), s["test"])),
                )
                for s in splits
            ]
            made = predict_folds(
                lambda a, b, X=X[rows]: (X[a], X[b]), y, folds, names=names, units=None, n_classes=2, seed=0
            )
            each = [
                float(metrics.auc(y[test] == positive, part.probability[:, positive]))
                for (_, test), part in zip(folds, made, strict=True)
            ]
            score, known = np.zeros(len(y)), np.zeros(len(y), dtype=bool)
            for (_, test), part in zip(folds, made, strict=True):
                score[test], known[test] = part.probability[:, positive], True
            found = {
                "auc": float(np.mean(each)), "auc_sd": float(np.std(each, ddof=1)),
                "auc_all_folds": float(metrics.auc(y[known] == positive, score[known])),
            }  # fmt: skip
            self.add("dosage", f"logistic regression, {method}", found, time.perf_counter() - start)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table on stdout."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    texts = [
        [
            f"{row[c]:.3f}" if isinstance(row.get(c), float) and c != "seconds" else str(row.get(c, ""))
            for c in columns
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [columns, *texts]) for i in range(len(columns))]
    for line in [columns, *texts]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = os.environ.get("CELLFORMERS_REFERENCE_DATA", "../shared/data")
    parser.add_argument("--data", default=default, help="folder of the reference data")
    parser.add_argument("--model", type=Path, help="a model folder, in place of the small networks")
    parser.add_argument("--only", choices=("lines", "blood", "genes"), action="append")
    parser.add_argument("--context", type=int, default=512, help="most tokens of a cell")
    parser.add_argument("--pretrain-steps", type=int, default=400)
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--blood", type=int, default=600, help="cells of the task blood")
    parser.add_argument("--gene-cells", type=int, default=300, help="cells of the task genes")
    parser.add_argument("--gene-epochs", type=float, default=2.0)
    parser.add_argument("--output", "-o", type=Path, help="also write the table as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for name, task in (("lines", bench.lines), ("blood", bench.sorts), ("genes", bench.genes)):
            if not options.only or name in options.only:
                task()
    show(bench.rows)
    if options.output:
        options.output.write_text(json.dumps(bench.rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
