"""The registry of published models, the lock, and downloads from a Hub that behaves or not."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from command_line import files_in
from hub_server import Hub
from safetensors.torch import load_file
from typer.testing import CliRunner

from cellformers.commands import downloads
from cellformers.errors import UserError
from cellformers.io.download import Patience
from cellformers.io.files import digest_file
from cellformers.models import checkpoints, layouts
from cellformers.models.bert_config import Config
from cellformers.models.directory import open_model
from cellformers.registry import (
    PublishedModel,
    Registry,
    download,
    find_model,
    home,
    read_registry,
)
from cellformers.registry.entries import is_commit
from cellformers.resources import resource
from cellformers.vocabulary import SPECIAL_TOKENS, Vocabulary, read_published

COMMIT, LATER = "0123456789" * 4, "fedcba9876" * 4
ARCHITECTURE = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128,
    "attention_probs_dropout_prob": 0.02, "hidden_dropout_prob": 0.02, "max_position_embeddings": 128,
    "vocab_size": 304, "type_vocab_size": 2, "pad_token_id": 0, "hidden_act": "relu", "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
}  # fmt: skip
FAST = Patience(sleep=lambda _: None, attempts=3, timeout=10.0)


# --- the registry of the package ------------------------------------------------------------------------


def test_the_file_is_found_in_a_checkout_too() -> None:
    link = Path(__file__).parents[1] / "resources"
    assert link.is_symlink()
    assert not os.readlink(link).startswith("/")
    assert (link / "checkpoints.yaml").samefile(resource("checkpoints.yaml"))
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        resource("none.yaml")


def test_nothing_is_registered_twice() -> None:
    """YAML takes the last of two equal keys without a word."""

    def keys(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value]
            assert len(names) == len(set(names)), names
            for _, value in node.value:
                keys(value)

    keys(yaml.compose(resource("checkpoints.yaml").read_text()))


REGISTRY = read_registry()


def test_what_is_registered() -> None:
    assert list(REGISTRY.vocabularies) == ["gc30M", "gc104M"]
    assert {
        "geneformer-v1-10m", "geneformer-v2-104m", "geneformer-v2-104m-clcancer", "geneformer-v2-316m",
        "geneformer-v1-10m-cardiomyopathies", "gf-12L-30M-i2048", "gf-12L-95M-i4096", "gf-12L-95M-i4096_CLcancer",
        "gf-20L-95M-i4096", "nvidia-geneformer-v2-104m", "nvidia-geneformer-v2-316m",
    } == set(REGISTRY.models)  # fmt: skip


def n_parameters(config: Config, head: str) -> int:
    """Encoder and head of a BERT with tied decoder, counted by hand."""
    d, f = config.hidden_size, config.intermediate_size
    embeddings = (config.vocab_size + config.max_position_embeddings + config.type_vocab_size) * d + 2 * d
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
    heads = {"masked": d * d + d + 2 * d + config.vocab_size, "cell": (d * d + d) + (3 * d + 3)}
    return embeddings + config.num_hidden_layers * layer + heads[head]


@pytest.mark.parametrize("model", REGISTRY.models.values(), ids=lambda model: model.name)
def test_every_model(model: PublishedModel) -> None:
    config = Config.from_dict({"model_type": "bert", **model.architecture})
    assert (config.hidden_act, config.layer_norm_eps, config.initializer_range) == ("relu", 1e-12, 0.02)
    assert (config.type_vocab_size, config.pad_token_id) == (2, 0)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob
    v1 = model.vocabulary == "gc30M"
    assert (config.vocab_size, config.max_position_embeddings) == ((25426, 2048) if v1 else (20275, 4096))
    assert model.n_parameters == n_parameters(config, model.head)
    assert model.revision is None or is_commit(model.revision) or model.note
    assert model.config.size is None
    if model.layout == "hf":
        assert model.licence == "Apache-2.0"
        assert model.weights.sha256 is not None
        # what is beyond the numbers themselves: names and, in V1, an integer buffer of positions
        assert model.weights.size is not None
        assert 0 < model.weights.size - 4 * model.n_parameters < 110_000
    else:
        assert (model.licence, model.weights.sha256) == (None, None)


def test_every_vocabulary(reference_data: Path) -> None:
    """Size and digest of the genuine dictionaries."""
    for vocabulary in REGISTRY.vocabularies.values():
        for file in vocabulary.files:
            path = reference_data / "geneformer" / vocabulary.name / file.name
            assert path.stat().st_size == file.size
            assert digest_file(path) == f"sha256:{file.sha256}"


def test_digests_are_of_different_files() -> None:
    entries = [*REGISTRY.models.values(), *REGISTRY.vocabularies.values()]
    digests = [file.sha256 for entry in entries for file in entry.files if file.sha256]
    assert len(digests) == len(set(digests)) == 17


# --- validation -----------------------------------------------------------------------------------------


def known(content: bytes) -> dict[str, Any]:
    """Size and digest as a registry has them."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def entry_of_vocabulary(files: dict[str, bytes]) -> dict[str, Any]:
    return {
        "repository": "lab/Model", "revision": COMMIT, "folder": "geneformer",
        "files": {name: known(content) for name, content in files.items()},
        "licence": "Apache-2.0", "citation": "Lab (2026)", "note": None,
    }  # fmt: skip


