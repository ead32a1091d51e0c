"""One file in, the same file with an embedding out: nothing of the user's is lost, and a stopped run goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import loompy
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from command_line import make_adata, make_counts
from token_files import make_model, make_vocabulary

import cellformers.embed_file as module
import cellformers.embedding
from cellformers.embed_file import embed_file
from cellformers.errors import UserError
from cellformers.io.files import digest_file
from cellformers.io.source import ReadOptions

N_CELLS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small", make_vocabulary(special="v2"))


@pytest.fixture(scope="module")
def rich() -> anndata.AnnData:
    """A file with something everywhere."""
    adata = make_adata()
    rng = np.random.default_rng(1)
    adata.obs["filter_pass"] = [0 if i in (3, 17) else 1 for i in range(N_CELLS)]
    adata.obs["donor"] = pd.Categorical(rng.choice(["d1", "d2"], N_CELLS))
    adata.obs["age"] = rng.integers(20, 80, N_CELLS)
    adata.var["symbol"] = [f"G{i}" for i in range(adata.n_vars)]
    adata.layers["scaled"] = sp.csr_matrix(adata.X * 0.5)
    adata.obsm["X_pca"] = rng.normal(size=(N_CELLS, 4))
    adata.obsp["mine"] = sp.identity(N_CELLS, format="csr")
    adata.varm["loadings"] = rng.normal(size=(adata.n_vars, 4))
    adata.uns["title"] = "theirs"
    adata.uns["colors"] = {"donor": np.array(["red", "blue"])}
    return adata


@pytest.fixture(scope="module")
def source(rich: anndata.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rich") / "mine.h5ad"
    rich.write_h5ad(path, compression="gzip")
    return path


@pytest.fixture(scope="module")
def made(source: Path, model: Path) -> Path:
    """The file embedded with everything at its default."""
    output = source.with_name("embedded.h5ad")
    before = digest_file(source)
    embed_file(source, model, output, quiet=True)
    assert digest_file(source) == before
    return output


def vectors(path: Path, name: str = "small") -> np.ndarray:
    return anndata.read_h5ad(path).obsm[f"X_{name}"]


# --- what is written ---------------------------------------------------------------------------------------


def test_what_was_there_is_kept(rich: anndata.AnnData, made: Path) -> None:
    adata = anndata.read_h5ad(made)
    assert (adata.X != rich.X).nnz == 0
    assert adata.X.dtype == rich.X.dtype
    pd.testing.assert_frame_equal(adata.obs, rich.obs)
    pd.testing.assert_frame_equal(adata.var, rich.var)
    assert (adata.layers["scaled"] != rich.layers["scaled"]).nnz == 0
    assert np.array_equal(adata.obsm["X_pca"], rich.obsm["X_pca"])
    assert (adata.obsp["mine"] != rich.obsp["mine"]).nnz == 0
    assert np.array_equal(adata.varm["loadings"], rich.varm["loadings"])
    assert adata.uns["title"] == "theirs"
    assert adata.uns["colors"]["donor"].tolist() == ["red", "blue"]
    assert set(adata.obsm) == {"X_pca", "X_small", "X_umap_small"}
    assert set(adata.obsp) == {"mine", "small_distances", "small_connectivities"}
    assert set(adata.uns) == {"title", "colors", "small"}


def test_cells_are_in_file_order_and_excluded_ones_are_nan(made: Path, model: Path, tmp_path: Path) -> None:
    """Every cell's vector is the one it gets in a file of its own."""
    found = vectors(made)
    assert found.shape == (N_CELLS, 32)
    assert found.dtype == np.float32
    assert np.flatnonzero(np.isnan(found).any(1)).tolist() == [3, 17]
    assert np.isnan(found[[3, 17]]).all()
    adata = make_adata()
    for cell in (0, 4, 39):
        adata[[cell]].copy().write_h5ad(tmp_path / "one.h5ad")
        embed_file(tmp_path / "one.h5ad", model, tmp_path / "e.h5ad", quiet=True)
        assert np.array_equal(vectors(tmp_path / "e.h5ad")[0], found[cell])


def test_a_cell_without_a_gene_of_the_vocabulary_is_nan(model: Path, tmp_path: Path) -> None:
    counts = make_counts()
    counts[5] = 0
    make_adata(counts).write_h5ad(tmp_path / "in.h5ad")
    for mode in ("cls", "cell"):
        embed_file(
            tmp_path / "in.h5ad", model, tmp_path / "e.h5ad", name="e", mode=mode, umap=False, quiet=True
        )
        assert np.flatnonzero(np.isnan(vectors(tmp_path / "e.h5ad", "e")).any(1)).tolist() == [5]


