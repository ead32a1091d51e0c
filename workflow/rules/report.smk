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
        mem_mb=memory(3000, 0.5),
        runtime=minutes(60),
    params:
        revision=REVISIONS["map"],
        options=flags(seed=CONFIG.seed),
    shell:
        "cellformers map {input:q} {params.options} -o {output:q} 2> {log:q}"


rule config:
    output:
        "<results>/config.yaml",
    log:
        "<logs>/config.log",
    benchmark:
        "<benchmarks>/config.tsv"
    localrule: True
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(500),
        runtime=minutes(5),
    params:
        revision=REVISIONS["report"],
        text=lambda wildcards: resolved_config(),  # as a text, its braces would be wildcards
    shell:
        "printf %s {params.text:q} > {output:q} 2> {log:q}"


rule report:
    input:
        unpack(report_inputs),
        config="<results>/config.yaml",
        scores=all_scores(),
    output:
        page=report(
            "<results>/report.html",
            caption="../report/report.rst",
            category="Report",
            labels={"page": "report"},
        ),
        figures=report(
            directory("<results>/figures"),
            patterns=["{figure}.png"],
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        tables=report(
            directory("<results>/tables"),
            patterns=["{table}.tsv"],
            caption="../report/table.rst",
            category="Scores",
            subcategory="by benchmark",
            labels={"benchmark": "{table}"},
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
        results=subpath(output.page, parent=True),
        scores=score_options,
    shell:
        "cellformers report --config {input.config:q} --results {params.results:q} {params.scores} -o {output.page:q} 2> {log:q}"
