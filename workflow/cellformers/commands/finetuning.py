"""Verbs about classifiers: finetune, predict."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellformers.commands import options as opt
from cellformers.errors import UserError

if TYPE_CHECKING:
    from cellformers.training.adapters import Adapter
    from cellformers.training.finetune_presets import Preset
    from cellformers.training.sides import SplitSpec
    from cellformers.training.targets import Targets

NAMED = "[NAME=]PATH"
Model = Annotated[str, typer.Option("--model", help="A model folder, or the name of a registered model.")]
Backend = Annotated[str, typer.Option("--backend", help="auto, te, varlen or sdpa.")]
BatchTokens = Annotated[
    int, typer.Option("--batch-tokens", min=1, help="Most tokens of a forward pass; changes no result.")
]


def _number(help_: str, *, minimum: float | None = None) -> Any:
    return typer.Option(help=help_, min=minimum)


def _named(words: list[str], option: str) -> dict[str, list[Path]]:
    """Paths by the name in front of them, "" where there is none; a folder stands for its Parquet files."""
    found: dict[str, list[Path]] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or "/" in name or Path(word).exists():
            name, path = "", word
        paths = [Path(path)]
        if paths[0].is_dir():
            paths = sorted(paths[0].glob("[!.]*.parquet"), key=lambda p: (len(p.name), p.name))
        found.setdefault(name, []).extend(paths)
    if "" in found and len(found) > 1:
        raise UserError(
            f"{option}: some have a name and some have none", fix="give all as NAME=PATH, or none"
        )
    return found


def _read_targets(
    task: str, tables: dict[str, list[Path]], label: list[str], *, key: str | None, unit: str | None,
    side: str | None, positive: str | None,
) -> "Targets":  # fmt: skip
    """The targets from the options of the verb."""
    from cellformers.io.files import read_json
    from cellformers.training.targets import read_cell_targets, read_gene_targets

    for name, paths in tables.items():
        if not paths:
            raise UserError("--labels is a folder without tables", fix="give a table")
        if len(paths) > 1:
            raise UserError(
                f"--labels is given {len(paths)} times", fix=f"give one table {'for ' + name if name else ''}"
            )
    if task != "genes":
        if task == "cells" and len(label) > 1:
            raise UserError(
                f"{len(label)} labels for the task cells", fix="give --task tasks to learn them together"
            )
        if positive is not None:
            raise UserError("--positive is for --task genes")
        return read_cell_targets(
            {name: paths[0] for name, paths in tables.items()}, label, key=key, unit=unit, side=side,
            several=task == "tasks",
        )  # fmt: skip
    if len(tables) > 1 or "" not in tables:
        raise UserError("labels of genes come from one table", fix="give --labels once, without a name")
    path = tables[""][0]
    if not label and path.suffix == ".json":  # a split of genes says which label it is of
        label = [str(read_json(path).get("label", "label"))]
    if len(label) != 1:
        raise UserError("genes have one label", fix="give --label once")
    return read_gene_targets(path, label[0], key=key, group=unit, side=side, positive=positive)


def _check_names(tokens: Mapping[str, Any], tables: Mapping[str, Any], task: str) -> None:
    """UserError where a table of labels of cells is of a dataset that has no tokens here."""
    unknown = next((name for name in tables if name not in tokens), None)
    if task != "genes" and unknown is not None:
        shown = ", ".join(tokens) if "" not in tokens else "no name"
        raise UserError(
            f"--labels {unknown}={tables[unknown][0]}: tokens have {shown}" if unknown
            else f"--labels {tables[''][0]} has no name, tokens have {shown}",
            fix="give tokens and labels of a dataset the same name: NAME=PATH",
        )  # fmt: skip


def _split_spec(preset: "Preset | None", *, unit: str | None, seed: int, **given: Any) -> "SplitSpec":
    """The split from the options of the verb, else the one of the preset."""
    from cellformers.training.sides import SplitSpec

    explicit = {name: value for name, value in given.items() if value is not None}
    published = preset.sides if preset is not None and not explicit and unit == preset.unit else None
    defaults = dict(preset.split) if preset is not None else {}
    if "file" in explicit or "test" in explicit:
        defaults.pop("folds", None)
    return SplitSpec(**{**defaults, **explicit, "published": published, "seed": seed})


def _adapter(lora: bool, quantize: str, rank: int, alpha: float, dropout: float) -> "Adapter | None":
    if not lora and quantize == "none":
        return None
    from cellformers.training.adapters import Adapter

    return Adapter(rank=rank, alpha=alpha, dropout=dropout, quantize=quantize)


def job(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `training.finetune.finetune` from the options of the verb: all that both verbs have."""
    from cellformers.registry import find_model
    from cellformers.training.finetune_presets import find_preset, resolve
    from cellformers.training.targets import KINDS

    task, label, side = given["task"], given["label"], given["split_column"]
    if task not in KINDS:
        raise UserError(f"no task {task!r}", fix=f"give --task {', '.join(KINDS)}")
    preset = None if given["preset"] is None else find_preset(given["preset"], task=task)
    fields = {name: given[name] for name in _SETTINGS}
    fields["task_weights"] = tuple(given["task_weight"]) if given["task_weight"] else None
    settings = resolve(preset, fields)
    split = {name: given[name] for name in ("folds", "fold", "heldout", "test")} | {
        "file": given["split_file"]
    }
    is_given = any(value is not None for value in split.values())
    if side is not None and is_given:
        raise UserError("--split-column says all sides", fix="leave out the other options of the split")
    published = preset if side is None else None
    unit = given["unit"]
    if published is not None and unit is None and not is_given:
        unit = published.unit
    if preset is not None and preset.label is not None and not label:
        label = [preset.label]
    tables = _named(given["labels"], "--labels")
    targets = _read_targets(
        task, tables, label or [], key=given["key"], unit=unit, side=side,
        positive=given["positive"],
    )  # fmt: skip
    tokens = _named(given["tokens"], "tokens")
    _check_names(tokens, tables, task)
    seed = settings.seed if given["split_seed"] is None else given["split_seed"]
    adapter = [given[name] for name in ("lora", "quantize", "rank", "alpha", "lora_dropout")]
    return {
        "tokens": tokens, "model": find_model(given["model"]),
        "targets": targets, "split": _split_spec(published, unit=unit, seed=seed, **split),
        "settings": settings, "adapter": _adapter(*adapter),
        **{name: given[name] for name in ("accelerator", "backend", "threads", "batch_tokens")},
    }  # fmt: skip


