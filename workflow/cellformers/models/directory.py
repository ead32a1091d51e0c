"""A model directory: config.json, model.safetensors and the vocabulary the model was trained with.

    model = open_model("models/gf")
    convert("models/gf", "models/gf-te", layout="te")

The vocabulary travels with the weights, so tokens made with another dictionary are recognised by their digest.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cellformers.errors import UserError
from cellformers.io.files import atomic_dir, digest_file, read_json, write_json
from cellformers.models import checkpoints, layouts
from cellformers.models.bert_config import Config, for_layout
from cellformers.models.checkpoints import CONFIG_FILE
from cellformers.models.geneformer import Geneformer
from cellformers.models.weight_files import WEIGHTS_FILE, weight_files, write_tensors
from cellformers.vocabulary import Vocabulary, copy_vocabulary

VOCABULARY = "vocabulary"
NOTES = (".json", ".md", ".tsv", ".txt")  # of training, say: a conversion copies such files along


@dataclass(frozen=True)
class Model:
    """A network ready for inference, its vocabulary, and the digest of its config and weights."""

    path: Path
    network: Geneformer
    vocabulary: Vocabulary
    digest: str


def model_digest(folder: str | Path) -> str:
    """sha256 over the digests of config.json and the files of the weights, as "sha256:<hex>"."""
    parts = [digest_file(path) for path in (Path(folder) / CONFIG_FILE, *weight_files(folder))]
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    backend: str = "auto", fp8: bool = False,
) -> Model:  # fmt: skip
    """Load a model directory with its vocabulary; arguments as in `checkpoints.load`.

    Raises
    ------
    UserError
        If a file is missing or broken, or the vocabulary has more tokens than the network.
    """
    folder = Path(folder)
    config = checkpoints.read_config(folder)
    if not (folder / VOCABULARY).is_dir():
        raise UserError(
            "the model carries no vocabulary/", path=folder,
            fix="copy the vocabulary it was trained with there (cellformers vocabulary makes one)",
        )  # fmt: skip
    vocabulary = Vocabulary.load(folder / VOCABULARY)
    check_fit(vocabulary, config, folder)
    network = checkpoints.load(folder, dtype=dtype, device=device, backend=backend, fp8=fp8)
    return Model(folder, network, vocabulary, model_digest(folder))


def check_fit(vocabulary: Vocabulary, config: Config, folder: Path) -> None:
    """UserError where the network has no room for the tokens of the vocabulary."""
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"the vocabulary {vocabulary.name!r} has {vocabulary.size} tokens, the network {config.vocab_size}",
            path=folder, fix="pair the model with the vocabulary it was trained with",
        )  # fmt: skip


def import_model(source: str | Path, vocabulary: str | Path | None, output: str | Path) -> int:
    """Make a model directory of a folder of published weights and the vocabulary they belong to.

    Returns the number of tokens that the network knows beyond those of the vocabulary; of a published pair, 0.

    Weights of any layout and kind of file; a single safetensors file is copied as it is, others are written as one,
    with the same numbers and layout. Everything is read once, so a damaged or ill-matched pair is refused here.
    `vocabulary` may be None where `source` carries its own.
    """
    source = Path(source)
    config = checkpoints.read_config(source)
    words = Path(vocabulary) if vocabulary is not None else source / VOCABULARY
    if not words.is_dir():
        raise UserError("no vocabulary folder", path=words, fix="name the vocabulary of this model")
    loaded = Vocabulary.load(words)
    check_fit(loaded, config, source)
    weights = checkpoints.read_weights(source)
    with _replaced(output, source) as temporary:
        shutil.copyfile(source / CONFIG_FILE, temporary / CONFIG_FILE)
        if (source / WEIGHTS_FILE).is_file():
            shutil.copyfile(source / WEIGHTS_FILE, temporary / WEIGHTS_FILE)
        else:
            write_tensors(weights.tensors | weights.unused, temporary / WEIGHTS_FILE)
        copy_vocabulary(words, temporary / VOCABULARY)
    return config.vocab_size - loaded.size


def convert(source: str | Path, output: str | Path, *, layout: str) -> str:
    """Write a model directory with its weights in another layout ("hf" or "te"); returns the layout it had.

    Numbers keep their dtype and every bit, the config every key, the folder its vocabulary and notes; so the way
    there and back gives the same tensors and config. Left behind is what carries nothing: copies of tied tensors,
    position_ids, the empty state of TransformerEngine's modules.

    Raises
    ------
    UserError
        If there is no such layout, or the model does not load.
    """
    source = Path(source)
    if layout not in layouts.LAYOUTS:
        raise UserError(f"no layout {layout!r}", fix=f"give {' or '.join(layouts.LAYOUTS)}")
    config = checkpoints.read_config(source)
    weights = checkpoints.read_weights(source)
    tensors = weights.tensors
    if layout != weights.layout:
        try:
            state = layouts.from_published(tensors, config, layout=weights.layout)
        except UserError as error:
            raise UserError(error.what, path=source, fix="save them in one dtype first") from error
        tensors = layouts.to_published(state, config, layout=layout)
    with _replaced(output, source) as temporary:
        for path in sorted(source.iterdir()):
            if path.suffix in NOTES and path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, temporary / path.name)
        write_json(for_layout(read_json(source / CONFIG_FILE), layout), temporary / CONFIG_FILE)
        write_tensors(tensors | weights.unused, temporary / WEIGHTS_FILE)
        if (source / VOCABULARY).is_dir():
            copy_vocabulary(source / VOCABULARY, temporary / VOCABULARY)
    return weights.layout


def randomize(folder: str | Path, output: str | Path, *, seed: int) -> None:
    """A model directory of the same architecture and vocabulary with random initial weights: a baseline."""
    folder = Path(folder)
    config = checkpoints.read_config(folder)
    Vocabulary.load(folder / VOCABULARY)
    _check_memory(config, folder)
    with _replaced(output, folder) as temporary:
        checkpoints.save(layouts.random_model(config, seed=seed), temporary)
        copy_vocabulary(folder / VOCABULARY, temporary / VOCABULARY)


def _check_memory(config: Config, folder: Path) -> None:
    """UserError where the network that a config asks for can't be made on this machine."""
    needed = 4 * sum(math.prod(shape) for shape in layouts.published_shapes(config).values())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"its {CONFIG_FILE} asks for weights of {needed / 1e9:,.0f} GB, this machine has {there / 1e9:,.0f} GB of "
            "memory", path=folder, fix="use a larger machine, if the config is right",
        )  # fmt: skip


@contextmanager
def _replaced(output: str | Path, source: Path) -> Iterator[Path]:
    """As `atomic_dir`, but a folder is replaced only where it is a model's, or was, and does not hold `source`."""
    output = Path(output)
    inside = sorted(output.iterdir()) if output.is_dir() else []
    if (output / CONFIG_FILE).is_file():
        foreign = [p for p in inside if p.resolve() in (source.resolve(), *source.resolve().parents)]
    else:  # it may still be what a workflow left of one, so look for what no model has; notes alone are no model
        own = [p for p in inside if p.name == VOCABULARY or p.suffix == ".safetensors"]
        foreign = [p for p in inside if p not in own and not (own and p.suffix in NOTES)]
    if foreign:
        raise UserError(
            f"is a folder with other things in it ({foreign[0].name})", path=output,
            fix="choose another --output for the model",
        )  # fmt: skip
    with atomic_dir(output) as temporary:
        yield temporary
