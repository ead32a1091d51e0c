"""A file that a crash of a file system left half-written, or empty, under its final name: the step that reads it names
it in one line and says what to do, and writes nothing."""

import signal
from pathlib import Path

import pytest
from chain import Chain, contents, copies, leftovers
from forks import Forks

# the step that reads, and the damaged file among what the chain wrote
READ = [
    ("ingest", "in/raw.h5ad"),
    ("check-columns", "ingest/metadata.parquet"),
    ("qc-metrics", "ingest/counts/0001-of-0001.h5ad"),
    ("doublets", "ingest/metadata.parquet"),
    ("genes", "ingest/features.parquet"),
    ("qc", "qc-metrics/m.parquet"),
    ("qc", "doublets/d.parquet"),
    ("sketch", "ingest/counts/0001-of-0001.h5ad"),
    ("sketch", "qc/cells.parquet"),
    ("medians", "sketch/s.parquet"),
    ("medians", "in/raw.h5ad"),
    ("vocabulary", "medians/m.parquet"),
    ("gene-labels", "in/known/aliases.parquet"),
    ("tokenize", "ingest/counts/0001-of-0001.h5ad"),
    ("tokenize", "qc/cells.parquet"),
    ("tokenize", "vocabulary/v/tokens.parquet"),
    ("tokenize", "vocabulary/v/aliases.parquet"),
    ("tokenize", "vocabulary/v/vocabulary.json"),
    ("pretrain", "tokenize/tokens.parquet"),
    ("embed", "tokenize/tokens.parquet"),
    ("embed", "pretrain/model/model.safetensors"),
    ("embed", "pretrain/model/config.json"),
    ("embed", "pretrain/model/vocabulary/tokens.parquet"),
    ("embed-occurrences", "tokenize/tokens.parquet"),
    ("import-model", "in/published/model.safetensors"),
    ("verify", "pretrain/model/model.safetensors"),
    ("randomize", "pretrain/model/config.json"),
    ("convert", "pretrain/model/model.safetensors"),
    ("finetune", "pretrain/model/model.safetensors"),
    ("finetune", "qc/cells.parquet"),
    ("finetune", "tokenize/tokens.parquet"),
    ("search", "qc/cells.parquet"),
    ("predict", "finetune/model/model.safetensors"),
    ("gather", "embed/e.parquet"),
    ("gather", "qc/cells.parquet"),
    ("gather-genes", "embed-genes/e.parquet"),
    ("summarize-embeddings", "embed/e.parquet"),
    ("embed-file", "in/raw.h5ad"),
    ("map", "gather/e.h5ad"),
    ("split", "qc/cells.parquet"),
    ("evaluate", "gather/e.h5ad"),
    ("evaluate", "split/split.json"),
    ("evaluate-counts", "ingest/counts/0001-of-0001.h5ad"),
    ("split-genes", "gather-genes/g.parquet"),
    ("evaluate-genes", "gather-genes/g.parquet"),
    ("evaluate-genes", "split-genes/split.json"),
    ("mixing", "gather/e.h5ad"),
    ("summarize", "evaluate/score.json"),
    ("report", "evaluate/score.json"),
    ("report", "in/results/a/cells.parquet"),
]


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["half", "empty"])
@pytest.mark.parametrize(("verb", "damaged"), READ)
def test_it_is_named(
    chain: Chain, forks: Forks, verb: str, damaged: str, share: float, tmp_path: Path
) -> None:
    inputs, out = tmp_path / "inputs", tmp_path / "out"
    list(copies(chain, verb, inputs))
    path = inputs / damaged
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    ended = forks.run(chain.words(verb, out, inputs=inputs))
    assert ended.code == 2, ended
    lines = [line for line in ended.text.splitlines() if line.startswith("cellformers: error: ")]
    assert len(lines) == 1, ended
    assert "Traceback" not in ended.text
    assert path.name in lines[0], lines
    assert "; " in lines[0], "what to do is said"
    assert contents(out) == {}
    assert leftovers(out) == []


@pytest.mark.parametrize("share", [0.5, 0.0], ids=["half", "empty"])
def test_a_damaged_state_of_a_training_is_passed_over(
    chain: Chain, forks: Forks, share: float, tmp_path: Path
) -> None:
    """The one before it is taken, and the result is the same."""
    fault = ("signal_at", {"out": str(tmp_path), "moment": ("rename", 7), "signum": signal.SIGKILL})
    words = chain.words("pretrain", tmp_path)
    assert forks.run(words, [fault]).code == -signal.SIGKILL
    states = sorted(tmp_path.rglob("step-*.safetensors"))
    assert len(states) == 2
    content = states[-1].read_bytes()
    states[-1].write_bytes(content[: int(len(content) * share)])
    ended = forks.run(words)
    assert ended.code == 0, ended
    assert f"{states[-1]}: damaged" in ended.text
    assert contents(tmp_path) == chain.expected("pretrain")