def finetune(
    tokens: Annotated[
        list[str], typer.Argument(metavar=f"{NAMED}...", help="Token shards, or folders of them.")
    ],
    model: Model,
    labels: Annotated[
        list[str], typer.Option(metavar=NAMED, help="Table of labels: csv, tsv, Parquet; one a dataset.")
    ],
    output: opt.Output,
    task: Annotated[str, typer.Option(help="cells, genes, or tasks (several labels of cells).")] = "cells",
    label: Annotated[
        list[str] | None, typer.Option(help="Column of classes; several for --task tasks.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="Column of cell or gene ids (default: cell_id, gene_id).")
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="genes: this class against all others, or against empty fields.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published settings: cardiomyopathy, dosage-sensitivity, paper.")
    ] = None,
    unit: Annotated[
        str | None,
        typer.Option(help="Column of donors (genes: of groups) that stay on one side of the split."),
    ] = None,
    split_column: Annotated[str | None, typer.Option(help="Column with train, heldout, test.")] = None,
    split_file: Annotated[
        Path | None, typer.Option(help="File of sides, or a split by `split` of which --fold is taken.")
    ] = None,
    folds: Annotated[int | None, _number("Deal out over so many folds.", minimum=2)] = None,
    fold: Annotated[int | None, _number("The fold to test on, from 1.", minimum=1)] = None,
    heldout: Annotated[float | None, _number("Share held out for early stopping (0.1).", minimum=0)] = None,
    test: Annotated[float | None, _number("Share to test on (0.2).", minimum=0)] = None,
    split_seed: Annotated[int | None, _number("Seed of the split (default: --seed).", minimum=0)] = None,
    epochs: Annotated[
        float | None, _number("Most passes over the cells; may be a fraction.", minimum=0)
    ] = None,
    batch_cells: Annotated[int | None, _number("Cells of a step.", minimum=1)] = None,
    learning_rate: Annotated[float | None, _number("Peak rate.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="How the rate falls: linear, cosine, polynomial, constant.")
    ] = None,
    warmup: Annotated[
        float | None, _number("Share of the steps (under 1) or their number.", minimum=0)
    ] = None,
    weight_decay: Annotated[float | None, _number("Of matrices.", minimum=0)] = None,
    clip: Annotated[float | None, _number("Largest norm of the gradient.")] = None,
    freeze_layers: Annotated[
        int | None, _number("The first so many layers stay as they are.", minimum=0)
    ] = None,
    freeze_embeddings: Annotated[bool | None, typer.Option(help="Embeddings stay as they are.")] = None,
    dropout: Annotated[float | None, _number("Of the encoder (default: the model's).", minimum=0)] = None,
    classifier_dropout: Annotated[float | None, _number("In front of the classifier.", minimum=0)] = None,
    class_weights: Annotated[str | None, typer.Option(help="none, or balanced.")] = None,
    task_weight: Annotated[
        list[float] | None, typer.Option(help="tasks: weight in the loss, in the order of --label.")
    ] = None,
    pooling: Annotated[str | None, typer.Option(help="tasks: first (token), or attention.")] = None,
    monitor: Annotated[str | None, typer.Option(help="What tells the best weights: loss, macro_f1.")] = None,
    patience: Annotated[
        int | None, _number("Measurements without a better one until it ends; 0: never.", minimum=0)
    ] = None,
    evaluate_every: Annotated[
        int | None, _number("Steps between measurements (an epoch).", minimum=1)
    ] = None,
    keep: Annotated[str | None, typer.Option(help="Weights to keep: best, last.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, or bfloat16 for matrix products (fp32 weights).")
    ] = None,
    max_cells: Annotated[int | None, _number("Most cells, drawn before the split.", minimum=1)] = None,
    max_cells_per_class: Annotated[int | None, _number("Most cells of each class.", minimum=1)] = None,
    min_cells: Annotated[int | None, _number("Leave out classes of fewer cells.", minimum=1)] = None,
    seed: Annotated[int | None, _number("Seed of everything random.", minimum=0)] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train low-rank adapters in place of the encoder.")
    ] = False,
    quantize: Annotated[
        str, typer.Option(help="Hold the encoder in 4 bits: none, nf4 (with adapters).")
    ] = "none",
    rank: Annotated[int, _number("Of adapters.", minimum=1)] = 64,
    alpha: Annotated[float, _number("Of adapters: they are scaled by alpha / rank.")] = 128,
    lora_dropout: Annotated[float, _number("Of adapters.", minimum=0)] = 0.1,
    checkpoint_every: Annotated[
        int | None, _number("Steps between states to go on from (a quarter of an hour).", minimum=1)
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for a TensorBoard event log.")] = None,
    batch_tokens: BatchTokens = 16_384,
    backend: Backend = "auto",
    threads: opt.Threads = 2,
    accelerator: opt.Accelerator = "cpu",
    quiet: opt.Quiet = False,
) -> None:
    """Fine-tune a model to classify cells or genes; writes a model folder with predictions and scores.

    Labels and tokens of several datasets are given as NAME=PATH. An interrupted training goes on where it was when the
    same command is given again. For several GPUs: torchrun --nproc-per-node 4 -m cellformers.cli finetune ...
    --accelerator cuda.

    Example: cellformers finetune tokens/*.parquet --model models/v1-10m --labels cells.parquet --label cell_type
    --unit donor -o models/types
    """
    given = dict(locals())
    from cellformers.progress import progress, say
    from cellformers.training import distributed
    from cellformers.training.finetune import finetune as run

    quiet = quiet or distributed.rank() > 0

    line = "\r\033[2K" if sys.stderr.isatty() else ""
    with progress("finetune", None, unit="steps", quiet=quiet) as advance:
        done = run(
            **job(given), output=output, save_every=checkpoint_every, tensorboard=tensorboard,
            progress=advance, note=lambda text: say(f"{line}finetune: {text}", quiet=quiet),
        )  # fmt: skip
    for text in scores_in_words(done["metrics"]):
        say(f"finetune: {text}", quiet=quiet)


def scores_in_words(found: dict[str, Any], of: str = "") -> list[str]:
    """One line for each side, task and way of counting: accuracy, macro F1, AUC."""
    if "accuracy" not in found:
        return [
            text
            for name, part in found.items()
            if part
            for text in scores_in_words(part, f"{of} {name}".strip())
        ]
    figures = [f"{name.replace('_', ' ')} {found[name]:.3f}" for name in ("accuracy", "macro_f1")]
    if found.get("auc") is not None:
        figures.append(f"AUC {found['auc']:.3f}")
    return [f"{of.replace('_', ' ')} ({found['n']:,}): {', '.join(figures)}"]


def _names(path: Path) -> list[str]:
    """The first word of each line of a file."""
    if not path.is_file():
        raise UserError("no such file", path=path)
    words = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.split()]
    if not words:
        raise UserError("names no gene", path=path, fix="write one id or symbol a line")
    return words


