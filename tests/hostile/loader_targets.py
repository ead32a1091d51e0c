"""Targets for `hostile_cases`: every loader but those of counts: vocabularies, weights, tables, JSON, YAML, archives.

Files are small, so that half of their bytes are structure. Results are numbers and texts that can be compared.
"""

import gzip
import io
import json
import pickle
import random
import struct
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import opcodes
import pyarrow as pa
import torch
import yaml
from hostile_cases import Anything, Refused, Target, register
from report_files import make_score
from token_files import make_cells, make_config, make_model, make_vocabulary, write_tokens

from cellformers import config as config_module
from cellformers.deposits import archives
from cellformers.deposits.entries import read_entry
from cellformers.deposits.forms import wrong_form
from cellformers.errors import UserError
from cellformers.evaluate.scores import read_score, summarise
from cellformers.evaluate.splitfile import read_split
from cellformers.evaluate.tables import read_cells, read_gene_table, read_vectors
from cellformers.gene_embedding import merge_gene_sums
from cellformers.histograms import read_sketches
from cellformers.io.files import stamp, write_json, write_table
from cellformers.io.pickles import read_lists
from cellformers.models import checkpoints
from cellformers.models.directory import import_model, open_model
from cellformers.registry.entries import read_registry
from cellformers.registry.store import read_lock
from cellformers.resources import resource
from cellformers.selection import choose_cells, read_column
from cellformers.summaries import read_states, summarize_embeddings
from cellformers.training.state import load_state, save_state
from cellformers.vectors import blocks, open_embeddings
from cellformers.vocabulary import Vocabulary, from_medians, read_published

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
GENES = [f"ENSG{i:011d}" for i in range(1, 9)]
N_CELLS = 12
CELLS = [f"cell{i}" for i in range(N_CELLS)]
KINDS = ["T cell", "B cell", None, "naïve <b>"] * 3
INPUTS = {"dataset": "sha256:0", "model": "sha256:1"}


def rounded(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in np.asarray(values, np.float64).ravel()]


def names_fault(names: list[Any]) -> str | None:
    if not all(isinstance(name, str) for name in names):
        return "a name that is no text"
    return "a name twice" if len(set(names)) < len(names) else None


def attempt(task: Callable[[], Any]) -> tuple[str, str]:
    """How a call ends, "value", "user_error", "error" or "hang", and its text."""
    started = time.monotonic()
    try:
        found = ("value", repr(task())[:200])
    except UserError as error:
        found = ("user_error", str(error))
    except BaseException:  # noqa: BLE001  (whatever it was, the test is to know it)
        found = ("error", traceback.format_exc())
    return found if time.monotonic() - started < 10 else ("hang", found[1])


def fine(_: Any) -> None:
    """Any result will do: it was checked when it was read."""


# --- vocabularies -----------------------------------------------------------------------------------------


def dictionaries() -> dict[str, dict[str, Any]]:
    """The four dictionaries of a small vocabulary like V2."""
    special = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3}
    return {
        "token_dictionary": special | {gene: i for i, gene in enumerate(GENES, 4)},
        "gene_median_dictionary": {gene: np.float64(1 + i / 8) for i, gene in enumerate(GENES)},
        "ensembl_mapping_dict": {gene: gene for gene in GENES} | {f"OLD{gene}": gene for gene in GENES[:3]},
        "gene_name_id_dict": {f"GENE{i}": gene for i, gene in enumerate(GENES)},
    }


def make_published(folder: Path) -> None:
    for name, table in dictionaries().items():
        (folder / f"{name}_small.pkl").write_bytes(pickle.dumps(table, protocol=4))


def build_published(rng: random.Random, folder: Path) -> Any:
    make_published(folder)
    pickles = opcodes.DANGEROUS | opcodes.BOMBS | opcodes.MALFORMED
    path = rng.choice(sorted(folder.iterdir()))
    path.write_bytes(pickles[rng.choice(sorted(pickles))])
    return Refused


def _vocabulary(found: Vocabulary) -> Any:
    aliases = found.aliases()
    return (
        found.gene_ids.tolist(), found.token_ids.tolist(), found.medians.tolist(), found.symbols.tolist(),
        found.special_tokens, found.context_length, found.size, aliases["alias"].to_pylist(),
        aliases["gene_id"].to_pylist(),
    )  # fmt: skip


