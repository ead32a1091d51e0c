"""Two tiny models in the published layout under registered names, and the dictionaries they belong to.

Weights are random. The dictionaries have the kinds of entries of the published ones: V1 knows genes by id and
symbol, V2 former symbols as well; V1 has tokens for all its genes, V2 medians for more genes than tokens.
"""

import json
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.io.files import read_json
from cellformers.simulate.deposits.cells import Cells, draw_counts, levels
from cellformers.simulate.deposits.formats import Writer, as_file
from cellformers.simulate.deposits.genome import Genome
from cellformers.vocabulary import SPECIAL_TOKENS

MODELS = {"geneformer-v1-10m": "v1", "geneformer-v2-104m": "v2"}
SIZES = {"num_hidden_layers": 6, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
WITHOUT_TOKEN = {"v1": 20, "v2": 30}  # genes that a dictionary does not know, or has no token for
REFERENCE_CELLS = 300
TYPES = ("Cardiomyocyte", "Fibroblast", "Macrophage", "iPSC", "Vascular endothelial cells")
INITIAL_SD = (
    0.1  # larger than what config.json says, so that outputs of so small a model differ between cells
)


def draw_files(genome: Genome, entries: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Writer]]:
    """A registry of the tiny models, and what writes their files, by URL.

    Parameters
    ----------
    entries
        Content of checkpoints.yaml: where the models are published, and their architectures.

    Returns
    -------
    tuple
        Vocabularies and models as in checkpoints.yaml, sizes and digests not filled in; writers by URL.
    """
    medians = _medians(genome)
    made: dict[str, Any] = {"vocabularies": {}, "models": {}}
    writers: dict[str, Writer] = {}
    for name, series in MODELS.items():
        entry = dict(entries["models"][name])
        vocabulary = entry["vocabulary"]
        words = dict(entries["vocabularies"][vocabulary])
        dictionaries = _dictionaries(genome, medians, series)
        n_tokens = len(dictionaries["token_dictionary"])
        entry["architecture"] = {**entry["architecture"], **SIZES, "vocab_size": n_tokens}
        files, entry["n_parameters"] = _model(entry["architecture"], genome.seed)
        for described, content in (
            (entry, files),
            (words, {f"{kind}_{vocabulary}.pkl": _pickled(table) for kind, table in dictionaries.items()}),
        ):
            described["note"] = "simulated"
            described["files"] = {file: {"size": None, "sha256": None} for file in described["files"]}
            writers |= {url_of(described, file): as_file(content[file]) for file in described["files"]}
        made["vocabularies"][vocabulary], made["models"][name] = words, entry
    return made, writers


def url_of(entry: Mapping[str, Any], file: str) -> str:
    """Where the Hub has a file of an entry."""
    path = "/".join(filter(None, (entry["folder"], file)))
    return f"https://huggingface.co/{entry['repository']}/resolve/{entry['revision']}/{path}"


def _medians(genome: Genome) -> dict[str, float]:
    """Median of the non-zero counts per 10,000 of every gene over cells of several types."""
    rng = genome.rng("checkpoints")
    types = [TYPES[i % len(TYPES)] for i in range(REFERENCE_CELLS)]
    names = [f"reference {i % 6}" for i in range(REFERENCE_CELLS)]
    cells = Cells(states=levels("type", types, 1.0), donors=names, libraries=names, depth=3000.0)
    counts = draw_counts(genome, rng, cells).toarray().astype(float)
    shares = 10_000 * counts / counts.sum(axis=1, keepdims=True)
    found = {}
    for gene, column in zip(genome.gene_ids.tolist(), shares.T, strict=True):
        seen = column[column > 0]
        found[gene] = float(np.median(seen)) if len(seen) else 1.0
    return found


def _dictionaries(genome: Genome, medians: Mapping[str, float], series: str) -> dict[str, dict[str, Any]]:
    """The four published dictionaries of a series."""
    rng = genome.rng("vocabulary", series)
    targets = genome.gene_ids[genome.gene_types == "target"]
    lost = set(rng.choice(targets, size=WITHOUT_TOKEN[series], replace=False).tolist())
    genes = [gene for gene in genome.gene_ids.tolist() if gene not in lost]
    special: Mapping[str, int] = SPECIAL_TOKENS["v1" if series == "v1" else "v2"]
    known = genes if series == "v1" else genome.gene_ids.tolist()
    mapping = {gene: gene for gene in known}
    if series == "v2":
        mapping |= {genome.symbol_of[gene]: gene for gene in known}
        mapping |= {old: gene for gene, old in genome.old_symbols.items()}
    return {
        "token_dictionary": {**special, **{gene: len(special) + i for i, gene in enumerate(genes)}},
        "gene_median_dictionary": {gene: np.float64(medians[gene]) for gene in known},
        "gene_name_id_dict": {genome.symbol_of[gene]: gene for gene in known},
        "ensembl_mapping_dict": mapping,
    }


def _pickled(table: Mapping[str, Any]) -> bytes:
    return pickle.dumps(dict(table), protocol=4)


def _model(architecture: Mapping[str, Any], seed: int) -> tuple[dict[str, bytes], int]:
    """config.json and model.safetensors with random weights; number of parameters."""
    from cellformers.models import checkpoints, layouts
    from cellformers.models.bert_config import Config

    config = Config.from_dict({"model_type": "bert", **architecture})
    model = layouts.random_model(replace(config, initializer_range=INITIAL_SD), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints.save(model, folder)
        weights = (Path(folder) / "model.safetensors").read_bytes()
        content = read_json(Path(folder) / "config.json") | {"initializer_range": config.initializer_range}
    files = {"config.json": (json.dumps(content, indent=2) + "\n").encode(), "model.safetensors": weights}
    return files, sum(parameter.numel() for parameter in model.parameters())
