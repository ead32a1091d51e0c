"""GSE155468: a tar of dense tables with awkward headers, joined to the authors' labels."""

import gzip
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from command_line import run
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
    write_tar,
)

from cellformers.deposits.readers import gse155468
from cellformers.io.files import read_metadata

SAMPLES = ["Con4", "Con6", "Con9", *(f"TAA{i}" for i in range(1, 9))]
N = 6
LABELS = "meta_addsubcluster_cellcycle.csv"


def tables(*, header: str = "short", suffix: str = "-1") -> tuple[dict[str, bytes], pd.DataFrame]:
    """Members of the tar and the label table; the third cell of TAA1 has no label, rare genes are not in the sums."""
    members, rows = {}, []
    for number, name in enumerate(SAMPLES, start=1):
        # every sample has the same barcodes: only (sample, barcode) names a cell
        barcodes, counts = make_barcodes(N, seed=1), make_counts(N, seed=number)
        text = dense_text(counts, [b + suffix for b in barcodes], GENES, header=header)
        members[f"GSM{4704930 + number}_{name}.txt.gz"] = gzip.compress(text, mtime=0)
        rows += [
            {
                "": f"{barcode}.1_{number}", "orig.ident": name.replace("TAA", "ATAA"),
                "nCount_RNA": int(cell[:-1].sum()), "nFeature_RNA": int((cell[:-1] > 0).sum()),
                "stim": "ATAA" if "TAA" in name else "Control", "integrated_snn_res.0.6": 2, "seurat_clusters": 2,
                "celltype": ["SMC1", "Tcell"][i % 2], "celltype2": f"sub {i}", "cellcycle": "G1",
            }
            for i, (barcode, cell) in enumerate(zip(barcodes, counts, strict=True))
            if not (name == "TAA1" and i == 2)
        ]  # fmt: skip
    return members, pd.DataFrame(rows).sample(frac=1, random_state=0)


def write(folder: Path, members: dict[str, bytes], labels: pd.DataFrame) -> Path:
    write_tar(folder / "GSE155468_RAW.tar", members)
    labels.to_csv(folder / LABELS, index=False)
    return folder


