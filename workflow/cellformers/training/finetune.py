"""Fine-tune a Geneformer to classify cells or genes, or for several tasks at once.

    targets = read_cell_targets("cells.parquet", ["cell_type"], unit="donor")
    finetune(["tokens/0.parquet"], "models/v1-10m", "models/types", targets=targets, split=SplitSpec(seed=0),
             settings=Settings(epochs=5))

The encoder begins with the weights of the model, its head with random ones. The result is a model directory like any
other, in the published layout (BertForSequenceClassification, BertForTokenClassification; several tasks: this package's
own), and beside it training.json, loss.tsv, split.json and the predictions for the sides that were not trained on. The
test side has no part in training or stopping. On the CPU the same input, seed and number of threads give the same bits;
an interrupted training goes on where it was. Started by torchrun in several processes they share the work; all need to
see the same files.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from cellformers.errors import UserError
from cellformers.io.files import atomic_dir, digest_arrays, stamp, write_json, write_table, write_text
from cellformers.io.locks import exclusive
from cellformers.models import checkpoints, layouts
from cellformers.models.attention import choose
from cellformers.models.batches import DTYPES
from cellformers.models.checkpoints import read_config
from cellformers.models.directory import VOCABULARY, Model, open_model
from cellformers.models.geneformer import Geneformer
from cellformers.revisions import REVISIONS
from cellformers.training import distributed
from cellformers.training.adapters import Adapter, attach, merged_state, write_adapter
from cellformers.training.answers import AGGREGATION, Answers, answers_about_cells, answers_about_genes
from cellformers.training.classify import evaluator
from cellformers.training.curves import as_tsv
from cellformers.training.distributed import World, divided, together
from cellformers.training.examples import by_dataset, check_files
from cellformers.training.fitting import (
    COLUMNS,
    Course,
    Progress,
    TrialCallback,
    count_steps,
    fit,
    steps_per_epoch,
    task_weights,
)  # fmt: skip
from cellformers.training.optimiser import check_schedule
from cellformers.training.places import check_output
from cellformers.training.problem import Limits, Problem, outputs, prepare
from cellformers.training.settings import Settings
from cellformers.training.sides import HELDOUT, TEST, TRAIN, SplitSpec
from cellformers.training.state import has_state
from cellformers.training.targets import Targets
from cellformers.vocabulary import copy_vocabulary

__all__ = ["Settings", "SplitSpec", "Targets", "finetune", "make_network"]

BATCH_TOKENS = 16_384
Tokens = Mapping[str, Sequence[str | Path]] | Sequence[str | Path]


def make_network(
    source: Geneformer,
    settings: Settings,
    *,
    kind: str,
    names: Sequence[str],
    classes: Sequence[tuple[str, ...]],
) -> Geneformer:
    """The encoder of `source` with a new head for these classes, ready for training on the device of `source`.

    Raises
    ------
    UserError
        If more layers are to be frozen than there are.
    """
    if settings.freeze_layers > source.config.num_hidden_layers:
        raise UserError(
            f"{settings.freeze_layers} layers can't be frozen in a model of {source.config.num_hidden_layers}",
            fix="freeze fewer",
        )
    if settings.dropout is not None:
        config = replace(
            source.config, hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout
        )
        source = layouts.assemble(config, source.state_dict(), backend=source.backend)
    several = kind == "tasks"
    network = layouts.replace_head(
        source, seed=settings.seed, head={"cells": "cell", "genes": "gene", "tasks": "tasks"}[kind],
        labels=() if several else classes[0],
        tasks=tuple(zip(names, classes, strict=True)) if several else (),
        pooling=settings.pooling if several else "first", classifier_dropout=settings.classifier_dropout,
    )  # fmt: skip
    network.train().requires_grad_(True)
    for layer in network.layers[: settings.freeze_layers]:
        layer.requires_grad_(False)
    if settings.freeze_embeddings:
        for part in (network.words, network.positions, network.types, network.norm):
            part.requires_grad_(False)
    return network


def _open(
    model: str | Path, settings: Settings, *, device: torch.device, backend: str, adapter: Adapter | None
) -> Model:
    """The source in fp32, with the backend that fits the precision of the forward pass."""
    if adapter is not None and backend == "auto":
        backend = "varlen" if choose("auto", device, DTYPES[settings.precision]) != "sdpa" else "sdpa"
    chosen = choose(backend, device, DTYPES[settings.precision])
    read_config(model)
    source = open_model(model, dtype=torch.float32, backend="sdpa")
    state = source.network.state_dict()
    network = layouts.assemble(source.network.config, state, backend=chosen).to(device)
    return replace(source, network=network)


def _about(
    problem: Problem, source: Model, settings: Settings, adapter: Adapter | None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters and inputs: what the result depends on."""
    parameters = {
        "task": problem.kind, "labels": list(problem.names), **asdict(settings),
        "adapter": None if adapter is None else asdict(adapter),
    }  # fmt: skip
    inputs = {
        "examples": problem.digest, "classes": digest_arrays([c for names in problem.classes for c in names]),
        "vocabulary": source.vocabulary.digest, "model": source.digest,
    }  # fmt: skip
    return parameters, inputs


