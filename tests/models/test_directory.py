"""Model directories: the vocabulary belongs to the weights; import, conversion, random weights."""

import json
import subprocess
import sys

import pytest
import torch
from published_models import as_pickle, as_shards, publish, publish_te, sequences
from safetensors.torch import load_file, save_file
from token_files import make_model, make_vocabulary

from cellformers.errors import UserError
from cellformers.models import checkpoints, directory, layouts

KINDS = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "Model": "AutoModel",
}


@pytest.fixture
def vocabulary():
    return make_vocabulary()


def test_a_model_carries_its_vocabulary(tmp_path, vocabulary):
    model = directory.open_model(make_model(tmp_path / "m", vocabulary))
    assert model.vocabulary.digest == vocabulary.digest
    assert model.digest == directory.model_digest(tmp_path / "m")
    assert model.network.words.weight.shape[0] == vocabulary.size


def test_the_digest_tells_weights_apart_whatever_file_holds_them(tmp_path, vocabulary):
    folders = [make_model(tmp_path / str(seed), vocabulary, seed=seed) for seed in (0, 1)]
    assert len({directory.model_digest(folder) for folder in folders}) == 2
    for change in (as_pickle, as_shards):
        found = set()
        for seed in (0, 1):
            folder = make_model(tmp_path / change.__name__ / str(seed), vocabulary, seed=seed)
            change(folder)
            found.add(directory.model_digest(folder))
            assert directory.open_model(folder).digest in found
        assert len(found) == 2


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