def read_published_folder(folder: Path) -> Any:
    found = read_published(folder, name="small")
    found.save(folder / "made")
    return _vocabulary(found)


def valid_vocabulary(value: Any) -> str | None:
    genes, tokens, medians = value[:3]
    if not len(genes) == len(tokens) == len(medians):
        return "columns of different lengths"
    if not all(0 < median < float("inf") for median in medians):
        return "a median that is not above zero"
    if sorted(set(tokens)) != tokens or tokens[0] < 0 or value[6] > 2**31:
        return "tokens that do not ascend"
    return names_fault(genes)


def make_vocabulary_folder(folder: Path) -> None:
    make_vocabulary(8, special="v2").save(folder / "v")


def read_vocabulary_folder(folder: Path) -> Any:
    return _vocabulary(Vocabulary.load(folder / "v"))


def build_vocabulary(rng: random.Random, folder: Path) -> Any:
    make_vocabulary_folder(folder)
    if rng.random() < 0.5:
        odd_json(rng, folder / "v" / "vocabulary.json")
    else:
        odd_parquet(rng, folder / "v" / rng.choice(("tokens.parquet", "aliases.parquet")))
    return Anything


def make_medians(folder: Path) -> None:
    table = {"gene_id": GENES, "symbol": [None, *"ABCDEFG"], "median": [1.5] * 7 + [None], "n_cells": [9] * 8}
    write_table(pa.table(table), folder / "medians.parquet")


def read_medians(folder: Path) -> Any:
    return _vocabulary(from_medians(folder / "medians.parquet", name="own"))


def build_medians(rng: random.Random, folder: Path) -> Any:
    make_medians(folder)
    odd_parquet(rng, folder / "medians.parquet")
    return Anything


register(
    lambda: Target(
        "published", make_published, read_published_folder, valid_vocabulary, None, build_published, "*.pkl"
    )
)
register(
    lambda: Target(
        "vocabulary", make_vocabulary_folder, read_vocabulary_folder, valid_vocabulary, None, build_vocabulary
    )
)
register(lambda: Target("medians", make_medians, read_medians, valid_vocabulary, None, build_medians))


def make_lists(folder: Path) -> None:
    (folder / "x.pkl").write_bytes(pickle.dumps({"a": GENES[:3], "b": set(GENES[3:])}, protocol=2))


def read_pickled(folder: Path) -> Any:
    return read_lists(folder / "x.pkl")


def valid_lists(value: Any) -> str | None:
    plain = all(isinstance(word, str) for words in value.values() for word in words)
    return None if plain and all(isinstance(key, str) for key in value) else "no names"


register(lambda: Target("pickled-lists", make_lists, read_pickled, valid_lists))


# --- odd tables and odd JSON ------------------------------------------------------------------------------


def odd_values(rng: random.Random) -> Any:
    """A value that no reader of JSON or YAML asks for."""
    values = (
        None, True, -1, 0, 1.5, 1e308, 10**18, -(10**30), float("nan"), "", "x", "\x00\n<b>", [], {}, [[]], [None],
        {"x": {"y": []}}, [1, "a", {}], "9" * 5000, ["x"] * 3, {"": None},
    )  # fmt: skip
    return rng.choice(values)


