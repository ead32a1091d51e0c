"""Small files in the formats of the deposits, made by hand, and how what was ingested of them is looked at."""

import gzip
import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
from command_line import Ran, run

GENES = [
    "ACTB",
    "GAPDH",
    "MALAT1",
    "MT-ND1",
    "AC012345.1",
    "HLA-A",
    "C1orf112",
    "TTN",
    "NKX2-5",
    "ZFP41",
    "ZFP41",
]


def make_counts(n_cells: int, *, n_genes: int = len(GENES), seed: int = 0) -> np.ndarray:
    """int64[n_cells, n_genes], no empty cell."""
    counts = np.random.default_rng(seed).poisson(3.0, (n_cells, n_genes))
    counts[:, 0] += 5
    return counts


def make_barcodes(n_cells: int, *, length: int = 16, seed: int = 0) -> list[str]:
    """Different barcodes, the same for the same seed."""
    letters = np.random.default_rng(seed).choice(list("ACGT"), (4 * n_cells, length))
    return list(dict.fromkeys("".join(row) for row in letters))[:n_cells]


def dense_text(counts: np.ndarray, cells: Sequence[str], genes: Sequence[str], *, header: str) -> bytes:
    """Genes x cells, tab-separated; `header`: "short" (a field fewer), "empty" or the first field."""
    first = [] if header == "short" else ["" if header == "empty" else header]
    lines = ["\t".join([*first, *cells])]
    lines += ["\t".join([gene, *map(str, row)]) for gene, row in zip(genes, counts.T.tolist(), strict=True)]
    return ("\n".join(lines) + "\n").encode()


def write_gz(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content if isinstance(content, bytes) else content.encode(), mtime=0))
    return path


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def ingest(folder: Path, output: Path, deposit: str, part: str = "all", *, shards: int = 1) -> Ran:
    return run("ingest", folder, "--deposit", deposit, "--part", part, "--shards", str(shards), "-o", output)


def shards_of(output: Path) -> list[anndata.AnnData]:
    return [anndata.read_h5ad(path) for path in sorted((output / "counts").glob("*.h5ad"))]


def cell_ids(output: Path) -> list[str]:
    return [name for shard in shards_of(output) for name in shard.obs_names]


def features(output: Path) -> list[str]:
    return list(shards_of(output)[0].var_names)


def dense(output: Path) -> np.ndarray:
    return sp.vstack([shard.X for shard in shards_of(output)]).toarray()


def metadata(output: Path) -> pa.Table:
    return pq.read_table(output / "metadata.parquet")


def assert_refused(done: Ran, *words: str, output: Path) -> None:
    """One line that says all of `words`, and no file of the output or of the scratch beside it."""
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1 + done.err.count("a second\n"), done.err  # progress may stand before it
    for word in words:
        assert word in done.err.splitlines()[-1]
    assert not [path for path in output.rglob("*") if path.is_file()]
    assert not [path.name for path in output.parent.iterdir() if path.name.startswith(".part-")]
