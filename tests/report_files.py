"""Files that a report is made of, small and in the layouts of the real ones; and what a page of a report holds."""

import json
import struct
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cellformers.evaluate.scores import write_score
from cellformers.io.files import stamp, write_json, write_table, write_text
from cellformers.qc import qc
from cellformers.report import DatasetFiles, MapFile, ReportSpec

EVIL = "Naïve T <script>alert('x')</script> & $5"
TYPES = [
    "B cell",
    "CD4 T cell",
    "CD8 T cell",
    "NK cell",
    "Monocyte",
    "Dendritic cell",
    "Plasma cell",
    "Platelet",
    EVIL,
]
DIGEST = {"dataset": "sha256:0"}


def made(step: str, **parameters: Any) -> dict[str, Any]:
    return stamp(step, 1, parameters=parameters, inputs=DIGEST)


def kinds(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(TYPES), n)


def make_dataset(folder: Path, n: int = 300, *, seed: int = 0, mito: bool = True) -> DatasetFiles:
    """A dataset's folder, its QC by the real step."""
    rng = np.random.default_rng(seed)
    n_counts = np.exp(rng.normal(8, 0.45, n)).astype(np.int64)
    n_genes = (n_counts**0.75 * np.exp(rng.normal(0, 0.12, n))).astype(np.int32)
    fraction = np.clip(rng.normal(0.07, 0.02, n), 0, 1)
    n_counts[:3], n_genes[:3], fraction[3:12] = 5, 4, 0.45
    ids = [f"cell{i}" for i in range(n)]
    metrics = pa.table(
        {
            "cell_id": ids,
            "n_counts": n_counts,
            "n_genes": n_genes,
            "mito_fraction": pa.array(fraction, mask=np.full(n, not mito)),
        }
    )
    types: list[str | None] = [TYPES[i] for i in kinds(n, seed)]
    types[20] = None
    donors = [f"donor {d}" for d in rng.integers(1, 7, n)]
    disease = [DISEASES[int(d.split()[1]) % 3] for d in donors]
    metadata = pa.table({"cell_id": ids, "cell_type": types, "donor": donors, "disease": disease})
    write_table(metrics, folder / "metrics.parquet", made("qc"))
    write_table(metadata, folder / "metadata.parquet", made("ingest"))
    qc(
        [folder / "metrics.parquet"],
        folder / "metadata.parquet",
        output=folder / "cells.parquet",
        thresholds=folder / "qc" / "thresholds.json",
    )
    features = {"all": 1000, "mapped": 700, "summed": 12, "outside": 250, "unknown": 48, "spike_ins": 2}
    examples = {"summed": ["ENSG1 (A)", "ENSG2 (A)"], "outside": ["ENSG3"], "unknown": ["<b>odd</b>"]}
    mapping = {
        "features": features,
        "genes": 694,
        "shares": {"mapped": 0.956, "known": 0.99},
        "examples": examples,
    }
    write_json(made("genes") | mapping, folder / "qc" / "genes.v.json")
    shards = []
    for shard, part in enumerate(np.array_split(np.minimum(n_genes, 512), 2)):
        path = folder / "tokens" / "v" / f"{shard}.parquet"
        write_table(
            pa.table({"cell_id": [str(i) for i in range(len(part))], "length": part.astype(np.int32)}),
            path,
            made("tokenize", min_genes=7, context_length=512),
        )
        shards.append(path)
    return DatasetFiles(folder=folder, label="cell_type", batch="donor", tokens={"v": shards})


def make_map(folder: Path, n: int = 300, *, seed: int = 0, shown: int | None = None) -> Path:
    rng = np.random.default_rng(seed)
    centre = np.random.default_rng(0).normal(0, 5, (len(TYPES), 2))
    xy = (centre[kinds(n, seed)] + rng.normal(0, 1, (n, 2))).astype(np.float32)[:shown]
    ids = [f"cell{i}" for i in range(n)][:shown]
    path = folder / "embeddings" / "small.map.parquet"
    columns = {"cell_id": ids, "umap_1": xy[:, 0], "umap_2": xy[:, 1]}
    write_table(pa.table(columns), path, made("map", method="umap", n_cells=n, n_shown=len(ids)))
    return path