def _somewhere(rng: random.Random, content: Any) -> tuple[Any, Any]:
    """A container within the content, and a key of it."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = rng.choice(keys)
        inner = content[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            return content, key
        content = inner


def change(rng: random.Random, content: Any) -> Any:
    """The content with one or two places taken away, doubled or given another value."""
    for _ in range(rng.choice((1, 1, 2))):
        place, key = _somewhere(rng, content)
        how = rng.random()
        if how < 0.2:
            del place[key]
        elif how < 0.3 and isinstance(place, list):
            place.insert(0, place[key])
        elif how < 0.4 and isinstance(place, dict):
            place[f"{key}x"] = place.pop(key)
        else:
            place[key] = odd_values(rng)
        if not content:
            break
    return content


def odd_json(rng: random.Random, path: Path) -> None:
    path.write_text(json.dumps(change(rng, json.loads(path.read_text()))))


def odd_parquet(rng: random.Random, path: Path) -> None:
    """Another type, another order, nulls, repetitions or other metadata for a table."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    place = rng.randrange(table.num_columns)
    name = table.column_names[place]
    n = len(table)
    columns = [
        pa.nulls(n), pa.array(list(range(n)), pa.int64()), pa.array([str(i) for i in range(n)]),
        pa.array([-1.5] * n), pa.array([float("nan")] * n), pa.array([b"\xff"] * n), pa.array([[1, 2]] * n),
        pa.array([{"a": 1}] * n), pa.array([None, *["x"] * n][:n]), pa.array(["x"] * n),
        pa.array(["x"] * n).dictionary_encode(), pa.array([2**31] * n, pa.int64()), pa.array([2**63] * n, pa.uint64()),
        pa.array([True] * n), pa.array([["x"]] * n), pa.array([[]] * n, pa.list_(pa.int32())),
        pa.array([[1.0, 2.0]] * n, pa.list_(pa.float32(), 2)), pa.array([[None, 2.0]] * n, pa.list_(pa.float32(), 2)),
        pa.array([None] * n, pa.list_(pa.float32(), 2)), pa.array([0] * n, pa.timestamp("ns")),
        pa.array([1] * n, pa.decimal128(5)), pa.array([["1"] * i for i in range(n)]),
        pa.array([""] * n, pa.large_string()), pa.array([1] * n, pa.float16()), pa.array([1] * n, pa.int8()),
    ]  # fmt: skip
    how = rng.random()
    if how < 0.7:
        table = table.set_column(place, name, rng.choice(columns))
    elif how < 0.75:
        table = table.drop_columns([name])
    elif how < 0.8:
        table = table.slice(0, rng.choice((0, 1)))
    elif how < 0.85:
        table = pa.concat_tables([table, table])
    elif how < 0.9:
        table = table.take(pa.array(rng.sample(range(n), n)))
    elif how < 0.95:
        table = table.append_column(name, table.column(name))
    else:
        odd = rng.choice(
            (b"", b"{", b"[]", b"null", b'{"inputs": 1}', b'{"parameters": [], "inputs": {}}', b"\xff")
        )
        table = table.replace_schema_metadata({b"cellformers": odd})
    path.unlink()
    pq.write_table(table, path, compression=rng.choice(("zstd", "snappy", "none", "gzip")))


# --- weights ----------------------------------------------------------------------------------------------


def make_directory(folder: Path) -> None:
    make_model(folder / "m", make_vocabulary(8), max_position_embeddings=8, **SMALL)


def read_directory(folder: Path) -> Any:
    found = open_model(folder / "m")
    state = found.network.state_dict()
    return {name: rounded(tensor) for name, tensor in state.items()}, found.vocabulary.gene_ids.tolist()


def valid_directory(value: Any) -> str | None:
    state, genes = value
    if not all(np.isfinite(numbers).all() for numbers in state.values()):
        return "weights that are not finite"
    return None if len(state["words.weight"]) >= 8 * len(genes) else "fewer words than genes"


def build_directory(rng: random.Random, folder: Path) -> Any:
    """A config with absurd values, or safetensors whose header says what is not so."""
    make_directory(folder)
    if rng.random() < 0.5:
        odd_json(rng, folder / "m" / "config.json")
        return Anything
    path = folder / "m" / "model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    how = rng.randrange(8)
    if how == 0:
        entry["shape"] = rng.choice(([2**62, 2], [-1], [0], [2**64], [1.5], ["x"], None, [2**32, 2**32], []))
    elif how == 1:
        lo, hi = entry["data_offsets"]
        entry["data_offsets"] = rng.choice(
            ([0, 4], [hi, lo], [lo, 2**63], [-4, 0], [lo + 1, hi + 1], [2**64, 1], 7)
        )
    elif how == 2:
        entry["dtype"] = rng.choice(("F65", "", None, "I64", "F16", "BOOL", "f32", "F8_E4M3", 3))
    elif how == 3:
        header = change(rng, header)
    elif how == 4:
        header["__metadata__"] = odd_values(rng)
    elif how == 5:
        header |= {f"extra{i}": dict(entry) for i in range(rng.choice((1, 1000)))}
    elif how == 6:
        rest = rest[: rng.randrange(len(rest))]
    text = json.dumps(header).encode()
    said = rng.choice((0, 1, 2**63, 2**64 - 1, 10**8, len(text) + 9)) if how == 7 else len(text)
    path.write_bytes(struct.pack("<Q", said) + text + rest)
    return Anything


