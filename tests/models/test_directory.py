"""Model directories: the vocabulary belongs to the weights."""

import subprocess
import sys

import pytest
import torch
from token_files import make_model, make_vocabulary

from cellformers.errors import UserError
from cellformers.models import checkpoints, directory


@pytest.fixture
def vocabulary():
    return make_vocabulary()


def test_a_model_carries_its_vocabulary(tmp_path, vocabulary):
    model = directory.open_model(make_model(tmp_path / "m", vocabulary))
    assert model.vocabulary.digest == vocabulary.digest
    assert model.digest == directory.model_digest(tmp_path / "m")
    assert model.network.words.weight.shape[0] == vocabulary.size


def test_the_digest_tells_weights_apart(tmp_path, vocabulary):
    folders = [make_model(tmp_path / str(seed), vocabulary, seed=seed) for seed in (0, 1)]
    assert len({directory.model_digest(folder) for folder in folders}) == 2


def test_a_model_without_or_with_too_large_a_vocabulary_is_refused(tmp_path, vocabulary):
    folder = tmp_path / "m"
    folder.mkdir()
    make_model(tmp_path / "whole", vocabulary)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "whole" / name).rename(folder / name)
    with pytest.raises(UserError, match="carries no vocabulary"):
        directory.open_model(folder)
    make_vocabulary(500).save(folder / "vocabulary")
    with pytest.raises(UserError, match="502 tokens, the network 62"):
        directory.open_model(folder)


def test_import_copies_weights_and_vocabulary_and_checks_them(tmp_path, vocabulary):
    source = make_model(tmp_path / "source", vocabulary)
    vocabulary.save(tmp_path / "words")
    directory.import_model(source, tmp_path / "words", tmp_path / "out")
    directory.import_model(source, None, tmp_path / "own")
    for name in ("out", "own"):
        assert directory.model_digest(tmp_path / name) == directory.model_digest(source)
        assert directory.open_model(tmp_path / name).vocabulary.digest == vocabulary.digest
    make_vocabulary(500).save(tmp_path / "large")
    with pytest.raises(UserError, match="502 tokens") as error:
        directory.import_model(source, tmp_path / "large", tmp_path / "bad")
    assert ".part-" not in str(error.value)
    assert not (tmp_path / "bad").exists()


def test_randomize_keeps_everything_but_the_weights(tmp_path, vocabulary):
    source = make_model(tmp_path / "source", vocabulary)
    for name in ("a", "b"):
        directory.randomize(source, tmp_path / name, seed=7)
    assert directory.model_digest(tmp_path / "a") == directory.model_digest(tmp_path / "b")
    assert directory.model_digest(tmp_path / "a") != directory.model_digest(source)
    assert checkpoints.read_config(tmp_path / "a") == checkpoints.read_config(source)
    random = directory.open_model(tmp_path / "a")
    assert random.vocabulary.digest == vocabulary.digest
    assert torch.isfinite(random.network.words.weight).all()


def test_everything_that_computes_imports_on_a_bare_machine():
    absent = ["anndata", "scanpy", "pandas", "pydantic", "typer", "h5py", "sklearn", "matplotlib", "numba"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))\n"
        "import cellformers.embedding, cellformers.training.pretrain\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
