"""Readers of deposits by the names that entries of the registry give them.

A reader of cells takes (the part's entry, paths of its files by name, an empty scratch folder) and gives a `Part`; one
of genes takes (the part's entry, paths by name) and gives `LabelledGenes`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from cellformers.deposits.entries import CellPart, GenePart
from cellformers.deposits.readers import genes, gse129096, gse155468, gse156793, scp1303
from cellformers.deposits.readers.common import Files, LabelledGenes, Part

CELL_READERS: Mapping[str, Callable[[CellPart, Files, Path], Part]] = {
    "gse155468": gse155468.read_all,
    "gse129096_drop": gse129096.read_drop,
    "gse129096_dronc": gse129096.read_dronc,
    "gse129096_heart": gse129096.read_heart,
    "gse156793": gse156793.read_all,
    "scp1303": scp1303.read_all,
}
GENE_READERS: Mapping[str, Callable[[GenePart, Files], LabelledGenes]] = {
    "collins2022": genes.read_collins,
    "geneformer_dosage": genes.read_dosage,
    "geneformer_bivalent": genes.read_bivalent,
    "geneformer_notch1": genes.read_notch1,
    "tf_range": genes.read_range,
}
