"""Cells and genes with a planted signal, small enough to be learnt in a second."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from token_files import make_model, make_vocabulary, write_tokens

from cellformers.io.files import write_table

N_GENES, N_CELLS, LENGTH = 60, 240, 12
DONORS = 8


class Planted:
    """A folder with a model, tokens, and labels of cells and of genes.

    The class of a cell (A, B, C) is which of three sets of five genes its first genes are from; `sex`, of two thirds
    of the cells, is whether the last gene is among its genes. Of the other genes, those of even number (`up`) stand
    in the first half of a cell, those of odd number (`down`) in the second.
    """

    def __init__(self, folder: Path, *, special: str = "v2", seed: int = 0) -> None:
        self.folder = folder
        self.vocabulary = make_vocabulary(N_GENES, special=special, context_length=64)
        self.model = make_model(
            folder / "model", self.vocabulary, seed=seed, num_hidden_layers=2, max_position_embeddings=64
        )
        rng = np.random.default_rng(seed)
        self.types = rng.integers(3, size=N_CELLS)
        self.sexes = rng.integers(2, size=N_CELLS)
        self.cells = [self._cell(t, s, rng) for t, s in zip(self.types, self.sexes, strict=True)]
        self.tokens = write_tokens(folder / "tokens.parquet", self.cells, self.vocabulary)
        self.labels = self.write_labels(self.types)
        genes = [
            f"{gene},{'up' if i % 2 == 0 else 'down'}"
            for i, gene in enumerate(self.vocabulary.gene_ids[15:59])
        ]
        self.gene_labels = folder / "genes.csv"
        self.gene_labels.write_text("\n".join(["gene_id,kind", *genes]) + "\n")

    def _cell(self, kind: int, sex: int, rng: np.random.Generator) -> np.ndarray:
        marks = rng.permutation(np.arange(5 * kind, 5 * kind + 5))[:3]
        others = np.arange(15, 59)
        early = rng.permutation(others[::2])[: LENGTH // 2]
        late = rng.permutation(others[1::2])[: LENGTH // 2]
        genes = self.vocabulary.token_ids[
            np.concatenate([marks, early, late, [59] if sex else []]).astype(int)
        ]
        if self.vocabulary.has_cls:
            special = self.vocabulary.special_tokens
            genes = np.concatenate([[special["<cls>"]], genes, [special["<eos>"]]])
        return genes.astype(np.int32)

    def write_labels(self, types: np.ndarray, name: str = "cells.parquet") -> Path:
        """Write a table of cells with these classes."""
        sexes = [None if i % 3 == 0 else "fm"[s] for i, s in enumerate(self.sexes)]
        columns = {
            "cell_id": [f"cell{i}" for i in range(N_CELLS)],
            "type": ["ABC"[t] for t in types],
            "sex": pa.array(sexes, pa.string()),
            "donor": [f"d{i % DONORS}" for i in range(N_CELLS)],
        }
        write_table(pa.table(columns), self.folder / name)
        return self.folder / name
