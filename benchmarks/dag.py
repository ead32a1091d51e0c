"""Planning large runs: time and memory of a dry run of many shards through four models, by what is asked for.

    python benchmarks/dag.py                              # 1,000 shards
    python benchmarks/dag.py --shards 250 --output results/dag.tsv

Nothing is downloaded or computed, and no data are needed. `embeddings`: four published models over one dataset;
`benchmarks`: these and a benchmark of cells and one of genes, every model beside its twin with random weights. Each is
planned twice: with `--quiet rules` Snakemake prints a table of the rules, without it every job with all its files.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# benchmarks/tokenize.py would hide Python's own module of that name from the packages imported below
sys.path.remove(str(Path(__file__).resolve().parent))

import pandas as pd
import yaml

ROOT = Path(__file__).parents[1]
CHECKPOINTS = {
    "v1": "geneformer-v1-10m",
    "v2": "geneformer-v2-104m",
    "cl": "geneformer-v2-104m-clcancer",
    "xl": "geneformer-v2-316m",
}


def config(shards: int, *, benchmarks: bool) -> dict[str, object]:
    """Four models over one dataset in so many shards."""
    cells = {"task": "cells", "train": ["big"], "label": "cell_type", "unit": "donor"}
    genes = {
        "task": "genes",
        "dataset": "big",
        "labels": {"path": "genes.csv", "label": "dosage", "gene": "gene"},
    }
    return {
        "datasets": {"big": {"path": "big.h5ad", "shards": shards, "label": "cell_type", "batch": "donor"}},
        "models": {name: {"checkpoint": checkpoint} for name, checkpoint in CHECKPOINTS.items()},
        "embeddings": {name: {"model": name} for name in CHECKPOINTS},
        "benchmarks": {"cells": cells, "genes": genes} if benchmarks else {},
    }


def plan(folder: Path, settings: dict[str, object], *more: str) -> dict[str, float]:
    """Wall and processor seconds, peak memory in MB and number of jobs of one dry run."""
    folder.mkdir(parents=True)
    for name in ("big.h5ad", "genes.csv"):
        (folder / name).touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    said = folder / "plan.txt"
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--directory", str(folder), "--configfile", str(folder / "config.yaml")]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with said.open("w") as out:
        subprocess.run(
            [*command, "--cores", "2", "--dry-run", *more], stdout=out, stderr=subprocess.STDOUT, check=True
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    totals = [line.split()[1] for line in said.read_text().splitlines() if line.startswith("total ")]
    return {
        "jobs": int(totals[0]),
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_mb": round(after.ru_maxrss / 1024),  # of the largest process so far
    }


def main() -> None:
    """Print the table, and write it where --output says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=1000, help="of the one dataset (1000)")
    parser.add_argument("--output", type=Path, help="a TSV file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for benchmarks in (False, True):
            settings = config(arguments.shards, benchmarks=benchmarks)
            for listing, more in (("plan", ["--quiet", "rules"]), ("every job", [])):
                asked = "benchmarks" if benchmarks else "embeddings"
                folder = Path(scratch) / f"{asked}-{len(more)}"
                rows.append({"asked": asked, "printed": listing, "shards": arguments.shards})
                rows[-1] |= plan(folder, settings, *more)
                print(rows[-1], file=sys.stderr)
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        table.to_csv(arguments.output, sep="\t", index=False)


if __name__ == "__main__":
    main()
