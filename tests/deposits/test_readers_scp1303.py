"""SCP1303: the h5ad's uncorrected layer, or the text form with the portal's line of types."""

import gzip
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from command_line import run
from deposit_files import (
    assert_refused,
    cell_ids,
    dense,
    features,
    ingest,
    make_barcodes,
    make_counts,
    metadata,
    shards_of,
)

from cellformers.io.files import read_metadata

N_CELLS, N_GENES = 40, 30
NUCLEI = [f"{b}-1-{i // 10}" for i, b in enumerate(make_barcodes(N_CELLS))]
IDS = [f"ENSG{i:011d}" for i in range(1, N_GENES + 1)]
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
H5AD = "human_dcm_hcm_scportal_03.17.2022.h5ad"
MATRIX = "DCM_HCM_Expression_Matrix"
COUNTS = make_counts(N_CELLS, n_genes=N_GENES) + 1
TYPES = np.array(["Cardiomyocyte_I", "Fibroblast_II"] * (N_CELLS // 2), object)


def observations() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "biosample_id": [f"LV_{1290 + i // 5}_1" for i in range(N_CELLS)],
            "donor_id": [f"P{1290 + i // 10}" for i in range(N_CELLS)],
            "disease": pd.Categorical(np.repeat(["NF", "HCM", "DCM", "NF"], 10)),
            "sex": "female", "age": np.repeat([50, 60, 70, 80], 10), "lvef": 55.5,
            "cell_type_leiden0.6": pd.Categorical([*TYPES[:-1], None]),
            "cellbender_ncount": (COUNTS - 1).sum(1),
        },
        index=pd.Index(NUCLEI),
    )  # fmt: skip


def write_h5ad(folder: Path, obs: pd.DataFrame, *, layer: str = "cellranger_raw") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    var = pd.DataFrame({"gene_ids": IDS, "feature_types": "Gene Expression"}, index=pd.Index(SYMBOLS))
    counts = sp.csr_matrix(COUNTS.astype(np.float32))
    corrected = sp.csr_matrix((COUNTS - 1).astype(np.float32))
    anndata.AnnData(corrected, obs=obs, var=var, layers={layer: counts}).write_h5ad(folder / H5AD)
    return folder