register(lambda: Target("model", make_directory, read_directory, valid_directory, None, build_directory))


def make_pickled_weights(folder: Path) -> None:
    make_directory(folder)
    with torch.no_grad():
        state = checkpoints.read_weights(folder / "m").tensors
    (folder / "m" / "model.safetensors").unlink()
    torch.save(dict(state), folder / "m" / "pytorch_model.bin")


def make_old_weights(folder: Path) -> None:
    make_pickled_weights(folder)
    path = folder / "m" / "pytorch_model.bin"
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)


def make_sharded_weights(folder: Path) -> None:
    from safetensors.torch import save_file

    make_directory(folder)
    tensors = checkpoints.read_weights(folder / "m").tensors
    (folder / "m" / "model.safetensors").unlink()
    index = {}
    for number in range(2):
        name = f"model-{number}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::2]}
        save_file(part, folder / "m" / name)
        index |= dict.fromkeys(part, name)
    write_json({"metadata": {}, "weight_map": index}, folder / "m" / "model.safetensors.index.json")


def build_sharded(rng: random.Random, folder: Path) -> Any:
    make_sharded_weights(folder)
    path = folder / "m" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    name = rng.choice(sorted(content["weight_map"]))
    outside = (
        "../m/model-0.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "x",
        "model-0.safetensors/",
        "a\nb",
        "\x00",
        1,
    )
    if rng.random() < 0.7:
        content["weight_map"][name] = rng.choice(outside)
        path.write_text(json.dumps(content))
        return Refused
    odd_json(rng, path)
    return Anything


def read_imported(folder: Path) -> Any:
    """As `import-model` reads what others published, whatever the kind of file."""
    import_model(folder / "m", None, folder / "out")
    return read_directory_at(folder / "out")


def read_directory_at(folder: Path) -> Any:
    weights = checkpoints.read_weights(folder)
    return {name: rounded(tensor) for name, tensor in weights.tensors.items()}, Vocabulary.load(
        folder / "vocabulary"
    ).gene_ids.tolist()


def valid_imported(value: Any) -> str | None:
    finite = all(np.isfinite(numbers).all() for numbers in value[0].values())
    return None if finite else "weights that are not finite"


register(
    lambda: Target("model-pickled", make_pickled_weights, read_imported, valid_imported, files="m/*.bin")
)
register(
    lambda: Target("model-pickled-old", make_old_weights, read_imported, valid_imported, files="m/*.bin")
)
register(
    lambda: Target(
        "model-shards", make_sharded_weights, read_imported, valid_imported, None, build_sharded, "m/model*"
    )
)


# --- states of a training ---------------------------------------------------------------------------------

SETTINGS = {"rate": 0.1, "inputs": {"tokens": "sha256:0"}}


def make_state(folder: Path) -> None:
    network = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.5)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(3)).sum().backward()
    optimizer.step()
    for step in (1, 2):
        save_state(
            folder, step=step, network_state=network.state_dict(), optimizer=optimizer, extra={"seen": 3},
            settings=SETTINGS,
        )  # fmt: skip


def read_state(folder: Path) -> Any:
    notes: list[str] = []
    state = load_state(folder, settings=SETTINGS, note=notes.append)
    load_state(folder, settings={"rate": 0.2}, note=notes.append)  # passed over, and said
    if any("\n" in note for note in notes):
        raise AssertionError(notes)
    if state is None:
        return None
    moments = {f"{i}/{k}": rounded(v) for i, each in state.optimizer.items() for k, v in each.items()}
    return state.step, {k: rounded(v) for k, v in state.network.items()}, moments, state.extra


register(lambda: Target("state", make_state, read_state, fine))


# --- tables -----------------------------------------------------------------------------------------------


def _table_target(
    name: str,
    make: Callable[[Path], None],
    read: Callable[[Path], Any],
    valid: Any = fine,
    file: str = "x.parquet",
) -> None:
    def build(rng: random.Random, folder: Path) -> Any:
        make(folder)
        (odd_json if file.endswith(".json") else odd_parquet)(rng, folder / file)
        return Anything

    build.__qualname__ = f"build_{name}"
    register(lambda: Target(name, make, read, valid, None, build))


