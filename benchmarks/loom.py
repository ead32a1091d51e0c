"""Speed and memory of reading a loom as large as the human fetal atlas, beside pure decompression and h5py's slices.

    python benchmarks/loom.py                          # makes 8,192 cells x 63,561 genes, 40 MB, in TMPDIR first
    python benchmarks/loom.py --loom GSE156793_S3_gene_count.loom --cells 20000

The atlas (GSE156793; Cao et al., Science 370:eaba7721, 2020) is 63,561 genes x 4,062,980 cells, dense, in gzipped
chunks of 64 x 64. Measured side by side, in turns, each in a process of its own, after its modules are loaded:

    zlib        decompresses all chunks, which are in memory already, in one thread: the floor for who uses zlib
    zlib-ng     the same with the library that our reader uses where it is installed
    reader      cellformers' blocks of counts, from the open file, with one and with two threads
    slices      `matrix[:, lo:hi]` of 2,048 cells with h5py, then scipy's CSR of cells
    ingest      all of `cellformers ingest`, from the start of Python to the shards on disk (its hours are too many:
                the start counts as if it were needed again for these few cells)

Seconds are medians of the turns; processor seconds tell what a machine that others use too would hide.
"""

import sys

sys.path.pop(0)  # this folder: tokenize.py in it is not the standard library's

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

N_GENES = 63_561
ATLAS_CELLS = 4_062_980
N_TYPES = 8
SLICE = 2048
BLOCK_BYTES = 32 << 20  # what ingest asks for


def main() -> None:
    """Parse the command line, make what is missing, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loom", type=Path, help="a loom of your own; its first --cells are read")
    parser.add_argument("--cells", type=int, default=8192)
    parser.add_argument("--dtype", default="int32", help="type of the simulated matrix")
    parser.add_argument("--repeat", type=int, default=3, help="turns; the median counts")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellformers-benchmark-") as folder:
        rows = measure(arguments, Path(folder))
    floor = rows[0]["cells"] / rows[0]["seconds"]
    print(
        f"{'':26}{'cells':>8}{'s':>8}{'CPU s':>8}{'cells/s':>9}{'of zlib':>9}{'peak MB':>9}{'atlas, h':>10}"
    )
    for row in rows:
        speed = row["cells"] / row["seconds"]
        print(
            f"{row['method']:26}{row['cells']:>8,}{row['seconds']:>8.2f}{row['cpu']:>8.2f}{speed:>9,.0f}"
            f"{speed / floor:>9.2f}{row['megabytes']:>9,.0f}{ATLAS_CELLS / speed / 3600:>10.2f}"
        )
    entries, cells = next((row["entries"], row["cells"]) for row in rows if row["entries"])
    print(f"counts found by reader and slices: {entries:,}, {entries / cells:,.0f} a cell")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every method in turns; one dict a method."""
    path = arguments.loom
    if path is None:
        path = folder / "atlas.loom"
        subprocess.run(
            [sys.executable, __file__, "simulate", str(path), str(arguments.cells), arguments.dtype],
            check=True,
        )
    cells = str(arguments.cells)
    methods = {
        "zlib, 1 thread": ("decompress", str(path), cells, "zlib"),
        "zlib-ng, 1 thread": ("decompress", str(path), cells, "zlib-ng"),
        "reader, 1 thread": ("reader", str(path), cells, "1"),
        "reader, 2 threads": ("reader", str(path), cells, "2"),
        f"h5py slices of {SLICE:,}": ("slices", str(path), cells, "1"),
        "cellformers ingest": ("ingest", str(path), cells, str(folder / "out")),
    }
    if arguments.loom is not None:
        del methods["cellformers ingest"]  # it would read the whole file
    run(methods["reader, 1 thread"])  # compiles what is not compiled yet
    turns = [{name: run(command) for name, command in methods.items()} for _ in range(arguments.repeat)]
    rows = []
    for name in methods:
        measured = [turn[name] for turn in turns if turn[name] is not None]
        if measured:
            middle = {key: statistics.median(one[key] for one in measured) for key in measured[0]}
            rows.append(
                {"method": name, **{k: int(v) if k in ("cells", "entries") else v for k, v in middle.items()}}
            )
    found = {row["entries"] for row in rows if row["entries"]}
    if len(found) != 1:
        raise SystemExit(f"the methods do not find the same: {found}")
    return rows


