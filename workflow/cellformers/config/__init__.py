"""The configuration of the workflow: defaults and validation in one place (its texts: `config_docs`)."""

from cellformers.config.benchmarks import Benchmark, CellBenchmark, GeneBenchmark, GeneLabels, Published
from cellformers.config.data import QC, Corpus, Dataset, Labels, Simulate, VocabularySource
from cellformers.config.models import Embedding, Finetune, Lora, Model, Pretrain
from cellformers.config.section import Section
from cellformers.config.whole import METHODS, RANDOM_SUFFIX, Config, load, load_file

__all__ = [
    "METHODS", "QC", "RANDOM_SUFFIX", "Benchmark", "CellBenchmark", "Config", "Corpus", "Dataset",
    "Embedding", "Finetune", "GeneBenchmark", "GeneLabels", "Labels", "Lora", "Model", "Pretrain",
    "Published", "Section", "Simulate", "VocabularySource", "load", "load_file",
]  # fmt: skip
