"""Labels of genes: the layouts of the sources, mapped to gene ids by a vocabulary."""

import csv
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from command_line import Ran, run
from deposit_files import write_gz
from token_files import make_vocabulary

from cellformers.errors import UserError
from cellformers.io.pickles import read_lists
from cellformers.resources import resource
from cellformers.vocabulary import Vocabulary

N = 60
IDS = [f"ENSG{i:011d}" for i in range(N)]
SCORES = "Collins_rCNV_2022.dosage_sensitivity_scores.tsv.gz"
RANGE = "41467_2020_16106_MOESM4_ESM.csv"


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    """Genes G0 to G59; OLD3 is a former symbol of G3, and ENSG...999 has a symbol but no token."""
    made = make_vocabulary(N)
    aliases = {gene: gene for gene in IDS} | {f"G{i}": gene for i, gene in enumerate(IDS)}
    aliases |= {"OLD3": IDS[3], "UNTOLD": "ENSG00000000999"}
    names = sorted(aliases)
    whole = Vocabulary(
        **{
            field: getattr(made, field)
            for field in ("name", "gene_ids", "token_ids", "medians", "symbols", "special_tokens", "context_length")
        },
        alias_source=pa.table({"alias": names, "gene_id": [aliases[name] for name in names]}),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vocabulary") / "hand"
    whole.save(folder)
    return folder


def label(
    folder: Path, vocabulary: Path, deposit: str, part: str = "all"
) -> tuple[Ran, list[dict[str, str]]]:
    output = folder.parent / f"{deposit}-{part}.csv"
    output.unlink(missing_ok=True)
    done = run(
        "gene-labels", folder, "--deposit", deposit, "--part", part, "--vocabulary", vocabulary, "-o", output
    )
    if done.code:
        assert not output.exists()
        assert done.err.count("\n") == 1
        return done, []
    with output.open(newline="") as file:
        return done, list(csv.DictReader(file))


def test_dosage_sensitivity_from_the_rare_variant_map(tmp_path, vocabulary):
    folder = tmp_path / "in"
    rows = [
        "#gene\tpHaplo\tpTriplo", "G0\t0.86\t0.94", "G1\t0.8599999\t0.9399999", "g2\t0.9\t1", "OLD3\t0.1\t0.99",
        "NOVEL1\t0.99\t0.99", "UNTOLD\t0.99\t0.99", "G4\t0.2\t0.3",
    ]  # fmt: skip
    write_gz(folder / SCORES, "\n".join(rows) + "\n")
    done, found = label(folder, vocabulary, "collins2022", "haploinsufficient")
    assert done.code == 0, done.err
    assert list(found[0]) == ["gene_id", "symbol", "label", "pHaplo", "pTriplo"]
    assert [(r["gene_id"], r["symbol"]) for r in found] == [(IDS[i], f"G{i}") for i in (0, 1, 2, 3, 4)]
    no = "not_haploinsufficient"
    assert [r["label"] for r in found] == ["haploinsufficient", no, "haploinsufficient", no, no]
    assert [float(r["pHaplo"]) for r in found] == [0.86, 0.8599999, 0.9, 0.1, 0.2]
    assert "4 of 7 genes have pHaplo of at least 0.86" in done.err
    assert "2 names are of no gene in the vocabulary" in done.err
    _, found = label(folder, vocabulary, "collins2022", "triplosensitive")
    positive = [r["symbol"] for r in found if r["label"] == "triplosensitive"]
    assert positive == ["G0", "G2", "G3"]

    write_gz(folder / SCORES, "\n".join(rows).replace("#gene", "gene"))
    done, _ = label(folder, vocabulary, "collins2022", "haploinsufficient")
    assert f"{SCORES}: has no column '#gene'" in done.err
    write_gz(folder / SCORES, "\n".join(rows).replace("0.86", "high"))
    done, _ = label(folder, vocabulary, "collins2022", "haploinsufficient")
    assert "column 'pHaplo' is no number" in done.err
    write_gz(folder / SCORES, "\n".join(rows).replace("0.86", "86"))
    done, _ = label(folder, vocabulary, "collins2022", "haploinsufficient")
    assert f"{SCORES}: column 'pHaplo' is no probability in every row" in done.err


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_two_padded_columns_with_or_without_a_byte_order_mark(tmp_path, vocabulary, start):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "dosage_sens_tf_labels.csv"
    rows = ["dosage_sensitive,dosage_insensitive"]
    rows += [f"{IDS[i]},{IDS[10 + i]}" for i in range(3)] + [
        f",{IDS[20]}",
        f" ,{IDS[21]} ",
        ",ENSG00099999999",
    ]
    path.write_text(start + "\r\n".join(rows) + "\r\n", encoding="utf-8")
    done, found = label(folder, vocabulary, "geneformer-labels", "dosage_sensitive_tfs")
    assert done.code == 0, done.err
    assert {r["gene_id"]: r["label"] for r in found} == {
        **dict.fromkeys(IDS[:3], "dosage_sensitive"),
        **dict.fromkeys([*IDS[10:13], *IDS[20:22]], "dosage_insensitive"),
    }
    assert "3 genes are dosage_sensitive, 5 dosage_insensitive; 1 names" in done.err
    path.write_text("\n".join(rows).replace(IDS[10], "Yes"))
    done, _ = label(folder, vocabulary, "geneformer-labels", "dosage_sensitive_tfs")
    assert "holds 'Yes', which is no Ensembl id" in done.err
    path.write_text("ensembl_id,gene_name,dosage_insensitive\nENSG1,A,Yes\n")
    done, _ = label(folder, vocabulary, "geneformer-labels", "dosage_sensitive_tfs")
    assert "has no column 'dosage_sensitive'" in done.err


def test_lists_of_promoters_repeat_genes(tmp_path, vocabulary):
    folder = tmp_path / "in"
    folder.mkdir()
    bivalent = [*IDS[:5], IDS[0], IDS[30]]
    (folder / "bivalent_gene_labels.txt").write_text("\n".join(bivalent) + "\n")
    (folder / "lys4_only_gene_labels.txt").write_text(" ".join(f'"{g}"' for g in [*IDS[10:13], IDS[30]]))
    (folder / "no_methylation_gene_labels.txt").write_text("gene\r\n" + "\r\n".join([IDS[20], IDS[20]]))
    done, found = label(folder, vocabulary, "geneformer-labels", "bivalent_vs_lys4")
    assert done.code == 0, done.err
    assert {r["gene_id"]: r["label"] for r in found} == {
        **dict.fromkeys(IDS[:5], "bivalent"),
        **dict.fromkeys(IDS[10:13], "lys4_only"),
    }
    assert len(found) == 8
    assert "1 genes stand in both classes and are left out" in done.err
    done, found = label(folder, vocabulary, "geneformer-labels", "bivalent_vs_no_methyl")
    assert [r["gene_id"] for r in found if r["label"] == "no_methylation"] == [IDS[20]]
    assert len(found) == 7
    (folder / "no_methylation_gene_labels.txt").write_text("\n".join(bivalent))
    done, _ = label(folder, vocabulary, "geneformer-labels", "bivalent_vs_no_methyl")
    assert "bivalent_gene_labels.txt: has every gene in both classes" in done.err
    (folder / "no_methylation_gene_labels.txt").write_text("SOX2\n")
    done, _ = label(folder, vocabulary, "geneformer-labels", "bivalent_vs_no_methyl")
    assert "no_methylation_gene_labels.txt: holds no Ensembl ids" in done.err
    (folder / "no_methylation_gene_labels.txt").unlink()
    done, _ = label(folder, vocabulary, "geneformer-labels", "bivalent_vs_no_methyl")
    assert "no_methylation_gene_labels.txt: no such file" in done.err


def test_the_pickle_of_the_network_is_never_run(tmp_path, vocabulary):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "n1_network.pickle"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    path.write_bytes(pickle.dumps({"N1-central": IDS[:4], "N1 Peripheral": IDS[10:12], "other": IDS[20:22]}))
    done, found = label(folder, vocabulary, "geneformer-labels", "notch1")
    assert done.code == 0, done.err
    assert [r["label"] for r in found] == ["peripheral"] * 2 + ["central"] * 4
    assert "classes that are not used: other" in done.err
    for content, words in (
        ({"central": IDS[:2], "peripheral": Evil()}, "forbidden in a pickle from outside"),
        (
            {"core": IDS[:2], "peripheral": IDS[4:]},
            "holds the classes 'core', 'peripheral', where one called central",
        ),
        ({"central": IDS[:2], "peripheral": "ENSG"}, "'peripheral' is no list of names"),
        ({"central": IDS[:2], "peripheral": ["SOX2"]}, "holds 'SOX2', which is no Ensembl id"),
        (IDS, "holds a list"),
    ):
        path.write_bytes(pickle.dumps(content))
        done, _ = label(folder, vocabulary, "geneformer-labels", "notch1")
        assert done.code == 2
        assert words in done.err
    assert not (tmp_path / "touched").exists()
    path.unlink()
    done, _ = label(folder, vocabulary, "geneformer-labels", "notch1")
    assert "n1_network.pickle: no such file" in done.err


def test_lists_in_pickles(tmp_path):
    path = tmp_path / "lists.pickle"
    path.write_bytes(pickle.dumps({"a": ("x", "y"), "b": {"q", "p"}, "c": []}))
    assert read_lists(path) == {"a": ["x", "y"], "b": ["p", "q"], "c": []}
    for value in ({"a": np.array(["x"])}, {"a": [1]}, {1: ["x"]}):
        path.write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match=r"forbidden|no list of names"):
            read_lists(path)


