"""Cells, droplets and counts of one simulated dataset (formulas: `cellformers.simulate`)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from cellformers.simulate.truth import CELL_TYPES, Model, Truth


@dataclass(frozen=True)
class Dataset:
    """What distinguishes one dataset from the other."""

    name: str
    n_cells: int
    n_donors: int
    depth: float  # median counts per cell
    efficiency: float  # standard deviation of the platform's gene-wise log efficiency
    empty: float  # part of droplets that are nearly empty
    unlabelled: float  # part of cells without a cell type, besides the empty droplets


def draw_dataset(
    rng: np.random.Generator, model: Model, truth: Truth, dataset: Dataset
) -> tuple[sparse.csr_array, pd.DataFrame]:
    """Counts, int32 CSR [n_cells, n_genes] in the order of `truth`, and labels, donor after donor."""
    n_types = len(CELL_TYPES)
    platform = dataset.efficiency * _gene_effect(rng, truth)
    sizes = rng.multinomial(dataset.n_cells, rng.dirichlet(np.full(dataset.n_donors, 40.0)))
    batches = [model.batch_effect * _gene_effect(rng, truth) for _ in range(0, dataset.n_donors, 2)]
    counts, labels = [], []
    for donor, size in enumerate(sizes):
        batch = donor // 2  # two donors are sequenced in one library
        gene_effect = platform + batches[batch] + model.donor_effect * _gene_effect(rng, truth)
        proportions = rng.dirichlet(60.0 * np.array([kind.proportion for kind in CELL_TYPES]))
        types = rng.choice(n_types, size=size, p=proportions)
        droplet = _draw_droplets(rng, model, dataset, size)
        counts.append(_draw_counts(rng, model, truth, dataset, types, droplet, gene_effect))
        names = np.array([kind.name for kind in CELL_TYPES], object)[types]
        names[(droplet == "empty") | (rng.random(size) < dataset.unlabelled)] = None
        labels.append(
            pd.DataFrame(
                {
                    "cell_type": names,
                    "donor": f"{dataset.name}_donor_{donor + 1}",
                    "batch": f"{dataset.name}_library_{batch + 1}",
                    "age": int(rng.integers(20, 80)),
                    "tissue": "simulated",
                    "droplet": droplet,
                }
            )
        )
    obs = pd.concat(labels, ignore_index=True)
    obs.index = pd.Index(_draw_barcodes(rng, obs["batch"]), name="barcode")
    return sparse.csr_array(sparse.vstack(counts, format="csr")), obs


def _gene_effect(rng: np.random.Generator, truth: Truth) -> np.ndarray:
    """Standard normal for every gene but the mitochondrial ones, the same for both factors of a pair."""
    n_pairs, n_factors = len(truth.pair) // 2, len(truth.pair)
    drawn = rng.normal(size=n_pairs + len(truth.log_rate) - n_factors)
    return np.concatenate([drawn[:n_pairs][truth.pair], drawn[n_pairs:]])


def _draw_droplets(rng: np.random.Generator, model: Model, dataset: Dataset, size: int) -> np.ndarray:
    """What every droplet of a donor holds, object [size]; fixed numbers of each kind at random places."""
    droplet = np.full(size, "cell", dtype=object)
    parts = (("dying", model.dying), ("doublet", model.doublets), ("empty", dataset.empty))
    kinds = [kind for kind, part in parts for _ in range(int(np.ceil(part * size)))]
    droplet[rng.permutation(size)[: len(kinds)]] = kinds[:size]
    return droplet


def _draw_counts(
    rng: np.random.Generator,
    model: Model,
    truth: Truth,
    dataset: Dataset,
    types: np.ndarray,
    droplet: np.ndarray,
    gene_effect: np.ndarray,
) -> sparse.csr_array:
    """Counts of one donor, int32 CSR [len(types), n_genes]."""
    size, n_factors = len(types), len(truth.pair)
    levels = rng.normal(size=(size, model.programmes))
    phase = rng.uniform(0.0, 2 * np.pi, size=size)
    levels[:, 0], levels[:, 1] = np.sqrt(2) * np.cos(phase), np.sqrt(2) * np.sin(phase)
    activity = (
        np.sqrt(model.variance_type) * truth.type_activity[types]
        + np.sqrt(model.variance_donor) * rng.normal(size=n_factors // 2)[truth.pair]
        + np.sqrt(model.variance_programme) * levels[:, truth.factor_programme]
        + np.sqrt(model.variance_own) * rng.normal(size=(size, n_factors))
    )
    log_rate = np.tile(truth.log_rate + gene_effect, (size, 1))
    log_rate[:, :n_factors] += model.own_effect * activity
    # a sparse product: its order of summation, hence its rounding, depends on no BLAS and no number of threads
    log_rate[:, -truth.weights.shape[1] :] += (truth.weights.T @ activity.T).T

    depth = dataset.depth * np.exp(
        rng.normal(0.0, model.log_depth_donor) + rng.normal(0.0, model.log_depth_cell, size=size)
    )
    centre = np.log(model.mitochondrial_share / (1 - model.mitochondrial_share))
    logit = (
        centre + rng.normal(0.0, model.logit_share_donor) + rng.normal(0.0, model.logit_share_cell, size=size)
    )
    dying = droplet == "dying"
    logit[dying] = rng.normal(0.0, 0.5, size=int(dying.sum()))
    depth[dying] /= 2
    mitochondrial = 1 / (1 + np.exp(-logit))
    nuclear = np.exp(log_rate)
    nuclear *= ((1 - mitochondrial) / nuclear.sum(axis=1))[:, None]
    shares = np.hstack([nuclear, mitochondrial[:, None] * truth.mitochondrial_profile])

    expected = depth[:, None] * shares
    whole = np.flatnonzero(droplet == "cell")
    partners = rng.choice(whole, size=int((droplet == "doublet").sum()))
    expected[droplet == "doublet"] += expected[partners]
    empty = droplet == "empty"
    empty_depth = model.empty_depth * np.exp(rng.normal(0.0, 0.7, size=int(empty.sum())))
    expected[empty] = empty_depth[:, None] * shares[whole].mean(axis=0)
    overdispersed = expected * rng.gamma(1 / truth.dispersion, truth.dispersion, size=expected.shape)
    return sparse.csr_array(rng.poisson(overdispersed).astype(np.int32))


def _draw_barcodes(rng: np.random.Generator, batch: pd.Series) -> list[str]:
    """Barcodes as 10x writes them: 16 bases, unlike in the whole dataset, and the number of the library."""
    numbers = rng.choice(4**16, size=len(batch), replace=False)
    bases = np.array(list("ACGT"))[(numbers[:, None] >> (2 * np.arange(16))) & 3]
    return [
        f"{''.join(row)}-{name.rsplit('_', 1)[1]}" for row, name in zip(bases.tolist(), batch, strict=True)
    ]
