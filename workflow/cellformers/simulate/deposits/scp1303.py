"""SCP1303 (dilated and hypertrophic hearts): the h5ad of the portal, or its text form; both are fetched by hand.

What is troublesome: X of the h5ad holds corrected counts and the layer `cellranger_raw` the uncorrected ones; the
second line of the text form's table is no cell; diseases are constant within a donor, and donors differ.
"""

from collections.abc import Mapping
from pathlib import Path
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
from cellformers.simulate.deposits.formats import Drawn, Writer, as_file, separated
from cellformers.simulate.deposits.genome import Array, Genome

H5AD = "human_dcm_hcm_scportal_03.17.2022.h5ad"
TEXT = {
    "matrix": "DCM_HCM_Expression_Matrix_raw_counts_V1.mtx",
    "genes": "DCM_HCM_Expression_Matrix_genes_V1.tsv",
    "barcodes": "DCM_HCM_Expression_Matrix_barcodes_V1.tsv",
    "metadata": "DCM_HCM_MetaData_V1.txt",
}
# the published split of donors; which of them has which disease is drawn within these numbers
SPLIT = {
    "train": (
        1447, 1600, 1462, 1558, 1300, 1508, 1358, 1678, 1561, 1304, 1610, 1430, 1472, 1707, 1726, 1504, 1425, 1617,
        1631, 1735, 1582, 1722, 1622, 1630, 1290, 1479, 1371, 1549, 1515,
    ),
    "eval": (1422, 1510, 1539, 1606, 1702),
    "test": (1437, 1516, 1602, 1685, 1718),
    "unused": (1540, 1547, 1603),
}  # fmt: skip
DISEASES = {
    "train": {"NF": 9, "HCM": 11, "DCM": 9},
    "eval": {"NF": 2, "HCM": 2, "DCM": 1},
    "test": {"NF": 2, "HCM": 2, "DCM": 1},
    "unused": {"NF": 3},
}
ONTOLOGY = {
    "NF": ("PATO:0000461", "normal"),
    "HCM": ("MONDO:0005045", "hypertrophic cardiomyopathy"),
    "DCM": ("MONDO:0005021", "dilated cardiomyopathy"),
}
# type: lineage, part of the cells, id and name in the ontology
TYPES = {
    "Cardiomyocyte_I": ("Cardiomyocyte", 0.28, "CL:0000746", "cardiac muscle cell"),
    "Cardiomyocyte_II": ("Cardiomyocyte", 0.18, "CL:0000746", "cardiac muscle cell"),
    "Cardiomyocyte_III": ("Cardiomyocyte", 0.10, "CL:0000746", "cardiac muscle cell"),
    "Fibroblast_I": ("Fibroblast", 0.14, "CL:0002548", "fibroblast of cardiac tissue"),
    "Fibroblast_II": ("Fibroblast", 0.06, "CL:0002548", "fibroblast of cardiac tissue"),
    "Activated_fibroblast": ("Fibroblast", 0.05, "CL:0002548", "fibroblast of cardiac tissue"),
    "Macrophage": ("Macrophage", 0.08, "CL:0000235", "macrophage"),
    "Proliferating_macrophage": ("Macrophage", 0.03, "CL:0000235", "macrophage"),
    "Endothelial_I": ("Vascular endothelial cells", 0.08, "CL:0010008", "cardiac endothelial cell"),
}
AMBIENT = 0.05  # counts of free RNA that a droplet holds besides those of its nucleus
SINGLE_SAMPLES = 4  # donors with one sample; the others have two: 80 samples of 42 donors


