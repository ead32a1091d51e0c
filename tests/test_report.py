"""The report: sections there and absent, words, escaping, size, no loads."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from report_files import (
    EVIL,
    made,
    make_dataset,
    make_map,
    make_model,
    make_score,
    make_spec,
    read,
    sections_of,
    text_of,
)

from cellformers.config import load as load_config
from cellformers.errors import UserError
from cellformers.io.files import write_json, write_table
from cellformers.report import DatasetFiles, ReportSpec, figures, from_config, words, write_report


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReportSpec:
    return make_spec(
        tmp_path_factory.mktemp("results"), names=["cell_types", "dosage_sensitivity", "few_donors"]
    )


@pytest.fixture(scope="module")
def page(spec: ReportSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report(spec, output)
    return output


def test_every_section_is_there(page: Path) -> None:
    pages = ["benchmark-1", "benchmark-2", "benchmark-3"]
    expected = ["summary", "data", "genes", "tokens", "models", "maps", *pages, "cost", "versions"]
    assert sections_of(page) == expected


def test_the_summary_says_what_was_found(page: Path) -> None:
    text = text_of(page)
    assert (
        "A baseline wins: PCA of highly variable genes, macro F1 0.950 (0.920 to 0.980). The best model, small,"
        in text
    )
    assert "has 0.912 (0.882 to 0.942). Their intervals overlap." in text
    assert (
        "The model small, fine-tuned is best: AUC 0.840 (0.780 to 0.900). The best baseline, PCA of" in text
    )
    assert "The same network with random weights: 0.660." in text
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
    assert "Macro F1 0.9 0.912 small, 0.882 to 0.942 A paper <2023> –" in text
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
    assert "download deposit 1 12 s" in text
    assert "gene labels 1 1.3 s" in text
    assert "fine-tune folds 2 1 min 1 s" in text
    assert "gone" not in text  # another dataset's leftovers


def test_nothing_is_loaded_from_anywhere(page: Path) -> None:
    for tag, attributes in read(page).tags:
        for name in ("src", "href", "xlink:href", "data", "srcset", "action"):
            value = attributes.get(name)
            if tag == "a" and value is not None and not value.startswith("#"):  # a file beside the page
                assert not re.match(r"[a-z]+:|/|\.\.", value), value
                value = None
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


def test_every_reason_to_leave_cells_out_is_shown(tmp_path: Path) -> None:
    cells = pa.table({"cell_id": ["a", "b"], "qc_pass": [True, False]})
    write_table(cells, tmp_path / "bare" / "cells.parquet")
    thresholds = {
        "parameters": {"where": {"cell_type": ["myocyte", "CM <2>"], "day": ["3"]}, "max_cells": 2000},
        "criteria": {
            "where": {"n_fail": 1234}, "excluded: chimpanzee <x>": {"n_fail": 77}, "max_cells": {"n_fail": 5},
            "a_new_one": {"n_fail": 3},
        },
    }  # fmt: skip
    write_json(thresholds, tmp_path / "bare" / "qc" / "thresholds.json")
    write_report(
        ReportSpec(datasets={"bare": DatasetFiles(folder=tmp_path / "bare")}), tmp_path / "report.html"
    )
    text = text_of(tmp_path / "report.html")
    assert "Only cells with cell_type myocyte or CM <2> and day 3; at most 2,000 cells" in text
    assert "Not selected by its metadata – – 1,234" in text
    assert "Excluded: chimpanzee <x> – – 77" in text
    assert "A new one – – 3" in text


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
        "summary", "data", "genes", "tokens", "models", "maps", "benchmark-1", "versions",
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
