"""Fine-tuned gene classifiers as methods of a benchmark: their scores, their intervals, and whose split they are of."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from token_files import make_model, make_vocabulary, write_tokens

from cellformers import metrics
from cellformers.errors import UserError
from cellformers.evaluate.finetuned_genes import LEVELS, FinetunedGenes, auc_tokens, read_finetuned
from cellformers.evaluate.gene_splits import make_gene_split
from cellformers.evaluate.genes import evaluate_genes
from cellformers.evaluate.splitfile import read_split
from cellformers.training.finetune import Settings, SplitSpec, finetune
from cellformers.training.targets import read_gene_targets

N_GENES, N_CELLS, FOLDS = 40, 150, 3


class Folds:
    """Genes of even number (`up`) stand in the first half of a cell; the last two genes are in no cell."""

    def __init__(self, folder: Path) -> None:
        vocabulary = make_vocabulary(N_GENES, context_length=32)
        model = make_model(folder / "model", vocabulary, num_hidden_layers=1, max_position_embeddings=32)
        rng = np.random.default_rng(0)
        rows = np.arange(N_GENES - 2)
        cells = [
            vocabulary.token_ids[np.concatenate([rng.permutation(rows[half::2])[:6] for half in (0, 1)])]
            for _ in range(N_CELLS)
        ]
        tokens = write_tokens(folder / "tokens.parquet", cells, vocabulary)
        lines = [f"{gene},{'up' if i % 2 == 0 else 'down'}" for i, gene in enumerate(vocabulary.gene_ids)]
        (folder / "labels.csv").write_text("\n".join(["gene_id,kind", *lines]) + "\n")
        self.folder, self.split = folder, folder / "split.json"
        make_gene_split(
            labels=folder / "labels.csv", label="kind", positive="up", embeddings=[], dataset="d", folds=FOLDS,
            output=self.split,
        )  # fmt: skip
        self.models = [folder / f"fold-{fold}" for fold in range(1, FOLDS + 1)]
        self.trained = [
            finetune(
                [tokens], model, output, targets=read_gene_targets(self.split, "kind", positive="up"),
                split=SplitSpec(file=self.split, fold=fold, heldout=0), threads=1,
                settings=Settings(learning_rate=3e-3, epochs=2),
            )
            for fold, output in enumerate(self.models, start=1)
        ]  # fmt: skip

    def evaluate(self, folder: Path, **more: Any) -> dict[str, Any]:
        """Score the models of the folds."""
        ask = {
            "benchmark": "b", "method": "m", "kind": "model", "split": self.split, "features": "finetuned",
            "inputs": [], "fold_models": self.models, "output": folder / "s.json", "predictions": folder / "p.parquet",
        }  # fmt: skip
        return evaluate_genes(**(ask | more))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: Any) -> Folds:
    return Folds(tmp_path_factory.mktemp("tuned"))


@pytest.fixture
def copy(tuned: Folds, tmp_path: Path) -> list[Path]:
    """The models of the folds, to be tampered with."""
    return [shutil.copytree(model, tmp_path / model.name) for model in tuned.models]


def test_the_scores_are_those_of_the_trainings(tuned: Folds, tmp_path: Path) -> None:
    score = tuned.evaluate(tmp_path)
    tokens = [r["metrics"]["test"]["pooled"]["auc"] for r in tuned.trained]
    assert score["metrics"]["auc_tokens"]["folds"] == pytest.approx(tokens, abs=1e-6)
    assert score["metrics"]["auc_tokens"]["value"] == pytest.approx(np.mean(tokens), abs=1e-6)
    assert score["metrics"]["auc_tokens"]["sd"] == pytest.approx(np.std(tokens, ddof=1), abs=1e-6)
    assert score["metrics"]["auc_tokens"]["n_tokens"] == N_CELLS * 12
    for name in ("auc", "auc_tokens", "average_precision"):
        entry = score["metrics"][name]
        assert entry["value"] > 0.8
        assert entry["low"] <= entry["value"] + 1 / LEVELS
        assert entry["value"] <= entry["high"] + 1 / LEVELS
    # in folds without the unseen genes, each gene counts once as in the training
    table = pq.read_table(tmp_path / "p.parquet").to_pandas()
    unseen = set(table["gene_id"].iloc[-2:])
    for name, value, result in zip(
        sorted(set(table["fold"])), score["metrics"]["auc"]["folds"], tuned.trained, strict=True
    ):
        if not unseen & set(table["gene_id"][table["fold"] == name]):
            assert value == pytest.approx(result["metrics"]["test"]["per_gene"]["auc"], abs=1e-6)
    assert score["chance"]["auc_tokens"] == 0.5


def test_genes_in_no_cell_get_the_share_of_the_training_genes(tuned: Folds, tmp_path: Path) -> None:
    score = tuned.evaluate(tmp_path)
    assert any("2 of the 40 genes are in no cell" in note for note in score["notes"])
    table = pq.read_table(tmp_path / "p.parquet").to_pandas()
    for row in table.index[-2:]:
        trained = table[table["fold"] != table["fold"][row]]
        assert table["probability"][row] == pytest.approx((trained["label"] == "up").mean())
        assert table["log_odds"][row] == pytest.approx(0, abs=1e-12)


def test_models_of_another_split_are_refused(tuned: Folds, copy: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 fine-tuned models for 3 folds"):
        tuned.evaluate(tmp_path, fold_models=copy[:2])
    with pytest.raises(UserError, match=r"fold-2: was trained on gene ENSG\d+, which fold 'fold 1' does not"):
        tuned.evaluate(tmp_path, fold_models=[copy[1], copy[0], copy[2]])
    with pytest.raises(UserError, match="can't be permuted"):
        tuned.evaluate(tmp_path, permute=True)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s, t: s["train"].append("ENSG99999999999"), "was trained on gene ENSG99999999999"),
        (lambda s, t: s["heldout"].append(s["test"][0]), "was trained on gene"),
        (lambda s, t: s["test"].pop(0), "did not test gene"),
        (lambda s, t: s["test"].append("ENSG99999999999"), "tested gene ENSG99999999999"),
        (lambda s, t: t["labels"][0].update(name="other"), "tells apart down and up of 'other'"),
        (lambda s, t: t.update(task="cells"), "holds no model fine-tuned to classify genes"),
    ],
)
def test_what_a_model_says_of_its_training_is_checked(
    tuned: Folds, copy: list[Path], edit: Any, message: str
) -> None:
    files = [copy[0] / "split.json", copy[0] / "training.json"]
    contents = [json.loads(path.read_text()) for path in files]
    edit(*contents)
    for path, content in zip(files, contents, strict=True):
        path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_finetuned(copy, read_split(tuned.split, task="genes"))


def test_predictions_of_other_labels_or_genes_are_refused(tuned: Folds, copy: list[Path]) -> None:
    path = copy[0] / "predictions.parquet"
    table = pq.read_table(path)
    split = read_split(tuned.split, task="genes")
    labels = ["up" if v == "down" else "down" for v in table["label"].to_pylist()]
    place = table.column_names.index("label")
    pq.write_table(table.set_column(place, "label", pa.array(labels)), path)
    with pytest.raises(UserError, match="predicts gene ENSG"):
        read_finetuned(copy, split)
    pq.write_table(table.slice(1), path)
    with pytest.raises(UserError, match=r"tokens of genes that predictions\.parquet lacks"):
        read_finetuned(copy, split)


def _many(n: int = 24, folds: int = 2, seed: int = 0) -> tuple[FinetunedGenes, np.ndarray, np.ndarray]:
    """Genes with very unequal numbers of tokens; positives score higher."""
    rng = np.random.default_rng(seed)
    positive, fold = np.arange(n) % 3 == 0, np.arange(n) // 3 % folds
    gene = np.repeat(np.arange(n), rng.integers(1, 300, n))
    score = rng.normal(size=len(gene)) + rng.normal(size=n)[gene] + 0.8 * positive[gene]
    return FinetunedGenes(np.zeros(n), gene, score, []), positive, fold


@pytest.mark.parametrize("grouped", [False, True])
def test_the_interval_is_that_of_whole_genes(grouped: bool) -> None:
    found, positive, fold = _many()
    groups = np.array([f"g{f}{i // 6}" for i, f in enumerate(fold)], dtype=object) if grouped else None
    entry = auc_tokens(found, positive, fold, groups=groups, seed=0, resamples=400)
    by_fold = [
        float(metrics.auc(positive[found.token_gene][rows], found.token_score[rows]))
        for rows in (fold[found.token_gene] == f for f in (0, 1))
    ]
    assert entry["folds"] == by_fold
    assert entry["value"] == np.mean(by_fold)
    # the same resamples, token by token
    exact = metrics.bootstrap_genes(
        lambda w: metrics.fold_mean_auc(
            positive[found.token_gene], found.token_score, fold[found.token_gene], w[:, found.token_gene]
        ),
        fold if grouped else fold * 2 + positive, groups=groups, seed=0, resamples=400,
    )  # fmt: skip
    low, high = metrics.percentile_interval(exact)
    assert abs(entry["low"] - low) < 1 / LEVELS
    assert abs(entry["high"] - high) < 1 / LEVELS
    assert high - low > 0.05


def test_a_fold_without_tokens_of_both_classes_is_refused() -> None:
    found, positive, fold = _many()
    kept = ~((fold[found.token_gene] == 1) & positive[found.token_gene])
    poor = FinetunedGenes(found.score, found.token_gene[kept], found.token_score[kept], [])
    with pytest.raises(UserError, match="tested genes of both classes in fold 2"):
        auc_tokens(poor, positive, fold, groups=None, seed=0)
