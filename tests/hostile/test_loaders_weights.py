"""Model directories that were made to harm: safetensors, pickled weights, configs, and what is no file at all."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import opcodes
import pytest
import torch
from loader_targets import SMALL, attempt, make_directory
from token_files import make_config, make_vocabulary

from cellformers.models import checkpoints
from cellformers.models.directory import convert, import_model, open_model, randomize

FLOAT = struct.pack("<f", 0.5)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_directory(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "m"


def load(folder: Path) -> str:
    open_model(folder)
    return "loaded"


def load_each(folder: Path, name: str, table: str) -> list[tuple[str, str, str]]:
    """Each of some contents in place of a file: its name, how loading ended, the text. One process for all: some ms."""
    found = []
    for case, make in globals()[table].items():
        (folder / name).write_bytes(make())
        found.append((case, *attempt(partial(load, folder))))
    return found


def all_refused(model: Path, name: str, table: dict[str, Any], named: str) -> None:
    outcome = forked.run(load_each, model, name, named, writable=model.parent, seconds=120)
    assert outcome.kind == "value", outcome.text
    assert not outcome.deeds
    assert outcome.peak_mb < 1500
    assert len(outcome.value) == len(table)
    for case, ended, text in outcome.value:
        assert ended == "user_error", (case, text)
        assert name in text, (case, text)
        assert text.isprintable(), case
        assert len(text) < 5000
    assert sorted(path.name for path in model.parent.iterdir()) == ["m"]


def refused(model: Path, task: Callable[..., Any] = load, *arguments: Any, **options: Any) -> str:
    outcome = forked.run(task, model, *arguments, writable=model.parent, **options)
    assert outcome.kind == "user_error", outcome
    assert outcome.text.isprintable()
    assert not outcome.deeds
    assert not (model.parent / opcodes.PWNED).exists()
    return outcome.text


# --- safetensors ------------------------------------------------------------------------------------------


def tensors_file(header: Any, content: bytes = FLOAT * 4, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def entry(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "overlapping": lambda: tensors_file({"a": entry([4], [0, 16]), "b": entry([2], [8, 16])}),
    "the same twice": lambda: tensors_file({"a": entry([4], [0, 16]), "b": entry([4], [0, 16])}),
    "a hole": lambda: tensors_file({"a": entry([1], [0, 4]), "b": entry([1], [12, 16])}),
    "behind the file": lambda: tensors_file({"a": entry([1 << 20], [0, 4 << 20])}),
    "offsets of 2**63": lambda: tensors_file({"a": entry([4], [1 << 63, (1 << 63) + 16])}),
    "offsets above 64 bits": lambda: tensors_file({"a": entry([4], [0, 1 << 70])}),
    "negative offsets": lambda: tensors_file({"a": entry([4], [-16, 0])}),
    "offsets that fall": lambda: tensors_file({"a": entry([4], [16, 0])}),
    "a shape whose product overflows": lambda: tensors_file({"a": entry([1 << 32, 1 << 32], [0, 16])}),
    "a shape of 2**62": lambda: tensors_file({"a": entry([1 << 62], [0, 16])}),
    "a negative shape": lambda: tensors_file({"a": entry([-4], [0, 16])}),
    "a shape of fractions": lambda: tensors_file({"a": entry([4.0], [0, 16])}),
    "a thousand dimensions": lambda: tensors_file({"a": entry([1] * 1000 + [4], [0, 16])}),
    "no type": lambda: tensors_file({"a": entry([4], [0, 16], "F65")}),
    "another type": lambda: tensors_file({"a": entry([2], [0, 16], "I64")}),
    "eight bits": lambda: tensors_file({"a": entry([16], [0, 16], "F8_E4M3")}),
    "a header of 2**63": lambda: tensors_file({}, size=1 << 63),
    "a header of 2**64 - 1": lambda: tensors_file({}, size=(1 << 64) - 1),
    "a header of 10 GB": lambda: tensors_file({}, size=10 << 30),
    "a header longer than the file": lambda: tensors_file({}, size=1000),
    "a header in a header": lambda: tensors_file(b"[" * 100_000),
    "objects in objects": lambda: tensors_file(b'{"a":' * 100_000),
    "no UTF-8": lambda: tensors_file(b'{"\xff": {}}'),
    "not a number": lambda: tensors_file(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}'),
    "a name twice": lambda: tensors_file(
        b'{"a": {"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b' "a": {"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    ),
    "a name with a newline": lambda: tensors_file({"a\nb\x1b[2J": entry([4], [0, 16])}),
    "a name of a megabyte": lambda: tensors_file({"a" * (1 << 20): entry([4], [0, 16])}),
    "a hundred thousand names": lambda: tensors_file({f"a{i}": entry([0], [0, 0]) for i in range(100_000)}),
    "metadata that is a list": lambda: tensors_file({"__metadata__": [1], "a": entry([4], [0, 16])}),
    "nothing": lambda: b"",
    "a pickle": lambda: opcodes.DANGEROUS["GLOBAL os.system"],
}  # fmt: skip


def test_hostile_safetensors_are_refused(model: Path) -> None:
    all_refused(model, "model.safetensors", SAFETENSORS, "SAFETENSORS")


OUTSIDE = (
    "../outside.safetensors",
    "/outside.safetensors",
    "x/../../outside.safetensors",
    "..",
    ".",
    "",
    "a\nb",
    "\0",
)


def index_of(name: str) -> bytes:
    return json.dumps({"weight_map": {"words": name}}).encode()


INDICES: dict[str, Callable[[], bytes]] = {
    **{repr(name): partial(index_of, name) for name in OUTSIDE},
    "no map": lambda: b"[]",
    "nothing in the map": lambda: b'{"weight_map": {}}',
    "a number": lambda: b'{"weight_map": {"words": 7}}',
    "a long name": partial(index_of, "9" * 5000),
    "itself": lambda: b'{"weight_map": {"words": "model.safetensors.index.json"}}',
    "lists in lists": lambda: b"[" * 100_000,
}  # fmt: skip


def test_shards_stay_beside_their_index(model: Path) -> None:
    (model / "model.safetensors").rename(model / "outside.safetensors")
    all_refused(model, "model.safetensors.index.json", INDICES, "INDICES")


# --- pickled weights --------------------------------------------------------------------------------------


class Made:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def torch_archive(content: bytes, *, compression: int = zipfile.ZIP_STORED, size: int = 16) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(size))
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def saved(value: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def _dangerous(name: str) -> Callable[[], bytes]:
    return lambda: torch_archive(opcodes.DANGEROUS[name])


PICKLED: dict[str, Callable[[], bytes]] = {
    **{f"{name} in an archive": _dangerous(name) for name in opcodes.DANGEROUS},
    "a bytearray of 10 GB": lambda: saved({"a": Made(bytearray, 10 << 30)}),
    "a bytearray of 10 GB, in a pickle in capitals": lambda: _renamed("archive/DATA.PKL"),
    "a bytearray of 10 GB, in the second of two pickles": lambda: _renamed("archive/data.pkl", before=True),
    "a tensor of a billion": lambda: saved({"a": Made(torch.FloatTensor, 1 << 30)}),
    "one number for a billion": lambda: saved({"a": torch.zeros(1).expand(1 << 30)}),
    "one number for all": lambda: saved({"a": torch.zeros(1).as_strided((1 << 15, 1 << 15), (0, 0))}),
    "a compressed archive": lambda: torch_archive(
        pickle.dumps({}, protocol=2) + bytes(256 << 20), compression=zipfile.ZIP_DEFLATED
    ),
    "a compressed storage": lambda: torch_archive(
        pickle.dumps({}, protocol=2), compression=zipfile.ZIP_DEFLATED, size=256 << 20
    ),
    "an archive without a pickle": lambda: _other_zip(),
    "numbers behind the storage": lambda: saved({"a": torch.zeros(4)}).replace(b"K\x04\x85", b"K\x7f\x85"),
    "a subclass": lambda: saved({"a": Made(OrderedDict)}),
    "a function of torch": lambda: saved({"a": Made(torch.load, "x")}),
    "a class of ours": lambda: saved({"a": Path("x")}),
    "old, and calls": lambda: saved({"a": Made(os.system, "x")}, _use_new_zipfile_serialization=False),
    "old, and large": lambda: saved({"a": Made(bytearray, 10 << 30)}, _use_new_zipfile_serialization=False),
    "old, and cut off": lambda: saved({"a": torch.zeros(9)}, _use_new_zipfile_serialization=False)[:-9],
}


def _renamed(name: str, *, before: bool = False) -> bytes:
    """An archive whose pickle makes a bytearray of 10 GB, under another name, or behind one that makes nothing."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two members of one name
        if before:
            archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr(name, pickle.dumps({"a": Made(bytearray, 10 << 30)}, protocol=2))
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def _other_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../escaped", "x")
    return out.getvalue()


