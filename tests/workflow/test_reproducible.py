"""The same results for the same config: what Snakemake plans is what is recorded; batches and seeds of single verbs.

Whole runs with other shards, cores and threads are compared in test_run.py.
"""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import command_line
import pytest
from test_rules import PUBLISHED, published_models
from token_files import make_cells, make_model, make_vocabulary, write_tokens

from cellformers import config
from cellformers.provenance import artefacts
from cellformers.report import from_config

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("given", [PUBLISHED, published_models()], ids=["published", "every origin"])
def test_the_record_lists_what_is_planned(
    snakemake: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, object],
) -> None:
    (tmp_path / "config").symlink_to(ROOT / "config")
    for name in ("mine.h5ad", "other.h5ad", "genes.csv"):
        (tmp_path / name).touch()
    done = snakemake(tmp_path, given, "--dry-run", "--forceall")
    assert done.returncode == 0, done.stderr
    outputs = re.findall(r"^    output: (.*)$", done.stdout + done.stderr, flags=re.MULTILINE)
    planned = {name.removeprefix("results/") for names in outputs for name in names.split(", ")}
    weights = {name for name in planned if re.search(r"/fold-\d+/model.safetensors$", name)}  # temporary
    monkeypatch.chdir(tmp_path)
    listed = set(artefacts(config.load(given)))
    assert planned - weights - {"provenance.json"} == listed


def test_the_report_does_not_tell_the_number_of_shards(tmp_path: Path) -> None:
    shown = []
    for shards in (1, 9):
        given = {"datasets": {"mine": {"path": "x.h5ad", "shards": shards, "label": "type"}}}
        shown.append(from_config(config.load(given), tmp_path).config)
    assert shown[0] == shown[1] == "datasets:\n  mine:\n    path: x.h5ad\n    label: type\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    vocabulary = make_vocabulary()
    write_tokens(tmp_path / "tokens.parquet", make_cells(vocabulary, [5, 40, 17, 1, 33, 8]), vocabulary)
    return make_model(tmp_path / "model", vocabulary)


def made(output: Path, *words: str | Path) -> bytes:
    ended = command_line.run(*words, "-o", output)
    assert ended.code == 0, ended.err
    return output.read_bytes()


def test_the_size_of_a_batch_changes_no_embedding(model: Path, tmp_path: Path) -> None:
    ask = ("embed", tmp_path / "tokens.parquet", "--model", model, "--mode", "cell", "--quiet")
    first = made(tmp_path / "a.parquet", *ask)
    for batch, threads in ((1, 1), (64, 2), (100_000, 1)):
        options = ("--batch-tokens", str(batch), "--threads", str(threads))
        assert made(tmp_path / "b.parquet", *ask, *options) == first


def test_a_seed_changes_the_random_weights_and_repeats_them(model: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", "0"), ("b", "1"), ("c", "0")):
        ended = command_line.run("randomize", model, "--seed", seed, "-o", tmp_path / name)
        assert ended.code == 0, ended.err
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[2] != weights[1]
    configs = [(tmp_path / name / "vocabulary" / "tokens.parquet").read_bytes() for name in "abc"]
    assert configs[0] == configs[1] == configs[2]
