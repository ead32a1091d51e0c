"""Parts of the config about models: where they come from, how they are trained, what is embedded with them."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cellformers.config.section import Name, Section

Schedule = Literal["linear", "cosine", "polynomial", "constant"]


class Pretrain(Section):
    """Masked-gene pretraining. A preset brings published values; a key given here has precedence over it."""

    datasets: list[Name] | None = Field(None, description="datasets to train on (default: all)")
    preset: str | None = Field(
        None, description="published architecture and hyperparameters, e.g. `geneformer-v1-10m`"
    )
    continue_from: Name | None = Field(
        None, description="a model of this config to go on from, with its architecture and vocabulary"
    )
    layers: int | None = Field(None, description="encoder layers (default 2)", ge=1)
    hidden_size: int | None = Field(None, description="width (default 128)", ge=8)
    heads: int | None = Field(None, description="attention heads (default 4)", ge=1)
    intermediate_size: int | None = Field(
        None, description="width of the feed-forward layer (default 256)", ge=8
    )
    dropout: float | None = Field(None, description="of hidden states and attention (default 0)", ge=0, lt=1)
    steps: int | None = Field(None, description="optimiser steps (default 2000)", ge=1)
    epochs: float | None = Field(None, description="passes over the cells, instead of steps", gt=0)
    batch_tokens: int | None = Field(
        None, description="most tokens of a batch on one device (default 4096)", ge=64
    )
    batch_cells: int | None = Field(
        None, description="cells of an optimiser step, cut into batches of batch_tokens", ge=1
    )
    accumulate: int | None = Field(None, description="batches of an optimiser step (default 1)", ge=1)
    learning_rate: float | None = Field(None, description="peak learning rate (default 0.002)", gt=0)
    warmup: float | None = Field(
        None, description="steps over which it rises, or their share where under 1 (default 0.1)", ge=0
    )
    schedule: Schedule | None = Field(None, description="how it falls (default cosine)")
    weight_decay: float | None = Field(None, description="of matrices (default 0.01)", ge=0)
    clip: float | None = Field(None, description="largest norm of the gradient (default 1)", gt=0)
    precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the computation; weights stay float32 (default float32)"
    )
    seed: int = Field(0, description="seed of weights, order and masks", ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give steps or epochs, not both")
        return self


class Lora(Section):
    """Low-rank adapters: few weights are trained beside frozen ones, and merged into them at the end."""

    rank: int = Field(64, description="rank of the adapters", ge=1)
    alpha: float = Field(128, description="their weight is alpha / rank", gt=0)
    dropout: float = Field(0.1, description="before the adapters", ge=0, lt=1)
    quantize: Literal["none", "nf4"] = Field(
        "none", description="`nf4`: frozen weights in 4 bits (QLoRA; needs CUDA and bitsandbytes)"
    )


class Finetune(Section):
    """Fine-tuning of a model on labels. A preset brings published values; a key given here has precedence over it."""

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
    preset: str | None = Field(
        None, description="published settings: `cardiomyopathy`, `dosage-sensitivity`, `paper`"
    )
    unit: str | None = Field(
        None, description="column of donors or batches (genes: of groups) to keep on one side of the split"
    )
    split_column: str | None = Field(
        None, description="column that says train, heldout or test (default: drawn with the seed)"
    )
    heldout: float | None = Field(None, description="share to stop by (default 0.1)", ge=0, lt=1)
    test: float | None = Field(None, description="share to test on (default 0.2)", ge=0, lt=1)
    folds: int | None = Field(None, description="deal out over so many folds instead", ge=2)
    fold: int | None = Field(None, description="the fold to test on, from 1", ge=1)
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
    task_weight: list[float] | None = Field(None, description="tasks: weights in the loss")
    pooling: Literal["first", "attention"] | None = Field(
        None, description="tasks: vector of a cell, its first token's or a learned mean"
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


class Model(Section):
    """A model: a published checkpoint, a folder, or one to train in the run."""

    checkpoint: str | None = Field(
        None, description="a registered checkpoint to download, e.g. `geneformer-v2-104m` (`download --list`)"
    )
    revision: str | None = Field(None, description="checkpoint: commit to take instead of the registered one")
    path: Path | None = Field(None, description="folder with config.json and weights (and vocabulary/)")
    pretrain: Pretrain | None = Field(None, description="train it here")
    finetune: Finetune | None = Field(None, description="fine-tune another model here")
    vocabulary: Name | None = Field(
        None, description="a vocabulary of this config; may be left out where the model brings its own"
    )
    verify: bool = Field(
        False, description="compare its outputs with transformers', layer by layer, in the report"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = {key: getattr(self, key) for key in ("checkpoint", "path", "pretrain", "finetune")}
        given = [key for key, value in origins.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of checkpoint, path, pretrain, finetune (given: {', '.join(given) or 'none'})"
            )
        if self.pretrain is not None and (self.vocabulary is None) == (self.pretrain.continue_from is None):
            raise ValueError("pretrain needs a vocabulary, or a model to continue from, which brings its own")
        if self.finetune is not None and self.vocabulary is not None:
            raise ValueError("a fine-tuned model has the vocabulary of the model it starts from")
        if self.revision is not None and self.checkpoint is None:
            raise ValueError("revision is of a checkpoint")
        return self


class Embedding(Section):
    """A view of the cells: which model, which vectors."""

    model: Name = Field(description="a model of this config")
    mode: Literal["cls", "cell"] | None = Field(
        None,
        description="`cls` vector or `cell` mean over genes (default: cls where the vocabulary has `<cls>`)",
    )
    layer: int = Field(-1, description="0 = last layer, -1 = second to last, and so on", le=0)
    dtype: Literal["float32", "bfloat16", "float16", "fp8"] = Field(
        "float32", description="precision of the computation (`fp8`: TransformerEngine on a GPU that has it)"
    )
    backend: Literal["auto", "te", "varlen", "sdpa"] = Field(
        "auto", description="how attention is computed; `cellformers doctor` says what works where"
    )
    datasets: list[Name] | None = Field(None, description="datasets to embed (default: all)")
    states: str | None = Field(
        None, description="metadata column: also the exact mean and median embedding of each of its values"
    )
