"""The readers against simulated deposits: what was drawn is what comes out."""

from pathlib import Path

import numpy as np
import pytest
from deposit_files import cell_ids, ingest, metadata, shards_of

from cellformers.io.files import read_json
from cellformers.simulate.deposits.run import simulate_deposits

CELLS = 150
PARTS = [
    ("gse155468", "all"), ("gse129096", "drop"), ("gse129096", "dronc"), ("gse129096", "heart"),
    ("gse156793", "all"), ("scp1303", "all"),
]  # fmt: skip


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simulated")
    simulate_deposits(sorted({name for name, _ in PARTS}), folder, cells=CELLS, seed=3)
    return folder


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_counts_and_labels_are_those_drawn(tmp_path, simulated, name, part):
    folder = tmp_path / "deposit"
    folder.mkdir()
    stored = [*(simulated / "www").rglob("*"), *(simulated / "home" / "manual" / "scp1303").glob("*")]
    for path in stored:
        if path.is_file():
            (folder / path.name).symlink_to(path)
    done = ingest(folder, tmp_path / "out", name, part, shards=2)
    assert done.code == 0, done.err
    truth = read_json(simulated / "truth" / f"{name}.json")["parts"][part]["cells"]
    totals = np.concatenate(
        [np.asarray(shard.X.sum(axis=1)).ravel() for shard in shards_of(tmp_path / "out")]
    )
    assert totals.tolist() == truth["n_counts"]
    found = metadata(tmp_path / "out").to_pydict()
    assert found["cell_id"] == cell_ids(tmp_path / "out")
    pairs = {
        "gse155468": {"donor": "donor"},
        "gse129096": {"line": "line"} if part != "heart" else {},
        "gse156793": {
            "cell_id": "sample", "donor": "Fetus_id", "organ": "Organ", "development_day": "Development_day",
        },
        "scp1303": {
            "cell_id": "name", "donor": "donor_id", "disease": "disease", "cell_type": "cell_type_leiden0.6",
        },
    }[name]  # fmt: skip
    for ours, theirs in pairs.items():
        assert found[ours] == truth[theirs], ours
    if name == "gse155468":
        labels = zip(truth["celltype"], truth["labelled"], strict=True)
        expected = [label if known else None for label, known in labels]
        assert found["cell_type"] == expected
        assert found["excluded"] == [None if label else "no label" for label in expected]
    elif name == "gse156793":
        expected = [None if label == "nan" else label for label in truth["Main_cluster_name"]]
        assert found["cell_type"] == expected
        assert [reason is None for reason in found["excluded"]] == [label is not None for label in expected]
    elif name == "gse129096":
        assert found["cell_id"] == truth["name"]
        if part == "drop":
            assert [reason == "chimpanzee" for reason in found["excluded"]] == truth["chimpanzee"]
