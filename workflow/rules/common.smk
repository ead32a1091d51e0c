# The validated config, and the functions that turn its names into file names.
import re
import warnings
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError

from cellformers.config import FINETUNED_SUFFIX, METHODS, RANDOM_SUFFIX
from cellformers.config import CellBenchmark, GeneBenchmark, MixingBenchmark
from cellformers.config import load as load_config
from cellformers.deposits import read_deposit
from cellformers.errors import UserError
from cellformers.io.files import read_json
from cellformers.io.samples import read_sample_table
from cellformers.revisions import REVISIONS

try:
    CONFIG = load_config({k: v for k, v in config.items() if k != "pathvars"})
except UserError as error:
    raise WorkflowError(str(error)) from None

# Unset on a CPU: some executors take the mere presence of a GPU resource, even 0, for a request.
GPU_ENV = "../../envs/gpu.yaml" if CONFIG.accelerator == "cuda" else "../../envs/cpu.yaml"
GPU = {"gpu": 1, "gpu_manufacturer": "nvidia"} if CONFIG.accelerator == "cuda" else {}
# On a CPU sums in another order would give other weights, which must not depend on --cores; beside a GPU the second
# thread prepares batches.
TRAINING_THREADS = 2 if CONFIG.accelerator == "cuda" else 1
VOCABULARY_FILES = ["tokens.parquet", "aliases.parquet", "vocabulary.json"]
MODEL_FILES = [
    "config.json",
    "model.safetensors",
    *(f"vocabulary/{name}" for name in VOCABULARY_FILES),
]


def one_of(names):
    """A regular expression that matches these names, or nothing where there are none."""
    return "|".join(map(re.escape, names)) or "(?!)"


def models_by(origin):
    """Names of the models that come from a checkpoint, a path, pretrain or finetune."""
    return [name for name, model in CONFIG.models.items() if getattr(model, origin)]


def with_random(names):
    """The names, and those of their twins with random weights."""
    return [*names, *(name + RANDOM_SUFFIX for name in names)]


def benchmarks_by(*kinds):
    """Names of the benchmarks of some kinds."""
    return [name for name, spec in CONFIG.benchmarks.items() if isinstance(spec, kinds)]


wildcard_constraints:
    dataset=one_of(CONFIG.datasets),
    corpus=one_of(CONFIG.corpora),
    vocabulary=one_of([*CONFIG.vocabularies, *map(CONFIG.vocabulary_of, CONFIG.models)]),
    model=one_of(CONFIG.models),
    checkpoint=one_of(models_by("checkpoint")),
    published=one_of(models_by("path")),
    pretrained=one_of(models_by("pretrain")),
    finetuned=one_of(models_by("finetune")),
    start=one_of(with_random(CONFIG.models)),
    embedding=one_of(with_random(CONFIG.embeddings)),
    benchmark=one_of(CONFIG.benchmarks),
    method=one_of(
        [
            *with_random(CONFIG.embeddings),
            *(name + FINETUNED_SUFFIX for name in with_random(CONFIG.models)),
            *METHODS,
        ]
    ),
    shard=r"\d{4}-of-\d{4}",
    fold=r"[1-9]\d*",


def shard_names(dataset):
    """The shards of a dataset, e.g. 0001-of-0002: known before anything runs."""
    total = CONFIG.datasets[dataset].shards
    return [f"{number:04d}-of-{total:04d}" for number in range(1, total + 1)]


def per_shard(pattern):
    """An input function: the pattern for every shard of the wildcard `dataset`."""

    def paths(wildcards):
        return [pattern.replace("{shard}", shard) for shard in shard_names(wildcards.dataset)]

    return paths


def dataset_files(name):
    """The raw files of a dataset, as inputs of its ingest."""
    dataset = CONFIG.datasets[name]
    if dataset.simulated:
        file = {"atlas": "atlas.h5ad", "second": "second.loom"}[dataset.simulated]
        return [f"<results>/simulated/{file}"]
    if dataset.deposit:
        return [f"<results>/deposits/{dataset.deposit}"]
    if dataset.path:
        return [str(dataset.path)]
    try:
        return [row["path"] for row in read_sample_table(dataset.samples)]
    except UserError as error:
        raise WorkflowError(str(error)) from None


def plain_model(model):
    """The configured model behind a model or its random-weights twin."""
    return model.removesuffix(RANDOM_SUFFIX)


def embedding_spec(embedding):
    """Model and options of an embedding; `NAME-random` is NAME under random weights."""
    plain = embedding.removesuffix(RANDOM_SUFFIX)
    spec = CONFIG.embeddings[plain]
    suffix = RANDOM_SUFFIX if embedding != plain else ""
    return spec.model_copy(update={"model": spec.model + suffix})


def vocabulary_of(model):
    """Name of the vocabulary a model reads."""
    return CONFIG.vocabulary_of(plain_model(model))


def model_files(model):
    return [f"<results>/models/{model}/{name}" for name in MODEL_FILES]


def vocabulary_files(vocabulary):
    """A vocabulary made here, or the one that came with the first checkpoint that reads it."""
    folder = f"<results>/vocabularies/{vocabulary}"
    if vocabulary not in CONFIG.vocabularies:
        bringing = [name for name in models_by("checkpoint") if vocabulary_of(name) == vocabulary]
        folder = f"<results>/models/{bringing[0]}/vocabulary" if bringing else folder
    return [f"{folder}/{name}" for name in VOCABULARY_FILES]


def datasets_of(embedding):
    scope = CONFIG.embeddings[embedding.removesuffix(RANDOM_SUFFIX)].datasets
    return list(CONFIG.datasets) if scope is None else scope
