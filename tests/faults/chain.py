"""Every verb that writes, as small commands that feed each other: cells enough for every step, a network of one layer.

chain = build(folder, forks)            # runs each once, undisturbed
chain.arguments("tokenize", out)        # the command again, with its output elsewhere
"""

import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import yaml
from command_line import make_counts
from forks import Forks
from token_files import make_model, make_vocabulary

from cellformers import config
from cellformers.provenance import artefacts

N_CELLS = 120
SHARD = "0001-of-0001"
CELLS = "{qc}/cells.parquet"
TOKENS = "{tokenize}/tokens.parquet"
COUNTS = f"{{ingest}}/counts/{SHARD}.h5ad"
FINETUNE = f"{TOKENS} --model {{pretrain}}/model --labels {CELLS} --label type --epochs 1 --batch-cells 20 --threads 1"
SCORE = (
    f"--split {{split}}/split.json --cells a={CELLS} --predictions {{out}}/p.parquet -o {{out}}/score.json"
)

# name: command. {out} is the folder of its outputs, {NAME} that of an earlier command, {in} that of the first inputs
COMMANDS = {
    "simulate": "simulate --cells 300 -o {out}/sim",
    "simulate-deposit": "simulate --deposit tf-range -o {out}/sim",
    "ingest": "ingest {in}/raw.h5ad -o {out}",
    "ingest-shards": "ingest {in}/raw.h5ad --shards 3 -o {out}",
    "ingest-text": "ingest {in}/counts.tsv --genes-in-rows -o {out}",
    "check-columns": "check-columns {ingest}/metadata.parquet --column type -o {out}/columns.json",
    "qc-metrics": f"qc-metrics {COUNTS} -o {{out}}/m.parquet",
    "doublets": f"doublets {COUNTS} --metadata {{ingest}}/metadata.parquet -o {{out}}/d.parquet",
    "qc": "qc {qc-metrics}/m.parquet --metadata {ingest}/metadata.parquet --doublets {doublets}/d.parquet "
    "-o {out}/cells.parquet --report {out}/qc",
    "sketch": f"sketch {COUNTS} --cells {CELLS} -o {{out}}/s.parquet",
    "medians": "medians {sketch}/s.parquet {in}/raw.h5ad -o {out}/m.parquet",
    "vocabulary": "vocabulary --from {medians}/m.parquet --context-length 64 -o {out}/v",
    "genes": "genes {ingest}/features.parquet --vocabulary {vocabulary}/v -o {out}/g.json",
    "gene-labels": "gene-labels {in}/deposit --deposit tf-range --part all --vocabulary {in}/known "
    "-o {out}/labels.csv",
    "tokenize": f"tokenize {COUNTS} --cells {CELLS} --vocabulary {{vocabulary}}/v -t 1 -o {{out}}/tokens.parquet",
    "pretrain": f"pretrain {TOKENS} --vocabulary {{vocabulary}}/v --layers 1 --hidden-size 16 --heads 2 "
    "--intermediate-size 16 --steps 6 --batch-tokens 600 --checkpoint-every 2 --threads 1 -o {out}/model",
    "import-model": "import-model {in}/published -o {out}/model",
    "randomize": "randomize {pretrain}/model -o {out}/model",
    "convert": "convert {pretrain}/model --to te -o {out}/model",
    "verify": "verify {pretrain}/model --cells 2 --backend sdpa --threads 1 -o {out}/verify.json",
    "finetune": f"finetune {FINETUNE} --checkpoint-every 2 -o {{out}}/model",
    "predict": f"predict {TOKENS} --model {{finetune}}/model --threads 1 -o {{out}}/p.parquet",
    "search": f"search {FINETUNE} --trials 2 -o {{out}}/search",
    "embed": f"embed {TOKENS} --model {{pretrain}}/model --threads 1 -o {{out}}/e.parquet",
    "embed-genes": f"embed {TOKENS} --model {{pretrain}}/model --mode gene --threads 1 -o {{out}}/e.parquet",
    "embed-occurrences": f"embed {TOKENS} --model {{pretrain}}/model --mode gene --occurrences --max-cells 30 "
    "--threads 1 -o {out}/e.parquet",
    "gather": f"gather {{embed}}/e.parquet --cells {CELLS} --name e -o {{out}}/e.h5ad",
    "gather-text": f"gather {{embed}}/e.parquet --cells {CELLS} --name e -o {{out}}/e.csv.gz",
    "gather-genes": "gather-genes {embed-genes}/e.parquet -o {out}/g.parquet",
    "summarize-embeddings": f"summarize-embeddings {{embed}}/e.parquet --cells {CELLS} --by type -o {{out}}/s.parquet",
    "embed-file": "embed-file {in}/raw.h5ad --model {pretrain}/model --no-umap --threads 1 -o {out}/e.h5ad",
    "map": "map {gather}/e.h5ad -o {out}/m.parquet",
    "split": f"split --task cells --cells a={CELLS} --label type --unit donor --folds 2 -o {{out}}/split.json",
    "evaluate": "evaluate --task cells --method e --features embedding --input a={gather}/e.h5ad " + SCORE,
    "evaluate-counts": f"evaluate --task cells --method log --features log_counts --input a={COUNTS} "
    "--vocabulary {vocabulary}/v " + SCORE,
    "split-genes": "split --task genes --labels {in}/labels.csv --label label --positive yes --embeddings "
    "{gather-genes}/g.parquet --folds 2 -o {out}/split.json",
    "evaluate-genes": "evaluate --task genes --split {split-genes}/split.json --method g --features embedding --cells "
    f"a={CELLS} --input a={{gather-genes}}/g.parquet --predictions {{out}}/p.parquet -o {{out}}/score.json",
    "mixing": f"mixing --method e --features embedding --batch donor --label type --cells a={CELLS} "
    "--input a={gather}/e.h5ad -o {out}/mixing.json",
    "summarize": "summarize {evaluate}/score.json -o {out}/b.tsv",
    "report": "report --config {in}/config.yaml --results {in}/results --score {evaluate}/score.json "
    "-o {out}/report.html",
    "provenance": "provenance {in}/run/config.yaml --root {in}/run --results {in}/run/results -o {out}/p.json",
    "compare": "compare {in}/run/results {in}/rerun/results --threads 1 -o {out}/c.json",
}  # fmt: skip