def make_tokens(folder: Path) -> None:
    words = make_vocabulary(12)
    write_tokens(folder / "x.parquet", make_cells(words, [3, 0, 5, 2]), words)


def read_token_store(folder: Path) -> Any:
    from cellformers.models.bert_config import Config
    from cellformers.tokens import check_vocabulary, count_cells, token_lengths
    from cellformers.training.examples import cell_check, read_keys
    from cellformers.training.examples import read_cells as read_examples

    path, words = folder / "x.parquet", make_vocabulary(12)
    check_vocabulary(path, words)
    files = {None: [path]}
    shape: Config = make_config(words, max_position_embeddings=16)
    keys = read_keys(files)
    check = cell_check(shape, words, first_is_cls=False)
    found = read_examples(files, np.ones(len(keys), bool), check, n_tokens=words.size)
    choose_cells(path, max_cells=2)
    return keys.tolist(), np.asarray(found[0]).tolist(), token_lengths(path).tolist(), count_cells(path)


def valid_tokens(value: Any) -> str | None:
    keys, tokens, _, n = value
    if len(keys) != n:
        return "names for other cells"
    return names_fault(keys) or (None if all(0 <= t < 14 for t in tokens) else "tokens out of range")


_table_target("token-store", make_tokens, read_token_store, valid_tokens)


def make_embedding(folder: Path) -> None:
    vectors = pa.array(np.arange(N_CELLS * 4, dtype=np.float32))
    table = pa.table({"cell_id": CELLS, "embedding": pa.FixedSizeListArray.from_arrays(vectors, 4)})
    write_table(table, folder / "x.parquet", stamp("embed", 1, parameters={"layer": -1}, inputs=INPUTS))


def read_embedding(folder: Path) -> Any:
    path = folder / "x.parquet"
    found = open_embeddings([path])
    values = np.concatenate([*blocks(found, 5), np.zeros((0, found.dim), np.float32)])
    names, vectors = read_vectors([path])
    summarize_embeddings([path], folder / "states.parquet")
    states = read_states(folder / "states.parquet")
    return found.cell_ids.to_pylist(), rounded(values), names.tolist(), rounded(vectors), sorted(states)


def valid_embedding(value: Any) -> str | None:
    return names_fault(value[0]) or (None if value[0] == value[2] else "two readers disagree")


_table_target("embedding", make_embedding, read_embedding, valid_embedding)


def make_states(folder: Path) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(6, dtype=np.float32)), 3)
    write_table(pa.table({"state": ["a", "b"], "n_cells": [1, 2], "mean": vectors}), folder / "x.parquet")


def read_state_table(folder: Path) -> Any:
    return {name: rounded(vector) for name, vector in read_states(folder / "x.parquet").items()}


_table_target("states", make_states, read_state_table)


def make_gene_sums(folder: Path) -> None:
    totals = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(16, dtype=np.int64)), 2)
    table = {
        "gene_id": GENES,
        "symbol": ["A", None] * 4,
        "n_cells": pa.array([2] * 8, pa.int64()),
        "total": totals,
    }
    write_table(pa.table(table), folder / "x.parquet", stamp("embed", 1, parameters={}, inputs=INPUTS))


def read_gene_sums(folder: Path) -> Any:
    import pyarrow.parquet as pq

    merge_gene_sums([folder / "x.parquet"] * 2, folder / "merged.parquet")
    names, vectors = read_vectors([folder / "merged.parquet"], key="gene_id")
    return names.tolist(), rounded(vectors), pq.read_table(folder / "merged.parquet")["n_cells"].to_pylist()


def valid_gene_sums(value: Any) -> str | None:
    return names_fault(value[0])


_table_target("gene-sums", make_gene_sums, read_gene_sums, valid_gene_sums)


def make_sketch(folder: Path) -> None:
    from cellformers.histograms import SCHEMA

    gene = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1, 2], pa.int32()), pa.array(GENES[:3]))
    symbol = pa.DictionaryArray.from_arrays(pa.array([0, 0, None, 1], pa.int32()), pa.array(["A", "B"]))
    columns = {"gene_id": gene, "symbol": symbol, "bucket": [3, 4, 3, 9], "count": [1, 2, 3, 4]}
    arrays = [pa.array(columns[f.name]).cast(f.type) for f in SCHEMA]
    write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), folder / "x.parquet")


