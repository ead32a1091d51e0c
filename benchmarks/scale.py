"""A million cells on one small machine: time, memory and disk of every step, at several sizes.

    python benchmarks/scale.py                                   # 10,000, 100,000 and 1,000,000 cells; hours, 25 GB
    python benchmarks/scale.py --cells 10000 100000 --steps counts
    python benchmarks/scale.py --shards 1 --doublets --output scale

Simulated counts (`cellformers.simulate.large`: some 1,160 detected genes a cell, gzipped) go through all steps from
`ingest` to tokens. Then random vectors of 768 numbers, with a centre for every cell type, take the place of
embeddings, as a million forward passes are another matter, and go through everything that is made of embeddings.

Each step is a command in a process of its own: seconds from its start to its end, peak memory (VmHWM) of the process
and all below it, bytes of its output. Of several shards seconds and bytes are summed, memory is that of the largest.
Goals: time grows linearly (seconds a cell, less those of an empty command, at most 1.5 times those of the size
before); at most 1 GB for steps that read counts, 4 GB for those that read embeddings or score, whatever the number of
cells. Everything is made in a folder that is removed at the end.
"""

import sys

sys.path.pop(0)  # this folder: tokenize.py in it is not the standard library's

import argparse
import itertools
import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

CLI = [sys.executable, "-c", "from cellformers.cli import main; main()"]
COUNTS_GOAL, VECTORS_GOAL = 1000, 4000  # MB
LINEAR = 1.5
MEDIAN_COUNTS = 2000
CELLS_A_SHARD = 100_000
CONFIG = """\
datasets: {{big: {{path: big.h5ad, shards: {shards}, label: cell_type, batch: donor}}}}
corpora: {{own: {{datasets: [big]}}}}
vocabularies: {{own: {{corpus: own}}}}
models: {{small: {{vocabulary: own, pretrain: {{steps: 1}}}}}}
embeddings: {{small: {{model: small}}}}
benchmarks:
  types: {{task: cells, train: [big], label: cell_type, unit: donor}}
  donors: {{task: mixing, datasets: [big], label: cell_type, batch: donor}}
"""


@dataclass
class Row:
    """What a step took."""

    cells: int
    step: str
    seconds: float
    megabytes: float
    goal: float
    bytes: int


@dataclass(frozen=True)
class Step:
    """Commands of one step, the files they make, and the most memory they may take (MB)."""

    name: str
    commands: list[list[str]]
    outputs: list[Path]
    goal: float