def test_regulatory_range_in_any_case(tmp_path, vocabulary):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [
        ",score,assignment", "G0,0.1,long-range TF", "g1,0.2,Long-Range TF", "G2,0.3,SHORT-RANGE tf",
        "OLD3,0.4,short-range TF", "G5,0.5,", "G6,0.5,unclear", "NOVEL,0.1,long-range TF", "G0,0.1,long-range TF",
    ]  # fmt: skip
    (folder / RANGE).write_text("\n".join(rows) + "\n")
    done, found = label(folder, vocabulary, "tf-range")
    assert done.code == 0, done.err
    assert [(r["symbol"], r["label"]) for r in found] == [
        ("G0", "long_range"), ("G1", "long_range"), ("G2", "short_range"), ("G3", "short_range"),
    ]  # fmt: skip
    assert "2 of 8 rows have another assignment" in done.err
    (folder / RANGE).write_text("\n".join(rows).replace("short", "long").replace("SHORT", "long"))
    done, _ = label(folder, vocabulary, "tf-range")
    assert f"{RANGE}: has no gene that is short_range; get the deposit again" in done.err
    (folder / RANGE).write_text(
        "\n".join(rows).replace("-range", "").replace("-Range", "").replace("-RANGE", "")
    )
    done, _ = label(folder, vocabulary, "tf-range")
    assert "holds neither long-range TF nor short-range TF" in done.err
    (folder / RANGE).write_text("\n".join(rows).replace("assignment", "class"))
    done, _ = label(folder, vocabulary, "tf-range")
    assert f"{RANGE}: has no column 'assignment'" in done.err


