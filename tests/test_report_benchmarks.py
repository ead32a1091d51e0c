"""Pages of benchmarks: what they say, their tables and files, and how they look and behave in a browser."""

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import browser
import numpy as np
import pytest
from report_files import DOSAGE, make_dataset, make_large_spec, make_score, make_spec, read, text_of

from cellformers.errors import UserError
from cellformers.evaluate.scores import read_score
from cellformers.report import DatasetFiles, ReportSpec, curves, verdicts, words, write_report

PLACES = {"cell_types": 1, "disease": 2, "dosage_sensitivity": 3, "few_donors": 4, "patients": 5}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    write_report(make_spec(folder), folder / "report.html")
    return folder / "report.html"


def part(page: Path, name: str) -> str:
    """The HTML of one benchmark's page, without figures."""
    content = page.read_text(encoding="utf-8")
    start = content.index(f'<section class="page" id="benchmark-{PLACES[name]}"')
    return re.sub(r"<svg.*?</svg>", "", content[start : content.index("</section>", start)], flags=re.DOTALL)


def said(page: Path, name: str) -> str:
    """The text of one benchmark's page."""
    return " ".join(
        re.sub(r"<[^>]*>", " ", part(page, name)).replace("&lt;", "<").replace("&gt;", ">").split()
    )


