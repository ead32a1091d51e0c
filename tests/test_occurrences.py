"""A row for every gene of every cell: which rows, in which order, with which numbers, and how much disk."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from token_files import make_cells, make_model, make_vocabulary, write_tokens

from cellformers import occurrences as module
from cellformers.errors import UserError
from cellformers.io.files import read_metadata
from cellformers.models import checkpoints
from cellformers.models.directory import open_model
from cellformers.occurrences import find_genes, read_genes, write_occurrences
from cellformers.selection import choose_cells

LENGTHS = (40, 0, 7, 60, 1, 13)


@pytest.fixture(autouse=True)
def one_thread():
    """Operations take one thread, as where cells are embedded side by side: with more they round differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["v1", "v2"])
def setup(request, tmp_path):
    vocabulary = make_vocabulary(special=request.param)
    cells = make_cells(vocabulary, LENGTHS)
    model = make_model(tmp_path / "model", vocabulary)
    return vocabulary, cells, model, write_tokens(tmp_path / "tokens.parquet", cells, vocabulary)


def expected(model, vocabulary, cells, *, layer, keep):
    """cell_id, gene_id, position and vector of the tokens that `keep` says yes to."""
    network = checkpoints.load(model)
    name = dict(zip(vocabulary.token_ids.tolist(), vocabulary.gene_ids, strict=True))
    name |= {token: text for text, token in vocabulary.special_tokens.items()}
    for i, cell in enumerate(cells):
        with torch.inference_mode():
            hidden = network(
                torch.from_numpy(cell.astype(np.int64)), torch.tensor([0, len(cell)]), layer=layer
            )
        for position, token in enumerate(cell.tolist()):
            if keep(name[token]):
                yield f"cell{i}", name[token], position, hidden[position].numpy()


def check(path, wanted):
    table = pq.read_table(path)
    wanted = list(wanted)
    assert len(table) == len(wanted)
    assert list(zip(*(table[c].to_pylist() for c in ("cell_id", "gene_id", "position")), strict=True)) == [
        row[:3] for row in wanted
    ]
    found = np.array(table["embedding"].to_pylist(), np.float32).reshape(len(wanted), -1)
    assert np.array_equal(found, np.array([row[3] for row in wanted]).reshape(found.shape))


@pytest.mark.parametrize("layer", [0, -1])
def test_every_gene_of_every_cell_has_a_row(setup, tmp_path, layer):
    vocabulary, cells, model, tokens = setup
    n = write_occurrences(tokens, model, tmp_path / "o.parquet", layer=layer)
    assert n == sum(LENGTHS)
    check(
        tmp_path / "o.parquet",
        expected(model, vocabulary, cells, layer=layer, keep=lambda name: name.startswith("ENSG")),
    )
    schema = pq.read_schema(tmp_path / "o.parquet")
    vector = schema.field("embedding").type
    assert (vector.list_size, vector.value_type, schema.field("position").type) == (
        32, pa.float32(), pa.int32(),
    )  # fmt: skip


def test_special_tokens_are_rows_under_their_names(setup, tmp_path):
    vocabulary, cells, model, tokens = setup
    n = write_occurrences(tokens, model, tmp_path / "o.parquet", special=True)
    assert n == sum(map(len, cells))
    check(tmp_path / "o.parquet", expected(model, vocabulary, cells, layer=-1, keep=lambda _: True))


@pytest.mark.parametrize("special", [False, True])
def test_some_genes_only(setup, tmp_path, special):
    vocabulary, cells, model, tokens = setup
    genes = vocabulary.gene_ids[[3, 50]].tolist()
    write_occurrences(tokens, model, tmp_path / "o.parquet", genes=genes, special=special)
    wanted = {*genes, *(vocabulary.special_tokens if special else ())}
    check(tmp_path / "o.parquet", expected(model, vocabulary, cells, layer=-1, keep=wanted.__contains__))


def test_chosen_cells_only(setup, tmp_path):
    vocabulary, cells, model, tokens = setup
    choice = choose_cells(tokens, max_cells=2, seed=4)
    names = {f"cell{i}" for i in np.flatnonzero(choice.keep)}
    write_occurrences(tokens, model, tmp_path / "o.parquet", choice=choice, special=True)
    rows = expected(model, vocabulary, cells, layer=-1, keep=lambda _: True)
    check(tmp_path / "o.parquet", [row for row in rows if row[0] in names])