def entry_of_model(**changes: Any) -> dict[str, Any]:
    return {
        "repository": "lab/Model", "revision": COMMIT, "folder": "Small",
        "files": {"config.json": {"size": None, "sha256": None}, "model.safetensors": {"size": None, "sha256": None}},
        "layout": "hf", "head": "masked", "vocabulary": "tiny", "n_parameters": 100_000, "licence": "Apache-2.0",
        "citation": "Lab (2026)", "note": None, "architecture": dict(ARCHITECTURE), **changes,
    }  # fmt: skip


def write_registry(path: Path, **models: dict[str, Any]) -> Path:
    words = entry_of_vocabulary({name: name.encode() for name in "abcd"})
    path.write_text(yaml.safe_dump({"vocabularies": {"tiny": words}, "models": models}))
    return path


FILES = entry_of_model()["files"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"licens": "MIT"}, "small: unknown key 'licens'; did you mean 'licence'?"),
        ({"repository": "Model"}, "small: repository is 'Model'"),
        ({"repository": None}, "small: repository is None"),
        ({"revision": "a b"}, "small: revision is 'a b'"),
        ({"folder": "../up"}, "small: folder is '../up'"),
        ({"folder": "/root"}, "small: folder is '/root'"),
        ({"layout": "onnx"}, "small: layout is 'onnx'; there is: hf, te"),
        ({"head": "mask"}, "small: head is 'mask'; did you mean 'masked'?"),
        ({"vocabulary": "tinny"}, "small: vocabulary is 'tinny'; did you mean 'tiny'?"),
        ({"n_parameters": "100"}, "small: n_parameters is '100', not a positive whole number"),
        ({"n_parameters": True}, "small: n_parameters is True"),
        ({"citation": ""}, "small: citation is ''"),
        ({"files": {"config.json": FILES["config.json"]}}, "small: files are config.json, not config.json and one of"),
        ({"files": {**FILES, "a.bin": FILES["config.json"]}}, "small: files are a.bin, config.json, model.safetensors"),
        ({"files": {**FILES, "config.json": {"size": 1}}}, "small: config.json lacks sha256"),
        ({"files": {**FILES, "config.json": {"size": 1, "sha256": "AB" * 32}}}, "small: config.json: sha256 is 'ABAB"),
        ({"files": {**FILES, "config.json": {"size": -1, "sha256": None}}}, "small: config.json: size is -1"),
        ({"files": {**FILES, "../up": FILES["config.json"]}}, "small: ../up is '../up'"),
        ({"architecture": {**ARCHITECTURE, "hidden_act": "tanh"}}, "hidden_act 'tanh' is not supported"),
        ({"architecture": {**ARCHITECTURE, "layers": 2}}, "small: architecture: unknown key 'layers'"),
        ({"architecture": {**ARCHITECTURE, "vocab_size": "304"}}, "vocab_size is '304'"),
        ({"architecture": {k: v for k, v in ARCHITECTURE.items() if k != "hidden_size"}},
         "small: architecture lacks hidden_size"),
    ],
)  # fmt: skip
def test_entries_that_are_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = write_registry(tmp_path / "r.yaml", small=entry_of_model())
    assert set(read_registry(path).models) == {"small"}
    write_registry(path, small=entry_of_model(**changes))
    with pytest.raises(UserError) as caught:
        read_registry(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["models: [", "- 1", "models: {}\nvocabularies: {}", "models: {}"])