# They compute gradients, or start the threads of jax: neither may be done in a process that is forked later.
ONLY_FORKED = ("pretrain", "finetune", "search", "mixing")


class Chain(NamedTuple):
    """What every command wrote, undisturbed, in a folder of its own."""

    folder: Path

    def words(self, name: str, out: Path, *, inputs: Path | None = None) -> list[str]:
        """The command with its outputs in `out`; it reads what is under `inputs`, a copy of `folder`."""
        at = inputs or self.folder
        places = {each: str(at / each) for each in [*COMMANDS, "in"]}
        return [word.format_map({**places, "out": out}) for word in COMMANDS[name].split()]

    def expected(self, name: str) -> dict[str, int]:
        """Its files and checksums."""
        return contents(self.folder / name)

    def inputs(self, name: str) -> list[Path]:
        """What it names, relative to the folder."""
        words = self.words(name, self.folder / name)
        found = (word.partition("=")[2] if "=" in word else word for word in words)
        there = [Path(word) for word in found if Path(word).exists() and word.startswith(f"{self.folder}/")]
        return [p.relative_to(self.folder) for p in there if not p.is_relative_to(self.folder / name)]


def contents(folder: Path) -> dict[str, int]:
    """Every file under a folder but hidden ones and what lies in hidden folders, with a checksum."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        str(p.relative_to(folder)): zlib.crc32(p.read_bytes())
        for p in found
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    }


def leftovers(folder: Path) -> list[str]:
    """What is there besides results: hidden files and folders, and parts."""
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.name.startswith(".") or p.name.endswith(".parts")
    )


def _first_inputs(folder: Path) -> None:
    folder.mkdir(parents=True)
    vocabulary = make_vocabulary(special="v2", context_length=64)
    rng = np.random.default_rng(1)
    counts = make_counts(N_CELLS)
    types = rng.integers(0, 2, N_CELLS)
    counts[types == 1, 5:15] *= 4
    obs = pd.DataFrame(
        {"type": [f"t{t}" for t in types], "donor": [f"d{i % 6}" for i in range(N_CELLS)]},
        index=pd.Index([f"cell{i}" for i in range(N_CELLS)]),
    )
    var = pd.DataFrame(index=pd.Index(vocabulary.gene_ids.tolist()))
    anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var).write_h5ad(folder / "raw.h5ad")
    pd.DataFrame(counts.T.astype(int), index=var.index, columns=obs.index).to_csv(
        folder / "counts.tsv", sep="\t"
    )
    make_model(folder / "published", vocabulary, num_hidden_layers=1, max_position_embeddings=64)
    labels = pd.DataFrame({"gene_id": vocabulary.gene_ids, "label": ["yes", "no"] * 30})
    labels.to_csv(folder / "labels.csv", index=False)


def _more_inputs(folder: Path, chain: Path) -> None:
    """Those that are made of what commands wrote: a deposit, and the layout of a run for its report."""
    deposit = folder / "deposit"
    deposit.mkdir()
    files = [p for p in (chain / "simulate-deposit/sim/www").rglob("*") if p.is_file()]
    for path in files:
        shutil.copy(path, deposit / path.name)
    symbols = pd.read_csv(deposit / files[0].name, index_col=0).index.astype(str)
    known = make_vocabulary(len(symbols))
    aliases = pa.table({"alias": symbols, "gene_id": known.gene_ids.astype(str)})
    replace(known, symbols=np.array(symbols, dtype=object), alias_source=aliases).save(folder / "known")


def _results(folder: Path, chain: Path) -> None:
    dataset = folder / "results" / "a"
    shutil.copytree(chain / "qc", dataset)
    shutil.copy(chain / "ingest/metadata.parquet", dataset)
    given = {"datasets": {"a": {"path": "raw.h5ad", "label": "type"}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(given))


def _runs(folder: Path) -> None:
    """All that a config asks for, of any content, and the same again."""
    given = {"datasets": {"a": {"path": "raw.h5ad"}}}
    for name in ("config.yaml", "raw.h5ad", *(f"results/{name}" for name in artefacts(config.load(given)))):
        path = folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.name in ("figures", "tables"):
            path.mkdir()
        else:
            path.write_text(name)
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(given))
    shutil.copytree(folder / "run", folder / "rerun")


def build(folder: Path, forks: Forks) -> Chain:
    """Make the inputs and run every command once."""
    _first_inputs(folder / "in")
    chain = Chain(folder)
    for name in COMMANDS:
        (folder / name).mkdir()
        if name == "gene-labels":
            _more_inputs(folder / "in", folder)
        if name == "report":
            _results(folder / "in", folder)
            _runs(folder / "in")
        words = chain.words(name, folder / name)
        ended = forks.run(words, seconds=120) if name in ONLY_FORKED else forks.warm_up(words)
        assert ended.code == 0, (name, ended)
        assert chain.expected(name), name
    return chain


def copies(chain: Chain, name: str, to: Path) -> Iterator[Path]:
    """Copy what a command reads, and tell the files."""
    for path in chain.inputs(name):
        target = to / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if (chain.folder / path).is_dir():
            shutil.copytree(chain.folder / path, target, dirs_exist_ok=True)
        else:
            shutil.copy(chain.folder / path, target)
        yield target
