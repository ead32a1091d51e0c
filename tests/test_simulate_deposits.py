"""Simulated deposits: formats as the facts about the real ones have them, known truth, a mirror that serves them."""

import gzip
import io
import json
import pickle
import re
import tarfile
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import yaml
from command_line import run
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cellformers.deposits import download_deposit, read_deposit
from cellformers.errors import UserError
from cellformers.io.download import Patience
from cellformers.io.files import digest_file
from cellformers.models.checkpoints import read_weights
from cellformers.models.directory import open_model
from cellformers.registry import download, read_registry
from cellformers.simulate.deposits import SIMULATED, simulate_deposits
from cellformers.simulate.deposits.genome import draw_genome
from cellformers.simulate.deposits.scp1303 import draw as draw_scp1303
from cellformers.vocabulary import read_published

GEO = "www/ftp.ncbi.nlm.nih.gov/geo/series"
FAST = Patience(sleep=lambda _: None, attempts=2, timeout=10.0)
DAYS = {
    "drop": {("Rep1", d) for d in "0137"} | {("Rep2", d) for d in ("0", "1", "3", "7", "15")},
    "dronc": {("Rep1", d) for d in "037"} | {("Rep2", d) for d in ("0", "1", "3", "7", "15")},
}
TRAIN = (
    "1447 1600 1462 1558 1300 1508 1358 1678 1561 1304 1610 1430 1472 1707 1726 1504 1425 1617 1631 1735 1582 1722 "
    "1622 1630 1290 1479 1371 1549 1515"
)
HELD_OUT = "1422 1510 1539 1606 1702 1437 1516 1602 1685 1718"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deposits")
    simulate_deposits(["all"], folder, seed=0)
    return folder


def truth_of(root: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "truth" / f"{name}.json").read_text())
    return content