def test_scanpy_goes_on_from_the_neighbours(made: Path) -> None:
    adata = sc.read_h5ad(made)
    connectivities = sc.Neighbors(adata, neighbors_key="small").connectivities
    degrees = np.diff(connectivities.tocsr().indptr)
    assert connectivities.shape == (N_CELLS, N_CELLS)
    assert degrees[[3, 17]].tolist() == [0, 0]
    assert degrees[np.delete(np.arange(N_CELLS), [3, 17])].min() >= 1
    assert abs(connectivities - connectivities.T).max() == 0
    distances = adata.obsp["small_distances"]
    vector = adata.obsm["X_small"]
    a, b = (int(i[0]) for i in distances.nonzero())
    assert distances[a, b] == pytest.approx(np.linalg.norm(vector[a] - vector[b]), rel=1e-4)
    coordinates = adata.obsm["X_umap_small"]
    assert np.flatnonzero(np.isnan(coordinates).any(1)).tolist() == [3, 17]
    sc.tl.umap(adata, neighbors_key="small", random_state=0)
    sc.tl.diffmap(adata[adata.obs.filter_pass == 1].copy(), neighbors_key="small")


def test_neighbours_are_scanpys_own(made: Path) -> None:
    ours = sc.read_h5ad(made)
    kept = ours[ours.obs.filter_pass == 1].copy()
    sc.pp.neighbors(kept, use_rep="X_small", key_added="theirs", random_state=0)
    assert abs(kept.obsp["theirs_connectivities"] - kept.obsp["small_connectivities"]).max() < 1e-6
    theirs, small = kept.uns["theirs"], kept.uns["small"]
    assert set(theirs) == set(small)
    assert {k: small["params"][k] for k in theirs["params"]} == theirs["params"]


def test_neighbours_of_many_cells_are_sought_among_principal_components(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXACT", 30)
    monkeypatch.setattr(module, "WHOLE", 30)
    monkeypatch.setattr(module, "COMPONENTS", 5)
    embed_file(source, model, tmp_path / "many.h5ad", quiet=True)
    many = sc.read_h5ad(tmp_path / "many.h5ad")
    assert many.uns["small"]["params"]["principal_components"] == 5
    kept = np.flatnonzero(many.obs.filter_pass == 1)
    assert np.isfinite(many.obsm["X_umap_small"][kept]).all()
    vectors = many.obsm["X_small"][kept].astype(np.float64)
    left, sizes, _ = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    components = left[:, :5] * sizes[:5]
    distance = np.linalg.norm(components[:, None] - components[None], axis=-1)
    found = many.obsp["small_distances"][kept][:, kept].toarray()
    near = np.argsort(distance, axis=1)[:, 1:14]
    assert (found[np.arange(len(kept))[:, None], near] > 0).mean() > 0.9
    np.testing.assert_allclose(found[found > 0], distance[found > 0], rtol=1e-3)


def test_few_cells_have_no_neighbours(model: Path, tmp_path: Path) -> None:
    make_adata(make_counts(14)).write_h5ad(tmp_path / "in.h5ad")
    embed_file(tmp_path / "in.h5ad", model, tmp_path / "e.h5ad", quiet=True)
    adata = anndata.read_h5ad(tmp_path / "e.h5ad")
    assert set(adata.obsm) == {"X_small"}
    assert not adata.obsp
    make_adata(make_counts(15)).write_h5ad(tmp_path / "in.h5ad")
    embed_file(tmp_path / "in.h5ad", model, tmp_path / "e.h5ad", quiet=True)
    assert anndata.read_h5ad(tmp_path / "e.h5ad").uns["small"]["params"]["n_neighbors"] == 14


def test_another_embedding_joins_the_first(made: Path, model: Path, tmp_path: Path) -> None:
    embed_file(made, model, tmp_path / "two.h5ad", name="last", layer=0, mode="cell", umap=False, quiet=True)
    adata = anndata.read_h5ad(tmp_path / "two.h5ad")
    assert set(adata.obsm) == {"X_pca", "X_small", "X_umap_small", "X_last"}
    assert np.array_equal(adata.obsm["X_small"], vectors(made), equal_nan=True)
    embed_file(made, model, tmp_path / "again.h5ad", umap=False, quiet=True)
    assert np.array_equal(vectors(tmp_path / "again.h5ad"), vectors(made), equal_nan=True)


# --- other formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["loom", "csv", "genes in rows", "10x.h5"])
def test_other_formats_become_an_h5ad(model: Path, tmp_path: Path, kind: str) -> None:
    adata = make_adata()
    dense = adata.X.toarray().astype(np.int64)
    frame = pd.DataFrame(dense, index=adata.obs_names, columns=adata.var_names)
    path = tmp_path / {"loom": "in.loom", "10x.h5": "in.h5"}.get(kind, "in.csv")
    if kind == "loom":
        attributes = {"CellID": adata.obs_names.to_numpy(str), "type": adata.obs["type"].to_numpy(str)}
        loompy.create(str(path), dense.T, {"Accession": adata.var_names.to_numpy(str)}, attributes)
    elif kind == "10x.h5":
        write_tenx(path, adata)
    else:
        (frame if kind == "csv" else frame.T).to_csv(path)
    adata.write_h5ad(tmp_path / "in.h5ad")
    options = ReadOptions(genes_in_rows=kind == "genes in rows") if path.suffix == ".csv" else None
    embed_file(path, model, tmp_path / "e.h5ad", umap=False, options=options, quiet=True)
    embed_file(tmp_path / "in.h5ad", model, tmp_path / "wanted.h5ad", umap=False, quiet=True)
    found = sc.read_h5ad(tmp_path / "e.h5ad")
    assert np.array_equal(found.obsm["X_small"], vectors(tmp_path / "wanted.h5ad"))
    assert np.array_equal(found.X.toarray(), dense)
    assert found.obs_names.tolist() == adata.obs_names.tolist()
    assert found.var_names.tolist() == adata.var_names.tolist()
    if kind == "loom":
        assert found.obs["type"].tolist() == adata.obs["type"].tolist()


def write_tenx(path: Path, adata: anndata.AnnData) -> None:
    """What Cell Ranger 3 writes."""
    matrix = adata.X.tocsr()
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(adata.obs_names, dtype="S")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name).astype(np.int64)
        group["shape"] = np.array([adata.n_vars, adata.n_obs])
        features = group.create_group("features")
        features["id"] = features["name"] = np.array(adata.var_names, dtype="S")
        features["feature_type"] = np.array(["Gene Expression"] * adata.n_vars, dtype="S")


