# Registered deposits: fetched and verified; their labels of genes.


rule download_deposit:
    output:
        directory("<results>/deposits/{deposit}"),
    log:
        "<logs>/deposits/{deposit}.log",
    benchmark:
        "<benchmarks>/deposits/{deposit}.tsv"
    # where there is a network: on the machine that Snakemake runs on, into a cache that all runs share
    localrule: True
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(600),
    params:
        revision=REVISIONS["download"],
    shell:
        "cellformers download {wildcards.deposit:q} -o {output:q} > {log:q} 2>&1"


rule gene_labels:
    input:
        deposit="<results>/deposits/{deposit}",
        vocabulary=vocabulary_input,
    output:
        "<results>/labels/{deposit}.{part}.{vocabulary}.csv",
    log:
        "<logs>/labels/{deposit}.{part}.{vocabulary}.log",
    benchmark:
        "<benchmarks>/labels/{deposit}.{part}.{vocabulary}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        revision=REVISIONS["gene-labels"],
        vocabulary=folder_of("vocabulary"),
    shell:
        "cellformers gene-labels {input.deposit:q} --deposit {wildcards.deposit:q} --part {wildcards.part:q} "
        "--vocabulary {params.vocabulary:q} -o {output:q} 2> {log:q}"
