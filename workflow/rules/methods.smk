# The methods of a benchmark: what each is, reads, and is called with.


def method_kind(method):
    if method in ("permuted", "oracle"):
        return {"permuted": "control", "oracle": "oracle"}[method]
    return "model" if method in CONFIG.embeddings else "baseline"


def method_embedding(benchmark, method):
    """The embedding a method reads: its own, the first one for the permuted control, or None."""
    embeddings = benchmark_embeddings(benchmark)
    if method == "permuted":
        return embeddings[0] if embeddings else None
    return method if method.removesuffix(RANDOM_SUFFIX) in embeddings else None


def benchmark_datasets(benchmark):
    spec = CONFIG.benchmarks[benchmark]
    return spec.train + (spec.test or []) if isinstance(spec, CellBenchmark) else [spec.dataset]


def benchmark_vocabulary(benchmark):
    """Maps features of the counts to genes, for the baselines."""
    embeddings = benchmark_embeddings(benchmark)
    if embeddings:
        return vocabulary_files(vocabulary_of(CONFIG.embeddings[embeddings[0]].model))
    return []


def label_table(benchmark):
    labels = CONFIG.benchmarks[benchmark].labels
    return "<results>/simulated/gene_labels.csv" if labels.simulated else str(labels.path)


def split_inputs(wildcards):
    spec = CONFIG.benchmarks[wildcards.benchmark]
    if isinstance(spec, CellBenchmark):
        return {
            "cells": [f"<results>/{name}/cells.parquet" for name in benchmark_datasets(wildcards.benchmark)]
        }
    embeddings = benchmark_embeddings(wildcards.benchmark)
    folder = f"<results>/{spec.dataset}"
    return {
        "labels": label_table(wildcards.benchmark),
        "embeddings": [f"{folder}/gene_embeddings/{name}.parquet" for name in embeddings],
    }


def split_options(wildcards, input):
    spec = CONFIG.benchmarks[wildcards.benchmark]
    cells_task = isinstance(spec, CellBenchmark)
    label = spec.label if cells_task else spec.labels.label
    shared = {"task": spec.task, "label": label, "seed": CONFIG.seed, "note": spec.note}
    if cells_task:
        cells = named(benchmark_datasets(wildcards.benchmark), input.cells)
        sides = {"train": spec.train, "test": spec.test} if spec.test else {}
        return flags(**shared, cells=cells, unit=spec.unit, **sides)
    return flags(
        **shared,
        labels=input.labels,
        gene=spec.labels.gene,
        positive=spec.labels.positive,
        # the simulated factors are matched pairs; torn apart, a method without information scores below chance
        group="pair" if spec.labels.simulated else spec.labels.group,
        embeddings=list(input.embeddings),
        dataset=spec.dataset,
    )


def evaluate_inputs(wildcards):
    """Cells and labels of the benchmark, and the embeddings or counts that the method reads."""
    datasets = benchmark_datasets(wildcards.benchmark)
    method = wildcards.method
    embedding = method_embedding(wildcards.benchmark, method)
    genes = not isinstance(CONFIG.benchmarks[wildcards.benchmark], CellBenchmark)
    files = {"cells": [f"<results>/{name}/cells.parquet" for name in datasets]}
    if method == "oracle":
        files["features"] = ["<results>/simulated/out_degrees.csv"]
    elif embedding and genes:
        files["features"] = [f"<results>/{datasets[0]}/gene_embeddings/{embedding}.parquet"]
    elif embedding:
        files["features"] = [f"<results>/{name}/embeddings/{embedding}.h5ad" for name in datasets]
    else:
        shards = [(name, shard) for name in datasets for shard in shard_names(name)]
        files["features"] = [f"<results>/{name}/counts/{shard}.h5ad" for name, shard in shards]
        files["vocabulary"] = benchmark_vocabulary(wildcards.benchmark)
    return files


def evaluate_options(wildcards, input):
    spec = CONFIG.benchmarks[wildcards.benchmark]
    datasets = benchmark_datasets(wildcards.benchmark)
    method = wildcards.method
    embedding = method_embedding(wildcards.benchmark, method)
    features = (
        "embedding" if embedding else {"permuted": "log_counts", "oracle": "column"}.get(method, method)
    )
    sources = (
        datasets
        if embedding or method == "oracle"
        else [name for name in datasets for _ in shard_names(name)]
    )
    vocabulary = input.get("vocabulary")
    return flags(
        task=spec.task,
        benchmark=wildcards.benchmark,
        method=method,
        kind=method_kind(method),
        features=features,
        cells=named(datasets, input.cells),
        input=named(sources, input.features),
        permute=method == "permuted",
        column="out_degree" if method == "oracle" else None,
        gene="gene_id" if method == "oracle" else None,
        vocabulary=Path(vocabulary[0]).parent if vocabulary else None,
        published=[f"{p.metric}|{p.value}|{p.source}" for p in spec.published],
    )


def all_scores():
    return [
        f"<results>/benchmarks/{benchmark}/{method}.json"
        for benchmark in CONFIG.benchmarks
        for method in benchmark_methods(benchmark)
    ]
