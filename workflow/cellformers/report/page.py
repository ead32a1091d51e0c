"""The page itself: sections put together, a summary in words, the template filled in."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from cellformers import __version__
from cellformers.errors import UserError
from cellformers.io.files import atomic_dir, write_text
from cellformers.report import benchmarks, cells, models, runs, words
from cellformers.report.figures import Figures, without_controls
from cellformers.report.spec import ReportSpec


def write_report(
    spec: ReportSpec,
    output: str | Path,
    *,
    figures: str | Path | None = None,
    tables: str | Path | None = None,
) -> None:
    """Write the report, its figures and its tables.

    Parameters
    ----------
    output
        The HTML file.
    figures
        Folder that will hold every figure as NAME.png and NAME.svg, and nothing else; default: `figures` beside
        the page.
    tables
        Folder that will hold every number of a benchmark as BENCHMARK.tsv, and nothing else; default: `tables` beside
        the page.

    Raises
    ------
    UserError
        If a file that the spec names is missing or broken, or a dataset lacks its label or batch column; if the
        folder of the figures or of the tables is there and holds anything but those of a report.
    """
    output = Path(output)
    drawings = output.parent / "figures" if figures is None else Path(figures)
    numbers = output.parent / "tables" if tables is None else Path(tables)
    _check_replaceable(drawings, {".png": ".svg", ".svg": ".png"}, what="figures")
    _check_replaceable(numbers, {".tsv": ".tsv"}, what="tables")
    with atomic_dir(drawings) as folder, atomic_dir(numbers) as sheets:
        drawn = Figures(folder)
        parts = sections(spec, drawn, sheets)
        folders = {"figures": drawings, "tables": numbers}
        write_text(render(spec, parts, drawn, output=output, folders=folders), output)


def _check_replaceable(folder: Path, twins: Mapping[str, str], *, what: str) -> None:
    """UserError where a folder holds anything but files of these suffixes, each beside its twin."""
    found = sorted(path for path in folder.glob("[!.]*")) if folder.is_dir() else []
    for path in found:
        twin = twins.get(path.suffix)
        if twin is None or path.with_suffix(twin) not in found:
            raise UserError(
                f"is a folder with other things in it ({path.name})", path=folder,
                fix=f"the {what} of the report go there: choose another --output",
            )  # fmt: skip


def sections(spec: ReportSpec, figures: Figures, tables: Path) -> dict[str, Any]:
    """Content of every section by name, empty or None where there is nothing to show."""
    datasets = cells.datasets(spec, figures)
    pages, maps = benchmarks.benchmarks(spec, figures, tables)
    parts: dict[str, Any] = {
        "datasets": datasets,
        "genes": cells.genes(spec),
        "tokens": cells.tokens(spec, figures),
        "models": models.models(spec, figures),
        "classifiers": models.classifiers(spec),
        "verified": models.verified(spec),
        "maps": maps.rest(),
        "benchmarks": pages,
        "runtime": runs.runtime(spec, datasets, figures),
        "versions": runs.versions(),
    }
    return parts | {"summary": summary(parts)}


def summary(parts: dict[str, Any]) -> dict[str, Any]:
    """What a reader should know after a minute: a few numbers and a few sentences."""
    datasets = parts["datasets"]
    total, passed = sum(d["cells"] for d in datasets), sum(d["passed"] for d in datasets)
    facts = [("cells", words.count(total)), ("passed QC", words.share(passed / total if total else None))]
    names = words.listing([d["name"] for d in datasets])
    lines = [
        (
            "Cells",
            f"{words.count(passed)} of {words.count(total)} cells from "
            f"{_plural(len(datasets), 'dataset')} ({names}) passed quality control.",
        )
    ]
    vocabularies = list(dict.fromkeys(row["vocabulary"] for row in parts["genes"]))
    lines += [("Genes", _genes([r for r in parts["genes"] if r["vocabulary"] == v])) for v in vocabularies]
    if parts["genes"]:
        facts.append(("genes mapped", words.count(max(r["genes"] or 0 for r in parts["genes"]))))
    lines += [("Model", _model(model)) for model in parts["models"]]
    if parts["models"]:
        facts.append(("models" if len(parts["models"]) > 1 else "model", str(len(parts["models"]))))
    if parts["benchmarks"]:
        facts.append(
            ("benchmarks" if len(parts["benchmarks"]) > 1 else "benchmark", str(len(parts["benchmarks"])))
        )
    kinds = [
        kind for kind in words.KINDS if any(r["kind"] == kind for b in parts["benchmarks"] for r in b["rows"])
    ]
    return {"facts": facts, "lines": lines, "kinds": [(kind, words.KINDS[kind]) for kind in kinds]}


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _genes(rows: list[dict[str, Any]]) -> str:
    """How much of the datasets is in one vocabulary."""
    found = sorted(row["genes"] or 0 for row in rows)
    least = min((row["share"] for row in rows if row["share"] is not None), default=None)
    number = words.count(found[0]) if found[0] == found[-1] else f"{found[0]:,} to {found[-1]:,}"
    each = " of each dataset" if len(rows) > 1 else ""
    share = (
        ""
        if least is None
        else f"; they hold {'at least ' if each else ''}{words.share(least)} of the counts{each}"
    )
    return f"{number} genes of the vocabulary {rows[0]['vocabulary']} were found{share}."


def _model(model: dict[str, Any]) -> str:
    weights = "" if model["weights"] is None else f", {words.number(model['weights'] / 1e6)} million weights"
    text = f"{model['name']}: {_plural(model['layers'], 'layer')} of width {model['width']}{weights}"
    if not model["origin"]:
        return text + "; weights from elsewhere."
    text += f"; {model['origin']} in this run"
    if model["gain"] is not None:
        below = "below" if model["gain"] >= 0 else "above"
        text += (
            f". Its held-out loss, {model['heldout']:.2f} nats, is {abs(model['gain']):.2f} {below} that of "
            "guessing by gene frequency"
        )
    return text + "."


def render(
    spec: ReportSpec, parts: dict[str, Any], figures: Figures, *, output: Path, folders: Mapping[str, Path]
) -> str:
    """The HTML of the page; `folders`: where figures and tables will be, to link them from it."""

    def link(path: Path) -> str | None:
        """The address of a file from the page; None where it is not in a folder that is passed on with the page."""
        inside = path.absolute().is_relative_to(output.parent.absolute())
        return quote(path.absolute().relative_to(output.parent.absolute()).as_posix()) if inside else None

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cellformers", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": words.count,
        "share": words.share,
        "number": words.number,
        "power": words.power,
        "score": words.score,
        "seconds": words.seconds,
        "megabytes": words.megabytes,
        "title_case": words.title,
        "inline": figures.inline,
        "link": link,
        "table_link": lambda name: link(folders["tables"] / name),
        "figure_link": lambda figure, suffix: link(folders["figures"] / f"{figure.name}.{suffix}"),
    }
    script = _asset("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        title=spec.title,
        version=__version__,
        config=spec.config,
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_digest=digest,
        titles={"maps": "all maps"} | {page["place"]: page["title"] for page in parts["benchmarks"]},
        **parts,
    )


def _shown(value: Any) -> Any:
    """What is put into the page, as it is or, if it comes from data, without control characters."""
    return without_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return files("cellformers").joinpath("templates", name).read_text(encoding="utf-8")
