"""Mistakes on the command line: one line that names the file and what to do, exit status 2, nothing left behind."""

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from command_line import N_GENES, files_in, make_adata, make_counts, run, save_vocabulary, write_adata
from safetensors.torch import load_file, save_file
from token_files import make_model, make_vocabulary

MOUSE_SYMBOLS = [
    "Gapdh", "Actb", "Cd3e", "Ms4a1", "Lyz2", "Cd14", "Nkg7", "Ccl5", "Ppbp", "Fcer1a", "Cst3", "mt-Nd1",
    "Xist", "Sox2", "Pax6",
]  # fmt: skip


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands need besides the wrong file: vocabularies, a model, counts, tokens, an ingested dataset."""
    folder = tmp_path_factory.mktemp("house")
    vocabulary = save_vocabulary(folder / "vocabulary")
    save_vocabulary(folder / "other", N_GENES - 1)
    make_model(folder / "model", vocabulary)
    make_model(folder / "v1", make_vocabulary(special="v1"))
    counts = write_adata(folder / "good.h5ad")
    done = [
        run("tokenize", counts, "--vocabulary", folder / "vocabulary", "-o", folder / "tokens.parquet"),
        run("ingest", counts, "-o", folder / "set"),
        run("qc-metrics", folder / "set/counts/0001-of-0001.h5ad", "-o", folder / "metrics.parquet"),
        run(
            *("qc", folder / "metrics.parquet", "--metadata", folder / "set/metadata.parquet"),
            *("-o", folder / "cells.parquet", "--report", folder / "qc"),
        ),
    ]
    assert [ran.code for ran in done] == [0] * 4, done
    return folder


Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Run a command that must be refused; the line it says."""

    def check(*arguments: str | Path, names: str | Path | None, says: tuple[str, ...] = ()) -> str:
        ran = run(*arguments)
        assert ran.code == 2, ran
        lines = ran.err.splitlines()
        assert len(lines) == 1, ran.err
        assert lines[0].startswith("cellformers: error: ")
        for word in (*says, *([] if names is None else [str(names)])):
            assert word in lines[0], (word, lines[0])
        assert files_in(tmp_path / "out") == []
        return lines[0]

    return check


# --- count files ---------------------------------------------------------------------------------------------


def truncated(path: Path) -> Path:
    write_adata(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def text_with_a_wrong_name(path: Path) -> Path:
    path.write_text("no HDF5\n")
    return path


def empty_file(path: Path) -> Path:
    path.touch()
    return path


def no_cells(path: Path) -> Path:
    return write_adata(path, np.zeros((0, N_GENES), np.float32))


def no_genes(path: Path) -> Path:
    return write_adata(path, np.zeros((9, 0), np.float32))


def with_value(value: float) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        counts = make_counts()
        counts[7, 3] = value
        return write_adata(path, counts)

    return write


def logged(path: Path) -> Path:
    counts = make_counts()
    return write_adata(path, np.log1p(counts / counts.sum(1, keepdims=True) * 1e4))


def mouse_ids(path: Path) -> Path:
    return write_adata(path, genes=[f"ENSMUSG{i:011d}" for i in range(N_GENES)])


def mouse_symbols(path: Path) -> Path:
    return write_adata(path, make_counts(n_genes=len(MOUSE_SYMBOLS)), genes=MOUSE_SYMBOLS)


def twice_the_same_cell(path: Path) -> Path:
    adata = make_adata()
    adata.obs_names = ["same", "same", *adata.obs_names[2:]]
    adata.write_h5ad(path)
    return path


def without_x(path: Path) -> Path:
    adata = make_adata()
    adata.layers["spliced"] = adata.X
    adata.X = None
    adata.write_h5ad(path)
    return path


def foreign_hdf5(path: Path) -> Path:
    with h5py.File(path, "w") as file:
        file["something"] = np.arange(3)
    return path


def damaged_indices(path: Path) -> Path:
    write_adata(path)
    with h5py.File(path, "r+") as file:
        file["X/indices"][5] = 10_000
    return path


def missing(path: Path) -> Path:
    return path


WRONG_COUNTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "missing": (missing, ("no such file", "check the path")),
    "truncated": (truncated, ("truncated", "download it again")),
    "not HDF5": (text_with_a_wrong_name, ("not an HDF5 file", "download it again")),
    "empty file": (empty_file, ("empty file",)),
    "no cells": (no_cells, ("is empty (0 cells, 60 genes)", "give a file with counts")),
    "no genes": (no_genes, ("is empty (9 cells, 0 genes)",)),
    "negative": (with_value(-2), ("negative values", "-2 in cell 'cell7', gene 'ENSG00000000003'", "layer:")),
    "NaN": (with_value(np.nan), ("NaN in cell 'cell7', gene 'ENSG00000000003'", "replace the missing")),
    "infinite": (with_value(np.inf), ("infinite", "'cell7'", "raw: true")),
    "fraction": (
        with_value(2.5),
        (
            "non-integer values",
            "2.5 in cell 'cell7', gene 'ENSG00000000003'",
            "layer:",
            "raw:",
            "round: true",
        ),
    ),
    "log values": (logged, ("log-normalised values", "in cell 'cell0'", "layer:", "raw: true")),
    "mouse ids": (mouse_ids, ("not human", "mouse", "ENSMUSG00000000000", "orthologues")),
    "mouse symbols": (mouse_symbols, ("not human", "title case", "Gapdh", "orthologues")),
    "duplicate cells": (twice_the_same_cell, ("'same'", "make_unique: true")),
    "no X": (without_x, ("has no X", "layers: spliced")),
    "foreign HDF5": (foreign_hdf5, ("neither AnnData nor loom nor 10x", "known are")),
    "damaged": (damaged_indices, ("index 10000 among 60 genes", "download the file again")),
}


