"""Token files: equal to the reference, the same bytes whatever the blocks and threads, whole or absent."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse
from token_files import make_vocabulary, write_tokens

import cellformers.tokens as module
from cellformers.counts import dataset_digest
from cellformers.errors import UserError
from cellformers.genes import Vocabulary, read_published
from cellformers.io.files import read_metadata
from cellformers.io.source import Block, open_counts
from cellformers.tokens import check_vocabulary, read_tokens, token_lengths, tokenize
from cellformers.vocabulary import from_medians

Array = np.ndarray[Any, Any]
N_GENES = 50


class MemorySource:
    """What `tokenize` uses of a CountSource, over a dense matrix, in blocks of some rows."""

    def __init__(
        self, counts: Array, *, rows: int = 7, filter_pass: Array | None = None, fail_at: int = -1
    ) -> None:
        self.counts, self.rows, self.filter_pass, self.fail_at = counts, rows, filter_pass, fail_at
        self.path = Path("memory")
        self.n_cells, self.n_features = counts.shape
        self.cell_ids = np.array([f"cell{i}" for i in range(self.n_cells)], dtype=object)
        self.names = pa.array(self.cell_ids.tolist(), pa.string())
        self.feature_ids = np.array([f"ENSG{i:011d}" for i in range(self.n_features)], dtype=object)
        self.feature_symbols = None

    def blocks(self, *, max_bytes: int = 0) -> Iterator[Block]:
        """All rows, as many at a time as was said."""
        for start in range(0, self.n_cells, self.rows):
            if start >= self.fail_at >= 0:
                raise UserError("damaged", path=self.path)
            part = self.counts[start : start + self.rows]
            row, column = np.nonzero(part)
            indptr = np.searchsorted(row, np.arange(len(part) + 1)).astype(np.int64)
            yield Block(start, indptr, column.astype(np.int32), part[row, column].astype(np.uint16))


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    path = tmp_path_factory.mktemp("own") / "medians.parquet"
    genes = [f"ENSG{i:011d}" for i in range(2, N_GENES)]  # two features have no token
    medians = np.random.default_rng(5).lognormal(0, 1, len(genes))
    pq.write_table(pa.table({"gene_id": genes, "symbol": [f"S{g}" for g in genes], "median": medians}), path)
    return from_medians(path, name="own", special="v2", context_length=32)


def write_medians(path: Path, vocabulary: Vocabulary, *, factor: float = 1.0) -> Path:
    """The medians.parquet that a vocabulary comes from."""
    columns = {"gene_id": vocabulary.gene_ids.tolist(), "symbol": vocabulary.symbols.tolist()}
    pq.write_table(pa.table(columns | {"median": vocabulary.medians * factor}), path)
    return path


@pytest.fixture(scope="module")
def counts() -> Array:
    rng = np.random.default_rng(3)
    values = rng.poisson(rng.lognormal(-0.5, 1, N_GENES), (300, N_GENES))
    values[[0, 17, 299]] = 0
    values[5, 2:] = 0  # only features without a token
    values[6, 8:] = 0
    return values


Write = Callable[..., dict[str, Any]]


@pytest.fixture
def write(tmp_path: Path, vocabulary: Vocabulary) -> Write:
    def write(source: Any, name: str = "tokens.parquet", **options: Any) -> dict[str, Any]:
        return tokenize(source, vocabulary, output=tmp_path / name, **options)

    return write


# --- equal to the reference --------------------------------------------------------------------------------

GOLDEN = {
    "blood_sorted": "blood_sorted.h5ad",
    "pbmc_5k": "pbmc_5k_protein_v3.h5ad",
    "sc_dropseq": "lung_lines/sc_dropseq.count.csv.gz",
}


def assert_golden(reference_data: Path, counts: Path, case: str, output: Path) -> None:
    """Every cell's tokens are the reference tokenizer's, to the letter."""
    folder = reference_data / "geneformer" / {"V1": "gc30M", "V2": "gc104M"}[case.split(".")[1]]
    with open_counts(counts) as source:
        tokenize(source, read_published(folder), output=output)
    golden = pq.read_table(reference_data / "golden" / f"{case}.parquet")
    ours = pq.read_table(output)
    assert ours["cell_id"].to_pylist() == golden["cell_id"].to_pylist()
    assert ours["length"].to_pylist() == golden["length"].to_pylist()
    rows = zip(
        *(t[c].to_pylist() for t, c in ((golden, "cell_id"), (golden, "input_ids"), (ours, "input_ids"))),
        strict=True,
    )
    assert [cell for cell, expected, found in rows if expected != found] == []


@pytest.mark.parametrize(
    "case", ["blood_sorted.V1", "blood_sorted.V2", "pbmc_5k.V2", "sc_dropseq.V1", "sc_dropseq.V2"]
)
def test_golden(reference_data: Path, tmp_path: Path, case: str) -> None:
    counts = reference_data / "counts" / GOLDEN[case.split(".")[0]]
    assert_golden(reference_data, counts, case, tmp_path / "tokens.parquet")


@pytest.fixture(scope="module")
def other_formats(reference_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The counts of pbmc_5k and blood_sorted as loom, of pbmc_5k as dense text with cells in rows."""
    anndata, loompy = pytest.importorskip("anndata"), pytest.importorskip("loompy")
    folder = tmp_path_factory.mktemp("formats")
    paths = {}
    for name, gene in (("pbmc_5k", "Gene"), ("blood_sorted", "Accession")):
        adata = anndata.read_h5ad(reference_data / "counts" / GOLDEN[name])
        paths[f"{name}.loom"] = folder / f"{name}.loom"
        rows, columns = {gene: adata.var_names.to_numpy()}, {"CellID": adata.obs_names.to_numpy()}
        loompy.create(str(paths[f"{name}.loom"]), sparse.csc_matrix(adata.X.T), rows, columns)
        if name == "pbmc_5k":
            paths[f"{name}.csv"] = folder / f"{name}.csv.gz"
            adata.to_df().astype(int).to_csv(paths[f"{name}.csv"])
    return paths


