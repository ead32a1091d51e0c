"""Counts of cells in given states, and what names them (model: `cellformers.simulate.deposits`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from cellformers.simulate.deposits.genome import Array, Genome

CELLS_AT_ONCE = 2000
ACTIVITY = 0.5  # of a state of strength 1, in standard deviations of an activity


@dataclass(frozen=True, kw_only=True)
class Cells:
    """What cells are like before anything is counted; arrays have one entry a cell."""

    states: Mapping[str, Array]
    """Name of a state: its weights w_ce times its strength s_e, float64 [n]."""
    donors: Sequence[str]
    libraries: Sequence[str]
    depth: float
    """Median counts of a cell."""
    platform: str | None = None
    """Name of the platform whose gene-wise efficiencies apply; None: all alike."""
    mitochondrial_share: float = 0.07


def levels(kind: str, values: Iterable[Any], strength: float) -> dict[str, Array]:
    """The states of a categorical label: `kind:value`, of equal strength where a cell has the value."""
    values = np.asarray(list(values), dtype=object)
    return {f"{kind}:{value}": strength * (values == value) for value in sorted(set(values), key=str)}


def draw_counts(genome: Genome, rng: np.random.Generator, cells: Cells) -> sparse.csr_array:
    """Counts, int32 CSR [n_cells, n_genes], genes by id."""
    n = len(cells.donors)
    names = list(cells.states)
    weights = np.array([cells.states[name] for name in names], float).T
    made = [genome.state(name) for name in names]
    shifts, activities = (np.stack([state[i] for state in made]) for i in (0, 1))
    blocks = []
    for start in range(0, n, CELLS_AT_ONCE):
        rows = slice(start, start + CELLS_AT_ONCE)
        # a sparse product: its order of summation, hence its rounding, depends on no BLAS and no number of threads
        mixed = sparse.csr_array(weights[rows])
        blocks.append(_draw_block(genome, rng, cells, rows, mixed @ shifts, ACTIVITY * (mixed @ activities)))
    return sparse.csr_array(sparse.vstack(blocks, format="csr"))[:, genome.order]


def _draw_block(
    genome: Genome, rng: np.random.Generator, cells: Cells, rows: slice, shifts: Array, activities: Array
) -> sparse.csr_array:
    """Counts of some of the cells; genes in the order of `genome.truth`."""
    truth, model = genome.truth, genome.model
    donors, libraries = list(cells.donors[rows]), list(cells.libraries[rows])
    size, n_factors = len(donors), len(truth.pair)
    programmes = rng.normal(size=(size, model.programmes))
    phase = rng.uniform(0.0, 2 * np.pi, size=size)
    programmes[:, 0], programmes[:, 1] = np.sqrt(2) * np.cos(phase), np.sqrt(2) * np.sin(phase)
    of_donor = _of_names(genome, "donor activity", donors, n_factors // 2)
    activity = (
        (activities + np.sqrt(model.variance_donor) * of_donor)[:, truth.pair]
        + np.sqrt(model.variance_programme) * programmes[:, truth.factor_programme]
        + np.sqrt(model.variance_own) * rng.normal(size=(size, n_factors))
    )
    log_rate = (
        truth.log_rate
        + shifts
        + model.donor_effect * _gene_effects(genome, "donor", donors)
        + model.batch_effect * _gene_effects(genome, "library", libraries)
    )
    if cells.platform is not None:
        log_rate += 0.35 * _gene_effects(genome, "platform", [cells.platform])
    log_rate[:, :n_factors] += model.own_effect * activity
    log_rate[:, genome.targets] += (truth.weights.T @ activity.T).T

    of_depth = _of_names(genome, "donor depth", donors, 1)[:, 0]
    depth = np.exp(model.log_depth_donor * of_depth + rng.normal(0.0, model.log_depth_cell, size=size))
    centre = np.log(cells.mitochondrial_share / (1 - cells.mitochondrial_share))
    mitochondrial = 1 / (1 + np.exp(-rng.normal(centre, model.logit_share_cell, size=size)))
    nuclear = np.exp(log_rate)
    nuclear *= ((1 - mitochondrial) / nuclear.sum(axis=1))[:, None]
    shares = np.hstack([nuclear, mitochondrial[:, None] * truth.mitochondrial_profile])
    expected = cells.depth * depth[:, None] * shares
    noisy = expected * rng.gamma(1 / truth.dispersion, truth.dispersion, size=expected.shape)
    return sparse.csr_array(rng.poisson(noisy).astype(np.int32))


def _of_names(genome: Genome, kind: str, names: Sequence[str], width: int) -> Array:
    """Standard normal numbers that belong to names, float64 [len(names), width]."""
    drawn = {name: genome.rng(kind, name).normal(size=width) for name in sorted(set(names))}
    return np.stack([drawn[name] for name in names])


def _gene_effects(genome: Genome, kind: str, names: Sequence[str]) -> Array:
    """The same for every nuclear gene, equal for both factors of a pair, float64 [len(names), n_nuclear]."""
    pair = genome.truth.pair
    drawn = _of_names(genome, kind, names, len(genome.truth.log_rate) - len(pair) // 2)
    return np.hstack([drawn[:, pair], drawn[:, len(pair) // 2 :]])


def allot(n: int, weights: Sequence[float], *, least: int = 1) -> list[int]:
    """Divide n cells: `least` each, the others by weights; what rounding leaves goes where it took most."""
    share = (n - least * len(weights)) * np.asarray(weights, float) / np.sum(weights)
    parts = np.floor(share).astype(int)
    lost = np.argsort(parts - share, kind="stable")[: n - least * len(weights) - parts.sum()]
    parts[lost] += 1
    return [least + int(part) for part in parts]


def draw_barcodes(rng: np.random.Generator, n: int, length: int) -> list[str]:
    """Different barcodes of so many bases."""
    numbers: dict[int, None] = {}
    while len(numbers) < n:
        numbers |= dict.fromkeys(rng.integers(0, 4**length, size=n - len(numbers)).tolist())
    digits = (np.array(list(numbers))[:, None] >> (2 * np.arange(length))) & 3
    return ["".join(row) for row in np.array(list("ACGT"))[digits].tolist()]


def describe_states(genome: Genome, cells: Cells) -> dict[str, Any]:
    """The markers of every state that cells are in, as JSON."""
    return {name: genome.markers(name) for name in cells.states}
