"""Every setting of a fine-tuning that its result depends on, with defaults for a few thousand cells."""

from dataclasses import dataclass

from cellformers.errors import UserError, did_you_mean
from cellformers.models.bert_config import POOLINGS
from cellformers.training.optimiser import check_schedule

MONITORS = ("loss", "macro_f1")
KEEP = ("best", "last")
CLASS_WEIGHTS = ("none", "balanced")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyperparameters; impossible ones are refused when they are put together."""

    epochs: float = 10.0
    """Passes over the training cells, at most; may be a fraction."""
    batch_cells: int = 12
    """Cells of an optimiser step."""
    learning_rate: float = 1e-4
    """Peak rate of AdamW."""
    schedule: str = "linear"
    """How it falls: linear, cosine, polynomial, constant."""
    warmup: float = 0.1
    """Over which it rises: a share of the steps if under 1, else their number."""
    weight_decay: float = 0.01
    """Of matrices; biases and norms are not decayed."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    freeze_layers: int = 0
    """The first so many layers stay as they were; embeddings learn all the same, as in the reference."""
    freeze_embeddings: bool = False
    """Embeddings stay as they were."""
    dropout: float | None = None
    """Of hidden states and attention; None: the model's own."""
    classifier_dropout: float | None = None
    """In front of the classifier; None: as of hidden states."""
    class_weights: str = "none"
    """In the loss: none, or balanced (each class weighs the same in all)."""
    task_weights: tuple[float, ...] | None = None
    """Of several tasks, in their order; normalised to a sum of 1. None: equal."""
    pooling: str = "first"
    """What several tasks read: the first token, or an attention-weighted mean of all."""
    monitor: str = "loss"
    """What tells the best weights on the held-out side: loss, macro_f1."""
    patience: int = 3
    """Measurements without a better one until training ends; 0: never."""
    evaluate_every: int | None = None
    """Steps between measurements; None: after each epoch."""
    keep: str = "best"
    """The best weights, or the last."""
    precision: str = "float32"
    """Of the forward pass; weights are float32 in any case."""
    max_cells: int | None = None
    """Most cells in all, drawn before the split."""
    max_cells_per_class: int | None = None
    """Most cells of each class, drawn before the split."""
    min_cells: int = 1
    """Classes of fewer cells are left out."""
    seed: int = 0
    """Of the head's first weights, order of cells, dropout, and of what is drawn."""

    long_warmup: bool = False
    """Accept a warm-up longer than the training, whose rate then never reaches its peak: where it is published so."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("monitor", MONITORS), ("keep", KEEP), ("class_weights", CLASS_WEIGHTS), ("precision", PRECISIONS),
            ("pooling", POOLINGS),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"no {name} {value!r}", fix=did_you_mean(value, allowed))
        check_schedule(schedule=self.schedule, warmup=self.warmup)
        for name, low in (
            ("epochs", 0), ("weight_decay", 0), ("freeze_layers", 0), ("learning_rate", 0), ("batch_cells", 1),
            ("patience", 0), ("evaluate_every", 1), ("min_cells", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not low <= value < float("inf"):
                raise UserError(f"{name} is {value}, not a number from {low}")
        if not self.clip > 0:
            raise UserError(f"clip is {self.clip:g}, not above 0")
        for name in ("dropout", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UserError(f"{name} is {value:g}, not from 0 to under 1")