@pytest.mark.parametrize(
    ("made", "case"),
    [
        ("pbmc_5k.loom", "pbmc_5k.V2"),
        ("pbmc_5k.csv", "pbmc_5k.V2"),
        ("blood_sorted.loom", "blood_sorted.V1"),
        ("blood_sorted.loom", "blood_sorted.V2"),
    ],
)
def test_golden_from_other_formats(
    reference_data: Path, other_formats: dict[str, Path], tmp_path: Path, made: str, case: str
) -> None:
    assert_golden(reference_data, other_formats[made], case, tmp_path / "tokens.parquet")


# --- what is written ---------------------------------------------------------------------------------------


def test_cells_without_genes_stay_in_a_raw_file(write: Write, counts: Array, tmp_path: Path) -> None:
    report = write(MemorySource(counts))
    table = pq.read_table(tmp_path / "tokens.parquet")
    assert table.schema.types == [
        pa.string(),
        pa.list_(pa.field("element", pa.int32(), nullable=False)),
        pa.int32(),
    ]
    assert table["cell_id"].to_pylist() == [f"cell{i}" for i in range(300)]
    tokens = table["input_ids"].to_pylist()
    assert [tokens[i] for i in (0, 5, 17, 299)] == [[2, 3]] * 4
    assert table["length"].to_pylist() == [len(cell) for cell in tokens]
    truncated = int(((counts[:, 2:] > 0).sum(1) > 30).sum())
    assert truncated > 0
    assert max(map(len, tokens)) == 32
    assert report["cells"] == {
        "all": 300, "kept": 300, "filtered": 0, "few_genes": 0, "empty": 4, "truncated": truncated,
    }  # fmt: skip
    assert report["tokens"] == sum(map(len, tokens))
    assert report["genes"]["counts"]["mapped"] == counts[:, 2:].sum()
    assert report["genes"]["features"]["unknown"] == 2