def draw(genome: Genome, n_cells: int, *, form: str = "h5ad") -> Drawn:
    """The h5ad of the portal, or with form "text" its matrix, genes, barcodes and table of cells."""
    rng = genome.rng("scp1303")
    donors = _draw_donors(rng)
    obs = _draw_labels(rng, donors, n_cells)
    cells = Cells(
        states=_states(obs),
        donors=obs["donor_id"].tolist(),
        libraries=obs["biosample_id"].tolist(),
        depth=1200.0,
        platform="nuclei",
        mitochondrial_share=0.02,
    )
    counts = draw_counts(genome, rng, cells)
    ambient = rng.poisson(AMBIENT * counts.sum(axis=1)[:, None] * (counts.sum(axis=0) / counts.sum()))
    raw = sparse.csr_array(counts + sparse.csr_array(ambient.astype(np.int32)))
    obs = _with_metrics(rng, genome, obs, counts, raw)
    files = {H5AD: _h5ad_writer(rng, genome, counts, raw, obs)} if form == "h5ad" else _text(genome, raw, obs)
    part = {
        "n_cells": n_cells,
        "n_counts": int(raw.sum()),
        "n_counts_corrected": int(counts.sum()),
        "cells": {
            "name": obs.index.tolist(),
            **obs[["donor_id", "disease", "cell_type_leiden0.6"]].to_dict(orient="list"),
            "n_counts": raw.sum(axis=1).tolist(),
        },
    }
    truth = {"parts": {"all": part}, "states": describe_states(genome, cells)}
    truth["split"] = {side: [f"P{donor}" for donor in members] for side, members in SPLIT.items()}
    return Drawn(files, truth)


def _draw_donors(rng: np.random.Generator) -> pd.DataFrame:
    """One row a donor: disease, sex, age, ejection fraction, number of samples."""
    rows = []
    for side, members in SPLIT.items():
        diseases = [disease for disease, n in DISEASES[side].items() for _ in range(n)]
        for donor, place in zip(members, rng.permutation(len(members)), strict=True):
            rows.append((f"P{donor}", diseases[place]))
    donors = pd.DataFrame(sorted(rows), columns=["donor_id", "disease"])
    centre = donors["disease"].map({"NF": 60.0, "HCM": 65.0, "DCM": 20.0})
    return donors.assign(
        sex=rng.choice(["female", "male"], size=len(donors)),
        age=rng.integers(25, 75, size=len(donors)),
        lvef=np.clip(np.rint(rng.normal(centre, 6.0)), 5, 80),
        n_samples=np.where(rng.permutation(len(donors)) < SINGLE_SAMPLES, 1, 2),
    )


def _draw_labels(rng: np.random.Generator, donors: pd.DataFrame, n_cells: int) -> pd.DataFrame:
    """One row a nucleus, donor after donor, about as many of each."""
    parts = []
    weights = np.array([share for _, share, *_ in TYPES.values()])
    for donor, size in zip(
        donors.to_dict(orient="records"), allot(n_cells, np.ones(len(donors)).tolist()), strict=True
    ):
        samples = rng.integers(1, donor["n_samples"] + 1, size=size)
        types = rng.choice(list(TYPES), size=size, p=rng.dirichlet(60 * weights))
        part = pd.DataFrame(
            {
                "biosample_id": [f"{donor['donor_id']}_{i}" for i in samples],
                "donor_id": donor["donor_id"],
                "disease": donor["disease"],
                "sex": donor["sex"],
                "age": donor["age"],
                "lvef": donor["lvef"],
                "cell_type_leiden0.6": types,
                "SubCluster": [
                    f"{kind}.{i}" for kind, i in zip(types, rng.integers(0, 3, size), strict=True)
                ],
            }
        )
        parts.append(part)
    obs = pd.concat(parts, ignore_index=True)
    number = {sample: i for i, sample in enumerate(sorted(set(obs["biosample_id"])))}
    codes = draw_barcodes(rng, len(obs), 16)
    obs.index = pd.Index(
        [f"{code}-1-{number[name]}" for code, name in zip(codes, obs["biosample_id"], strict=True)]
    )
    return obs


def _states(obs: pd.DataFrame) -> dict[str, Array]:
    """Diseases change cardiomyocytes most."""
    types = obs["cell_type_leiden0.6"]
    lineage = types.map({kind: family for kind, (family, *_) in TYPES.items()})
    muscle = (lineage == "Cardiomyocyte").to_numpy()
    return {
        **levels("type", lineage, 1.0),
        **levels("subtype", types, 0.5),
        **{
            f"{name} of cardiomyocytes": weights * muscle
            for name, weights in levels("disease", obs["disease"], 0.5).items()
        },
        **levels("disease", obs["disease"], 0.25),
    }


