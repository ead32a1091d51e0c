"""GSE155468 (aortic aneurysm): a tar of dense text files by donor, and the authors' table of labels from elsewhere.

What is troublesome: labels name the samples otherwise (ATAA1 for TAA1) and end barcodes in `.1_4`, where the counts end
them in `-1` or `.1`; some headers are one field short, others begin with an empty field; one file has genes twice;
files lack genes that were not seen in them; a few cells of TAA1 have no label.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from cellformers.simulate.deposits.cells import (
    Cells,
    allot,
    describe_states,
    draw_barcodes,
    draw_counts,
    levels,
)
from cellformers.simulate.deposits.formats import Drawn, as_file, dense_text, gzipped, separated, tarred
from cellformers.simulate.deposits.genome import Array, Genome

FIRST_ACCESSION = 4704931
# donor as the files name it, and cells in the real file
DONORS = {
    "Con4": 3377, "Con6": 1193, "Con9": 3907, "TAA1": 6686, "TAA2": 4598, "TAA3": 3622, "TAA4": 6384, "TAA5": 4802,
    "TAA6": 3526, "TAA7": 6997, "TAA8": 3036,
}  # fmt: skip
# type: lineage, cells in the real table, some of its subtypes
TYPES = {
    "Tcell": ("lymphoid", 18950, ("CD4_active", "CD8_active")),
    "MonoMaphDC": ("myeloid", 13475, ("M1like1", "M2like1")),
    "SMC1": ("muscle", 4775, ("Contractile SMC", "Stressed SMC")),
    "Fibroblast": ("stromal", 3652, ("Fibroblast1", "Fibroblast2")),
    "NK": ("lymphoid", 2499, ("NK",)),
    "SMC2": ("muscle", 1666, ("Proliferating SMC1", "Proliferating SMC2")),
    "MSC": ("stromal", 996, ("MSC1", "MSC2")),
    "EC": ("endothelial", 891, ("EC1", "EC2")),
    "Plasma": ("lymphoid", 654, ("Plasma",)),
    "Mastcell": ("myeloid", 265, ("Mastcell",)),
    "Bcell": ("lymphoid", 259, ("Bcell",)),
}
UNLABELLED = ("TAA1", 46 / 6686)
REPEATED = ("TAA2", 2)  # the file that has so many genes twice
LABEL_COLUMNS = (
    "", "orig.ident", "nCount_RNA", "nFeature_RNA", "stim", "integrated_snn_res.0.6", "seurat_clusters", "celltype",
    "celltype2", "cellcycle",
)  # fmt: skip
MIN_CELLS = 5  # genes in fewer cells are not in the authors' object, so their sums leave them out


def draw(genome: Genome, n_cells: int) -> Drawn:
    """GSE155468_RAW.tar and meta_addsubcluster_cellcycle.csv with so many cells."""
    rng = genome.rng("gse155468")
    obs = _draw_labels(rng, n_cells)
    states = {
        **levels("type", obs["celltype"], 0.9),
        **levels("lineage", [TYPES[kind][0] for kind in obs["celltype"]], 0.6),
        **levels("subtype", obs["celltype2"], 0.25),
        **levels(
            "condition", ["aneurysm" if name.startswith("TAA") else "control" for name in obs["donor"]], 0.6
        ),
        **levels("cellcycle", obs["cellcycle"], 0.3),
    }
    cells = Cells(
        states=states,
        donors=obs["donor"].tolist(),
        libraries=("gse155468 " + obs["donor"]).tolist(),
        depth=1400.0,
    )
    counts = draw_counts(genome, rng, cells)
    members = {
        f"GSM{FIRST_ACCESSION + i}_{donor}.txt.gz": gzipped(
            _sample_text(genome, counts[np.flatnonzero(obs["donor"] == donor)], obs[obs["donor"] == donor], i)
        )
        for i, donor in enumerate(DONORS)
    }
    files = {
        "GSE155468_RAW.tar": as_file(tarred(members)),
        "meta_addsubcluster_cellcycle.csv": as_file(_label_table(obs, counts)),
    }
    return Drawn(files, _describe(genome, cells, obs, counts))


def _draw_labels(rng: np.random.Generator, n_cells: int) -> pd.DataFrame:
    """One row a cell, donor after donor: donor, barcode, labels of the authors' table, and whether it has them."""
    # powers, so that rare types and small samples are more than a cell or two
    weights = np.array([n for _, n, _ in TYPES.values()]) ** 0.35
    parts = []
    for donor, size in zip(DONORS, allot(n_cells, [n**0.5 for n in DONORS.values()]), strict=True):
        types = rng.choice(list(TYPES), size=size, p=rng.dirichlet(60 * weights / weights.sum()))
        part = pd.DataFrame(
            {
                "donor": donor,
                "barcode": draw_barcodes(rng, size, 16),
                "celltype": types,
                "celltype2": [str(rng.choice(TYPES[kind][2])) for kind in types],
                "cellcycle": rng.choice(["G1", "S", "G2M"], size=size, p=[0.78, 0.17, 0.05]),
                "labelled": True,
            }
        )
        if donor == UNLABELLED[0]:
            lost = rng.choice(size, size=max(2, round(UNLABELLED[1] * size)), replace=False)
            part.loc[lost, "labelled"] = False
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _sample_text(genome: Genome, counts: sparse.csr_array, obs: pd.DataFrame, number: int) -> bytes:
    """The file of one donor: genes by symbol, those of every second file only where they were seen in it."""
    genes = genome.symbols
    if number % 2:
        seen = np.flatnonzero(counts.sum(axis=0))
        counts, genes = counts[:, seen], genes[seen]
    if str(obs["donor"].iloc[0]) == REPEATED[0]:
        counts, genes = _repeat_genes(counts, genes, REPEATED[1])
    end = "-1" if number % 3 else ".1"
    header = "" if number % 2 else None
    return dense_text(counts, genes.tolist(), [code + end for code in obs["barcode"]], corner=header)