def test_metadata_names_inputs_and_nothing_else(
    write: Write, counts: Array, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    report = write(MemorySource(counts))
    made = read_metadata(tmp_path / "tokens.parquet")
    assert made["inputs"] == {"dataset": report["dataset"], "vocabulary": vocabulary.digest}
    assert made["step"] == "tokenize"
    assert set(made) == {"cellformers", "step", "revision", "parameters", "inputs"}
    assert write(MemorySource(counts), "shard.parquet", dataset="sha256:given")["dataset"] == "sha256:given"
    assert read_metadata(tmp_path / "shard.parquet")["inputs"]["dataset"] == "sha256:given"
    source = MemorySource(counts)
    totals = {"cell_totals": counts.sum(1), "feature_totals": counts.sum(0)}
    assert report["dataset"] == dataset_digest(
        source.names, source.feature_ids, **totals
    )  # as `ingest` has it
    changed = counts.copy()
    changed[1, 1] += 1
    assert write(MemorySource(changed), "changed.parquet")["dataset"] != report["dataset"]


def test_same_bytes_for_any_blocks_and_threads(
    write: Write, counts: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CELLS_PER_GROUP", 64)
    seen = set()
    for rows, threads in ((1, 1), (7, 2), (64, 1), (64, 3), (100, 2), (1000, 4)):
        write(MemorySource(counts, rows=rows), threads=threads)
        seen.add((tmp_path / "tokens.parquet").read_bytes())
    assert len(seen) == 1
    assert pq.ParquetFile(tmp_path / "tokens.parquet").num_row_groups == 5


def test_shards_add_up(write: Write, counts: Array, tmp_path: Path) -> None:
    write(MemorySource(counts))
    whole = pq.read_table(tmp_path / "tokens.parquet")
    for pieces in (2, 7):
        tables = []
        for i, part in enumerate(np.array_split(np.arange(300), pieces)):
            source = MemorySource(counts[part])
            source.names = pa.array([f"cell{j}" for j in part], pa.string())
            write(source, f"{i}.parquet", dataset="sha256:x")
            tables.append(pq.read_table(tmp_path / f"{i}.parquet"))
        assert pa.concat_tables(tables).replace_schema_metadata().equals(whole.replace_schema_metadata())


def test_cells_are_chosen(write: Write, counts: Array, tmp_path: Path) -> None:
    passing = np.arange(300) % 3 > 0
    report = write(MemorySource(counts, filter_pass=passing))
    assert report["cells"]["filtered"] == 100
    expected = [f"cell{i}" for i in np.flatnonzero(passing)]
    assert pq.read_table(tmp_path / "tokens.parquet")["cell_id"].to_pylist() == expected

    chosen = ["cell5", "cell6", "cell8", "cell9", "of another shard"]
    report = write(MemorySource(counts, filter_pass=passing), cells=chosen, min_genes=7)
    assert pq.read_table(tmp_path / "tokens.parquet")["cell_id"].to_pylist() == ["cell8"]
    assert report["cells"] | {"truncated": 0} == {
        "all": 300, "kept": 1, "filtered": 298, "few_genes": 1, "empty": 0, "truncated": 0,
    }  # fmt: skip
    mask = np.zeros(300, bool)
    mask[8] = True
    first = (tmp_path / "tokens.parquet").read_bytes()
    write(MemorySource(counts), cells=mask, min_genes=7)
    assert (tmp_path / "tokens.parquet").read_bytes() == first

    write(MemorySource(counts), cells=["elsewhere"], dataset="sha256:x")  # a shard none of whose cells pass
    table = pq.read_table(tmp_path / "tokens.parquet")
    assert (table.num_rows, table.schema.names) == (0, ["cell_id", "input_ids", "length"])
    with pytest.raises(UserError, match=r"none of the 1 cells asked for, e\.g\. 'elsewhere'; .*'cell0'"):
        write(MemorySource(counts), cells=["elsewhere"])
    with pytest.raises(ValueError, match="3 flags for 300 cells"):
        write(MemorySource(counts), cells=np.ones(3, bool))


def test_progress_adds_up(write: Write, counts: Array) -> None:
    done: list[int] = []
    write(MemorySource(counts), advance=done.append)
    assert sum(done) == 300


# --- whole or absent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_a_failure_leaves_nothing(write: Write, counts: Array, tmp_path: Path, threads: int) -> None:
    with pytest.raises(UserError, match="damaged"):
        write(MemorySource(counts, fail_at=140), threads=threads)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_writer_stops_the_rest(
    write: Write, counts: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Writer, "flush", full)
    monkeypatch.setattr(module, "CELLS_PER_GROUP", 64)
    with pytest.raises(UserError, match=r"tokens.parquet: can't be written \(No space left"):
        write(MemorySource(counts))
    assert list(tmp_path.iterdir()) == []


def test_unknown_genes_and_other_species_leave_nothing(write: Write, counts: Array, tmp_path: Path) -> None:
    source = MemorySource(counts)
    source.feature_ids = np.array([f"GENE{i}" for i in range(N_GENES)], dtype=object)
    with pytest.raises(UserError, match=r"memory: only 0\.0%.*GENE"):
        write(source)
    source.feature_ids = np.array([f"ENSMUSG{i:011d}" for i in range(N_GENES)], dtype=object)
    with pytest.raises(UserError, match="not human"):
        write(source)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_output(write: Write, counts: Array, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write"):
        write(MemorySource(counts), "file/tokens.parquet")


# --- reading -----------------------------------------------------------------------------------------------


def test_read_tokens(write: Write, counts: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CELLS_PER_GROUP", 64)
    write(MemorySource(counts))
    write(MemorySource(counts[:20]), "more.parquet")
    paths = [tmp_path / "tokens.parquet", tmp_path / "more.parquet"]
    expected = [
        row for path in paths for row in pq.read_table(path).select(["cell_id", "input_ids"]).to_pylist()
    ]
    for cells in (1, 50, 1000):
        got = []
        for batch in read_tokens(paths, cells=cells):
            assert len(batch.cell_ids) <= cells
            assert (batch.tokens.dtype, batch.offsets.dtype) == (np.int32, np.int64)
            assert (batch.offsets[0], batch.offsets[-1]) == (0, len(batch.tokens))
            for cell, lo, hi in zip(batch.cell_ids, batch.offsets[:-1], batch.offsets[1:], strict=True):
                got.append({"cell_id": cell, "input_ids": batch.tokens[lo:hi].tolist()})
        assert got == expected
    lengths = token_lengths(paths)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(row["input_ids"]) for row in expected]


def test_lists_without_special_tokens_may_be_empty(
    counts: Array, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    v1 = from_medians(write_medians(tmp_path / "medians.parquet", vocabulary), name="v1", special="v1")
    tokenize(MemorySource(counts[:6]), v1, output=tmp_path / "tokens.parquet")  # type: ignore[arg-type]
    assert token_lengths(tmp_path / "tokens.parquet")[[0, 5]].tolist() == [0, 0]
    (batch,) = read_tokens(tmp_path / "tokens.parquet")
    assert batch.offsets[:2].tolist() == [0, 0]


def test_wrong_vocabulary(write: Write, counts: Array, tmp_path: Path, vocabulary: Vocabulary) -> None:
    write(MemorySource(counts))
    check_vocabulary(tmp_path / "tokens.parquet", vocabulary)
    doubled = write_medians(tmp_path / "medians.parquet", vocabulary, factor=2)
    other = from_medians(doubled, name="other", context_length=32)
    with pytest.raises(UserError, match="wrong vocabulary for this model: the model has 'other'"):
        check_vocabulary(tmp_path / "tokens.parquet", other)
    tokenize(MemorySource(counts), other, output=tmp_path / "other.parquet")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="another vocabulary than the file before"):
        list(read_tokens([tmp_path / "tokens.parquet", tmp_path / "other.parquet"]))
    pq.write_table(pa.table({"cell_id": ["a"], "input_ids": [[1]]}), tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="names none"):
        check_vocabulary(tmp_path / "foreign.parquet", vocabulary)


def test_what_is_no_tokens_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="not a tokens file"):
        list(read_tokens(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="no such file"):
        token_lengths(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not a readable Parquet"):
        list(read_tokens(tmp_path / "c.parquet"))


def test_imports_are_light(write: Write, counts: Array, tmp_path: Path) -> None:
    """Reading tokens needs neither numba nor pandas; the imports of a command are what its user waits for."""
    write(MemorySource(counts))
    code = (
        "import sys; from cellformers.tokens import read_tokens, token_lengths;"
        "list(read_tokens(sys.argv[1])); token_lengths(sys.argv[1]);"
        "print([m for m in ('pandas', 'numba', 'torch', 'anndata', 'scipy', 'h5py') if m in sys.modules])"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "tokens.parquet")]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip() == "[]"


GROWTH = """
import re, sys
from cellformers.tokens import read_tokens
def most():  # of this program alone: what getrusage tells begins with the most of its parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
batches = read_tokens(sys.argv[1], cells=40)
seen = len(next(batches).cell_ids)
after_one = most()
seen += sum(len(batch.cell_ids) for batch in batches)
print(seen, (most() - after_one) // 1024)
"""


def test_reading_keeps_one_stretch_in_memory(tmp_path: Path) -> None:
    vocabulary = make_vocabulary(2000)
    path = tmp_path / "many.parquet"
    cells = [np.random.default_rng(i).permutation(vocabulary.token_ids).astype(np.int32) for i in range(40)]
    one = pq.read_table(write_tokens(tmp_path / "one.parquet", cells, vocabulary))
    with pq.ParquetWriter(path, one.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(500):
            writer.write_table(one)
    command = [sys.executable, "-c", GROWTH, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    n_cells, megabytes = map(int, done.stdout.split())
    assert n_cells == 20_000
    assert megabytes < path.stat().st_size / 2**20 / 4