def test_files_that_are_no_registry(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml: "):
        read_registry(path)


# --- a Hub ----------------------------------------------------------------------------------------------


class Lab:
    """A Hub with a small model and its dictionaries, and the registry that knows them."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.folder = hub, folder
        config = Config.from_dict({"model_type": "bert", **ARCHITECTURE})
        self.network = layouts.random_model(config, seed=0)
        self.published = folder / "published"
        checkpoints.save(self.network, self.published)
        self.files = {path.name: path.read_bytes() for path in self.published.iterdir()}
        self.words = dictionaries()
        self.changes: dict[str, Any] = {}
        self.publish(COMMIT)

    def publish(self, commit: str) -> None:
        """Put the files on the Hub, as a commit at which `main` stands."""
        self.hub.publish("lab/Model", commit, "Small", self.files)
        self.hub.publish("lab/Model", commit, "geneformer", self.words)

    @property
    def registry(self) -> Registry:
        """Knows digest and size of the weights, unless `changes` say otherwise."""
        files = {
            name: {"size": None, "sha256": None} if name == "config.json" else known(content)
            for name, content in self.files.items()
        }
        path = self.folder / "registry.yaml"
        entry = entry_of_model(**{"files": files, **self.changes})
        words = entry_of_vocabulary(self.words)
        path.write_text(yaml.safe_dump({"vocabularies": {"tiny": words}, "models": {"small": entry}}))
        return read_registry(path)

    def get(self, *, output: Path | None = None, **options: Any) -> Path:
        """Download the model."""
        return download("small", output, registry=self.registry, patience=FAST, **options)


def dictionaries(n_genes: int = 300) -> dict[str, bytes]:
    """Pickles of the published formats: numpy scalars within a plain dict."""
    special = SPECIAL_TOKENS["v2"]
    genes = [f"ENSG{i:011d}" for i in range(n_genes)]
    content: dict[str, dict[str, Any]] = {
        "token_dictionary": special | {gene: np.int16(len(special) + i) for i, gene in enumerate(genes)},
        "gene_median_dictionary": {gene: np.float64(1 + i / 7) for i, gene in enumerate(genes)},
        "ensembl_mapping_dict": {gene: gene for gene in genes} | {"G0": genes[0]},
        "gene_name_id_dict": {f"G{i}": gene for i, gene in enumerate(genes)},
    }
    return {f"{name}_tiny.pkl": pickle.dumps(value) for name, value in content.items()}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN", "CELLFORMERS_OFFLINE",
                 "HF_HUB_OFFLINE"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CELLFORMERS_HOME", str(tmp_path / "home"))
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        yield Lab(hub, tmp_path)


def lock() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((home() / "checkpoints.lock.json").read_text())
    return content


def inodes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_ino for p in folder.rglob("*") if p.is_file()}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELLFORMERS_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/users/ann")
    assert home() == Path("/users/ann/.cache/cellformers")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert home() == Path("/scratch/cache/cellformers")
    monkeypatch.setenv("CELLFORMERS_HOME", "~/models")
    assert home() == Path("/users/ann/models")


def test_a_model_comes_with_its_vocabulary(lab: Lab) -> None:
    folder = lab.get()
    assert folder == home() / "models" / "small"
    model = open_model(folder)
    assert model.vocabulary.name == "tiny"
    assert model.vocabulary.size == 304
    assert model.vocabulary.medians[7] == 2.0
    for name, tensor in lab.network.state_dict().items():
        assert torch.equal(tensor, model.network.state_dict()[name]), name
    for name, content in lab.files.items():
        assert (folder / name).read_bytes() == content  # byte for byte as published
    kept = {str(path.relative_to(home())) for path in home().rglob("*") if path.is_file()}
    assert {name for name in kept if "safetensors" in name} == {"models/small/model.safetensors"}
    assert not any(name.endswith(".pkl") or "/." in name for name in kept)
    assert lab.hub.sent() == sum(map(len, [*lab.files.values(), *lab.words.values()]))


def test_a_second_call_fetches_nothing(lab: Lab) -> None:
    folder = lab.get()
    before = inodes(home())
    lab.hub.asked.clear()
    assert lab.get() == folder
    assert lab.get(verify=True) == folder
    assert download("tiny", registry=lab.registry) == home() / "vocabularies" / "tiny"
    assert lab.hub.asked == []
    assert inodes(home()) == before


def test_a_copy_elsewhere(lab: Lab, tmp_path: Path) -> None:
    folder = lab.get(output=tmp_path / "results" / "small")
    assert folder == tmp_path / "results" / "small"
    assert open_model(folder).digest == open_model(home() / "models" / "small").digest
    there = inodes(folder)
    assert there["model.safetensors"] == inodes(home() / "models" / "small")["model.safetensors"]
    assert there["config.json"] != inodes(home() / "models" / "small")["config.json"]
    lab.get(output=folder)
    assert inodes(folder) == there
    (folder / "config.json").write_text("{}")
    lab.get(output=folder)
    assert open_model(folder)
    (tmp_path / "made" / "vocabulary").mkdir(parents=True)  # folders of its outputs, as Snakemake makes them
    assert open_model(lab.get(output=tmp_path / "made"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="mine: is a folder with other things in it; choose a new --output"):
        lab.get(output=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_file_system_without_links(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    assert open_model(lab.get(output=tmp_path / "small"))
    assert len([*home().rglob("*.safetensors")]) == 1


def test_a_vocabulary_alone(lab: Lab, tmp_path: Path) -> None:
    folder = download("tiny", tmp_path / "words", registry=lab.registry)
    assert sorted(path.name for path in folder.iterdir()) == [
        "aliases.parquet", "tokens.parquet", "vocabulary.json",
    ]  # fmt: skip
    lab.hub.asked.clear()
    lab.get()
    assert lab.hub.times(".pkl") == 0


def test_a_pickle_that_wants_to_run_something(lab: Lab, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    lab.words["token_dictionary_tiny.pkl"] = pickle.dumps({"a": Evil()})
    lab.publish(COMMIT)
    with pytest.raises(UserError, match="forbidden in a pickle from outside"):
        lab.get()
    assert not (tmp_path / "ran").exists()
    assert not (home() / "models" / "small").exists()


def test_the_genuine_dictionaries(
    reference_data: Path, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry of the package's own registry, from its addresses to a vocabulary."""
    folder = reference_data / "geneformer" / "gc30M"
    files = {path.name: path.read_bytes() for path in folder.glob("*.pkl")}
    entry = REGISTRY.vocabularies["gc30M"]
    assert entry.revision
    lab.hub.publish("ctheodoris/Geneformer", entry.revision, "geneformer/gene_dictionaries_30m", files)
    vocabulary = Vocabulary.load(download("gc30M", patience=FAST))
    assert vocabulary.digest == read_published(folder).digest
    assert (vocabulary.name, vocabulary.size) == ("gc30M", 25426)
    assert not [*home().rglob("*.pkl")]


# --- other layouts --------------------------------------------------------------------------------------


def test_a_model_in_the_other_layout(lab: Lab) -> None:
    checkpoints.save(lab.network, lab.published, layout="te")
    lab.files = {path.name: path.read_bytes() for path in lab.published.iterdir()}
    lab.publish(COMMIT)
    lab.changes = {"layout": "te", "files": FILES}
    model = open_model(lab.get())
    for name, tensor in lab.network.state_dict().items():
        assert torch.equal(tensor, model.network.state_dict()[name]), name
    assert len([*home().rglob("*.safetensors")]) == 1


def test_pickled_weights_are_converted(lab: Lab) -> None:
    tensors = load_file(lab.published / "model.safetensors")
    torch.save(tensors, lab.published / "pytorch_model.bin")
    content = (lab.published / "pytorch_model.bin").read_bytes()
    lab.files = {"config.json": lab.files["config.json"], "pytorch_model.bin": content}
    lab.publish(COMMIT)
    folder = lab.get()
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocabulary",
    ]
    network = open_model(folder).network.state_dict()
    for name, tensor in lab.network.state_dict().items():
        assert torch.equal(tensor, network[name]), name
    assert not [*home().rglob("*.bin")]
    lab.hub.asked.clear()
    assert lab.get(verify=True) == folder
    assert lab.hub.asked == []


