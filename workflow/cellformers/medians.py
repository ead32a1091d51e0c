"""Corpus medians: for every gene the median of its non-zero expression over all cells of a corpus.

    cellformers sketch counts/0001-of-0002.h5ad --cells cells.parquet -o 1.parquet
    cellformers medians 1.parquet 2.parquet -o medians.parquet

The value is count / n_counts x 10,000 with n_counts over all features of the cell, in float64, as in the notebook
`obtain_nonzero_median_digests` of Geneformer (Theodoris et al., Nature 618:616, 2023). Instead of a t-digest, whose
result depends on the order of insertion, a shard is summed up as a histogram over the leading bits of the values:
histograms add, so any number and order of shards gives the same medians to the bit.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cellformers.counts import dataset_digest, feature_sums, row_totals
from cellformers.errors import UserError
from cellformers.genes import Vocabulary, check_species, map_features
from cellformers.histograms import Histogram, mantissa_bits, medians_of, read_sketches, write_sketch
from cellformers.io.files import atomic_path, read_metadata, stamp, write_table
from cellformers.io.shards import read_shard_stamp
from cellformers.io.source import Array, CountSource, open_counts
from cellformers.progress import progress
from cellformers.qc import passing
from cellformers.revisions import REVISIONS


def sketch(
    counts: str | Path | CountSource,
    output: str | Path,
    *,
    cells: str | Path | None = None,
    vocabulary: Vocabulary | None = None,
    relative_error: float = 0.001,
    quiet: bool = True,
) -> None:
    """Sum up the expression values of a shard (or any count file) gene by gene.

    Writes gene_id, symbol, bucket (int32), count (int64): how many cells have a value of that gene in that bucket;
    ordered by gene id, then bucket. Counts of features that are one gene are summed in the cell first.

    Parameters
    ----------
    counts
        A counts shard or any count file; of one that is not a shard only cells with `filter_pass` count.
    cells
        The dataset's table of cells: those that pass QC count.
    vocabulary
        Its aliases say which features are which gene; features it does not know are left out. None: the feature ids
        are the gene ids.
    relative_error
        Bound of the medians' relative error.

    Memory: `histograms.POOL_BYTES` of counters and some 40 MB for 36,000 genes; when the counters are used up, they
    go to disk.

    Raises
    ------
    UserError
        If `counts` can't be read or is a raw file that is not human, or `cells` is of another dataset.
    """
    if not isinstance(counts, CountSource):
        with open_counts(counts) as source:
            sketch(
                source,
                output,
                cells=cells,
                vocabulary=vocabulary,
                relative_error=relative_error,
                quiet=quiet,
            )
        return
    bits = mantissa_bits(relative_error)
    made = read_shard_stamp(counts.path)
    if made is None:
        check_species(counts.feature_ids, counts.feature_symbols, counts.path)
    gene_ids, symbols, gene_of = _genes(counts, vocabulary)
    if cells is not None:
        keep = passing(cells, counts.names)
    else:
        keep = np.ones(counts.n_cells, bool) if counts.filter_pass is None else counts.filter_pass
    cell_totals = np.zeros(counts.n_cells, np.int64)
    feature_totals = np.zeros(counts.n_features, np.int64)
    histogram = Histogram(gene_ids, symbols, bits=bits)
    with ExitStack() as stack:
        part = stack.enter_context(atomic_path(output))
        advance = stack.enter_context(progress("medians", counts.n_cells, quiet=quiet))
        runs: list[Path] = []

        def spill() -> None:
            runs.append(part.with_name(f"{part.name}.{len(runs)}"))
            stack.callback(runs[-1].unlink, missing_ok=True)
            write_sketch(histogram.drain(), runs[-1], {})

        for block in counts.blocks():
            rows = slice(block.start, block.start + block.n_cells)
            histogram.add(block, gene_of, keep[rows], spill=spill)
            if made is None:
                cell_totals[rows] = row_totals(block.indptr, block.data)
                feature_totals += feature_sums(block, counts.n_features)[0]
            advance(block.n_cells)
        if runs:  # counters that went to disk are added up as those of different shards are
            spill()
            histogram.free()  # merging needs room of its own
        chunks = read_sketches(runs) if runs else histogram.drain()
        if made is None:
            digest = dataset_digest(
                counts.names, counts.feature_ids, cell_totals=cell_totals, feature_totals=feature_totals
            )
        else:
            digest = made["inputs"]["dataset"]
        inputs = {"dataset": digest} | ({"vocabulary": vocabulary.digest} if vocabulary is not None else {})
        parameters = {"relative_error": relative_error}
        write_sketch(chunks, part, stamp("sketch", REVISIONS["sketch"], parameters=parameters, inputs=inputs))


def merge(sketches: Sequence[str | Path], output: str | Path) -> None:
    """Add up sketches and write each gene's median: gene_id, symbol, median (float64), n_cells (int64).

    Genes that no cell expresses are left out. Genes are taken a range at a time, so memory (under 1 GB,
    `histograms.MERGE_BYTES`) depends neither on the number of sketches nor on their sizes. The result does not depend
    on the order of the sketches or on how cells were spread over them; a gene that has several symbols gets the first
    of them by the alphabet.

    Raises
    ------
    UserError
        If there are none, one is given twice, or they differ in error bound or vocabulary.
    """
    if not sketches:
        raise UserError("no sketches to merge", fix="give at least one, by `cellformers sketch`")
    paths = [Path(sketch) for sketch in sketches]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a sketch is given twice", fix="give each sketch once")
    parameters, inputs = _agree(paths)
    bits = mantissa_bits(parameters["relative_error"])
    parts = []
    for chunk in read_sketches(paths):
        medians, n_cells = medians_of(chunk, bits)
        parts.append(
            pa.table(
                {
                    "gene_id": pa.array(chunk.gene_ids, pa.string()),
                    "symbol": pa.array(chunk.symbols, pa.string()),
                    "median": medians,
                    "n_cells": n_cells,
                }
            )
        )
    if not parts:
        raise UserError("the sketches hold no cells", fix="are there any that pass QC?")
    table = pa.concat_tables(parts).combine_chunks()
    write_table(table, output, stamp("medians", REVISIONS["medians"], parameters=parameters, inputs=inputs))


def _agree(paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """The sketches' common parameters and inputs: each dataset once, and the vocabulary."""
    digests: set[str] = set()
    common: tuple[dict[str, Any], str | None] | None = None
    for path in paths:
        made = read_metadata(path)
        if made.get("step") != "sketch":
            raise UserError("not a sketch", path=path, fix="make one with `cellformers sketch`")
        digests.add(made["inputs"]["dataset"])
        mine = (made["parameters"], made["inputs"].get("vocabulary"))
        if common is not None and mine != common:
            raise UserError(
                f"was made with another error bound or vocabulary than {paths[0]}",
                path=path,
                fix="make it again",
            )
        common = mine
    assert common is not None
    inputs = {"dataset" if len(digests) == 1 else f"dataset.{i}": d for i, d in enumerate(sorted(digests), 1)}
    return common[0], inputs | ({"vocabulary": common[1]} if common[1] is not None else {})


def _genes(counts: CountSource, vocabulary: Vocabulary | None) -> tuple[Array, Array, Array]:
    """Sorted gene ids, their symbols, and each feature's gene, int32[n_features], -1 for none."""
    if vocabulary is None:
        ids: list[str | None] = [str(name) for name in counts.feature_ids]
    else:
        mapped = map_features(counts.feature_ids, counts.feature_symbols, vocabulary)
        ids = list(mapped.gene_of_feature)
    gene_ids = sorted({name for name in ids if name is not None})
    number = {name: i for i, name in enumerate(gene_ids)}
    gene_of = np.array([-1 if name is None else number[name] for name in ids], np.int32)
    symbols: list[str | None] = [None] * len(gene_ids)
    if vocabulary is not None:
        for name, symbol in zip(vocabulary.gene_ids, vocabulary.symbols, strict=True):
            if symbol and name in number:
                symbols[number[name]] = str(symbol)
    elif counts.feature_symbols is not None:
        for gene, symbol in zip(gene_of, counts.feature_symbols, strict=True):
            if symbol:
                symbols[gene] = min(symbols[gene] or symbol, str(symbol))
    return np.array(gene_ids, object), np.array(symbols, object), gene_of
