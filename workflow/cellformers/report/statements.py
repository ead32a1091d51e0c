"""What a reader must know of a benchmark before its scores: how it was asked, and what a model has seen of its cells.

A model has seen cells if they were in its pretraining corpus, with or without labels. Of models pretrained in the run
the config knows; of published ones the registry of deposits says yes, no or unknown, with the source.
"""

from collections.abc import Sequence
from typing import Any

from cellformers.config import Benchmark, Config, GeneBenchmark, MixingBenchmark
from cellformers.deposits import read_deposit

UNKNOWN = {"contains": "unknown", "source": "not stated where the model comes from"}
OWN_FILE = {"contains": "unknown", "source": "the dataset is not a registered deposit"}


def statements(config: Config) -> dict[str, dict[str, Any]]:
    """By benchmark: question, protocol, new, citation (of the task and of the deposits), pretraining.

    `pretraining` has an entry for every dataset and model: dataset, model, contains (yes, no, unknown) and source.
    """
    return {name: _statement(config, spec) for name, spec in config.benchmarks.items()}


def _statement(config: Config, spec: Benchmark) -> dict[str, Any]:
    names = [config.datasets[name].deposit for name in spec.datasets]
    names += [spec.labels.deposit] if isinstance(spec, GeneBenchmark) else []
    deposits = dict.fromkeys(name for name in names if name is not None)
    cited = [spec.citation, *(read_deposit(name).citation for name in deposits)]
    return {
        "question": spec.question,
        "protocol": spec.protocol,
        "new": spec.new,
        "citation": [text for text in dict.fromkeys(cited) if text],
        "pretraining": [
            {"dataset": dataset, "model": model, **seen(config, model, dataset)}
            for dataset in spec.datasets
            for model in _models(config, spec)
        ],
    }


def _models(config: Config, spec: Benchmark) -> Sequence[str]:
    """The models of a benchmark: of its embeddings, and those fine-tuned in it."""
    embeddings = config.embeddings if spec.embeddings is None else spec.embeddings
    models = [config.embeddings[name].model for name in embeddings]
    if not isinstance(spec, MixingBenchmark) and spec.finetune is not None:
        models += spec.finetune.models
    return [name for name in dict.fromkeys(models) if not config.taught(name, spec)]


def seen(config: Config, model: str, dataset: str) -> dict[str, str]:
    """Whether the pretraining of a model may have contained the cells of a dataset: contains and source."""
    line = config.lineage(model)
    trained: list[str] = []
    for name in line:
        spec = config.models[name].pretrain
        if spec is not None:
            trained += spec.datasets or list(config.datasets)
    if dataset in trained:
        return {"contains": "yes", "source": "pretrained in this run on these cells, without their labels"}
    origin = config.models[line[-1]]
    if origin.pretrain is not None:
        return {"contains": "no", "source": f"pretrained in this run on {', '.join(dict.fromkeys(trained))}"}
    if origin.checkpoint is None:
        return UNKNOWN
    deposit = config.datasets[dataset].deposit
    if deposit is None:
        return OWN_FILE
    known = read_deposit(deposit).pretraining.get(config.vocabulary_of(model))
    return UNKNOWN if known is None else {"contains": known.contains, "source": known.source}
