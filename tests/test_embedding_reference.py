"""Embeddings against their published definitions, computed the usual way: padded batches through transformers.

The definitions, written out here once more: with N layers, layer l is the hidden state N + l (0: the embedding
layer); `cls` is its first row; the mean of a cell runs over its tokens, without the first and the last where cells
stand between <cls> and <eos>; the vector of a gene is the mean over the cells that hold it. Padding is masked.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from token_files import make_cells, make_vocabulary, write_tokens

from cellformers.embedding import embed_cells
from cellformers.gene_embedding import merge_gene_sums, sum_genes
from cellformers.occurrences import write_occurrences
from cellformers.vocabulary import Vocabulary

transformers = pytest.importorskip("transformers")

LENGTHS = (40, 7, 60, 1, 13, 25)
CLOSE = 2e-5


class Setup:
    """A random model that transformers wrote, cells, and every hidden state of them in one padded batch."""

    def __init__(self, folder: Path, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.model = vocabulary, folder / "model"
        self.cells = make_cells(vocabulary, LENGTHS, seed=2)
        self.tokens = write_tokens(folder / "tokens.parquet", self.cells, vocabulary)
        torch.manual_seed(1)
        config = transformers.BertConfig(
            vocab_size=vocabulary.size, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=96, max_position_embeddings=128, hidden_act="relu", pad_token_id=0,
            initializer_range=0.2,
        )  # fmt: skip
        theirs = transformers.BertForMaskedLM(config).eval()
        theirs.save_pretrained(self.model)
        vocabulary.save(self.model / "vocabulary")
        longest = max(map(len, self.cells))
        padded = torch.zeros(len(self.cells), longest, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for row, cell in enumerate(self.cells):
            padded[row, : len(cell)] = torch.from_numpy(cell.astype(np.int64))
            mask[row, : len(cell)] = 1
        with torch.inference_mode():
            found = theirs.bert(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        self.states = [state.numpy() for state in found.hidden_states]

    def state(self, layer: int) -> np.ndarray:
        """float32[cells, longest, dim]"""
        return self.states[len(self.states) - 1 + layer]


@pytest.fixture(scope="module", params=["v1", "v2"])
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp(request.param), make_vocabulary(special=request.param))


def vectors(path: Path) -> np.ndarray:
    return np.array(pq.read_table(path)["embedding"].to_pylist(), np.float32)


@pytest.mark.parametrize("layer", [0, -1, -3])
def test_cell_means(setup: Setup, tmp_path: Path, layer: int) -> None:
    embed_cells(setup.tokens, setup.model, tmp_path / "e.parquet", mode="cell", layer=layer)
    state = setup.state(layer)
    inner = 1 if setup.vocabulary.has_cls else 0
    wanted = [state[row, inner : len(cell) - inner].mean(axis=0) for row, cell in enumerate(setup.cells)]
    assert np.abs(vectors(tmp_path / "e.parquet") - wanted).max() <= CLOSE


@pytest.mark.parametrize("layer", [0, -1, -3])
@pytest.mark.parametrize("setup", ["v2"], indirect=True)  # V1 has no <cls>
def test_cls(setup: Setup, tmp_path: Path, layer: int) -> None:
    embed_cells(setup.tokens, setup.model, tmp_path / "e.parquet", mode="cls", layer=layer)
    assert np.abs(vectors(tmp_path / "e.parquet") - setup.state(layer)[:, 0]).max() <= CLOSE


@pytest.mark.parametrize("layer", [0, -1])
def test_gene_means(setup: Setup, tmp_path: Path, layer: int) -> None:
    sum_genes(setup.tokens, setup.model, tmp_path / "s.parquet", layer=layer, special=True)
    merge_gene_sums([tmp_path / "s.parquet"], tmp_path / "g.parquet")
    state = setup.state(layer)
    of_gene: dict[int, list[np.ndarray]] = {}
    for row, cell in enumerate(setup.cells):
        for position, token in enumerate(cell.tolist()):
            of_gene.setdefault(token, []).append(state[row, position])
    named = dict(zip(setup.vocabulary.token_ids.tolist(), setup.vocabulary.gene_ids, strict=True))
    named |= {token: name for name, token in setup.vocabulary.special_tokens.items()}
    wanted = {named[token]: np.mean(found, axis=0) for token, found in of_gene.items()}
    ids = pq.read_table(tmp_path / "g.parquet")["gene_id"].to_pylist()
    assert sorted(wanted) == ids
    assert np.abs(vectors(tmp_path / "g.parquet") - [wanted[gene] for gene in ids]).max() <= CLOSE


@pytest.mark.parametrize("layer", [0, -1])
def test_occurrences(setup: Setup, tmp_path: Path, layer: int) -> None:
    write_occurrences(setup.tokens, setup.model, tmp_path / "o.parquet", layer=layer, special=True)
    state = setup.state(layer)
    wanted = np.concatenate([state[row, : len(cell)] for row, cell in enumerate(setup.cells)])
    assert np.abs(vectors(tmp_path / "o.parquet") - wanted).max() <= CLOSE