def main() -> None:
    """Parse the command line, measure every size, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--steps", choices=["counts", "embeddings", "all"], default="all")
    parser.add_argument("--only", nargs="+", help="only these steps; what they need must be there (--keep)")
    parser.add_argument("--shards", type=int, help=f"of every size; default: one for {CELLS_A_SHARD:,} cells")
    parser.add_argument("--doublets", action="store_true", help="also score doublets: some ms a cell")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=768, help="of the embeddings")
    parser.add_argument("--output", type=Path, help="folder for scale.tsv and scale.json")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave everything there")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # the folder is removed then, too
    start = run([*CLI, "--help"])[0]
    rows: list[Row] = []
    print(f"{'cells':>10} {'step':22}{'s':>9}{'cells/s':>10}{'peak MB':>9}{'goal':>6}{'MB on disk':>11}")
    for n_cells in sorted(arguments.cells):
        root = arguments.keep / str(n_cells) if arguments.keep else Path(tempfile.mkdtemp(prefix="scale-"))
        try:
            for row in measure(n_cells, root, arguments):
                rows.append(row)
                print(line(row), flush=True)
                write(rows, arguments.output)
        finally:
            if not arguments.keep:
                shutil.rmtree(root)
    for verdict in verdicts(rows, start):
        print(verdict)


def line(row: Row) -> str:
    """A row of the table."""
    return (
        f"{row.cells:>10,} {row.step:22}{row.seconds:>9.1f}{row.cells / row.seconds:>10,.0f}{row.megabytes:>9,.0f}"
        f"{row.goal:>6,.0f}{row.bytes / 1e6:>11,.0f}"
    )


def write(rows: list[Row], folder: Path | None) -> None:
    """The table so far, as text and as JSON."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["cells\tstep\tseconds\tmegabytes\tgoal\tbytes"]
    lines += ["\t".join(map(str, asdict(row).values())) for row in rows]
    (folder / "scale.tsv").write_text("\n".join(lines) + "\n")
    (folder / "scale.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def verdicts(rows: list[Row], start: float) -> Iterator[str]:
    """What was asked for and is not so, and a last line."""
    failed = 0
    for row in rows:
        if row.megabytes > row.goal:
            failed += 1
            yield f"NOT MET: {row.step} of {row.cells:,} cells took {row.megabytes:,.0f} MB, over {row.goal:,.0f}"
    sizes = sorted({row.cells for row in rows})
    for step in dict.fromkeys(row.step for row in rows):
        found = {row.cells: row for row in rows if row.step == step}
        for small, large in itertools.pairwise(sizes):
            if small not in found or large not in found:
                continue
            per_cell = [
                max(found[n].seconds - start * (1 if n == small else 0), 0.1 * start) / n
                for n in (small, large)
            ]
            if found[large].seconds > 20 and per_cell[1] > LINEAR * per_cell[0]:
                failed += 1
                yield (
                    f"NOT MET: {step} takes {per_cell[1] / per_cell[0]:.1f} times the seconds a cell at {large:,} "
                    f"cells that it takes at {small:,}"
                )
    yield f"{failed} goals not met" if failed else "all goals met: linear time, flat memory"


def measure(n_cells: int, root: Path, arguments: argparse.Namespace) -> Iterator[Row]:
    """Make the data and run every step; one row a step."""
    shards = arguments.shards or max(1, n_cells // CELLS_A_SHARD)
    root.mkdir(parents=True, exist_ok=True)
    config = root / "config.yaml"
    config.write_text(CONFIG.format(shards=shards))
    steps = [*make(root, n_cells), *counts_steps(root, shards, arguments)]
    n_counts = len(steps)
    if arguments.steps != "counts":
        steps += [*vectors(root, shards, arguments.dim), *embedding_steps(root, shards)]
        steps += [*score_steps(root, shards, arguments), *report(root, config)]
    for number, step in enumerate(steps):
        if arguments.only and step.name not in arguments.only:
            continue
        measured = [run(command) for command in step.commands]
        if arguments.steps == "embeddings" and number < n_counts:
            continue
        yield Row(
            n_cells,
            step.name,
            sum(seconds for seconds, _ in measured),
            max(megabytes for _, megabytes in measured),
            step.goal,
            sum(size(path) for path in step.outputs),
        )


def size(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


def run(command: list[str]) -> tuple[float, float]:
    """Seconds of a command, and the peak memory of it and all processes below it, in MB; SystemExit if it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peaks: dict[int, float] = {}
    while True:
        for pid in family(process.pid):
            peaks[pid] = max(peaks.get(pid, 0), peak(pid))
        try:
            _, errors = process.communicate(timeout=0.05)
            break
        except subprocess.TimeoutExpired:
            continue
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{errors}")
    return time.perf_counter() - started, sum(peaks.values())


def family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # ended meanwhile
            continue
        for child in children:
            yield from family(int(child))


def peak(pid: int) -> float:
    """VmHWM of a process in MB: the most it ever held in memory; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    held = [text.split()[1] for text in status.splitlines() if text.startswith("VmHWM")]
    return int(held[0]) / 1024 if held else 0.0


# --- the steps ------------------------------------------------------------------------------------------------


def cli(*words: object) -> list[str]:
    """A command of cellformers."""
    return [*CLI, *map(str, words)]


def own(*words: object) -> list[str]:
    """A part of this script as a command."""
    return [sys.executable, __file__, *map(str, words)]


def shard_files(folder: Path, shards: int, suffix: str) -> list[Path]:
    """Names of the shards in a folder."""
    return [folder / f"{number:04d}-of-{shards:04d}{suffix}" for number in range(1, shards + 1)]


def make(root: Path, n_cells: int) -> Iterator[Step]:
    """The raw file; a vocabulary is small, so is its folder."""
    raw = root / "big.h5ad"
    yield Step("(make the counts)", [own("simulate", raw, n_cells)], [raw], COUNTS_GOAL)


def counts_steps(root: Path, shards: int, arguments: argparse.Namespace) -> Iterator[Step]:
    """From the raw file to tokens."""
    big = root / "results" / "big"
    cells, metadata, features = big / "cells.parquet", big / "metadata.parquet", big / "features.parquet"
    counts = shard_files(big / "counts", shards, ".h5ad")
    metrics = shard_files(big / "metrics", shards, ".parquet")
    sketches = shard_files(big / "sketches", shards, ".parquet")
    tokens = shard_files(big / "tokens" / "own", shards, ".parquet")
    medians, vocabulary = root / "results" / "medians.parquet", root / "results" / "vocabulary"

    def step(name: str, commands: list[list[str]], outputs: list[Path]) -> Step:
        return Step(name, commands, outputs, COUNTS_GOAL)

    ingest = cli("ingest", root / "big.h5ad", "--shards", shards, "-o", big, "--quiet")
    yield step("ingest", [ingest], [*counts, metadata, features])
    measured = [cli("qc-metrics", a, "-o", b, "--quiet") for a, b in zip(counts, metrics, strict=True)]
    yield step("qc-metrics", measured, metrics)
    doublets: list[object] = []
    if arguments.doublets:
        doublets = ["--doublets", big / "doublets.parquet"]
        scored = cli(
            "doublets", *counts, "--metadata", metadata, "--batch", "library", "-o", doublets[1], "--quiet"
        )
        yield step("doublets", [scored], [big / "doublets.parquet"])
    qc = cli(
        "qc", *metrics, "--metadata", metadata, "-o", cells, "--report", big / "qc", *doublets, "--quiet"
    )
    yield step("qc", [qc], [cells, big / "qc"])
    summed = [
        cli("sketch", a, "--cells", cells, "-o", b, "--quiet") for a, b in zip(counts, sketches, strict=True)
    ]
    yield step("sketch", summed, sketches)
    yield step("medians", [cli("medians", *sketches, "-o", medians, "--quiet")], [medians])
    yield step("vocabulary", [cli("vocabulary", "--from", medians, "-o", vocabulary)], [vocabulary])
    mapped = cli(
        "genes", features, "--vocabulary", vocabulary, "-o", big / "qc" / "genes.own.json", "--quiet"
    )
    yield step("genes", [mapped], [big / "qc" / "genes.own.json"])
    ranked = [
        cli("tokenize", a, "--cells", cells, "--vocabulary", vocabulary, "-o", b, "--threads", arguments.threads,
            "--quiet")
        for a, b in zip(counts, tokens, strict=True)
    ]  # fmt: skip
    yield step("tokenize", ranked, tokens)


def vectors(root: Path, shards: int, dim: int) -> Iterator[Step]:
    """Vectors in the place of embeddings."""
    big = root / "results" / "big"
    tokens = shard_files(big / "tokens" / "own", shards, ".parquet")
    files = shard_files(big / "embeddings" / "small", shards, ".parquet")
    commands = [own("embed", a, big / "cells.parquet", b, dim) for a, b in zip(tokens, files, strict=True)]
    yield Step("(make embeddings)", commands, files, VECTORS_GOAL)


def embedding_steps(root: Path, shards: int) -> Iterator[Step]:
    """What is made of embeddings."""
    big = root / "results" / "big"
    cells, whole = big / "cells.parquet", big / "embeddings" / "small.h5ad"
    files = shard_files(big / "embeddings" / "small", shards, ".parquet")
    made = {
        "gather": (cli("gather", *files, "--cells", cells, "-o", whole), whole),
        "map": (cli("map", whole, "-o", whole.with_name("small.map.parquet")), whole.with_name("small.map.parquet")),
        "summarize-embeddings": (
            cli("summarize-embeddings", *files, "--cells", cells, "--by", "cell_type", "-o", big / "states.parquet",
                "--quiet"),
            big / "states.parquet",
        ),
        "neighbours, UMAP": (own("neighbours", files[0].parent, root / "neighbours.h5ad"), root / "neighbours.h5ad"),
    }  # fmt: skip
    for name, (command, output) in made.items():
        yield Step(name, [command], [output], VECTORS_GOAL)


def score_steps(root: Path, shards: int, arguments: argparse.Namespace) -> Iterator[Step]:
    """A split by donors, every method on it, mixing of donors, the table of scores."""
    results = root / "results"
    big, types, donors = results / "big", results / "benchmarks" / "types", results / "benchmarks" / "donors"
    cells, split = f"big={big / 'cells.parquet'}", types / "split.json"
    counts = [f"big={path}" for path in shard_files(big / "counts", shards, ".h5ad")]
    tokens = [f"big={path}" for path in shard_files(big / "tokens" / "own", shards, ".parquet")]
    embedding = [f"big={big / 'embeddings' / 'small.h5ad'}"]
    threads = ["--threads", arguments.threads]
    asked = ["--label", "cell_type", "--unit", "donor", *repeated("--tokens", tokens), "-o", split]
    yield Step("split", [cli("split", "--task", "cells", "--cells", cells, *asked)], [split], VECTORS_GOAL)
    methods = {
        "embedding": ("small", embedding), "majority": ("majority", []), "pca_hvg": ("pca_hvg", counts),
        "log_counts": ("log_counts", counts), "rank_only": ("rank_only", tokens),
    }  # fmt: skip
    for features, (method, inputs) in methods.items():
        score, predictions = types / f"{method}.json", types / f"{method}.predictions.parquet"
        command = cli(
            "evaluate", "--task", "cells", "--benchmark", "types", "--split", split, "--method", method,
            "--features", features, "--kind", "model" if features == "embedding" else "baseline",
            "--cells", cells, *repeated("--input", inputs), "--predictions", predictions, "-o", score, *threads,
            *(["--vocabulary", results / "vocabulary"] if features == "rank_only" else []),
        )  # fmt: skip
        yield Step(f"evaluate {features}", [command], [score, predictions], VECTORS_GOAL)
    for features, inputs in (("embedding", embedding), ("pca_hvg", counts)):
        score = donors / f"{methods[features][0]}.json"
        command = cli(
            "mixing", "--benchmark", "donors", "--method", methods[features][0], "--features", features,
            "--batch", "donor", "--label", "cell_type", "--cells", cells, *repeated("--input", inputs),
            *repeated("--tokens", tokens), "-o", score, *threads,
        )  # fmt: skip
        yield Step(f"mixing {features}", [command], [score], VECTORS_GOAL)
    scores = [types / f"{method}.json" for method, _ in methods.values()]
    scores += [donors / "small.json", donors / "pca_hvg.json"]
    table = results / "benchmarks.tsv"
    yield Step("summarize", [cli("summarize", *scores, "-o", table)], [table], VECTORS_GOAL)


def repeated(option: str, values: list[str]) -> list[str]:
    """An option for each of several values."""
    return [word for value in values for word in (option, value)]


def report(root: Path, config: Path) -> Iterator[Step]:
    """The page about it all."""
    page = root / "results" / "report.html"
    command = cli("report", "--config", config, "--results", root / "results", "-o", page)
    yield Step("report", [command], [page], VECTORS_GOAL)


# --- parts of this script that run in processes of their own --------------------------------------------------


def simulate(path: str, n_cells: str) -> None:
    """Write the raw file."""
    from cellformers.simulate.large import write_large

    write_large(path, n_cells=int(n_cells), median_counts=MEDIAN_COUNTS, compressed=True)


def embed(tokens: str, cells: str, output: str, dim: str) -> None:
    """Vectors for the cells of a tokens shard, in the form in which `cellformers embed` writes them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cellformers.io.arrow import numbers
    from cellformers.io.files import METADATA_KEY, atomic_path, read_metadata, read_table
    from cellformers.selection import read_column, rows_of

    names = read_table(tokens, ["cell_id"])["cell_id"].cast(pa.string())
    rows = rows_of(
        names, read_table(cells, ["cell_id"])["cell_id"].cast(pa.string()), path=tokens, cells=cells
    )
    labels = [read_column(cells, column).codes[rows] for column in ("cell_type", "donor")]
    width = int(dim)
    centres = [np.random.default_rng(i).normal(0, 0.1, (16, width)) for i in range(2)]
    made = {"step": "embed", "parameters": {"model": "random"}, "inputs": read_metadata(tokens)["inputs"]}
    schema = pa.schema(
        [("cell_id", pa.string()), ("embedding", pa.list_(pa.float32(), width))],
        metadata={METADATA_KEY: json.dumps(made).encode()},
    )
    number = int(Path(output).name.split("-")[0])
    rng = np.random.default_rng([2, number])
    with atomic_path(output) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for start in range(0, len(names), 1024):
            part = slice(start, start + 1024)
            block = sum(centre[codes[part]] for centre, codes in zip(centres, labels, strict=True))
            block = (block + rng.normal(0, 1, (len(block), width))).astype(np.float32)
            column = pa.FixedSizeListArray.from_arrays(numbers(block.reshape(-1)), width)
            writer.write_table(pa.table([names[part].combine_chunks(), column], schema=schema))


def neighbours(path: str, output: str) -> None:
    """The part of `embed-file` behind the network: neighbours and UMAP of all cells."""
    import h5py
    import numpy as np
    from anndata.io import write_elem

    from cellformers.embed_file import _neighbours
    from cellformers.gather import Ordered
    from cellformers.vectors import open_embeddings

    found = open_embeddings(sorted(Path(path).glob("*.parquet")))
    graph = _neighbours(Ordered(found, np.arange(len(found)), len(found)), seed=0)
    if graph is None:
        raise SystemExit("too few cells")
    with h5py.File(output, "w") as file:
        for name in ("distances", "connectivities", "umap"):
            write_elem(file, name, getattr(graph, name))


if __name__ == "__main__":
    parts = {"simulate": simulate, "embed": embed, "neighbours": neighbours}
    if len(sys.argv) > 1 and sys.argv[1] in parts:
        parts[sys.argv[1]](*sys.argv[2:])
    else:
        main()