def read_sketch(folder: Path) -> Any:
    found = []
    for chunk in read_sketches([folder / "x.parquet"] * 2):
        found.append([np.asarray(part).tolist() for part in chunk])
    return found


_table_target("sketch", make_sketch, read_sketch)


def make_cells_table(folder: Path) -> None:
    table = {
        "cell_id": CELLS, "n_counts": pa.array([100] * N_CELLS, pa.int64()), "qc_pass": [True] * 11 + [None],
        "kind": KINDS, "donor": ["d1", "d2"] * 6,
    }  # fmt: skip
    write_table(pa.table(table), folder / "x.parquet", stamp("qc", 1, parameters={}, inputs=INPUTS))


def read_cells_table(folder: Path) -> Any:
    path = folder / "x.parquet"
    labels = read_column(path, "kind")
    cells, excluded = read_cells({"a": path}, label="kind", unit="donor")
    return labels.codes.tolist(), labels.names, cells.cell_id.tolist(), cells.label.tolist(), excluded


def valid_cells_table(value: Any) -> str | None:
    codes, names, ids, labels, _ = value
    if len(set(names)) < len(names) or not all(-1 <= code < len(names) for code in codes):
        return "codes of no label"
    return "a label that is no text" if not all(isinstance(v, str) for v in [*ids, *labels]) else None


_table_target("cells", make_cells_table, read_cells_table, valid_cells_table)


# --- JSON -------------------------------------------------------------------------------------------------


def make_split(folder: Path) -> None:
    folds = [{"name": "d1", "train": ["d2"], "test": ["d1"]}, {"name": "d2", "train": None, "test": ["d2"]}]
    content = {
        "task": "cells", "kind": "held-out", "by": "unit", "unit": "donor", "label": "kind", "seed": 0, "folds": folds,
        "classes": ["B cell", "T cell"], "inputs": {"cells": "sha256:0"}, "notes": [], "dataset": "a", "n": 6,
        "excluded": {"failed QC": 0},
    }  # fmt: skip
    write_json(content, folder / "x.json")


def read_split_file(folder: Path) -> Any:
    found = read_split(folder / "x.json", task="cells")
    return found.describe(), [
        [part.tolist() for part in fold] for fold in found.masks(np.array(["d1", "d2"]))
    ]


_table_target("split", make_split, read_split_file, fine, "x.json")


def make_scores(folder: Path) -> None:
    make_score(folder, "one", "model", 0.9)
    make_score(folder, "two", "baseline", 0.8)


def read_scores(folder: Path) -> Any:
    paths = sorted(folder.rglob("*.json"))
    rows = summarise(paths, folder / "benchmarks.tsv")
    lines = (folder / "benchmarks.tsv").read_text(encoding="utf-8").split("\n")
    if any(line.count("\t") != lines[0].count("\t") for line in lines[:-1]):
        raise AssertionError("a row of another length")
    return rows, [read_score(path)["n"] for path in paths]


def build_scores(rng: random.Random, folder: Path) -> Any:
    make_scores(folder)
    odd_json(rng, rng.choice(sorted(folder.rglob("*.json"))))
    return Anything


register(lambda: Target("scores", make_scores, read_scores, fine, None, build_scores, "**/*.json"))


def make_lock(folder: Path) -> None:
    record = {"a.tsv": {"size": 3, "sha256": "0" * 64, "mtime_ns": 1}}
    content = {
        "revisions": {"m": "1" * 40},
        "files": {"r/f": {"size": 1, "sha256": "2" * 64}},
        "folders": {"d": record},
    }
    write_json(content, folder / "checkpoints.lock.json")


def read_lock_file(folder: Path) -> Any:
    import os

    os.environ["CELLFORMERS_HOME"] = str(folder)
    return read_lock()


_table_target("lock", make_lock, read_lock_file, fine, "checkpoints.lock.json")


# --- YAML -------------------------------------------------------------------------------------------------


