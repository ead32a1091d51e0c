# Input and parameter functions of the rules: what a rule reads, and the flags it passes on.


def ingest_source(wildcards, input):
    """What ingest reads: the sample table where there is one, else the one raw file."""
    return f"--samples {shlex.quote(input.samples)}" if input.get("samples") else shlex.quote(input.raw[0])


def doublet_scores(wildcards):
    """The doublet scores of a dataset whose QC asks for them."""
    wanted = CONFIG.datasets[wildcards.dataset].qc.doublets
    return [f"<results>/{wildcards.dataset}/qc/doublets.parquet"] if wanted else []


def doublet_options(wildcards):
    return flags(batch=CONFIG.datasets[wildcards.dataset].batch, seed=CONFIG.seed)


def qc_settings(wildcards):
    """What of the config QC depends on: Snakemake re-runs a job for its params only if they don't take `input`."""
    dataset = CONFIG.datasets[wildcards.dataset]
    drawn = f"{dataset.max_cells} seed={CONFIG.seed}" if dataset.max_cells else ""
    return f"{dataset.qc.model_dump_json()} {dataset.where} {drawn}"


def benchmark_settings(*apart):
    """What of the config a job of a benchmark depends on, but for `apart` and what only the report shows."""
    shown = {"question", "protocol", "new", "citation", "baselines", "embeddings", *apart}

    def settings(wildcards):
        spec = CONFIG.benchmarks[wildcards.benchmark]
        return f"{spec.model_dump_json(exclude=shown)} seed={CONFIG.seed}"

    return settings


def needed_columns(wildcards):
    """The metadata columns that the config names for a dataset."""
    dataset = CONFIG.datasets[wildcards.dataset]
    columns = [dataset.label, dataset.batch, *dataset.where, *needed_by_finetuning(wildcards.dataset)]
    columns += [s.states for name, s in CONFIG.embeddings.items() if wildcards.dataset in datasets_of(name)]
    for spec in CONFIG.benchmarks.values():
        if not isinstance(spec, GeneBenchmark) and wildcards.dataset in spec.datasets:
            columns += [spec.label, getattr(spec, "unit", None)]
            columns += [spec.batch] if spec.batch != "dataset" else []
    return flags(column=[name for name in dict.fromkeys(columns) if name])


def qc_options(wildcards, input):
    dataset = CONFIG.datasets[wildcards.dataset]
    qc = dataset.qc
    return flags(
        where=[f"{column}={value}" for column, values in dataset.where.items() for value in values],
        max_cells=dataset.max_cells,
        seed=CONFIG.seed if dataset.max_cells else None,
        method=qc.method,
        n_sd=qc.n_sd,
        min_genes=qc.min_genes,
        min_counts=qc.min_counts,
        max_counts=qc.max_counts,
        max_genes=qc.max_genes,
        max_mito_fraction=qc.max_mito_fraction,
        doublets=input.doublets or None,
    )


def corpus_sketches(wildcards):
    return [
        f"<results>/{dataset}/medians/{shard}.parquet"
        for dataset in CONFIG.corpora[wildcards.corpus].datasets
        for shard in shard_names(dataset)
    ]


def vocabulary_source(wildcards):
    """Where a vocabulary is made from: own medians, published dictionaries, or the folder of a model."""
    source = CONFIG.vocabularies.get(wildcards.vocabulary)
    if source is None:
        return str(CONFIG.models[wildcards.vocabulary].path / "vocabulary")
    if source.corpus:
        return f"<results>/corpora/{source.corpus}/medians.parquet"
    return str(source.published)


def vocabulary_options(wildcards):
    source = CONFIG.vocabularies.get(wildcards.vocabulary)
    if source is None or source.corpus is None:
        return ""
    return flags(special_tokens=source.special_tokens, context_length=source.context_length)


def vocabulary_input(wildcards):
    return vocabulary_files(wildcards.vocabulary)


def download_options(wildcards):
    spec = CONFIG.models[wildcards.checkpoint]
    return f"{shlex.quote(spec.checkpoint)} {flags(revision=spec.revision)}"


def published_model(wildcards):
    folder = CONFIG.models[wildcards.published].path
    kinds = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    there = [name for name in kinds if (folder / name).is_file()]
    return [str(folder / name) for name in ("config.json", *(there or kinds)[:1])]


def published_model_vocabulary(wildcards):
    return vocabulary_files(vocabulary_of(wildcards.published))


def embedding_tokens(wildcards):
    vocabulary = vocabulary_of(embedding_spec(wildcards.embedding).model)
    return f"<results>/{wildcards.dataset}/tokens/{vocabulary}/{wildcards.shard}.parquet"


def embedding_model(wildcards):
    return model_files(embedding_spec(wildcards.embedding).model)


def embed_options(wildcards):
    spec = embedding_spec(wildcards.embedding)
    return flags(
        mode=spec.mode,
        layer=spec.layer,
        dtype=spec.dtype,
        backend=spec.backend,
        accelerator=CONFIG.accelerator,
    )


def gene_embed_options(wildcards):
    spec = embedding_spec(wildcards.embedding)
    return flags(layer=spec.layer, dtype=spec.dtype, backend=spec.backend, accelerator=CONFIG.accelerator)