# --- what is wrong --------------------------------------------------------------------------------------


def test_a_wrong_digest(lab: Lab) -> None:
    registry = lab.registry
    right = lab.files["model.safetensors"]
    wrong = right[:-1] + bytes([right[-1] ^ 1])
    lab.files["model.safetensors"] = wrong
    lab.publish(COMMIT)
    with pytest.raises(UserError) as caught:
        download("small", registry=registry, patience=FAST)
    message = str(caught.value)
    assert (
        f"has sha256 {hashlib.sha256(wrong).hexdigest()}, expected is {hashlib.sha256(right).hexdigest()}"
        in message
    )
    assert f"/lab/Model/resolve/{COMMIT}/Small/model.safetensors: " in message
    assert "cellformers download small --revision COMMIT" in message
    assert not (home() / "models").exists()
    lab.files["model.safetensors"] = right
    lab.publish(COMMIT)
    assert open_model(lab.get())


def test_a_config_that_differs(lab: Lab) -> None:
    """Every differing field is named, before the weights are fetched."""
    config = json.loads(lab.files["config.json"])
    config |= {
        "hidden_act": "gelu",
        "num_attention_heads": 8,
        "architectures": ["BertForSequenceClassification"],
    }
    del config["hidden_dropout_prob"]
    lab.files["config.json"] = json.dumps(config).encode()
    lab.publish(COMMIT)
    with pytest.raises(UserError) as caught:
        lab.get()
    for words in (
        "config.json: differs from the registered architecture of small: ",
        "num_attention_heads is 8, registered 4",
        "hidden_act is 'gelu', registered 'relu'",
        "hidden_dropout_prob is 0.1, registered 0.02",  # transformers' default
        "head is 'cell', registered 'masked'",
    ):
        assert words in str(caught.value)
    assert lab.hub.times("model.safetensors") == 0