@pytest.mark.parametrize(("header", "suffix"), [("short", "-1"), ("empty", ".1"), ("GENE", "")])
def test_counts_and_labels_of_every_form_of_header_and_barcode(tmp_path, header, suffix):
    folder = write(tmp_path / "deposit", *tables(header=header, suffix=suffix))
    done = ingest(folder, tmp_path / "out", "gse155468")
    assert done.code == 0, done.err
    names = [f"{s}:{b}{suffix}" for s in SAMPLES for b in make_barcodes(N, seed=1)]
    assert cell_ids(tmp_path / "out") == names
    assert features(tmp_path / "out") == GENES  # duplicates stay apart
    assert np.array_equal(
        dense(tmp_path / "out"), np.concatenate([make_counts(N, seed=n) for n in range(1, 12)])
    )
    table = metadata(tmp_path / "out").to_pydict()
    assert table["sample"] == table["donor"] == [name for name in SAMPLES for _ in range(N)]
    assert table["condition"] == ["control"] * 3 * N + ["aneurysm"] * 8 * N
    assert [table["sex"][i * N] for i in range(11)] == [
        {"F": "female", "M": "male"}[c] for c in "FMF" + "FFMMFFMM"
    ]
    assert [table["age"][i * N] for i in range(11)] == [63, 61, 62, 75, 78, 59, 62, 75, 67, 69, 56]
    assert table["extent"][0] is None
    assert table["extent"][3 * N] == "ascending"
    unlabelled = 3 * N + 2
    expected: list[str | None] = ["SMC1", "Tcell"] * (11 * N // 2)
    expected[unlabelled] = None
    assert table["cell_type"] == expected
    assert table["cell_subtype"][4] == "sub 4"
    assert [i for i, reason in enumerate(table["excluded"]) if reason is not None] == [unlabelled]
    assert table["excluded"][unlabelled] == "no label"
    assert "1 of 66 cells have no label" in done.err
    assert "0 of 65 labelled cells have less than stated" in done.err


def test_the_same_for_any_number_of_shards_and_for_files_given_by_hand(tmp_path):
    members, labels = tables()
    folder = write(tmp_path / "deposit", members, labels)
    for shards in (1, 4):
        assert ingest(folder, tmp_path / str(shards), "gse155468", shards=shards).code == 0
    assert len(list((tmp_path / "4" / "counts").iterdir())) == 4
    for name in ("metadata.parquet", "features.parquet"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "4" / name).read_bytes()
    assert np.array_equal(dense(tmp_path / "1"), dense(tmp_path / "4"))
    # elsewhere, under other names: nothing of the scratch gets into what is written
    (tmp_path / "elsewhere").mkdir()
    assert ingest(folder, tmp_path / "elsewhere" / "deep", "gse155468").code == 0
    for path in (p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*.parquet")):
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "elsewhere" / "deep" / path).read_bytes()

    for name, content in members.items():
        (tmp_path / name).write_bytes(content)
    rows = [f"{name.split('_')[1].split('.')[0]},{name}" for name in sorted(members)]
    (tmp_path / "samples.csv").write_text("sample,path\n" + "\n".join(rows) + "\n")
    assert run("ingest", "--samples", tmp_path / "samples.csv", "-o", tmp_path / "hand").code == 0
    assert np.array_equal(dense(tmp_path / "hand"), dense(tmp_path / "1"))
    by_hand, deposited = (read_metadata(tmp_path / n / "metadata.parquet") for n in ("hand", "1"))
    assert by_hand["inputs"] == deposited["inputs"]
    assert deposited["parameters"] == {"deposit": "gse155468", "part": "all", "genes_in_rows": True}
    assert (
        metadata(tmp_path / "hand")["cell_id"].to_pylist() == metadata(tmp_path / "1")["cell_id"].to_pylist()
    )


def test_a_missing_or_unknown_sample_is_refused(tmp_path):
    members, labels = tables()
    lacking = {name: content for name, content in members.items() if "Con6" not in name}
    output = tmp_path / "out"
    folder = write(tmp_path / "deposit", lacking, labels)
    assert_refused(
        ingest(folder, output, "gse155468"), "GSE155468_RAW.tar: lacks the samples Con6", output=output
    )
    write(folder, members | {"GSM1_TAA9.txt.gz": b""}, labels)
    assert_refused(ingest(folder, output, "gse155468"), "holds 'GSM1_TAA9.txt.gz'", output=output)
    write(folder, members | {"../GSM4704931_Con4.txt.gz": b""}, labels)
    assert_refused(ingest(folder, output, "gse155468"), "no plain file name", output=output)


def test_labels_that_differ_from_what_is_known_are_refused(tmp_path):
    members, labels = tables()
    output = tmp_path / "out"

    def refused(table: pd.DataFrame, *words: str) -> None:
        folder = write(tmp_path / "deposit", members, table)
        assert_refused(ingest(folder, output, "gse155468"), LABELS, *words, output=output)

    refused(labels.rename(columns={"celltype": "cell_types"}), "no column 'celltype'", "did you mean")
    refused(labels.assign(**{"orig.ident": "Con4"}), "is of Con4, by its number it is of")
    refused(labels.assign(**{"": labels[""] + "_99"}), "<barcode>.1_<number of the sample>")
    refused(pd.concat([labels, labels[:1]]), "in more than one row")
    refused(labels.assign(nCount_RNA="many"), "column 'nCount_RNA' is no number in every row", "--verify")
    refused(labels.assign(nCount_RNA=np.nan), "states no total counts (nCount_RNA)")
    refused(labels.assign(nCount_RNA=labels["nCount_RNA"] * 2), "other total counts", "have less")
    refused(labels.assign(nCount_RNA=labels["nCount_RNA"] // 2), "other total counts", "median ratio is 2.")
    swapped = labels.copy()
    con4 = swapped[""].str.endswith("_1")
    swapped.loc[con4, ""] = [f"{b}.1_1" for b in make_barcodes(int(con4.sum()), seed=9)]
    refused(swapped, "names only 0 of the 6 cells of Con4")
    folder = write(tmp_path / "deposit", members, labels)
    for content, words in ((b"", "holds no rows"), (b"\xff\xfe\0", "not readable as a csv")):
        (folder / LABELS).write_bytes(content)
        done = ingest(folder, output, "gse155468")
        assert_refused(done, f"{LABELS}: {words}", "; get the deposit again", output=output)


def test_a_damaged_member_is_named_with_its_archive(tmp_path):
    """The scratch it was unpacked into is gone when the user reads of it, and no option says how it is read."""
    members, labels = tables()
    name = next(name for name in members if "TAA3" in name)
    for content in (members[name][:40], gzip.compress(b"gene\tA\nACTB\t-3\n"), gzip.compress(b"")):
        folder = write(tmp_path / "deposit", members | {name: content}, labels)
        done = ingest(folder, tmp_path / "out", "gse155468")
        words = f"error: {folder / 'GSE155468_RAW.tar'}: {name} in it: "
        assert_refused(done, words, "; get the deposit again with", output=tmp_path / "out")
        assert ".part-" not in done.err


def test_a_few_cells_below_are_said_and_missing_files_named(tmp_path):
    members, labels = tables()
    output = tmp_path / "out"
    folder = write(tmp_path / "deposit", members, labels)
    (folder / LABELS).unlink()
    assert_refused(ingest(folder, output, "gse155468"), f"{LABELS}: no such file", "download", output=output)
    broken = members | {"GSM4704936_TAA3.txt.gz": members["GSM4704936_TAA3.txt.gz"][:-12]}
    write(folder, broken, labels)
    assert_refused(ingest(folder, output, "gse155468"), "TAA3.txt.gz", output=output)
    text = gzip.decompress(members["GSM4704936_TAA3.txt.gz"]).replace(b"\t", b"\t-", 1)
    negative = text.split(b"\n")
    negative[3] = negative[3].replace(b"\t", b"\t-", 1)
    write(folder, members | {"GSM4704936_TAA3.txt.gz": gzip.compress(b"\n".join(negative))}, labels)
    assert_refused(ingest(folder, output, "gse155468"), "TAA3.txt.gz", output=output)


def test_the_real_labels_join(reference_data):
    path = reference_data / "labels" / "GSE155468_cell_labels.csv"
    if not path.is_file():
        pytest.skip("no label table of GSE155468")
    frame = pd.read_csv(path, index_col=0)
    numbers = frame.index.str.rsplit("_", n=1).str[1].astype(int)
    # as the files would name them, TAA1 with the 46 cells more that nobody labelled
    barcodes = [b.split(".")[0] + "-1" for b in frame.index] + [f"{b}-1" for b in make_barcodes(46, seed=3)]
    samples = [SAMPLES[n - 1] for n in numbers] + ["TAA1"] * 46
    columns, notes = gse155468._describe(
        pa.array(barcodes), pa.array(samples), {}, labels=path
    )  # the join alone: there are no counts
    types = pd.Series(columns["cell_type"].to_pylist())
    assert types.value_counts().to_dict() == {
        "Tcell": 18950, "MonoMaphDC": 13475, "SMC1": 4775, "Fibroblast": 3652, "NK": 2499, "SMC2": 1666, "MSC": 996,
        "EC": 891, "Plasma": 654, "Mastcell": 265, "Bcell": 259,
    }  # fmt: skip
    assert types.tolist()[:-46] == frame["celltype"].tolist()
    assert columns["cell_subtype"].to_pylist()[:-46] == frame["celltype2"].tolist()
    assert columns["excluded"].to_pylist() == [None] * 48_082 + ["no label"] * 46
    assert notes == ["46 of 48,128 cells have no label and are excluded"]
    totals = np.append(frame["nCount_RNA"].to_numpy() + 3, np.ones(46, int))
    (said,) = gse155468._check_sums(totals, columns, labels=path)
    assert "0 of 48,082 labelled cells have less" in said


def test_headers_of_both_forms_hold_the_same(tmp_path):
    counts, cells = make_counts(3), ["AAAC-1", "CCCA-1", "GGGT-1"]
    for header in ("short", "empty"):
        path = write_gz(tmp_path / f"{header}.txt.gz", dense_text(counts, cells, GENES, header=header))
        frame = pd.read_csv(io.BytesIO(gzip.decompress(path.read_bytes())), sep="\t", index_col=0)
        assert list(frame.columns) == cells  # as the deposit's users read it
        assert np.array_equal(frame.to_numpy().T, counts)