def write_text(folder: Path, table: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scipy.io.mmwrite(folder / f"{MATRIX}_raw_counts_V1.mtx", sp.coo_matrix(COUNTS.T), field="integer")
    rows = [f"{g}\t{s}" for g, s in zip(IDS, SYMBOLS, strict=True)]
    (folder / f"{MATRIX}_genes_V1.tsv").write_text("\n".join(rows) + "\n")
    (folder / f"{MATRIX}_barcodes_V1.tsv").write_text("\n".join(NUCLEI) + "\n")
    (folder / "DCM_HCM_MetaData_V1.txt").write_text(table or portal_table())
    return folder


def portal_table(*, types: bool = True) -> str:
    ontology = {"NF": "normal", "HCM": "hypertrophic cardiomyopathy", "DCM": "dilated cardiomyopathy"}
    lines = ["NAME\tbiosample_id\tdonor_id\tdisease\tdisease__ontology_label\tage\tcell_type__ontology_label"]
    if types:
        lines.append("TYPE\tgroup\tgroup\tgroup\tgroup\tnumeric\tgroup")
    for name, row in observations().iloc[::-1].iterrows():
        lines.append(
            f"{name}\t{row['biosample_id']}\t{row['donor_id']}\tMONDO_1\t{ontology[row['disease']]}\t"
            f"{row['age']}\tcardiac muscle cell"
        )
    return "\n".join(lines) + "\n"


def test_the_h5ad_gives_its_uncorrected_counts(tmp_path):
    folder = write_h5ad(tmp_path / "in", observations())
    done = ingest(folder, tmp_path / "out", "scp1303", shards=2)
    assert done.code == 0, done.err
    assert np.array_equal(dense(tmp_path / "out"), COUNTS)
    assert features(tmp_path / "out") == IDS
    assert list(shards_of(tmp_path / "out")[0].var["symbol"]) == SYMBOLS
    assert cell_ids(tmp_path / "out") == NUCLEI
    table = metadata(tmp_path / "out").to_pydict()
    assert table["donor"] == [f"P{1290 + i // 10}" for i in range(N_CELLS)]
    assert table["disease"] == [d for d in ("NF", "HCM", "DCM", "NF") for _ in range(10)]
    assert table["cell_type"] == [*TYPES[:-1], None]
    assert table["cell_type_leiden0.6"] == table["cell_type"]
    assert table["excluded"] == [None] * (N_CELLS - 1) + ["no label"]
    assert table["sample"][:6] == ["LV_1290_1"] * 5 + ["LV_1291_1"]
    assert table["age"][0] == 50
    assert "times those that CellBender left" in done.err
    made = read_metadata(tmp_path / "out" / "metadata.parquet")
    assert made["parameters"] == {
        "deposit": "scp1303", "part": "all", "layer": "cellranger_raw", "gene_column": "gene_ids",
    }  # fmt: skip


def test_the_text_form_is_the_same_dataset(tmp_path):
    done = ingest(write_text(tmp_path / "text"), tmp_path / "out", "scp1303")
    assert done.code == 0, done.err
    assert np.array_equal(dense(tmp_path / "out"), COUNTS)
    assert features(tmp_path / "out") == IDS
    table = metadata(tmp_path / "out").to_pydict()
    assert table["cell_id"] == NUCLEI
    assert table["donor"] == [f"P{1290 + i // 10}" for i in range(N_CELLS)]
    assert table["disease"] == [d for d in ("NF", "HCM", "DCM", "NF") for _ in range(10)]
    assert table["cell_type"] == ["cardiac muscle cell"] * N_CELLS
    assert table["excluded"] == [None] * N_CELLS
    assert table["age"] == [float(a) for a in (50, 60, 70, 80) for _ in range(10)]
    assert "cell_type is cell_type__ontology_label" in done.err
    # the h5ad is taken where both are there, and is the same dataset as by hand
    write_h5ad(tmp_path / "text", observations())
    assert ingest(tmp_path / "text", tmp_path / "both", "scp1303").code == 0
    by_hand = ("--layer", "cellranger_raw", "--gene-column", "gene_ids", "-o", tmp_path / "hand")
    assert run("ingest", tmp_path / "text" / H5AD, *by_hand).code == 0
    inputs = [read_metadata(tmp_path / n / "metadata.parquet")["inputs"] for n in ("out", "both", "hand")]
    assert inputs[0] == inputs[1] == inputs[2]


def test_a_table_without_labels_of_some_nuclei(tmp_path):
    lines = portal_table().splitlines(keepends=True)
    folder = write_text(tmp_path / "in", "".join(lines[:-3]))
    done = ingest(folder, tmp_path / "out", "scp1303")
    assert done.code == 0, done.err
    table = metadata(tmp_path / "out").to_pydict()  # the table is in reversed order
    assert table["excluded"] == ["no label"] * 3 + [None] * (N_CELLS - 3)
    assert table["disease"][:4] == [None, None, None, "NF"]
    assert dense(tmp_path / "out").shape == (N_CELLS, N_GENES)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_what_differs_from_what_is_known_is_refused(tmp_path, ending):
    output = tmp_path / "out"

    def refused(folder: Path, *words: str) -> None:
        assert_refused(ingest(folder, output, "scp1303"), *words, output=output)

    folder = tmp_path / "in"
    if ending:  # compressed as a browser may leave it: read all the same
        write_text(folder)
        for path in list(folder.iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        assert ingest(folder, output, "scp1303").code == 0
        assert np.array_equal(dense(output), COUNTS)
        return
    refused(write_h5ad(folder, observations(), layer="counts"), H5AD, "has no layer 'cellranger_raw'")
    refused(write_h5ad(folder, observations().rename(columns={"donor_id": "donors"})), "no column 'donor_id'")
    sick = observations().assign(disease="ICM")
    refused(write_h5ad(folder, sick), "has the disease 'ICM', known are NF, HCM, DCM")
    texts = observations().assign(cellbender_ncount="many")
    refused(write_h5ad(folder, texts), f"{H5AD}: column 'cellbender_ncount' is no number in every row")
    (folder / H5AD).unlink()
    refused(folder, f"{folder}: holds neither {H5AD} nor {MATRIX}_raw_counts_V1.mtx", "download scp1303")
    refused(write_text(folder, portal_table(types=False)), "DCM_HCM_MetaData_V1.txt", "(TYPE)")
    other = portal_table().replace("-1-", "-2-")
    refused(write_text(folder, other), "DCM_HCM_MetaData_V1.txt: names only 0 of the 40 nuclei")
    renamed = portal_table().replace("cell_type__ontology_label", "cell_types")
    refused(write_text(folder, renamed), "has no column 'cell_type__ontology_label'")
    odd = portal_table().replace("\t50\t", "\tfifty\t", 1)
    refused(write_text(folder, odd), "column 'age' is no number")
    write_text(folder)
    (folder / f"{MATRIX}_barcodes_V1.tsv").unlink()
    refused(folder, f"{MATRIX}_barcodes_V1.tsv: no such file")
