"""Public deposits: counts of cells and labels of genes, registered, fetched and read.

    folder = download_deposit("gse129096")        # in the cache, verified
    read_deposit("gse129096").parts               # what a dataset of the config can ask for

CELLFORMERS_HOME is the cache; CELLFORMERS_MIRROR fetches from a mirror of the public servers; CELLFORMERS_RESOURCES
adds entries of one's own; with CELLFORMERS_OFFLINE set, nothing is fetched.
"""

from cellformers.deposits.entries import (
    CellPart,
    Deposit,
    DepositFile,
    GenePart,
    deposit_names,
    read_deposit,
)
from cellformers.deposits.obtain import download_deposit

__all__ = [
    "CellPart",
    "Deposit",
    "DepositFile",
    "GenePart",
    "deposit_names",
    "download_deposit",
    "read_deposit",
]
