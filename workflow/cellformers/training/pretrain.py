"""Masked-gene pretraining: tokens in, a model directory with weights, vocabulary and loss curve out.

    pretrain(["tokens/0.parquet"], "vocabulary", "models/own", steps=400)
    pretrain(shards, "vocabulary", "models/v2", preset="geneformer-v2-104m", accelerator="cuda", precision="bf16")
    pretrain(cancer, None, "models/tuned", preset="geneformer-v2-104m-clcancer", start="models/geneformer-v2-104m")

The objective is BERT's (Devlin et al. 2019) on packed cells: 15 % of the genes of a cell are hidden or swapped
and guessed from the rest; logits are computed at those positions alone. On the CPU the same input, settings and
number of threads give the same weights to the bit, interrupted or not. Unfinished work lies in `.training-<name>`
beside the output: the tokens as a flat file, and states to go on from.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from cellformers.errors import UserError
from cellformers.io.files import atomic_dir, stamp, write_json, write_text
from cellformers.io.locks import exclusive
from cellformers.models import checkpoints, layouts
from cellformers.models.attention import choose
from cellformers.models.batches import DTYPES
from cellformers.models.bert_config import Config
from cellformers.models.directory import VOCABULARY, model_digest
from cellformers.models.geneformer import Geneformer
from cellformers.models.heads import MaskedHead
from cellformers.revisions import REVISIONS
from cellformers.tokens import check_vocabulary
from cellformers.training import distributed
from cellformers.training.corpus import Corpus, open_corpus
from cellformers.training.curves import Curve, as_tsv
from cellformers.training.distributed import World, together
from cellformers.training.optimiser import check_schedule
from cellformers.training.places import check_output
from cellformers.training.presets import PRESETS, Settings, assumptions, resolve
from cellformers.training.pretrain_loop import COLUMNS, Checkpoints, Data, Training, heldout_loss
from cellformers.training.state import has_state, load_state
from cellformers.vocabulary import Vocabulary, copy_vocabulary

CHECKPOINT_EVERY = "15min"
ARCHITECTURE = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
}

Note = Callable[[str], None]


def pretrain(
    tokens: Sequence[str | Path],
    vocabulary_dir: str | Path | None,
    output: str | Path,
    *,
    preset: str = "small",
    start: str | Path | None = None,
    checkpoint_every: str = CHECKPOINT_EVERY,
    tensorboard: str | Path | None = None,
    threads: int | None = None,
    accelerator: str = "cpu",
    backend: str = "auto",
    progress: Callable[[int], None] | None = None,
    note: Note | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train a Geneformer, from scratch or from a model there is, and write its model directory.

    Started by torchrun in several processes they share the work; all need to see the same files.

    Parameters
    ----------
    tokens, vocabulary_dir, output
        Token shards (how the cells are divided among them makes no difference, their order does), the
        vocabulary they were made with (None: that of `start`), the model directory to write.
    preset, options
        A name in `presets.PRESETS`, and any fields of `presets.Settings` that are to differ from it; None stands
        for the preset's.
    start
        A model directory with a masked-gene head whose training is continued, with an optimiser and a schedule of
        its own. It brings its architecture; dropout may be given otherwise.
    checkpoint_every
        How often a state is saved to go on from: a number of steps ("500") or of minutes ("15min").
    tensorboard
        Folder for an event log.
    backend
        See `models.attention.choose`.
    progress
        Called with the number of steps done since the last call.
    note
        Called with lines for people.

    Returns
    -------
    dict
        What training.json holds; among it heldout_loss, unigram_entropy and improvement (their difference), in
        nats per gene.

    Raises
    ------
    UserError
        If the tokens are of another vocabulary, don't fit the positions, the settings are out of range, the loss is
        no longer finite, or another process trains the same model.
    SystemExit
        On SIGTERM or SIGINT, after a state was saved.
    """
    with distributed.join(accelerator) as world, ExitStack() as stack:
        tell: Note = note if note is not None and world.rank == 0 else lambda _: None
        with together(world):
            settings = resolve(preset, options)
            _check_share(settings, world)
            check_output(output)
            every = _cadence(checkpoint_every)
            words, vocabulary = _vocabulary(vocabulary_dir, start, preset)
            for path in tokens:
                check_vocabulary(path, vocabulary)
            config = _config(settings, vocabulary, start, asked=_asked(preset, options))
            work = stack.enter_context(_work_folder(Path(output), world))
        corpus = _open(tokens, vocabulary, work, world)
        with together(world):
            _check_length(corpus, config)
            data = Data(corpus, vocabulary, settings)
        for name, source in assumptions(preset, options).items():
            tell(f"{name} {getattr(settings, name)} is not published for {preset}: {source}")
        stack.enter_context(_torch_settings(threads, world))
        model = _initial(config, data, start, world, backend=backend)
        steps = data.n_steps()
        with together(world):  # of epochs the number of steps is known only now
            check_schedule(schedule=settings.schedule, warmup=settings.warmup, steps=steps)
        made_with = _parameters(replace(settings, steps=steps), config)
        inputs = {"tokens": corpus.digest, "vocabulary": vocabulary.digest}
        if start is not None:
            inputs["model"] = model_digest(start)
        identity = {"revision": REVISIONS["pretrain"], "parameters": made_with, "inputs": inputs}
        rows = _train(
            model, data, steps=steps, world=world, checkpoints=Checkpoints(work, identity, *every),
            tensorboard=tensorboard, progress=progress, tell=tell,
        )  # fmt: skip
        training = {
            **stamp("pretrain", REVISIONS["pretrain"], parameters=made_with, inputs=inputs),
            **_outcome(model, data, rows, world),
        }
        if world.rank == 0:
            _write(Path(output), model, training, rows, words=words)
    return training


