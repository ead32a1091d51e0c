# One split a benchmark, read by every method; one job a method; one table of all scores.


rule split:
    input:
        unpack(split_inputs),
    output:
        "<results>/benchmarks/{benchmark}/split.json",
    log:
        "<logs>/benchmarks/{benchmark}/split.log",
    benchmark:
        "<benchmarks>/benchmarks/{benchmark}/split.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1500, 10),
        runtime=minutes(10),
    params:
        revision=REVISIONS["split"],
        settings=benchmark_settings,
        options=split_options,
    shell:
        "cellformers split {params.options} -o {output} 2> {log}"


rule evaluate:
    input:
        unpack(evaluate_inputs),
        split="<results>/benchmarks/{benchmark}/split.json",
    output:
        score="<results>/benchmarks/{benchmark}/{method}.json",
        predictions="<results>/benchmarks/{benchmark}/{method}.predictions.parquet",
    log:
        "<logs>/benchmarks/{benchmark}/{method}.log",
    benchmark:
        "<benchmarks>/benchmarks/{benchmark}/{method}.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, 20),
        runtime=minutes(60, 600),
    params:
        revision=REVISIONS["evaluate"],
        settings=benchmark_settings,
        options=evaluate_options,
    shell:
        "cellformers evaluate --split {input.split} {params.options} "
        "--predictions {output.predictions} -o {output.score} 2> {log}"


rule summarize:
    input:
        all_scores(),
    output:
        "<results>/benchmarks.tsv",
    log:
        "<logs>/summarize.log",
    benchmark:
        "<benchmarks>/summarize.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(1000),
        runtime=minutes(10),
    params:
        revision=REVISIONS["summarize"],
    shell:
        "cellformers summarize {input} -o {output} 2> {log}"