def test_counts_from_a_layer_and_numbered_cells(model: Path, tmp_path: Path) -> None:
    adata = make_adata()
    adata.write_h5ad(tmp_path / "plain.h5ad")
    adata.layers["umis"] = adata.X.copy()
    adata.X = adata.X.log1p()
    adata.obs_names = ["same"] * 2 + adata.obs_names[2:].tolist()
    adata.write_h5ad(tmp_path / "odd.h5ad")
    options = ReadOptions(layer="umis", make_unique=True)
    embed_file(tmp_path / "odd.h5ad", model, tmp_path / "o.h5ad", umap=False, options=options, quiet=True)
    embed_file(tmp_path / "plain.h5ad", model, tmp_path / "p.h5ad", umap=False, quiet=True)
    assert np.array_equal(vectors(tmp_path / "o.h5ad"), vectors(tmp_path / "p.h5ad"))


# --- stopped and gone on -----------------------------------------------------------------------------------


class Stopped(BaseException):
    """Stands for a signal."""


Embed = Callable[..., Any]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The blocks that were computed; blocks are of 10 cells."""
    done: list[Path] = []
    genuine: Embed = cellformers.embedding.embed_cells

    def embed_cells(block: Path, *arguments: Any, **options: Any) -> Any:
        done.append(block)
        return genuine(block, *arguments, **options)

    monkeypatch.setattr(module, "BLOCK_CELLS", 10)
    monkeypatch.setattr(cellformers.embedding, "embed_cells", embed_cells)
    return done


def stop_at_block(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The next run ends when it comes to that block."""
    counting: Embed = cellformers.embedding.embed_cells

    def embed_cells(block: Path, *arguments: Any, **options: Any) -> Any:
        if f"-{number:06d}" in block.name:
            monkeypatch.setattr(cellformers.embedding, "embed_cells", counting)
            raise Stopped
        return counting(block, *arguments, **options)

    monkeypatch.setattr(cellformers.embedding, "embed_cells", embed_cells)


