"""The revision of every step: raised when its output changes for the same input.

The workflow puts them into `params`, so an upgrade of the package re-runs the steps whose output it changes and
nothing else; every artefact carries the revision of the step that made it.
"""

REVISIONS = {
    "simulate": 1,
    "ingest": 1,
    "qc": 2,
    "doublets": 1,
    "sketch": 1,
    "medians": 1,
    "vocabulary": 1,
    "genes": 1,
    "gene-labels": 1,
    "tokenize": 1,
    "pretrain": 2,
    "finetune": 1,
    "predict": 1,
    "download": 1,
    "import-model": 1,
    "verify": 1,
    "randomize": 1,
    "embed": 1,
    "gather": 3,
    "summarize-embeddings": 1,
    "map": 1,
    "split": 2,
    "evaluate": 3,
    "mixing": 1,
    "summarize": 2,
    "provenance": 1,
    "report": 3,
}
