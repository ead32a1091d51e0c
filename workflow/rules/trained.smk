# Input and parameter functions of the rules that train, and of those that use what was trained.


# The processes of a machine meet by a file: a store of torch's own would listen on all networks and take orders unasked.
TORCHRUN = (
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --rdzv-conf store_type=file "
    "--rdzv-endpoint $(mktemp) --local-addr 127.0.0.1 --no-python --nproc-per-node "
)

# For the launcher Snakemake looks up resources while it plans, where sizes of inputs are not to be had; it takes that in
# its stride, but leaves a coroutine behind. They are looked up again before the job runs.
warnings.filterwarnings("ignore", "coroutine 'InputFiles._predicated_size_files", RuntimeWarning)


def launcher(wildcards, resources):
    """What stands before a command that trains: torchrun where several GPUs are asked for, a process for each."""
    n = resources.get("gpu") if CONFIG.accelerator == "cuda" else None
    return f"{TORCHRUN}{n} " if isinstance(n, int) and n > 1 else ""


def tokens_of(datasets, model):
    """Token shards of datasets in the vocabulary of a model, in order."""
    return [
        f"<results>/{dataset}/tokens/{vocabulary_of(model)}/{shard}.parquet"
        for dataset in datasets
        for shard in shard_names(dataset)
    ]


def pretrain_tokens(wildcards):
    spec = CONFIG.models[wildcards.pretrained].pretrain
    return tokens_of(spec.datasets or CONFIG.datasets, wildcards.pretrained)


def pretrain_vocabulary(wildcards):
    return vocabulary_files(vocabulary_of(wildcards.pretrained))


def pretrain_start(wildcards):
    start = CONFIG.models[wildcards.pretrained].pretrain.continue_from
    return model_files(start) if start else []


def start_option(wildcards, input):
    return flags(**{"from": Path(input.start[0]).parent}) if input.start else ""


def pretrain_options(wildcards):
    options = CONFIG.models[wildcards.pretrained].pretrain.model_dump(exclude={"datasets", "continue_from"})
    return flags(**options, accelerator=CONFIG.accelerator)


def finetune_inputs(wildcards):
    spec = CONFIG.models[wildcards.finetuned].finetune
    labels = [f"<results>/{dataset}/cells.parquet" for dataset in spec.datasets]
    if spec.task == "genes":
        labels = ["<results>/simulated/gene_labels.csv" if spec.simulated else str(spec.labels)]
    return {
        "tokens": tokens_of(spec.datasets, wildcards.finetuned),
        "labels": labels,
        "model": model_files(spec.model),
    }


def needed_by_finetuning(dataset):
    """The metadata columns that fine-tuning on a dataset reads."""
    specs = [CONFIG.models[name].finetune for name in models_by("finetune")]
    used = [spec for spec in specs if dataset in spec.datasets and spec.task != "genes"]
    labels = [spec.label if isinstance(spec.label, list) else [spec.label] for spec in used]
    return [name for names in labels for name in names] + [
        name for spec in used for name in (spec.unit, spec.split_column)
    ]


def sources_of(datasets, input):
    """Tokens and labels; of several datasets with their names in front."""
    tokens, labels = list(input.tokens), list(input.labels)
    if len(datasets) > 1:
        owners = [name for name in datasets for _ in shard_names(name)]
        tokens = named(owners, tokens)
        labels = named(datasets, labels) if len(labels) == len(datasets) else labels
    return f"{shlex.join(tokens)} {flags(labels=labels)}"


def finetune_sources(wildcards, input):
    return sources_of(CONFIG.models[wildcards.finetuned].finetune.datasets, input)


def finetune_settings(spec, apart):
    """The options of a fine-tuning but for those in `apart`."""
    options = spec.model_dump(exclude={*apart, "lora"}) | {"accelerator": CONFIG.accelerator}
    if spec.lora:
        adapter = spec.lora.model_dump(exclude={"dropout"})
        options |= {"lora": True, **adapter, "lora_dropout": spec.lora.dropout}
    return options


def finetune_options(wildcards):
    spec = CONFIG.models[wildcards.finetuned].finetune
    options = finetune_settings(spec, {"model", "datasets", "label", "labels", "simulated", "predict"})
    options["label"] = spec.label if spec.label is None or isinstance(spec.label, list) else [spec.label]
    if spec.simulated and spec.unit is None:
        options["unit"] = "pair"  # the simulated factors are matched pairs
    return flags(**options)


def predict_tokens(wildcards):
    return tokens_of([wildcards.dataset], wildcards.finetuned)


def predicted(spec):
    """What a fine-tuning predicts: of genes also in every cell."""
    genes = spec is GeneBenchmark or isinstance(spec, GeneBenchmark)
    return ["predictions.parquet", *(["predictions_pooled.parquet"] if genes else [])]


def fold_outputs(kind):
    """The files of a fine-tuning in a benchmark; the weights of a fold are of no further use."""
    folder = "<results>/benchmarks/{benchmark}/finetuned/{start}/fold-{fold}"
    names = {"training": "training.json", "loss": "loss.tsv", "sides": "split.json"}
    return {
        "weights": temp(f"{folder}/model.safetensors"),
        **{key: f"{folder}/{name}" for key, name in names.items()},
        "predictions": [f"{folder}/{name}" for name in predicted(kind)],
    }


def fold_inputs(wildcards):
    """What a fine-tuning under a split of a benchmark reads."""
    benchmark, start = wildcards.benchmark, wildcards.start
    spec = CONFIG.benchmarks[benchmark]
    labels = [f"<results>/{name}/cells.parquet" for name in spec.datasets]
    if isinstance(spec, GeneBenchmark):
        # the split holds the classes of its genes, and no other gene may be trained on
        labels = [f"<results>/benchmarks/{benchmark}/split.json"]
    return {"tokens": tokens_of(spec.datasets, start), "labels": labels, "model": model_files(start)}


def fold_sources(wildcards, input):
    return sources_of(CONFIG.benchmarks[wildcards.benchmark].datasets, input)


def fold_options(wildcards):
    spec = CONFIG.benchmarks[wildcards.benchmark]
    genes = isinstance(spec, GeneBenchmark)
    options = finetune_settings(spec.finetune, {"models", "untrained"})
    if wildcards.start.endswith(RANDOM_SUFFIX):
        options["freeze_layers"] = 0  # random layers that can't learn would be no fair chance
    options |= {"unit": None if genes else spec.unit, "label": (spec.labels if genes else spec).label}
    return flags(task=spec.task, fold=int(wildcards.fold), **options)