@pytest.fixture
def stopped(
    source: Path, model: Path, tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The output of a run that was stopped after two of four blocks."""
    output = tmp_path / "e.h5ad"
    stop_at_block(monkeypatch, 2)
    with pytest.raises(Stopped):
        embed_file(source, model, output, umap=False, quiet=True)
    assert not output.exists()
    assert len(list((tmp_path / "e.h5ad.parts").glob("embedding-*"))) == len(counted) == 2
    counted.clear()
    return output


def test_a_stopped_run_goes_on(
    source: Path, model: Path, made: Path, stopped: Path, counted: list[Path]
) -> None:
    embed_file(source, model, stopped, umap=False, quiet=True)
    assert len(counted) == 2
    assert np.array_equal(vectors(stopped), vectors(made), equal_nan=True)
    assert [p.name for p in stopped.parent.iterdir()] == ["e.h5ad"]


def test_the_result_is_that_of_an_undisturbed_run(
    source: Path, model: Path, stopped: Path, counted: list[Path]
) -> None:
    embed_file(source, model, stopped, quiet=True)
    embed_file(source, model, stopped.with_name("whole.h5ad"), quiet=True)
    a, b = anndata.read_h5ad(stopped), anndata.read_h5ad(stopped.with_name("whole.h5ad"))
    for key in ("X_small", "X_umap_small"):
        assert np.array_equal(a.obsm[key], b.obsm[key], equal_nan=True)
    for key in ("small_distances", "small_connectivities"):
        assert (a.obsp[key] != b.obsp[key]).nnz == 0


def test_what_changed_in_between_is_not_mixed_up(
    rich: anndata.AnnData, source: Path, model: Path, stopped: Path, counted: list[Path], tmp_path: Path
) -> None:
    """Other weights, other options, other cells under the same names: all blocks are computed."""
    other = make_model(tmp_path / "other" / "small", make_vocabulary(special="v2"), seed=1)
    fewer = rich.copy()
    fewer.obs["filter_pass"] = [0] * 4 + [1] * (N_CELLS - 4)
    fewer.write_h5ad(tmp_path / "fewer.h5ad")
    parts = stopped.with_name("e.h5ad.parts")
    kept = {p.name: p.read_bytes() for p in parts.iterdir()}
    cases: list[tuple[Path, Path, dict[str, Any], int]] = [
        (source, other, {}, 4),
        (source, model, {"layer": 0}, 4),
        (source, model, {"mode": "cell"}, 4),
        (tmp_path / "fewer.h5ad", model, {}, 4),
        (source, model, {}, 2),
    ]
    for path, network, options, computed in cases:
        parts.mkdir(exist_ok=True)
        for name, content in kept.items():
            (parts / name).write_bytes(content)
        counted.clear()
        embed_file(path, network, stopped, umap=False, quiet=True, **options)
        assert len(counted) == computed
        fresh = tmp_path / "fresh.h5ad"
        embed_file(path, network, fresh, umap=False, quiet=True, **options)
        assert np.array_equal(vectors(stopped), vectors(fresh), equal_nan=True)


def test_a_file_of_the_same_totals_is_another_file(
    rich: anndata.AnnData, model: Path, tmp_path: Path, counted: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells with two counts exchanged: names and all totals stay, ranks don't."""
    dense = rich.X.toarray()
    for name, (low, high) in {"one": (3, 30), "two": (30, 3)}.items():
        dense[4, [10, 11]], dense[6, [10, 11]] = (low, high), (high, low)
        adata = rich.copy()
        adata.X = sp.csr_matrix(dense)
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
    stop_at_block(monkeypatch, 2)
    with pytest.raises(Stopped):
        embed_file(tmp_path / "one.h5ad", model, tmp_path / "e.h5ad", umap=False, quiet=True)
    counted.clear()
    embed_file(tmp_path / "two.h5ad", model, tmp_path / "e.h5ad", umap=False, quiet=True)
    assert len(counted) == 3  # the first block is another one, the second the same
    embed_file(tmp_path / "two.h5ad", model, tmp_path / "fresh.h5ad", umap=False, quiet=True)
    assert np.array_equal(vectors(tmp_path / "e.h5ad"), vectors(tmp_path / "fresh.h5ad"), equal_nan=True)


def test_a_mistake_does_not_cost_what_was_computed(model: Path, stopped: Path, tmp_path: Path) -> None:
    counts = make_counts()
    counts[0, 0] = -1
    make_adata(counts).write_h5ad(tmp_path / "wrong.h5ad")
    with pytest.raises(UserError, match="negative"):
        embed_file(tmp_path / "wrong.h5ad", model, stopped, quiet=True)
    assert len(list(stopped.with_name("e.h5ad.parts").glob("embedding-*"))) == 2


def test_the_time_is_estimated_after_the_first_block(
    source: Path, model: Path, tmp_path: Path, counted: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    embed_file(source, model, tmp_path / "e.h5ad", umap=False)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "to go" in line] == [
        "embed-file: about a minute to go (3 blocks of cells)"
    ]
    assert lines[-1] == f"{tmp_path / 'e.h5ad'}: 40 cells, obsm['X_small'] of width 32"


def test_a_name_with_a_slash(source: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the name 'a/b' has a slash"):
        embed_file(source, model, tmp_path / "e.h5ad", name="a/b", quiet=True)
    assert list(tmp_path.iterdir()) == []