def run(command: tuple[str, ...]) -> dict[str, Any] | None:
    """What a method prints, run in a process of its own; None where it has nothing to run with."""
    started = time.perf_counter()
    text = subprocess.run(
        [sys.executable, __file__, *command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    found: dict[str, Any] | None = json.loads(text)
    if found is not None and command[0] == "ingest":
        found["seconds"] = time.perf_counter() - started
    return found


def report(work: Callable[[], tuple[int, int]]) -> None:
    """Run something that returns cells and non-zeros; print them, its seconds and the peak memory as JSON."""
    wall, cpu = time.perf_counter(), time.process_time()
    cells, entries = work()
    measured = {
        "cells": cells,
        "entries": entries,
        "seconds": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "megabytes": peak_megabytes(),
    }
    print(json.dumps(measured))


def peak_megabytes() -> float:
    """Most memory this process has held, in MB (VmHWM, which starts anew with a program, unlike ru_maxrss)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


# --- what is measured ----------------------------------------------------------------------------------------


def decompress(path: str, cells: str, library: str) -> None:
    """Pure decompression: every chunk of the first cells, read before the clock starts, and nothing done with it."""
    inflater: Any = zlib
    if library == "zlib-ng":
        try:
            from zlib_ng import zlib_ng as inflater
        except ImportError:
            print("null")
            return
    with h5py.File(path) as file:
        matrix = file["matrix"]
        (height, width), n = matrix.chunks, min(int(cells), matrix.shape[1])
        size = height * width * matrix.dtype.itemsize
        corners = [(top, left) for left in range(0, n, width) for top in range(0, matrix.shape[0], height)]
        chunks = [matrix.id.read_direct_chunk(corner)[1] for corner in corners]

    def work() -> tuple[int, int]:
        for chunk in chunks:
            inflater.decompress(chunk, zlib.MAX_WBITS, size)
        return n, 0

    report(work)


def reader(path: str, cells: str, threads: str) -> None:
    """Our blocks of counts of the first cells."""
    from cellformers.io import chunks, dense, picking  # noqa: F401  (compiled code is loaded before the clock starts)
    from cellformers.io.source import open_counts

    dense.open_chunks = lambda table, cells_in_rows: chunks.open_chunks(
        table, cells_in_rows=cells_in_rows, threads=int(threads)
    )
    with open_counts(path) as source:  # reads the first column of chunks

        def work() -> tuple[int, int]:
            done = entries = 0
            for block in source.blocks(max_bytes=BLOCK_BYTES):
                stop = min(block.n_cells, int(cells) - done)
                done, entries = done + stop, entries + int(block.indptr[stop])
                if done == int(cells):
                    break
            return done, entries

        report(work)


def slices(path: str, cells: str, _: str) -> None:
    """The common way: slices of many cells through the library, and a sparse matrix of each."""
    import scipy.sparse

    with h5py.File(path) as file:
        matrix = file["matrix"]
        n = min(int(cells), matrix.shape[1])

        def work() -> tuple[int, int]:
            entries = 0
            for start in range(0, n, SLICE):
                entries += scipy.sparse.csr_matrix(matrix[:, start : min(start + SLICE, n)].T).nnz
            return n, entries

        report(work)


def ingest(path: str, cells: str, output: str) -> None:
    """The whole verb."""
    from cellformers.cli import main as cli

    sys.argv = ["cellformers", "ingest", path, "--shards", "4", "--quiet", "-o", output]

    def work() -> tuple[int, int]:
        try:
            cli()
        except SystemExit as stop:
            if stop.code:
                raise
        return int(cells), 0

    report(work)


# --- a file to measure with ----------------------------------------------------------------------------------


def simulate(path: str, cells: str, dtype: str) -> None:
    """Write a loom of the atlas's layout and attributes: cells of 8 types, some 860 counts of 600 genes each.

    Multinomial counts around log-normal expression and depth: size, sparsity and compressibility are meant to be
    realistic, not biology.
    """
    n_cells = int(cells)
    rng = np.random.default_rng(0)
    programs = rng.lognormal(0, 2.2, N_GENES) * rng.lognormal(0, 1, (N_TYPES, N_GENES))
    cumulated = np.cumsum(programs / programs.sum(1, keepdims=True), axis=1)
    with h5py.File(path, "w") as file:
        matrix = file.create_dataset(
            "matrix", (N_GENES, n_cells), dtype, chunks=(64, 64), compression="gzip", compression_opts=4
        )
        for start in range(0, n_cells, 512):
            part = np.zeros((N_GENES, min(512, n_cells - start)), dtype)
            for cell in range(part.shape[1]):
                depth = int(np.clip(rng.lognormal(6.6, 0.6), 100, 20_000))
                drawn = rng.random(depth) * cumulated[0, -1]
                genes, counts = np.unique(
                    np.searchsorted(cumulated[rng.integers(N_TYPES)], drawn), return_counts=True
                )
                part[np.minimum(genes, N_GENES - 1), cell] += counts.astype(dtype)
            matrix[:, start : start + part.shape[1]] = part
        file["row_attrs/gene_id"] = [f"ENSG{i:011d}.{i % 20}".encode() for i in range(1, N_GENES + 1)]
        file["row_attrs/gene_short_name"] = [f"GENE{i}".encode() for i in range(1, N_GENES + 1)]
        file["col_attrs/sample"] = [f"sci3-me-001.CELL{i:08d}".encode() for i in range(n_cells)]
        file["col_attrs/Organ"] = [f"organ {i % 15}".encode() for i in range(n_cells)]
    os.sync()


if __name__ == "__main__":
    children = {f.__name__: f for f in (simulate, decompress, reader, slices, ingest)}
    if len(sys.argv) > 1 and sys.argv[1] in children:
        children[sys.argv[1]](*sys.argv[2:])
    else:
        main()