# --- before: what is asked for, and whether it fits together -------------------------------------------------


def _cadence(every: str) -> tuple[int | None, float | None]:
    """Steps, or seconds, between states."""
    found = re.fullmatch(r"\s*(\d+)\s*(min|m|steps)?\s*", every)
    if found is None or not int(found[1]):
        raise UserError(
            f"checkpoint-every is {every!r}", fix="give a number of steps (500) or minutes (15min)"
        )
    number, unit = int(found[1]), found[2]
    return (None, 60.0 * number) if unit in ("min", "m") else (number, None)


def _check_share(settings: Settings, world: World) -> None:
    """UserError where there are more processes than micro-batches in a step."""
    if settings.batch_cells is None and settings.accumulate < world.size:
        raise UserError(
            f"a step has {settings.accumulate} micro-batches for {world.size} processes",
            fix=f"accumulate {world.size}, or a multiple, or give batch_cells",
        )


def _vocabulary(folder: str | Path | None, start: str | Path | None, preset: str) -> tuple[Path, Vocabulary]:
    """The vocabulary to train with, which is also that of the model to start from."""
    continues = PRESETS[preset].continues
    if start is None and continues is not None:
        raise UserError(f"preset {preset} continues a model", fix=f"start from {continues}")
    if folder is None and start is None:
        raise UserError("no vocabulary given", fix="name that of the tokens")
    words = Path(folder) if folder is not None else Path(str(start)) / VOCABULARY
    vocabulary = Vocabulary.load(words)
    if start is not None and Vocabulary.load(Path(start) / VOCABULARY).digest != vocabulary.digest:
        raise UserError(
            f"this model has another vocabulary than {words}", path=start,
            fix="tokenize with the vocabulary that the model carries",
        )  # fmt: skip
    return words, vocabulary


def _asked(preset: str, options: Mapping[str, Any]) -> set[str]:
    """Settings that somebody wants to have their value; the small defaults give way to those of a model."""
    given = {name for name, value in options.items() if value is not None}
    return given | set(PRESETS[preset].settings)


def _config(
    settings: Settings, vocabulary: Vocabulary, start: str | Path | None, *, asked: set[str]
) -> Config:
    """The architecture to train."""
    if start is None:
        return Config.from_dict(
            {
                **{name: getattr(settings, own) for own, name in ARCHITECTURE.items()},
                "hidden_dropout_prob": settings.dropout, "attention_probs_dropout_prob": settings.dropout,
                "model_type": "bert", "vocab_size": vocabulary.size, "hidden_act": "relu",
                "max_position_embeddings": settings.max_positions or vocabulary.context_length,
                "initializer_range": settings.initializer_range,
                "pad_token_id": vocabulary.special_tokens["<pad>"],
            }
        )  # fmt: skip
    config = checkpoints.read_config(start)
    if config.head != "masked":
        raise UserError(
            "has no masked-gene head to train on", path=start, fix="start from a pretrained model"
        )
    for own, name in ARCHITECTURE.items():
        wanted, found = getattr(settings, own), getattr(config, name)
        if own in asked and wanted is not None and wanted != found:
            raise UserError(
                f"{own} of this model is {found}, not {wanted}", path=start, fix=f"leave {own} out"
            )
    if config.vocab_size < vocabulary.size:
        raise UserError(
            f"the network has {config.vocab_size} tokens, its vocabulary {vocabulary.size}", path=start
        )
    if "dropout" not in asked:
        return config
    return replace(
        config, hidden_dropout_prob=settings.dropout, attention_probs_dropout_prob=settings.dropout
    )


def _check_length(corpus: Corpus, config: Config) -> None:
    if corpus.longest > config.max_position_embeddings:
        raise UserError(
            f"a cell has {corpus.longest} tokens, the model {config.max_position_embeddings} positions",
            fix="raise max_positions, or tokenize with a shorter context",
        )


