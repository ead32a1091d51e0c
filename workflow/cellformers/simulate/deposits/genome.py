"""The genome that all simulated deposits share, and states that are drawn from their names (model: this package)."""

import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cellformers.simulate.truth import Model, Truth, draw_truth

Array = np.ndarray[Any, Any]

N_GENES, N_FACTORS = 900, 120
MARKERS = 30
UP = 0.8  # part of the markers of a state that it raises
LOG_MARKER_SPREAD = 0.3
OLD_SYMBOLS = 40  # genes that went by another name in an earlier annotation


@dataclass(frozen=True)
class Genome:
    """Genes and network of one seed.

    `truth` has its own order of genes (factors, stable genes, targets, mitochondrial genes). Files have genes by id:
    everything else here, and counts, are in that order.
    """

    seed: int
    model: Model
    truth: Truth

    @cached_property
    def order(self) -> Array:
        """Places in `truth` of the genes by id, int64 [n_genes]."""
        return np.argsort(self.truth.gene_ids)

    @cached_property
    def gene_ids(self) -> Array:
        """Ensembl ids without version, ascending, object [n_genes]."""
        return self.truth.gene_ids[self.order]

    @cached_property
    def symbols(self) -> Array:
        """Current symbols, all different, object [n_genes]."""
        return self.truth.symbols[self.order]

    @cached_property
    def gene_types(self) -> Array:
        """transcription_factor, stable, target or mitochondrial, object [n_genes]."""
        return self.truth.gene_types[self.order]

    @cached_property
    def symbol_of(self) -> dict[str, str]:
        """Current symbol by gene id."""
        return dict(zip(self.gene_ids.tolist(), self.symbols.tolist(), strict=True))

    @cached_property
    def old_symbols(self) -> dict[str, str]:
        """Former symbol by gene id, of some nuclear genes."""
        nuclear = self.gene_ids[self.gene_types != "mitochondrial"]
        chosen = self.rng("old symbols").choice(nuclear, size=OLD_SYMBOLS, replace=False)
        return {str(gene): f"OLD{i:03d}" for i, gene in enumerate(chosen, start=1)}

    @property
    def targets(self) -> slice:
        """Places of the targets in `truth`."""
        n_nuclear = len(self.truth.log_rate)
        return slice(n_nuclear - self.truth.weights.shape[1], n_nuclear)

    def rng(self, *names: str) -> np.random.Generator:
        """A generator that depends on the seed and these names only, so that deposits don't depend on each other."""
        return np.random.default_rng([self.seed, *(zlib.crc32(name.encode()) for name in names)])

    def state(self, name: str) -> tuple[Array, Array]:
        """Markers M_e, float64 [n_nuclear], and activities T_e, float64 [n_pairs], of a state."""
        rng = self.rng("state", name)
        shifts = np.zeros(len(self.truth.log_rate))
        chosen = rng.choice(np.arange(len(shifts))[self.targets], size=MARKERS, replace=False)
        sizes = np.exp(rng.normal(0.0, LOG_MARKER_SPREAD, size=MARKERS))
        shifts[chosen] = sizes * np.where(rng.random(MARKERS) < UP, 1.0, -1.0)
        return shifts, rng.normal(size=len(self.truth.pair) // 2)

    def markers(self, name: str) -> dict[str, list[str]]:
        """Ids of the genes that a state raises and lowers."""
        shifts, _ = self.state(name)
        ids = self.truth.gene_ids[: len(shifts)]
        return {"up": sorted(ids[shifts > 0].tolist()), "down": sorted(ids[shifts < 0].tolist())}


def draw_genome(seed: int) -> Genome:
    """The genome of a seed: 900 genes, 120 factors among them."""
    model = Model()
    rng = np.random.default_rng([seed, zlib.crc32(b"genome")])
    return Genome(seed, model, draw_truth(rng, model, n_genes=N_GENES, n_factors=N_FACTORS))
