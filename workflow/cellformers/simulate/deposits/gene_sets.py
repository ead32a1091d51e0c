"""Deposits about genes: scores of dosage sensitivity, Geneformer's classes of genes, ranges of transcription factors.

Classes follow from the genome, not perfectly: dosage-sensitive factors have many targets, long-range factors belong
to some of the programmes, the central genes of the NOTCH1 network and those with bivalent promoters are raised by one
factor each, which the others are not, and so are many haploinsufficient genes. What is troublesome: outdated symbols,
a byte-order mark, columns padded with blanks, lists with repeated genes, words in any case.
"""

import pickle
from collections.abc import Sequence

import numpy as np

from cellformers.simulate.deposits.formats import Drawn, as_file, gzipped, separated
from cellformers.simulate.deposits.genome import Array, Genome

SCORES = "Collins_rCNV_2022.dosage_sensitivity_scores.tsv.gz"
RANGES = "41467_2020_16106_MOESM4_ESM.csv"
SENSITIVE_LISTED = 40  # of 60, beside all insensitive ones
NOT_SCORED = 20  # genes on sex chromosomes
LONG_RANGE = (0, 1, 2)  # programmes
CONFUSED = 0.1  # part of genes that are in the class they would not be expected in
P_HAPLO, P_TRIPLO = 0.86, 0.94  # thresholds of the paper


def _factors(genome: Genome) -> Array:
    return genome.truth.gene_ids[: len(genome.truth.sensitive)]


def draw_collins(genome: Genome, n_cells: int) -> Drawn:  # noqa: ARG001
    """Scores of all but a few nuclear genes by symbol, some of them outdated."""
    rng = genome.rng("collins2022")
    nuclear = genome.gene_ids[genome.gene_types != "mitochondrial"]
    scored = np.sort(rng.choice(nuclear, size=len(nuclear) - NOT_SCORED, replace=False))
    degree = dict(zip(_factors(genome).tolist(), genome.truth.out_degree.tolist(), strict=True))
    # log out-degrees in units of what sets the two kinds of factors apart; of other genes most are tolerant
    signals = {gene: np.log(n / 18) / 0.8 for gene, n in degree.items()} | dict.fromkeys(
        _regulated(genome, 2)[0], 0.8
    )
    rows = []
    for gene in scored.tolist():
        signal = signals.get(gene, -0.9)
        haplo, triplo = 1 / (
            1 + np.exp(-(2.2 * (signal + rng.normal(0.0, 0.7, size=2)) + np.array([0.6, 0.7])))
        )
        symbol = genome.old_symbols.get(gene, genome.symbol_of[gene])
        rows.append((symbol, repr(float(haplo)), repr(float(triplo)), gene))
    rows.sort()
    text = separated([("#gene", "pHaplo", "pTriplo"), *(row[:3] for row in rows)], separator="\t")
    truth = {
        "haploinsufficient": sorted(gene for _, haplo, _, gene in rows if float(haplo) >= P_HAPLO),
        "triplosensitive": sorted(gene for _, _, triplo, gene in rows if float(triplo) >= P_TRIPLO),
        "scored": scored.tolist(),
        "outdated_symbols": {
            gene: genome.old_symbols[gene] for *_, gene in rows if gene in genome.old_symbols
        },
    }
    return Drawn({SCORES: as_file(gzipped(text))}, truth)


def draw_labels(genome: Genome, n_cells: int) -> Drawn:  # noqa: ARG001
    """Geneformer's classes: a table of factors, lists of genes with some promoters, the NOTCH1 network."""
    rng = genome.rng("geneformer-labels")
    classes = {**_dosage(genome, rng), **_promoters(genome, rng), **_notch1(genome, rng)}
    network = {"central": classes["central"], "peripheral": classes["peripheral"]}
    targets = {"activated": classes["activated"], "non_target": classes["non_target"]}
    files = {
        "dosage_sens_tf_labels.csv": _padded(classes, ("dosage_sensitive", "dosage_insensitive")),
        "bivalent_gene_labels.txt": _with_repeats(rng, classes["bivalent"], 5),
        "lys4_only_gene_labels.txt": _with_repeats(rng, classes["lys4_only"], 2),
        "no_methylation_gene_labels.txt": _with_repeats(rng, classes["no_methylation"], 2),
        "n1_network.pickle": pickle.dumps(network, protocol=4),
        "n1_target.pickle": pickle.dumps(targets, protocol=4),
    }
    return Drawn({name: as_file(data) for name, data in files.items()}, {"classes": classes})


