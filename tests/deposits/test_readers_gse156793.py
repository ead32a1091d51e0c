"""GSE156793: a gzipped dense loom, and a table of cells with commas in a .txt."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from command_line import run
from deposit_files import (
    assert_refused,
    cell_ids,
    dense,
    features,
    ingest,
    make_counts,
    metadata,
    shards_of,
    write_gz,
)

from cellformers.io.files import read_metadata

N_CELLS, N_GENES = 150, 70
LOOM, CELLS = "GSE156793_S3_gene_count.loom", "GSE156793_S1_metadata_cells.txt.gz"
SAMPLES = [f"sample_{i}_TTAGCGTCAGC.{i:04d}" for i in range(N_CELLS)]
IDS = [f"ENSG{i:011d}" for i in range(1, N_GENES + 1)]


def write_loom(path: Path, counts: np.ndarray) -> Path:
    """Genes x cells in gzipped chunks of 64 x 64, `sample` for the cells, versions on the gene ids, no CellID."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = h5py.string_dtype()
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "matrix", data=counts.T.astype("i4"), chunks=(64, 64), compression="gzip", compression_opts=2
        )
        rows, columns = file.create_group("row_attrs"), file.create_group("col_attrs")
        rows.create_dataset("gene_id", data=[f"{g}.{i % 7 + 1}" for i, g in enumerate(IDS)], dtype=text)
        # short names repeat
        rows.create_dataset("gene_short_name", data=[f"GENE{i // 2}" for i in range(N_GENES)], dtype=text)
        rows.create_dataset("gene_type", data=["protein_coding"] * N_GENES, dtype=text)
        columns.create_dataset("sample", data=SAMPLES, dtype=text)
        columns.create_dataset("Organ", data=["from the loom"] * N_CELLS, dtype=text)
        columns.create_dataset("Development_day", data=np.full(N_CELLS, 90.0))
        for name in ("layers", "row_graphs", "col_graphs"):
            file.create_group(name)
    return path


def cells() -> pd.DataFrame:
    """S1 in another order than the loom, with a cell more; two cells without a type, one of them empty."""
    n = N_CELLS + 1
    types = np.array(["Cardiomyocytes", "Astrocytes, immature"] * n, object)[:n]
    types[3], types[5] = "NaN", ""
    return pd.DataFrame(
        {
            "sample": [*SAMPLES, "sample_more"], "All_reads": 10, "Exon_reads": 5,
            "Organ": ["Heart", "Cerebrum"] * (n // 2) + ["Eye"], "Main_cluster_name": types,
            "Organ_cell_lineage": [f"Heart-{t}" for t in types], "Assay": "sci-RNA-seq3",
            "Development_day": np.arange(n) % 5 + 72, "Fetus_id": [f"H{27430 + i % 4}" for i in range(n)],
            "Sex": ["F", "M"] * (n // 2) + ["F"], "Global_umap_1": 0.5,
        }
    ).sample(frac=1, random_state=1)  # fmt: skip


def write(folder: Path, counts: np.ndarray, table: pd.DataFrame, *, packed: bool = True) -> Path:
    loom = write_loom(folder / LOOM, counts)
    if packed:
        write_gz(folder / f"{LOOM}.gz", loom.read_bytes())
        loom.unlink()
    write_gz(folder / CELLS, table.to_csv(index=False))
    return folder


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    return make_counts(N_CELLS, n_genes=N_GENES) * (np.random.default_rng(1).random((N_CELLS, N_GENES)) < 0.2)


@pytest.mark.parametrize("packed", [True, False])
def test_counts_and_the_table_of_cells(tmp_path, counts, packed):
    folder = write(tmp_path / "in", counts, cells(), packed=packed)
    done = ingest(folder, tmp_path / "out", "gse156793", shards=3)
    assert done.code == 0, done.err
    assert cell_ids(tmp_path / "out") == SAMPLES
    assert features(tmp_path / "out") == IDS
    assert list(shards_of(tmp_path / "out")[0].var["symbol"][:3]) == ["GENE0", "GENE0", "GENE1"]
    assert np.array_equal(dense(tmp_path / "out"), counts)
    table = metadata(tmp_path / "out")
    assert table.column_names == [
        "cell_id", "donor", "batch", "organ", "cell_type", "organ_lineage", "development_day", "sex", "excluded",
    ]  # fmt: skip
    found = table.to_pydict()
    assert found["organ"] == ["Heart", "Cerebrum"] * (N_CELLS // 2)
    assert found["donor"][:5] == ["H27430", "H27431", "H27432", "H27433", "H27430"]
    assert found["development_day"][:6] == [72, 73, 74, 75, 76, 72]
    assert found["cell_type"][:4] == ["Cardiomyocytes", "Astrocytes, immature", "Cardiomyocytes", None]
    assert [i for i, reason in enumerate(found["excluded"]) if reason] == [3, 5]
    assert found["excluded"][3] == "no label"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_the_loom_by_hand_is_the_same_dataset(tmp_path, counts):
    folder = write(tmp_path / "in", counts, cells(), packed=False)
    assert ingest(folder, tmp_path / "deposit", "gse156793").code == 0
    assert (
        run(
            "ingest", folder / LOOM, "--gene-column", "gene_id", "--cell-column", "sample",
            "-o", tmp_path / "hand",
        ).code
        == 0
    )  # fmt: skip
    by_hand, deposited = (read_metadata(tmp_path / n / "metadata.parquet") for n in ("hand", "deposit"))
    assert by_hand["inputs"] == deposited["inputs"]
    assert np.array_equal(dense(tmp_path / "hand"), dense(tmp_path / "deposit"))


def test_what_differs_from_what_is_known_is_refused(tmp_path, counts):
    output = tmp_path / "out"

    def refused(table: pd.DataFrame, *words: str) -> None:
        folder = write(tmp_path / "in", counts, table)
        assert_refused(ingest(folder, output, "gse156793"), *words, output=output)

    refused(cells().query("sample != @SAMPLES[7]"), f"{CELLS}: lacks 1 of the 150 cells", SAMPLES[7])
    refused(cells().rename(columns={"Fetus_id": "Fetus"}), f"{CELLS}: has no column 'Fetus_id'", "'Fetus'")
    refused(pd.concat([cells(), cells()[:1]]), "in more than one row")
    folder = write(tmp_path / "in", counts, cells())
    path = folder / f"{LOOM}.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert_refused(ingest(folder, output, "gse156793"), f"{LOOM}.gz: is a damaged or cut-off", output=output)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    path.write_bytes(bytes(flipped))
    assert_refused(ingest(folder, output, "gse156793"), f"{LOOM}.gz", output=output)
    path.unlink()
    assert_refused(ingest(folder, output, "gse156793"), f"{LOOM}.gz: no such file", output=output)
