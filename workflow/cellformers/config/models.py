"""Parts of the config about models: where they come from, how they are trained, what is embedded with them."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cellformers.config.finetuning import Finetune, Schedule
from cellformers.config.section import Name, Section


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