def _with_metrics(
    rng: np.random.Generator,
    genome: Genome,
    obs: pd.DataFrame,
    counts: sparse.csr_array,
    raw: sparse.csr_array,
) -> pd.DataFrame:
    """What CellBender and CellRanger say about a droplet."""
    mitochondrial = np.flatnonzero(genome.gene_types == "mitochondrial")
    return obs.assign(
        cellbender_ncount=counts.sum(axis=1),
        cellbender_ngenes=(counts > 0).sum(axis=1),
        cellranger_percent_mito=raw[:, mitochondrial].sum(axis=1) / raw.sum(axis=1),
        exon_prop=rng.beta(8, 8, size=len(obs)),
        cellbender_entropy=rng.normal(5.0, 0.3, size=len(obs)),
        cellranger_doublet_scores=rng.beta(2, 30, size=len(obs)),
    )


def _h5ad_writer(
    rng: np.random.Generator,
    genome: Genome,
    counts: sparse.csr_array,
    raw: sparse.csr_array,
    obs: pd.DataFrame,
) -> Writer:
    """The portal's h5ad; symbols name the genes."""
    kinds = sorted(TYPES)
    centres = 6 * rng.normal(size=(len(kinds), 2))
    places = centres[[kinds.index(kind) for kind in obs["cell_type_leiden0.6"]]]
    umap = (places + rng.normal(size=places.shape)).astype(np.float32)

    def write(path: Path) -> None:
        import anndata

        var = pd.DataFrame(
            {
                "gene_ids": genome.gene_ids,
                "feature_types": pd.Categorical(["Gene Expression"] * len(genome.gene_ids)),
                "genome": pd.Categorical(["GRCh38"] * len(genome.gene_ids)),
            },
            index=pd.Index(genome.symbols.tolist()),
        )
        named = ("biosample_id", "donor_id", "disease", "sex", "cell_type_leiden0.6", "SubCluster")
        hearts = anndata.AnnData(
            X=sparse.csr_matrix(counts.astype(np.float32)),
            obs=obs.astype(dict.fromkeys(named, "category")),
            var=var,
            obsm={"X_umap": umap},
            layers={"cellranger_raw": sparse.csr_matrix(raw.astype(np.float32))},
        )
        hearts.write_h5ad(path, compression="gzip")

    return write


def _text(genome: Genome, raw: sparse.csr_array, obs: pd.DataFrame) -> Mapping[str, Writer]:
    """The text form: raw counts of genes in 5 cells or more, genes x cells."""
    kept = np.flatnonzero((raw > 0).sum(axis=0) >= 5)
    entries = raw[:, kept].tocoo()
    lines: list[tuple[Any, ...]] = [(len(kept), len(obs), entries.nnz)]
    lines += zip((entries.col + 1).tolist(), (entries.row + 1).tolist(), entries.data.tolist(), strict=True)
    matrix = b"%%MatrixMarket matrix coordinate integer general\n" + separated(lines, separator=" ")
    genes = separated(zip(genome.gene_ids[kept], genome.symbols[kept], strict=True), separator="\t")
    columns = (
        "NAME", "biosample_id", "donor_id", "disease", "disease__ontology_label", "sex", "age", "cell_type",
        "cell_type__ontology_label",
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = [columns, ("TYPE", *["group"] * 5, "numeric", "group", "group")]
    for cell in obs.reset_index(names="name").to_dict(orient="records"):
        term, label = ONTOLOGY[cell["disease"]]
        kind = cell["cell_type_leiden0.6"]
        own = (cell["name"], cell["biosample_id"], cell["donor_id"], term, label, cell["sex"], cell["age"])
        rows.append((*own, *TYPES[kind][2:]))
    return {
        TEXT["matrix"]: as_file(matrix),
        TEXT["genes"]: as_file(genes),
        TEXT["barcodes"]: as_file(separated([[name] for name in obs.index])),
        TEXT["metadata"]: as_file(separated(rows, separator="\t")),
    }
