# The record of the run: versions, config, digests of everything that was read and made.


rule provenance:
    input:
        # all by name, though the verb finds them by the config, so that they are there wherever the job runs
        made=lambda wildcards: [f"<results>/{name}" for name in artefacts(CONFIG)],
        raw=lambda wildcards: raw_inputs(CONFIG),
    output:
        "<results>/provenance.json",
    log:
        "<logs>/provenance.log",
    benchmark:
        "<benchmarks>/provenance.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 2
    resources:
        mem_mb=memory(1000),
        runtime=minutes(20, 1),
    params:
        revision=REVISIONS["provenance"],
        results=subpath(output[0], parent=True),
        given=lambda wildcards: given_config(),
        root=config_root,
    shell:
        "printf %s {params.given:q} | "
        "cellformers provenance - --results {params.results:q} {params.root} --threads {threads} -o {output:q} 2> {log:q}"
