"""Maps of cells: deterministic, said where subsampled, small datasets handled."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from cellformers import maps
from cellformers.errors import UserError
from cellformers.io.files import digest_arrays, read_metadata, read_table
from cellformers.maps import layout, principal_components, umap


def write_embeddings(path: Path, n: int, *, groups: int = 3, seed: int = 0) -> np.ndarray:
    """An embedding .h5ad as `gather` writes it; returns the group of each cell."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, n)
    vectors = (rng.normal(0, 6, (groups, 60))[group] + rng.normal(0, 1, (n, 60))).astype(np.float32)
    obs = pd.DataFrame({"donor": "d1"}, index=[f"cell{i}" for i in range(n)])
    anndata.AnnData(obs=obs, obsm={f"X_{path.stem}": vectors}).write_h5ad(path)
    return group


def read_xy(path: Path) -> np.ndarray:
    table = read_table(path)
    assert table.column_names == ["cell_id", "umap_1", "umap_2"]
    return np.column_stack([table["umap_1"].to_numpy(), table["umap_2"].to_numpy()])


def test_groups_come_apart_and_runs_agree(tmp_path: Path) -> None:
    group = write_embeddings(tmp_path / "small.h5ad", 200)
    assert umap(tmp_path / "small.h5ad", tmp_path / "a.parquet", seed=1) == 200
    umap(tmp_path / "small.h5ad", tmp_path / "b.parquet", seed=1)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    xy = read_xy(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet")["cell_id"].to_pylist() == [f"cell{i}" for i in range(200)]
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    assert (group[distance.argmin(axis=1)] == group).all()
    made = read_metadata(tmp_path / "a.parquet")
    assert made["step"] == "map"
    assert made["parameters"]["method"] == "umap"
    assert made["parameters"]["subsampled"] is False


def test_many_cells_are_subsampled_and_said(tmp_path: Path) -> None:
    write_embeddings(tmp_path / "small.h5ad", 120)
    assert umap(tmp_path / "small.h5ad", tmp_path / "a.parquet", max_cells=50) == 50
    parameters = read_metadata(tmp_path / "a.parquet")["parameters"]
    assert (parameters["n_cells"], parameters["n_shown"], parameters["subsampled"]) == (120, 50, True)
    ids = read_table(tmp_path / "a.parquet")["cell_id"].to_pylist()
    assert ids == sorted(set(ids), key=lambda name: int(name.removeprefix("cell")))
    assert ids != [f"cell{i}" for i in range(50)]


def test_what_is_read_in_pieces_is_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maps, "ROWS", 7)
    write_embeddings(tmp_path / "small.h5ad", 120)
    whole = anndata.read_h5ad(tmp_path / "small.h5ad")
    vectors = np.asarray(whole.obsm["X_small"])
    names, shown, total, digest = maps._drawn(tmp_path / "small.h5ad", "small", max_cells=50, seed=3)
    chosen = np.sort(np.random.default_rng(3).choice(120, 50, replace=False))
    assert names.to_pylist() == whole.obs_names[chosen].tolist()
    np.testing.assert_array_equal(shown, vectors[chosen])
    assert (total, digest) == (120, digest_arrays(np.asarray(whole.obs_names, dtype=object), vectors))


@pytest.mark.parametrize("n", [1, 2, 3, 14])
def test_few_cells_get_principal_components(tmp_path: Path, n: int) -> None:
    write_embeddings(tmp_path / "small.h5ad", n)
    assert umap(tmp_path / "small.h5ad", tmp_path / "a.parquet") == n
    assert np.isfinite(read_xy(tmp_path / "a.parquet")).all()
    assert read_metadata(tmp_path / "a.parquet")["parameters"]["method"] == "principal components"


@pytest.mark.parametrize("n", [15, 16])
def test_just_enough_cells(tmp_path: Path, n: int) -> None:
    write_embeddings(tmp_path / "small.h5ad", n)
    umap(tmp_path / "small.h5ad", tmp_path / "a.parquet")
    assert np.isfinite(read_xy(tmp_path / "a.parquet")).all()


def test_equal_cells_have_a_map() -> None:
    assert np.isfinite(layout(np.ones((40, 8), np.float32))).all()
    vectors = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    vectors[:30] = vectors[0]
    assert np.isfinite(layout(vectors)).all()


def test_principal_components_are_those_of_the_covariance() -> None:
    X = np.random.default_rng(0).normal(size=(50, 4)) @ np.diag([5, 3, 1, 0.1])
    centred = X - X.mean(axis=0)
    _, values, axes = np.linalg.svd(centred, full_matrices=False)
    found = principal_components(X, 2)
    np.testing.assert_allclose(np.abs(found), np.abs(centred @ axes[:2].T), atol=1e-8)
    np.testing.assert_allclose((found**2).sum(axis=0), values[:2] ** 2)
    assert principal_components(X[:, :1], 2)[:, 1].tolist() == [0.0] * 50


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        umap(tmp_path / "none.h5ad", tmp_path / "a.parquet")
    write_embeddings(tmp_path / "small.h5ad", 20)
    with pytest.raises(UserError, match=r"has no obsm\['X_smal'\]; did you mean 'X_small'"):
        umap(tmp_path / "small.h5ad", tmp_path / "a.parquet", name="smal")
    (tmp_path / "text.h5ad").write_text("no")
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        umap(tmp_path / "text.h5ad", tmp_path / "a.parquet")
    broken = anndata.AnnData(obs=pd.DataFrame(index=["a"]), obsm={"X_nan": np.array([[np.nan, 1.0]])})
    broken.write_h5ad(tmp_path / "nan.h5ad")
    with pytest.raises(UserError, match="not finite"):
        umap(tmp_path / "nan.h5ad", tmp_path / "a.parquet")
    assert not (tmp_path / "a.parquet").exists()