def test_more_tokens_than_the_network_has(lab: Lab) -> None:
    lab.words = dictionaries(301)
    lab.publish(COMMIT)
    with pytest.raises(UserError, match="has 305 tokens, the network 304"):
        lab.get()
    assert not (home() / "models" / "small").exists()


def test_no_room(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    little = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: little)
    with pytest.raises(UserError, match=r"no room: .* are needed, 100,000 are free"):
        lab.get()
    assert not (home() / "models").exists()


def test_the_hub_has_an_error(lab: Lab) -> None:
    lab.hub.failures = [503, 500]
    lab.get()
    assert lab.hub.asked[0].path == lab.hub.asked[2].path


def test_a_token(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.hub.token, lab.hub.redirect = "hf_secret", True
    with pytest.raises(UserError, match=r"refuses \(HTTP 401\); set HF_TOKEN .* accept the licence"):
        lab.get()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    lab.hub.asked.clear()
    lab.get()
    assert {asked.host for asked in lab.hub.asked} == {"127.0.0.1", "localhost"}
    for asked in lab.hub.asked:
        assert ("hf_secret" in str(asked.headers)) == (asked.host == "127.0.0.1")


def test_names_that_are_not_registered(lab: Lab) -> None:
    with pytest.raises(UserError, match=r"no model 'smal' is registered; did you mean 'small'\?"):
        download("smal", registry=lab.registry)
    with pytest.raises(UserError, match="did you mean 'geneformer-v2-104m'"):
        download("Geneformer-V2-104M")


# --- revisions and the lock -----------------------------------------------------------------------------


def test_a_branch_is_resolved_and_locked(lab: Lab) -> None:
    lab.changes = {"revision": "main", "files": FILES}
    lab.get()
    assert lock()["revisions"] == {"small": COMMIT}
    weights = lab.files["model.safetensors"]
    assert lock()["files"]["lab/Model/Small/model.safetensors"] == {
        "size": len(weights), "sha256": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip
    assert "lab/Model/Small/config.json" in lock()["files"]
    assert not any("geneformer" in name for name in lock()["files"])  # they have registered digests

    # the branch moves on: the model stays where it is, also when it is made again
    lab.files["config.json"] = lab.files["config.json"].replace(b"{", b"{ ", 1)
    lab.publish(LATER)
    shutil.rmtree(home() / "models")
    lab.hub.asked.clear()
    lab.get()
    assert all(LATER not in asked.path and "/api/" not in asked.path for asked in lab.hub.asked)

    with pytest.raises(UserError) as caught:
        lab.get(revision="main")
    assert f"small is locked to revision {COMMIT}, main is {LATER}" in str(caught.value)
    assert "--revision main --relock" in str(caught.value)
    assert lab.get(revision=COMMIT[:9])

    lab.get(relock=True)
    assert lock()["revisions"] == {"small": LATER}
    assert (home() / "models" / "small" / "config.json").read_bytes() == lab.files["config.json"]


def test_a_locked_file_that_changed(lab: Lab) -> None:
    """The same commit with other bytes: refused with both digests, until it is accepted."""
    lab.changes = {"files": FILES}
    lab.get()
    old = lock()["files"]["lab/Model/Small/model.safetensors"]["sha256"]
    shutil.rmtree(home() / "models")
    checkpoints.save(layouts.random_model(lab.network.config, seed=1), lab.published)
    lab.files = {path.name: path.read_bytes() for path in lab.published.iterdir()}
    lab.publish(COMMIT)
    new = hashlib.sha256(lab.files["model.safetensors"]).hexdigest()
    with pytest.raises(UserError) as caught:
        lab.get()
    assert f"has sha256 {new}, expected is {old}" in str(caught.value)
    assert "cellformers download small --relock accepts it" in str(caught.value)
    assert open_model(lab.get(relock=True))
    assert lock()["files"]["lab/Model/Small/model.safetensors"]["sha256"] == new


def test_a_revision_that_fails_is_not_locked(lab: Lab) -> None:
    """Neither one that is not there, nor one with another config; what the registry names still comes."""
    right = lab.files["config.json"]
    lab.files["config.json"] = right.replace(b'"relu"', b'"gelu"')
    assert lab.files["config.json"] != right
    lab.publish(LATER)
    with pytest.raises(UserError, match="no such file on the server"):
        lab.get(revision="f" * 40)
    with pytest.raises(UserError, match="differs from the registered architecture"):
        lab.get(revision=LATER)
    assert lock()["revisions"] == {}
    assert "lab/Model/Small/config.json" not in lock()["files"]
    assert (lab.get() / "config.json").read_bytes() == right


def test_another_revision_than_the_one_that_is_there(lab: Lab) -> None:
    lab.get()
    lab.publish(LATER)
    with pytest.raises(UserError) as caught:
        lab.get(revision=LATER)
    assert f"small is here from revision {COMMIT}, {LATER} is {LATER}" in str(caught.value)
    assert f"--revision {LATER} --relock takes the new one" in str(caught.value)
    assert lab.get(revision=COMMIT)
    assert lock()["revisions"] == {}
    lab.get(revision=LATER, relock=True)
    assert lock()["revisions"] == {"small": LATER}


def test_a_revision_that_nobody_knows(lab: Lab) -> None:
    lab.changes = {"revision": None, "note": "in the history"}
    with pytest.raises(UserError) as caught:
        lab.get()
    assert (
        "knows no revision that holds small (in the history); name one of lab/Model: --revision COMMIT"
        in str(caught.value)
    )
    assert lab.hub.asked == []
    assert open_model(lab.get(revision=COMMIT))
    assert lock()["revisions"] == {"small": COMMIT}
    shutil.rmtree(home() / "models")
    assert open_model(lab.get())  # the lock knows it now


def test_files_of_two_commits_do_not_mix(lab: Lab) -> None:
    """The first commit lacks the weights; the config that came with it is not used for the second."""
    path = f"/lab/Model/resolve/{COMMIT}/Small/model.safetensors"
    content = lab.hub.files.pop(path)
    with pytest.raises(UserError, match="no such file on the server"):
        lab.get()
    lab.publish(LATER)
    lab.hub.asked.clear()
    folder = lab.get(revision=LATER)
    assert (folder / "model.safetensors").read_bytes() == content
    assert lab.hub.times(f"/{LATER}/Small/config.json") == 1
    assert [path.name for path in (home() / "downloads").iterdir()] == []


def test_a_hub_that_does_not_say_which_commit(lab: Lab) -> None:
    lab.changes = {"revision": "main"}
    lab.hub.files["/api/models/lab/Model/revision/main"] = b"<html>"
    with pytest.raises(UserError, match="does not say which commit"):
        lab.get()
    with pytest.raises(UserError, match=r"/api/models/lab/Model/revision/none: no such file on the server"):
        lab.get(revision="none")


@pytest.mark.parametrize("content", ["[]", "{", '{"files": []}'])
def test_a_lock_file_that_is_none(lab: Lab, content: str) -> None:
    home().mkdir()
    (home() / "checkpoints.lock.json").write_text(content)
    with pytest.raises(UserError, match=r"checkpoints\.lock\.json: "):
        lab.get()


# --- damage ---------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damage_in_the_cache(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    weights = lab.get() / "model.safetensors"
    flip(weights)
    lab.get()  # sizes alone don't tell
    assert weights.read_bytes() != lab.files["model.safetensors"]
    lab.get(verify=True, quiet=False)
    assert weights.read_bytes() == lab.files["model.safetensors"]
    assert "model.safetensors is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["config.json", "vocabulary/tokens.parquet", "model.safetensors"])
def test_a_file_is_lost(lab: Lab, lost: str) -> None:
    folder = lab.get()
    (folder / lost).unlink()
    lab.hub.asked.clear()
    assert open_model(lab.get())
    assert lab.hub.times("model.safetensors") == (
        lost == "model.safetensors"
    )  # what is right does not come twice


def test_the_lock_file_is_lost(lab: Lab) -> None:
    lab.get()
    (home() / "checkpoints.lock.json").unlink()
    lab.hub.asked.clear()
    assert open_model(lab.get())
    assert lab.hub.times("model.safetensors") == 0


# --- interrupted, and several at once -------------------------------------------------------------------


def test_an_interrupted_download_goes_on(lab: Lab) -> None:
    lab.hub.cut_after, lab.hub.piece = 100_000, 10_000
    with pytest.raises(UserError, match="connection failed"):
        download("small", registry=lab.registry, patience=Patience(attempts=1))
    assert not (home() / "models").exists()
    lab.hub.cut_after = None
    lab.hub.asked.clear()
    lab.get()
    total = len(lab.files["model.safetensors"])
    assert 0 < lab.hub.sent("model.safetensors") <= total - 65_536
    assert lab.hub.times("config.json") + lab.hub.times(".pkl") == 0


SCRIPT = """
import sys
from cellformers.registry import download, read_registry
print(download("small", registry=read_registry(sys.argv[1])))
"""


def start(lab: Lab) -> subprocess.Popen[str]:
    assert lab.registry.models
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(lab.folder / "registry.yaml")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_killed_in_the_middle(lab: Lab) -> None:
    lab.hub.delay, lab.hub.piece = 0.05, 1 << 15
    process = start(lab)
    partial = home() / "downloads" / "small" / COMMIT / ".download-model.safetensors"
    for _ in range(3000):
        if partial.exists() and partial.stat().st_size:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    have = partial.stat().st_size
    assert not (home() / "models").exists()
    lab.hub.delay = 0.0
    lab.hub.asked.clear()
    assert open_model(lab.get())
    assert lab.hub.asked[-1].headers["Range"] == f"bytes={have}-"
    assert [path for path in files_in(home()) if path.name.startswith(".")] == []


def test_two_at_once(lab: Lab) -> None:
    lab.hub.delay = 0.02
    first = start(lab)
    folders: list[Path] = []
    registry = lab.registry
    threads = [
        threading.Thread(target=lambda: folders.append(download("small", registry=registry)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    out, err = first.communicate(timeout=60)
    assert (out, err) == (f"{folders[0]}\n", "")
    assert len(folders) == 2
    assert open_model(folders[0])
    assert lab.hub.times("model.safetensors") == 1


# --- offline, and finding models ------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["CELLFORMERS_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(lab: Lab, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    for call in (lab.get, lambda: find_model("small", fetch=True, registry=lab.registry)):
        with pytest.raises(UserError, match=f"small is not complete in .*, and {variable} forbids .*; unset"):
            call()
    assert lab.hub.asked == []
    monkeypatch.setenv(variable, "0")
    folder = lab.get()
    monkeypatch.setenv(variable, "true")
    assert lab.get(verify=True) == find_model("small", registry=lab.registry) == folder


def test_finding_a_model(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = lab.registry
    with pytest.raises(UserError, match="the model small is not downloaded yet; cellformers download small"):
        find_model("small", registry=registry)
    with pytest.raises(UserError, match=r"smal: no such model directory, .*; did you mean 'small'\?"):
        find_model("smal", registry=registry)
    assert lab.hub.asked == []
    folder = find_model("small", fetch=True, registry=registry)
    assert f"small is downloaded to {folder}" in capsys.readouterr().err
    assert folder == home() / "models" / "small"
    assert find_model("small", registry=registry) == folder
    assert find_model(tmp_path, registry=registry) == tmp_path
    assert find_model(str(tmp_path)) == tmp_path


def test_a_cache_that_belongs_to_others(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared cache is used without writing to it."""
    folder = lab.get()

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cellformers.io.locks.os.open", refused)
    assert lab.get() == folder


def test_a_cache_that_can_not_be(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CELLFORMERS_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match=r"file/home: can't write here .*; choose a folder of your own"):
        lab.get()


def test_little_is_imported(tmp_path: Path) -> None:
    """A model that is given as a folder is found without the packages that downloads need."""
    code = (
        "import sys; from cellformers.registry import find_model; find_model(sys.argv[1]);"
        "print([m for m in ('torch', 'requests', 'yaml', 'pandas', 'anndata') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def command(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    registry = lab.registry
    monkeypatch.setattr("cellformers.registry.read_registry", lambda: registry)
    monkeypatch.setattr("cellformers.registry.obtain.read_registry", lambda: registry)
    app = typer.Typer()
    app.command("download")(downloads.download)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command(lab: Lab, command: Callable[..., Any], tmp_path: Path) -> None:
    ran = command("--list")
    assert ran.exit_code == 0
    row = next(line for line in ran.stdout.splitlines() if line.startswith("small "))
    weights = len(lab.files["model.safetensors"])
    assert row.split() == [
        "small",
        "0.1",
        "M",
        "128",
        f"{weights / 1e6:,.0f}",
        "MB",
        "tiny",
        "Apache-2.0",
        "no",
    ]
    assert f"cache: {home()}" in ran.stdout
    ran = command("small")
    assert (ran.exit_code, ran.stdout) == (0, f"{home() / 'models' / 'small'}\n")
    total = weights + sum(map(len, lab.words.values())) + len(lab.files["config.json"])
    assert ran.stderr.startswith(f"download small: {total:,} bytes in 0:0")
    ran = command("small", "-o", tmp_path / "copy", "--verify")
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, f"{tmp_path / 'copy'}\n", "")
    assert " yes\n" in command("--list").stdout
    ran = command("small", "--relock", "--revision", "main", "--quiet")
    assert (ran.exit_code, ran.stderr) == (0, "")
    assert isinstance(command().exception, UserError)
    assert "cellformers download --list" in str(command().exception)
