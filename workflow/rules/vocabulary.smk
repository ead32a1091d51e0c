# Corpus medians and vocabularies: an own corpus, published dictionaries, or what a model folder carries.


rule sketch:
    input:
        counts="<results>/{dataset}/counts/{shard}.h5ad",
        cells="<results>/{dataset}/cells.parquet",
    output:
        "<results>/{dataset}/medians/{shard}.parquet",
    log:
        "<logs>/{dataset}/sketch/{shard}.log",
    benchmark:
        "<benchmarks>/{dataset}/sketch/{shard}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(20, 20),
    params:
        revision=REVISIONS["sketch"],
    shell:
        "cellformers sketch {input.counts:q} --cells {input.cells:q} -o {output:q} 2> {log:q}"


rule medians:
    input:
        sketches=corpus_sketches,
    output:
        "<results>/corpora/{corpus}/medians.parquet",
    log:
        "<logs>/corpora/{corpus}/medians.log",
    benchmark:
        "<benchmarks>/corpora/{corpus}/medians.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(20, 20),
    params:
        revision=REVISIONS["medians"],
    shell:
        "cellformers medians {input.sketches:q} -o {output:q} 2> {log:q}"


rule vocabulary:
    input:
        vocabulary_source,
    output:
        tokens="<results>/vocabularies/{vocabulary}/tokens.parquet",
        aliases="<results>/vocabularies/{vocabulary}/aliases.parquet",
        description="<results>/vocabularies/{vocabulary}/vocabulary.json",
    log:
        "<logs>/vocabularies/{vocabulary}.log",
    benchmark:
        "<benchmarks>/vocabularies/{vocabulary}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(10),
    params:
        revision=REVISIONS["vocabulary"],
        folder=subpath(output.tokens, parent=True),
        options=vocabulary_options,
    shell:
        "cellformers vocabulary --from {input:q} --name {wildcards.vocabulary:q} {params.options} -o {params.folder:q} 2> {log:q}"


rule genes:
    input:
        features="<results>/{dataset}/features.parquet",
        vocabulary=vocabulary_input,
    output:
        "<results>/{dataset}/qc/genes.{vocabulary}.json",
    log:
        "<logs>/{dataset}/genes.{vocabulary}.log",
    benchmark:
        "<benchmarks>/{dataset}/genes.{vocabulary}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(10),
    params:
        revision=REVISIONS["genes"],
        vocabulary=folder_of("vocabulary"),
    shell:
        "cellformers genes {input.features:q} --vocabulary {params.vocabulary:q} -o {output:q} 2> {log:q}"
