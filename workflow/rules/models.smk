# Models: published weights with their vocabulary, a small model pretrained here, and the same network untrained.


rule import_model:
    input:
        weights=published_model,
        vocabulary=published_model_vocabulary,
    output:
        config="<results>/models/{published}/config.json",
        weights="<results>/models/{published}/model.safetensors",
        vocabulary=[f"<results>/models/{{published}}/vocabulary/{name}" for name in VOCABULARY_FILES],
    log:
        "<logs>/models/{published}/import.log",
    benchmark:
        "<benchmarks>/models/{published}/import.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, 3),
        runtime=minutes(10, 10),
    params:
        revision=REVISIONS["import-model"],
        folder=subpath(output.config, parent=True),
        source=folder_of("weights"),
        vocabulary=folder_of("vocabulary"),
    shell:
        "cellformers import-model {params.source} --vocabulary {params.vocabulary} -o {params.folder} 2> {log}"


rule pretrain:
    input:
        tokens=pretrain_tokens,
        vocabulary=pretrain_vocabulary,
    output:
        config="<results>/models/{pretrained}/config.json",
        weights="<results>/models/{pretrained}/model.safetensors",
        vocabulary=[f"<results>/models/{{pretrained}}/vocabulary/{name}" for name in VOCABULARY_FILES],
        training="<results>/models/{pretrained}/training.json",
        loss="<results>/models/{pretrained}/loss.tsv",
    log:
        "<logs>/models/{pretrained}/pretrain.log",
    benchmark:
        "<benchmarks>/models/{pretrained}/pretrain.tsv"
    conda:
        GPU_ENV
    # one thread: sums in another order give other weights, which must not depend on --cores
    threads: 1
    resources:
        **GPU,
        mem_mb=memory(6000, 10),
        runtime=minutes(240),
    params:
        revision=REVISIONS["pretrain"],
        folder=subpath(output.config, parent=True),
        vocabulary=folder_of("vocabulary"),
        options=pretrain_options,
    shell:
        "cellformers pretrain {input.tokens} --vocabulary {params.vocabulary} {params.options} "
        "--threads {threads} -o {params.folder} 2> {log}"


rule randomize:
    input:
        lambda wildcards: model_files(wildcards.model),
    output:
        config=f"<results>/models/{{model}}{RANDOM_SUFFIX}/config.json",
        weights=f"<results>/models/{{model}}{RANDOM_SUFFIX}/model.safetensors",
        vocabulary=[
            f"<results>/models/{{model}}{RANDOM_SUFFIX}/vocabulary/{name}" for name in VOCABULARY_FILES
        ],
    log:
        "<logs>/models/{model}/randomize.log",
    benchmark:
        "<benchmarks>/models/{model}/randomize.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, 4),
        runtime=minutes(10),
    params:
        revision=REVISIONS["randomize"],
        source=folder_of(0),
        folder=subpath(output.config, parent=True),
        options=flags(seed=CONFIG.seed),
    shell:
        "cellformers randomize {params.source} {params.options} -o {params.folder} 2> {log}"
