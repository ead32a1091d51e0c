# The methods of a benchmark: what each is, and what it reads.


def benchmark_embeddings(benchmark):
    """Embeddings scored in a benchmark: those named, else all that cover its datasets and have not seen their labels."""
    spec = CONFIG.benchmarks[benchmark]
    if spec.embeddings is not None:
        return list(spec.embeddings)
    return [
        name
        for name, embedding in CONFIG.embeddings.items()
        if set(spec.datasets) <= set(datasets_of(name)) and not CONFIG.taught(embedding.model, spec)
    ]


def finetuned_starts(benchmark):
    """The models that are fine-tuned in a benchmark, behind them their twins with random weights."""
    settings = getattr(CONFIG.benchmarks[benchmark], "finetune", None)
    if settings is None:
        return []
    return with_random(settings.models) if settings.untrained else list(settings.models)


def benchmark_methods(benchmark):
    """Every method of a benchmark: embeddings, their random-weights twins, fine-tuned models, baselines, controls."""
    spec = CONFIG.benchmarks[benchmark]
    methods = with_random(benchmark_embeddings(benchmark))
    methods += [name + FINETUNED_SUFFIX for name in finetuned_starts(benchmark)]
    oracle = isinstance(spec, GeneBenchmark) and spec.labels.simulated
    return methods + list(spec.baselines) + ["permuted"] + (["oracle"] if oracle else [])


def method_kind(method):
    if method in ("permuted", "oracle"):
        return {"permuted": "control", "oracle": "oracle"}[method]
    if method.endswith(FINETUNED_SUFFIX):
        return "model" if method.removesuffix(FINETUNED_SUFFIX) in CONFIG.models else "baseline"
    return "model" if method in CONFIG.embeddings else "baseline"


def method_embedding(benchmark, method):
    """The embedding a method reads: its own, the first one for the permuted control, or None."""
    embeddings = benchmark_embeddings(benchmark)
    if method == "permuted":
        return embeddings[0] if embeddings else None
    return method if method.removesuffix(RANDOM_SUFFIX) in embeddings else None


def benchmark_models(benchmark):
    """The models of a benchmark: of its embeddings, and those to be fine-tuned."""
    embeddings = [CONFIG.embeddings[name].model for name in benchmark_embeddings(benchmark)]
    return list(dict.fromkeys([*embeddings, *map(plain_model, finetuned_starts(benchmark))]))


def benchmark_model(benchmark):
    """The first model of a benchmark, whose vocabulary the baselines read."""
    return next(iter(benchmark_models(benchmark)), next(iter(CONFIG.models), None))


def benchmark_vocabulary(benchmark):
    """Maps features of the counts to genes, for the baselines."""
    model = benchmark_model(benchmark)
    return vocabulary_files(vocabulary_of(model)) if model else []


def method_features(benchmark, method):
    """What a method predicts from: the value of --features."""
    if method_embedding(benchmark, method):
        return "embedding"
    if method.endswith(FINETUNED_SUFFIX):
        return "finetuned"
    first, _, last = method.partition("_")
    if first in ("svm", "forest", "logistic") and last in ("ranks", "counts"):
        return last
    spec = CONFIG.benchmarks[benchmark]
    plain = {CellBenchmark: "log_counts", GeneBenchmark: "mean_expression", MixingBenchmark: "pca_hvg"}
    permuted = plain[type(spec)]
    return {"permuted": permuted, "oracle": "column"}.get(method, method)


def method_files(benchmark, method):
    """(dataset, file) of what a method predicts from, besides fine-tuned models."""
    spec = CONFIG.benchmarks[benchmark]
    features, embedding = method_features(benchmark, method), method_embedding(benchmark, method)
    if features == "finetuned":
        return []
    if features == "column":
        return [(spec.dataset, "<results>/simulated/out_degrees.csv")]
    if features == "embedding" and isinstance(spec, GeneBenchmark):
        return [(spec.dataset, f"<results>/{spec.dataset}/gene_embeddings/{embedding}.parquet")]
    if features == "embedding":
        return [(name, f"<results>/{name}/embeddings/{embedding}.h5ad") for name in spec.datasets]
    kind = "counts/{shard}.h5ad"
    if features in ("rank_only", "ranks"):
        kind = f"tokens/{vocabulary_of(benchmark_model(benchmark))}/{{shard}}.parquet"
    return [
        (name, f"<results>/{name}/{kind}".replace("{shard}", shard))
        for name in spec.datasets
        for shard in shard_names(name)
    ]


def fold_models(benchmark, method):
    """The fine-tuned models of a method, in the order of the folds."""
    start = method.removesuffix(FINETUNED_SUFFIX)
    return [
        f"<results>/benchmarks/{benchmark}/finetuned/{start}/fold-{fold}"
        for fold in range(1, FOLDS[benchmark] + 1)
    ]


def number_of_folds(spec):
    """Known before anything runs, so that one job a fold can be planned."""
    if isinstance(spec, CellBenchmark) and spec.split is not None:
        try:
            return len(read_json(spec.split)["folds"])
        except (UserError, KeyError, TypeError) as error:
            raise WorkflowError(f"{spec.split} is no file with a list of folds ({error})") from None
    return 1 if isinstance(spec, CellBenchmark) and spec.test and not spec.across else spec.folds


FOLDS = {
    name: number_of_folds(CONFIG.benchmarks[name]) for name in benchmarks_by(CellBenchmark, GeneBenchmark)
}


def all_scores():
    return [
        f"<results>/benchmarks/{benchmark}/{method}.json"
        for benchmark in CONFIG.benchmarks
        for method in benchmark_methods(benchmark)
    ]
