"""The entries of resources/checkpoints.yaml, validated: what is published where, and how it is recognised."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cellformers.errors import UserError, did_you_mean
from cellformers.models.bert_config import Config
from cellformers.registry.fields import NAME, SHA256, maybe, one_of, positive, table, text
from cellformers.resources import read_yaml, resource

CHECKPOINTS = "checkpoints.yaml"
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
LAYOUTS = ("hf", "te")
HEADS = ("masked", "cell", "gene")
ARCHITECTURE = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "attention_probs_dropout_prob",
    "hidden_dropout_prob", "max_position_embeddings", "vocab_size", "type_vocab_size", "pad_token_id", "hidden_act",
    "layer_norm_eps", "initializer_range",
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_REVISION = re.compile(r"[\w./-]+")
_PATH = re.compile(r"(?!.*\.\.)[\w.+-]+(/[\w.+-]+)*")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its path there, size in bytes and sha256 (64 digits) where they are known."""

    path: str
    size: int | None
    sha256: str | None

    @property
    def name(self) -> str:
        """Its name, without folders."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class PublishedVocabulary:
    """The four dictionaries of a vocabulary."""

    name: str
    repository: str
    revision: str | None
    """A commit (40 digits), a branch to be resolved and locked, or None: the user names one."""
    files: tuple[RemoteFile, ...]
    licence: str | None
    """SPDX name; None: not verified."""
    citation: str
    note: str | None


@dataclass(frozen=True, kw_only=True)
class PublishedModel(PublishedVocabulary):
    """A checkpoint: config.json and one file of weights."""

    layout: str
    """"hf" or "te"."""
    head: str
    """"masked", "cell" or "gene"."""
    vocabulary: str
    n_parameters: int
    architecture: Mapping[str, int | float | str]
    """The fields named in `ARCHITECTURE`, as config.json has them."""

    @property
    def config(self) -> RemoteFile:
        """config.json."""
        return next(file for file in self.files if file.name == CONFIG)

    @property
    def weights(self) -> RemoteFile:
        """The file of weights."""
        return next(file for file in self.files if file.name in WEIGHTS)


@dataclass(frozen=True)
class Registry:
    """All entries by name."""

    models: Mapping[str, PublishedModel]
    vocabularies: Mapping[str, PublishedVocabulary]

    def find(self, name: str) -> PublishedVocabulary:
        """The model or vocabulary of that name; UserError where there is none."""
        entry = self.models.get(name) or self.vocabularies.get(name)
        if entry is None:
            raise UserError(
                f"no model {name!r} is registered",
                fix=did_you_mean(name, self.models) + " (cellformers download --list)",
            )
        return entry


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit id, which never means anything else."""
    return _COMMIT.fullmatch(revision) is not None


def read_registry(path: str | Path | None = None) -> Registry:
    """Read and validate a registry; None: the one of the package.

    Raises
    ------
    UserError
        If a key is missing, unknown or of the wrong kind; the message names the entry.
    """
    path = resource(CHECKPOINTS) if path is None else Path(path)
    try:
        content = read_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"not readable as YAML ({error})", path=path) from error
    try:
        content = table(content, "the registry", ("vocabularies", "models"))
        vocabularies = {name: _vocabulary(name, entry) for name, entry in _named(content["vocabularies"])}
        models = {name: _model(name, entry, vocabularies) for name, entry in _named(content["models"])}
        for name in set(models) & set(vocabularies):
            raise ValueError(f"{name} is a model and a vocabulary")
    except (ValueError, UserError) as error:
        raise UserError(str(error), path=path) from error
    return Registry(models, vocabularies)


def _named(section: Any) -> list[tuple[str, Any]]:
    if not isinstance(section, Mapping) or not section:
        raise ValueError("has a section without entries")
    return [(text(name, "the name of an entry", NAME), entry) for name, entry in section.items()]


_KEYS = ("repository", "revision", "folder", "files", "licence", "citation", "note")
_MODEL_KEYS = (*_KEYS, "layout", "head", "vocabulary", "n_parameters", "architecture")


def _common(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What models and vocabularies have in common."""
    if not isinstance(entry["files"], Mapping):
        raise ValueError(f"{name}: files is no mapping")
    folder = entry["folder"] if entry["folder"] == "" else text(entry["folder"], f"{name}: folder", _PATH)
    return {
        "name": name,
        "repository": text(entry["repository"], f"{name}: repository", _REPOSITORY),
        "revision": maybe(entry["revision"], f"{name}: revision", _REVISION),
        "files": tuple(_file(name, folder, file, known) for file, known in entry["files"].items()),
        "licence": maybe(entry["licence"], f"{name}: licence"),
        "citation": text(entry["citation"], f"{name}: citation"),
        "note": maybe(entry["note"], f"{name}: note"),
    }


def _file(name: str, folder: str, file: Any, known: Any) -> RemoteFile:
    where = f"{name}: {file}"
    known = table(known, where, ("size", "sha256"))
    return RemoteFile(
        "/".join(filter(None, (folder, text(file, where, NAME)))),
        None if known["size"] is None else positive(known["size"], f"{where}: size"),
        maybe(known["sha256"], f"{where}: sha256", SHA256),
    )


def _vocabulary(name: str, entry: Any) -> PublishedVocabulary:
    made = PublishedVocabulary(**_common(name, table(entry, name, _KEYS)))
    if len(made.files) != 4:
        raise ValueError(f"{name} has {len(made.files)} files, not the four dictionaries")
    return made


def _model(name: str, entry: Any, vocabularies: Mapping[str, PublishedVocabulary]) -> PublishedModel:
    entry = table(entry, name, _MODEL_KEYS)
    architecture = dict(table(entry["architecture"], f"{name}: architecture", ARCHITECTURE))
    # every field is there, so nothing of it is a default
    config = Config.from_dict({"model_type": "bert", **architecture})
    made = PublishedModel(
        **_common(name, entry),
        layout=one_of(entry["layout"], f"{name}: layout", LAYOUTS),
        head=one_of(entry["head"], f"{name}: head", HEADS),
        vocabulary=one_of(entry["vocabulary"], f"{name}: vocabulary", tuple(vocabularies)),
        n_parameters=positive(entry["n_parameters"], f"{name}: n_parameters"),
        architecture={key: getattr(config, key) for key in ARCHITECTURE},
    )
    names = sorted(file.name for file in made.files)
    if names not in [sorted((CONFIG, weights)) for weights in WEIGHTS]:
        raise ValueError(
            f"{name}: files are {', '.join(names)}, not {CONFIG} and one of {', '.join(WEIGHTS)}"
        )
    return made


def differing_fields(model: PublishedModel, found: Config) -> list[str]:
    """Every field in which a config.json differs from the registered architecture, in words."""
    own = {field.name for field in fields(Config)}
    wanted = {**model.architecture, "head": model.head}
    return [
        f"{key} is {getattr(found, key)!r}, registered {value!r}"
        for key, value in wanted.items()
        if key in own and getattr(found, key) != value
    ]