# --- import -----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("make", [publish, publish_te], ids=["hf", "te"])
@pytest.mark.parametrize("change", [as_pickle, as_shards], ids=["pickle", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_import_writes_other_files_as_one_of_safetensors(make, change, kind, tmp_path, vocabulary):
    make(tmp_path / "source", kind=kind)
    before = load_file(tmp_path / "source" / "model.safetensors")
    change(tmp_path / "source")
    vocabulary.save(tmp_path / "words")
    directory.import_model(tmp_path / "source", tmp_path / "words", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocabulary",
    }
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert {name for name in before if name not in after} <= {
        "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"
    }  # fmt: skip
    config = (tmp_path / "source" / "config.json").read_bytes()
    assert (tmp_path / "out" / "config.json").read_bytes() == config
    directory.open_model(tmp_path / "out")


def test_import_of_damaged_weights_leaves_nothing(tmp_path, vocabulary):
    source = make_model(tmp_path / "source", vocabulary)
    tensors = load_file(source / "model.safetensors")
    tensors.pop("bert.encoder.layer.2.output.dense.bias")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match=r"source/model.safetensors: lacks the tensor bert.encoder.layer.2"):
        directory.import_model(source, None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


# --- convert ----------------------------------------------------------------------------------------------


def contents(folder):
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def equal_bits(first, second):
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def add_keys(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_to_the_bit_and_transformers_loads_it(kind, tmp_path, vocabulary):
    transformers = pytest.importorskip("transformers")
    theirs = publish(tmp_path / "hf", kind=kind, num_labels=3, problem_type="single_label_classification")
    add_keys(tmp_path / "hf", _name_or_path="somewhere", gene_classes={"a": 1}, torch_dtype="float32")
    vocabulary.save(tmp_path / "hf" / "vocabulary")
    (tmp_path / "hf" / "training.json").write_text("{}")
    assert directory.convert(tmp_path / "hf", tmp_path / "te", layout="te") == "hf"
    assert directory.convert(tmp_path / "te", tmp_path / "back", layout="hf") == "te"
    there, back = contents(tmp_path / "te"), contents(tmp_path / "back")
    before = contents(tmp_path / "hf")
    assert equal_bits(back[0], before[0])
    assert back[1] == before[1]
    assert any("self_attention.qkv" in name for name in there[0])
    assert there[1] == before[1] | {"use_te_layers": True, "fuse_qkv_params": True}
    for name in ("te", "back"):
        model = directory.open_model(tmp_path / name)
        assert model.vocabulary.digest == vocabulary.digest
        assert (tmp_path / name / "training.json").is_file()
    loaded, info = getattr(transformers, KINDS[kind]).from_pretrained(
        tmp_path / "back", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert equal_bits(loaded.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_nvidia_converts_there_and_back(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = publish_te(tmp_path / "te", kind=kind, num_labels=3)
    directory.convert(tmp_path / "te", tmp_path / "hf", layout="hf")
    directory.convert(tmp_path / "hf", tmp_path / "back", layout="te")
    before, back = contents(tmp_path / "te"), contents(tmp_path / "back")
    copies = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    assert equal_bits(back[0], {name: value for name, value in before[0].items() if name not in copies})
    assert back[1] == before[1]
    assert not {"auto_map", "use_te_layers", "framework"} & set(contents(tmp_path / "hf")[1])
    loaded, info = getattr(transformers, KINDS[kind]).from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert equal_bits(loaded.state_dict(), theirs.state_dict())
    (part,) = sequences((30,))
    with torch.inference_mode():
        for name in ("te", "hf", "back"):
            hidden = checkpoints.load(tmp_path / name)(part, torch.tensor([0, 30]))
            encoder = theirs if kind == "Model" else theirs.bert
            assert torch.allclose(hidden, encoder(part[None]).last_hidden_state[0], atol=5e-6)


def test_conversion_keeps_the_dtype_of_every_tensor(tmp_path):
    publish(tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    tensors = {
        name: value.bfloat16() if ".encoder." in name else value for name, value in load_file(weights).items()
    }
    save_file(tensors, weights)
    directory.convert(tmp_path / "hf", tmp_path / "te", layout="te")
    directory.convert(tmp_path / "te", tmp_path / "back", layout="hf")
    assert equal_bits(contents(tmp_path / "back")[0], tensors)
    name = "bert.encoder.layer.1.attention.self.key.weight"
    save_file({**tensors, name: tensors[name].float()}, weights)
    with pytest.raises(
        UserError, match=r"hf: .*layer.1.attention.self.query.weight and its key and value differ"
    ):
        directory.convert(tmp_path / "hf", tmp_path / "mixed", layout="te")
    assert (
        contents(tmp_path / "te")[0]["bert.encoder.layer.0.self_attention.qkv.weight"].dtype == torch.bfloat16
    )


def test_conversion_of_what_has_the_layout_already_copies_it(tmp_path, vocabulary):
    source = make_model(tmp_path / "m", vocabulary)
    as_pickle(source)
    assert directory.convert(source, tmp_path / "out", layout="hf") == "hf"
    assert equal_bits(
        checkpoints.read_weights(tmp_path / "out").tensors, checkpoints.read_weights(source).tensors
    )
    directory.convert(source, source, layout="te")
    assert sorted(path.name for path in source.iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocabulary",
    ]
    assert checkpoints.read_weights(source).layout == "te"


def test_a_folder_with_other_things_is_not_replaced(tmp_path, vocabulary):
    source = make_model(tmp_path / "models" / "m", vocabulary)
    with pytest.raises(UserError, match=r"a folder with other things in it \(m\)"):
        directory.convert(source, tmp_path / "models", layout="te")
    assert (source / "model.safetensors").is_file()
    with pytest.raises(UserError, match="no layout 'tf'; give hf or te"):
        directory.convert(source, tmp_path / "out", layout="tf")
    (tmp_path / "begun" / "vocabulary").mkdir(parents=True)
    directory.convert(source, tmp_path / "begun", layout="te")
    directory.convert(source, tmp_path / "begun", layout="hf")
    assert checkpoints.read_weights(tmp_path / "begun").layout == "hf"


def test_what_is_no_model_is_not_replaced(tmp_path, vocabulary):
    source = make_model(tmp_path / "out" / "m", vocabulary)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.md").write_text("mine")
    for write in (
        lambda to: directory.convert(source, to, layout="te"),
        lambda to: directory.randomize(source, to, seed=0),
        lambda to: directory.import_model(source, None, to),
    ):
        with pytest.raises(UserError, match=r"notes: is a folder with other things in it \(thesis.md\)"):
            write(notes)
        # a model's folder may be replaced, but not with the model in it that is read
        (source.parent / "config.json").write_text("{}")
        with pytest.raises(UserError, match=r"out: is a folder with other things in it \(m\)"):
            write(source.parent)
    assert (notes / "thesis.md").read_text() == "mine"
    assert checkpoints.read_weights(source).layout == "hf"


# --- random weights ---------------------------------------------------------------------------------------


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


def test_randomize_of_a_classifier(tmp_path, vocabulary):
    labels = ("nf", "hcm", "dcm")
    source = make_model(tmp_path / "source", vocabulary, head="cell", labels=labels)
    directory.randomize(source, tmp_path / "random", seed=7)
    random = directory.open_model(tmp_path / "random").network
    assert random.config.labels == labels
    assert not torch.equal(random.head.classifier.weight, checkpoints.load(source).head.classifier.weight)
    assert layouts.published_shapes(random.config)["classifier.weight"] == (3, 32)


def test_everything_that_computes_imports_on_a_bare_machine():
    absent = ["anndata", "scanpy", "pandas", "pydantic", "typer", "h5py", "sklearn", "matplotlib", "numba"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({[*absent, 'transformers']!r}))\n"
        "import cellformers.embedding, cellformers.training.pretrain, cellformers.verify\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