def finetune(
    tokens: Tokens,
    model: str | Path,
    output: str | Path,
    *,
    targets: Targets,
    split: SplitSpec,
    settings: Settings,
    adapter: Adapter | None = None,
    accelerator: str = "cpu",
    backend: str = "auto",
    threads: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    work: str | Path | None = None,
    save_every: int | None = None,
    tensorboard: str | Path | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
    trial_callback: TrialCallback | None = None,
) -> dict[str, Any]:
    """Fine-tune and write the model directory; what training.json holds.

    Parameters
    ----------
    tokens
        Token shards, or those of each dataset by the name that the targets have for it.
    model, output
        The model directory to begin with and the one to write.
    targets, split
        What is to be learnt (`targets.read_cell_targets`, `read_gene_targets`), and how sides are made.
    settings, adapter
        Hyperparameters; an adapter trains low-rank matrices in place of the encoder, and is merged into it.
    accelerator, backend, threads, batch_tokens
        How it is computed: device, attention kernels, CPU threads, tokens of a forward pass (halved where memory
        runs out).
    work, save_every
        Folder of the states of an unfinished training (None: beside the output; gone when that is written), and steps
        between them (None: a quarter of an hour).
    tensorboard
        Folder of an event log.
    progress, note
        Called with the number of steps done; with a line worth saying.
    trial_callback
        Called after each measurement with its number, from 1, and the held-out loss, accuracy and macro_f1; what it
        raises ends the training, and nothing is written.

    Raises
    ------
    UserError
        If tokens, labels, model and settings don't go together; the message says which and why.
    """
    output = Path(output)
    work = Path(work) if work is not None else output.parent / f".training-{output.name}"
    with distributed.join(accelerator) as world, ExitStack() as stack:
        tell = note if note is not None and world.rank == 0 else lambda _: None
        with together(world):
            check_output(output)
            _check_share(settings, world)
            source = _open(model, settings, device=world.device, backend=backend, adapter=adapter)
            files = by_dataset(tokens)
            check_files(files, source.vocabulary)
            limits = Limits(
                settings.max_cells, settings.max_cells_per_class, settings.min_cells, settings.seed
            )
            problem, report = prepare(
                files, targets, split, config=source.network.config, vocabulary=source.vocabulary,
                limits=limits,
            )  # fmt: skip
            for line in _checked(problem, report, settings):
                tell(line)
            stack.enter_context(_work_folder(work, output, world))
            stack.enter_context(_threads(threads))
            network = make_network(
                source.network, settings, kind=problem.kind, names=problem.names, classes=problem.classes
            )
            if adapter is not None:
                network = attach(network, adapter, seed=settings.seed)
        parameters, inputs = _about(problem, source, settings, adapter)
        n_trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        with _own_random_numbers(network):
            course = fit(
                network, problem, settings, batch_tokens=batch_tokens, world=world, threads=threads, work=work,
                identity={**parameters, **inputs}, save_every=save_every,
                tensorboard=None if tensorboard is None else Path(tensorboard), progress=progress, note=tell,
                trial_callback=trial_callback,
            )  # fmt: skip
        plain = _plain(network, adapter)
        with together(world):
            found = _answers(
                plain, problem, source, settings, world=world, threads=threads, batch_tokens=batch_tokens,
                datasets="" not in files,
            )  # fmt: skip
        made = stamp("finetune", REVISIONS["finetune"], parameters=parameters, inputs=inputs)
        about = _described(problem, settings, course, n_trained=n_trained, plain=plain)
        training = {**made, **about, **report, "metrics": found.metrics}
        if world.rank == 0:
            with atomic_dir(output) as temporary:
                checkpoints.save(plain, temporary)
                copy_vocabulary(Path(model) / VOCABULARY, temporary / VOCABULARY)
                write_json(training, temporary / "training.json")
                write_json(problem.split, temporary / "split.json")
                write_text(as_tsv(course.rows, COLUMNS), temporary / "loss.tsv")
                write_table(found.table, temporary / "predictions.parquet", made)
                if found.pooled is not None:
                    write_table(found.pooled, temporary / "predictions_pooled.parquet", made)
                if adapter is not None:
                    write_adapter(network, adapter, temporary / "adapter")
    return training


def _check_share(settings: Settings, world: World) -> None:
    """UserError where there are more processes than cells in a batch."""
    if settings.batch_cells < world.size:
        raise UserError(
            f"a batch has {settings.batch_cells} cells for {world.size} processes",
            fix=f"start {settings.batch_cells} at most, or raise batch_cells",
        )


def _checked(problem: Problem, report: Mapping[str, Any], settings: Settings) -> list[str]:
    """What is worth saying before it starts; UserError where the schedule does not fit the number of steps."""
    steps = count_steps(problem, settings)
    long = settings.long_warmup and settings.warmup > max(steps, 1)
    check_schedule(schedule=settings.schedule, warmup=settings.warmup, steps=None if long else steps)
    notes = [*problem.split["notes"], *([_unfinished(settings, steps)] if long else [])]
    return [*_told(report), *notes, _sizes(problem, steps)]


