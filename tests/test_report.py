"""The report: sections there and absent, words, escaping, size, no loads, no errors in a browser."""

import html
import json
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cellformers.config import load as load_config
from cellformers.errors import UserError
from cellformers.evaluate.scores import write_score
from cellformers.io.files import stamp, write_json, write_table, write_text
from cellformers.qc import qc
from cellformers.report import (
    DatasetFiles,
    MapFile,
    ReportSpec,
    benchmarks,
    figures,
    from_config,
    words,
    write_report,
)

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
    metadata = pa.table({"cell_id": ids, "cell_type": types, "donor": donors})
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


def make_score(
    folder: Path, method: str, kind: str, value: float, *, task: str = "cells", width: float | None = 0.03,
    benchmark: str = "cell_types", units: int = 6, notes: tuple[str, ...] = (), chance: float = 0.11,
) -> Path:  # fmt: skip
    def metric(v: float) -> dict[str, Any]:
        rng = np.random.default_rng(int(v * 1000))
        each = np.clip(v + rng.normal(0, 0.03, units), 0, 1).tolist()
        by_unit = {f"donor {i + 1}": x for i, x in enumerate(each)} if task == "cells" else None
        low, high = (None, None) if width is None else (v - width, min(v + width, 1.0))
        return {"value": v, "low": low, "high": high, "folds": each, "units": by_unit}

    names = ("macro_f1", "accuracy") if task == "cells" else ("auc", "average_precision")
    rng = np.random.default_rng(0)
    extra: dict[str, Any] = {}
    if task == "cells":
        extra["confusion"] = (
            np.eye(len(TYPES), dtype=int) * 90 + rng.integers(0, 6, (len(TYPES),) * 2)
        ).tolist()
    resampled = None if width is None else "donor" if task == "cells" else "genes"
    score = {
        "benchmark": benchmark, "task": task, "dataset": "atlas", "method": method, "kind": kind,
        "label": "cell_type" if task == "cells" else "label",
        "classes": TYPES if task == "cells" else ["insensitive", "sensitive"],
        "split": {
            "kind": "held-out" if task == "cells" else "stratified", "unit": "donor" if task == "cells" else None,
            "seed": 0, "folds": units, "names": [f"donor {i + 1}" for i in range(units)],
            "units": [[f"donor {i + 1}"] for i in range(units)] if task == "cells" else None,
            "excluded": {"failed QC": 12, "no label": 0},
        },
        "n": 288,
        "interval": {"method": "percentile bootstrap", "level": 0.95, "resamples": 2000, "resampled": resampled,
                     "note": None if width else "3 units (donor) are too few for an interval: see the value of each"},
        "metrics": {names[0]: metric(value), names[1]: metric(value + (1 - value) / 3)},
        "chance": {names[0]: chance},
        "published": {names[0]: [{"value": 0.9, "source": "A paper <2023>"}]},
        "notes": ["a caveat for all", *notes],
        **extra, **made("evaluate"),
    }  # fmt: skip
    path = folder / benchmark / f"{method}.json"
    write_score(score, path)
    if task == "genes":
        label = rng.choice(["insensitive", "sensitive"], 200)
        probability = np.clip(0.5 + (label == "sensitive") * (value - 0.5) + rng.normal(0, 0.2, 200), 0, 1)
        fold = [f"fold {i % units + 1}" for i in range(200)]
        table = pa.table({"fold": fold, "label": label.tolist(), "probability": probability})
        write_table(table, path.with_name(f"{method}.predictions.parquet"))
    return path