def _parameters(settings: Settings, config: Config) -> dict[str, Any]:
    """What training.json says about the settings: the architecture as it is, the length in steps."""
    values = asdict(settings) | {own: getattr(config, name) for own, name in ARCHITECTURE.items()}
    values["dropout"] = config.hidden_dropout_prob
    values["initializer_range"] = config.initializer_range
    del values["epochs"]
    return values


# --- the folder of unfinished work ----------------------------------------------------------------------------


@contextmanager
def _work_folder(output: Path, world: World) -> Iterator[Path]:
    """The folder beside `output` for states and the flat corpus; of one process (or job) at a time.

    It goes when training is complete, or when it fails before there is a state to go on from.
    """
    folder = output.parent / f".training-{output.name}"
    if world.rank > 0:
        yield folder
        return

    def refuse() -> NoReturn:
        raise UserError("another process is training this model", path=output, fix="wait for it, or end it")

    with exclusive(folder / ".lock", refuse):
        for unfinished in folder.rglob(".part-*"):
            unfinished.unlink()
        try:
            yield folder
        except BaseException:
            if not has_state(folder):
                shutil.rmtree(folder)
            raise
        shutil.rmtree(folder)


def _open(tokens: Sequence[str | Path], vocabulary: Vocabulary, work: Path, world: World) -> Corpus:
    """The first process lays the corpus out, then all map it."""
    with together(world):
        corpus = open_corpus(tokens, vocabulary, work) if world.rank == 0 else None
    with together(world):
        return corpus or open_corpus(tokens, vocabulary, work)


# --- the training ------------------------------------------------------------------------------------------


@contextmanager
def _torch_settings(threads: int | None, world: World) -> Iterator[None]:
    """So many threads, and torch's random numbers left as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)


def _initial(
    config: Config, data: Data, start: str | Path | None, world: World, *, backend: str
) -> Geneformer:
    """The weights of `start`, or random ones with an output bias that already knows how frequent each gene is."""
    with together(world):
        backend = choose(backend, world.device, DTYPES[data.settings.precision])
    if start is not None:
        with together(world):
            state = checkpoints.load(start, backend="sdpa").state_dict()
    else:
        random = layouts.random_model(config, seed=data.settings.seed)
        assert isinstance(random.head, MaskedHead)
        with torch.no_grad():
            frequencies = data.log_frequencies().astype(np.float32)
            random.head.bias.fill_(float(data.log_frequencies().min()))
            random.head.bias[torch.from_numpy(data.genes.astype(np.int64))] = torch.from_numpy(frequencies)
        state = random.state_dict()
    model = layouts.assemble(config, state, backend=backend).to(world.device).train().requires_grad_(True)
    distributed.equalise(model.state_dict().values(), world)
    return model


def _train(
    model: Geneformer, data: Data, *, steps: int, world: World, checkpoints: Checkpoints,
    tensorboard: str | Path | None, progress: Callable[[int], None] | None, tell: Note,
) -> list[dict[str, Any]]:  # fmt: skip
    """Take the steps, or those that an interrupted training has left; the rows of loss.tsv."""
    with together(world):
        state = load_state(checkpoints.folder, settings=checkpoints.settings, note=tell)
    if state is not None:
        tell(f"going on after step {state.step:,} of {steps:,}")
    first = world.rank == 0
    with Curve(
        checkpoints.folder / "loss.tsv" if first else None,
        COLUMNS, tensorboard=tensorboard if first else None, rows=state.extra["rows"] if state else (),
    ) as curve:  # fmt: skip
        Training(
            model,
            data,
            steps=steps,
            world=world,
            curve=curve,
            checkpoints=checkpoints,
            state=state,
            note=tell,
        ).run(progress)
        return curve.rows


def _outcome(
    model: Geneformer, data: Data, rows: Sequence[Mapping[str, Any]], world: World
) -> dict[str, Any]:
    held = rows[-1]["heldout_loss"] if rows else heldout_loss(model, data, world)
    unigram = data.unigram_entropy()
    return {
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "n_cells": len(data.train),
        "n_heldout": len(data.heldout),
        "n_tokens": rows[-1]["tokens"] if rows else 0,
        "heldout_loss": held,
        "unigram_entropy": unigram,
        "improvement": unigram - held,
    }


def _write(
    output: Path, model: Geneformer, training: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *,
    words: Path,
) -> None:  # fmt: skip
    with atomic_dir(output) as temporary:
        checkpoints.save(model, temporary)
        copy_vocabulary(words, temporary / VOCABULARY)
        write_json(training, temporary / "training.json")
        write_text(as_tsv(rows, COLUMNS), temporary / "loss.tsv")
