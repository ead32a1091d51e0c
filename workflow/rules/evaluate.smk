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
        settings=benchmark_settings("published", "batch", "finetune"),
        options=split_options,
    shell:
        "cellformers split {params.options} -o {output:q} 2> {log:q}"


rule finetune_fold:
    input:
        unpack(fold_inputs),
        split="<results>/benchmarks/{benchmark}/split.json",
    output:
        **fold_outputs(CellBenchmark),
    log:
        "<logs>/benchmarks/{benchmark}/finetuned/{start}/fold-{fold}.log",
    benchmark:
        "<benchmarks>/benchmarks/{benchmark}/finetuned/{start}/fold-{fold}.tsv"
    wildcard_constraints:
        benchmark=one_of(benchmarks_by(CellBenchmark)),
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
        folder=subpath(output.training, parent=True),
        model=folder_of("model"),
        sources=fold_sources,
        options=fold_options,
    shell:
        "{params.launcher}cellformers finetune {params.sources} --model {params.model:q} "
        "--split-file {input.split:q} {params.options} "
        "--threads {threads} -o {params.folder:q} 2> {log:q}"


use rule finetune_fold as finetune_fold_genes with:
    output:
        **fold_outputs(GeneBenchmark),
    wildcard_constraints:
        benchmark=one_of(benchmarks_by(GeneBenchmark)),


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
    wildcard_constraints:
        benchmark=one_of(benchmarks_by(CellBenchmark, GeneBenchmark)),
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(3000, 20, most_memory),
        runtime=minutes(60, 600, most_minutes),
    params:
        revision=REVISIONS["evaluate"],
        settings=benchmark_settings("finetune"),
        options=evaluate_options,
    shell:
        "cellformers evaluate --split {input.split:q} {params.options} "
        "--predictions {output.predictions:q} -o {output.score:q} 2> {log:q}"


rule mixing:
    input:
        unpack(evaluate_inputs),
    output:
        "<results>/benchmarks/{benchmark}/{method}.json",
    log:
        "<logs>/benchmarks/{benchmark}/{method}.log",
    benchmark:
        "<benchmarks>/benchmarks/{benchmark}/{method}.tsv"
    wildcard_constraints:
        benchmark=one_of(benchmarks_by(MixingBenchmark)),
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(4000, 20, most_memory),
        runtime=minutes(60, 600, most_minutes),
    params:
        revision=REVISIONS["mixing"],
        settings=benchmark_settings(),
        options=evaluate_options,
    shell:
        "cellformers mixing {params.options} --threads {threads} -o {output:q} 2> {log:q}"


rule summarize:
    input:
        all_scores(),
    output:
        report(
            "<results>/benchmarks.tsv",
            caption="../report/summary.rst",
            category="Scores",
            subcategory="all benchmarks",
            labels={"benchmark": "all"},
        ),
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
        "cellformers summarize {input:q} -o {output:q} 2> {log:q}"