def make_runtime(folder: Path) -> Path:
    seconds = {
        "simulate": 4.2, "atlas/ingest": 3.1, "atlas/qc_metrics/0001-of-0002": 1.5,
        "atlas/qc_metrics/0002-of-0002": 1.4,
        "atlas/qc": 2.9, "corpora/atlas/medians": 1.2, "vocabularies/v": 1.1, "atlas/genes.v": 1.0,
        "atlas/tokens/v/0001-of-0002": 2.2, "atlas/tokens/v/0002-of-0002": 2.1, "models/small/pretrain": 75.0,
        "models/small/randomize": 3.0, "atlas/embeddings/small/0001-of-0001": 18.0, "atlas/embeddings/small": 3.4,
        "atlas/embeddings/small.map": 22.0, "atlas/gene_embeddings/small/0001-of-0001": 17.0,
        "benchmarks/cell_types/split": 2.0, "benchmarks/cell_types/small": 6.5, "benchmarks/cell_types/pca_hvg": 8.0,
        "summarize": 1.0, "gone/ingest": 99.0, "report": 50.0,
    }  # fmt: skip
    header = "s\th:m:s\tmax_rss\tmax_vms\tmax_uss\tmax_pss\tio_in\tio_out\tmean_load\tcpu_time\n"
    for name, value in seconds.items():
        rss = "-" if name == "simulate" else f"{150 + 20 * value:.2f}"
        write_text(
            f"{header}{value}\t0:00:01\t{rss}\t1\t1\t1\t0\t0\t99\t{value * 1.5}\n", folder / f"{name}.tsv"
        )
    return folder


def make_spec(folder: Path, n: int = 300) -> ReportSpec:
    """A spec with everything in it."""
    atlas, second = (
        make_dataset(folder / "atlas", n),
        make_dataset(folder / "second", n // 3, seed=1, mito=False),
    )
    scores = [
        make_score(folder / "benchmarks", *row)
        for row in [
            ("small", "model", 0.912), ("small-random", "baseline", 0.83), ("pca_hvg", "baseline", 0.95),
            ("log_counts", "baseline", 0.94), ("permuted", "control", 0.105),
        ]
    ]  # fmt: skip
    scores += [
        make_score(
            folder / "benchmarks", *row, task="genes", width=0.06, units=5, benchmark="dosage_sensitivity", chance=0.5
        )
        for row in [
            ("small", "model", 0.78), ("small-random", "baseline", 0.55), ("mean_expression", "baseline", 0.52),
            ("detection_rate", "baseline", 0.5), ("coexpression_pca", "baseline", 0.74), ("permuted", "control", 0.48),
            ("oracle", "oracle", 0.97),
        ]
    ]  # fmt: skip
    scores += [
        make_score(folder / "benchmarks", *row, width=None, units=3, benchmark="few_donors")
        for row in [("small", "model", 0.92), ("pca_hvg", "baseline", 0.88)]
    ]
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
        scores=scores,
        runtime=make_runtime(folder / "runtime"),
        config="seed: 0\nnote: </code><script>alert(2)</script>\n",
    )  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReportSpec:
    return make_spec(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def page(spec: ReportSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report(spec, output)
    return output


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


def test_every_section_is_there(page: Path) -> None:
    expected = ["summary", "data", "genes", "tokens", "models", "maps", "scores", "cost", "versions"]
    assert sections_of(page) == expected


def test_the_summary_says_what_was_found(page: Path) -> None:
    text = text_of(page)
    assert (
        "A baseline wins: PCA of variable genes, macro F1 0.950 (0.920 to 0.980). The best model, small,"
        in text
    )
    assert "has 0.912 (0.882 to 0.942). Their intervals overlap." in text
    assert (
        "The model small is best: AUC 0.780 (0.720 to 0.840). The best baseline, PCA of co-expression,"
        in text
    )
    assert "The same network with random weights: 0.550." in text
    assert re.search(r"\d+ of 400 cells from 2 datasets \(atlas and second\) passed quality control", text)
    assert (
        "694 genes of the vocabulary v were found; they hold at least 95.6 % of the counts of each dataset."
        in text
    )
    assert "Its held-out loss, 4.97 nats, is 1.13 below that of guessing by gene frequency" in text


def test_tables_hold_the_numbers_of_the_files(page: Path, spec: ReportSpec) -> None:
    text = text_of(page)
    thresholds = json.loads((spec.datasets["atlas"].folder / "qc" / "thresholds.json").read_text())
    assert f"{thresholds['n_pass']:,} of 300 cells passed" in text
    assert "within 3 standard deviations of the mean" in text
    assert "skipped: the file has no mitochondrial genes" in text
    assert "1,000 700 12 300 694 95.6 %" in text
    assert "3 128 4 512 704 90,112 4.970 6.100" in text
    assert "Published: macro F1 0.9, A paper <2023>" in text
    assert (
        "Whole units held out: no donor is in training and in test (6 folds, each of 6 held out in turn)."
        in text
    )
    assert "Left out: 12 failed QC." in text
    assert "95 % percentile bootstrap over donors" in text
    assert "3 units (donor) are too few for an interval" in text
    assert "75 of 100 cells, drawn at random" in text


def test_cost_is_summed_over_jobs(page: Path, spec: ReportSpec) -> None:
    text = text_of(page)
    assert "tokenize 2 4.3 s 6.5 s 194 MB" in text
    assert "pretrain 1 1 min 15 s 1 min 52 s 1.6 GB –" in text
    assert "simulate 1 4.2 s 6.3 s – –" in text  # memory that Snakemake had no time to measure
    assert "QC metrics 2 2.9 s 4.3 s 180 MB 103" in text  # 300 cells in 2.9 s, though in two shards
    assert "gone" not in text  # another dataset's leftovers


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    for tag, attributes in read(page).tags:
        for name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    content = page.read_text(encoding="utf-8")
    styles = "".join(re.findall(r"<style>.*?</style>", content, flags=re.DOTALL))
    assert "@import" not in content
    assert "url(" not in styles
    assert "default-src 'none'" in content


def test_text_from_the_user_is_escaped(page: Path) -> None:
    reader = read(page)
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    content = page.read_text(encoding="utf-8")
    assert "<script>alert" not in content
    assert "<b>odd" not in content
    assert html.escape(EVIL, quote=False)[:20] in content
    assert "Demo <atlas>" in text_of(page)


def test_ids_are_unique_and_references_resolve(page: Path) -> None:
    reader = read(page)
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))
    content = page.read_text(encoding="utf-8")
    references = set(re.findall(r"url\(#([^)]+)\)", content)) | set(re.findall(r'href="#([^"]+)"', content))
    assert references <= set(ids)


