"""GSE129096: what is known of a cell is in its name; chimpanzee barcodes are excluded, not dropped."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deposit_files import (
    GENES,
    assert_refused,
    cell_ids,
    dense,
    dense_text,
    features,
    ingest,
    make_barcodes,
    make_counts,
    metadata,
    write_gz,
)

from cellformers.deposits.readers import gse129096
from cellformers.io.files import read_metadata

DROP = [*((d, "Rep1") for d in (0, 1, 3, 7)), *((d, "Rep2") for d in (0, 1, 3, 7, 15))]
DRONC = [*((d, "Rep1") for d in (0, 3, 7)), *((d, "Rep2") for d in (0, 1, 3, 7, 15))]
NAMES = {
    "drop": "GSE129096_DROP_combined_allcells.tsv.gz",
    "dronc": "GSE129096_DRONC_combined_allcells.tsv.gz",
    "heart": "GSE129096_HumanHeartDroNc.tsv.gz",
}
BARCODES = make_barcodes(6, length=12)


def names_of(libraries) -> list[str]:
    """Four cells a library; the first two barcodes are in all of them."""
    return [
        f"{barcode}_{day}_{line}"
        for i, (day, line) in enumerate(libraries)
        for barcode in [*BARCODES[:2], *make_barcodes(4, length=12, seed=10 + i)[2:]]
    ]


def write(folder: Path, part: str, names: list[str], *, header: str = "empty", genes=GENES) -> np.ndarray:
    counts = make_counts(len(names))
    write_gz(folder / NAMES[part], dense_text(counts, names, genes, header=header))
    return counts


def write_species(folder: Path, **scores: float) -> None:
    rows = [f"{name}\t10\t20\t{score}" for name, score in scores.items()]
    (folder / "species_assign_matrix.txt").write_text(
        "CB\thuman_score\tpanTro_score\thg_specificity_score\n" + "\n".join(rows) + "\n"
    )


@pytest.mark.parametrize("header", ["empty", "short", "GENE"])
def test_drop_seq_with_chimpanzee_cells(tmp_path, header):
    names = names_of(DROP)
    counts = write(tmp_path / "in", "drop", names, header=header)
    single = names[6].split("_")[0]
    write_species(
        tmp_path / "in", **{BARCODES[0]: 0.1, single: 0.4999, BARCODES[1]: 0.5, "TTTTTTTTTTTT": 0.2}
    )
    done = ingest(tmp_path / "in", tmp_path / "out", "gse129096", "drop", shards=2)
    assert done.code == 0, done.err
    assert cell_ids(tmp_path / "out") == names
    assert features(tmp_path / "out") == GENES
    assert np.array_equal(dense(tmp_path / "out"), counts)
    table = metadata(tmp_path / "out").to_pydict()
    assert table["day"] == [name.split("_")[1] for name in names]
    assert table["line"] == table["donor"] == [name.split("_")[2] for name in names]
    assert table["batch"][0] == "Rep1_0"
    assert set(table["platform"]) == {"drop"}
    chimpanzee = [name.split("_")[0] in (BARCODES[0], single) for name in names]
    assert table["excluded"] == ["chimpanzee" if c else None for c in chimpanzee]
    assert sum(chimpanzee) == 10
    assert table["hg_specificity_score"][:3] == [0.1, 0.5, None]
    assert "10 of 36 cells are chimpanzee's by their barcodes and excluded; 17 cells are not in" in done.err
    assert "1 chimpanzee barcodes occur on several days or lines" in done.err
    made = read_metadata(tmp_path / "out" / "metadata.parquet")
    assert made["parameters"] == {"deposit": "gse129096", "part": "drop", "genes_in_rows": True}


def test_dronc_seq_and_the_heart_need_no_table_of_species(tmp_path):
    names = names_of(DRONC)
    counts = write(tmp_path / "in", "dronc", names)
    done = ingest(tmp_path / "in", tmp_path / "dronc", "gse129096", "dronc")
    assert done.code == 0, done.err
    assert np.array_equal(dense(tmp_path / "dronc"), counts)
    table = metadata(tmp_path / "dronc").to_pydict()
    assert set(table["platform"]) == {"dronc"}
    assert "excluded" not in table
    assert sorted(set(table["day"])) == ["0", "1", "15", "3", "7"]

    ensembl = [f"ENSG{i:011d}.{i % 9 + 1}" for i in range(1, len(GENES) + 1)]
    nuclei = make_barcodes(8, length=12)
    counts = write(tmp_path / "in", "heart", nuclei, genes=ensembl)
    assert ingest(tmp_path / "in", tmp_path / "heart", "gse129096", "heart").code == 0
    assert features(tmp_path / "heart") == [name.split(".")[0] for name in ensembl]
    assert np.array_equal(dense(tmp_path / "heart"), counts)
    assert metadata(tmp_path / "heart").to_pydict() == {"cell_id": nuclei, "platform": ["dronc"] * 8}


def test_what_differs_from_what_is_known_is_refused(tmp_path):
    output, folder = tmp_path / "out", tmp_path / "in"
    names = names_of(DROP)

    def refused(*words: str, part: str = "drop") -> None:
        assert_refused(ingest(folder, output, "gse129096", part), *words, output=output)

    write(folder, "drop", names)
    refused("species_assign_matrix.txt: no such file", "cellformers download")
    write_species(folder, AAAA=0.1)
    refused("species_assign_matrix.txt: knows none of the barcodes")
    (folder / "species_assign_matrix.txt").write_text(f"CB\tspecificity\n{BARCODES[0]}\t0.1\n")
    refused("species_assign_matrix.txt: has no column 'hg_specificity_score'")
    (folder / "species_assign_matrix.txt").write_text(f"CB\thg_specificity_score\n{BARCODES[0]}\tlow\n")
    refused("hg_specificity_score that is no number")
    write_species(folder, **{BARCODES[0]: 0.1})
    write(folder, "drop", [name for name in names if not name.endswith("_3_Rep2")])
    refused(NAMES["drop"], "lacks cells of Rep2 day 3")
    write(folder, "drop", [*names, "ACGTACGTACGT_15_Rep1"])
    refused("has cells of the unknown Rep1 day 15")
    write(folder, "drop", [*names[:-1], "X" + names[-1].replace("_", ".")])
    refused("where <barcode>_<day>_<Rep> is expected")
    write(folder, "drop", [*names, names[0]])
    refused(f"cell name {names[0]!r} occurs more than once")
    assert "make_unique" not in ingest(folder, output, "gse129096", "drop").err
    refused(NAMES["dronc"] + ": no such file", part="dronc")
    write(folder, "drop", names)
    (folder / "species_assign_matrix.txt").write_text("CB\thg_specificity_score\n\t0.1\n\t0.2\n")
    refused("species_assign_matrix.txt: has more than one row without a name")
    (folder / NAMES["drop"]).rename(folder / NAMES["heart"])
    refused(NAMES["heart"], "as the files of the two lines do", part="heart")
    refused("has no part 'dropseq'", "'drop'", part="dropseq")


def test_a_table_that_is_cut_off_is_refused(tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    write(folder, "dronc", names_of(DRONC))
    path = folder / NAMES["dronc"]
    path.write_bytes(path.read_bytes()[:-20])
    assert_refused(ingest(folder, output, "gse129096", "dronc"), NAMES["dronc"], output=output)


def test_the_real_table_of_species(reference_data):
    path = reference_data / "labels" / "GSE129096_species_assign_matrix.txt"
    if not path.is_file():
        pytest.skip("no table of species of GSE129096")
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    barcodes = pa.array([line[0] for line in lines] + ["ACGTACGTACGT"])
    columns, notes = gse129096._species(barcodes, path)
    excluded = columns["excluded"].to_pylist()
    assert excluded.count("chimpanzee") == 3885
    assert [e is not None for e in excluded[:-1]] == [float(line[3]) < 0.5 for line in lines]
    assert excluded[-1] is None
    assert notes[0].startswith("3,885 of 5,000 cells are chimpanzee's")
