"""Quality control: metrics, thresholds, doublets, and the cells that pass."""

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from cellformers import qc as module
from cellformers.counts import Sample, ingest
from cellformers.doublets import score_doublets
from cellformers.errors import UserError
from cellformers.io.files import read_json, read_metadata
from cellformers.qc import QCParameters, distributions, passing, qc, qc_metrics

GENES = ["ENSG00000198888", "ENSG00000198763", *(f"ENSG{i:011d}" for i in range(1, 59))]  # two mitochondrial


def dataset(folder: Path, X, *, shards: int = 1, genes=GENES, obs=None) -> tuple[list[Path], Path]:
    folder.mkdir(exist_ok=True)
    path = folder / "in.h5ad"
    frame = pd.DataFrame(obs or {}, index=[f"c{i}" for i in range(len(X))])
    var = pd.DataFrame(index=list(genes)[: X.shape[1]])
    anndata.AnnData(sp.csr_matrix(X.astype(np.float32)), obs=frame, var=var).write_h5ad(path)
    outputs = [folder / f"{i}.h5ad" for i in range(shards)]
    ingest(
        [Sample(path)], outputs, metadata=folder / "metadata.parquet", features=folder / "features.parquet"
    )
    return outputs, folder / "metadata.parquet"


def run(folder: Path, X, *, shards: int = 1, genes=GENES, obs=None, doublets=None, **parameters):
    outputs, metadata = dataset(folder, X, shards=shards, genes=genes, obs=obs)
    metrics = [path.with_suffix(".parquet") for path in outputs]
    for shard, output in zip(outputs, metrics, strict=True):
        qc_metrics(shard, output)
    summary = qc(
        metrics,
        metadata,
        output=folder / "cells.parquet",
        thresholds=folder / "thresholds.json",
        parameters=QCParameters(**parameters),
        doublets=doublets,
    )
    return pq.read_table(folder / "cells.parquet"), summary


def counts(n_cells: int = 40, n_genes: int = 60, seed: int = 0):
    return np.random.default_rng(seed).negative_binomial(1, 0.2, (n_cells, n_genes))


def test_metrics_are_those_of_the_counts(tmp_path):
    X = counts()
    X[3] = 0
    outputs, _ = dataset(tmp_path, X, shards=2)
    tables = []
    for shard in outputs:
        qc_metrics(shard, tmp_path / "m.parquet")
        tables.append(pq.read_table(tmp_path / "m.parquet"))
    table = pa.concat_tables(tables)
    assert table["n_counts"].to_pylist() == X.sum(1).tolist()
    assert table["n_genes"].to_pylist() == (X > 0).sum(1).tolist()
    expected = [
        a / b if b else None for a, b in zip(X[:, :2].sum(1).tolist(), X.sum(1).tolist(), strict=True)
    ]
    assert table["mito_fraction"].to_pylist() == expected
    assert table.schema.types == [pa.string(), pa.int64(), pa.int32(), pa.float64()]


def test_sd_thresholds_are_those_of_numpy(tmp_path):
    X = counts(200)
    X[7] *= 40
    X[8, :2] += 2000
    X[9] = 0
    X[9, :6] = 50
    table, summary = run(tmp_path, X)
    n = X.sum(1)
    mito = X[:, :2].sum(1) / n
    ok = (abs(n - n.mean()) <= 3 * n.std()) & (abs(mito - mito.mean()) <= 3 * mito.std())
    ok &= (X > 0).sum(1) >= 7
    assert not ok[[7, 8, 9]].any()
    assert table["qc_pass"].to_pylist() == ok.tolist()
    found = summary["criteria"]["n_counts"]
    assert found["mean"] == pytest.approx(n.mean())
    assert found["sd"] == pytest.approx(n.std())
    assert found["high"] == pytest.approx(n.mean() + 3 * n.std())
    assert (found["n_below"], found["n_above"]) == (0, int((n > found["high"]).sum()))
    assert summary["criteria"]["n_genes"]["n_below"] == 1
    assert (summary["n_cells"], summary["n_pass"]) == (200, int(ok.sum()))
    assert json.loads((tmp_path / "thresholds.json").read_text()) == summary


