"""The configuration of the workflow: defaults and validation in one place (its texts: `config_docs`)."""

from cellformers.config.benchmarks import (
    EXTRA_METRICS,
    MAIN_METRICS,
    Benchmark,
    CellBenchmark,
    GeneBenchmark,
    GeneLabels,
    MixingBenchmark,
    Published,
)
from cellformers.config.data import QC, Corpus, Dataset, Labels, Simulate, VocabularySource
from cellformers.config.finetuning import BenchmarkFinetune, Finetune, FinetuneSettings, Lora
from cellformers.config.models import Embedding, Model, Pretrain
from cellformers.config.section import Section
from cellformers.config.whole import FINETUNED_SUFFIX, METHODS, RANDOM_SUFFIX, Config, load, load_file

__all__ = [
    "EXTRA_METRICS", "FINETUNED_SUFFIX", "MAIN_METRICS", "METHODS", "QC", "RANDOM_SUFFIX", "Benchmark",
    "BenchmarkFinetune", "CellBenchmark", "Config", "Corpus", "Dataset", "Embedding", "Finetune",
    "FinetuneSettings", "GeneBenchmark", "GeneLabels", "Labels", "Lora", "MixingBenchmark", "Model", "Pretrain",
    "Published", "Section", "Simulate", "VocabularySource", "load", "load_file",
]  # fmt: skip
