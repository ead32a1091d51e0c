# Quality control: measures, thresholds, and the table of cells.


rule qc_metrics:
    input:
        "<results>/{dataset}/counts/{shard}.h5ad",
    output:
        "<results>/{dataset}/qc/metrics/{shard}.parquet",
    log:
        "<logs>/{dataset}/qc_metrics/{shard}.log",
    benchmark:
        "<benchmarks>/{dataset}/qc_metrics/{shard}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500),
        runtime=minutes(10, 10),
    params:
        revision=REVISIONS["qc"],
    shell:
        "cellformers qc-metrics {input:q} -o {output:q} 2> {log:q}"


rule doublets:
    input:
        counts=per_shard("<results>/{dataset}/counts/{shard}.h5ad"),
        metadata="<results>/{dataset}/metadata.parquet",
    output:
        "<results>/{dataset}/qc/doublets.parquet",
    log:
        "<logs>/{dataset}/doublets.log",
    benchmark:
        "<benchmarks>/{dataset}/doublets.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, 10),
        runtime=minutes(30, 600),
    params:
        revision=REVISIONS["doublets"],
        options=doublet_options,
    shell:
        "cellformers doublets {input.counts:q} --metadata {input.metadata:q} {params.options} -o {output:q} 2> {log:q}"


rule qc:
    input:
        metrics=per_shard("<results>/{dataset}/qc/metrics/{shard}.parquet"),
        metadata="<results>/{dataset}/metadata.parquet",
        doublets=doublet_scores,
    output:
        cells="<results>/{dataset}/cells.parquet",
        thresholds="<results>/{dataset}/qc/thresholds.json",
        figures=multiext("<results>/{dataset}/qc/thresholds", ".png", ".svg"),
    log:
        "<logs>/{dataset}/qc.log",
    benchmark:
        "<benchmarks>/{dataset}/qc.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000, 20),
        runtime=minutes(20),
    params:
        revision=REVISIONS["qc"],
        settings=qc_settings,
        options=qc_options,
        folder=subpath(output.thresholds, parent=True),
    shell:
        "cellformers qc {input.metrics:q} --metadata {input.metadata:q} {params.options} "
        "-o {output.cells:q} --report {params.folder:q} 2> {log:q}"


# First of all that can run, so that a column which the config names and the data lack is told before anything long
# starts. No job depends on it: another label must not re-run the others, and where an input is `ancient` Snakemake
# (9.27) passes over changed parameters of all jobs downstream.
rule columns:
    input:
        "<results>/{dataset}/metadata.parquet",
    output:
        "<results>/{dataset}/qc/columns.json",
    log:
        "<logs>/{dataset}/columns.log",
    benchmark:
        "<benchmarks>/{dataset}/columns.tsv"
    priority: 100
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000, 5),
        runtime=minutes(5),
    params:
        revision=REVISIONS["qc"],
        options=needed_columns,
    shell:
        "cellformers check-columns {input:q} {params.options} -o {output:q} 2> {log:q}"
