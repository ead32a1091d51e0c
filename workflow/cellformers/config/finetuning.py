"""Parts of the config about fine-tuning."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cellformers.config.section import Name, Once, Section

Preset = Literal["cardiomyopathy", "dosage-sensitivity", "paper"]
OF_ONE_TASK = {"cardiomyopathy": "cells", "dosage-sensitivity": "genes"}
Schedule = Literal["linear", "cosine", "polynomial", "constant"]


class Lora(Section):
    """Low-rank adapters: few weights are trained beside frozen ones, and merged into them at the end."""

    rank: int = Field(64, description="rank of the adapters", ge=1)
    alpha: float = Field(128, description="their weight is alpha / rank", gt=0)
    dropout: float = Field(0.1, description="before the adapters", ge=0, lt=1)
    quantize: Literal["none", "nf4"] = Field(
        "none", description="`nf4`: frozen weights in 4 bits (QLoRA; needs CUDA and bitsandbytes)"
    )


class FinetuneSettings(Section):
    """How a model is fine-tuned. A preset brings published values; a key given here has precedence over it."""

    preset: Preset | None = Field(
        None, description="published settings: `cardiomyopathy`, `dosage-sensitivity`, `paper`"
    )
    heldout: float | None = Field(None, description="share to stop by (default 0.1)", ge=0, lt=1)
    epochs: float | None = Field(None, description="most passes over the cells", gt=0)
    batch_cells: int | None = Field(None, description="cells of a step", ge=1)
    learning_rate: float | None = Field(None, description="peak learning rate", gt=0)
    warmup: float | None = Field(
        None, description="steps over which it rises, or their share where under 1", ge=0
    )
    schedule: Schedule | None = Field(None, description="how it falls")
    weight_decay: float | None = Field(None, description="of matrices", ge=0)
    clip: float | None = Field(None, description="largest norm of the gradient", gt=0)
    freeze_layers: int | None = Field(None, description="first layers that are not trained", ge=0)
    dropout: float | None = Field(None, description="of the encoder (default: the model's)", ge=0, lt=1)
    class_weights: Literal["none", "balanced"] | None = Field(
        None, description="`balanced`: rare classes count more"
    )
    monitor: Literal["loss", "macro_f1"] | None = Field(None, description="what tells the best weights")
    patience: int | None = Field(
        None, description="measurements without a better one until it ends; 0: never", ge=0
    )
    precision: Literal["float32", "bfloat16"] | None = Field(None, description="of the computation")
    max_cells: int | None = Field(None, description="most cells, drawn before the split", ge=1)
    max_cells_per_class: int | None = Field(None, description="most cells of each class", ge=1)
    min_cells: int | None = Field(None, description="leave out classes of fewer cells", ge=1)
    lora: Lora | None = Field(None, description="train adapters instead of all weights")
    seed: int | None = Field(None, description="seed of split, order, head and dropout (default 0)", ge=0)


class Finetune(FinetuneSettings):
    """Fine-tuning of a model on labels."""

    model: Name = Field(description="the model to start from")
    datasets: list[Name] = Field(description="datasets whose cells are trained on", min_length=1)
    task: Literal["cells", "genes", "tasks"] = Field(
        "cells", description="a label a cell, a label a gene, or several labels a cell at once"
    )
    label: str | list[str] | None = Field(
        None, description="column of labels; a list for `tasks` (default: the preset's)"
    )
    labels: Path | None = Field(None, description="genes: csv/tsv with one gene a row")
    simulated: bool = Field(False, description="genes: use the labels of the simulation")
    key: str | None = Field(None, description="genes: column of gene ids (default gene_id)")
    positive: str | None = Field(
        None, description="genes: this class against all others, or against empty fields"
    )
    unit: str | None = Field(
        None, description="column of donors or batches (genes: of groups) to keep on one side of the split"
    )
    split_column: str | None = Field(
        None, description="column that says train, heldout or test (default: drawn with the seed)"
    )
    test: float | None = Field(None, description="share to test on (default 0.2)", ge=0, lt=1)
    folds: int | None = Field(None, description="deal out over so many folds instead", ge=2)
    fold: int | None = Field(None, description="the fold to test on, from 1", ge=1)
    task_weight: list[float] | None = Field(None, description="tasks: weights in the loss")
    pooling: Literal["first", "attention"] | None = Field(
        None, description="tasks: vector of a cell, its first token's or a learned mean"
    )
    predict: list[Name] = Field(
        default_factory=list, description="datasets to predict the labels of, with the fine-tuned model"
    )

    @model_validator(mode="after")
    def _labels_of_the_task(self) -> Self:
        if (self.task == "genes") != (self.labels is not None or self.simulated):
            raise ValueError("task genes, and no other, needs a table of labels (or simulated: true)")
        if self.labels is not None and self.simulated:
            raise ValueError("give labels or simulated, not both")
        if self.label is None and self.preset is None:
            raise ValueError("label is missing")
        if self.label is not None and (self.task == "tasks") != isinstance(self.label, list):
            raise ValueError("label is a list for task tasks, and one column for the others")
        return self


class BenchmarkFinetune(FinetuneSettings):
    """Fine-tuning under the splits of a benchmark: one training a fold, tested on what the fold holds out."""

    models: Annotated[list[Name], Once] = Field(description="models to fine-tune", min_length=1)
    untrained: bool = Field(
        False, description="also fine-tune each network from random weights, as a baseline"
    )

    def check_task(self, task: Literal["cells", "genes"]) -> None:
        """ValueError if the preset is for another task, or cells that the split tests would be left out."""
        if OF_ONE_TASK.get(self.preset or "", task) != task:
            raise ValueError(f"finetune: the preset {self.preset} is not for the task {task}")
        for name in ("max_cells", "max_cells_per_class", "min_cells"):
            if task == "cells" and getattr(self, name) is not None:
                raise ValueError(f"finetune: leave {name} out, every cell of the split has to be tested")
