"""GSE156793 (human fetal atlas): a gzipped dense loom, and tables of cells and genes.

What is troublesome: the loom is gzipped as a whole, dense, with counts as floats, without CellID; ids have versions;
short names repeat; tables end in .txt and are separated by commas; S1 has another order and more cells; some cells have
no type, which loom says with `nan` and S1 with `NA`.
"""

import io
from pathlib import Path
from typing import Any

import h5py
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
from cellformers.simulate.deposits.formats import Drawn, Writer, as_file, gzipped, separated
from cellformers.simulate.deposits.genome import Array, Genome

LOOM = "GSE156793_S3_gene_count.loom.gz"
CELLS_TABLE = "GSE156793_S1_metadata_cells.txt.gz"
GENES_TABLE = "GSE156793_S2_Metadata_genes.txt.gz"
# organ: its own main types; others occur in all of them
ORGANS = {
    "Adrenal": ("Adrenocortical cells",),
    "Cerebellum": ("Purkinje neurons", "Astrocytes"),
    "Cerebrum": ("Excitatory neurons", "Astrocytes"),
    "Eye": ("Photoreceptor cells",),
    "Heart": ("Cardiomyocytes",),
    "Intestine": ("Intestinal epithelial cells",),
    "Kidney": ("Metanephric cells",),
    "Liver": ("Hepatoblasts",),
    "Lung": ("Bronchiolar and alveolar epithelial cells",),
    "Muscle": ("Skeletal muscle cells",),
    "Pancreas": ("Acinar cells",),
    "Placenta": ("Trophoblast giant cells",),
    "Spleen": ("Erythroblasts",),
    "Stomach": ("Goblet cells",),
    "Thymus": ("Thymocytes",),
}
EVERYWHERE = ("Vascular endothelial cells", "Stromal cells", "Erythroblasts")
SAME = {"Cardiomyocytes": "Cardiomyocyte"}  # known under this name to other deposits
WHOLE_CELLS = {"Adrenal", "Kidney", "Liver", "Spleen", "Thymus"}  # the others are nuclei
DAYS = (72, 85, 89, 94, 100, 110, 113, 117, 122, 129)  # of ten fetuses
ORGANS_OF_A_FETUS = 6
UNTYPED = 0.03
EXTRA_CELLS = 12  # in S1 alone
COLUMNS = (
    "sample", "Organ", "Main_cluster_name", "Organ_cell_lineage", "Fetus_id", "Sex", "Assay", "Development_day",
    "Main_cluster_umap_1", "Main_cluster_umap_2",
)  # fmt: skip


def draw(genome: Genome, n_cells: int) -> Drawn:
    """S1, S2 and S3 with so many cells."""
    rng = genome.rng("gse156793")
    obs = _draw_labels(rng, n_cells)
    cells = Cells(
        states={
            **levels("type", obs["type"].replace(SAME), 1.1),
            **levels("organ", obs["Organ"], 0.5),
            **levels("assay", obs["Assay"], 0.3),
        },
        donors=obs["Fetus_id"].tolist(),
        libraries=("gse156793 " + obs["Fetus_id"] + " " + obs["Organ"]).tolist(),
        depth=700.0,
        platform="sci-RNA-seq3",
        mitochondrial_share=0.01,
    )
    counts = draw_counts(genome, rng, cells)
    genes = _draw_genes(genome)
    files = {
        LOOM: _loom_writer(counts, obs, genes),
        CELLS_TABLE: as_file(gzipped(_cells_table(rng, obs, counts.sum(axis=1)))),
        GENES_TABLE: as_file(gzipped(separated([tuple(genes), *genes.itertuples(index=False)]))),
    }
    table = obs.assign(n_counts=counts.sum(axis=1))
    part = {
        "n_cells": n_cells,
        "n_labelled": int((obs["Main_cluster_name"] != "nan").sum()),
        "n_counts": int(counts.sum()),
        "cells": table[["sample", "type", *COLUMNS[1:8], "n_counts"]].to_dict(orient="list"),
    }
    return Drawn(files, {"parts": {"all": part}, "states": describe_states(genome, cells)})


