"""Vocabularies, the mapping of features to genes, and what is refused."""

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cellformers.errors import UserError
from cellformers.genes import (
    MITOCHONDRIAL,
    Vocabulary,
    check_mapping,
    check_species,
    from_medians,
    is_mitochondrial,
    is_spike_in,
    map_features,
    read_published,
)
from cellformers.io.pickles import read_dictionary

GENES = {"ENSG00000000001": 1.5, "ENSG00000000002": 2.5, "ENSG00000000003": 0.5}
V1 = {"<pad>": 0, "<mask>": 1}
V2 = {**V1, "<cls>": 2, "<eos>": 3}


def write_published(folder: Path, *, special: dict[str, int] = V2, **changed: object) -> Path:
    """Four small pickles laid out as the published ones, with a retired id, an alias and a gene without a token."""
    content = {
        "token_dictionary": special | {gene: len(special) + i for i, gene in enumerate(GENES)},
        "gene_median_dictionary": {gene: np.float64(m) for gene, m in GENES.items()}
        | {"ENSG00000000009": np.float64(1)},
        "ensembl_mapping_dict": {gene: gene for gene in [*GENES, "ENSG00000000009"]}
        | {"ENSG00000000099": "ENSG00000000001", "ONE": "ENSG00000000001", "NINE": "ENSG00000000009"},
        "gene_name_id_dict": {
            "One": "ENSG00000000001",
            "C2orf2": "ENSG00000000002",
            "Ten": "ENSG00000000010",
        },
    } | changed
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        (folder / f"{name}_test.pkl").write_bytes(pickle.dumps(value))
    return folder


def write_medians(
    path: Path, genes: list[str], symbols: list[str | None], medians: list[float | None]
) -> Path:
    pq.write_table(
        pa.table({"gene_id": genes, "symbol": symbols, "median": medians, "n_cells": [3] * len(genes)}), path
    )
    return path


def test_read_published(tmp_path: Path) -> None:
    vocabulary = read_published(write_published(tmp_path / "tiny"))
    assert vocabulary.name == "tiny"
    assert vocabulary.gene_ids.tolist() == list(GENES)
    assert vocabulary.token_ids.tolist() == [4, 5, 6]
    assert vocabulary.medians.tolist() == list(GENES.values())
    assert vocabulary.symbols.tolist() == ["One", "C2orf2", None]
    assert (vocabulary.size, vocabulary.has_cls, vocabulary.context_length) == (7, True, 4096)
    other = read_published(write_published(tmp_path / "v1", special=V1))
    assert (other.size, other.has_cls, other.context_length) == (5, False, 2048)
    assert other.digest != vocabulary.digest


