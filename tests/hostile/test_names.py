"""Names of cells, types, donors, genes, datasets, methods and files that are written to harm, wherever they are shown.

A name comes from a file of somebody else, and ends in a page, a figure, a table, a file name, a terminal.
"""

import csv
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import report_files
from report_files import make_map, make_model, make_runtime, make_score, make_spec, read, text_of

from cellformers.errors import LONGEST, UserError, one_line
from cellformers.evaluate.scores import summarise
from cellformers.io.files import read_table, write_json, write_table
from cellformers.progress import say
from cellformers.qc import qc
from cellformers.report import DatasetFiles, MapFile, ReportSpec, write_report
from cellformers.report.figures import file_stem

RUN = "document.title='pwned'"
NAMES = [
    f"<script>{RUN}</script>",
    f'"><img src=x onerror="{RUN}">',
    f"</title></style></svg></script><script>{RUN}</script>",
    f"javascript:{RUN}",
    "<a href='javascript:alert(1)'>x</a><iframe src='//evil.example'>",
    "<link rel=stylesheet href='https://evil.example/x.css'><base href='https://evil.example/'>",
    "--> ]]> <![CDATA[ <!-- &lt;b&gt; &amp;amp; &#60;i&#62;",
    "{{ 7 * 7 }} {% include 'x' %} {# x #}",
    "a\nb\tc\r\u2028d\u2029e\x85f",
    '=HYPERLINK("http://evil.example")',
    "+1-1@SUM(A1) | calc",
    "../../../etc/passwd",
    "/etc/passwd\\x",
    "$\\notacommand{x}$ and $5 \\frac{",
    "\x1b[2J\x07\x00\x08\u202egnp.exe",
    "naïve Ⅷ T — 細胞 🧬 e\u0301",
    'id="f0-x" href="#a" url(#b) style="x"',
    "x" * 3000,
]  # fmt: skip
FORMULA = re.compile(r"^[=+\-@]")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReportSpec:
    """Everything a report shows, under these names."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_files, "TYPES", NAMES)
        patch.setitem(report_files.CLASSES, "cells", NAMES)
        patch.setattr(report_files, "DISEASES", NAMES[:3])
        whole = make_spec(folder, names=["cell_types", "disease"])
    options = {
        "units": 3,
        "classes": NAMES[:4],
        "label": NAMES[1],
        "dataset": NAMES[3],
        "notes": tuple(NAMES),
    }
    published = {"macro_f1": [{"value": 0.9, "sd": 0.1, "source": name, "protocol": name} for name in NAMES]}
    more = [
        make_score(folder / "more", f"m{number}", "model", 0.5, published=published, benchmark="b", **options)
        for number in range(2)
    ]
    for number, path in enumerate(more):  # names that can't be names of files
        content = json.loads(path.read_text())
        content |= {"benchmark": NAMES[11], "method": NAMES[number]}
        content["split"] |= {"names": NAMES[:3], "unit": NAMES[2]}
        for entry in content["metrics"].values():
            entry["units"] = dict(zip(NAMES, [0.5] * 3, strict=False))
        write_json(content, path)
    statement = {
        "question": NAMES[0], "protocol": NAMES[1], "new": True, "citation": NAMES,
        "pretraining": [{"dataset": n, "model": n, "contains": "unknown", "source": n} for n in NAMES],
    }  # fmt: skip
    atlas = whole.datasets["atlas"]
    genes = json.loads((atlas.folder / "qc" / "genes.v.json").read_text())
    genes["examples"] = dict.fromkeys(genes["examples"], NAMES)
    write_json(genes, atlas.folder / "qc" / "genes.v.json")
    return replace(
        whole,
        title=NAMES[0],
        datasets={NAMES[1]: replace(atlas, tokens={NAMES[5]: atlas.tokens["v"]}), **whole.datasets},
        models={NAMES[2]: make_model(folder / "models" / "odd"), **whole.models},
        maps=[*whole.maps, MapFile(dataset="atlas", embedding=NAMES[4], path=make_map(folder / "atlas"))],
        scores=[*whole.scores, *more],
        statements={NAMES[11]: statement},
        runtime=make_runtime(folder / "runtime"),
        config="\n".join(NAMES),
    )


@pytest.fixture(scope="module")
def page(spec: ReportSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page") / "report.html"
    write_report(spec, output)
    return output


def test_nothing_of_a_name_becomes_part_of_the_page(page: Path) -> None:
    """Tags, attributes and addresses are those of the templates and of matplotlib."""
    found = read(page)
    tags = {tag for tag, _ in found.tags}
    assert tags <= {
        "a", "article", "b", "body", "br", "button", "circle", "clippath", "code", "col", "dd", "defs", "details",
        "dialog", "div", "dl", "dt", "ellipse", "figcaption", "figure", "footer", "g", "h1", "h2", "h3", "h4", "head",
        "header", "html", "i", "image", "img", "li", "line", "link", "main", "meta", "nav", "ol", "p", "path", "pre",
        "rect", "script", "section", "small", "span", "strong", "style", "summary", "svg", "table", "tbody", "td",
        "text", "th", "thead", "title", "tr", "tspan", "ul", "use", "em", "polyline", "polygon", "sup", "sub",
        "caption",
    }  # fmt: skip
    assert sum(tag == "script" for tag, _ in found.tags) == 1
    assert sum(tag == "link" for tag, _ in found.tags) == 1
    for tag, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset", "data", "formaction"):
            value = attributes.get(name)
            plain = value is None or value.startswith(
                ("#", "data:image/png;base64,", "data:,", "figures/", "tables/")
            )
            assert plain, (tag, name, value)
            assert value is None or ".." not in value.split("/")
    content = page.read_text(encoding="utf-8")
    assert "evil.example/x.css'>" not in content
    assert not set(content) & {"\x00", "\x07", "\x08", "\x1b", "\u202e"}


def test_names_are_shown_as_they_are(page: Path) -> None:
    text = text_of(page)
    for name in (NAMES[0], NAMES[1], NAMES[6], NAMES[7], NAMES[15]):
        assert " ".join(name.split()) in text, name


def test_the_page_forbids_what_it_has_no_need_of(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', content)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]+'", rules["script-src"])
    assert rules["img-src"] == "data:"
    assert "'unsafe-inline'" not in rules["script-src"]


def test_files_beside_the_page_have_plain_names(page: Path) -> None:
    made = [path for path in page.parent.rglob("*") if path.is_file()]
    assert len(made) > 10
    for path in made:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,150}", path.name), path.name
    assert {path.name for path in page.parent.iterdir()} == {"report.html", "figures", "tables"}


def test_figures_hold_no_markup_of_a_name(page: Path) -> None:
    for path in (page.parent / "figures").glob("*.svg"):
        content = path.read_text(encoding="utf-8")
        ElementTree.parse(path)  # whole, as XML
        assert "<script" not in content.lower(), path.name
        assert "<img" not in content
        assert "onerror=" not in re.sub(r">[^<]*<", "><", content)
        assert not re.search(r'href="(?!#|data:image/png;base64,)', content), path.name


def test_tables_keep_their_rows_and_hold_no_formulas(page: Path) -> None:
    """A spreadsheet runs what begins with =, +, - or @."""
    tables = list((page.parent / "tables").glob("*.tsv"))
    assert tables
    for path in tables:
        lines = path.read_text(encoding="utf-8").split("\n")
        assert lines[-1] == ""
        for line in lines[:-1]:
            fields = line.split("\t")
            assert len(fields) == len(lines[0].split("\t")), path.name
            for field in fields:
                assert not FORMULA.match(field) or re.fullmatch(r"[+-]?[0-9.e+-]+", field), field
                assert field.isprintable(), field


def test_the_table_of_scores_holds_no_formulas(spec: ReportSpec, tmp_path: Path) -> None:
    content = json.loads(spec.scores[-1].read_text())
    for number, name in enumerate(NAMES[9:11]):
        write_json(content | {"method": name, "benchmark": name, "label": name}, tmp_path / f"{number}.json")
    summarise(sorted(tmp_path.glob("*.json")), tmp_path / "benchmarks.tsv")
    with (tmp_path / "benchmarks.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert len({len(row) for row in rows}) == 1
    assert not [field for row in rows[1:] for field in row if FORMULA.match(field)]


@pytest.mark.parametrize("name", NAMES)
def test_file_names_made_of_any_text_are_plain(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_+][A-Za-z0-9_.+-]{0,99}", file_stem(name))


@pytest.mark.parametrize("name", NAMES)
def test_messages_are_one_line_that_moves_no_cursor(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(UserError(f"cell {name} is there twice", path=f"/data/{name}.h5ad", fix=f"rename {name}"))
    assert text.isprintable()
    assert len(text) <= LONGEST * 6
    say(f"{name}: passed over")
    assert capsys.readouterr().err.rstrip("\n").isprintable()


def test_what_is_left_out_of_a_message_is_shown() -> None:
    assert one_line("a\x1b[2Jb\u202ec\nd\u2028e") == "a\\x1b[2Jb\\u202ec d e"
    assert one_line("naïve 細胞 🧬") == "naïve 細胞 🧬"
    assert len(one_line("x" * 10**6)) < 2 * LONGEST


def test_a_hostile_name_of_a_file_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb$(touch pwned)`touch pwned`;touch pwned.h5ad"
    path.write_bytes(b"nothing")
    done = subprocess.run(
        [sys.executable, "-m", "cellformers.cli", "tokenize", str(path), "--vocabulary", "v", "-o", "x.parquet"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.rstrip("\n").isprintable()
    assert not (tmp_path / "pwned").exists()


def test_names_pass_through_qc_unchanged(tmp_path: Path) -> None:
    """They are data: every byte of them is kept in tables, whatever they look like."""
    ids = [f"{name}{i}" for i, name in enumerate(NAMES)]
    n = len(ids)
    metrics = {"cell_id": ids, "n_counts": [1000] * n, "n_genes": pa.array([500] * n, pa.int32())}
    write_table(
        pa.table(metrics | {"mito_fraction": [0.1] * n}), tmp_path / "m.parquet",
        report_files.made("qc"),
    )  # fmt: skip
    write_table(
        pa.table({"cell_id": ids, NAMES[0]: NAMES}), tmp_path / "d.parquet", report_files.made("ingest")
    )
    qc(
        [tmp_path / "m.parquet"], tmp_path / "d.parquet", output=tmp_path / "cells.parquet",
        thresholds=tmp_path / "thresholds.json",
    )  # fmt: skip
    found = read_table(tmp_path / "cells.parquet")
    assert found["cell_id"].to_pylist() == ids
    assert found[NAMES[0]].to_pylist() == NAMES
    assert DatasetFiles(folder=tmp_path).folder == tmp_path