def make_yaml(folder: Path) -> None:
    content = {
        "datasets": {"a": {"path": "a.h5ad", "label": "kind", "batch": "donor", "qc": {"method": "mad"}}},
        "corpora": {"c": {"datasets": ["a"]}}, "vocabularies": {"own": {"corpus": "c"}},
        "models": {"small": {"vocabulary": "own", "pretrain": {"steps": 10, "layers": 2}}},
        "embeddings": {"small": {"model": "small"}},
        "benchmarks": {"types": {"task": "cells", "train": ["a"], "label": "kind", "unit": "donor"}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def read_yaml(folder: Path) -> Any:
    return config_module.load_file(folder / "config.yaml").model_dump(mode="json")


def build_yaml(rng: random.Random, folder: Path) -> Any:
    make_yaml(folder)
    path = folder / "config.yaml"
    if rng.random() < 0.6:
        path.write_text(yaml.safe_dump(change(rng, yaml.safe_load(path.read_text())), sort_keys=False))
        return Anything
    path.write_text(YAMLS[rng.choice(sorted(YAMLS))](), encoding="utf-8", errors="surrogateescape")
    return Refused


def _laughs() -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    return "\n".join(lines)


YAMLS: dict[str, Callable[[], str]] = {
    "a tag that calls": lambda: "datasets: !!python/object/apply:os.system ['touch pwned-by-a-pickle']",
    "a tag that makes": lambda: "datasets: !!python/object:collections.OrderedDict {}",
    "a tag that names": lambda: "datasets: {a: !!python/name:os.system ''}",
    "a tag of a module": lambda: "datasets: {a: !!python/module:antigravity ''}",
    "a tag of its own": lambda: "datasets: !evil {a: b}",
    "a billion laughs": _laughs,
    "laughs in a place for names": lambda: _laughs() + "\ndatasets: {a: {path: *l}}",
    "a mapping that holds itself": lambda: "datasets: &a\n  a: *a\n",
    "a list that holds itself": lambda: "datasets: {a: {path: x, where: {kind: &l [*l]}}}",
    "merge of itself": lambda: "datasets: &a\n  <<: *a\n",
    "lists in lists": lambda: "datasets: " + "[" * 20_000,
    "mappings in mappings": lambda: "datasets: " + "{a: " * 5_000 + "1" + "}" * 5_000,
    "a NUL": lambda: "datasets: {a: {path: 'x\0'}}",
    "an escaped NUL": lambda: 'datasets: {a: {path: "x.h5ad", label: "\\0"}, "\\0": {path: x}}',
    "no UTF-8": lambda: "datasets: {a: {path: \udcff\udcfe}}",
    "a key twice": lambda: "datasets: {a: {path: x.h5ad}, a: {path: y.h5ad}}",
    "a list as a key": lambda: "datasets: {? [a, b] : {path: x}}",
    "a mapping as a key": lambda: "? {a: b}\n: 1",
    "nothing": lambda: "",
    "a list": lambda: "[1, 2]",
    "a number of many digits": lambda: "datasets: {a: {path: x.h5ad, shards: " + "9" * 5000 + "}}",
    "a date that is none": lambda: "datasets: {a: {path: 2001-99-99}}",
    "a sexagesimal": lambda: "seed: 190:20:30:" + "59:" * 2000 + "1",
    "ten megabytes": lambda: "datasets: {a: {path: x.h5ad}}\n# " + "x" * 10_000_000 + "\nx: 1",
    "ten megabytes of keys": lambda: "\n".join(f"k{i}: 1" for i in range(900_000)),
    "two documents": lambda: "datasets: {a: {path: x.h5ad}}\n---\ndatasets: {}\n",
    "a name with a newline": lambda: 'datasets: {"a\\n": {path: x.h5ad}}',
    "a name with a folder": lambda: "datasets: {../a: {path: x.h5ad}}",
    "a name with a blank": lambda: "datasets: {a b: {path: x.h5ad}}",
    "a name with a command": lambda: "datasets: {$(touch pwned-by-a-pickle): {path: x.h5ad}}",
    "a name with a dash": lambda: "datasets: {--help: {path: x.h5ad}}",
}

register(lambda: Target("config", make_yaml, read_yaml, fine, None, build_yaml))


def make_entry(folder: Path) -> None:
    (folder / "gse129096.yaml").write_bytes(resource("datasets/gse129096.yaml").read_bytes())


def read_deposit_entry(folder: Path) -> Any:
    found = read_entry(folder / "gse129096.yaml")
    return found.name, sorted(found.files), sorted(found.parts), found.licence, found.citation


def build_entry(rng: random.Random, folder: Path) -> Any:
    make_entry(folder)
    path = folder / "gse129096.yaml"
    if rng.random() < 0.7:
        path.write_text(yaml.safe_dump(change(rng, yaml.safe_load(path.read_text())), sort_keys=False))
        return Anything
    path.write_text(YAMLS[rng.choice(sorted(YAMLS))](), encoding="utf-8", errors="surrogateescape")
    return Refused


register(lambda: Target("deposit-entry", make_entry, read_deposit_entry, fine, None, build_entry))


def make_registry(folder: Path) -> None:
    content = yaml.safe_load(resource("checkpoints.yaml").read_text())
    name = sorted(content["models"])[0]
    words = content["models"][name]["vocabulary"]
    kept = {
        "vocabularies": {words: content["vocabularies"][words]},
        "models": {name: content["models"][name]},
    }
    (folder / "checkpoints.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))


def read_registry_file(folder: Path) -> Any:
    found = read_registry(folder / "checkpoints.yaml")
    return {
        name: (m.repository, [f.path for f in m.files], dict(m.architecture))
        for name, m in found.models.items()
    }


def build_registry(rng: random.Random, folder: Path) -> Any:
    make_registry(folder)
    path = folder / "checkpoints.yaml"
    if rng.random() < 0.7:
        path.write_text(yaml.safe_dump(change(rng, yaml.safe_load(path.read_text())), sort_keys=False))
        return Anything
    path.write_text(YAMLS[rng.choice(sorted(YAMLS))](), encoding="utf-8", errors="surrogateescape")
    return Refused


register(lambda: Target("registry", make_registry, read_registry_file, fine, None, build_registry))


# --- archives ---------------------------------------------------------------------------------------------


def make_tar(folder: Path) -> None:
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in ("GSM1_a.txt.gz", "GSM2_b.txt.gz"):
            member = tarfile.TarInfo(name)
            content = gzip.compress(name.encode() * 50, mtime=0)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def expected(name: str) -> bool:
    return name.startswith("GSM")


def read_tar(folder: Path) -> Any:
    wrong = wrong_form(folder / "x.tar")
    work = folder / "work"
    work.mkdir()
    found = archives.unpack_tar(folder / "x.tar", work, expected=expected)
    if sorted(path.name for path in work.rglob("*")) != sorted(found):
        raise AssertionError("other files than it says")
    return wrong, {name: path.read_bytes() for name, path in found.items()}


def valid_tar(value: Any) -> str | None:
    return (
        None if all(expected(name) and "/" not in name for name in value[1]) else "a member of another name"
    )


register(lambda: Target("tar", make_tar, read_tar, valid_tar))


def make_gz(folder: Path) -> None:
    (folder / "x.gz").write_bytes(gzip.compress(b"counts and names\n" * 50, mtime=0))


def read_gz(folder: Path) -> Any:
    return archives.gunzip(folder / "x.gz", folder / "x", limit=10_000).read_bytes()


def valid_gz(value: bytes) -> str | None:
    """Each member of a file has a checksum; there may be several, or none."""
    line = b"counts and names\n" * 50
    return None if value == line * (len(value) // len(line)) else "other bytes"


register(lambda: Target("gz", make_gz, read_gz, valid_gz))


def make_gene_table(folder: Path) -> None:
    rows = "\n".join(f"{gene}.3,{'yes' if i % 2 else 'no'},{i}" for i, gene in enumerate(GENES))
    (folder / "x.csv").write_text("gene_id,label,score\n" + rows + "\n")
    write_json({"genes": [{"gene_id": gene, "label": "yes"} for gene in GENES]}, folder / "x.json")


def read_gene_tables(folder: Path) -> Any:
    found = [read_gene_table(folder / name, gene="gene_id", column="label") for name in ("x.csv", "x.json")]
    return [[part.tolist() for part in each] for each in found]


_table_target("gene-table", make_gene_table, read_gene_tables, fine, "x.json")