def make_model(folder: Path, *, trained: bool = True) -> Path:
    shape = {"num_hidden_layers": 3, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 256}
    write_json(
        {"model_type": "bert", "vocab_size": 704, "max_position_embeddings": 512, **shape},
        folder / "config.json",
    )
    header = json.dumps(
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [704, 128], "data_offsets": [0, 0]}}
    ).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    if trained:
        steps = np.arange(10, 401, 10)
        loss = 4.9 + 1.4 * np.exp(-steps / 90)
        rows = [
            f"{s}\t{s * 8192}\t0.001\t{a:.4f}\t{a + 0.05 if s % 40 == 0 else ''}"
            for s, a in zip(steps, loss, strict=True)
        ]
        text = "\n".join(["step\ttokens\tlearning_rate\ttrain_loss\theldout_loss", *rows]) + "\n"
        write_text(text, folder / "loss.tsv")
        training = {"n_cells": 2653, "n_tokens": 3276800, "heldout_loss": 4.97, "unigram_entropy": 6.1}
        write_json(made("pretrain", steps=400) | training, folder / "training.json")
    return folder


CLASSES = {"cells": TYPES, "genes": ["insensitive", "sensitive"], "mixing": []}
SINGLE = (
    "ilisi",
    "kbet",
    "graph_connectivity",
    "silhouette_batch",
    "clisi",
    "silhouette_label",
    "nmi",
    "ari",
)


def metric(value: float, width: float | None, names: list[str], *, units: bool) -> dict[str, Any]:
    """A metric with its values by unit or fold."""
    each = np.clip(
        value + np.random.default_rng(int(value * 1000)).normal(0, 0.03, len(names)), 0, 1
    ).tolist()
    low, high = (None, None) if width is None else (max(value - width, 0.0), min(value + width, 1.0))
    by_unit = dict(zip(names, each, strict=True)) if units else None
    return {"value": value, "low": low, "high": high, "folds": each, "units": by_unit}


def make_score(
    folder: Path, method: str, kind: str, value: float, *, task: str = "cells", width: float | None = 0.03,
    benchmark: str = "cell_types", units: int = 6, notes: tuple[str, ...] = (), chance: float = 0.11,
    classes: list[str] | None = None, dataset: str = "atlas", label: str | None = "cell_type",
    published: dict[str, list[dict[str, Any]]] | None = None, tokens: float | None = None, n: int = 288,
) -> Path:  # fmt: skip
    """A score and its predictions in the layout that `cellformers evaluate` and `cellformers mixing` write."""
    classes = CLASSES[task] if classes is None else classes
    part = "donor" if task == "cells" else "fold"
    names = [] if task == "mixing" else [f"{part} {i + 1}" for i in range(units)]
    main, second = {
        "cells": ("macro_f1", "accuracy"), "genes": ("auc", "average_precision"),
        "mixing": ("batch_correction", "bio_conservation"),
    }[task]  # fmt: skip
    metrics = {
        main: metric(value, width, names, units=task == "cells"),
        second: metric(value + (1 - value) / 3, width, names, units=task == "cells"),
    }
    if tokens is not None:
        metrics["auc_tokens"] = metric(tokens, width, names, units=False) | {"sd": 0.021}
    if task == "mixing":
        metrics |= {m: metric((value * 3 + k / 8) / 4, None, [], units=False) for k, m in enumerate(SINGLE)}
    resampled = None if width is None else "genes" if task == "genes" else "donor"
    note = None if width else f"{units} units (donor) are too few for an interval: see the value of each"
    score = {
        "benchmark": benchmark, "task": task, "dataset": dataset, "method": method, "kind": kind,
        "label": label if task != "genes" else "label", "classes": classes,
        "split": {
            "kind": {"cells": "held-out", "genes": "stratified", "mixing": "all cells"}[task],
            "unit": None if task == "genes" else "donor", "seed": 0, "folds": len(names), "names": names,
            "units": [[u] for u in names] if task == "cells" else None,
            "excluded": {"failed QC": 12, "no label": 0},
        },
        "n": n,
        "interval": {"method": "percentile bootstrap", "level": 0.95, "resamples": 2000, "resampled": resampled,
                     "note": note},
        "metrics": metrics,
        "chance": {} if task == "mixing" else {main: chance},
        "published": {main: [{"value": 0.9, "source": "A paper <2023>"}]} if published is None else published,
        "notes": ["a caveat for all", *notes],
        **(of_cells(classes, names, value) if task == "cells" else {}), **made("evaluate"),
        **({"batches": {"donor 1": 3000, "donor 2": 1000}} if task == "mixing" else {}),
    }  # fmt: skip
    path = folder / benchmark / f"{method}.json"
    write_score(score, path)
    if task != "mixing":
        write_predictions(path, task, classes, names, value)
    return path


