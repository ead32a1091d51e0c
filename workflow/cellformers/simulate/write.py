"""Draw both datasets and write them in the formats of deposits (formulas: `cellformers.simulate`)."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from cellformers.errors import UserError
from cellformers.io.files import atomic_path, stamp, write_json, write_text
from cellformers.revisions import REVISIONS
from cellformers.simulate.cells import Dataset, draw_dataset
from cellformers.simulate.truth import MITOCHONDRIAL_GENES, Model, describe, draw_truth, gene_labels

LOOM_CREATED = "19700101T000000.000000Z"  # the same for every file, so that one seed gives the same bytes


def simulate(
    output_dir: str | Path,
    *,
    seed: int = 0,
    n_cells: int = 3000,
    n_second: int | None = None,
    n_genes: int = 700,
    n_factors: int = 120,
) -> dict[str, Any]:
    """Draw both datasets and write the five files into `output_dir`; other files there are left alone.

    Parameters
    ----------
    output_dir
        Folder for atlas.h5ad, second.loom, gene_labels.csv, out_degrees.csv and truth.json; made where it is missing.
    seed
        Non-negative; genes and network depend on it and on the numbers of genes and factors only.
    n_cells, n_second
        Droplets in the atlas (6 donors) and in the second dataset (4 other donors), at least 100 each; the
        second has a third of the atlas's unless told otherwise.
    n_genes, n_factors
        Genes in all, 13 mitochondrial ones included, and factors among them: even, at least 20.

    Returns
    -------
    dict
        The content of truth.json.

    Raises
    ------
    UserError
        If a number is out of range or the folder can't be written to.
    """
    model = Model()
    n_second = max(100, n_cells // 3) if n_second is None else n_second
    _check_sizes(model, seed=seed, n_cells=n_cells, n_second=n_second, n_genes=n_genes, n_factors=n_factors)
    output_dir = Path(output_dir)
    datasets = (
        Dataset("atlas", n_cells, 6, depth=1400.0, efficiency=0.0, empty=0.01, unlabelled=0.005),
        Dataset("second", n_second, 4, depth=800.0, efficiency=0.35, empty=0.0, unlabelled=0.0),
    )
    rngs = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(1 + len(datasets))]
    truth = draw_truth(rngs[0], model, n_genes=n_genes, n_factors=n_factors)
    order = np.argsort(truth.gene_ids)
    var = pd.DataFrame(
        {"symbol": truth.symbols[order], "gene_type": truth.gene_types[order]},
        index=pd.Index(truth.gene_ids[order].tolist(), name="gene_id"),
    )
    droplets: dict[str, Any] = {}
    for dataset, rng, suffix, write in zip(
        datasets, rngs[1:], (".h5ad", ".loom"), (write_h5ad, write_loom), strict=True
    ):
        counts, obs = draw_dataset(rng, model, truth, dataset)
        write(counts[:, order], obs, var, output_dir / f"{dataset.name}{suffix}")
        droplets[dataset.name] = {
            str(k): int(n) for k, n in obs["droplet"].value_counts().sort_index().items()
        }

    parameters = {"seed": seed, "n_genes": n_genes, "n_factors": n_factors, "model": asdict(model)}
    parameters["datasets"] = [asdict(dataset) for dataset in datasets]
    described = {
        **stamp("simulate", REVISIONS["simulate"], parameters=parameters, inputs={}),
        **describe(truth),
    }
    described["droplets"] = droplets
    write_text(gene_labels(truth).to_csv(index=False, lineterminator="\n"), output_dir / "gene_labels.csv")
    degrees = [f"{f['gene_id']},{f['out_degree']}" for f in described["factors"]]
    write_text("\n".join(["gene_id,out_degree", *degrees]) + "\n", output_dir / "out_degrees.csv")
    write_json(described, output_dir / "truth.json")
    return described


def _check_sizes(
    model: Model, *, seed: int, n_cells: int, n_second: int, n_genes: int, n_factors: int
) -> None:
    if seed < 0:
        raise UserError(f"seed {seed} is negative", fix="give 0 or more")
    for name, value in (("cells", n_cells), ("cells in the second dataset", n_second)):
        if value < 100:
            raise UserError(
                f"{value} {name} can't hold all cell types and donors", fix="ask for at least 100"
            )
    if n_factors < 20 or n_factors % 2:
        raise UserError(f"{n_factors} factors can't be paired", fix="give an even number, at least 20")
    least = len(MITOCHONDRIAL_GENES) + model.stable_genes + n_factors + 100
    if n_genes < least:
        raise UserError(
            f"{n_genes} genes leave too few targets for {n_factors} factors", fix=f"ask for at least {least}"
        )


def write_h5ad(counts: sparse.csr_array, obs: pd.DataFrame, var: pd.DataFrame, path: Path) -> None:
    """Write AnnData with X = counts, float32 CSR as most deposits have it."""
    import anndata

    obs = obs.astype({name: "category" for name in obs.columns if name != "age"})
    atlas = anndata.AnnData(
        X=sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var.astype({"gene_type": "category"})
    )
    with atomic_path(path) as temporary:
        atlas.write_h5ad(temporary, compression="gzip")


def write_loom(counts: sparse.csr_array, obs: pd.DataFrame, var: pd.DataFrame, path: Path) -> None:
    """Write a loom file with loompy (genes in rows), then copy it without the times that loompy notes down."""
    import loompy

    rows = {"Accession": var.index, "Gene": var["symbol"], "gene_type": var["gene_type"]}
    columns = {"CellID": obs.index, **{name: obs[name] for name in obs.columns}}
    with tempfile.TemporaryDirectory() as folder, atomic_path(path) as temporary:
        dated = Path(folder) / path.name
        loompy.create(
            str(dated),
            sparse.csc_matrix(counts.T),
            {name: values.to_numpy() for name, values in rows.items()},
            {name: values.to_numpy() for name, values in columns.items()},
        )
        with h5py.File(dated, "r") as source, h5py.File(temporary, "w") as target:
            for name in source:
                if name != "attrs":  # all that loompy keeps in HDF5 attributes is the time of the last change
                    source.copy(name, target, without_attrs=True)
            for name, value in source["attrs"].items():
                target[f"attrs/{name}"] = LOOM_CREATED if name == "CreationDate" else value[()]
