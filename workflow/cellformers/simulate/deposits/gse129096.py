"""GSE129096 (iPSC to cardiomyocyte, Drop-seq and DroNc-seq): three dense tables and a matrix of species.

What is troublesome: all labels are in the names of the columns, <barcode>_<day>_<Rep>; not every day is there for
both lines; two files have symbols and one has Ensembl ids; the Drop-seq file holds chimpanzee cells, which only their
barcodes in the matrix of species tell, and a barcode may occur on two days or on the other platform.
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
from cellformers.simulate.deposits.formats import Drawn, as_file, dense_text, gzipped, separated
from cellformers.simulate.deposits.genome import Array, Genome

# the combinations of line and day that the deposit holds
SAMPLES = {
    "drop": [("Rep1", day) for day in (0, 1, 3, 7)] + [("Rep2", day) for day in (0, 1, 3, 7, 15)],
    "dronc": [("Rep1", day) for day in (0, 3, 7)] + [("Rep2", day) for day in (0, 1, 3, 7, 15)],
}
FILES = {
    "drop": "GSE129096_DROP_combined_allcells.tsv.gz",
    "dronc": "GSE129096_DRONC_combined_allcells.tsv.gz",
    "heart": "GSE129096_HumanHeartDroNc.tsv.gz",
}
SPECIES = "species_assign_matrix.txt"
PROGRESS = {0: 0.0, 1: 0.2, 3: 0.45, 7: 0.75, 15: 1.0}  # from iPSC to cardiomyocyte
# so that most cells pass the authors' filters, over 400 genes in Drop-seq and 300 in DroNc-seq
DEPTH = {"drop": 5500.0, "dronc": 2800.0, "heart": 2000.0}
CHIMPANZEES = 0.15  # part of the Drop-seq cells
SCORE_OF_CHIMPANZEES = 0.5  # below
MIN_CELLS = 10  # genes in no more cells were left out by the authors


def draw(genome: Genome, n_cells: int) -> Drawn:
    """The four files; each platform has so many cells, the heart a third of them."""
    tables: dict[str, tuple[pd.DataFrame, Cells, sparse.csr_array]] = {}
    for part in ("drop", "dronc", "heart"):
        rng = genome.rng("gse129096", part)
        obs = _draw_heart(rng, n_cells // 3) if part == "heart" else _draw_labels(rng, part, n_cells)
        cells = _cells(part, obs)
        tables[part] = obs, cells, draw_counts(genome, rng, cells)
    drop, dronc = tables["drop"][0], tables["dronc"][0]
    _share_barcodes(drop, dronc)
    files = {}
    for part, (obs, _, counts) in tables.items():
        kept = np.arange(counts.shape[1])
        if part != "heart":
            kept = np.flatnonzero((counts > 0).sum(axis=0) > MIN_CELLS)
        genes = (genome.gene_ids if part == "heart" else genome.symbols)[kept]
        text = dense_text(counts[:, kept], genes.tolist(), _column_names(obs).tolist(), corner="gene")
        tables[part] = obs, tables[part][1], counts[:, kept]
        files[FILES[part]] = as_file(gzipped(text))
    rng = genome.rng("gse129096", "species")
    files[SPECIES] = as_file(_species_matrix(rng, drop, tables["drop"][2].sum(axis=1)))
    return Drawn(files, _describe(genome, tables))


def _draw_labels(rng: np.random.Generator, part: str, n_cells: int) -> pd.DataFrame:
    """One row a cell, sample after sample; every barcode is unlike the others of its platform."""
    sizes = allot(n_cells, np.ones(len(SAMPLES[part])).tolist())
    samples = [sample for sample, size in zip(SAMPLES[part], sizes, strict=True) for _ in range(size)]
    obs = pd.DataFrame(samples, columns=["line", "day"])
    obs["barcode"] = draw_barcodes(rng, n_cells, 12)
    obs["chimpanzee"] = rng.permutation(n_cells) < CHIMPANZEES * n_cells if part == "drop" else False
    return obs


def _draw_heart(rng: np.random.Generator, n_cells: int) -> pd.DataFrame:
    """Cells of an adult heart, of two types that the file does not name."""
    types = rng.choice(["Cardiomyocyte", "Fibroblast"], size=n_cells, p=[0.6, 0.4])
    return pd.DataFrame({"type": types, "barcode": draw_barcodes(rng, n_cells, 12)})


def _cells(part: str, obs: pd.DataFrame) -> Cells:
    """iPSC turn into cardiomyocytes by way of progenitors; a cell may be ahead of its day or behind."""
    n = len(obs)
    if part == "heart":
        return Cells(
            states=levels("type", obs["type"], 1.0),
            donors=["heart"] * n,
            libraries=["gse129096 heart"] * n,
            depth=DEPTH[part],
            platform="dronc",
        )
    place = obs["day"].map(PROGRESS).to_numpy(float)
    states: dict[str, Array] = {
        "type:iPSC": 1.0 - place,
        "type:Cardiomyocyte": place,
        "type:Cardiac progenitor": 4 * place * (1 - place),
        **levels("day", obs["day"], 0.35),
        **levels("line", obs["line"], 0.2),
    }
    if part == "drop":
        states["species:chimpanzee"] = 1.0 * obs["chimpanzee"].to_numpy()
    samples = "gse129096 " + part + " " + obs["line"] + " " + obs["day"].astype(str)
    return Cells(
        states=states,
        donors=obs["line"].tolist(),
        libraries=samples.tolist(),
        depth=DEPTH[part],
        platform=part,
        mitochondrial_share=0.07 if part == "drop" else 0.01,
    )


def _share_barcodes(drop: pd.DataFrame, dronc: pd.DataFrame) -> None:
    """One barcode twice in the Drop-seq file, on two days, and one of a chimpanzee cell in the DroNc-seq file."""
    human = drop.index[~drop["chimpanzee"]]
    drop.loc[human[-1], "barcode"] = drop.loc[human[0], "barcode"]
    dronc.loc[0, "barcode"] = drop.loc[drop.index[drop["chimpanzee"]][0], "barcode"]


def _column_names(obs: pd.DataFrame) -> pd.Series:
    if "day" not in obs:
        return obs["barcode"]
    return obs["barcode"] + "_" + obs["day"].astype(str) + "_" + obs["line"]


def _species_matrix(rng: np.random.Generator, drop: pd.DataFrame, totals: Array) -> bytes:
    """Transcripts by species of all chimpanzee cells, of most human ones, and of barcodes that are not in the file."""
    listed = drop.assign(total=totals).drop_duplicates("barcode")
    listed = listed[listed["chimpanzee"] | (rng.random(len(listed)) < 0.8)]
    others = sorted(set(draw_barcodes(rng, len(drop) // 5, 12)) - set(drop["barcode"]))
    known = {row["barcode"]: (row["chimpanzee"], row["total"]) for row in listed.to_dict(orient="records")}
    known |= {code: (True, int(rng.integers(100, 3000))) for code in others}
    rows = []
    for barcode in sorted(known):
        chimpanzee, total = known[barcode]
        own = rng.beta(40, 3)
        human = max(1, round(total * ((1 - own) if chimpanzee else own)))
        rows.append((barcode, human, total - human, repr(human / total)))
    header = ("CB", "human_score", "panTro_score", "hg_specificity_score")
    return separated([header, *rows], separator="\t", end="\r\n")


def _describe(
    genome: Genome, tables: dict[str, tuple[pd.DataFrame, Cells, sparse.csr_array]]
) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    states: dict[str, Any] = {}
    for part, (obs, cells, counts) in tables.items():
        table = obs.assign(name=_column_names(obs), n_counts=counts.sum(axis=1))
        parts[part] = {
            "n_cells": len(obs),
            "n_genes": counts.shape[1],
            "n_counts": int(counts.sum()),
            "n_chimpanzees": int(obs["chimpanzee"].sum()) if "chimpanzee" in obs else 0,
            "cells": table.to_dict(orient="list"),
        }
        states |= describe_states(genome, cells)
    return {"parts": parts, "states": states}
