# Inputs and options of the rules that split, fine-tune and score.


def split_inputs(wildcards):
    spec = CONFIG.benchmarks[wildcards.benchmark]
    files = {"cells": [f"<results>/{name}/cells.parquet" for name in spec.datasets]}
    if isinstance(spec, CellBenchmark):
        return files | tokens_needed(wildcards.benchmark) | ({"given": str(spec.split)} if spec.split else {})
    embeddings = benchmark_embeddings(wildcards.benchmark)
    folder = f"<results>/{spec.dataset}"
    genes = {
        "labels": label_table(wildcards.benchmark),
        "embeddings": [f"{folder}/gene_embeddings/{name}.parquet" for name in embeddings],
    }
    if spec.match is None:
        return genes
    counts = [f"{folder}/counts/{shard}.h5ad" for shard in shard_names(spec.dataset)]
    return genes | files | {"counts": counts, "vocabulary": benchmark_vocabulary(wildcards.benchmark)}


def tokens_needed(benchmark):
    """Token shards in the vocabularies of all models of a benchmark: only cells that all of them can read are scored."""
    spec = CONFIG.benchmarks[benchmark]
    vocabularies = dict.fromkeys(vocabulary_of(model) for model in benchmark_models(benchmark))
    files = [
        f"<results>/{d}/tokens/{v}/{s}.parquet"
        for v in vocabularies
        for d in spec.datasets
        for s in shard_names(d)
    ]
    return {"tokens": files}


def named_tokens(input):
    return [f"{Path(path).parts[-4]}={path}" for path in input.get("tokens", [])]


def split_options(wildcards, input):
    spec = CONFIG.benchmarks[wildcards.benchmark]
    shared = {"task": spec.task, "seed": CONFIG.seed, "note": spec.note, "folds": spec.folds}
    if isinstance(spec, CellBenchmark):
        sides = {"train": spec.train, "test": spec.test} if spec.test else {}
        return flags(
            **shared,
            label=spec.label,
            cells=named(spec.datasets, input.cells),
            unit=spec.unit,
            across=spec.across,
            tokens=named_tokens(input),
            given=input.get("given"),
            **sides,
        )
    matching = {}
    if spec.match:
        matching = {
            "match": spec.match,
            "counts": list(input.counts),
            "cells": named(spec.datasets, input.cells),
            "vocabulary": Path(input.vocabulary[0]).parent,
        }
    return flags(
        **shared,
        label=spec.labels.label,
        labels=input.labels,
        gene=spec.labels.gene,
        positive=positive_class(wildcards.benchmark),
        group=group_column(wildcards.benchmark),
        embeddings=list(input.embeddings),
        dataset=spec.dataset,
        **matching,
    )


def evaluate_inputs(wildcards):
    """Cells and labels of the benchmark, and the embeddings, counts or fine-tuned models that the method reads."""
    benchmark, method = wildcards.benchmark, wildcards.method
    spec = CONFIG.benchmarks[benchmark]
    files = {"cells": [f"<results>/{name}/cells.parquet" for name in spec.datasets]}
    features = method_features(benchmark, method)
    if isinstance(spec, MixingBenchmark):
        files |= tokens_needed(benchmark)
    if features == "finetuned":
        return files | {
            "trained": [f"{folder}/training.json" for folder in fold_models(benchmark, method)],
            "predictions": [
                f"{folder}/{name}" for folder in fold_models(benchmark, method) for name in predicted(spec)
            ],
        }
    files["features"] = [path for _, path in method_files(benchmark, method)]
    if features not in ("embedding", "column"):
        files["vocabulary"] = benchmark_vocabulary(benchmark)
    return files


def published_words(number):
    fields = (number.metric, number.value, number.source, number.sd, number.protocol)
    return "|".join("" if field is None else str(field) for field in fields).rstrip("|")


def evaluate_options(wildcards, input):
    benchmark, method = wildcards.benchmark, wildcards.method
    spec = CONFIG.benchmarks[benchmark]
    features = method_features(benchmark, method)
    vocabulary = input.get("vocabulary")
    sources = [name for name, _ in method_files(benchmark, method)]
    options = dict(
        benchmark=benchmark,
        method=method,
        kind=method_kind(method),
        features=features,
        cells=named(spec.datasets, input.cells),
        input=named(sources, input.get("features", [])),
        permute=method == "permuted",
        vocabulary=Path(vocabulary[0]).parent if vocabulary else None,
        published=[published_words(number) for number in spec.published],
    )
    if isinstance(spec, MixingBenchmark):
        about = {
            "tokens": named_tokens(input),
            "batch": spec.batch,
            "label": spec.label,
            "max_cells": spec.max_cells,
            "note": spec.note,
        }
        return flags(**options, **about, seed=CONFIG.seed)
    if features == "finetuned":
        options["fold_model"] = [str(Path(path).parent) for path in input.trained]
    if features == "harmony":
        options["batch"] = spec.batch
    if features == "column":
        options |= {"column": "out_degree", "gene": "gene_id"}
    if features in ("ranks", "counts"):
        options["classifier"] = method.partition("_")[0]
    return flags(**options, task=spec.task)