@pytest.mark.parametrize("case", WRONG_COUNTS)
@pytest.mark.parametrize("verb", ["ingest", "tokenize", "embed-file", "sketch", "medians"])
def test_wrong_counts(tmp_path: Path, house: Path, refused: Refused, verb: str, case: str) -> None:
    write, says = WRONG_COUNTS[case]
    path = write(tmp_path / "wrong.h5ad")
    before = path.read_bytes() if path.exists() else None
    more = {
        "ingest": ("-o", tmp_path / "out" / "set"),
        "tokenize": ("--vocabulary", house / "vocabulary", "-o", tmp_path / "out" / "t.parquet"),
        "embed-file": ("--model", house / "model", "-o", tmp_path / "out" / "e.h5ad"),
        "sketch": ("-o", tmp_path / "out" / "s.parquet"),
        "medians": ("-o", tmp_path / "out" / "m.parquet"),
    }[verb]
    refused(verb, path, *more, names=path, says=says)
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_value_deep_in_the_file(tmp_path: Path, house: Path, refused: Refused) -> None:
    """A first look sees counts; what was written by then is removed."""
    counts = make_counts(20_000)
    counts[19_000, 11] = 0.25
    path = write_adata(tmp_path / "late.h5ad", counts)
    says = ("0.25 in cell 'cell19000', gene 'ENSG00000000011'",)
    for verb, more in (
        ("ingest", ("--shards", "2", "-o", tmp_path / "out/set")),
        ("tokenize", ("--vocabulary", house / "vocabulary", "-o", tmp_path / "out/t.parquet")),
        ("embed-file", ("--model", house / "model", "-o", tmp_path / "out/e.h5ad")),
    ):
        refused(verb, path, *more, names=path, says=says)


@pytest.mark.parametrize("verb", ["tokenize", "embed-file"])
def test_unknown_genes(tmp_path: Path, house: Path, refused: Refused, verb: str) -> None:
    path = write_adata(tmp_path / "wrong.h5ad", genes=[f"LOC{i}" for i in range(N_GENES)])
    more = (
        ("--vocabulary", house / "vocabulary", "-o", tmp_path / "out/t.parquet")
        if verb == "tokenize"
        else ("--model", house / "model", "-o", tmp_path / "out/e.h5ad")
    )
    refused(verb, path, *more, names=path, says=("0.0% of its counts", "60 of 60", "LOC", "gene_column:"))


def test_unknown_genes_of_a_dataset(tmp_path: Path, house: Path, refused: Refused) -> None:
    path = write_adata(tmp_path / "wrong.h5ad", genes=[f"LOC{i}" for i in range(N_GENES)])
    assert run("ingest", path, "-o", tmp_path / "set").code == 0
    features = tmp_path / "set" / "features.parquet"
    refused(
        "genes", features, "--vocabulary", house / "vocabulary", "-o", tmp_path / "out/g.json",
        names=features, says=("0.0% of its counts", "LOC"),
    )  # fmt: skip


@pytest.mark.parametrize("verb", ["tokenize", "embed-file"])
def test_no_cell_passes_the_filter_of_the_file(
    tmp_path: Path, house: Path, refused: Refused, verb: str
) -> None:
    adata = make_adata()
    adata.obs["filter_pass"] = 0
    path = tmp_path / "none.h5ad"
    adata.write_h5ad(path)
    more = (
        ("--vocabulary", house / "vocabulary", "-o", tmp_path / "out/t.parquet")
        if verb == "tokenize"
        else ("--model", house / "model", "-o", tmp_path / "out/e.h5ad")
    )
    refused(verb, path, *more, names=path, says=("no cell passes", "filter_pass"))


