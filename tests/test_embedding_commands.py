"""The verbs about embeddings: what their options do, and what they say about cells that were left out."""

from pathlib import Path

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import files_in, run
from token_files import make_cells, make_model, make_vocabulary, write_shards, write_tokens

from cellformers.io.files import read_metadata
from cellformers.summaries import read_states

N = 12


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, tokens in one and in three shards, and labels."""
    folder = tmp_path_factory.mktemp("house")
    vocabulary = make_vocabulary(special="v2")
    make_model(folder / "model", vocabulary)
    cells = make_cells(vocabulary, [3 + i for i in range(N)])
    write_tokens(folder / "tokens.parquet", cells, vocabulary)
    write_shards(folder, cells, vocabulary, 3)
    table = pa.table(
        {"cell_id": [f"cell{i}" for i in range(N)], "type": ["T cell", "NK T cell", "B"] * (N // 3)}
    )
    pq.write_table(table, folder / "cells.parquet")
    return folder


def ids(path: Path) -> list[str]:
    return list(dict.fromkeys(pq.read_table(path)["cell_id"].to_pylist()))


def test_embedding_chosen_cells_says_how_many(house: Path, tmp_path: Path) -> None:
    tokens, cells = house / "tokens.parquet", house / "cells.parquet"
    ran = run("embed", tokens, "--model", house / "model", "--cells", cells, "--where", "type=T cell,B",
              "--max-cells", "5", "--seed", "2", "-o", tmp_path / "e.parquet")  # fmt: skip
    assert ran.code == 0
    assert ran.err.splitlines()[0] == f"embed: 5 of the {N} cells of {tokens} are chosen"
    found = ids(tmp_path / "e.parquet")
    assert len(found) == 5
    assert found == [f"cell{i}" for i in range(N) if f"cell{i}" in found and i % 3 != 1]
    parameters = read_metadata(tmp_path / "e.parquet")["parameters"]
    assert parameters["where"] == {"type": ["B", "T cell"]}
    assert (parameters["max_cells"], parameters["seed"], parameters["mode"]) == (5, 2, "cls")


def test_embedding_all_cells_says_nothing_of_a_choice(house: Path, tmp_path: Path) -> None:
    ran = run("embed", house / "tokens.parquet", "--model", house / "model", "-o", tmp_path / "e.parquet",
              "--backend", "sdpa", "--dtype", "fp32", "--batch-tokens", "100")  # fmt: skip
    assert ran.code == 0
    assert "chosen" not in ran.err
    assert ids(tmp_path / "e.parquet") == [f"cell{i}" for i in range(N)]
    run("embed", house / "tokens.parquet", "--model", house / "model", "-o", tmp_path / "f.parquet")
    assert (tmp_path / "e.parquet").read_bytes() == (tmp_path / "f.parquet").read_bytes()


def test_from_shards_to_states(house: Path, tmp_path: Path) -> None:
    shards = []
    for i in range(3):
        shards.append(tmp_path / f"{i}.parquet")
        run("embed", house / f"3-{i}.parquet", "--model", house / "model", "--quiet", "-o", shards[-1])
    ran = run("gather", *shards, "--cells", house / "cells.parquet", "-o", tmp_path / "small.h5ad")
    assert (ran.code, ran.err) == (0, "")
    adata = anndata.read_h5ad(tmp_path / "small.h5ad")
    assert adata.obs["type"].tolist() == ["T cell", "NK T cell", "B"] * (N // 3)
    run("gather", *shards, "--cells", house / "cells.parquet", "--label", "type", "-o", tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines()[0].startswith("cell_id,type,0,1,2,")
    ran = run("summarize-embeddings", *shards, "--cells", house / "cells.parquet", "--by", "type",
              "-o", tmp_path / "a.parquet")  # fmt: skip
    assert ran.code == 0
    assert ran.err.splitlines()[-1] == f"{tmp_path / 'a.parquet'}: 3 states of {N} cells"
    ran = run("summarize-embeddings", tmp_path / "small.h5ad", "--by", "type", "--statistic", "lower_median",
              "--statistic", "mean", "-o", tmp_path / "b.parquet")  # fmt: skip
    assert ran.code == 0
    assert pq.read_schema(tmp_path / "b.parquet").names == ["state", "n_cells", "mean", "lower_median"]
    for state, vector in read_states(tmp_path / "a.parquet").items():
        assert np.array_equal(vector, read_states(tmp_path / "b.parquet", statistic="mean")[state])
        of_state = adata.obsm["X_small"][adata.obs["type"] == state]
        np.testing.assert_allclose(vector, of_state.mean(0), atol=1e-6)


def test_genes_of_a_state_and_their_occurrences(house: Path, tmp_path: Path) -> None:
    common = (house / "tokens.parquet", "--model", house / "model", "--mode", "gene",
              "--cells", house / "cells.parquet", "--where", "type=B")  # fmt: skip
    assert run("embed", *common, "--special", "-o", tmp_path / "s.parquet").code == 0
    assert run("gather-genes", tmp_path / "s.parquet", "-o", tmp_path / "g.parquet").code == 0
    means = pq.read_table(tmp_path / "g.parquet")
    assert means["gene_id"].to_pylist()[:2] == ["<cls>", "<eos>"]
    genes = means["gene_id"].to_pylist()[2:4]
    (tmp_path / "genes.txt").write_text("\n".join(genes))
    ran = run(
        "embed", *common, "--occurrences", "--genes", tmp_path / "genes.txt", "-o", tmp_path / "o.parquet"
    )
    assert ran.code == 0
    n = sum(means["n_cells"].to_pylist()[2:4])
    assert f"{tmp_path / 'o.parquet'}: {n} occurrences of 32 numbers, 0.0 GB before compression" in ran.err
    table = pq.read_table(tmp_path / "o.parquet")
    assert set(table["gene_id"].to_pylist()) == set(genes)
    assert len(table) == n
    run(
        "embed", *common, "--quiet", "--occurrences", "--genes", ",".join(genes), "-o", tmp_path / "p.parquet"
    )
    assert (tmp_path / "o.parquet").read_bytes() == (tmp_path / "p.parquet").read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--where", "type=B"], "give --cells"),
        (["--cells", "CELLS", "--where", "typ=B"], "did you mean 'type'"),
        (["--cells", "CELLS", "--where", "type=T"], "no cell has type 'T'"),
        (["--cells", "CELLS", "--where", "type"], "is not COLUMN=VALUE"),
        (["--mode", "genes"], "no embedding mode 'genes'; did you mean 'gene'"),
        (["--occurrences"], "give --mode gene"),
        (["--special", "--mode", "cell"], "give --mode gene"),
        (["--mode", "gene", "--genes", "ENSG1"], "--genes are for --occurrences"),
        (["--mode", "gene", "--occurrences", "--genes", "ENSG1"], "gene 'ENSG1' has no token"),
        (["--backend", "varlem"], "did you mean 'varlen'"),
        (["--dtype", "fp9"], "no dtype 'fp9'"),
    ],
)
def test_mistakes_end_with_one_line(house: Path, tmp_path: Path, options: list[str], words: str) -> None:
    given = [str(house / "cells.parquet") if option == "CELLS" else option for option in options]
    ran = run(
        "embed", house / "tokens.parquet", "--model", house / "model", *given, "-o", tmp_path / "e.parquet"
    )
    assert ran.code == 2
    assert words in ran.err.splitlines()[-1]
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["e.csv", "e.h5ad", "e.tsv.gz"])
def test_a_shard_has_no_name_of_another_format(house: Path, tmp_path: Path, name: str) -> None:
    ran = run("embed", house / "tokens.parquet", "--model", house / "model", "-o", tmp_path / name)
    assert ran.code == 2
    assert "embed writes a shard, in Parquet; give -o e.parquet" in ran.err
    assert files_in(tmp_path) == []