def _repeat_genes(counts: sparse.csr_array, genes: Array, n: int) -> tuple[sparse.csr_array, Array]:
    """The most expressed genes in two rows each: the second one has the counts of every other cell."""
    often = np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[:n])
    dense = counts.toarray()
    moved = dense[:, often].copy()
    moved[::2] = 0
    dense[:, often] -= moved
    return sparse.csr_array(np.hstack([dense, moved])), np.concatenate([genes, genes[often]])


def _label_table(obs: pd.DataFrame, counts: sparse.csr_array) -> bytes:
    """The authors' table, as R writes it, with the line ends of Windows."""
    kept = np.flatnonzero((counts > 0).sum(axis=0) >= MIN_CELLS)
    totals = counts[:, kept].sum(axis=1)
    detected = (counts[:, kept] > 0).sum(axis=1)
    number = {donor: i for i, donor in enumerate(DONORS, start=1)}
    cluster = {kind: i for i, kind in enumerate(TYPES)}
    rows = []
    for i, cell in enumerate(obs.to_dict(orient="records")):
        if cell["labelled"]:
            donor, kind = cell["donor"], cell["celltype"]
            sample, condition = donor, "Control"
            if donor.startswith("TAA"):
                sample, condition = f"A{donor}", "ATAA"
            name = f"{cell['barcode']}.1_{number[donor]}"
            clusters = (cluster[kind], cluster[kind])
            own = (kind, cell["celltype2"], cell["cellcycle"])
            rows.append((name, sample, totals[i], detected[i], condition, *clusters, *own))
    return separated([LABEL_COLUMNS, *rows], end="\r\n")


def _describe(genome: Genome, cells: Cells, obs: pd.DataFrame, counts: sparse.csr_array) -> dict[str, Any]:
    table = obs.assign(n_counts=counts.sum(axis=1))
    return {
        "parts": {
            "all": {
                "n_cells": len(obs),
                "n_labelled": int(obs["labelled"].sum()),
                "n_counts": int(counts.sum()),
                "cells": table.to_dict(orient="list"),
            }
        },
        "repeated_genes": {REPEATED[0]: REPEATED[1]},
        "states": describe_states(genome, cells),
    }
