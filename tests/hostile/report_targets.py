"""Targets for `hostile_cases`: what the report shows, and the tables of QC and of doublets.

The report's figures are not drawn: that takes seconds, and what goes into them has been read by then.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from count_targets import make_h5ad
from hostile_cases import Target, register
from loader_targets import CELLS, N_CELLS, fine, rounded
from markupsafe import Markup
from report_files import make_map, make_model, write_predictions
from result_targets import DONORS, TYPES, twist

from cellformers.counts import Sample, ingest
from cellformers.doublets import score_doublets
from cellformers.io.files import read_metadata, read_table, stamp, write_json, write_table
from cellformers.qc import QCParameters, distributions, passing, qc
from cellformers.report import DatasetFiles, MapFile, ReportSpec
from cellformers.report.curves import read_answers
from cellformers.report.figures import Figure, Figures
from cellformers.report.page import render, sections


class Undrawn(Figures):
    """Figures that are listed and not drawn."""

    def add(self, name: str, text: str, draw: Callable[[Path], None]) -> Figure:
        """Only its name."""
        self.names.append(name)
        return Figure(name, text)

    def inline(self, figure: Figure) -> Markup:
        """Its text in its place."""
        return Markup("<svg>{}</svg>").format(figure.text)


# --- the report -------------------------------------------------------------------------------------------


def _measures() -> dict[str, Any]:
    return {
        "cell_id": CELLS,
        "n_counts": pa.array(range(100, 100 + N_CELLS), pa.int64()),
        "n_genes": pa.array(range(50, 50 + N_CELLS), pa.int32()),
        "mito_fraction": pa.array([None, *np.linspace(0, 0.2, N_CELLS - 1).tolist()]),
    }


def _metadata() -> dict[str, Any]:
    return {
        "cell_id": CELLS,
        "kind": TYPES,
        "donor": DONORS,
        "excluded": ["too old", *[None] * (N_CELLS - 1)],
    }


def _make_qc(folder: Path) -> None:
    """The tables that QC reads, and those it makes of them."""
    about = {"inputs": {"dataset": "sha256:0"}}
    write_table(pa.table(_measures()), folder / "metrics.parquet", about)
    write_table(pa.table(_metadata()), folder / "metadata.parquet", about)
    scores = {
        "cell_id": CELLS,
        "doublet_score": pa.array([*np.linspace(0, 1, N_CELLS - 1).tolist(), None]),
        "predicted_doublet": pa.array([*[False] * (N_CELLS - 2), True, None]),
    }
    write_table(pa.table(scores), folder / "doublets.parquet", about)


def _qc(folder: Path) -> dict[str, Any]:
    return qc(
        [folder / "metrics.parquet"], folder / "metadata.parquet", output=folder / "cells.parquet",
        thresholds=folder / "qc" / "thresholds.json", doublets=folder / "doublets.parquet",
        parameters=QCParameters(where={"kind": ["t0", "t1"]}),
    )  # fmt: skip


def make_results(folder: Path) -> None:
    """A dataset, a network that was trained and a classifier, their check, a map, and what it all cost."""
    dataset = folder / "a"
    _make_qc(dataset)
    _qc(dataset)
    write_json({"features": {"all": 9, "mapped": 8, "summed": 1, "outside": 1, "unknown": 0}, "genes": 8,
                "shares": {"mapped": 0.9, "known": 0.95}, "examples": {"outside": ["ENSG1"], "unknown": []}},
               dataset / "qc" / "genes.v.json")  # fmt: skip
    lengths = {"cell_id": CELLS, "length": pa.array(range(1, N_CELLS + 1), pa.int32())}
    about = stamp("tokenize", 1, parameters={"context_length": 8}, inputs={})
    write_table(pa.table(lengths), dataset / "tokens.parquet", about)
    make_map(dataset, N_CELLS)
    make_model(folder / "trained")
    scores = {"n": 6, "accuracy": 0.5, "macro_f1": 0.4, "auc": None}
    tuned = {
        "step": "finetune", "metrics": {"heldout": scores, "test": scores}, "steps": 5, "n_cells": 12,
        "labels": [{"name": "kind", "classes": ["t0", "t1"]}], "split": {"kind": "unit", "unit": "donor"},
    }  # fmt: skip
    make_model(folder / "tuned", trained=False)
    write_json(tuned, folder / "tuned" / "training.json")
    rows = [{"layer": "embedding", "max_abs": 1e-6, "mean_abs": 1e-7, "relative": 1e-6, "scale": 2.0}]
    result = {"dtype": "float32", "layers": rows, "passed": True}
    write_json({"transformers": "4.57", "n_cells": 2, "n_tokens": 9, "backends": {"sdpa": result}},
               folder / "verify.json")  # fmt: skip
    (folder / "runtime" / "a").mkdir(parents=True)
    (folder / "runtime" / "a" / "ingest.tsv").write_text("s\tmax_rss\tcpu_time\n1.5\t200.1\t1.4\n")
    (folder / "runtime" / "simulate.tsv").write_text("s\tmax_rss\tcpu_time\n1.5\t-\tNA\n")


def read_report(folder: Path) -> str:
    tokens = {"v": [folder / "a" / "tokens.parquet"]}
    spec = ReportSpec(
        datasets={"a": DatasetFiles(folder=folder / "a", label="kind", batch="donor", tokens=tokens)},
        models={"trained": folder / "trained", "tuned": folder / "tuned"},
        verified={"trained": folder / "verify.json"},
        maps=[
            MapFile(dataset="a", embedding="small", path=folder / "a" / "embeddings" / "small.map.parquet")
        ],
        runtime=folder / "runtime",
    )
    figures = Undrawn(folder)
    parts = sections(spec, figures, folder / "tables")
    folders = {"figures": folder / "figures", "tables": folder / "tables"}
    return render(spec, parts, figures, output=folder / "report.html", folders=folders)


def build_results(rng: random.Random, folder: Path) -> Any:
    make_results(folder)
    for name in ("metrics", "metadata", "doublets"):
        (folder / "a" / f"{name}.parquet").unlink()
    return twist(rng, folder)


register(lambda: Target("report", make_results, read_report, fine, None, build_results))


def make_answers(folder: Path) -> None:
    write_predictions(folder / "x.json", "cells", ["t0", "t1", "t2"], ["d0", "d1"], 0.8, n=N_CELLS)


def read_curves(folder: Path) -> Any:
    score = {"path": folder / "x.json", "task": "cells", "classes": ["t0", "t1", "t2"]}
    found = read_answers(score)
    return None if found is None else (found.positive.tolist(), rounded(found.score), found.fold.tolist())


def build_answers(rng: random.Random, folder: Path) -> Any:
    make_answers(folder)
    return twist(rng, folder)


register(lambda: Target("answers", make_answers, read_curves, fine, None, build_answers))


# --- QC and doublets --------------------------------------------------------------------------------------


def read_qc(folder: Path) -> Any:
    found = _qc(folder)
    table = read_table(folder / "cells.parquet")
    return found["n_pass"], repr(found["criteria"]), table["qc_pass"].to_pylist()


def valid_qc(value: Any) -> str | None:
    passed, _, flags = value
    fine = all(isinstance(flag, bool) for flag in flags) and sum(flags) == passed
    return None if fine else f"{passed} cells pass, {flags} say the flags"


def build_qc(rng: random.Random, folder: Path) -> Any:
    _make_qc(folder)
    return twist(rng, folder)


register(lambda: Target("qc-tables", _make_qc, read_qc, valid_qc, None, build_qc))


def make_judged(folder: Path) -> None:
    _make_qc(folder)
    _qc(folder)
    for name in ("metrics", "metadata", "doublets"):
        (folder / f"{name}.parquet").unlink()


def read_judged(folder: Path) -> Any:
    """What later steps and figures read of a table of cells."""
    cells = folder / "cells.parquet"
    flags = passing(cells)
    found = distributions(cells, folder / "qc" / "thresholds.json")
    measures = {name: rounded(np.nan_to_num(part.values)) for name, part in found.items()}
    return (
        [bool(flag) for flag in flags],
        flags.dtype.name,
        measures,
        repr([part[2:] for part in found.values()]),
    )


def valid_judged(value: Any) -> str | None:
    return None if value[1] == "bool" else f"flags are {value[1]}"


def build_judged(rng: random.Random, folder: Path) -> Any:
    make_judged(folder)
    return twist(rng, folder)


register(lambda: Target("qc-cells", make_judged, read_judged, valid_judged, None, build_judged))


def make_batches(folder: Path) -> None:
    raw = folder / "a.h5ad"
    make_h5ad(folder)
    ingest([Sample(raw)], [folder / "0.h5ad"], metadata=folder / "m.parquet", features=folder / "f.parquet")
    raw.unlink()
    (folder / "f.parquet").unlink()
    table = read_table(folder / "m.parquet").append_column("donor", pa.array(DONORS))
    write_table(table, folder / "m.parquet", {"inputs": read_metadata(folder / "m.parquet")["inputs"]})


def read_doublets(folder: Path) -> Any:
    """Batches too small to be scored, so that nothing is computed."""
    out = folder / "d.parquet"
    notes = score_doublets([folder / "0.h5ad"], folder / "m.parquet", output=out, batch="donor")
    table = read_table(out)
    return notes, table["cell_id"].to_pylist(), table["doublet_score"].null_count


def build_batches(rng: random.Random, folder: Path) -> Any:
    make_batches(folder)
    return twist(rng, folder)


register(lambda: Target("doublets", make_batches, read_doublets, fine, None, build_batches, "m.parquet"))