def _dosage(genome: Genome, rng: np.random.Generator) -> dict[str, list[str]]:
    factors, sensitive = _factors(genome), genome.truth.sensitive
    listed = rng.choice(factors[sensitive], size=SENSITIVE_LISTED, replace=False)
    return {"dosage_sensitive": sorted(listed), "dosage_insensitive": sorted(factors[~sensitive])}


def _promoters(genome: Genome, rng: np.random.Generator) -> dict[str, list[str]]:
    """Bivalent: raised by a factor. H3K4me3 alone: not regulated by it. Unmethylated: nor that, and seldom seen."""
    raised, others = _regulated(genome, 1)
    rates = dict(zip(genome.truth.gene_ids.tolist(), genome.truth.log_rate.tolist(), strict=False))
    others.sort(key=rates.__getitem__)
    rare = len(others) // 3
    bivalent, lys4 = _confuse(rng, _draw(rng, raised, 40), _draw(rng, others[rare:], 36))
    return {
        "bivalent": sorted(bivalent),
        "lys4_only": sorted(lys4),
        "no_methylation": sorted(_draw(rng, others[:rare], 24)),
    }


def _notch1(genome: Genome, rng: np.random.Generator) -> dict[str, list[str]]:
    """Central, and activated: raised by a factor. Peripheral, and no targets: not regulated by it."""
    raised, others = _regulated(genome, 0)
    central, peripheral = _confuse(rng, raised, _draw(rng, others, len(raised)))
    return {
        "central": sorted(central),
        "peripheral": sorted(peripheral),
        "activated": sorted(raised),
        "non_target": sorted(_draw(rng, others, len(raised))),
    }


def _regulated(genome: Genome, rank: int) -> tuple[list[str], list[str]]:
    """Genes that the factor with most targets (rank 0), second to most (1), ... raises; those it doesn't regulate."""
    factor = int(np.argsort(-genome.truth.out_degree, kind="stable")[rank])
    effects = genome.truth.weights[[factor]].toarray()[0]
    ids = genome.truth.gene_ids[genome.targets]
    return ids[effects > 0].tolist(), ids[effects == 0].tolist()


def _draw(rng: np.random.Generator, genes: Sequence[str], n: int) -> list[str]:
    return [str(gene) for gene in rng.choice(list(genes), size=min(n, len(genes)), replace=False)]


def _confuse(rng: np.random.Generator, one: list[str], other: list[str]) -> tuple[list[str], list[str]]:
    """Swap some genes of two classes."""
    n = round(CONFUSED * min(len(one), len(other)))
    one, other = _draw(rng, one, len(one)), _draw(rng, other, len(other))
    return other[:n] + one[n:], one[:n] + other[n:]


def _padded(classes: dict[str, list[str]], columns: tuple[str, ...]) -> bytes:
    """A table of lists with a byte-order mark, the shorter ones padded with blanks."""
    longest = max(len(classes[name]) for name in columns)
    padded = [classes[name] + [""] * (longest - len(classes[name])) for name in columns]
    return b"\xef\xbb\xbf" + separated([columns, *zip(*padded, strict=True)])


def _with_repeats(rng: np.random.Generator, genes: list[str], n: int) -> bytes:
    """A list of genes in no order, some of them twice."""
    lines = genes + _draw(rng, genes, n)
    return separated([[lines[i]] for i in rng.permutation(len(lines))])


def draw_ranges(genome: Genome, n_cells: int) -> Drawn:  # noqa: ARG001
    """A table of factors by symbol: long-range ones belong to some programmes."""
    rng = genome.rng("tf-range")
    programme = dict(zip(_factors(genome).tolist(), genome.truth.factor_programme.tolist(), strict=True))
    genes = sorted(_draw(rng, list(programme), 90))
    truth: dict[str, list[str]] = {"long_range": [], "short_range": []}
    rows = []
    for gene in genes:
        expected = programme[gene] in LONG_RANGE
        long = expected != (rng.random() < CONFUSED)
        truth["long_range" if long else "short_range"].append(gene)
        words = ("long-range TF", "Long-range TF") if long else ("short-range TF", "Short-Range TF")
        median = rng.integers(50_000, 200_000) if long else rng.integers(500, 20_000)
        rows.append((genome.symbol_of[gene], median, rng.choice(words, p=[0.8, 0.2])))
    rows.sort()
    return Drawn(
        {RANGES: as_file(separated([("", "median_distance", "assignment"), *rows]))}, {"classes": truth}
    )
