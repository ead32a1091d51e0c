"""Whether a model may be written to a folder, asked before the hours of a training instead of behind them.

check_output("models/types")
"""

from pathlib import Path

from cellformers.errors import UserError
from cellformers.models.checkpoints import CONFIG_FILE
from cellformers.models.directory import VOCABULARY
from cellformers.models.weight_files import WEIGHTS_FILE

# what a training writes; a workflow may have removed some of it before it asks for it again
_OWN = frozenset(
    (CONFIG_FILE, WEIGHTS_FILE, VOCABULARY, "training.json", "loss.tsv", "split.json", "predictions.parquet",
     "predictions_pooled.parquet", "adapter")
)  # fmt: skip


def check_output(output: str | Path) -> None:
    """UserError where `output` is a file, or a folder that a model would take the place of though it is none."""
    output = Path(output)
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(
            "is a file, a folder is to be written here", path=output, fix="choose another --output"
        )
    foreign = sorted(path.name for path in output.iterdir() if path.name not in _OWN)
    if foreign and not (output / CONFIG_FILE).is_file():
        raise UserError(
            f"is a folder with other things in it ({foreign[0]})", path=output,
            fix="choose another --output for the model",
        )  # fmt: skip