@contextmanager
def _work_folder(folder: Path, output: Path, world: World) -> Iterator[None]:
    """Hold the folder of states for this process; it goes at the end, or in a failure before there is a state.

    Of processes that train together the first one does.
    """
    if world.rank > 0:
        yield
        return

    def refuse() -> NoReturn:
        raise UserError(
            "another process is fine-tuning this model", path=output, fix="wait for it, or end it"
        )

    with exclusive(folder / ".lock", refuse):
        for unfinished in folder.rglob(".part-*"):
            unfinished.unlink()
        try:
            yield
        except BaseException:
            if not has_state(folder):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """So many threads for torch within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _own_random_numbers(network: Geneformer) -> AbstractContextManager[None]:
    """Leave torch's generators as they were: every step seeds them anew."""
    device = network.words.weight.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _told(report: Mapping[str, Any]) -> list[str]:
    """What of the labels is not used, in words."""
    cells, genes = report["cells"], report.get("genes", {})
    counts = {
        "cells have no label": cells.get("no_label"),
        "labelled cells are not in the tokens": cells.get("labelled_without_tokens"),
        "cells hold none of the genes": cells.get("without_labelled_genes"),
        "cells are left out by the limits": cells.get("over_limit"),
        "cells have no gene": cells.get("without_genes"),
        "rows of the label table have no label": genes.get("table", {}).get("no label"),
        "names are others of one gene": genes.get("other names of one gene"),
    }
    lines = [f"{n:,} {what}" for what, n in counts.items() if n]
    for column, classes in cells.get("rare_classes", {}).items():
        shown = ", ".join(f"{name} ({n})" for name, n in classes.items())
        lines.append(f"{column}: rare classes are left out: {shown}")
    for what in ("outside the vocabulary", "in_no_cell"):
        names = genes.get(what, [])
        if names:
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            lines.append(f"{len(names)} labelled genes are {what.replace('_', ' ')}: {shown}")
    return lines


def _unfinished(settings: Settings, steps: int) -> str:
    return (
        f"the published warm-up of {settings.warmup:,.0f} steps is longer than the training of {steps:,}: "
        f"the learning rate ends at {steps / settings.warmup:.1%} of its peak"
    )


def _sizes(problem: Problem, steps: int) -> str:
    what = "genes" if problem.kind == "genes" else "cells"
    n = problem.split["n"]
    sides = f"{n['train']:,} {what} to train on, {n['heldout']:,} held out, {n['test']:,} to test"
    return f"{sides}; at most {steps:,} steps"


def _plain(network: Geneformer, adapter: Adapter | None) -> Geneformer:
    """The network as it is saved: without adapters, and with the dropout of its config."""
    if adapter is None:
        return network.eval().requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in merged_state(network).items()}
    plain = layouts.assemble(network.config, state, backend=network.backend)
    return plain.to(network.words.weight.device).eval().requires_grad_(False)


def _answers(
    network: Geneformer, problem: Problem, source: Model, settings: Settings, *, world: World,
    threads: int | None, batch_tokens: int, datasets: bool,
) -> Answers:  # fmt: skip
    """Predictions for the held-out and the test side."""
    sides = (HELDOUT, TEST)
    cells = problem.cells(*sides)
    wanted = problem.wanted(sides) if problem.kind == "genes" else None
    with evaluator(
        network, wanted=wanted, dtype=DTYPES[settings.precision], threads=threads, batch_tokens=batch_tokens
    ) as run:
        found = outputs(problem, divided(run, world), cells, sides)
    if not np.isfinite(found.logits).all():  # weights that are finite still, but too large to compute with
        raise UserError("the predictions are no longer finite", fix="lower the learning rate")
    if problem.kind == "genes":
        return answers_about_genes(problem, found, source.vocabulary)
    return answers_about_cells(problem, found, datasets=datasets)


def _described(
    problem: Problem, settings: Settings, course: Course, *, n_trained: int, plain: Geneformer
) -> dict[str, Any]:
    """What training.json says about the training itself."""
    named = [
        {
            "name": name,
            "classes": list(classes),
            **{
                word: sizes.tolist()
                for word, sizes in (
                    ("train", problem.class_sizes(TRAIN)[task]),
                    ("heldout", problem.class_sizes(HELDOUT)[task]),
                    ("test", problem.class_sizes(TEST)[task]),
                )
            },
        }
        for task, (name, classes) in enumerate(zip(problem.names, problem.classes, strict=True))
    ]
    return {
        "task": problem.kind,
        "labels": named,
        "task_weights": task_weights(problem, settings),
        "split": {key: problem.split[key] for key in ("kind", "by", "unit", "n", "notes")},
        "n_parameters": sum(p.numel() for p in plain.parameters()),
        "n_trained": n_trained,
        "n_cells": len(problem.cells(TRAIN)),
        "steps": course.step,
        "epochs": course.step / steps_per_epoch(problem, settings),
        "stopped_early": course.stopped,
        "kept": "best" if course.weights else "last",
        "best": course.best,
        **({"aggregation": AGGREGATION} if problem.kind == "genes" else {}),
    }