def test_nothing_but_zeros(tmp_path: Path, house: Path, refused: Refused) -> None:
    path = write_adata(tmp_path / "zeros.h5ad", np.zeros((20, N_GENES), np.float32))
    refused(
        "tokenize", path, "--vocabulary", house / "vocabulary", "-o", tmp_path / "out/t.parquet",
        names=path, says=("no counts",),
    )  # fmt: skip
    refused(
        "embed-file", path, "--model", house / "model", "-o", tmp_path / "out/e.h5ad",
        names=path, says=("no counts",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--layer", "cuonts"), ("no layer 'cuonts'", "did you mean 'counts'?")),
        (("--raw",), ("has no raw",)),
        (("--gene-column", "symbl"), ("symbl",)),
        (("--cell-column", "tpye"), ("no cell column 'tpye'", "did you mean 'type'?")),
    ],
)
def test_options_that_name_what_is_not_there(
    tmp_path: Path, house: Path, refused: Refused, options: tuple[str, ...], says: tuple[str, ...]
) -> None:
    adata = make_adata()
    adata.layers["counts"] = adata.X
    path = tmp_path / "mine.h5ad"
    adata.write_h5ad(path)
    refused("ingest", path, *options, "-o", tmp_path / "out/set", names=path, says=says)


@pytest.mark.parametrize("options", [("--layer", "X", "--raw"), ("--genes-in-rows", "--cells-in-rows")])
def test_options_that_exclude_each_other(
    tmp_path: Path, house: Path, refused: Refused, options: tuple[str, ...]
) -> None:
    refused(
        "ingest", house / "good.h5ad", *options, "-o", tmp_path / "out/set",
        names=None, says=(*(o for o in options if o.startswith("--")), "not both"),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ragged.csv", "words.csv", "cut.csv.gz"])
def test_wrong_text(tmp_path: Path, refused: Refused, name: str) -> None:
    frame = pd.DataFrame(make_adata().X.toarray().astype(int), columns=make_adata().var_names)
    frame.index = make_adata().obs_names
    text = frame.to_csv()
    path = tmp_path / name
    if name == "ragged.csv":
        path.write_text(text.replace("cell9,", "cell9,4,", 1))
    elif name == "words.csv":
        path.write_text(text.replace("cell9,", "cell9,many", 1))
    else:
        path.write_bytes(gzip.compress(text.encode())[:-40])
    refused("ingest", path, "-o", tmp_path / "out/set", names=path)


# --- datasets ------------------------------------------------------------------------------------------------


def test_more_shards_than_cells(tmp_path: Path, house: Path, refused: Refused) -> None:
    refused(
        "ingest", house / "good.h5ad", "--shards", "41", "-o", tmp_path / "out/set",
        names=house / "good.h5ad", says=("40 cells can't be split into 41 shards", "1 to 40"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("table", "key", "says"),
    [
        (None, "cell", ("no such file",)),
        ("cell,type\ncell0,a\n", "cel", ("no column 'cel'", "did you mean 'cell'?")),
        ("cell,type\nACGT-1,a\n", "cell", ("matches no cell", "'ACGT-1'", "'cell0'", "as key")),
        ("cell,type\ncell0,a\ncell0,b\n", "cell", ("'cell0' stands in more than one row", "keep one")),
        ("cell,type\n", "cell", ("holds no rows",)),
        ("cell,type\ncell0,a,b,c\n", "cell", ("not readable as a csv",)),
    ],
)
def test_wrong_label_tables(
    tmp_path: Path, house: Path, refused: Refused, table: str | None, key: str, says: tuple[str, ...]
) -> None:
    path = tmp_path / "labels.csv"
    if table is not None:
        path.write_text(table)
    refused(
        "ingest", house / "good.h5ad", "--labels", path, "--key", key, "-o", tmp_path / "out/set",
        names=path, says=says,
    )  # fmt: skip


def test_labels_need_a_key(tmp_path: Path, house: Path, refused: Refused) -> None:
    refused(
        "ingest", house / "good.h5ad", "--labels", "labels.csv", "-o", tmp_path / "out/set",
        names=None, says=("--labels and --key go together",),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (None, ("no such sample table",)),
        ("smaple\tpath\na\tx\n", ("no column 'sample'", "did you mean 'smaple'?")),
        ("sample\tpath\n", ("has no rows", "list at least one")),
        ("sample\tpath\na\tgood.h5ad\na\tgood.h5ad\n", ("line 3", "'a' is there twice")),
        ("sample\tpath\na\tgood.h5ad\nb\tbad.h5ad\n", ("bad.h5ad", "no such file")),
    ],
)
def test_wrong_sample_tables(
    tmp_path: Path, house: Path, refused: Refused, table: str | None, says: tuple[str, ...]
) -> None:
    shutil.copyfile(house / "good.h5ad", tmp_path / "good.h5ad")
    path = tmp_path / "samples.tsv"
    if table is not None:
        path.write_text(table)
    names = tmp_path / "bad.h5ad" if "bad.h5ad" in says else path
    refused("ingest", "--samples", path, "-o", tmp_path / "out/set", names=names, says=says)


def test_ingest_of_nothing(tmp_path: Path, refused: Refused) -> None:
    refused("ingest", "-o", tmp_path / "out/set", names=None, says=("either one FILE or --samples",))


def test_no_cell_passes_qc(tmp_path: Path, house: Path, refused: Refused) -> None:
    metadata = house / "set" / "metadata.parquet"
    refused(
        "qc", house / "metrics.parquet", "--metadata", metadata, "--method", "fixed", "--min-counts", "1e9",
        "-o", tmp_path / "out/cells.parquet", "--report", tmp_path / "out/qc",
        names=metadata, says=("no cell passes QC", "n_counts removes 40 of 40", "change the keys of qc:"),
    )  # fmt: skip


def test_qc_of_what_is_no_shard(tmp_path: Path, house: Path, refused: Refused) -> None:
    for path in (house / "good.h5ad", house / "tokens.parquet"):
        refused(
            "qc-metrics", path, "-o", tmp_path / "out/m.parquet",
            names=path, says=("not a counts shard", "cellformers ingest"),
        )  # fmt: skip


def test_split_by_a_column_that_is_not_there(tmp_path: Path, house: Path, refused: Refused) -> None:
    refused(
        "split", "--task", "cells", "--cells", f"a={house / 'cells.parquet'}", "--label", "tpye",
        "-o", tmp_path / "out/split.json",
        names=house / "cells.parquet", says=("no column 'tpye'", "did you mean 'type'?"),
    )  # fmt: skip
    refused(
        "split", "--task", "cells", "--cells", f"a={house / 'cells.parquet'}", "--label", "type",
        "--unit", "dnor", "-o", tmp_path / "out/split.json",
        names=house / "cells.parquet", says=("no column 'dnor'",),
    )  # fmt: skip


@pytest.mark.parametrize("word", ["cells.parquet", "=cells.parquet", "a="])
def test_malformed_names(tmp_path: Path, refused: Refused, word: str) -> None:
    refused(
        "split", "--task", "cells", "--cells", word, "--label", "type", "-o", tmp_path / "out/split.json",
        names=None, says=(f"--cells {word!r} is not NAME=PATH",),
    )  # fmt: skip


def test_a_split_of_no_cells(tmp_path: Path, refused: Refused) -> None:
    refused(
        "split", "--task", "cells", "--label", "type", "-o", tmp_path / "out/split.json",
        names=None, says=("--cells",),
    )  # fmt: skip


# --- vocabularies --------------------------------------------------------------------------------------------


def test_a_pickle_with_a_forbidden_opcode(tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "published"
    folder.mkdir()
    for kind in ("gene_median_dictionary", "ensembl_mapping_dict", "gene_name_id_dict"):
        (folder / f"{kind}.pkl").write_bytes(pickle.dumps({"ENSG00000000001": 1.0}))
    mark = tmp_path / "executed"
    bad = folder / "token_dictionary.pkl"
    bad.write_bytes(b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.")
    refused(
        "vocabulary", "--from", folder, "-o", tmp_path / "out/vocabulary",
        names=bad, says=("forbidden", "os.system", "nothing was run", "as published"),
    )  # fmt: skip
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["missing", "empty folder", "counts", "no medians"])
def test_wrong_sources_of_a_vocabulary(tmp_path: Path, house: Path, refused: Refused, kind: str) -> None:
    path = house / "good.h5ad" if kind == "counts" else tmp_path / "source"
    if kind == "empty folder":
        path.mkdir()
    if kind == "no medians":
        path = house / "tokens.parquet"
    refused("vocabulary", "--from", path, "-o", tmp_path / "out/vocabulary", names=path)


def test_no_vocabulary(tmp_path: Path, house: Path, refused: Refused) -> None:
    refused(
        "tokenize", house / "good.h5ad", "--vocabulary", house / "set", "-o", tmp_path / "out/t.parquet",
        names=house / "set", says=("no vocabulary here", "make one with cellformers vocabulary"),
    )  # fmt: skip


def test_a_damaged_vocabulary(tmp_path: Path, house: Path, refused: Refused) -> None:
    shutil.copytree(house / "vocabulary", tmp_path / "vocabulary")
    path = tmp_path / "vocabulary" / "tokens.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    refused(
        "tokenize", house / "good.h5ad", "--vocabulary", path.parent, "-o", tmp_path / "out/t.parquet",
        names=path, says=("truncated", "make it again"),
    )  # fmt: skip


# --- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cell", "gene"])
def test_the_wrong_vocabulary_for_a_model(tmp_path: Path, house: Path, refused: Refused, mode: str) -> None:
    tokens = tmp_path / "t.parquet"
    assert run("tokenize", house / "good.h5ad", "--vocabulary", house / "other", "-o", tokens).code == 0
    refused(
        "embed", tokens, "--model", house / "model", "--mode", mode, "-o", tmp_path / "out/e.parquet",
        names=tokens, says=("wrong vocabulary", "tokenize with the vocabulary that the model carries"),
    )  # fmt: skip


def test_pretraining_on_tokens_of_another_vocabulary(tmp_path: Path, house: Path, refused: Refused) -> None:
    refused(
        "pretrain", house / "tokens.parquet", "--vocabulary", house / "other", "-o", tmp_path / "out/model",
        names=house / "tokens.parquet", says=("vocabulary",),
    )  # fmt: skip


def lacks_a_tensor(model: Path) -> tuple[Path, tuple[str, ...]]:
    path = model / "model.safetensors"
    tensors = load_file(path)
    del tensors["bert.encoder.layer.1.output.dense.weight"]
    save_file(tensors, path)
    return path, ("lacks the tensor bert.encoder.layer.1.output.dense.weight",)


def truncated_weights(model: Path) -> tuple[Path, tuple[str, ...]]:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return path, ("not readable as safetensors", "fetch it again")


def no_weights(model: Path) -> tuple[Path, tuple[str, ...]]:
    (model / "model.safetensors").unlink()
    return model / "model.safetensors", ("no such file",)


def changed_config(**values: object) -> Callable[[Path], tuple[Path, tuple[str, ...]]]:
    def change(model: Path) -> tuple[Path, tuple[str, ...]]:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return path, (next(iter(values)),)

    return change


def config_without_a_key(model: Path) -> tuple[Path, tuple[str, ...]]:
    path = model / "config.json"
    content = json.loads(path.read_text())
    del content["hidden_size"]
    path.write_text(json.dumps(content))
    return path, ("lacks hidden_size",)


def config_of_words(model: Path) -> tuple[Path, tuple[str, ...]]:
    (model / "config.json").write_text("{oops")
    return model / "config.json", ("not readable as JSON",)


def layers_more_than_weights(model: Path) -> tuple[Path, tuple[str, ...]]:
    changed_config(num_hidden_layers=4)(model)
    return model / "model.safetensors", ("lacks the tensor bert.encoder.layer.3",)


def no_vocabulary_inside(model: Path) -> tuple[Path, tuple[str, ...]]:
    shutil.rmtree(model / "vocabulary")
    return model, ("vocabulary",)


def no_model(model: Path) -> tuple[Path, tuple[str, ...]]:
    shutil.rmtree(model)
    return model, ("no such model",)


WRONG_MODELS = {
    "lacks a tensor": lacks_a_tensor,
    "truncated": truncated_weights,
    "no weights": no_weights,
    "absurd size": changed_config(hidden_size=10**12),
    "no multiple": changed_config(num_attention_heads=5),
    "words": changed_config(hidden_size="wide"),
    "other model": changed_config(model_type="gpt2"),
    "a key is missing": config_without_a_key,
    "broken JSON": config_of_words,
    "more layers": layers_more_than_weights,
    "no vocabulary": no_vocabulary_inside,
    "no model": no_model,
}


@pytest.mark.parametrize("case", WRONG_MODELS)
@pytest.mark.parametrize("verb", ["embed", "embed-file", "import-model"])
def test_wrong_models(tmp_path: Path, house: Path, refused: Refused, verb: str, case: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(house / "model", model)
    names, says = WRONG_MODELS[case](model)
    if verb == "import-model":
        refused(verb, model, "-o", tmp_path / "out/model", names=names if case != "no vocabulary" else model)
        return
    counts = house / ("tokens.parquet" if verb == "embed" else "good.h5ad")
    output = tmp_path / "out" / ("e.parquet" if verb == "embed" else "e.h5ad")
    refused(verb, counts, "--model", model, "-o", output, names=names, says=says)


@pytest.mark.parametrize("verb", ["embed", "embed-file"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--mode", "cel"), ("no embedding mode 'cel'", "did you mean 'cell'?")),
        (("--dtype", "float23"), ("no dtype 'float23'", "did you mean 'float32'?")),
        (("--accelerator", "gpu"), ("no accelerator 'gpu'", "give cpu or cuda")),
        (("--accelerator", "cuda"), ("no CUDA device",)),
        (("--layer", "-9"), ("no layer -9", "choose 0 (last) to -3")),
    ],
)
def test_values_that_do_not_exist(
    tmp_path: Path, house: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, verb: str,
    options: tuple[str, ...], says: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    counts = house / ("tokens.parquet" if verb == "embed" else "good.h5ad")
    output = tmp_path / "out" / ("e.parquet" if verb == "embed" else "e.h5ad")
    refused(verb, counts, "--model", house / "model", *options, "-o", output, names=None, says=says)


def test_mode_cls_of_a_model_without_cls(tmp_path: Path, house: Path, refused: Refused) -> None:
    refused(
        "embed-file", house / "good.h5ad", "--model", house / "v1", "--mode", "cls", "-o",
        tmp_path / "out/e.h5ad", names=house / "v1", says=("needs a <cls> token", "choose mode cell"),
    )  # fmt: skip
    refused(
        "embed-file", house / "good.h5ad", "--model", house / "v1", "--mode", "gene", "-o",
        tmp_path / "out/e.h5ad", names=None, says=("embed-file embeds cells", "tokenize, embed"),
    )  # fmt: skip


def test_other_values_that_do_not_exist(
    tmp_path: Path, house: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(
        "qc", house / "metrics.parquet", "--metadata", house / "set/metadata.parquet", "--method", "sdd",
        "-o", tmp_path / "out/c.parquet", "--report", tmp_path / "out/qc",
        names=None, says=("no QC method 'sdd'", "did you mean 'sd'?"),
    )  # fmt: skip
    refused(
        "split", "--task", "cell", "--label", "type", "-o", tmp_path / "out/s.json",
        names=None, says=("no task 'cell'", "--task cells"),
    )  # fmt: skip
    refused(
        "vocabulary", "--from", house / "vocabulary", "--special-tokens", "v3", "-o", tmp_path / "out/v",
        names=None, says=("no special tokens 'v3'", "v1 or v2"),
    )  # fmt: skip
    refused(
        "pretrain", house / "tokens.parquet", "--vocabulary", house / "vocabulary", "--accelerator", "cuda",
        "-o", tmp_path / "out/m", names=None, says=("no CUDA device", "choose cpu"),
    )  # fmt: skip
    refused(
        "pretrain", house / "tokens.parquet", "--vocabulary", house / "vocabulary", "--heads", "7",
        "-o", tmp_path / "out/m", names=None, says=("num_attention_heads 7",),
    )  # fmt: skip


# --- intermediate files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", ["end", "middle"])
def test_truncated_tokens(tmp_path: Path, house: Path, refused: Refused, cut: str) -> None:
    content = bytearray((house / "tokens.parquet").read_bytes())
    path = tmp_path / "t.parquet"
    if cut == "end":
        path.write_bytes(content[:-200])
    else:
        content[200:1200] = bytes(1000)
        path.write_bytes(content)
    refused("embed", path, "--model", house / "model", "-o", tmp_path / "out/e.parquet", names=path)
    refused(
        "embed", path, "--model", house / "model", "--mode", "gene", "-o", tmp_path / "out/e.parquet",
        names=path,
    )  # fmt: skip
    refused("pretrain", path, "--vocabulary", house / "vocabulary", "-o", tmp_path / "out/m", names=path)


def test_files_of_another_step(tmp_path: Path, house: Path, refused: Refused) -> None:
    tokens, counts, cells = house / "tokens.parquet", house / "good.h5ad", house / "cells.parquet"
    out = tmp_path / "out"
    refused(
        "tokenize", tokens, "--vocabulary", house / "vocabulary", "-o", out / "t.parquet",
        names=tokens, says=("is a Parquet table", "known are: h5ad"),
    )  # fmt: skip
    refused("embed", counts, "--model", house / "model", "-o", out / "e.parquet", names=counts)
    refused(
        "embed", cells, "--model", house / "model", "-o", out / "e.parquet",
        names=cells, says=("not a tokens file", "cellformers tokenize"),
    )  # fmt: skip
    refused("gather", tokens, "--cells", cells, "--name", "a", "-o", out / "e.h5ad", names=tokens)
    refused("gather-genes", tokens, "-o", out / "g.parquet", names=tokens)
    refused("medians", tokens, "-o", out / "m.parquet", names=tokens)
    refused("tokenize", counts, "--vocabulary", house / "vocabulary", "--cells", cells,
            "-o", out / "t.parquet", names=counts, says=("not a counts shard",))  # fmt: skip
    refused("map", counts, "-o", out / "map.parquet", names=counts)
    refused("evaluate", "--task", "cells", "--split", cells, "--method", "m", "--features", "embedding",
            "--cells", f"a={cells}", "--predictions", out / "p.parquet", "-o", out / "s.json",
            names=cells)  # fmt: skip
    for features, task in (("pca", "cells"), ("expression", "genes")):
        split = house / "cells.parquet"
        refused("evaluate", "--task", task, "--split", split, "--method", "m", "--features", features,
                "--cells", f"a={cells}", "--predictions", out / "p.parquet", "-o", out / "s.json",
                names=None)  # fmt: skip
    refused("summarize", cells, "-o", out / "b.tsv", names=cells)
    refused("report", "--config", cells, "--results", house, "-o", out / "r.html", names=cells)


# --- outputs -------------------------------------------------------------------------------------------------


def writers(house: Path) -> dict[str, tuple[str | Path, ...]]:
    return {
        "ingest": (house / "good.h5ad",),
        "tokenize": (house / "good.h5ad", "--vocabulary", house / "vocabulary"),
        "embed": (house / "tokens.parquet", "--model", house / "model"),
        "embed-file": (house / "good.h5ad", "--model", house / "model"),
        "vocabulary": ("--from", house / "vocabulary"),
        "randomize": (house / "model",),
        "medians": (house / "good.h5ad",),
        "split": ("--task", "cells", "--cells", f"a={house / 'cells.parquet'}", "--label", "type"),
        "simulate": ("--cells", "300"),
    }


VERBS_THAT_WRITE = (
    "ingest", "tokenize", "embed", "embed-file", "vocabulary", "randomize", "medians", "split", "simulate",
)  # fmt: skip


def named(verb: str) -> str:
    """An output by a name that suits the verb."""
    return "e.h5ad" if verb == "embed-file" else "result"


@pytest.mark.parametrize("verb", VERBS_THAT_WRITE)
def test_a_file_is_in_the_way_of_the_folder(tmp_path: Path, house: Path, refused: Refused, verb: str) -> None:
    way = tmp_path / "way"
    way.write_text("mine")
    output = way / named(verb)
    refused(verb, *writers(house)[verb], "-o", output, names=way, says=("can't write here", "--output"))
    assert way.read_text() == "mine"


@pytest.mark.parametrize("verb", VERBS_THAT_WRITE)
def test_a_folder_that_may_not_be_written(house: Path, refused: Refused, verb: str) -> None:
    output = Path("/proc/cellformers") / named(verb)
    refused(verb, *writers(house)[verb], "-o", output, names="/proc/cellformers", says=("can't write here",))


@pytest.mark.parametrize("verb", ["tokenize", "embed", "embed-file", "medians", "split"])
def test_a_folder_is_in_the_way_of_the_file(tmp_path: Path, house: Path, refused: Refused, verb: str) -> None:
    way = tmp_path / named(verb)
    way.mkdir()
    refused(verb, *writers(house)[verb], "-o", way, names=way, says=("is a folder", "--output"))
    assert list(tmp_path.iterdir()) == [way]


@pytest.mark.parametrize("verb", ["vocabulary", "randomize"])
def test_a_file_is_in_the_way_of_a_folder(tmp_path: Path, house: Path, refused: Refused, verb: str) -> None:
    way = tmp_path / "way"
    way.write_text("mine")
    refused(verb, *writers(house)[verb], "-o", way, names=way, says=("is a file", "--output"))
    assert [p.name for p in tmp_path.iterdir()] == ["way"]
    assert way.read_text() == "mine"


def test_the_output_is_the_input(tmp_path: Path, house: Path, refused: Refused) -> None:
    path = write_adata(tmp_path / "mine.h5ad")
    before = path.read_bytes()
    link = tmp_path / "link.h5ad"
    link.symlink_to(path)
    for output in (path, link):
        refused(
            "embed-file", path, "--model", house / "model", "-o", output,
            names=output, says=("is the input", "choose another --output"),
        )  # fmt: skip
    assert path.read_bytes() == before
    assert set(files_in(tmp_path)) == {path, link}


def test_embed_file_writes_h5ad_only(tmp_path: Path, house: Path, refused: Refused) -> None:
    refused(
        "embed-file", house / "good.h5ad", "--model", house / "model", "-o", tmp_path / "out/e.csv",
        names=tmp_path / "out/e.csv", says=("the result is an .h5ad file",),
    )  # fmt: skip


# --- configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("datsets: {}\n", ("unknown key 'datsets'", "did you mean 'datasets'?")),
        ("datasets: {a: {paht: x.h5ad}}\n", ("unknown key 'datasets.a.paht'", "did you mean 'path'?")),
        ("datasets: {a: {path: x.h5ad, qc: {methd: sd}}}\n", ("datasets.a.qc.methd", "did you mean 'method'?")),
        ("datasets: {a: {path: x.h5ad, shards: none}}\n", ("datasets.a.shards",)),
        ("- a\n", ("not a YAML mapping", "config/config.yaml")),
        ("a: [\n", ("is not YAML",)),
        (None, ("can't be read",)),
    ],
)  # fmt: skip
def test_wrong_configs(tmp_path: Path, refused: Refused, text: str | None, says: tuple[str, ...]) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    refused("doctor", "--config", path, names=path, says=says)
    refused(
        "report",
        "--config",
        path,
        "--results",
        tmp_path,
        "-o",
        tmp_path / "out/r.html",
        names=path,
        says=says,
    )


# --- typer's own refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("tokenize", "x.h5ad"),
        ("tokenise", "x.h5ad"),
        ("ingest", "x.h5ad", "--shards", "0", "-o", "out"),
        ("ingest", "x.h5ad", "--shards", "many", "-o", "out"),
        ("embed", "t.parquet", "--model", "m", "--layer", "1", "-o", "e.parquet"),
    ],
)
def test_wrong_usage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(*arguments)
    assert ran.code == 2
    assert "Traceback" not in ran.err
    assert "Usage: " in ran.err
    assert list(tmp_path.iterdir()) == []


