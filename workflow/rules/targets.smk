# What can be asked for by name: `snakemake embed --cores 8 --configfile my.yaml`.


rule tokens:
    input:
        all_tokens(),


rule models:
    input:
        [path for name in CONFIG.models for path in model_files(name)],


rule pretrain:
    input:
        [path for name in models_by("pretrain") for path in model_files(name)],


rule finetune:
    input:
        [path for name in models_by("finetune") for path in model_files(name)],
        all_predictions(),
        all_columns(),


rule embed:
    input:
        all_embeddings(),
        all_states(),
        all_columns(),


# every rule is there
include: "executors.smk"