def test_figures_follow_the_design_of_the_page(page: Path) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(svgs) > 20
    for svg in svgs:
        assert 'role="img" aria-label="' in svg
        assert "<style" not in svg
        for colour in figures.PAGE_COLOURS:
            assert f": {colour}" not in svg
    assert "var(--ink)" in svgs[0]


def test_it_is_small_and_keeps_its_figures(page: Path) -> None:
    assert page.stat().st_size < 2_000_000
    names = sorted(p.name for p in (page.parent / "figures").iterdir())
    for stem in (
        "atlas-n_counts",
        "atlas-map-small-cell_type",
        "cell_types-scores",
        "dosage_sensitivity-roc",
        "runtime",
    ):
        assert f"{stem}.png" in names
        assert f"{stem}.svg" in names


def test_the_same_input_gives_the_same_bytes(spec: ReportSpec, tmp_path: Path) -> None:
    part = replace(spec, datasets={"second": spec.datasets["second"]}, scores=spec.scores[-2:], runtime=None)
    for name in ("a", "b"):
        write_report(part, tmp_path / name / "report.html")
    assert (tmp_path / "a" / "report.html").read_bytes() == (tmp_path / "b" / "report.html").read_bytes()
    for path in (tmp_path / "a" / "figures").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "figures" / path.name).read_bytes()