def test_adata_without_a_known_encoding(tmp_path: Path, refused: Refused) -> None:
    path = write_adata(tmp_path / "odd.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X/indptr"]
    refused("ingest", path, "-o", tmp_path / "out/set", names=path, says=("indptr", "anndata"))


def test_the_matrix_and_its_names_do_not_agree(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "odd.h5ad"
    adata = anndata.AnnData(sp.csr_matrix(make_counts()))
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["shape"] = [41, N_GENES]
    refused(
        "ingest",
        path,
        "-o",
        tmp_path / "out/set",
        names=path,
        says=("X is 41 cells", "names of 40 cells"),
    )


# --- outputs that would take something's place -------------------------------------------------------------


def test_the_output_is_an_input(house: Path, tmp_path: Path, refused: Refused) -> None:
    for name in ("good.h5ad", "tokens.parquet"):
        shutil.copy(house / name, tmp_path)
    for name in ("model", "vocabulary"):
        shutil.copytree(house / name, tmp_path / name)
    counts, tokens, model, words = (
        tmp_path / name for name in ("good.h5ad", "tokens.parquet", "model", "vocabulary")
    )
    (tmp_path / "link.parquet").symlink_to(tokens)
    before = {path: path.read_bytes() for path in files_in(tmp_path)}
    for command, output in (
        (("tokenize", counts, "--vocabulary", words), counts),
        (("embed", tokens, "--model", model), tokens),
        (("embed", tokens, "--model", model), tmp_path / "link.parquet"),
        (("randomize", model), model),
        (("import-model", model), model),
        (("vocabulary", "--from", words), words),
        (("gather", tokens, "--cells", house / "cells.parquet"), tokens),
    ):
        refused(*command, "-o", output, names=output, says=("is the input", "choose another --output"))
    assert {path: path.read_bytes() for path in files_in(tmp_path)} == before


def test_a_vocabulary_does_not_replace_other_things(house: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    refused(
        *("vocabulary", "--from", house / "vocabulary", "-o", tmp_path / "thesis"),
        names=tmp_path / "thesis", says=("other things in it (chapter.txt)",),
    )  # fmt: skip
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    for _ in range(2):  # but one that is there
        assert run("vocabulary", "--from", house / "vocabulary", "-o", tmp_path / "words").code == 0


def test_randomize_without_a_vocabulary(house: Path, tmp_path: Path, refused: Refused) -> None:
    model = shutil.copytree(house / "model", tmp_path / "model")
    shutil.rmtree(model / "vocabulary")
    refused("randomize", model, "-o", tmp_path / "out/m", names=model / "vocabulary", says=("no vocabulary",))


def test_json_too_deep_to_read(house: Path, tmp_path: Path, refused: Refused) -> None:
    model = shutil.copytree(house / "model", tmp_path / "model")
    (model / "config.json").write_text("[" * 100_000)
    refused("randomize", model, "-o", tmp_path / "out/m", names=model / "config.json", says=("not readable",))


def test_import_of_a_model_with_too_small_a_vocabulary_asks(house: Path, tmp_path: Path) -> None:
    ran = run("import-model", house / "model", "--vocabulary", house / "other", "-o", tmp_path / "m")
    assert ran.code == 0
    assert "tokens more than the vocabulary has" in ran.err
    ran = run("import-model", house / "model", "-o", tmp_path / "same")
    assert (ran.code, ran.err) == (0, "")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocabulary/vocabulary.json"])
def test_no_file_of_a_model_is_written_over(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "m", make_vocabulary())
    before = (model / name).read_bytes()
    ran = run("verify", model, "-o", model / name)
    assert ran.code == 2
    assert "is the input, which is never changed; choose another --output" in ran.err
    assert (model / name).read_bytes() == before
