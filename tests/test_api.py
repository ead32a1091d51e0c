"""The functions for a notebook give what the command line gives."""

from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import make_adata, make_counts, run
from token_files import make_model, make_vocabulary

import cellformers
from cellformers.errors import UserError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small", make_vocabulary(special="v2"))


@pytest.fixture
def adata() -> anndata.AnnData:
    adata = make_adata()
    adata.obs["filter_pass"] = [0 if i == 3 else 1 for i in range(adata.n_obs)]
    adata.var["symbol"] = [f"G{i}" for i in range(adata.n_vars)]
    adata.obsm["X_pca"] = np.zeros((adata.n_obs, 2))
    return adata


@pytest.fixture
def path(adata: anndata.AnnData, tmp_path: Path) -> Path:
    adata.write_h5ad(tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


def test_tokens_are_those_of_the_command_line(
    adata: anndata.AnnData, path: Path, model: Path, tmp_path: Path
) -> None:
    tokens = cellformers.tokenize(adata, vocabulary=model / "vocabulary")
    assert run("tokenize", path, "--vocabulary", model / "vocabulary", "-o", tmp_path / "t.parquet").code == 0
    theirs = pq.read_table(tmp_path / "t.parquet")
    assert tokens.equals(theirs)
    assert tokens.schema.metadata == theirs.schema.metadata
    assert tokens.column_names == ["cell_id", "input_ids", "length"]
    assert tokens["cell_id"].to_pylist() == [name for i, name in enumerate(adata.obs_names) if i != 3]


@pytest.mark.parametrize("options", [{}, {"mode": "cell", "layer": 0, "name": "own"}])
def test_embeddings_are_those_of_the_command_line(
    adata: anndata.AnnData, path: Path, model: Path, tmp_path: Path, options: dict[str, str | int]
) -> None:
    before = adata.copy()
    assert cellformers.embed(adata, model=model, **options) is None
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = run("embed-file", path, "--model", model, "-q", "--no-umap", *words, "-o", tmp_path / "e.h5ad")
    assert done.code == 0, done
    key = f"X_{options.get('name', 'small')}"
    theirs = anndata.read_h5ad(tmp_path / "e.h5ad").obsm[key]
    assert adata.obsm[key].dtype == np.float32
    assert np.array_equal(adata.obsm[key], theirs, equal_nan=True)
    assert np.flatnonzero(np.isnan(theirs).any(1)).tolist() == [3]
    assert set(adata.obsm) == {"X_pca", key}
    assert (adata.X != before.X).nnz == 0
    assert adata.obs.equals(before.obs)
    assert list(adata.uns) == []


@pytest.mark.parametrize("where", ["layers", "named layer", "raw", "X beside raw"])
def test_counts_that_are_elsewhere(adata: anndata.AnnData, model: Path, where: str) -> None:
    plain = cellformers.tokenize(adata, vocabulary=model / "vocabulary")
    counts = adata.X.copy()
    options: dict[str, str | bool] = {}
    if where == "layers":
        adata.layers["counts"] = counts
    elif where == "named layer":
        adata.layers["umis"], options = counts, {"layer": "umis"}
    else:
        adata.raw = adata.copy()
        options = {"raw": True} if where == "raw" else {}
    adata.X = counts.log1p()
    adata.layers["more"] = counts * 0.5
    assert cellformers.tokenize(adata, vocabulary=model / "vocabulary", **options).equals(plain)


def test_views_and_dense_matrices(adata: anndata.AnnData, model: Path) -> None:
    whole = cellformers.tokenize(adata, vocabulary=model / "vocabulary")
    some = cellformers.tokenize(adata[10:20], vocabulary=model / "vocabulary")
    assert some["input_ids"].equals(whole.slice(9, 10)["input_ids"])
    adata.X = adata.X.toarray()
    assert cellformers.tokenize(adata, vocabulary=model / "vocabulary")["input_ids"].equals(
        whole["input_ids"]
    )


def test_mistakes_name_the_object(adata: anndata.AnnData, model: Path) -> None:
    for value, words in ((-1, "negative"), (np.nan, "NaN"), (0.5, "non-integer")):
        counts = make_counts()
        counts[7, 3] = value
        wrong = make_adata(counts)
        for work in (
            lambda wrong: cellformers.tokenize(wrong, vocabulary=model / "vocabulary"),
            lambda wrong: cellformers.embed(wrong, model=model),
        ):
            with pytest.raises(UserError, match=words) as error:
                work(wrong)
            assert str(error.value).startswith("adata: X holds")
        assert not wrong.obsm
    adata.obs_names = ["same"] * adata.n_obs
    with pytest.raises(UserError, match="'same'"):
        cellformers.tokenize(adata, vocabulary=model / "vocabulary")
    with pytest.raises(UserError, match="no such model directory"):
        cellformers.embed(adata, model=model / "none")
    with pytest.raises(UserError, match="did you mean 'cell'"):
        cellformers.embed(adata, model=model, mode="cel")


def test_public_names() -> None:
    assert set(cellformers.__all__) == {"__version__", "embed", "tokenize"}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cellformers.nothing
