# Maps of the cells, and the report.


rule map:
    input:
        "<results>/{dataset}/embeddings/{embedding}.h5ad",
    output:
        "<results>/{dataset}/embeddings/{embedding}.map.parquet",
    log:
        "<logs>/{dataset}/embeddings/{embedding}.map.log",
    benchmark:
        "<benchmarks>/{dataset}/embeddings/{embedding}.map.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, 4),
        runtime=minutes(60),
    params:
        revision=REVISIONS["map"],
        options=flags(seed=CONFIG.seed),
    shell:
        "cellformers map {input} {params.options} -o {output} 2> {log}"


rule report:
    input:
        unpack(report_inputs),
    output:
        report(
            "<results>/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"page": "report"},
        ),
    log:
        "<logs>/report.log",
    benchmark:
        "<benchmarks>/report.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000),
        runtime=minutes(20),
    params:
        revision=REVISIONS["report"],
        options="",
    shell:
        "cellformers report {params.options} -o {output} 2> {log}"