def test_an_entry_that_fits_no_reader_is_named(tmp_path, vocabulary, monkeypatch):
    own = tmp_path / "resources" / "datasets" / "tf-range.yaml"
    own.parent.mkdir(parents=True)
    (tmp_path / "in").mkdir()
    text = resource("datasets/tf-range.yaml").read_text()
    monkeypatch.setenv("CELLFORMERS_RESOURCES", str(tmp_path / "resources"))
    for reader, words in (
        ("tf_rang", "the part all names an unknown reader 'tf_rang'; did you mean 'tf_range'?"),
        ("gse156793", "the part all names an unknown reader 'gse156793'; there is: collins2022"),
        ("collins2022", f"{RANGE} is no file that the reader looks for (dosage_sensitivity_scores); mend the entry"),
    ):  # fmt: skip
        own.write_text(text.replace("reader: tf_range", f"reader: {reader}"))
        done, _ = label(tmp_path / "in", vocabulary, "tf-range")
        assert f"error: {own}: {words}" in done.err


def test_cells_are_no_labels_of_genes_and_the_other_way_round(tmp_path, vocabulary):
    tmp_path.joinpath("in").mkdir()
    done, _ = label(tmp_path / "in", vocabulary, "gse155468")
    assert "holds cells, no labels of genes" in done.err
    done = run("ingest", tmp_path / "in", "--deposit", "tf-range", "-o", tmp_path / "out")
    assert "holds labels of genes, no cells" in done.err
    for more, words in (
        (("--deposit", "gse99"), "no deposit 'gse99'"),
        (("--part", "all"), "--part is of a --deposit"),
        (("--deposit", "gse156793", "--layer", "X"), "leave out the options"),
    ):
        done = run("ingest", tmp_path / "in", *more, "-o", tmp_path / "out")
        assert done.code == 2
        assert words in done.err
    done = run("ingest", "--samples", tmp_path / "in", "--deposit", "gse156793", "-o", tmp_path / "out")
    assert "needs the folder of the deposit" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