def _draw_labels(rng: np.random.Generator, n_cells: int) -> pd.DataFrame:
    """One row a cell in no order; `type` is what it is, Main_cluster_name what the deposit says."""
    fetuses = [f"H{27001 + 113 * i}" for i in range(len(DAYS))]
    organs = list(ORGANS)
    # fetus i gave organs i, i + 2, i + 4, ...: every organ comes from several fetuses
    samples = [
        (i, organs[(3 * i + 2 * j) % len(organs)]) for i in range(len(DAYS)) for j in range(ORGANS_OF_A_FETUS)
    ]
    sizes = allot(n_cells, rng.dirichlet(np.full(len(samples), 20.0)).tolist())
    where = [sample for sample, size in zip(samples, sizes, strict=True) for _ in range(size)]
    where = [where[i] for i in rng.permutation(n_cells)]
    types = [_draw_type(rng, organ) for _, organ in where]
    untyped = rng.permutation(n_cells) < max(3, round(UNTYPED * n_cells))
    obs = pd.DataFrame(
        {
            "sample": [f"{code}-{where[i][0]}" for i, code in enumerate(draw_barcodes(rng, n_cells, 20))],
            "type": types,
            "Organ": [organ for _, organ in where],
            "Main_cluster_name": np.where(untyped, "nan", types),
            "Fetus_id": [fetuses[i] for i, _ in where],
            "Sex": ["F" if i % 2 else "M" for i, _ in where],
            "Assay": ["cell" if organ in WHOLE_CELLS else "nuclei" for _, organ in where],
            "Development_day": [DAYS[i] for i, _ in where],
            "Main_cluster_umap_1": rng.normal(size=n_cells).round(4),
            "Main_cluster_umap_2": rng.normal(size=n_cells).round(4),
        }
    )
    obs["Organ_cell_lineage"] = np.where(untyped, "nan", obs["Organ"] + "-" + obs["type"])
    return obs


def _draw_type(rng: np.random.Generator, organ: str) -> str:
    own = ORGANS[organ]
    return str(rng.choice(own) if rng.random() < 0.6 else rng.choice(EVERYWHERE))


def _draw_genes(genome: Genome) -> pd.DataFrame:
    """gene_id with version, gene_type and gene_short_name, which a few genes have in common with another one."""
    rng = genome.rng("gse156793", "genes")
    versions = rng.integers(1, 16, size=len(genome.gene_ids))
    names = genome.symbols.copy()
    doubled = rng.choice(np.flatnonzero(genome.gene_types == "target"), size=(3, 2), replace=False)
    names[doubled[:, 0]] = names[doubled[:, 1]]
    return pd.DataFrame(
        {
            "gene_id": [f"{gene}.{version}" for gene, version in zip(genome.gene_ids, versions, strict=True)],
            "gene_type": "protein_coding",
            "gene_short_name": names,
        }
    )


def _cells_table(rng: np.random.Generator, obs: pd.DataFrame, totals: Array) -> bytes:
    """S1: the cells in another order, and some that are not in the loom."""
    extra = obs.iloc[:EXTRA_CELLS].assign(
        sample=[f"{code}-99" for code in draw_barcodes(rng, EXTRA_CELLS, 20)]
    )
    reads = np.concatenate([totals, totals[:EXTRA_CELLS]])
    both = pd.concat([obs, extra], ignore_index=True).assign(All_reads=reads * 3, Exon_reads=reads)
    both = both.rename(columns={f"Main_cluster_umap_{i}": f"Global_umap_{i}" for i in (1, 2)}).replace(
        "nan", "NA"
    )
    columns = [
        "sample", "All_reads", "Exon_reads", *COLUMNS[1:4], "Assay", "Development_day", "Fetus_id", "Sex",
        "Global_umap_1", "Global_umap_2",
    ]  # fmt: skip
    rows = both[columns].iloc[rng.permutation(len(both))]
    return separated([columns, *rows.itertuples(index=False)])


def _loom_writer(counts: sparse.csr_array, obs: pd.DataFrame, genes: pd.DataFrame) -> Writer:
    """S3: an HDF5 file with dense floats, genes x cells, in chunks of 64 x 64, gzipped once more."""

    def write(path: Path) -> None:
        buffer = io.BytesIO()
        with h5py.File(buffer, "w") as file:
            file.create_dataset(
                "matrix", data=counts.T.toarray().astype(np.float64), chunks=(64, 64), compression="gzip"
            )
            for name in ("layers", "row_graphs", "col_graphs"):
                file.create_group(name)
            for group, table in (("row_attrs", genes), ("col_attrs", obs[list(COLUMNS)])):
                for column in table:
                    file[f"{group}/{column}"] = _stored(table[column])
        path.write_bytes(gzipped(buffer.getvalue()))

    return write


def _stored(column: pd.Series) -> Any:
    """Numbers as they are, text as UTF-8 of variable length."""
    if column.dtype != object:
        return column.to_numpy()
    return np.array(column.tolist(), dtype=h5py.string_dtype())
