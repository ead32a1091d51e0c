# Models that are there: a registered checkpoint, a folder of published weights, the same network untrained.


rule download:
    output:
        config="<results>/models/{checkpoint}/config.json",
        weights="<results>/models/{checkpoint}/model.safetensors",
        vocabulary=[f"<results>/models/{{checkpoint}}/vocabulary/{name}" for name in VOCABULARY_FILES],
    log:
        "<logs>/models/{checkpoint}/download.log",
    benchmark:
        "<benchmarks>/models/{checkpoint}/download.tsv"
    # where there is a network: on the machine that Snakemake runs on, into a cache that all runs share
    localrule: True
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000),
        runtime=minutes(120),
    params:
        revision=REVISIONS["download"],
        folder=subpath(output.config, parent=True),
        options=download_options,
    shell:
        "cellformers download {params.options} -o {params.folder:q} > {log:q} 2>&1"


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
        "cellformers import-model {params.source:q} --vocabulary {params.vocabulary:q} -o {params.folder:q} 2> {log:q}"


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
        "cellformers randomize {params.source:q} {params.options} -o {params.folder:q} 2> {log:q}"


rule verify:
    input:
        lambda wildcards: model_files(wildcards.model),
    output:
        "<results>/models/{model}.verify.json",
    log:
        "<logs>/models/{model}/verify.log",
    benchmark:
        "<benchmarks>/models/{model}/verify.tsv"
    conda:
        GPU_ENV
    threads: 2
    resources:
        **GPU,
        mem_mb=memory(6000, 8),
        runtime=minutes(60),
    params:
        revision=REVISIONS["verify"],
        model=folder_of(0),
        options=flags(seed=CONFIG.seed, accelerator=CONFIG.accelerator),
    shell:
        "cellformers verify {params.model:q} {params.options} --threads {threads} -o {output:q} > {log:q} 2>&1"
