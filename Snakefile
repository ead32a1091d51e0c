# cellformers: `snakemake --cores 2` runs config/config.yaml, `--configfile FILE` yours. Rules call the command line.
from snakemake.utils import min_version

min_version("9.19")


# Only where no config is given: Snakemake would merge the demo's datasets into yours.
if "datasets" not in config:

    configfile: workflow.source_path("config/config.yaml")


pathvars:
    logs="<results>/logs",
    benchmarks="<results>/runtime",


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/helpers.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/trained.smk"
include: "workflow/rules/deposits.smk"
include: "workflow/rules/counts.smk"
include: "workflow/rules/qc.smk"
include: "workflow/rules/vocabulary.smk"
include: "workflow/rules/tokens.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/embed.smk"
include: "workflow/rules/labels.smk"
include: "workflow/rules/methods.smk"
include: "workflow/rules/scoring.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/reporting.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/wanted.smk"
include: "workflow/rules/provenance.smk"
include: "workflow/rules/targets.smk"


rule all:
    default_target: True
    input:
        report="<results>/report.html",
        embeddings=all_embeddings(),
        more=[*all_columns(), *all_states(), *all_predictions(), "<results>/provenance.json"],
