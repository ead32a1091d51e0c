# Raw files to counts shards.


rule simulate:
    output:
        atlas="<results>/simulated/atlas.h5ad",
        second="<results>/simulated/second.loom",
        labels="<results>/simulated/gene_labels.csv",
        degrees="<results>/simulated/out_degrees.csv",
        truth="<results>/simulated/truth.json",
    log:
        "<logs>/simulate.log",
    benchmark:
        "<benchmarks>/simulate.tsv"
    conda:
        "../../envs/cpu.yaml"
    threads: 1
    resources:
        mem_mb=memory(2000),
        runtime=minutes(20),
    params:
        revision=REVISIONS["simulate"],
        folder=subpath(output.atlas, parent=True),
        options=flags(cells=CONFIG.simulate.cells, seed=CONFIG.simulate.seed),
    shell:
        "cellformers simulate {params.options} -o {params.folder:q} 2> {log:q}"


# One rule a dataset, because the number of shards differs.
for name, dataset in CONFIG.datasets.items():

    rule:
        name:
            f"ingest_{name}"
        input:
            raw=dataset_files(name),
            labels=str(dataset.labels.path) if dataset.labels else [],
            samples=str(dataset.samples) if dataset.samples else [],
        output:
            counts=[f"<results>/{name}/counts/{shard}.h5ad" for shard in shard_names(name)],
            metadata=f"<results>/{name}/metadata.parquet",
            features=f"<results>/{name}/features.parquet",
        log:
            f"<logs>/{name}/ingest.log",
        benchmark:
            f"<benchmarks>/{name}/ingest.tsv"
        conda:
            "../../envs/cpu.yaml"
        threads: 1
        resources:
            mem_mb=memory(2500),
            runtime=minutes(30, 60),
        params:
            revision=REVISIONS["ingest"],
            source=ingest_source,
            folder=subpath(output.metadata, parent=True),
            options=ingest_options(dataset),
        shell:
            "cellformers ingest {params.source} {params.options} -o {params.folder:q} 2> {log:q}"
