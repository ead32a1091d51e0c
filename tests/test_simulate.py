"""The simulated deposits: formats, distributions, and that only the network tells the two classes of factors apart."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import h5py
import loompy
import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

from cellformers.counts import row_totals
from cellformers.errors import UserError
from cellformers.io.files import digest_file
from cellformers.io.source import open_counts
from cellformers.simulate import large, simulate

FILES = ("atlas.h5ad", "second.loom", "gene_labels.csv", "out_degrees.csv", "truth.json")


class Deposit(NamedTuple):
    """One run of the simulation, read back."""

    folder: Path
    truth: dict[str, Any]
    atlas: anndata.AnnData
    counts: np.ndarray  # int64 [cells, genes], the atlas


def make(folder: Path, **options: int) -> Deposit:
    truth = simulate(folder, **options)
    atlas = anndata.read_h5ad(folder / "atlas.h5ad")
    return Deposit(folder, truth, atlas, atlas.X.toarray().astype(np.int64))


@pytest.fixture(scope="module", params=[0, 1, 2])
def deposit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Deposit:
    return make(tmp_path_factory.mktemp(f"seed{request.param}"), seed=request.param)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Deposit:
    return make(tmp_path_factory.mktemp("small"), seed=5, n_cells=300, n_genes=400, n_factors=40)


def factor_table(deposit: Deposit) -> pd.DataFrame:
    """The labels file with the true out-degree and the column of each factor in the atlas."""
    labels = pd.read_csv(deposit.folder / "gene_labels.csv")
    degree = {factor["gene_id"]: factor["out_degree"] for factor in deposit.truth["factors"]}
    labels["out_degree"] = labels["gene_id"].map(degree)
    labels["column"] = deposit.atlas.var_names.get_indexer(labels["gene_id"])
    return labels


def mitochondrial_fraction(deposit: Deposit) -> np.ndarray:
    is_mitochondrial = deposit.atlas.var["symbol"].str.startswith("MT-").to_numpy()
    return deposit.counts[:, is_mitochondrial].sum(axis=1) / np.maximum(deposit.counts.sum(axis=1), 1)


def healthy_cells(deposit: Deposit) -> np.ndarray:
    """Labelled, not nearly empty and not dying, by measured quantities only."""
    enough = deposit.counts.sum(axis=1) >= 200
    return (
        enough & (mitochondrial_fraction(deposit) < 0.25) & deposit.atlas.obs["cell_type"].notna().to_numpy()
    )


def log_normalised(counts: np.ndarray) -> np.ndarray:
    return np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)


# Files


def test_one_seed_gives_the_same_bytes_and_another_seed_others(small: Deposit, tmp_path: Path) -> None:
    size = {"n_cells": 300, "n_genes": 400, "n_factors": 40}
    simulate(tmp_path / "again", seed=5, **size)
    simulate(tmp_path / "other", seed=6, **size)
    for name in FILES:
        assert digest_file(small.folder / name) == digest_file(tmp_path / "again" / name), name
        assert digest_file(small.folder / name) != digest_file(tmp_path / "other" / name), name


def test_nothing_but_the_four_files_is_written_and_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    simulate(tmp_path, n_cells=300, n_second=100, n_genes=400, n_factors=40)
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "mine.txt"}


def test_atlas_reads_as_the_usual_h5ad(deposit: Deposit) -> None:
    atlas = deposit.atlas
    assert atlas.shape == (3000, 700)
    with h5py.File(deposit.folder / "atlas.h5ad") as file:
        assert file["X"].attrs["encoding-type"] == "csr_matrix"
        values = file["X/data"][:]
    assert values.dtype == np.float32
    assert (values >= 1).all()
    assert (values == np.rint(values)).all()
    assert atlas.obs_names.is_unique
    assert atlas.var_names.is_unique
    assert all(re.fullmatch(r"[ACGT]{16}-[1-9]", name) for name in atlas.obs_names)
    assert all(re.fullmatch(r"ENSG\d{11}", name) for name in atlas.var_names)
    assert (atlas.var["symbol"] == atlas.var["symbol"].str.upper()).all()
    assert atlas.var["symbol"].is_unique
    assert list(atlas.obs) == ["cell_type", "donor", "batch", "age", "tissue", "droplet"]
    assert atlas.obs["donor"].nunique() == 6
    assert atlas.obs["batch"].nunique() == 3
    assert atlas.obs["cell_type"].nunique() == 6
    assert atlas.obs["tissue"].nunique() == 1
    assert (atlas.obs.groupby("donor", observed=True)["age"].nunique() == 1).all()
    assert 20 <= atlas.obs["cell_type"].isna().sum() <= 100


def test_second_reads_with_loompy_and_differs_in_donors_and_platform(deposit: Deposit) -> None:
    with loompy.connect(str(deposit.folder / "second.loom"), mode="r") as loom:  # connect validates the file
        counts = loom[:, :].T
        assert loom.ra.Accession.tolist() == deposit.atlas.var_names.tolist()
        assert loom.ra.Gene.tolist() == deposit.atlas.var["symbol"].tolist()
        assert len(set(loom.ca.CellID)) == 1000
        assert len(set(loom.ca.donor)) == 4
        assert not set(loom.ca.donor) & set(deposit.atlas.obs["donor"])
        assert set(loom.ca.cell_type) == set(deposit.atlas.obs["cell_type"].cat.categories)
        assert loom.attrs.LOOM_SPEC_VERSION == "3.0.0"
    assert counts.shape == (1000, 700)
    assert counts.dtype == np.int32
    assert counts.min() == 0
    assert np.median(counts.sum(axis=1)) < 0.75 * np.median(deposit.counts.sum(axis=1))
    # gene-wise efficiency: the mean profiles differ by more than depth
    nuclear = ~deposit.atlas.var["symbol"].str.startswith("MT-").to_numpy()
    common = nuclear & (counts.mean(axis=0) > 0.3) & (deposit.counts.mean(axis=0) > 0.3)
    ratio = np.log(counts[:, common].mean(axis=0) / deposit.counts[:, common].mean(axis=0))
    assert 0.25 < ratio.std() < 0.6


def test_truth_agrees_with_the_files(deposit: Deposit) -> None:
    truth = json.loads((deposit.folder / "truth.json").read_text())
    assert truth == json.loads(json.dumps(deposit.truth))
    assert (truth["step"], truth["inputs"]) == ("simulate", {})
    table = factor_table(deposit)
    assert len(table) == 120
    assert table["label"].value_counts().to_dict() == {"sensitive": 60, "insensitive": 60}
    assert (table["column"] >= 0).all()
    assert table["symbol"].tolist() == deposit.atlas.var["symbol"].loc[table["gene_id"]].tolist()
    targets = set(deposit.atlas.var_names[deposit.atlas.var["gene_type"] == "target"])
    assert {gene for programme in truth["programmes"] for gene in programme} == targets
    pairs: dict[int, list[dict[str, Any]]] = {}
    for factor in truth["factors"]:
        assert len(factor["targets"]) == factor["out_degree"] > 0
        assert factor["targets"].keys() <= targets
        pairs.setdefault(factor["pair"], []).append(factor)
    for pair in pairs.values():
        assert {factor["label"] for factor in pair} == {"sensitive", "insensitive"}
        assert len({factor["programme"] for factor in pair}) == 1
    droplets = deposit.atlas.obs["droplet"].value_counts().to_dict()
    assert truth["droplets"]["atlas"] == droplets
    assert set(droplets) == {"cell", "dying", "doublet", "empty"}


def test_the_network_does_not_depend_on_the_number_of_cells(small: Deposit, tmp_path: Path) -> None:
    other = simulate(tmp_path, seed=5, n_cells=400, n_second=100, n_genes=400, n_factors=40)
    assert other["factors"] == small.truth["factors"]


# Distributions


def test_depth_sparsity_and_mitochondrial_share_are_realistic(deposit: Deposit) -> None:
    depth = deposit.counts.sum(axis=1)
    assert 1200 < np.median(depth) < 1800
    assert 0.35 < np.log(depth[healthy_cells(deposit)]).std() < 0.7
    assert 0.55 < (deposit.counts == 0).mean() < 0.7
    detected = (deposit.counts > 0).sum(axis=1)
    assert 240 < np.median(detected) < 320
    assert np.quantile(detected, 0.95) - np.quantile(detected, 0.05) > 120
    share = mitochondrial_fraction(deposit)
    droplet = deposit.atlas.obs["droplet"].to_numpy()
    assert 0.04 < np.median(share[droplet == "cell"]) < 0.1
    assert share[droplet == "cell"].std() > 0.015
    assert np.median(share[droplet == "dying"]) > 0.35
    assert np.median(depth[droplet == "doublet"]) > 1.6 * np.median(depth[droplet == "cell"])
    assert np.median(depth[droplet == "empty"]) < 40


def test_counts_are_overdispersed_even_within_type_and_donor(deposit: Deposit) -> None:
    obs = deposit.atlas.obs
    group = (
        (obs["cell_type"] == "type_1a") & (obs["donor"] == obs["donor"].iloc[0]) & (obs["droplet"] == "cell")
    )
    counts = deposit.counts[group.to_numpy()]
    mean, variance = counts.mean(axis=0), counts.var(axis=0, ddof=1)
    well_seen = mean > 1
    assert well_seen.sum() > 100
    assert (variance > mean)[well_seen].mean() > 0.95
    assert np.median(variance[well_seen] / mean[well_seen]) > 1.5


def test_there_is_a_batch_effect(deposit: Deposit) -> None:
    """Within one cell type, donors differ in single genes by more than halves of one donor do."""
    cells = healthy_cells(deposit) & (deposit.atlas.obs["cell_type"] == "type_1a").to_numpy()
    values, donors = log_normalised(deposit.counts[cells]), deposit.atlas.obs["donor"].to_numpy()[cells]
    first, second = (values[donors == f"atlas_donor_{number}"] for number in (1, 3))  # of different libraries
    between = np.abs(first.mean(axis=0) - second.mean(axis=0)).mean()
    within = np.abs(first[::2].mean(axis=0) - first[1::2].mean(axis=0)).mean()
    assert between > 1.2 * within


# The two tasks


def test_mean_detection_and_variance_do_not_tell_sensitive_factors(deposit: Deposit) -> None:
    table = factor_table(deposit)
    sensitive = table["label"] == "sensitive"
    counts = deposit.counts[:, table["column"]]
    predictors = {
        "mean": counts.mean(axis=0),
        "detection": (counts > 0).mean(axis=0),
        "dispersion": counts.var(axis=0) / counts.mean(axis=0),
        "mean when detected": counts.sum(axis=0) / (counts > 0).sum(axis=0),
        "position": table["column"],
    }
    for name, predictor in predictors.items():
        assert 0.4 <= roc_auc_score(sensitive, predictor) <= 0.6, name


def test_the_oracle_tells_them_and_permuted_labels_do_not(deposit: Deposit) -> None:
    table = factor_table(deposit)
    sensitive = (table["label"] == "sensitive").to_numpy()
    assert 0.95 <= roc_auc_score(sensitive, table["out_degree"]) < 1
    rng = np.random.default_rng(0)
    permuted = [roc_auc_score(rng.permutation(sensitive), table["out_degree"]) for _ in range(200)]
    assert abs(np.mean(permuted) - 0.5) < 0.02


def test_coexpression_carries_the_out_degree(deposit: Deposit) -> None:
    """Summed squared correlation of a factor with all other genes, depth and cell type taken out."""
    table = factor_table(deposit)
    cells = healthy_cells(deposit)
    values = log_normalised(deposit.counts[cells])
    known = np.column_stack(
        [
            np.log(deposit.counts[cells].sum(axis=1)),
            pd.get_dummies(deposit.atlas.obs["cell_type"][cells]).to_numpy(float),
        ]
    )
    values -= known @ np.linalg.lstsq(known, values, rcond=None)[0]
    values /= values.std(axis=0) + 1e-9
    others = np.flatnonzero(deposit.atlas.var["gene_type"].isin(["target", "stable"]))
    correlation = values[:, table["column"]].T @ values[:, others] / len(values)
    degree = (correlation**2).sum(axis=1)
    assert roc_auc_score(table["label"] == "sensitive", degree) > 0.65


def test_cell_types_are_found_in_held_out_donors_but_the_close_ones_not_always(deposit: Deposit) -> None:
    cells = healthy_cells(deposit)
    values = log_normalised(deposit.counts[cells])
    obs = deposit.atlas.obs[cells]
    types, donors = obs["cell_type"].astype(str).to_numpy(), obs["donor"].to_numpy()
    test = np.isin(donors, sorted(set(donors))[:2])
    space = PCA(30, random_state=0).fit(values[~test])
    classifier = LogisticRegression(max_iter=1000).fit(space.transform(values[~test]), types[~test])
    predicted = classifier.predict(space.transform(values[test]))
    assert f1_score(types[test], predicted, average="macro") > 0.8
    close = f1_score(types[test], predicted, labels=["type_1a", "type_1b"], average=None)
    assert (close > 0.5).all()
    assert (close < 0.97).all()


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed -1 is negative"),
        ({"n_cells": 50}, "50 cells can't hold"),
        ({"n_second": 10}, "10 cells in the second dataset can't hold"),
        ({"n_factors": 31}, "31 factors can't be paired"),
        ({"n_genes": 200}, "ask for at least 283"),
    ],
)
def test_sizes_out_of_range_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_unwritable_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't write here"):
        simulate(tmp_path / "file", n_cells=300, n_second=100)


def test_a_large_file_starts_with_the_cells_of_a_smaller_one(tmp_path: Path) -> None:
    large.write_large(tmp_path / "a.h5ad", n_cells=150, median_counts=400, seed=3)
    n = large.write_large(tmp_path / "b.h5ad", n_cells=40, median_counts=400, seed=3, compressed=True)
    a, b = (anndata.read_h5ad(tmp_path / name) for name in ("a.h5ad", "b.h5ad"))
    assert b.n_obs == 40
    assert b.X.nnz == n
    assert (a[:40].X != b.X).nnz == 0
    assert a.obs["cell_type"].astype(str)[:40].tolist() == b.obs["cell_type"].astype(str).tolist()
    assert list(b.obs) == ["cell_type", "donor", "library"]
    with open_counts(tmp_path / "a.h5ad") as source:
        blocks = list(source.blocks())
    totals = np.concatenate([row_totals(block.indptr, block.data) for block in blocks])
    assert totals.min() >= 40
    assert np.median(totals) == pytest.approx(400, rel=0.2)
