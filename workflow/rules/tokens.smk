# Counts shards to ranked genes.


rule tokenize:
    input:
        counts="<results>/{dataset}/counts/{shard}.h5ad",
        cells="<results>/{dataset}/cells.parquet",
        vocabulary=vocabulary_input,
        # the mapping is judged over the whole dataset, whatever the number of shards
        genes="<results>/{dataset}/qc/genes.{vocabulary}.json",
    output:
        "<results>/{dataset}/tokens/{vocabulary}/{shard}.parquet",
    log:
        "<logs>/{dataset}/tokens/{vocabulary}/{shard}.log",
    benchmark:
        "<benchmarks>/{dataset}/tokens/{vocabulary}/{shard}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(1500),
        runtime=minutes(10, 10),
    params:
        revision=REVISIONS["tokenize"],
        vocabulary=folder_of("vocabulary"),
    shell:
        "cellformers tokenize {input.counts:q} --cells {input.cells:q} --vocabulary {params.vocabulary:q} "
        "--threads {threads} -o {output:q} 2> {log:q}"