def test_row_groups_depend_neither_on_threads_nor_on_cells_at_a_time(setup, tmp_path, monkeypatch):
    *_, model, tokens = setup
    monkeypatch.setattr(module, "GROUP_BYTES", 50 * 32 * 4)
    write_occurrences(tokens, model, tmp_path / "a.parquet", threads=1)
    monkeypatch.setattr(module, "CELLS", {"cpu": 2})
    done = []
    write_occurrences(tokens, model, tmp_path / "b.parquet", threads=2, progress=done.append)
    assert sum(done) == len(LENGTHS)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    groups = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [50, 50, 21]


def test_metadata_tell_occurrences_genes_and_special_tokens(setup, tmp_path):
    vocabulary, _, model, tokens = setup
    write_occurrences(tokens, model, tmp_path / "o.parquet", genes=["ENSG00000000001"], dtype="fp32")
    metadata = read_metadata(tmp_path / "o.parquet")
    assert metadata["parameters"] == {
        "mode": "gene", "layer": -1, "dtype": "float32", "occurrences": True, "special": False,
    }  # fmt: skip
    assert metadata["inputs"]["genes"].startswith("sha256:")
    assert metadata["inputs"]["vocabulary"] == vocabulary.digest


def test_the_size_is_said_first(setup, tmp_path):
    *_, model, tokens = setup
    notes = []
    write_occurrences(tokens, model, tmp_path / "o.parquet", note=notes.append)
    assert notes == [f"{tmp_path / 'o.parquet'}: 121 occurrences of 32 numbers, 0.0 GB before compression"]


@pytest.mark.parametrize(("dtype", "share"), [("float32", 0.8), ("bf16", 0.3)])
def test_what_the_disk_cannot_hold_is_refused_before_it_is_computed(
    setup, tmp_path, monkeypatch, dtype, share
):
    *_, model, tokens = setup
    size = 121 * 32 * 4
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(size * share) - 1))
    with pytest.raises(UserError, match=r"121 occurrences take about .* GB, .* are free; name the --genes"):
        write_occurrences(tokens, model, tmp_path / "new" / "o.parquet", dtype=dtype)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(size * share) + 1))
    assert write_occurrences(tokens, model, tmp_path / "new" / "o.parquet", dtype=dtype) == 121


def test_numbers_that_are_not_finite_are_refused_with_the_cell(setup, tmp_path):
    vocabulary, _, model, _ = setup
    ends = ([2], [3]) if vocabulary.has_cls else ([], [])
    cells = [np.array([*ends[0], gene, *ends[1]], np.int32) for gene in (5, 6, 7)]
    tokens = write_tokens(tmp_path / "t.parquet", cells, vocabulary)
    opened = open_model(model)
    opened.network.words.weight[6] = float("inf")
    with pytest.raises(UserError, match="'cell1' is not finite"):
        write_occurrences(tokens, opened, tmp_path / "o.parquet")
    assert not (tmp_path / "o.parquet").exists()


# --- names of genes ------------------------------------------------------------------------------------------


@pytest.fixture
def named():
    """A vocabulary with symbols among its aliases, one of them of a gene without a token."""
    vocabulary = make_vocabulary()
    ids = vocabulary.gene_ids.tolist()
    table = pa.table(
        {
            "alias": [*ids, "TTN", "MYH7", "XIST", "ENSG99"],
            "gene_id": [*ids, ids[4], ids[2], "ENSG99", "ENSG99"],
        }
    )
    return replace(vocabulary, alias_source=table)


def test_genes_are_found_by_id_and_alias_whatever_the_case(named):
    ids = named.gene_ids.tolist()
    found = find_genes(["TTN", ids[3].lower(), ids[4], ids[1] + ".7", "myh7"], named)
    assert found == [ids[4], ids[3], ids[1], ids[2]]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ENSG99"], "'ENSG99' has no token"),
        (["XIST"], "'XIST' has no token"),
        (["myh6"], "'myh6' has no token in the vocabulary 'hand-v1'; did you mean 'MYH7'"),
        ([], "no genes are named"),
    ],
)
def test_genes_without_a_token_are_named(named, names, words):
    with pytest.raises(UserError, match=words):
        find_genes(names, named)


def test_genes_come_from_a_file_or_a_list(tmp_path):
    path = tmp_path / "genes.txt"
    path.write_text("# markers\nENSG1\n\n  ENSG2  \n")
    assert read_genes(str(path)) == ["ENSG1", "ENSG2"]
    assert read_genes("ENSG1, ENSG2,") == ["ENSG1", "ENSG2"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not readable as text"):
        read_genes(str(path))