def test_hostile_pickled_weights_are_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    all_refused(model, "pytorch_model.bin", PICKLED, "PICKLED")


# --- configs ----------------------------------------------------------------------------------------------

ABSURD: dict[str, Any] = {
    "num_hidden_layers": 10**9, "hidden_size": 10**12, "num_attention_heads": 0, "intermediate_size": -1,
    "vocab_size": 2**63, "max_position_embeddings": 0, "type_vocab_size": 10**9, "pad_token_id": 10**6,
    "layer_norm_eps": "x", "hidden_act": "__import__('os').system('x')", "hidden_dropout_prob": [], "model_type": {},
    "architectures": [["BertModel"]], "initializer_range": float("nan"),
}  # fmt: skip
LABELS: tuple[dict[str, Any], ...] = (
    {"num_labels": 10**9}, {"id2label": {"0": "a"}}, {"id2label": [1]}, {"id2label": {"0": "a", "9": "b"}},
)  # fmt: skip


def config(**changes: Any) -> bytes:
    return json.dumps(make_config(make_vocabulary(8), **SMALL).to_dict() | changes).encode()


CONFIGS: dict[str, Callable[[], bytes]] = {
    **{key: partial(config, **{key: value}) for key, value in ABSURD.items()},
    **{
        f"labels {number}": partial(config, architectures=["BertForSequenceClassification"], **labels)
        for number, labels in enumerate(LABELS)
    },
    "not JSON": lambda: b"{",
    "a list": lambda: b"[]",
    "lists in lists": lambda: b"[" * 100_000,
    "a number of many digits": lambda: b'{"model_type": "bert", "vocab_size": ' + b"9" * 10_000 + b"}",
    "no UTF-8": lambda: b'{"model_type": "\xff"}',
    "half a character": lambda: b'{"model_type": "bert", "hidden_act": "\\ud800"}',
}