def test_pictures_stay_within_their_share(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    from cellformers import plots

    plots.umap_categories(
        rng.normal(size=(20000, 2)), [f"t{i % 9}" for i in range(20000)], tmp_path / "m", title="M"
    )
    svg = (tmp_path / "m.svg").read_text()
    large = figures.inline_svg(svg, prefix="a", text="t", picture_bytes=10**9)
    small = figures.inline_svg(svg, prefix="a", text="t", picture_bytes=30_000)
    assert len(small) < len(large) < len(svg)
    assert len(small) < 55_000


def test_a_run_without_models_and_benchmarks_has_a_report(tmp_path: Path) -> None:
    files = make_dataset(tmp_path / "mine", 60)
    write_report(ReportSpec(datasets={"mine": DatasetFiles(folder=files.folder)}), tmp_path / "report.html")
    assert sections_of(tmp_path / "report.html") == ["summary", "data", "genes", "versions"]


def test_only_a_table_of_cells_is_needed(tmp_path: Path) -> None:
    cells = pa.table({"cell_id": ["a", "b"], "n_counts": [10, 20], "n_genes": pa.array([5, 6], pa.int32())})
    write_table(cells, tmp_path / "bare" / "cells.parquet")
    write_report(
        ReportSpec(datasets={"bare": DatasetFiles(folder=tmp_path / "bare")}), tmp_path / "report.html"
    )
    assert sections_of(tmp_path / "report.html") == ["summary", "data", "versions"]


def test_a_model_from_elsewhere_has_no_loss_curve(tmp_path: Path) -> None:
    files = make_dataset(tmp_path / "mine", 60)
    model = make_model(tmp_path / "model", trained=False)
    write_report(ReportSpec(datasets={"mine": files}, models={"m": model}), tmp_path / "report.html")
    text = text_of(tmp_path / "report.html")
    assert "weights from elsewhere" in text
    assert "Unigram" in text
    assert not list((tmp_path / "figures").glob("model-*"))


def scores_of(value: float) -> dict[str, Any]:
    return {"n": 40, "accuracy": value, "macro_f1": value - 0.01, "auc": None}


def test_fine_tuned_models_show_both_sides_and_every_task(tmp_path: Path) -> None:
    files = make_dataset(tmp_path / "mine", 60)
    cells, tasks, genes = (make_model(tmp_path / name) for name in ("cells", "tasks", "genes"))
    split = {"kind": "units held out", "by": "unit", "unit": "donor <b>"}
    labels = {"name": "disease", "classes": ["a", "b"]}
    common = made("finetune") | {"steps": 12, "n_cells": 30, "split": split, "labels": [labels]}
    write_json(
        common | {"metrics": {"heldout": scores_of(0.81), "test": scores_of(0.72)}}, cells / "training.json"
    )
    both = {"disease": scores_of(0.63), "sex": scores_of(0.94)}
    two = {"labels": [labels, {"name": "sex", "classes": ["f", "m"]}], "metrics": {"test": both}}
    write_json(common | two, tasks / "training.json")
    per_gene = {"test": {"pooled": scores_of(0.55), "per_gene": scores_of(0.57)}}
    write_json(common | {"metrics": per_gene}, genes / "training.json")
    models = {"cells": cells, "tasks": tasks, "genes": genes}
    write_report(ReportSpec(datasets={"mine": files}, models=models), tmp_path / "report.html")
    text = text_of(tmp_path / "report.html")
    assert "fine-tuned in this run on 30 cells, 12 steps" in text
    for value in ("0.810", "0.720", "0.630", "0.940", "0.550", "0.570"):
        assert value in text
    assert "test, genes in cells" in text
    assert "loss of labels" in (tmp_path / "figures" / "model-cells-loss.svg").read_text().lower()
    assert "donor <b>" not in (tmp_path / "report.html").read_text()


def test_verification_is_shown_by_layer(tmp_path: Path) -> None:
    files = make_dataset(tmp_path / "mine", 60)
    rows = [
        {"layer": name, "max_abs": gap, "mean_abs": 1e-7, "relative": 1e-6, "scale": 3.2, "passed": gap is not None}
        for name, gap in (("embedding", 2.5e-7), ("1", 3.5e-6), ("logits", None))
    ]  # fmt: skip
    backends = {"sdpa": {"dtype": "float32", "layers": rows, "passed": False}}
    write_json(
        {"transformers": "5.0", "n_cells": 8, "n_tokens": 900, "backends": backends, "passed": False},
        tmp_path / "m.verify.json",
    )
    spec = ReportSpec(
        datasets={"mine": files},
        models={"m": make_model(tmp_path / "model", trained=False)},
        verified={"m": tmp_path / "m.verify.json"},
    )
    write_report(spec, tmp_path / "report.html")
    text = text_of(tmp_path / "report.html")
    assert "not passed" in text
    assert "largest difference 3.5e-06" in text
    assert "2.5e-07" in text


def test_a_wrong_column_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    files = make_dataset(tmp_path / "mine", 60)
    spec = ReportSpec(datasets={"mine": DatasetFiles(folder=files.folder, label="cell_typ")})
    with pytest.raises(UserError, match="has no column 'cell_typ'; did you mean 'cell_type'"):
        write_report(spec, tmp_path / "out" / "report.html")
    assert not (tmp_path / "out" / "report.html").exists()
    assert not (tmp_path / "out" / "figures").exists()


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    spec = ReportSpec(datasets={"mine": DatasetFiles(folder=tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"nowhere/cells.parquet: no such file"):
        write_report(spec, tmp_path / "report.html")


def scored(
    method: str, kind: str, value: float, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    entry = {"value": value, "low": low, "high": high, "folds": [value]}
    return {"method": method, "kind": kind, "metrics": {"auc": entry}, "chance": {"auc": 0.5}}


def test_verdicts() -> None:
    model, base = scored("m", "model", 0.8), scored("mean_expression", "baseline", 0.7)
    assert benchmarks.verdict([model, base], "auc") == {
        "tone": "model",
        "text": "The model m is best: AUC 0.800. The best baseline, mean expression, has 0.700.",
    }
    assert benchmarks.verdict([scored("m", "model", 0.7004), base], "auc")["tone"] == "tie"
    lost = benchmarks.verdict([scored("m", "model", 0.6), base], "auc")
    assert lost["tone"] == "baseline"
    assert lost["text"] == "A baseline wins: mean expression, AUC 0.700. The best model, m, has 0.600."
    assert "no model to compare" in benchmarks.verdict([base], "auc")["text"]
    assert "No model" in benchmarks.verdict([scored("permuted", "control", 0.5)], "auc")["text"]
    leak = benchmarks.verdict([model, base, scored("permuted", "control", 0.7, 0.6, 0.8)], "auc")
    assert "points to a leak" in leak["text"]
    fine = benchmarks.verdict([model, base, scored("permuted", "control", 0.5, 0.4, 0.6)], "auc")
    assert "leak" not in fine["text"]


def test_words() -> None:
    assert words.share(0.9999) == "99.9 %"
    assert words.share(1.0) == "100.0 %"
    assert words.share(0.00001) == "< 0.1 %"
    assert words.share(0.0) == "0.0 %"
    assert words.listing(["a"]) == "a"
    assert words.listing(["a", "b", "c"]) == "a, b and c"
    assert words.listing(list("abcdef"), 4) == "a, b, c, d and 2 more"
    assert words.title("cell_types") == "Cell types"
    assert words.method("small-random", "baseline") == "small, random weights"
    assert words.method("my-random", "model") == "my-random"
    assert words.megabytes(1430) == "1.4 GB"
    assert words.number(None) == "–"


@pytest.fixture(scope="module")
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    pytest.skip("no chromium here")


def visit(browser: str, page: Path, profile: Path) -> subprocess.CompletedProcess[str]:
    arguments = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}", "--window-size=1300,900",
        "--enable-logging=stderr", "--v=0", "--virtual-time-budget=2000", "--dump-dom", page.resolve().as_uri(),
    ]  # fmt: skip
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)


def test_a_browser_has_nothing_to_complain_about(page: Path, browser: str, tmp_path: Path) -> None:
    shown = visit(browser, page, tmp_path / "profile")
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    assert 'aria-current="true"' in shown.stdout  # the script has run


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_is_as_wide_as_the_screen(page: Path, browser: str, width: int, tmp_path: Path) -> None:
    """On a phone, too: in a frame of that width, which tells the title of the page around it how wide it came out."""
    content = re.sub(r"<meta http-equiv=.Content-Security-Policy[^>]*>", "", page.read_text(encoding="utf-8"))
    probe = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script>"
    (tmp_path / "framed.html").write_text(content.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    listen = "<script>addEventListener('message', (e) => { document.title = `WIDTH ${e.data}`; })</script>"
    frame = f"{listen}<iframe src='framed.html' style='width:{width}px;height:900px;border:0'></iframe>"
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title>none</title>{frame}", encoding="utf-8")
    shown = visit(browser, tmp_path / "frame.html", tmp_path / "profile").stdout
    found = re.search(r"<title>WIDTH (\d+)</title>", shown)
    assert found is not None
    assert int(found[1]) <= width


def test_a_run_describes_itself(tmp_path: Path) -> None:
    """`from_config` finds what a results folder has, in the workflow's layout."""
    values = {
        "datasets": {"atlas": {"simulated": "atlas", "shards": 2, "label": "cell_type", "batch": "donor"}},
        "corpora": {"c": {"datasets": ["atlas"]}},
        "vocabularies": {"v": {"corpus": "c"}, "unused": {"corpus": "c"}},
        "models": {
            "small": {"vocabulary": "v", "pretrain": {}},
            "later": {"vocabulary": "v", "pretrain": {}},
        },
        "embeddings": {"small": {"model": "small"}, "later": {"model": "later"}},
        "benchmarks": {
            "cell_types": {"task": "cells", "train": ["atlas"], "label": "cell_type", "unit": "donor"}
        },
    }
    files = make_dataset(tmp_path / "atlas", 60)
    for number, path in enumerate(files.tokens["v"], start=1):
        path.rename(path.with_name(f"{number:04d}-of-0002.parquet"))
    make_model(tmp_path / "models" / "small")
    make_map(tmp_path / "atlas", 60)
    score = make_score(tmp_path / "benchmarks", "small", "model", 0.9)
    write_json({}, score.with_name("split.json"))
    spec = from_config(load_config(values), tmp_path)
    assert list(spec.datasets["atlas"].tokens) == ["v"]
    assert [path.name for path in spec.datasets["atlas"].tokens["v"]] == [
        "0001-of-0002.parquet",
        "0002-of-0002.parquet",
    ]
    assert list(spec.models) == ["small"]
    assert [(m.dataset, m.embedding) for m in spec.maps] == [("atlas", "small")]
    assert spec.scores == [score]
    assert "cell_type" in spec.config
    write_report(spec, tmp_path / "report.html")
    assert sections_of(tmp_path / "report.html") == [
        "summary", "data", "genes", "tokens", "models", "maps", "scores", "versions",
    ]  # fmt: skip


def test_figures_of_others_are_not_replaced(spec: ReportSpec, tmp_path: Path) -> None:
    figures = tmp_path / "figures"
    figures.mkdir()
    (figures / "figure1.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"figures: is a folder with other things in it \(figure1.png\)"):
        write_report(spec, tmp_path / "report.html")
    assert [path.name for path in tmp_path.rglob("*")] == ["figures", "figure1.png"]
    (figures / "figure1.png").unlink()
    for _ in range(2):
        write_report(spec, tmp_path / "report.html")
