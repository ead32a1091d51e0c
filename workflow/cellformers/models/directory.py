"""A model directory: config.json, model.safetensors and the vocabulary the model was trained with.

The vocabulary travels with the weights, so tokens made with another dictionary are recognised by their digest.
"""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from cellformers.errors import UserError
from cellformers.io.files import atomic_dir, digest_file
from cellformers.models import checkpoints, layouts
from cellformers.models.bert_config import Config
from cellformers.models.checkpoints import CONFIG_FILE, WEIGHTS_FILE
from cellformers.models.geneformer import Geneformer
from cellformers.vocabulary import Vocabulary

VOCABULARY = "vocabulary"


@dataclass(frozen=True)
class Model:
    """A network ready for inference, its vocabulary, and the digest of its config and weights."""

    path: Path
    network: Geneformer
    vocabulary: Vocabulary
    digest: str


def model_digest(folder: str | Path) -> str:
    """sha256 over the digests of config.json and model.safetensors, as "sha256:<hex>"."""
    parts = [digest_file(Path(folder) / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return "sha256:" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_model(
    folder: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Model:  # fmt: skip
    """Load a model directory with its vocabulary.

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
    network = checkpoints.load(folder, dtype=dtype, device=device, backend=backend)
    return Model(folder, network, vocabulary, model_digest(folder))


def check_fit(vocabulary: Vocabulary, config: Config, folder: Path) -> None:
    """UserError where the network has no room for the tokens of the vocabulary."""
    if vocabulary.size > config.vocab_size:
        raise UserError(
            f"the vocabulary {vocabulary.name!r} has {vocabulary.size} tokens, the network {config.vocab_size}",
            path=folder, fix="pair the model with the vocabulary it was trained with",
        )  # fmt: skip


def import_model(source: str | Path, vocabulary: str | Path | None, output: str | Path) -> None:
    """Copy a folder of published weights, with the vocabulary it belongs to, into a model directory.

    Everything is loaded once, so a damaged or ill-matched pair is refused here. `vocabulary` may be None where
    `source` carries its own.
    """
    source = Path(source)
    checkpoints.read_config(source)
    words = Path(vocabulary) if vocabulary is not None else source / VOCABULARY
    if not words.is_dir():
        raise UserError("no vocabulary folder", path=words, fix="name the vocabulary of this model")
    with atomic_dir(output) as temporary:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (source / name).is_file():
                raise UserError("no such file", path=source / name)
            shutil.copyfile(source / name, temporary / name)
        shutil.copytree(words, temporary / VOCABULARY)
        try:
            open_model(temporary)
        except UserError as error:
            raise UserError(str(error).replace(str(temporary), str(source))) from error


def randomize(folder: str | Path, output: str | Path, *, seed: int) -> None:
    """A model directory of the same architecture and vocabulary with random initial weights: a baseline."""
    folder = Path(folder)
    config = checkpoints.read_config(folder)
    with atomic_dir(output) as temporary:
        checkpoints.save(layouts.random_model(config, seed=seed), temporary)
        shutil.copytree(folder / VOCABULARY, temporary / VOCABULARY)
