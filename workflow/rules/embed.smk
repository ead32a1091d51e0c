# Embeddings of cells and of genes, shard by shard, one GPU a job where the config asks for GPUs.


rule embed_cells:
    input:
        tokens=embedding_tokens,
        model=embedding_model,
    output:
        "<results>/{dataset}/embeddings/{embedding}/{shard}.parquet",
    log:
        "<logs>/{dataset}/embeddings/{embedding}/{shard}.log",
    benchmark:
        "<benchmarks>/{dataset}/embeddings/{embedding}/{shard}.tsv"
    conda:
        GPU_ENV
    threads: 2
    resources:
        **GPU,
        mem_mb=memory(4000, 5),
        runtime=minutes(120, 600),
    params:
        revision=REVISIONS["embed"],
        model=folder_of("model"),
        options=embed_options,
    shell:
        "cellformers embed {input.tokens:q} --model {params.model:q} {params.options} "
        "--threads {threads} -o {output:q} 2> {log:q}"


rule gather:
    input:
        shards=per_shard("<results>/{dataset}/embeddings/{embedding}/{shard}.parquet"),
        cells="<results>/{dataset}/cells.parquet",
    output:
        "<results>/{dataset}/embeddings/{embedding}.h5ad",
    log:
        "<logs>/{dataset}/embeddings/{embedding}.log",
    benchmark:
        "<benchmarks>/{dataset}/embeddings/{embedding}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, 0.5),
        runtime=minutes(20, 20),
    params:
        revision=REVISIONS["gather"],
    shell:
        "cellformers gather {input.shards:q} --cells {input.cells:q} --name {wildcards.embedding:q} -o {output:q} 2> {log:q}"


rule states:
    input:
        shards=per_shard("<results>/{dataset}/embeddings/{embedding}/{shard}.parquet"),
        cells="<results>/{dataset}/cells.parquet",
    output:
        "<results>/{dataset}/embeddings/{embedding}.states.parquet",
    log:
        "<logs>/{dataset}/embeddings/{embedding}.states.log",
    benchmark:
        "<benchmarks>/{dataset}/embeddings/{embedding}.states.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(20, 20),
    params:
        revision=REVISIONS["summarize-embeddings"],
        options=lambda wildcards: flags(by=embedding_spec(wildcards.embedding).states),
    shell:
        "cellformers summarize-embeddings {input.shards:q} --cells {input.cells:q} {params.options} -o {output:q} 2> {log:q}"


rule embed_genes:
    input:
        tokens=embedding_tokens,
        model=embedding_model,
    output:
        "<results>/{dataset}/gene_embeddings/{embedding}/{shard}.parquet",
    log:
        "<logs>/{dataset}/gene_embeddings/{embedding}/{shard}.log",
    benchmark:
        "<benchmarks>/{dataset}/gene_embeddings/{embedding}/{shard}.tsv"
    conda:
        GPU_ENV
    threads: 2
    resources:
        **GPU,
        mem_mb=memory(4000, 5),
        runtime=minutes(120, 600),
    params:
        revision=REVISIONS["embed"],
        model=folder_of("model"),
        options=gene_embed_options,
    shell:
        "cellformers embed {input.tokens:q} --mode gene --model {params.model:q} {params.options} "
        "--threads {threads} -o {output:q} 2> {log:q}"


rule gather_genes:
    input:
        shards=per_shard("<results>/{dataset}/gene_embeddings/{embedding}/{shard}.parquet"),
    output:
        "<results>/{dataset}/gene_embeddings/{embedding}.parquet",
    log:
        "<logs>/{dataset}/gene_embeddings/{embedding}.log",
    benchmark:
        "<benchmarks>/{dataset}/gene_embeddings/{embedding}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, 3),
        runtime=minutes(20),
    params:
        revision=REVISIONS["gather"],
    shell:
        "cellformers gather-genes {input.shards:q} -o {output:q} 2> {log:q}"