def drawn(page: Path, figure: str) -> str:
    """The text in a figure."""
    svg = (page.parent / "figures" / f"{figure}.svg").read_text(encoding="utf-8")
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_the_summary_has_a_line_for_each_benchmark(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    table = content[content.index('id="benchmarks"') : content.index('<dl class="said">')]
    rows = [" ".join(re.sub(r"<[^>]*>", " ", row).split()) for row in table.split("<tr>")[2:]]
    assert [row.split("What")[0].split("Is a")[0].split("Do cells")[0].strip() for row in rows] == [
        "Cell types", "Disease", "Dosage sensitivity", "Few donors", "Patients",
    ]  # fmt: skip
    assert "small, fine-tuned 0.840 to 0.900" in rows[1]
    assert "0.864 ± 0.01 0.9 accuracy, here 0.913" in rows[1]
    assert rows[1].endswith("model ahead")
    assert "0.91 ± 0.02 AUC over tokens, here 0.880 0.89 AUC over tokens" in rows[2]
    assert "none: new evaluation" in rows[3]
    assert "model ahead, no intervals" in rows[3]
    assert "Harmony" in rows[4]
    assert "a baseline wins" in rows[4]
    for kind in ("model", "baseline", "control", "oracle"):
        assert words.KINDS[kind] in rows[4]
    assert all(f'href="#benchmark-{n}"' in table for n in PLACES.values())


def test_a_page_states_protocol_origin_and_novelty(page: Path) -> None:
    disease, few = said(page, "disease"), said(page, "few_donors")
    assert "Is a cell of a failing heart?" in disease
    assert "Protocol: donors of the publication <b>held</b> out" in disease
    assert "atlas small no pretrained here" in disease
    assert "atlas large unknown a list <i>not</i> published" in disease
    assert "second small yes –" in disease
    assert "Cite: Someone et al. 2022" in disease
    assert "<b>held" not in part(page, "disease")
    assert "new evaluation" not in disease
    assert "new evaluation, no published value" in few
    assert "Origin of the cells" not in few
    assert "What is the cell type of a cell (one of 9), if no cell of its donor was in training?" in few


def test_published_numbers_stand_beside_their_own_metric(page: Path) -> None:
    text = said(page, "dosage_sensitivity")
    assert (
        "AUC over tokens 0.91 ± 0.02 0.880 small, fine-tuned, 0.820 to 0.940 the paper pooled tokens" in text
    )
    assert "AUC over tokens 0.89 0.880 small, fine-tuned, 0.820 to 0.940 its seeds <2024> –" in text
    assert "Average precision" in text
    assert "published" not in drawn(page, "dosage_sensitivity-scores")  # none is of the AUC per gene
    tokens = drawn(page, "dosage_sensitivity-auc_tokens")
    assert "published 0.91 ± 0.02" in tokens
    assert "published 0.89" in tokens
    assert "small, fine-tuned" in tokens
    assert "SVM on ranks" not in tokens
    assert "published 0.864 ± 0.01" in drawn(page, "disease-scores")
    assert "published 0.9" in drawn(page, "disease-accuracy")


def test_methods_have_words(page: Path) -> None:
    text = said(page, "dosage_sensitivity")
    for name in (
        "SVM on ranks",
        "Random forest on counts",
        "small, untrained, fine-tuned",
        "Permuted labels",
    ):
        assert name in text
    assert "Permuted batches" in said(page, "patients")
    assert "Ranks only" in said(page, "disease")
    assert words.method("a-random-finetuned", "baseline") == "a, untrained, fine-tuned"
    assert words.method("a-finetuned", "model") == "a, fine-tuned"
    assert words.method_row("a-finetuned", "model") == "a, fine-tuned"
    assert words.metric("a_new_one") == "a new one"


def test_classes_and_donors(page: Path) -> None:
    text = said(page, "disease")
    assert "NF 40 0.870 0.770 0.820 0.780 0.680 0.730" in text
    assert "HCM 41 0.870 – 0.820" in text
    assert "donor 2 HCM 91 DCM, wrong 33 %" in text
    assert "donor 1 NF 90 NF 33 %" in text
    donors = drawn(page, "disease-units")
    assert "donor 11" in donors
    assert "Ranks only" in donors
    assert "What most cells" not in said(page, "cell_types")
    assert "<details open><summary>Macro F1 by donor: values" in part(
        page, "few_donors"
    )  # there is no interval
    assert "AUC by fold" in said(page, "dosage_sensitivity")
    assert not list((page.parent / "figures").glob("dosage_sensitivity-units*"))


def test_curves_are_of_few_methods(page: Path) -> None:
    for figure in ("dosage_sensitivity-roc", "dosage_sensitivity-precision-recall", "disease-roc"):
        text = drawn(page, figure)
        for name in ("small, fine-tuned", "small, untrained, fine-tuned", "Permuted labels"):
            assert name in text
        assert "SVM" not in text
        assert "Ranks only" not in text
    assert "each class against the rest" in drawn(page, "disease-roc")
    assert "(0.84)" in drawn(
        page, "dosage_sensitivity-roc"
    )  # the AUC of the score, not another one of the curve


def test_precision_and_rates_are_those_of_the_thresholds() -> None:
    positive = np.array([True, False, True, False])
    score = np.array([0.9, 0.8, 0.7, 0.1])
    precision = curves.precision_at(positive, score)
    assert precision[0] == 1.0
    assert precision[50] == 1.0  # half of the positives are found by the first call
    assert precision[51] == pytest.approx(2 / 3)
    assert precision[100] == pytest.approx(2 / 3)
    fpr, tpr = curves.roc_points(positive, score)
    assert fpr[-1] == tpr[-1] == 1.0


def test_mixing_shows_both_sides(page: Path) -> None:
    text = said(page, "patients")
    assert "Do cells of different donors mix while cells of different cell type stay apart?" in text
    assert "2 batches: donor 1 (3,000 cells) and donor 2 (1,000 cells). Left out: 12 failed QC." in text
    assert "Bio conservation: 0.740 by the model, 0.873 by the baseline." in text
    assert "silhouette of batches" in text
    tiles = drawn(page, "patients-metrics")
    assert "iLISI" in tiles
    assert "Harmony" in tiles
    assert "Bio conservation" in drawn(page, "patients-plane")
    assert "Batch correction" in drawn(page, "patients-scores")
    assert not list((page.parent / "figures").glob("patients-roc*"))


def test_maps_are_drawn_once(page: Path) -> None:
    figures = {path.stem for path in (page.parent / "figures").glob("*-map-*.svg")}
    expected = {f"atlas-map-small-{c}" for c in ("cell_type", "donor", "disease")}
    assert figures == expected | {f"second-map-small-{c}" for c in ("cell_type", "donor")}
    labels = re.findall(r'aria-label="(Map of[^"]*)"', page.read_text(encoding="utf-8"))
    assert len(labels) == len(set(labels)) == len(figures)
    assert "Coloured by donor : on the page of Cell types" in said(page, "disease")


def test_every_number_is_in_a_table(page: Path) -> None:
    with open(page.parent / "tables" / "dosage_sensitivity.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    score = read_score(page.parent / "benchmarks" / "dosage_sensitivity" / "small-finetuned.json")
    own = [row for row in rows if row["method"] == "small-finetuned"]
    for name, entry in score["metrics"].items():
        whole = [row for row in own if row["metric"] == name and row["of"] == "all"]
        assert [float(row["value"]) for row in whole] == [pytest.approx(entry["value"], abs=1e-5)]
        assert float(whole[0]["low"]) == pytest.approx(entry["low"], abs=1e-5)
        folds = [float(row["value"]) for row in own if row["metric"] == name and row["of"] == "fold"]
        assert folds == pytest.approx(entry["folds"], abs=1e-5)
    published = [(row["value"], row["sd"]) for row in rows if row["of"] == "published"]
    assert published == [("0.91", "0.02"), ("0.89", "")]
    assert {row["source"] for row in rows if row["of"] == "published"} == {
        p["source"] for p in DOSAGE["auc_tokens"]
    }
    with open(page.parent / "tables" / "disease.tsv", encoding="utf-8", newline="") as file:
        units = [row for row in csv.DictReader(file, delimiter="\t") if row["of"] == "unit"]
    assert len({row["name"] for row in units}) == 11


def test_links_lead_to_files(page: Path) -> None:
    links = [a["href"] or "" for tag, a in read(page).tags if tag == "a"]
    files = [unquote(link) for link in links if not link.startswith("#")]
    assert "tables/disease.tsv" in files
    assert "benchmarks/disease/small-finetuned.json" in files
    assert "benchmarks/disease/small-finetuned.predictions.parquet" in files
    assert "figures/disease-units.svg" in files
    assert all((page.parent / name).is_file() for name in files)


def test_files_that_stay_behind_are_not_linked(tmp_path: Path) -> None:
    files = make_dataset(tmp_path / "mine", 60)
    score = make_score(
        tmp_path / "benchmarks", "small", "model", 0.9, units=2, classes=["a", "b"], published={}
    )
    spec = ReportSpec(datasets={"mine": DatasetFiles(folder=files.folder)}, scores=[score])
    write_report(spec, tmp_path / "page" / "report.html")
    text = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "score (small.json)" in text
    assert "no baseline to compare with" in text_of(tmp_path / "page" / "report.html")


def test_tables_of_others_are_not_replaced(tmp_path: Path) -> None:
    files = make_dataset(tmp_path / "mine", 60)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"tables: is a folder with other things in it \(notes.txt\)"):
        write_report(ReportSpec(datasets={"mine": files}), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_fifteen_large_benchmarks_stay_under_ten_megabytes(tmp_path: Path) -> None:
    """Each as large as they come (fifteen methods, seventy classes, eleven donors), on six datasets with three maps."""
    sizes = []
    for benchmarks in (0, 1):
        folder = tmp_path / str(benchmarks)
        write_report(make_large_spec(folder, benchmarks), folder / "report.html")
        sizes.append((folder / "report.html").stat().st_size)
    assert 6 * sizes[0] + 15 * (sizes[1] - sizes[0]) < 10_000_000


def scored(
    method: str, kind: str, value: float, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    entry = {"value": value, "low": low, "high": high, "folds": [value]}
    return {"method": method, "kind": kind, "metrics": {"auc": entry}, "chance": {"auc": 0.5}}


def test_verdicts() -> None:
    model, base = scored("m", "model", 0.8), scored("mean_expression", "baseline", 0.7)
    assert verdicts.verdict([model, base], "auc") == {
        "tone": "model",
        "short": "model ahead, no intervals",
        "text": "The model m is best: AUC 0.800. The best baseline, mean expression, has 0.700.",
    }
    assert verdicts.verdict([scored("m", "model", 0.7004), base], "auc")["tone"] == "tie"
    lost = verdicts.verdict([scored("m", "model", 0.6), base], "auc")
    assert lost["tone"] == "baseline"
    assert lost["text"] == "A baseline wins: mean expression, AUC 0.700. The best model, m, has 0.600."
    close = [scored("m", "model", 0.6, 0.5, 0.72), scored("detection", "baseline", 0.7, 0.6, 0.8)]
    assert verdicts.verdict(close, "auc")["short"] == "a baseline wins, intervals overlap"
    apart = [scored("m", "model", 0.9, 0.85, 0.95), scored("detection", "baseline", 0.7, 0.6, 0.8)]
    assert verdicts.verdict(apart, "auc")["short"] == "model ahead"
    assert "no model to compare" in verdicts.verdict([base], "auc")["text"]
    assert "No model" in verdicts.verdict([scored("permuted", "control", 0.5)], "auc")["text"]
    leak = verdicts.verdict([model, base, scored("permuted", "control", 0.7, 0.6, 0.8)], "auc")
    assert "points to a leak" in leak["text"]
    assert "leak" in leak["short"]
    fine = verdicts.verdict([model, base, scored("permuted", "control", 0.5, 0.4, 0.6)], "auc")
    assert "leak" not in fine["text"]


SHOWN = "[...document.querySelectorAll('main > section')].filter((s) => s.offsetHeight > 0).map((s) => s.id)"


def test_a_browser_has_nothing_to_complain_about(page: Path) -> None:
    """Every page, on a desk and on a phone: no error, no page wider than the screen, one benchmark at a time."""

    def visit(tab: browser.Page) -> dict[str, Any]:
        found: dict[str, Any] = {"complaints": [], "shown": {}, "wide": []}
        for width in (1200, 390):
            tab.open(f"{page.as_uri()}?{width}", width=width)
            for place in ["summary", *(f"benchmark-{n}" for n in PLACES.values()), "cost"]:
                tab.run(f"location.hash = '{place}'")
                tab.settle()
                found["shown"][place] = tab.run(SHOWN)
                if tab.run("document.documentElement.scrollWidth") > width:
                    found["wide"].append((place, width))
            found["marked"] = tab.run("document.querySelectorAll('nav [aria-current]').length")
            found["complaints"] += tab.complaints()
        return found

    found = browser.with_browser(visit)
    assert found["complaints"] == []
    assert found["wide"] == []
    assert found["marked"] == 1  # the script has run
    for number in PLACES.values():
        assert found["shown"][f"benchmark-{number}"] == [f"benchmark-{number}"]
    assert "versions" in found["shown"]["summary"]
    assert "benchmark-1" not in found["shown"]["cost"]


def test_without_scripts_everything_is_there(page: Path) -> None:
    def visit(tab: browser.Page) -> list[str]:
        tab.open(page.as_uri(), scripts=False)
        return list(tab.run(SHOWN))

    assert browser.with_browser(visit) == [a["id"] for tag, a in read(page).tags if tag == "section"]


def test_a_page_that_fails_is_reported_at_once(tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!DOCTYPE html><title>x</title><script>missing()</script><p style='width:2000px'>wide")
    complaints, values = browser.complaints(
        broken.as_uri(), ["document.documentElement.scrollWidth"], width=390
    )
    assert any("missing is not defined" in text for text in complaints)
    assert values[0] > 390
    refused = tmp_path / "refused.html"
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
    refused.write_text(f"<!DOCTYPE html><title>x</title>{policy}<script>1</script>")
    complaints, _ = browser.complaints(refused.as_uri())
    assert any("Content Security Policy" in text for text in complaints)


def test_a_browser_that_hangs_is_stopped_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two starts answer nothing, and leave a child behind that would outlive them; the third is a browser."""
    program = browser.find()
    count, children = tmp_path / "count", tmp_path / "children"
    script = tmp_path / "sometimes"
    script.write_text(
        f'#!/bin/sh\necho x >> "{count}"\n'
        f'if [ $(wc -l < "{count}") -lt 3 ]; then sleep 300 & echo $! >> "{children}"; wait; fi\n'
        f'exec "{program}" "$@"\n'
    )
    script.chmod(0o755)
    start = browser.PATIENCE
    monkeypatch.setattr(browser, "patience", lambda attempt: 2.0 if attempt < 2 else start)
    assert browser.with_browser(lambda tab: tab.run("6 * 7"), program=str(script)) == 42
    for child in children.read_text().split():
        state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout
        assert state.strip() in ("", "Z")
    monkeypatch.setattr(browser, "patience", lambda attempt: 0.5)
    with pytest.raises(pytest.fail.Exception, match="2 browsers in turn gave no answer"):
        browser.with_browser(lambda tab: 0, program=sys.executable, attempts=2)
