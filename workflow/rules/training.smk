# Training: pretraining on masked genes, fine-tuning on labels, and what a fine-tuned model says of other cells.


rule pretrain_model:
    input:
        tokens=pretrain_tokens,
        vocabulary=pretrain_vocabulary,
        start=pretrain_start,
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
    threads: TRAINING_THREADS
    resources:
        **GPU,
        mem_mb=memory(6000, 10),
        runtime=minutes(240),
    params:
        revision=REVISIONS["pretrain"],
        launcher=launcher,
        folder=subpath(output.config, parent=True),
        vocabulary=folder_of("vocabulary"),
        start=start_option,
        options=pretrain_options,
    shell:
        "{params.launcher}cellformers pretrain {input.tokens:q} --vocabulary {params.vocabulary:q} {params.start} "
        "{params.options} --threads {threads} -o {params.folder:q} 2> {log:q}"


rule finetune_model:
    input:
        unpack(finetune_inputs),
    output:
        config="<results>/models/{finetuned}/config.json",
        weights="<results>/models/{finetuned}/model.safetensors",
        vocabulary=[f"<results>/models/{{finetuned}}/vocabulary/{name}" for name in VOCABULARY_FILES],
        training="<results>/models/{finetuned}/training.json",
        loss="<results>/models/{finetuned}/loss.tsv",
        split="<results>/models/{finetuned}/split.json",
        predictions="<results>/models/{finetuned}/predictions.parquet",
    log:
        "<logs>/models/{finetuned}/finetune.log",
    benchmark:
        "<benchmarks>/models/{finetuned}/finetune.tsv"
    conda:
        GPU_ENV
    threads: TRAINING_THREADS
    resources:
        **GPU,
        mem_mb=memory(6000, 10),
        runtime=minutes(480),
    params:
        revision=REVISIONS["finetune"],
        launcher=launcher,
        folder=subpath(output.config, parent=True),
        model=folder_of("model"),
        sources=finetune_sources,
        options=finetune_options,
    shell:
        "{params.launcher}cellformers finetune {params.sources} --model {params.model:q} {params.options} "
        "--threads {threads} -o {params.folder:q} 2> {log:q}"


rule predict:
    input:
        tokens=predict_tokens,
        model=lambda wildcards: model_files(wildcards.finetuned),
    output:
        "<results>/{dataset}/predictions/{finetuned}.parquet",
    log:
        "<logs>/{dataset}/predictions/{finetuned}.log",
    benchmark:
        "<benchmarks>/{dataset}/predictions/{finetuned}.tsv"
    conda:
        GPU_ENV
    threads: 2
    resources:
        **GPU,
        mem_mb=memory(4000, 5),
        runtime=minutes(120, 600),
    params:
        revision=REVISIONS["predict"],
        model=folder_of("model"),
        options=flags(accelerator=CONFIG.accelerator),
    shell:
        "cellformers predict {input.tokens:q} --model {params.model:q} {params.options} "
        "--threads {threads} -o {output:q} 2> {log:q}"
