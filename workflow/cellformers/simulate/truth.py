"""What the simulated datasets share: genes, the network and cell types (formulas: `cellformers.simulate`)."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from cellformers.genes import MITOCHONDRIAL

# the 13 that code for proteins, and so have a tail of A that sequencing of messenger RNA catches
MITOCHONDRIAL_GENES = {
    gene: symbol for gene, symbol in sorted(MITOCHONDRIAL.items()) if not symbol.startswith(("MT-T", "MT-R"))
}
FIRST_SYNTHETIC_ID = 900_000_000  # ENSG009...: far above what Ensembl has given out, so no real gene is meant


class CellType(NamedTuple):
    """One leaf of the tree of cell types: `shared` is the part of its variance that its lineage has in common."""

    name: str
    lineage: int
    shared: float
    proportion: float


CELL_TYPES = (
    CellType("type_1a", 0, 0.85, 0.24),
    CellType("type_1b", 0, 0.85, 0.18),
    CellType("type_2a", 1, 0.50, 0.20),
    CellType("type_2b", 1, 0.50, 0.14),
    CellType("type_3", 2, 0.00, 0.14),
    CellType("type_4", 3, 0.00, 0.10),
)


@dataclass(frozen=True)
class Model:
    """The constants of the model; pairs are (mean, standard deviation), of the logarithm where it says log."""

    programmes: int = 8
    stable_genes: int = 50
    log_degree_sensitive: tuple[float, float] = (float(np.log(40)), 0.45)
    log_degree_insensitive: tuple[float, float] = (float(np.log(8)), 0.5)
    own_programme: float = 0.5  # expected part of a factor's targets from its own programme
    activating: float = 0.75
    edge_effect: float = 0.45
    log_edge_spread: float = 0.3
    own_effect: float = 0.9
    variance_type: float = 0.25
    variance_donor: float = 0.05
    variance_programme: float = 0.08
    variance_own: float = 0.62
    log_rate_factor: tuple[float, float] = (0.8, 0.5)
    log_rate_stable: tuple[float, float] = (2.3, 0.6)
    log_rate_target: tuple[float, float] = (-0.8, 1.7)
    log_dispersion: tuple[float, float] = (float(np.log(0.2)), 0.4)
    batch_effect: float = 0.2
    donor_effect: float = 0.15
    log_depth_donor: float = 0.15
    log_depth_cell: float = 0.45
    mitochondrial_share: float = 0.07
    logit_share_donor: float = 0.2
    logit_share_cell: float = 0.4
    dying: float = 0.02  # parts of all droplets
    doublets: float = 0.02
    empty_depth: float = 15.0


@dataclass(frozen=True)
class Truth:
    """What the two datasets share.

    Genes come in the order factors (2j, sensitive, and 2j + 1, insensitive, are a pair), stable genes, targets,
    mitochondrial genes; the files have them by gene id.
    """

    gene_ids: np.ndarray  # object [n_genes]
    symbols: np.ndarray  # object [n_genes]
    gene_types: np.ndarray  # object [n_genes]
    sensitive: np.ndarray  # bool [n_factors]
    pair: np.ndarray  # int64 [n_factors]
    factor_programme: np.ndarray  # int64 [n_factors]
    target_programme: np.ndarray  # int64 [n_targets]
    weights: sparse.csr_array  # float64 [n_factors, n_targets]
    log_rate: np.ndarray  # float64 [n_genes - 13]
    dispersion: np.ndarray  # float64 [n_genes]
    type_activity: np.ndarray  # float64 [n_types, n_factors]
    mitochondrial_profile: np.ndarray  # float64 [13]

    @property
    def out_degree(self) -> np.ndarray:
        """Number of targets of every factor, int64 [n_factors]."""
        return np.diff(self.weights.indptr).astype(np.int64)


def draw_truth(rng: np.random.Generator, model: Model, *, n_genes: int, n_factors: int) -> Truth:
    """Draw genes, network and cell types; numbers as `simulate` has checked them."""
    n_pairs, n_stable = n_factors // 2, model.stable_genes
    n_nuclear = n_genes - len(MITOCHONDRIAL_GENES)
    n_targets = n_nuclear - n_factors - n_stable
    pair = np.repeat(np.arange(n_pairs), 2)
    sensitive = np.arange(n_factors) % 2 == 0
    factor_programme = pair % model.programmes
    target_programme = np.arange(n_targets) % model.programmes
    weights = _draw_network(rng, model, sensitive, factor_programme, target_programme)

    def of_genes(law: tuple[float, float], n: int) -> np.ndarray:
        return rng.normal(*law, size=n)

    log_rate = np.concatenate(
        [
            of_genes(model.log_rate_factor, n_pairs)[pair],
            of_genes(model.log_rate_stable, n_stable),
            of_genes(model.log_rate_target, n_targets),
        ]
    )
    log_dispersion = np.concatenate(
        [of_genes(model.log_dispersion, n_pairs)[pair], of_genes(model.log_dispersion, n_genes - n_factors)]
    )
    lineages = rng.normal(size=(1 + max(kind.lineage for kind in CELL_TYPES), n_pairs))
    type_activity = np.stack(
        [
            np.sqrt(kind.shared) * lineages[kind.lineage]
            + np.sqrt(1 - kind.shared) * rng.normal(size=n_pairs)
            for kind in CELL_TYPES
        ]
    )

    number = rng.permutation(
        n_nuclear
    )  # place of a gene among the synthetic ids: says nothing about the gene
    is_factor = np.arange(n_nuclear) < n_factors
    symbols = np.empty(n_nuclear, dtype=object)
    for prefix, width, members in (
        ("TF", 3, np.flatnonzero(is_factor)),
        ("GENE", 4, np.flatnonzero(~is_factor)),
    ):
        for i, gene in enumerate(members[np.argsort(number[members])], start=1):
            symbols[gene] = f"{prefix}{i:0{width}d}"
    return Truth(
        gene_ids=np.array(
            [f"ENSG{FIRST_SYNTHETIC_ID + i + 1:011d}" for i in number] + list(MITOCHONDRIAL_GENES), object
        ),
        symbols=np.concatenate([symbols, np.array(list(MITOCHONDRIAL_GENES.values()), object)]),
        gene_types=np.repeat(
            np.array(["transcription_factor", "stable", "target", "mitochondrial"], object),
            [n_factors, n_stable, n_targets, len(MITOCHONDRIAL_GENES)],
        ),
        sensitive=sensitive,
        pair=pair,
        factor_programme=factor_programme,
        target_programme=target_programme,
        weights=weights,
        log_rate=log_rate,
        dispersion=np.exp(log_dispersion),
        type_activity=type_activity[:, pair],
        mitochondrial_profile=rng.dirichlet(np.full(len(MITOCHONDRIAL_GENES), 3.0)),
    )


def _draw_network(
    rng: np.random.Generator,
    model: Model,
    sensitive: np.ndarray,
    factor_programme: np.ndarray,
    target_programme: np.ndarray,
) -> sparse.csr_array:
    """Effects of factors on targets, float64 [n_factors, n_targets], column indices ascending."""
    n_targets = len(target_programme)
    indices, effects = [], []
    for is_sensitive, programme in zip(sensitive, factor_programme, strict=True):
        law = model.log_degree_sensitive if is_sensitive else model.log_degree_insensitive
        degree = int(np.clip(np.rint(np.exp(rng.normal(*law))), 1, n_targets // 2))
        own = target_programme == programme
        chance = np.where(own, model.own_programme / own.sum(), (1 - model.own_programme) / (~own).sum())
        indices.append(np.sort(rng.choice(n_targets, size=degree, replace=False, p=chance)))
        sign = np.where(rng.random(degree) < model.activating, 1.0, -1.0)
        effects.append(sign * model.edge_effect * np.exp(rng.normal(0.0, model.log_edge_spread, size=degree)))
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in indices])])
    return sparse.csr_array(
        (np.concatenate(effects), np.concatenate(indices), indptr), shape=(len(sensitive), n_targets)
    )


def gene_labels(truth: Truth) -> pd.DataFrame:
    """gene_id, symbol, label and matched pair of every factor, by gene_id."""
    n_factors = len(truth.sensitive)
    table = pd.DataFrame(
        {
            "gene_id": truth.gene_ids[:n_factors],
            "symbol": truth.symbols[:n_factors],
            "label": np.where(truth.sensitive, "sensitive", "insensitive"),
            "pair": truth.pair[:n_factors].astype(int),
        }
    )
    return table.sort_values("gene_id", ignore_index=True)


def describe(truth: Truth) -> dict[str, Any]:
    """The truth as JSON: cell types, programmes, and every factor with its pair, out-degree and targets."""
    n_factors, n_targets = truth.weights.shape
    n_nuclear = len(truth.log_rate)
    target_ids = truth.gene_ids[n_nuclear - n_targets : n_nuclear]
    factors = []
    for f in np.argsort(truth.gene_ids[:n_factors]):
        row = slice(truth.weights.indptr[f], truth.weights.indptr[f + 1])
        targets = target_ids[truth.weights.indices[row]]
        effects = truth.weights.data[row]
        factors.append(
            {
                "gene_id": truth.gene_ids[f],
                "symbol": truth.symbols[f],
                "label": "sensitive" if truth.sensitive[f] else "insensitive",
                "pair": int(truth.pair[f]),
                "programme": int(truth.factor_programme[f]),
                "out_degree": len(targets),
                "targets": {targets[i]: round(float(effects[i]), 4) for i in np.argsort(targets)},
            }
        )
    return {
        "cell_types": [kind._asdict() for kind in CELL_TYPES],
        "programmes": [
            sorted(target_ids[truth.target_programme == q])
            for q in range(1 + int(truth.target_programme.max()))
        ],
        "factors": factors,
    }