def found(root: Path, pattern: str) -> Path:
    paths = list(root.rglob(pattern))
    assert len(paths) == 1, pattern
    return paths[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_gz(path: Path) -> bytes:
    content = path.read_bytes()
    assert content[:2] == b"\x1f\x8b"
    assert content[3:8] == bytes(5), "no name and no time"
    return gzip.decompress(content)


def dictionary(root: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = pickle.loads(found(root, f"{name}.pkl").read_bytes())
    return content


# --- GSE155468 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aorta(root: Path) -> dict[str, bytes]:
    """Text of the samples by donor."""
    with tarfile.open(root / GEO / "GSE155nnn/GSE155468/suppl/GSE155468_RAW.tar") as archive:
        members = archive.getmembers()
        assert all(member.mtime == 0 and member.isfile() for member in members)
        content = {m.name: gzip.decompress(archive.extractfile(m).read()) for m in members}  # type: ignore[union-attr]
    donors = ["Con4", "Con6", "Con9", *(f"TAA{i}" for i in range(1, 9))]
    assert list(content) == [f"GSM{4704931 + i}_{donor}.txt.gz" for i, donor in enumerate(donors)]
    return dict(zip(donors, content.values(), strict=True))


def test_aorta_headers_are_of_both_kinds_and_rows_are_symbols(aorta: dict[str, bytes]) -> None:
    first = {donor: text.decode().split("\n", 2)[:2] for donor, text in aorta.items()}
    shorter = {d: len(row.split("\t")) - len(head.split("\t")) for d, (head, row) in first.items()}
    assert set(shorter.values()) == {0, 1}
    assert all(first[donor][0].startswith("\t") for donor, n in shorter.items() if n == 0)
    names = {head.split("\t")[-1][-2:] for head, _ in first.values()}
    assert names == {"-1", ".1"}
    repeated, genes = set(), set()
    for donor, text in aorta.items():
        table = pd.read_csv(io.BytesIO(text), sep="\t", index_col=0)
        assert all(table.dtypes == np.int64)
        assert not table.index.str.startswith("ENSG").any()
        assert table.index.str.startswith("MT-").sum() == 13
        genes.add(tuple(table.index))
        if not table.index.is_unique:
            repeated.add(donor)
    assert repeated == {"TAA2"}
    assert len(genes) > 3


def test_aorta_labels_join_by_number_and_barcode(root: Path, aorta: dict[str, bytes]) -> None:
    path = found(root, "meta_addsubcluster_cellcycle.csv")
    assert path.read_bytes().count(b"\r\n") == path.read_bytes().count(b"\n") > 0
    labels = pd.read_csv(path, index_col=0)
    assert list(labels) == [
        "orig.ident", "nCount_RNA", "nFeature_RNA", "stim", "integrated_snn_res.0.6", "seurat_clusters", "celltype",
        "celltype2", "cellcycle",
    ]  # fmt: skip
    assert labels.index.is_unique
    assert labels["celltype"].nunique() == 11
    assert set(labels["stim"]) == {"ATAA", "Control"}
    assert labels.index.str.fullmatch(r"[ACGT]{16}\.1_\d+").all()
    samples = ["Con4", "Con6", "Con9", *(f"ATAA{i}" for i in range(1, 9))]
    totals = {}
    for number, (donor, text) in enumerate(aorta.items(), start=1):
        table = pd.read_csv(io.BytesIO(text), sep="\t", index_col=0)
        for name, total in table.sum().items():
            totals[f"{str(name)[:16]}.1_{number}"] = (donor, total)
        own = labels[labels["orig.ident"] == samples[number - 1]]
        assert own.index.str.endswith(f"_{number}").all()
        assert (len(own) < table.shape[1]) == (donor == "TAA1")
    assert set(labels.index) < set(totals)
    unlabelled = [totals[name][0] for name in set(totals) - set(labels.index)]
    assert set(unlabelled) == {"TAA1"}
    assert len(unlabelled) == 2
    ratio = np.array([totals[name][1] for name in labels.index]) / labels["nCount_RNA"]
    assert (ratio >= 1).all()
    assert 1 < ratio.mean() < 1.05
    part = truth_of(root, "gse155468")["parts"]["all"]
    assert (part["n_cells"], part["n_labelled"]) == (len(totals), len(labels)) == (330, 328)
    assert part["n_counts"] == sum(total for _, total in totals.values())


# --- GSE129096 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def differentiation(root: Path) -> dict[str, pd.DataFrame]:
    folder = root / GEO / "GSE129nnn/GSE129096/suppl"
    names = {"drop": "DROP_combined_allcells", "dronc": "DRONC_combined_allcells", "heart": "HumanHeartDroNc"}
    texts = {part: read_gz(folder / f"GSE129096_{name}.tsv.gz") for part, name in names.items()}
    return {part: pd.read_csv(io.BytesIO(text), sep="\t", index_col=0) for part, text in texts.items()}


@pytest.mark.parametrize("part", ["drop", "dronc"])
def test_differentiation_is_named_by_barcode_day_and_line(
    root: Path, differentiation: dict[str, pd.DataFrame], part: str
) -> None:
    table = differentiation[part]
    assert table.index.name == "gene"
    assert table.index.is_unique
    assert not table.index.str.startswith("ENSG").any()
    fields = [re.fullmatch(r"([ACGT]{12})_(\d+)_(Rep[12])", name).groups() for name in table]  # type: ignore[union-attr]
    assert {(line, day) for _, day, line in fields} == DAYS[part]
    assert table.columns.is_unique
    assert ((table > 0).sum(axis=1) > 10).all()
    truth = truth_of(root, "gse129096")["parts"][part]
    assert truth["cells"]["name"] == list(table)
    assert truth["cells"]["n_counts"] == table.sum().tolist()
    assert (truth["n_cells"], truth["n_genes"]) == table.shape[::-1]
    least = 400 if part == "drop" else 300
    assert 0.6 < (((table > 0).sum() > least) & ((table > 0).sum() < 2000)).mean() <= 1


def test_differentiation_heart_has_ensembl_ids_and_no_labels(
    differentiation: dict[str, pd.DataFrame],
) -> None:
    table = differentiation["heart"]
    assert table.index.str.fullmatch(r"ENSG\d{11}").all()
    assert all(re.fullmatch("[ACGT]{12}", name) for name in table)


def test_chimpanzee_cells_are_told_by_their_barcodes(
    root: Path, differentiation: dict[str, pd.DataFrame], reference_data: Path
) -> None:
    path = found(root, "species_assign_matrix.txt")
    real = (reference_data / "labels" / "GSE129096_species_assign_matrix.txt").read_bytes()
    assert path.read_bytes().split(b"\n", 1)[0] == real.split(b"\n", 1)[0]
    assert path.read_bytes().count(b"\r\n") == path.read_bytes().count(b"\n") > 0
    species = pd.read_csv(path, sep="\t", index_col="CB")
    assert species.index.is_unique
    assert species.index.is_monotonic_increasing
    score = species["human_score"] / (species["human_score"] + species["panTro_score"])
    np.testing.assert_allclose(species["hg_specificity_score"], score)
    low = set(species.index[species["hg_specificity_score"] < 0.5])
    codes = [name.split("_")[0] for name in differentiation["drop"]]
    truth = truth_of(root, "gse129096")["parts"]["drop"]
    assert [code in low for code in codes] == truth["cells"]["chimpanzee"]
    assert 0.1 < np.mean([code in low for code in codes]) < 0.2
    assert low - set(codes), "the matrix has barcodes that the file lacks"
    assert set(codes) - set(species.index), "the file has barcodes that the matrix lacks"
    assert max(Counter(codes).values()) == 2
    assert low & {name.split("_")[0] for name in differentiation["dronc"]}


# --- GSE156793 ------------------------------------------------------------------------------------------


def test_fetal_loom_is_dense_and_chunked_with_versions_and_repeated_names(root: Path) -> None:
    folder = root / GEO / "GSE156nnn/GSE156793/suppl"
    with h5py.File(io.BytesIO(read_gz(folder / "GSE156793_S3_gene_count.loom.gz"))) as loom:
        matrix = loom["matrix"]
        assert (matrix.chunks, matrix.compression) == ((64, 64), "gzip")
        counts = matrix[:]
        assert set(loom["row_attrs"]) == {"gene_id", "gene_short_name", "gene_type"}
        rows = {name: loom[f"row_attrs/{name}"].asstr()[:] for name in loom["row_attrs"]}
        names = set(loom["col_attrs"])
        sample, types, organs, lineages, fetuses = (
            loom[f"col_attrs/{name}"].asstr()[:]
            for name in ("sample", "Main_cluster_name", "Organ", "Organ_cell_lineage", "Fetus_id")
        )
        days = loom["col_attrs/Development_day"][:]
    assert names == {
        "sample", "Organ", "Main_cluster_name", "Organ_cell_lineage", "Fetus_id", "Sex", "Assay", "Development_day",
        "Main_cluster_umap_1", "Main_cluster_umap_2",
    }  # fmt: skip
    assert counts.shape == (900, 400)
    assert (counts == np.rint(counts)).all()
    assert all(re.fullmatch(r"ENSG\d{11}\.\d+", gene) for gene in rows["gene_id"])
    assert len(set(rows["gene_short_name"])) == 897
    assert len(set(sample)) == 400
    assert len(set(organs)) == 15
    assert len(set(fetuses)) == 10
    by_organ = pd.Series(fetuses).groupby(organs).nunique()
    assert by_organ.min() >= 3
    assert pd.Series(days).groupby(fetuses).nunique().max() == 1
    known = types != "nan"
    assert 5 < (~known).sum() < 20
    assert ((lineages == "nan") == ~known).all()
    assert (
        lineages[known] == np.array([f"{o}-{t}" for o, t in zip(organs, types, strict=True)])[known]
    ).all()
    assert "Cardiomyocytes" in types[organs == "Heart"]

    cells = pd.read_csv(
        io.BytesIO(read_gz(folder / "GSE156793_S1_metadata_cells.txt.gz")), index_col="sample"
    )
    assert list(cells)[:6] == [
        "All_reads", "Exon_reads", "Organ", "Main_cluster_name", "Organ_cell_lineage", "Assay"
    ]  # fmt: skip
    assert {"Development_day", "Fetus_id", "Sex", "Global_umap_1", "Global_umap_2"} <= set(cells)
    assert set(sample) < set(cells.index)
    joined = cells.loc[sample]
    assert (joined.index != cells.index[: len(sample)]).any(), "another order"
    assert (joined["Organ"] == organs).all()
    assert (joined["Main_cluster_name"].isna() == ~known).all()
    truth = truth_of(root, "gse156793")["parts"]["all"]
    assert (truth["n_cells"], truth["n_labelled"], truth["n_counts"]) == (400, known.sum(), counts.sum())


# --- SCP1303 --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hearts(root: Path) -> anndata.AnnData:
    return anndata.read_h5ad(root / "home/manual/scp1303/human_dcm_hcm_scportal_03.17.2022.h5ad")


def test_hearts_have_corrected_counts_and_raw_ones(hearts: anndata.AnnData) -> None:
    corrected, raw = hearts.X.toarray(), hearts.layers["cellranger_raw"].toarray()
    assert (corrected == np.rint(corrected)).all()
    assert (raw >= corrected).all()
    assert (raw > corrected).any()
    assert (corrected.sum(axis=1) == hearts.obs["cellbender_ncount"]).all()
    assert ((corrected > 0).sum(axis=1) == hearts.obs["cellbender_ngenes"]).all()
    assert list(hearts.obs) == [
        "biosample_id", "donor_id", "disease", "sex", "age", "lvef", "cell_type_leiden0.6", "SubCluster",
        "cellbender_ncount", "cellbender_ngenes", "cellranger_percent_mito", "exon_prop", "cellbender_entropy",
        "cellranger_doublet_scores",
    ]  # fmt: skip
    assert list(hearts.var) == ["gene_ids", "feature_types", "genome"]
    assert hearts.var["gene_ids"].str.fullmatch(r"ENSG\d{11}").all()
    assert hearts.var_names.is_unique
    assert not hearts.var_names.str.startswith("ENSG").any()
    assert hearts.obsm["X_umap"].shape == (420, 2)


def test_hearts_are_those_of_the_published_split(hearts: anndata.AnnData) -> None:
    donors = hearts.obs.groupby("donor_id", observed=True)["disease"].agg(["nunique", "first"])
    assert (donors["nunique"] == 1).all()
    disease = donors["first"].astype(str)
    assert len(disease) == 42
    assert Counter(disease) == {"DCM": 11, "HCM": 15, "NF": 16}
    assert Counter(disease[[f"P{d}" for d in TRAIN.split()]]) == {"NF": 9, "HCM": 11, "DCM": 9}
    assert Counter(disease[[f"P{d}" for d in HELD_OUT.split()]]) == {"NF": 4, "HCM": 4, "DCM": 2}
    assert set(disease[["P1540", "P1547", "P1603"]]) == {"NF"}
    assert 70 <= hearts.obs["biosample_id"].nunique() <= 80
    types = hearts.obs["cell_type_leiden0.6"].value_counts(normalize=True)
    assert {"Cardiomyocyte_I", "Cardiomyocyte_II", "Cardiomyocyte_III"} < set(types.index)
    assert 0.45 < types[types.index.str.startswith("Cardiomyocyte")].sum() < 0.7


def test_the_text_form_holds_the_same_raw_counts(tmp_path: Path, hearts: anndata.AnnData) -> None:
    drawn = draw_scp1303(draw_genome(0), 420, form="text")
    for name, write in drawn.files.items():
        write(tmp_path / name)
    raw = scipy.io.mmread(tmp_path / "DCM_HCM_Expression_Matrix_raw_counts_V1.mtx").toarray()
    genes = pd.read_csv(tmp_path / "DCM_HCM_Expression_Matrix_genes_V1.tsv", sep="\t", header=None)
    cells = (tmp_path / "DCM_HCM_Expression_Matrix_barcodes_V1.tsv").read_text().split()
    assert cells == hearts.obs_names.tolist()
    places = pd.Index(hearts.var["gene_ids"]).get_indexer(genes[0])
    assert (places >= 0).all()
    assert genes[1].tolist() == hearts.var_names[places].tolist()
    assert (raw == hearts.layers["cellranger_raw"].toarray()[:, places].T).all()
    assert ((raw > 0).sum(axis=1) >= 5).all()
    table = pd.read_csv(tmp_path / "DCM_HCM_MetaData_V1.txt", sep="\t", index_col="NAME")
    assert table.index[0] == "TYPE"
    assert table.index[1:].tolist() == cells
    words = {"NF": "normal", "HCM": "hypertrophic cardiomyopathy", "DCM": "dilated cardiomyopathy"}
    assert table["disease__ontology_label"].iloc[1:].tolist() == hearts.obs["disease"].map(words).tolist()
    assert "cell_type__ontology_label" in table


# --- genes ----------------------------------------------------------------------------------------------


def test_scores_of_dosage_sensitivity_have_some_outdated_symbols(root: Path) -> None:
    text = read_gz(found(root, "Collins_rCNV_2022.dosage_sensitivity_scores.tsv.gz")).decode()
    assert text.startswith("#gene\tpHaplo\tpTriplo\n")
    scores = pd.read_csv(io.StringIO(text), sep="\t", index_col=0)
    assert scores.index.is_unique
    assert ((scores > 0) & (scores < 1)).all(axis=None)
    truth = truth_of(root, "collins2022")
    assert (scores["pHaplo"] >= 0.86).sum() == len(truth["haploinsufficient"])
    assert (scores["pTriplo"] >= 0.94).sum() == len(truth["triplosensitive"])
    assert 0.05 < (scores["pHaplo"] >= 0.86).mean() < 0.25
    assert 0.03 < (scores["pTriplo"] >= 0.94).mean() < 0.15
    names = {version: dictionary(root, f"gene_name_id_dict_{version}") for version in ("gc30M", "gc104M")}
    old = set(truth["outdated_symbols"].values())
    assert set(scores.index) - set(names["gc104M"]) == old
    assert len(old) > 30
    aliases = dictionary(root, "ensembl_mapping_dict_gc104M")
    assert {aliases[symbol] for symbol in old} == set(truth["outdated_symbols"])
    assert not any(symbol.startswith("MT-") for symbol in scores.index)


def test_classes_of_genes_are_stored_as_the_published_ones(root: Path) -> None:
    classes = truth_of(root, "geneformer-labels")["classes"]
    path = found(root, "dosage_sens_tf_labels.csv")
    assert path.read_bytes().startswith(b"\xef\xbb\xbfdosage_sensitive,dosage_insensitive\n")
    table = pd.read_csv(path, encoding="utf-8-sig")
    assert table["dosage_sensitive"].dropna().tolist() == classes["dosage_sensitive"]
    assert table["dosage_insensitive"].dropna().tolist() == classes["dosage_insensitive"]
    assert table["dosage_sensitive"].isna().any()
    for name in ("bivalent", "lys4_only", "no_methylation"):
        lines = found(root, f"{name}_gene_labels.txt").read_text().split()
        assert len(lines) > len(set(lines))
        assert set(lines) == set(classes[name])
    assert not set(classes["bivalent"]) & (set(classes["lys4_only"]) | set(classes["no_methylation"]))
    network = pickle.loads(found(root, "n1_network.pickle").read_bytes())
    assert network == {name: classes[name] for name in ("central", "peripheral")}
    assert not set(classes["central"]) & set(classes["peripheral"])


def test_ranges_of_factors_are_in_any_case(root: Path) -> None:
    table = pd.read_csv(found(root, "41467_2020_16106_MOESM4_ESM.csv"))
    assert table.columns[0] == "Unnamed: 0"
    words = table["assignment"]
    assert words.nunique() == 4
    assert set(words.str.lower()) == {"long-range tf", "short-range tf"}
    names = dictionary(root, "gene_name_id_dict_gc104M")
    classes = truth_of(root, "tf-range")["classes"]
    is_long = words.str.lower().str.startswith("long")
    assert {names[symbol] for symbol in table.iloc[:, 0][is_long]} == set(classes["long_range"])
    assert {names[symbol] for symbol in table.iloc[:, 0][~is_long]} == set(classes["short_range"])


# --- registry, mirror, checkpoints ----------------------------------------------------------------------


@pytest.mark.parametrize("name", SIMULATED)
def test_the_registry_has_the_digests_of_what_is_there(
    root: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = read_deposit(name)
    monkeypatch.setenv("CELLFORMERS_RESOURCES", str(root / "resources"))
    entry = read_deposit(name)
    assert entry.parts == packaged.parts
    assert {file: known.url for file, known in entry.files.items()} == {
        file: known.url for file, known in packaged.files.items()
    }
    there = {path.name: path for path in (root / "www").rglob("*")}
    there |= {path.name: path for path in (root / "home").rglob("*")}
    checked = 0
    for file, known in entry.files.items():
        assert known.sha256 is not None or not known.needed
        if known.sha256 is not None:
            assert known.size == there[file].stat().st_size
            assert f"sha256:{known.sha256}" == digest_file(there[file])
            checked += 1
            if known.url:
                parts = urlsplit(known.url)
                assert there[file] == root / "www" / parts.netloc / unquote(parts.path).lstrip("/")
    assert checked == (1 if name == "scp1303" else len(entry.files))


class Quiet(SimpleHTTPRequestHandler):
    """Gives files and says nothing."""

    def log_message(self, *_: Any) -> None:
        """Keep stderr clean."""


@pytest.fixture
def served(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mirror behind a plain server of files, as a user would start it."""
    for name in (
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
        "CELLFORMERS_OFFLINE",
        "HF_HUB_OFFLINE",
    ):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root / "www")))
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "manual").symlink_to(root / "home" / "manual")
    monkeypatch.setenv("CELLFORMERS_MIRROR", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("CELLFORMERS_RESOURCES", str(root / "resources"))
    monkeypatch.setenv("CELLFORMERS_HOME", str(tmp_path / "home"))
    yield tmp_path
    server.shutdown()
    server.server_close()


def test_a_server_of_files_is_all_that_downloads_need(served: Path) -> None:
    for name in SIMULATED:
        if name != "scp1303":
            folder = download_deposit(name, patience=FAST)
            assert {path.name for path in folder.iterdir()} == set(read_deposit(name).files)
    assert len(list(download_deposit("scp1303", patience=FAST).glob("*.h5ad"))) == 1
    for name in ("geneformer-v1-10m", "geneformer-v2-104m"):
        folder = download(name, patience=FAST)
        config = open_model(folder).network.config
        entry = read_registry().models[name]
        assert config.vocab_size == entry.architecture["vocab_size"] < 910
        assert config.max_position_embeddings == (2048 if "v1" in name else 4096)
        assert sum(tensor.numel() for tensor in read_weights(folder).tensors.values()) == entry.n_parameters


def test_dictionaries_are_as_the_published_ones(root: Path) -> None:
    v1, v2 = (
        read_published(found(root, f"token_dictionary_{version}.pkl").parent)
        for version in ("gc30M", "gc104M")
    )
    assert (v1.size - len(v1.gene_ids), v2.size - len(v2.gene_ids)) == (2, 4)
    assert (len(v1.gene_ids), len(v2.gene_ids)) == (880, 870)
    medians = {name: dictionary(root, f"gene_median_dictionary_{name}") for name in ("gc30M", "gc104M")}
    assert set(medians["gc30M"]) == set(v1.gene_ids)
    assert set(medians["gc104M"]) > set(v2.gene_ids)
    assert dictionary(root, "ensembl_mapping_dict_gc30M") == {gene: gene for gene in v1.gene_ids}


def test_medians_fit_the_counts(root: Path, hearts: anndata.AnnData) -> None:
    medians = dictionary(root, "gene_median_dictionary_gc104M")
    raw = hearts.layers["cellranger_raw"].toarray()
    shares = 1e4 * raw / raw.sum(axis=1, keepdims=True)
    often = (raw > 0).mean(axis=0) > 0.8
    observed = np.array([np.median(column[column > 0]) for column in shares.T[often]])
    ratio = np.log(observed / [medians[gene] for gene in hearts.var["gene_ids"][often]])
    assert abs(np.median(ratio)) < 0.3
    assert ratio.std() < 0.8


# --- truth ----------------------------------------------------------------------------------------------


def log_normalised(counts: Any) -> np.ndarray:
    values = np.asarray(counts, float)
    return np.log1p(1e4 * values / values.sum(axis=1, keepdims=True))


def accuracy(counts: Any, labels: Any, units: Any) -> float:
    """Of a logistic regression on log counts, over folds that keep units whole."""
    labels, units = np.asarray(labels, str), np.asarray(units, str)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200))
    folds = GroupKFold(min(5, len(set(units))))
    predicted = cross_val_predict(model, log_normalised(counts), labels, groups=units, cv=folds)
    return float((predicted == labels).mean())


def test_types_of_the_aorta_are_found_in_other_donors(root: Path, aorta: dict[str, bytes]) -> None:
    tables = [pd.read_csv(io.BytesIO(text), sep="\t", index_col=0) for text in aorta.values()]
    counts = pd.concat([table.groupby(level=0).sum().T for table in tables]).fillna(0)
    cells = truth_of(root, "gse155468")["parts"]["all"]["cells"]
    assert counts.sum(axis=1).tolist() == cells["n_counts"]
    assert 0.7 < accuracy(counts, cells["celltype"], cells["donor"]) < 0.97


def test_days_are_found_in_the_other_line(root: Path, differentiation: dict[str, pd.DataFrame]) -> None:
    cells = pd.DataFrame(truth_of(root, "gse129096")["parts"]["drop"]["cells"])
    human = ~cells["chimpanzee"].to_numpy()
    counts = differentiation["drop"].T.to_numpy()[human]
    assert 0.5 < accuracy(counts, cells["day"][human], cells["line"][human]) < 0.95


def test_organs_and_types_are_found_in_other_fetuses(root: Path) -> None:
    cells = truth_of(root, "gse156793")["parts"]["all"]["cells"]
    with h5py.File(io.BytesIO(read_gz(found(root, "*.loom.gz")))) as loom:
        counts = loom["matrix"][:].T
    assert 0.5 < accuracy(counts, cells["type"], cells["Fetus_id"]) < 0.95
    assert 0.25 < accuracy(counts, cells["Organ"], cells["Fetus_id"]) < 0.9


def test_diseases_are_found_in_other_donors(hearts: anndata.AnnData) -> None:
    muscle = hearts[hearts.obs["cell_type_leiden0.6"].str.startswith("Cardiomyocyte")]
    raw = muscle.layers["cellranger_raw"].toarray()
    assert 0.55 < accuracy(raw, muscle.obs["disease"], muscle.obs["donor_id"]) < 0.95


def test_coexpression_tells_classes_of_genes_and_means_do_not(root: Path, hearts: anndata.AnnData) -> None:
    raw = hearts.layers["cellranger_raw"].toarray()
    values = log_normalised(raw)
    types = pd.get_dummies(hearts.obs["cell_type_leiden0.6"].astype(str)).to_numpy(float)
    known = np.column_stack([np.log(raw.sum(axis=1)), types])
    values -= known @ np.linalg.lstsq(known, values, rcond=None)[0]
    values /= values.std(axis=0) + 1e-9
    correlation = values.T @ values / len(values)
    level, directions = np.linalg.eigh(correlation)
    place = {gene: i for i, gene in enumerate(hearts.var["gene_ids"])}
    classes = truth_of(root, "geneformer-labels")["classes"]

    def columns(first: str, second: str) -> tuple[list[int], np.ndarray]:
        genes = [place[gene] for gene in classes[first] + classes[second]]
        return genes, np.repeat([1, 0], [len(classes[first]), len(classes[second])])

    genes, sensitive = columns("dosage_sensitive", "dosage_insensitive")
    assert 0.4 < roc_auc_score(sensitive, raw.mean(axis=0)[genes]) < 0.6
    assert roc_auc_score(sensitive, (correlation**2).sum(axis=1)[genes]) > 0.6
    genes, central = columns("central", "peripheral")
    features = (directions * np.sqrt(np.maximum(level, 0)))[genes, -20:]
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    chance = cross_val_predict(model, features, central, cv=folds, method="predict_proba")[:, 1]
    assert 0.7 < roc_auc_score(central, chance) < 0.99


# --- the function and the verb --------------------------------------------------------------------------


def test_one_seed_gives_the_same_bytes_and_another_seed_others(root: Path, tmp_path: Path) -> None:
    simulate_deposits(["all"], tmp_path / "again", seed=0)
    simulate_deposits(["gse129096", "collins2022"], tmp_path / "other", seed=1)
    again, other = contents(tmp_path / "again"), contents(tmp_path / "other")
    first = contents(root)
    assert first.keys() == again.keys()
    assert [name for name in first if first[name] != again[name]] == []
    assert other.keys() < again.keys()
    assert [name for name in other if other[name] == again[name]] == []


def test_a_deposit_comes_alone_and_with_as_many_cells_as_asked_for(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    made = simulate_deposits(["gse129096"], tmp_path, cells=160)
    assert set(made) == {"gse129096"}
    assert {name: part["n_cells"] for name, part in made["gse129096"]["parts"].items()} == {
        "drop": 160, "dronc": 160, "heart": 53,
    }  # fmt: skip
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "GSE129096_DROP_combined_allcells.tsv.gz", "GSE129096_DRONC_combined_allcells.tsv.gz",
        "GSE129096_HumanHeartDroNc.tsv.gz", "species_assign_matrix.txt", "gse129096.yaml", "gse129096.json", "mine.txt",
    }  # fmt: skip
    assert made["gse129096"]["states"] == truth_of(root, "gse129096")["states"]


def test_the_fewest_cells_hold_all_samples_and_donors(tmp_path: Path) -> None:
    names = ("gse155468", "gse129096", "gse156793", "scp1303")
    made = simulate_deposits(names, tmp_path, cells=150, seed=2)
    donors = {name: made[name]["parts"]["all"]["cells"] for name in names if name != "gse129096"}
    assert len(set(donors["gse155468"]["donor"])) == 11
    assert len(set(donors["gse155468"]["celltype"])) == 11
    assert len(set(donors["gse156793"]["Organ"])) == 15
    sizes = Counter(donors["scp1303"]["donor_id"])
    assert (len(sizes), min(sizes.values()), sum(sizes.values())) == (42, 3, 150)


def test_deposits_are_small(root: Path) -> None:
    assert sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) < 10 << 20
    entry = yaml.safe_load((root / "resources" / "checkpoints.yaml").read_text())
    assert set(entry["models"]) == {"geneformer-v1-10m", "geneformer-v2-104m"}


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["gse15546"], {}, "no deposit 'gse15546' is simulated; did you mean 'gse155468'"),
        (["all", "gse15546"], {}, "no deposit 'gse15546' is simulated; did you mean 'gse155468'"),
        (["tf-range"], {"seed": -1}, "seed -1 is negative"),
        (["gse155468"], {"cells": 100}, "ask for at least 150"),
    ],
)
def test_what_is_out_of_range_is_refused(
    tmp_path: Path, names: list[str], options: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        simulate_deposits(names, tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_deposits_of_two_seeds_are_kept_apart(tmp_path: Path) -> None:
    simulate_deposits(["tf-range"], tmp_path, seed=1)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"tf-range\.json: is of seed 1"):
        simulate_deposits(["collins2022"], tmp_path, seed=2)
    assert contents(tmp_path) == before


def test_the_verb(tmp_path: Path) -> None:
    done = run("simulate", "--deposit", "tf-range", "--deposit", "collins2022", "--seed", "3", "-o", tmp_path)
    assert done.code == 0, done.err
    assert "tf-range, collins2022" in done.err
    assert {path.name for path in (tmp_path / "truth").iterdir()} == {"tf-range.json", "collins2022.json"}
    assert truth_of(tmp_path, "tf-range")["parameters"] == {"deposit": "tf-range", "seed": 3, "cells": 0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--cells", "200"), "200 cells are too few for an atlas; give --cells 300 or more"),
        (("--deposit", "gse1"), "no deposit 'gse1' is simulated"),
    ],
)
def test_the_verb_refuses(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    done = run("simulate", *arguments, "-o", tmp_path / "new")
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "new").exists()
