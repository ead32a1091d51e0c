"""Speed and memory of `cellformers tokenize`, beside the published algorithm in numpy and scipy.

    python benchmarks/tokenize.py --vocabulary gc104M                 # makes 100,000 cells, 2 GB, in TMPDIR first
    python benchmarks/tokenize.py --vocabulary gc104M --counts my.h5ad

Measured is the whole command, from the start of Python to the file on disk. The peer is our own straightforward
implementation of what the reference tokenizer does: all cells in memory, float64, one argsort a cell, one process a
core; it gets fewer cells (--peer-cells), as it is slow. Both outputs are
compared.
"""

import sys

sys.path.pop(0)  # this folder: the standard library has a module called tokenize, too

import argparse
import itertools
import json
import multiprocessing
import os
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

CLI = ["-c", "from cellformers.cli import main; main()"]


def main() -> None:
    """Parse the command line, make what is missing, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vocabulary", type=Path, required=True, help="vocabulary, or folder of published pickles"
    )
    parser.add_argument("--counts", type=Path, help="any count file (h5ad for the peer); default: simulated")
    parser.add_argument("--cells", type=int, default=100_000, help="cells to simulate")
    parser.add_argument("--peer-cells", type=int, default=10_000, help="cells the peer gets; 0: no peer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs; the median counts")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellformers-benchmark-") as folder:
        rows = measure(arguments, Path(folder))
    print(f"{'':34}{'cells':>9}{'s':>8}{'cells/s':>10}{'Mtokens/s':>11}{'peak MB':>9}")
    for row in rows:
        print(
            f"{row['method']:34}{row['cells']:>9,}{row['seconds']:>8.2f}{row['cells'] / row['seconds']:>10,.0f}"
            f"{row['tokens'] / row['seconds'] / 1e6:>11.1f}{row['megabytes']:>9,.0f}"
        )
        if "shares" in row:
            print(
                "  processor time: "
                + ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
            )
        if "equal" in row:
            print(f"  cells with the same tokens: {row['equal']:,} of {row['cells']:,}")
    if len(rows) > 1:
        speeds = [row["cells"] / row["seconds"] for row in rows]
        print(f"{speeds[0] / speeds[1]:.1f} times the peer")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run everything; one dict a method.

    A child's peak memory is never less than what its parent held when it was started, so this process stays small:
    files are made by children, and results are read when everything has been measured.
    """
    vocabulary, counts = arguments.vocabulary, arguments.counts
    threads = str(arguments.threads)
    if not (vocabulary / "vocabulary.json").is_file():
        run([*CLI, "vocabulary", "--from", str(vocabulary), "-o", str(folder / "vocabulary")])
        vocabulary = folder / "vocabulary"
    if counts is None:
        counts = folder / "counts.h5ad"
        run([__file__, "simulate", str(counts), str(vocabulary), str(arguments.cells)])
    if counts.is_file():
        warm(counts)

    output, peer_output = folder / "tokens.parquet", folder / "peer.parquet"
    command = [*CLI, "tokenize", str(counts), "-o", str(output), "--vocabulary", str(vocabulary)]
    command += ["--threads", threads, "--quiet"]
    run(command)  # compiles what is not compiled yet
    ours = sorted(run(command) for _ in range(arguments.repeat))[arguments.repeat // 2]
    text = subprocess.run(
        [sys.executable, __file__, "shares", str(counts), str(vocabulary), str(output), threads],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    peer = None
    if arguments.peer_cells:
        n = str(arguments.peer_cells)
        peer = run([__file__, "peer", str(counts), str(vocabulary), str(peer_output), threads, n])

    import pyarrow.parquet as pq

    table = pq.read_table(output, columns=["input_ids", "length"])
    rows = [row(f"cellformers, {threads} threads", table, ours) | {"shares": json.loads(text)}]
    if peer is not None:
        theirs = pq.read_table(peer_output)
        pairs = zip(
            table["input_ids"][: len(theirs)].to_pylist(), theirs["input_ids"].to_pylist(), strict=True
        )
        equal = sum(a == b for a, b in pairs)
        rows.append(row(f"numpy and scipy, {threads} processes", theirs, peer) | {"equal": equal})
    return rows


def row(method: str, table: Any, measured: tuple[float, float]) -> dict[str, Any]:
    """One line of the result."""
    tokens = sum(table["length"].to_pylist())
    return {
        "method": method, "cells": len(table), "tokens": tokens, "seconds": measured[0], "megabytes": measured[1],
    }  # fmt: skip


def warm(path: Path) -> None:
    """Read a file once, so that every run finds it in memory."""
    with path.open("rb") as file:
        while file.read(64 << 20):
            pass


def run(arguments: list[str]) -> tuple[float, float]:
    """Seconds of a Python process and the peak memory of it and its children together, in MB."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    text = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(arguments)}")
    children = float(text.split()[-1]) if text.strip() else 0.0
    return seconds, usage.ru_maxrss / 1024 + children


def simulate(path: str, folder: str, cells: str) -> None:
    """Write an uncompressed float32 CSR h5ad, as scanpy does: some 5,400 counts and 2,300 genes a cell."""
    from cellformers.genes import Vocabulary
    from cellformers.simulate.large import N_GENES, write_large

    vocabulary = Vocabulary.load(folder)
    known = set(vocabulary.aliases()["gene_id"].to_pylist()) - set(vocabulary.gene_ids)
    genes = sorted([*vocabulary.gene_ids, *sorted(known)][:N_GENES])
    write_large(path, n_cells=int(cells), median_counts=5400, gene_ids=genes)


def shares(counts: str, vocabulary: str, output: str, threads: str) -> None:
    """Print the shares of processor time in reading, ranking and writing, as JSON."""
    from cellformers.genes import Vocabulary
    from cellformers.io.source import open_counts
    from cellformers.tokens import tokenize

    with open_counts(counts) as source:
        report = tokenize(source, Vocabulary.load(vocabulary), output=output, threads=int(threads))
    report["seconds"].pop("all")
    total = time.process_time()
    rest = {"the rest (start, genes)": total - sum(report["seconds"].values())}
    print(json.dumps({name: value / total for name, value in (report["seconds"] | rest).items()}))


# --- the peer: the published algorithm, written plainly with numpy and scipy ---------------------------------


def peer(counts: str, vocabulary: str, output: str, processes: str, n_cells: str) -> None:
    """Tokenize the first cells in several processes, collect the lists, write one file; print the children's MB."""
    import h5py
    import pyarrow as pa
    import pyarrow.parquet as pq

    with h5py.File(counts) as file:
        n = min(int(n_cells), len(file["X/indptr"]) - 1)
    bounds = np.linspace(0, n, int(processes) + 1).astype(int).tolist()
    jobs = [(counts, vocabulary, lo, hi) for lo, hi in itertools.pairwise(bounds)]
    with multiprocessing.get_context("spawn").Pool(int(processes)) as pool:
        results = pool.starmap(peer_cells, jobs)
    tokens = [cell for cells, _ in results for cell in cells]
    pq.write_table(pa.table({"input_ids": tokens, "length": [len(cell) for cell in tokens]}), output)
    print(sum(megabytes for _, megabytes in results))


def peer_cells(counts: str, folder: str, lo: int, hi: int) -> tuple[list[list[int]], float]:
    """Tokens of cells lo to hi, and the peak memory of this process in MB."""
    import anndata
    import scipy.sparse

    from cellformers.genes import Vocabulary, map_features

    vocabulary = Vocabulary.load(folder)
    file = anndata.read_h5ad(counts, backed="r")
    X = scipy.sparse.csr_matrix(file.X[lo:hi])
    n_counts = np.asarray(X.sum(1)).ravel()
    token_of_feature = map_features(file.var_names.to_numpy(), None, vocabulary).token_of_feature
    used = np.flatnonzero(token_of_feature >= 0)
    tokens = np.unique(token_of_feature[used])
    sums = scipy.sparse.csr_matrix(
        (np.ones(len(used)), (used, np.searchsorted(tokens, token_of_feature[used]))),
        (X.shape[1], len(tokens)),
    )
    medians = vocabulary.medians[np.searchsorted(vocabulary.token_ids, tokens)]
    special = vocabulary.special_tokens
    most = vocabulary.context_length - 2 * vocabulary.has_cls
    cells = []
    for start in range(0, hi - lo, 512):
        block = (X[start : start + 512].astype(np.float64) @ sums).tocsr()
        block.sort_indices()
        norm = n_counts[start : start + 512]
        for i in range(block.shape[0]):
            row = slice(block.indptr[i], block.indptr[i + 1])
            scores = block.data[row] / norm[i] * 10_000 / medians[block.indices[row]]
            ranked = tokens[block.indices[row]][np.argsort(-scores, kind="stable")][:most].tolist()
            cells.append([special["<cls>"], *ranked, special["<eos>"]] if vocabulary.has_cls else ranked)
    return cells, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    children = {"peer": peer, "shares": shares, "simulate": simulate}
    if len(sys.argv) > 1 and sys.argv[1] in children:
        children[sys.argv[1]](*sys.argv[2:])
    else:
        main()