def predict(
    tokens: Annotated[list[Path], typer.Argument(metavar="SHARD...", help="Token shards, in order.")],
    model: Model,
    output: opt.Output,
    per_cell: Annotated[
        bool, typer.Option("--per-cell", help="Gene classifiers: a row for each gene of each cell.")
    ] = False,
    genes: Annotated[
        Path | None, typer.Option(help="Gene classifiers: only these, a file with an id or symbol a line.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16, fp16 or fp8.")] = "float32",
    backend: Backend = "auto",
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a batch on a GPU; changes no result.")
    ] = None,
    accelerator: opt.Accelerator = "cpu",
    threads: opt.Threads = 2,
    quiet: opt.Quiet = False,
) -> None:
    """Predict classes with a fine-tuned model: of each cell, or of each gene over all cells.

    Example: cellformers predict tokens/*.parquet --model models/types -o predictions.parquet
    """
    from cellformers.progress import progress, say
    from cellformers.registry import find_model
    from cellformers.tokens import count_cells
    from cellformers.training.predict import predict as run

    names = None if genes is None else _names(genes)
    with progress("predict", sum(map(count_cells, tokens)), quiet=quiet) as advance:
        done = run(
            tokens, find_model(model), output, per_cell=per_cell, genes=names, dtype=dtype, backend=backend,
            accelerator=accelerator, threads=threads, batch_tokens=batch_tokens, progress=advance,
        )  # fmt: skip
    if done.n_without:
        say(
            f"predict: {done.n_without:,} of {done.n_cells:,} cells have nothing to predict from", quiet=quiet
        )


# options that are settings of training, by their names
_SETTINGS = frozenset(
    ("epochs", "batch_cells", "learning_rate", "schedule", "warmup", "weight_decay", "clip", "freeze_layers",
     "freeze_embeddings", "dropout", "classifier_dropout", "class_weights", "pooling", "monitor", "patience",
     "evaluate_every", "keep", "precision", "max_cells", "max_cells_per_class", "min_cells", "seed")
)  # fmt: skip

VERBS = {"finetune": finetune, "predict": predict}