def test_the_same_bytes_for_any_number_of_shards(tmp_path):
    X = counts(60)
    seen = set()
    for shards in (1, 2, 7):
        folder = tmp_path / str(shards)
        run(folder, X, shards=shards, obs={"type": [*"ab"] * 30})
        seen.add(tuple((folder / name).read_bytes() for name in ("cells.parquet", "thresholds.json")))
    assert len(seen) == 1


def test_cells_hold_the_columns_in_order(tmp_path):
    obs = {"type": [*"ab"] * 20, "filter_pass": [0, *[1] * 39], "n_counts": [5] * 40}
    table, summary = run(tmp_path, counts(), obs=obs)
    assert table.column_names == [
        "cell_id", "n_counts", "n_genes", "mito_fraction", "filter_pass", "qc_pass", "type", "input_n_counts"
    ]  # fmt: skip
    assert table["qc_pass"][0].as_py() is False
    assert summary["criteria"]["filter_pass"] == {"n_fail": 1}
    assert "dataset" in read_metadata(tmp_path / "cells.parquet")["inputs"]


def test_without_mitochondrial_genes_the_criterion_is_skipped(tmp_path):
    table, summary = run(tmp_path, counts(n_genes=50), genes=GENES[2:])
    assert table["mito_fraction"].null_count == 40
    assert table["mito_fraction"].type == pa.float64()
    assert "no mitochondrial genes" in summary["criteria"]["mito_fraction"]["skipped"]
    assert summary["n_pass"] > 30


def test_no_spread_keeps_all(tmp_path):
    for method in ("sd", "mad"):
        X = np.tile(counts(1) + 1, (11, 1))
        table, summary = run(tmp_path / method, X, method=method)
        assert all(table["qc_pass"].to_pylist())
        for name in ("n_counts", "mito_fraction"):
            assert "keeps all" in summary["criteria"][name]["skipped"]


def test_mad_is_about_the_median_of_logs(tmp_path):
    X = counts(101)
    X[5] *= 50
    table, summary = run(tmp_path, X, method="mad", n_sd=3)
    logs = np.log1p(X.sum(1))
    reach = 3 * 1.4826 * np.median(abs(logs - np.median(logs)))
    found = summary["criteria"]["n_counts"]
    assert np.log1p(found["high"]) == pytest.approx(np.median(logs) + reach)
    assert np.log1p(found["low"]) == pytest.approx(np.median(logs) - reach)
    assert found["median"] == np.median(X.sum(1))
    assert table["qc_pass"][5].as_py() is False


def test_fixed_and_none(tmp_path):
    X = counts()
    n = X.sum(1)
    low, high = int(np.sort(n)[3]), int(np.sort(n)[-4])
    table, summary = run(
        tmp_path / "fixed", X, method="fixed", min_counts=low, max_counts=high, max_mito_fraction=0.2
    )
    mito = X[:, :2].sum(1) / n
    assert table["qc_pass"].to_pylist() == ((n >= low) & (n <= high) & (mito <= 0.2)).tolist()
    assert summary["criteria"]["n_counts"]["n_below"] == (n < low).sum()
    X[0, 3:] = 0
    table, summary = run(tmp_path / "none", X, method="none")
    assert list(summary["criteria"]) == ["n_genes"]
    assert table["qc_pass"].to_pylist() == [False] + [True] * 39
    table, _ = run(tmp_path / "all", X, method="none", min_genes=0)
    assert all(table["qc_pass"].to_pylist())


def test_no_cell_passes(tmp_path):
    with pytest.raises(UserError, match=r"no cell passes QC .n_genes removes 40 of 40"):
        run(tmp_path, counts(), min_genes=61)
    assert not (tmp_path / "cells.parquet").exists()
    assert not (tmp_path / "thresholds.json").exists()
    with pytest.raises(UserError, match="no QC method 'sdd'; did you mean 'sd'"):
        run(tmp_path, counts(), method="sdd")


def test_tables_must_be_of_the_same_cells(tmp_path):
    run(tmp_path / "a", counts(), shards=2)
    run(tmp_path / "b", counts(seed=1))
    more = {"output": tmp_path / "c.parquet", "thresholds": tmp_path / "t.json"}
    a = [tmp_path / "a" / f"{i}.parquet" for i in (0, 1)]
    with pytest.raises(UserError, match="give the metrics of all shards in order"):
        qc(a[::-1], tmp_path / "a" / "metadata.parquet", **more)
    with pytest.raises(UserError, match="another dataset"):
        qc([tmp_path / "b" / "0.parquet"], tmp_path / "a" / "metadata.parquet", **more)


