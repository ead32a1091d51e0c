"""A deposit from a server to scores, by the verbs a rule calls: as it is, damaged, and in one or five shards."""

import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from cellformers.simulate.deposits import simulate_deposits

CELLFORMERS = Path(sys.executable).with_name("cellformers")
TAR = "GSE155468_RAW.tar"
LABELS = "meta_addsubcluster_cellcycle.csv"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Static files, without a line a request."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    simulate_deposits(["gse155468"], folder, seed=5)
    return folder


@pytest.fixture
def offered(simulated: Path, tmp_path: Path) -> Path:
    """A copy of the mirror and its registry that a test may damage."""
    return Path(shutil.copytree(simulated, tmp_path / "offered"))


@pytest.fixture
def environment(offered: Path) -> Iterator[dict[str, str]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(offered / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        **os.environ,
        "CELLFORMERS_MIRROR": f"http://127.0.0.1:{server.server_address[1]}",
        "CELLFORMERS_RESOURCES": str(offered / "resources"),
        "CELLFORMERS_HOME": str(offered / "home"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    server.shutdown()
    server.server_close()


def call(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CELLFORMERS), *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("cellformers: error:")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def served(offered: Path, name: str) -> Path:
    return next((offered / "www").rglob(name))


def replace(offered: Path, name: str, content: bytes) -> None:
    """Offer other content under a name, with the digest the registry should then have."""
    served(offered, name).write_bytes(content)
    path = offered / "resources" / "datasets" / "gse155468.yaml"
    entry = yaml.safe_load(path.read_text())
    entry["files"][name] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(yaml.safe_dump(entry, sort_keys=False))


def ingested(environment: dict[str, str], folder: Path, shards: int = 1) -> subprocess.CompletedProcess[str]:
    done = call(environment, "download", "gse155468", "-o", folder / "raw")
    assert done.returncode == 0, done.stderr
    return call(
        environment, "ingest", folder / "raw", "--deposit", "gse155468", "--shards", str(shards), "-o", folder / "data"
    )  # fmt: skip


def test_one_changed_byte_is_refused(offered: Path, environment: dict[str, str], tmp_path: Path) -> None:
    path = served(offered, TAR)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    line = refused(call(environment, "download", "gse155468", "-o", tmp_path / "raw"))
    assert TAR in line
    assert "sha256" in line or "digest" in line
    assert not (tmp_path / "raw").exists()


def test_one_renamed_column_is_refused(offered: Path, environment: dict[str, str], tmp_path: Path) -> None:
    content = served(offered, LABELS).read_bytes()
    replace(offered, LABELS, content.replace(b"celltype,", b"cell_kind,", 1))
    line = refused(ingested(environment, tmp_path))
    assert "celltype" in line
    assert not list((tmp_path / "data").rglob("*.h5ad"))
    assert not list(tmp_path.glob("*unpacked*"))


def test_one_missing_sample_is_refused(offered: Path, environment: dict[str, str], tmp_path: Path) -> None:
    old = io.BytesIO(served(offered, TAR).read_bytes())
    new = io.BytesIO()
    with tarfile.open(fileobj=old) as source, tarfile.open(fileobj=new, mode="w") as target:
        for member in source:
            if "TAA3" not in member.name:
                target.addfile(member, source.extractfile(member))
    replace(offered, TAR, new.getvalue())
    line = refused(ingested(environment, tmp_path))
    assert "TAA3" in line
    assert not list((tmp_path / "data").rglob("*.h5ad"))


def test_a_sample_cut_short_is_refused(offered: Path, environment: dict[str, str], tmp_path: Path) -> None:
    old = io.BytesIO(served(offered, TAR).read_bytes())
    new = io.BytesIO()
    with tarfile.open(fileobj=old) as source, tarfile.open(fileobj=new, mode="w") as target:
        for member in source:
            file = source.extractfile(member)
            assert file is not None
            content = file.read()
            if "Con6" in member.name:
                text = gzip.decompress(content)
                content = gzip.compress(text[: len(text) // 2])
                member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    replace(offered, TAR, new.getvalue())
    line = refused(ingested(environment, tmp_path))
    assert "Con6" in line
    assert not list((tmp_path / "data").rglob("*.h5ad"))


def scores(environment: dict[str, str], folder: Path, shards: int) -> dict[str, Any]:
    """The score of a baseline on held-out donors, from a deposit ingested in so many shards."""
    done = ingested(environment, folder, shards)
    assert done.returncode == 0, done.stderr
    data = folder / "data"
    counts = sorted((data / "counts").glob("*.h5ad"))
    assert len(counts) == shards
    metrics = []
    for number, shard in enumerate(counts):
        metrics.append(folder / f"{number}.parquet")
        assert call(environment, "qc-metrics", shard, "-o", metrics[-1]).returncode == 0
    cells = folder / "cells.parquet"
    steps: list[list[str | Path]] = [
        ["qc", *metrics, "--metadata", data / "metadata.parquet", "-o", cells, "--report", folder / "qc"],
        ["split", "--task", "cells", "--cells", f"aorta={cells}", "--label", "condition", "--unit", "donor",
         "--folds", "3", "-o", folder / "split.json"],
        ["evaluate", "--task", "cells", "--split", folder / "split.json", "--method", "pca_hvg", "--kind", "baseline",
         "--features", "pca_hvg", "--cells", f"aorta={cells}", *(f"--input=aorta={path}" for path in counts),
         "--predictions", folder / "p.parquet", "-o", folder / "score.json"],
    ]  # fmt: skip
    for step in steps:
        done = call(environment, *step)
        assert done.returncode == 0, done.stderr
    return dict(json.loads((folder / "score.json").read_text()))


def test_scores_are_equal_for_one_and_five_shards(environment: dict[str, str], tmp_path: Path) -> None:
    one, five = (scores(environment, tmp_path / str(n), n) for n in (1, 5))
    assert one == five
    assert one["metrics"]["accuracy"]["low"] is not None, "eleven donors earn an interval"
    assert {vote["label"] for vote in one["votes"]} == {"aneurysm", "control"}