def test_absurd_configs_are_refused(model: Path) -> None:
    all_refused(model, "config.json", CONFIGS, "CONFIGS")


def test_code_that_a_config_names_is_never_imported(model: Path) -> None:
    """Where transformers is told to trust a model, `auto_map` names a file of it to import."""
    content = json.loads((model / "config.json").read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}
    (model / "config.json").write_text(json.dumps(content))
    (model / "evil.py").write_text(f"open({opcodes.PWNED!r}, 'w')")
    assert forked.run(load, model, writable=model).value == "loaded"
    assert not (model.parent / opcodes.PWNED).exists()


def test_a_config_that_promises_more_than_the_weights_hold(model: Path) -> None:
    path = model / "config.json"
    content = json.loads(path.read_text())
    large = {
        "vocab_size": 2_000_000,
        "hidden_size": 32_768,
        "num_hidden_layers": 512,
        "intermediate_size": 262_144,
    }
    path.write_text(json.dumps(content | large))
    refused(model)
    assert "memory" in refused(model, randomize, model.parent / "random", seed=0)
    assert not (model.parent / "random").exists()


def test_labels_that_are_no_text_become_text(model: Path) -> None:
    """They are shown and written: as JSON has them, never run."""
    path = model / "config.json"
    names = {
        "id2label": {"0": "<script>", "1": "{{ 7 * 7 }}"},
        "architectures": ["BertForSequenceClassification"],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | names))
    assert checkpoints.read_config(model).labels == ("<script>", "{{ 7 * 7 }}")


# --- no files ---------------------------------------------------------------------------------------------


FILES = ("config.json", "model.safetensors", "vocabulary/vocabulary.json", "vocabulary/tokens.parquet")
ODD = ("pipe", "folder", "zeros", "loop", "dangling")


def load_odd(folder: Path) -> list[tuple[str, str, str]]:
    """Whatever is no plain file in place of each file of a model, with everything that reads models."""
    found = []
    for name in FILES:
        path = folder / name
        content = path.read_bytes()
        for kind in ODD:
            path.unlink()
            if kind == "pipe":
                os.mkfifo(path)
            elif kind == "folder":
                path.mkdir()
            else:
                path.symlink_to({"zeros": "/dev/zero", "loop": path, "dangling": "/nowhere"}[kind])
            out = folder.parent / "out"
            tasks = [partial(load, folder), partial(import_model, folder, None, out)]
            tasks.append(partial(convert, folder, out, layout="te"))
            found += [(f"{name} {kind}", *attempt(task)) for task in tasks]
            path.rmdir() if kind == "folder" else path.unlink()
            path.write_bytes(content)
    return found


def test_what_is_no_file_is_refused_and_nothing_waits_for_it(model: Path) -> None:
    outcome = forked.run(load_odd, model, writable=model.parent, seconds=60)
    assert outcome.kind == "value", outcome.text
    assert len(outcome.value) == 3 * len(FILES) * len(ODD)
    for case, ended, text in outcome.value:
        # a conversion has no need of a vocabulary's tables
        assert ended == "user_error" or "vocabulary" in case, (case, text)
        assert ended != "error", (case, text)


def test_what_lies_beside_a_vocabulary_is_not_copied(model: Path) -> None:
    os.mkfifo(model / "vocabulary" / "pipe")
    (model / "vocabulary" / "link").symlink_to("/etc/passwd")
    import_model(model, None, model.parent / "out")
    assert sorted(path.name for path in (model.parent / "out" / "vocabulary").iterdir()) == [
        "aliases.parquet", "tokens.parquet", "vocabulary.json"
    ]  # fmt: skip