def test_passing_finds_the_cells_of_a_shard(tmp_path):
    table, _ = run(tmp_path, counts(), min_genes=35)
    flags = table["qc_pass"].to_numpy()
    assert 0 < flags.sum() < 40
    cells = tmp_path / "cells.parquet"
    names = table["cell_id"].combine_chunks()
    assert np.array_equal(passing(cells), flags)
    assert np.array_equal(passing(cells, names.slice(13, 9)), flags[13:22])
    with pytest.raises(UserError, match="does not hold the cells"):
        passing(cells, names.take([1, 0]))
    with pytest.raises(UserError, match="does not hold the cells"):
        passing(cells, pa.array(["zzz"]))


def test_distributions_for_figures(tmp_path):
    X = counts()
    run(tmp_path, X)
    found = distributions(tmp_path / "cells.parquet", tmp_path / "thresholds.json")
    assert list(found) == ["n_counts", "n_genes", "mito_fraction"]
    assert found["n_counts"].values.tolist() == X.sum(1).tolist()
    assert found["n_genes"].low == 7
    assert found["n_genes"].high is None
    assert (
        found["mito_fraction"].high
        == read_json(tmp_path / "thresholds.json")["criteria"]["mito_fraction"]["high"]
    )


def organs(n: int = 40) -> dict[str, list]:
    """Half heart, a quarter liver and lung each; day as numbers."""
    return {"organ": ["heart", "liver", "heart", "lung"] * (n // 4), "day": [1.0, 2.0] * (n // 2)}


def test_thresholds_are_those_of_the_selected_cells(tmp_path):
    X = counts(80)
    X[1::4] *= 30  # liver: cells that would spoil every mean
    excluded = [None] * 80
    excluded[0], excluded[4], excluded[5] = "chimpanzee", "no label", "no label"
    X[0] *= 50
    table, summary = run(
        tmp_path, X, obs={**organs(80), "excluded": excluded}, where={"organ": ["heart", "lung"]}, n_sd=2
    )
    selected = np.array(
        [o != "liver" and e is None for o, e in zip(organs(80)["organ"], excluded, strict=True)]
    )
    n = X.sum(1)
    mito = X[:, :2].sum(1) / n
    ok = selected.copy()
    for values in (n, mito):
        ok &= abs(values - values[selected].mean()) <= 2 * values[selected].std()
    assert table["qc_pass"].to_pylist() == ok.tolist()
    assert table.num_rows == 80
    criteria = summary["criteria"]
    assert list(criteria)[:3] == ["where", "excluded: chimpanzee", "excluded: no label"]
    assert [criteria[name] for name in list(criteria)[:3]] == [{"n_fail": 20}, {"n_fail": 1}, {"n_fail": 1}]
    assert criteria["n_counts"]["mean"] == pytest.approx(n[selected].mean())
    assert (
        criteria["n_counts"]["n_fail"]
        == (abs(n - n[selected].mean())[selected] > 2 * n[selected].std()).sum()
    )
    assert (summary["n_selected"], summary["n_pass"]) == (58, int(ok.sum()))
    assert table.column_names == [
        "cell_id", "n_counts", "n_genes", "mito_fraction", "qc_pass", "organ", "day", "excluded"
    ]  # fmt: skip
    assert table["excluded"].to_pylist() == excluded
    shown = distributions(tmp_path / "cells.parquet", tmp_path / "thresholds.json")["n_counts"]
    assert shown.values.tolist() == n[selected].tolist()
    assert shown.passes.tolist() == ok[selected].tolist()


def test_conditions_on_several_columns_are_all_required(tmp_path):
    where = {"day": ["1"], "organ": ["heart"]}
    table, summary = run(tmp_path / "a", counts(), obs=organs(), where=where, method="none", min_genes=0)
    assert table["qc_pass"].to_pylist() == [o == "heart" for o in organs()["organ"]]
    assert summary["parameters"]["where"] == where
    reverse = {"organ": ["heart", "heart"], "day": ["1"]}
    _, again = run(tmp_path / "b", counts(), obs=organs(), where=reverse, method="none", min_genes=0)
    assert again == summary
    with pytest.raises(UserError, match=r"no column 'orgn'.*did you mean 'organ'"):
        run(tmp_path / "c", counts(), obs=organs(), where={"orgn": ["heart"]})
    with pytest.raises(UserError, match=r"no cell has organ 'hart'.*did you mean 'heart'"):
        run(tmp_path / "c", counts(), obs=organs(), where={"organ": ["heart", "hart"]})
    with pytest.raises(UserError, match=r"no cell passes QC .where removes 40 of 40"):
        run(tmp_path / "c", counts(), obs=organs(), where={"organ": ["heart"], "day": ["2"]})


def test_the_reason_that_took_most_is_told_first(tmp_path):
    obs = {**organs(), "excluded": [None, "late", "mixed", "late"] * 10}
    with pytest.raises(
        UserError, match=r"QC .excluded: late removes 20 of 40, excluded: mixed removes 10 of 40, n_g"
    ):
        run(tmp_path, counts(), obs=obs, min_genes=61)
    assert not (tmp_path / "cells.parquet").exists()


def test_what_the_column_excluded_may_hold(tmp_path):
    every = {"method": "none", "min_genes": 0}
    table, summary = run(tmp_path / "none", counts(), obs={"excluded": [np.nan] * 40}, **every)
    assert all(table["qc_pass"].to_pylist())
    assert list(summary["criteria"]) == ["n_genes"]
    table, summary = run(tmp_path / "flags", counts(), obs={"excluded": [True, False] * 20}, **every)
    assert table["qc_pass"].to_pylist() == [False, True] * 20
    assert summary["criteria"]["excluded: yes"] == {"n_fail": 20}
    category = pd.Categorical(["", "x", "y", "x"] * 10)
    table, summary = run(tmp_path / "category", counts(), obs={"excluded": category}, **every)
    assert table["qc_pass"].to_pylist() == [True, False, False, False] * 10
    assert summary["criteria"]["excluded: x"] == {"n_fail": 20}
    with pytest.raises(UserError, match=r"'excluded' holds int64, no reasons.*give the column another name"):
        run(tmp_path / "numbers", counts(), obs={"excluded": [0, 1] * 20}, **every)


def test_so_many_cells_are_drawn_whatever_the_shards_and_the_order(tmp_path):
    X = counts(60)
    obs = organs(60)
    X[2, 3:] = 0
    drawn = {}
    for shards in (1, 3):
        table, summary = run(
            tmp_path / str(shards), X, shards=shards, obs=obs, where={"organ": ["heart"]}, max_cells=7, seed=3
        )
        drawn[shards] = (tmp_path / str(shards) / "cells.parquet").read_bytes()
    assert drawn[1] == drawn[3]
    kept = table.filter(table["qc_pass"])
    assert kept.num_rows == summary["n_pass"] == 7
    assert set(kept["organ"].to_pylist()) == {"heart"}
    assert kept["n_genes"].to_numpy().min() >= 7
    assert table["cell_id"].to_pylist() == [f"c{i}" for i in range(60)]
    all_but = summary["criteria"]["max_cells"]["n_fail"]
    plain, before = run(tmp_path / "plain", X, obs=obs, where={"organ": ["heart"]})
    assert all_but == before["n_pass"] - 7
    assert before["criteria"] == {k: v for k, v in summary["criteria"].items() if k != "max_cells"}
    flags, passes = table["qc_pass"].to_numpy(), plain["qc_pass"].to_numpy()
    assert (flags <= passes).all()
    others, _ = run(tmp_path / "seed", X, obs=obs, where={"organ": ["heart"]}, max_cells=7, seed=4)
    assert others["qc_pass"].to_pylist() != table["qc_pass"].to_pylist()
    _, summary = run(tmp_path / "many", X, obs=obs, max_cells=1000)
    assert summary["criteria"]["max_cells"] == {"n_fail": 0}
    with pytest.raises(UserError, match="can't keep 0 cells"):
        run(tmp_path / "zero", X, max_cells=0)


def test_the_draw_depends_on_names_not_on_rows(tmp_path):
    def drawn(order):
        names = [f"c{i}" for i in order]
        table = pa.table({"cell_id": names, "n_counts": [5] * 30, "n_genes": [9] * 30,
                          "mito_fraction": [0.0] * 30})  # fmt: skip
        parameters = QCParameters(method="none", max_cells=8)
        passed, _ = module._judge(table, np.ones(30, bool), parameters)
        return {name for name, kept in zip(names, passed, strict=True) if kept}

    assert drawn(range(30)) == drawn(np.random.default_rng(0).permutation(30))


def test_most_genes_is_a_fixed_bound(tmp_path):
    X = counts()
    n_genes = (X > 0).sum(1)
    high = int(np.sort(n_genes)[-5])
    table, summary = run(tmp_path / "fixed", X, method="fixed", max_genes=high)
    assert table["qc_pass"].to_pylist() == (n_genes <= high).tolist()
    assert summary["criteria"]["n_genes"]["high"] == high
    _, summary = run(tmp_path / "sd", X, max_genes=high)
    assert summary["criteria"]["n_genes"]["high"] is None


def populations(seed: int = 0):
    """Two cell types of 150 cells, and 30 cells that are one of each together."""
    rng = np.random.default_rng(seed)
    base = rng.lognormal(0, 1, 400)
    rates = [base * rng.lognormal(0, 2, 400) for _ in range(2)]
    cells = [rng.poisson(rates[i % 2], 400) for i in range(300)]
    pairs = [rng.poisson(rates[0]) + rng.poisson(rates[1]) for _ in range(30)]
    return np.array(cells + pairs)


def test_doublets_are_found_whatever_the_shards(tmp_path):
    X = np.vstack([populations(), populations(1)[:20]])
    genes = [f"ENSG{i:011d}" for i in range(1, 401)]
    obs = {"donor": ["a"] * 330 + ["b"] * 20}
    seen = set()
    for shards in (1, 3):
        outputs, metadata = dataset(tmp_path / str(shards), X, shards=shards, genes=genes, obs=obs)
        notes = score_doublets(outputs, metadata, output=tmp_path / "d.parquet", batch="donor")
        seen.add((tmp_path / "d.parquet").read_bytes())
        assert notes == ["batch 'b': no doublet scores, it has only 20 cells"]
    assert len(seen) == 1
    table = pq.read_table(tmp_path / "d.parquet")
    scores = table["doublet_score"].to_numpy()
    assert np.isnan(scores[330:]).all()
    assert table["predicted_doublet"].null_count == 20
    auc = (scores[300:330, None] > scores[:300]).mean() + (scores[300:330, None] == scores[:300]).mean() / 2
    assert auc > 0.9
    cells, summary = run(
        tmp_path / "qc", X, genes=genes, obs=obs, doublets=tmp_path / "d.parquet", method="none"
    )
    called = np.array(table["predicted_doublet"].to_pylist()) == True  # noqa: E712
    assert called.any()
    assert cells.column_names[4:6] == ["doublet_score", "predicted_doublet"]
    assert cells["qc_pass"].to_pylist() == (~called).tolist()
    assert summary["criteria"]["doublets"]["n_fail"] == called.sum()


def test_batches_interleaved_and_read_in_groups_score_the_same(tmp_path, monkeypatch):
    X = np.vstack([populations()[:200], populations(1)[:200]])
    genes = [f"ENSG{i:011d}" for i in range(1, 401)]
    order = np.random.default_rng(0).permutation(400)
    donors = np.repeat(["a", "b"], 200)
    outputs, metadata = dataset(tmp_path, X[order], shards=2, genes=genes, obs={"donor": donors[order]})
    score_doublets(outputs, metadata, output=tmp_path / "one.parquet", batch="donor")
    monkeypatch.setattr("cellformers.doublets.CELLS_AT_ONCE", 10)
    score_doublets(outputs, metadata, output=tmp_path / "two.parquet", batch="donor")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert pq.read_table(tmp_path / "one.parquet")["doublet_score"].null_count == 0
    with pytest.raises(UserError, match=r"no column 'doner'.*did you mean 'donor'"):
        score_doublets(outputs, metadata, output=tmp_path / "x.parquet", batch="doner")


def test_qc_imports_no_heavy_package():
    import subprocess
    import sys

    code = (
        "import sys, cellformers.qc; print([m for m in ('torch', 'scanpy', 'anndata') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert module.METHODS[0] == QCParameters().method
