# Everything of a kind that the config asks for.


def all_embeddings():
    return [
        f"<results>/{dataset}/embeddings/{embedding}.h5ad"
        for embedding in CONFIG.embeddings
        for dataset in datasets_of(embedding)
    ]


def all_tokens():
    return [
        f"<results>/{dataset}/tokens/{vocabulary}/{shard}.parquet"
        for dataset in CONFIG.datasets
        for vocabulary in dict.fromkeys([*CONFIG.vocabularies, *map(vocabulary_of, CONFIG.models)])
        for shard in shard_names(dataset)
    ]


def all_columns():
    return [f"<results>/{dataset}/qc/columns.json" for dataset in CONFIG.datasets]


def all_states():
    return [
        f"<results>/{dataset}/embeddings/{embedding}.states.parquet"
        for embedding, spec in CONFIG.embeddings.items()
        for dataset in datasets_of(embedding)
        if spec.states
    ]


def all_predictions():
    return [
        f"<results>/{dataset}/predictions/{model}.parquet"
        for model in models_by("finetune")
        for dataset in CONFIG.models[model].finetune.predict
    ]