def test_load_returns_what_save_wrote(tmp_path: Path) -> None:
    vocabulary = read_published(write_published(tmp_path / "tiny"))
    vocabulary.save(tmp_path / "saved", {"step": "vocabulary"})
    again = Vocabulary.load(tmp_path / "saved")
    assert again.digest == vocabulary.digest
    for column in ("gene_ids", "token_ids", "medians", "symbols"):
        assert getattr(again, column).tolist() == getattr(vocabulary, column).tolist()
    assert again.aliases().equals(vocabulary.aliases())
    again.save(tmp_path / "twice", {"step": "vocabulary"})
    for name in ("tokens.parquet", "aliases.parquet", "vocabulary.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()


def test_load_refuses_what_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no vocabulary here"):
        Vocabulary.load(tmp_path)
    read_published(write_published(tmp_path / "tiny")).save(tmp_path / "saved")
    table = pq.read_table(tmp_path / "saved" / "tokens.parquet")
    changed = table.set_column(2, "median", pa.array([1.0, 2.0, 3.0]))
    pq.write_table(changed, tmp_path / "saved" / "tokens.parquet")
    with pytest.raises(UserError, match="digest"):
        Vocabulary.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gene_median_dictionary": {"ENSG00000000001": 1.0}}, "2 of 3 genes with a token have no median"),
        ({"ensembl_mapping_dict": {g: g for g in list(GENES)[:2]}}, "are not in the mapping"),
        ({"token_dictionary": {"<pad>": 0, "<mask>": 7}}, "neither V1 nor V2"),
        ({"token_dictionary": [1, 2]}, "holds a list"),
        ({"ensembl_mapping_dict": dict.fromkeys(GENES, 1)}, "is a int"),
        ({"gene_median_dictionary": dict.fromkeys(GENES, -1.0)}, "not above zero"),
    ],
)
def test_dictionaries_that_do_not_fit_are_refused(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_published(write_published(tmp_path / "bad", **changed))


def test_missing_and_doubled_dictionaries(tmp_path: Path) -> None:
    folder = write_published(tmp_path / "tiny")
    (folder / "token_dictionary_other.pkl").write_bytes(b"")
    with pytest.raises(UserError, match="several token_dictionary"):
        read_published(folder)
    for path in folder.glob("token_dictionary*"):
        path.unlink()
    with pytest.raises(UserError, match="has no token_dictionary"):
        read_published(folder)


class Runs:
    """Its pickle makes a folder when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def persistent(value: object) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return "outside" if item == "away" else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    path = tmp_path / "token_dictionary.pkl"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"a": Runs(target)}, protocol=protocol))
        with pytest.raises(UserError, match=r"forbidden .*(posix|nt)\.mkdir"):
            read_dictionary(path)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (persistent({"a": "away"}), "persistent object 'outside'"),
        (
            b"\x80\x02\x82\x01.",
            "forbidden in a pickle from outside: EXT1",
        ),  # an object of the extension registry
        (pickle.dumps({"a": 1})[:-3], "truncated"),
        (b"", "truncated"),
        (b"hello", "not a readable pickle"),
        (b"\x80\x05\x96" + (2**62).to_bytes(8, "little"), "damaged"),  # claims four exabytes
        (pickle.dumps({"a": [1]}), "its entry 'a' is a list"),
        (pickle.dumps({1: 1}), "entry '1'"),
        (pickle.dumps({"a": np.array([1.0])}), "forbidden"),
        (pickle.dumps({"a": np.str_("x")}), "forbidden"),
        (pickle.dumps({"a": True}), "is a bool"),
    ],
)
def test_other_pickles_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_dictionary(path)


def test_numpy_scalars_of_either_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "d.pkl"
    values = {"i": np.int16(-5), "u": np.uint8(200), "f": np.float64(0.1), "t": "text"}
    for protocol in (3, 4, 5):
        path.write_bytes(pickle.dumps(values, protocol=protocol))
        assert read_dictionary(path) == {"i": -5, "u": 200, "f": 0.1, "t": "text"}
    # protocol 3 has names as lines, so a module can be renamed, and a state that can be turned round
    numpy_1 = pickle.dumps({"a": np.int32(258)}, protocol=3).replace(b"numpy._core", b"numpy.core")
    path.write_bytes(numpy_1)
    assert read_dictionary(path) == {"a": 258}
    path.write_bytes(numpy_1.replace(b"X\x01\x00\x00\x00<", b"X\x01\x00\x00\x00>"))
    assert read_dictionary(path) == {"a": int.from_bytes((258).to_bytes(4, "little"), "big")}


def test_features_are_matched_as_the_reference_does(tmp_path: Path) -> None:
    vocabulary = read_published(write_published(tmp_path / "tiny"))
    ids = [
        "ENSG00000000001.7", "ensg00000000002", "ENSG00000000099", "one", "C2ORF2", "Nine", "ENSG00000000010",
        "ten", "nothing", "ENSG00000000001", "ERCC-00002", "ENSG00000000003.2_PAR_Y",
    ]  # fmt: skip
    features = map_features(ids, None, vocabulary)
    assert features.token_of_feature.tolist() == [4, 5, 4, 4, 5, -1, -1, -1, -1, 4, -1, 6]
    assert features.known.tolist() == [True] * 8 + [False, True, False, True]
    assert features.gene_of_feature[[2, 5, 7, 8]].tolist() == [
        "ENSG00000000001",
        "ENSG00000000009",
        "ENSG00000000010",
        None,
    ]
    assert features.token_of_feature.dtype == np.int32
    report = features.report(np.array([10, 1, 1, 1, 1, 5, 0, 0, 3, 1, 100, 2]))
    assert report["features"] == {
        "all": 12, "mapped": 7, "summed": 6, "outside": 3, "unknown": 1, "spike_ins": 1,
    }  # fmt: skip
    assert report["counts"] == {
        "all": 125, "mapped": 17, "summed": 15, "outside": 5, "unknown": 3, "spike_ins": 100,
    }  # fmt: skip
    assert report["genes"] == 3
    assert report["shares"] == {"mapped": 17 / 25, "known": 22 / 25}
    assert report["examples"]["unknown"] == ["nothing"]
    assert report["examples"]["summed"][0] == "ENSG00000000001.7"


def test_symbols_beside_ids_are_for_messages(tmp_path: Path) -> None:
    vocabulary = read_published(write_published(tmp_path / "tiny"))
    features = map_features(["x1", "ENSG00000000009"], ["One", ""], vocabulary)
    assert features.token_of_feature.tolist() == [-1, -1]
    examples = features.report(np.array([1, 1]))["examples"]
    assert examples["unknown"] == ["x1 (One)"]
    assert examples["outside"] == ["ENSG00000000009"]


def test_own_vocabulary(tmp_path: Path) -> None:
    path = write_medians(
        tmp_path / "medians.parquet",
        ["ENSG00000000003", "ENSG00000000001", "ENSG00000000002", "ENSG00000000004"],
        ["Same", "First", "SAME", None],
        [3.0, 1.0, 2.0, None],
    )
    vocabulary = from_medians(path, name="own", special="v1", context_length=100)
    assert vocabulary.gene_ids.tolist() == ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003"]
    assert vocabulary.token_ids.tolist() == [2, 3, 4]
    assert vocabulary.medians.tolist() == [1.0, 2.0, 3.0]
    assert vocabulary.context_length == 100
    features = map_features(["first", "same", "ENSG00000000003"], None, vocabulary)
    assert features.token_of_feature.tolist() == [2, -1, 4]  # "same" is ambiguous
    assert from_medians(path, name="own").token_ids.tolist() == [4, 5, 6]


def test_published_vocabularies(reference_data: Path, tmp_path: Path) -> None:
    """Golden values of the two published vocabularies; symbols of V1 come from its name table."""
    genes = {"NOTCH1": "ENSG00000148400", "GATA4": "ENSG00000136574", "GAPDH": "ENSG00000111640"}
    expected = {
        "gc30M": (25426, False, [(9045, 2.3229), (7261, 5.2215), (3906, 20.05)]),
        "gc104M": (20275, True, [(8964, 1.7932), (7196, 3.2114), (3880, 12.98)]),
    }
    for name, (size, has_cls, values) in expected.items():
        vocabulary = read_published(reference_data / "geneformer" / name)
        assert (vocabulary.name, vocabulary.size, vocabulary.has_cls) == (name, size, has_cls)
        for names in (list(genes), list(genes.values())):
            tokens = map_features(names, None, vocabulary).token_of_feature
            assert tokens.tolist() == [token for token, _ in values]
        rows = np.searchsorted(vocabulary.token_ids, [token for token, _ in values])
        np.testing.assert_allclose(vocabulary.medians[rows], [median for _, median in values], rtol=1e-3)
        assert np.isin(list(genes), vocabulary.symbols[rows]).all()
    # a known gene without a token in V2
    features = map_features(["MALAT1"], None, vocabulary)
    assert (features.token_of_feature[0], features.known[0]) == (-1, True)


@pytest.mark.parametrize(("tokens", "medians"), [("gc30M", "gc104M"), ("gc104M", "gc30M")])
def test_published_dictionaries_are_not_mixed(
    reference_data: Path, tmp_path: Path, tokens: str, medians: str
) -> None:
    folder = reference_data / "geneformer"
    for kind in ("token_dictionary", "ensembl_mapping_dict", "gene_name_id_dict"):
        (tmp_path / f"{kind}.pkl").symlink_to(folder / tokens / f"{kind}_{tokens}.pkl")
    (tmp_path / "gene_median_dictionary.pkl").symlink_to(
        folder / medians / f"gene_median_dictionary_{medians}.pkl"
    )
    with pytest.raises(UserError, match="don't belong together"):
        read_published(tmp_path)


def test_mapping_imports_no_pandas(tmp_path: Path) -> None:
    read_published(write_published(tmp_path / "tiny")).save(tmp_path / "saved")
    code = (
        "import sys; from cellformers.genes import *; v = Vocabulary.load(sys.argv[1]);"
        "f = map_features(['ENSG00000000001', 'x'], None, v); check_species(['GAPDH'], None, 'p');"
        "is_mitochondrial(['MT-CO1'], None); f.report(__import__('numpy').ones(2, int));"
        "print([m for m in ('pandas', 'numba', 'torch', 'anndata', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_mitochondrial_and_spike_ins() -> None:
    assert len(MITOCHONDRIAL) == len(set(MITOCHONDRIAL.values())) == 37
    assert is_mitochondrial(["ENSG00000198804.2", "mt-nd1", "MTOR", "ENSG00000000003"], None).tolist() == [
        True, True, False, False,
    ]  # fmt: skip
    assert is_mitochondrial(["a", "b", "c"], ["MT-CYB", None, "MTND1P23"]).tolist() == [True, False, False]
    assert is_spike_in(["ERCC-00002", "ERCC1", "ERCC6L2", "ercc-00171"]).tolist() == [
        True,
        False,
        False,
        True,
    ]


def test_mitochondrial_genes_are_those_of_the_annotation(reference_data: Path) -> None:
    lines = (reference_data / "labels" / "gene_info_table.csv").read_text().splitlines()
    rows = (line.split(",")[-3:-1] for line in lines[1:])
    assert {gene: symbol for gene, symbol in rows if symbol.startswith("MT-")} == MITOCHONDRIAL


MOUSE = ["Gapdh", "Actb", "mt-Nd1", "Cd3e", "Rpl3", "Gm12345", "0610007P14Rik", "H2-Aa", "Il2"]
HUMAN = ["GAPDH", "C1orf112", "HLA-A", "C20orf96", "MT-ND1", "CXorf40A", "CD3E", "ERCC-00002"]


@pytest.mark.parametrize(
    ("ids", "symbols", "message"),
    [
        (["ENSMUSG00000000001", "ENSMUSG00000000002", "ENSG00000000003"], None, "of mouse"),
        (["ENSDARG00000000001.3"], ["gapdh"], "of zebrafish"),
        (["ENSXYZG00000000001"], None, "another species, e.g. ENSXYZG"),
        (MOUSE, None, "title case, as of mouse or rat, e.g. Gapdh"),
        (["1", "2", "3"], ["Gapdh", "Actb", "Cd3e"], "title case"),
        (["gapdh", "actb1", "cd3e"], None, "lower case"),
        ([*MOUSE, *[f"ERCC-{i:05d}" for i in range(20)]], None, "title case"),
    ],
)
def test_other_species_are_refused(ids: list[str], symbols: list[str] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_species(ids, symbols, "file.h5ad")


@pytest.mark.parametrize(
    ("ids", "symbols"),
    [
        (HUMAN, None),
        ([*HUMAN, *MOUSE[:3]], None),
        (["ENSG00000000001", "ENSG00000000002.1"], ["Gapdh", "Actb"]),
        ([f"C{i}orf{i}" for i in range(1, 10)], None),
        (["1", "2"], [None, ""]),
        (["ENSG00000000001", "ENSMUSG00000000002", "ENSGR0000000003", "ENSG00000000004"], None),
    ],
)
def test_human_files_pass(ids: list[str], symbols: list[str | None] | None) -> None:
    check_species(ids, symbols, "file.h5ad")


def test_files_of_unknown_genes_are_refused(tmp_path: Path) -> None:
    vocabulary = read_published(write_published(tmp_path / "tiny"))
    features = map_features(["ENSG00000000009", "gene1", "gene2", "ERCC-00002"], None, vocabulary)
    check_mapping(
        features.report(np.array([5, 3, 2, 100])), "ok.h5ad"
    )  # half; known is enough, no token needed
    with pytest.raises(UserError, match=r"bad\.h5ad: only 44\.4%.*e\.g\. gene1, gene2; .*gene_column"):
        check_mapping(features.report(np.array([4, 3, 2, 100])), "bad.h5ad")
    check_mapping(features.report(np.zeros(4, int)), "empty.h5ad")
