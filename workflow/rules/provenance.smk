# The record of the run: versions, config, digests of everything that was read and made.
from cellformers.provenance import artefacts
from cellformers.provenance import inputs as raw_inputs


def given_config():
    """The config as it was given, as YAML with its keys in order."""
    return yaml.safe_dump({key: value for key, value in config.items() if key != "pathvars"})


def config_root(wildcards, input):
    """The folder that paths of the config are relative to: a module's prefix, or the copy of a remote storage."""
    raw = raw_inputs(CONFIG)
    return flags(root=input.raw[0].removesuffix(raw[0]) or None) if raw else ""


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
        given=given_config(),
        root=config_root,
    shell:
        "printf %s {params.given:q} | "
        "cellformers provenance - --results {params.results} {params.root} --threads {threads} -o {output} 2> {log}"