def of_cells(classes: list[str], names: list[str], value: float) -> dict[str, Any]:
    """What scores of cells say beside their metrics; units vote where there are few classes."""
    rng = np.random.default_rng(0)
    k = len(classes)
    confusion = np.eye(k, dtype=int) * round(100 * value) + rng.integers(0, 6, (k, k))
    share = dict.fromkeys(classes, 1 / k)
    votes = [
        {"unit": u, "label": classes[i % k], "predicted": classes[(i + (i == 1)) % k], "cells": 90 + i, "share": share}
        for i, u in enumerate(names)
    ]  # fmt: skip
    return {
        "confusion": confusion.tolist(),
        "per_class": {
            c: {
                "precision": value,
                "recall": None if i == 1 else value - 0.1,
                "f1": value - 0.05,
                "n": 40 + i,
            }
            for i, c in enumerate(classes)
        },
        "votes": votes if k <= 3 else None,
    }


def write_predictions(
    path: Path, task: str, classes: list[str], names: list[str], value: float, n: int = 240
) -> None:
    """Predictions that are better, the higher the value."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, len(classes), n)
    columns: dict[str, Any] = {"fold": [names[i % len(names)] for i in range(n)]}
    columns["label"] = [classes[t] for t in truth]
    if task == "genes":
        columns["probability"] = np.clip(0.5 + truth * (value - 0.5) + rng.normal(0, 0.2, n), 0, 1)
    else:
        each = rng.random((n, len(classes))) + value * np.eye(len(classes))[truth]
        for c, name in enumerate(classes):
            columns[f"probability:{name}"] = (each / each.sum(axis=1, keepdims=True))[:, c]
    write_table(pa.table(columns), path.with_name(f"{path.stem}.predictions.parquet"))


def make_runtime(folder: Path) -> Path:
    seconds = {
        "simulate": 4.2, "atlas/ingest": 3.1, "atlas/qc_metrics/0001-of-0002": 1.5,
        "atlas/qc_metrics/0002-of-0002": 1.4,
        "atlas/qc": 2.9, "corpora/atlas/medians": 1.2, "vocabularies/v": 1.1, "atlas/genes.v": 1.0,
        "atlas/tokens/v/0001-of-0002": 2.2, "atlas/tokens/v/0002-of-0002": 2.1, "models/small/pretrain": 75.0,
        "models/small/randomize": 3.0, "atlas/embeddings/small/0001-of-0001": 18.0, "atlas/embeddings/small": 3.4,
        "atlas/embeddings/small.map": 22.0, "atlas/gene_embeddings/small/0001-of-0001": 17.0,
        "benchmarks/cell_types/split": 2.0, "benchmarks/cell_types/small": 6.5, "benchmarks/cell_types/pca_hvg": 8.0,
        "deposits/gse1": 12.0, "labels/gse1.all.v": 1.3, "benchmarks/cell_types/finetuned/small/fold-1": 31.0,
        "benchmarks/cell_types/finetuned/small/fold-2": 30.0,
        "summarize": 1.0, "gone/ingest": 99.0, "report": 50.0,
    }  # fmt: skip
    header = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    for name, value in seconds.items():
        rss = "-" if name == "simulate" else f"{150 + 20 * value:.2f}"
        write_text(
            f"{header}{value}\t0:00:01\t{rss}\t1\t1\t1\t0\t0\t99\t{value * 1.5}\n", folder / f"{name}.tsv"
        )
    return folder


DISEASES = ["NF", "HCM", "DCM"]
METHODS: dict[str, list[tuple[str, str, float]]] = {
    "cell_types": [
        ("small", "model", 0.912), ("small-random", "baseline", 0.83), ("pca_hvg", "baseline", 0.95),
        ("log_counts", "baseline", 0.94), ("permuted", "control", 0.105),
    ],
    "disease": [
        ("small-finetuned", "model", 0.87), ("small-random-finetuned", "baseline", 0.71), ("small", "model", 0.74),
        ("small-random", "baseline", 0.62), ("pca_hvg", "baseline", 0.78), ("harmony", "baseline", 0.70),
        ("rank_only", "baseline", 0.76), ("permuted", "control", 0.30),
    ],
    "dosage_sensitivity": [
        ("small", "model", 0.78), ("small-random", "baseline", 0.55), ("mean_expression", "baseline", 0.52),
        ("detection_rate", "baseline", 0.5), ("coexpression_pca", "baseline", 0.74), ("svm_ranks", "baseline", 0.7),
        ("forest_counts", "baseline", 0.69), ("permuted", "control", 0.48), ("oracle", "oracle", 0.97),
    ],
    "few_donors": [("small", "model", 0.92), ("pca_hvg", "baseline", 0.88)],
    "patients": [
        ("small", "model", 0.61), ("small-random", "baseline", 0.72), ("pca_hvg", "baseline", 0.52),
        ("harmony", "baseline", 0.81), ("combat", "baseline", 0.73), ("permuted", "control", 0.99),
    ],
}  # fmt: skip
DOSAGE = {
    "auc_tokens": [
        {"value": 0.91, "sd": 0.02, "source": "the paper", "protocol": "pooled tokens"},
        {"value": 0.89, "sd": None, "source": "its seeds <2024>", "protocol": None},
    ]
}
STATEMENTS: dict[str, dict[str, Any]] = {
    "disease": {
        "question": "Is a cell of a failing heart?",
        "protocol": "donors of the publication <b>held</b> out",
        "new": False,
        "citation": ["Someone et al. 2022"],
        "pretraining": [
            {"dataset": "atlas", "model": "small", "contains": "no", "source": "pretrained here"},
            {"dataset": "atlas", "model": "large", "contains": "unknown", "source": "a list <i>not</i> published"},
            {"dataset": "second", "model": "small", "contains": "yes", "source": None},
        ],
    },
    "few_donors": {"new": True},
}  # fmt: skip


def make_scores(folder: Path, names: Sequence[str]) -> list[Path]:
    """Scores of benchmarks: cells of 6, of 11 and of 3 donors, genes, mixing."""
    none: dict[str, Any] = {}
    options: dict[str, dict[str, Any]] = {
        "cell_types": none,
        "disease": {"units": 11, "classes": DISEASES, "label": "disease", "chance": 0.33, "published": {
            "accuracy": [{"value": 0.9, "source": "A paper <2023>"}],
            "macro_f1": [{"value": 0.864, "sd": 0.01, "source": "A paper <2023>", "protocol": "fine-tuned"}],
        }},
        "dosage_sensitivity": {"task": "genes", "width": 0.06, "units": 5, "chance": 0.5, "published": DOSAGE},
        "few_donors": {"width": None, "units": 3, "published": none, "dataset": "atlas+second"},
        "patients": {"task": "mixing", "published": none, "n": 4000, "dataset": "atlas"},
    }  # fmt: skip
    rows = {name: [(*row, {}) for row in METHODS[name]] for name in names}
    if "dosage_sensitivity" in rows:
        rows["dosage_sensitivity"] += [
            ("small-finetuned", "model", 0.84, {"tokens": 0.88}),
            ("small-random-finetuned", "baseline", 0.66, {"tokens": 0.69}),
        ]
    return [
        make_score(folder, method, kind, value, benchmark=name, **options[name] | more)
        for name, methods in rows.items()
        for method, kind, value, more in methods
    ]


def make_spec(folder: Path, n: int = 300, *, names: Sequence[str] = tuple(METHODS)) -> ReportSpec:
    """A spec with everything in it, of the benchmarks of these names."""
    atlas = make_dataset(folder / "atlas", n)
    second = make_dataset(folder / "second", n // 3, seed=1, mito=False)
    return ReportSpec(
        title="Demo <atlas>",
        datasets={"atlas": atlas, "second": second},
        models={"small": make_model(folder / "models" / "small")},
        maps=[
            MapFile(dataset="atlas", embedding="small", path=make_map(folder / "atlas", n)),
            MapFile(
                dataset="second", embedding="small", path=make_map(folder / "second", n // 3, seed=1, shown=n // 4)
            ),
        ],
        scores=make_scores(folder / "benchmarks", names),
        statements=STATEMENTS,
        runtime=make_runtime(folder / "runtime"),
        config="seed: 0\nnote: </code><script>alert(2)</script>\n",
    )  # fmt: skip


class Reader(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag."""
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Leave a script or a style."""
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        """Keep visible text."""
        if not self.inside:
            self.text.append(data)


def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text(encoding="utf-8"))
    return reader


def text_of(page: Path) -> str:
    return " ".join(" ".join(read(page).text).split())


def sections_of(page: Path) -> list[str]:
    return [a["id"] or "" for tag, a in read(page).tags if tag == "section"]


def make_large_spec(folder: Path, benchmarks: int, *, classes: int = 70) -> ReportSpec:
    """A dataset with maps of three embeddings, and benchmarks of fifteen methods on eleven donors."""
    atlas = make_dataset(folder / "atlas", 3000)
    path = make_map(folder / "atlas", 3000)
    scores = [
        make_score(
            folder / "benchmarks", f"network{k % 8}" + "-random" * (k > 7), "baseline" if k > 7 else "model",
            0.9 - k / 50, units=11, classes=[f"type {i}" for i in range(classes)], benchmark=f"benchmark_{number}",
        )
        for number in range(benchmarks) for k in range(15)
    ]  # fmt: skip
    maps = [MapFile(dataset="atlas", embedding=f"network{k}", path=path) for k in range(3)]
    return ReportSpec(datasets={"atlas": atlas}, maps=maps, scores=scores)
