"""Which feature of a count file is which gene of a vocabulary, and whether the file can be right at all.

features = map_features(source.feature_ids, source.feature_symbols, vocabulary)
features.token_of_feature        # int32, -1 where a feature has no token
features.report(totals)          # what was mapped, summed, left out, and the share of counts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellformers.errors import UserError
from cellformers.io.arrow import as_numbers, as_strings, numbers, strings
from cellformers.vocabulary import Vocabulary, from_medians, normalise, read_published

__all__ = [
    "MITOCHONDRIAL",
    "FeatureMap",
    "Vocabulary",
    "check_mapping",
    "check_species",
    "from_medians",
    "is_mitochondrial",
    "is_spike_in",
    "map_features",
    "read_published",
]

Array = np.ndarray[Any, Any]

MIN_KNOWN_SHARE = 0.5
EXAMPLES = 5

# The 37 genes of the human mitochondrial genome (NC_012920), Ensembl 109.
MITOCHONDRIAL: dict[str, str] = {
    "ENSG00000198888": "MT-ND1", "ENSG00000198763": "MT-ND2", "ENSG00000198840": "MT-ND3",
    "ENSG00000198886": "MT-ND4", "ENSG00000212907": "MT-ND4L", "ENSG00000198786": "MT-ND5",
    "ENSG00000198695": "MT-ND6", "ENSG00000198804": "MT-CO1", "ENSG00000198712": "MT-CO2",
    "ENSG00000198938": "MT-CO3", "ENSG00000198899": "MT-ATP6", "ENSG00000228253": "MT-ATP8",
    "ENSG00000198727": "MT-CYB", "ENSG00000211459": "MT-RNR1", "ENSG00000210082": "MT-RNR2",
    "ENSG00000210049": "MT-TF", "ENSG00000210077": "MT-TV", "ENSG00000209082": "MT-TL1",
    "ENSG00000210100": "MT-TI", "ENSG00000210107": "MT-TQ", "ENSG00000210112": "MT-TM",
    "ENSG00000210117": "MT-TW", "ENSG00000210127": "MT-TA", "ENSG00000210135": "MT-TN",
    "ENSG00000210140": "MT-TC", "ENSG00000210144": "MT-TY", "ENSG00000210151": "MT-TS1",
    "ENSG00000210154": "MT-TD", "ENSG00000210156": "MT-TK", "ENSG00000210164": "MT-TG",
    "ENSG00000210174": "MT-TR", "ENSG00000210176": "MT-TH", "ENSG00000210184": "MT-TS2",
    "ENSG00000210191": "MT-TL2", "ENSG00000210194": "MT-TE", "ENSG00000210195": "MT-TT",
    "ENSG00000210196": "MT-TP",
}  # fmt: skip

_SPECIES = {
    "ENSMUSG": "mouse", "ENSRNOG": "rat", "ENSDARG": "zebrafish", "ENSSSCG": "pig", "ENSBTAG": "cow",
    "ENSMMUG": "macaque", "ENSMFAG": "macaque", "ENSGALG": "chicken", "ENSOCUG": "rabbit", "ENSCAFG": "dog",
    "ENSPTRG": "chimpanzee", "ENSCJAG": "marmoset", "ENSXETG": "frog",
}  # fmt: skip


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureMap:
    """What the features of a file are in a vocabulary; every array has one entry a feature."""

    feature_ids: Array
    feature_symbols: Array | None
    gene_of_feature: Array
    """object of str: canonical gene id, None where the name is unknown."""
    token_of_feature: Array
    """int32: -1 where the gene has no token."""
    known: Array
    """bool: whether the name stands for a gene known to the vocabulary, with or without a token."""

    @property
    def shared(self) -> Array:
        """bool: features with a token that other features have too; their counts are summed."""
        has_token = self.token_of_feature >= 0
        _, inverse, n = np.unique(self.token_of_feature, return_inverse=True, return_counts=True)
        return has_token & (n[inverse] > 1)

    def report(self, feature_totals: Array) -> dict[str, Any]:
        """What became of the features and of their counts.

        Parameters
        ----------
        feature_totals
            int64[n_features]: counts of each feature over the cells looked at.

        Returns
        -------
        dict
            `features`, `counts`: numbers of all, mapped (with a token), summed (several features of one gene), outside
            (known genes without a token), unknown, spike_ins. `genes`: distinct genes with a token. `shares`: of the
            counts outside spike-ins, those of features mapped and known (None where there are no counts). `examples`:
            names of summed, outside and unknown features, most counts first.
        """
        spike = is_spike_in(self.feature_ids)
        groups = {
            "mapped": self.token_of_feature >= 0,
            "summed": self.shared,
            "outside": self.known & (self.token_of_feature < 0) & ~spike,
            "unknown": ~self.known & ~spike,
            "spike_ins": spike,
        }
        counts = {"all": int(feature_totals.sum())}
        counts |= {name: int(feature_totals[mask].sum()) for name, mask in groups.items()}
        native = counts["all"] - counts["spike_ins"]
        known = counts["mapped"] + counts["outside"]
        return {
            "features": {
                "all": len(self.feature_ids),
                **{name: int(mask.sum()) for name, mask in groups.items()},
            },
            "genes": len(np.unique(self.token_of_feature[groups["mapped"]])),
            "counts": counts,
            "shares": {
                "mapped": counts["mapped"] / native if native else None,
                "known": known / native if native else None,
            },
            "examples": {
                name: self._examples(groups[name], feature_totals)
                for name in ("summed", "outside", "unknown")
            },
        }

    def _examples(self, mask: Array, totals: Array) -> list[str]:
        where = np.flatnonzero(mask)
        first = where[np.argsort(-totals[where], kind="stable")[:EXAMPLES]]
        return [self._label(i) for i in first.tolist()]

    def _label(self, i: int) -> str:
        symbol = None if self.feature_symbols is None else self.feature_symbols[i]
        name = str(self.feature_ids[i])
        return f"{name} ({symbol})" if symbol and symbol != name else name


def map_features(
    feature_ids: Sequence[str] | Array,
    feature_symbols: Sequence[str | None] | Array | None,
    vocabulary: Vocabulary,
) -> FeatureMap:
    """Look up features by their ids, as the reference tokenizer does: upper-cased, in the alias table.

    Symbols beside the ids are for messages only; where the ids themselves are symbols, the alias table knows them.

    Parameters
    ----------
    feature_ids
        [n_features]: Ensembl ids with or without version, or symbols; may repeat.
    feature_symbols
        [n_features] or None.
    """
    ids = np.asarray(feature_ids, dtype=object)
    aliases = vocabulary.aliases()
    row = _positions(normalise(strings(ids)), aliases["alias"])
    known = row >= 0
    targets = aliases["gene_id"].combine_chunks().take(numbers(row[known]))
    token = np.full(len(ids), -1, np.int32)
    place = _positions(targets, strings(vocabulary.gene_ids))
    token[known] = np.where(place >= 0, vocabulary.token_ids[place], -1)
    genes = np.full(len(ids), None, dtype=object)
    genes[known] = as_strings(targets)
    symbols = None if feature_symbols is None else np.asarray(feature_symbols, dtype=object)
    return FeatureMap(
        feature_ids=ids, feature_symbols=symbols, gene_of_feature=genes, token_of_feature=token, known=known
    )


def _positions(names: Any, among: Any) -> Array:
    """int32: where each of `names` is in `among`, whose entries are unique; -1 where it is not.

    The hash table is built of the names, which are fewer than the 173,697 aliases of V2: 5 ms instead of 30.
    """
    import pyarrow.compute as pc

    encoded = names.dictionary_encode()
    hit = as_numbers(pc.index_in(among, value_set=encoded.dictionary), missing=-1)
    place = np.full(len(encoded.dictionary), -1, np.int32)
    place[hit[hit >= 0]] = np.flatnonzero(hit >= 0)
    return place[as_numbers(encoded.indices)]


def is_spike_in(feature_ids: Sequence[str] | Array) -> Array:
    """bool[n]: ERCC spike-ins (ERCC-00002, ...); the human genes ERCC1 to ERCC8 are not among them."""
    return _matches(feature_ids, r"(?i)^ERCC-[0-9]{3,}$")


def is_mitochondrial(
    feature_ids: Sequence[str] | Array, symbols: Sequence[str | None] | Array | None
) -> Array:
    """bool[n]: the 37 genes of the human mitochondrial genome, by Ensembl id or by symbol (MT-...)."""
    ids = as_strings(normalise(strings(feature_ids))).tolist()
    found = [name in MITOCHONDRIAL or name in _MT_SYMBOLS for name in ids]
    if symbols is not None:
        found = [
            a or (s is not None and s.upper() in _MT_SYMBOLS) for a, s in zip(found, symbols, strict=True)
        ]
    return np.array(found, dtype=bool)


_MT_SYMBOLS = frozenset(MITOCHONDRIAL.values())


def _matches(names: Sequence[str | None] | Array, pattern: str) -> Array:
    """bool[n]: where the regular expression matches; False where there is no name."""
    import pyarrow.compute as pc

    return as_numbers(pc.match_substring_regex(strings(names), pattern), missing=False)


def check_species(
    feature_ids: Sequence[str] | Array, feature_symbols: Sequence[str | None] | Array | None, path: str | Path
) -> None:
    """Refuse a file that is not human.

    It isn't where most Ensembl ids carry the prefix of another species, or where most symbols are in title case
    (Gapdh, mt-Nd1), as mouse and rat have them, or in lower case, as fish and frogs do. Human symbols such as C1orf112
    don't count as such. Case matters: upper-cased, three quarters of mouse symbols would pass for human ones.

    Raises
    ------
    UserError
        Which says what the file looks like.
    """
    fix = "give human genes, or map them to their human orthologues first"
    ids = np.asarray(feature_ids, dtype=object)
    ensembl = _matches(ids, r"^ENS[A-Z]{0,6}G[0-9]{6,}")
    foreign = ensembl & ~_matches(ids, r"^ENSG[0-9]")
    n_ids, n_foreign = int(ensembl.sum()), int(foreign.sum())
    if 2 * n_foreign > n_ids:
        first = str(ids[foreign][0])
        prefix = first[: first.index("G", 3) + 1] if "G" in first[3:] else first[:7]
        prefix = next((p for p in _SPECIES if first.startswith(p)), prefix)
        raise UserError(
            f"not human: {n_foreign} of {n_ids} Ensembl ids are of {_SPECIES.get(prefix, 'another species')}, "
            f"e.g. {first}",
            path=path,
            fix=fix,
        )
    if 2 * n_ids > len(ids):
        return  # human ids decide; symbols beside them may be of an orthologue
    symbols = ids[~ensembl] if feature_symbols is None else np.asarray(feature_symbols, dtype=object)
    named = _matches(symbols, r"[A-Za-z]") & ~_matches(symbols, r"(?i)^ERCC-[0-9]{3,}$")
    n_named = int(named.sum())
    patterns = (
        (
            r"^([A-Z][a-z0-9.-]*[a-z][a-z0-9.-]*|mt-[A-Z].*|[0-9]+[A-Z][0-9]+Rik)$",
            "title case, as of mouse or rat",
        ),
        (r"^[a-z0-9.:_-]*[a-z][a-z0-9.:_-]*$", "lower case, as of fish or frog"),
    )
    for pattern, what in patterns:
        odd = named & _matches(symbols, pattern) & ~_matches(symbols, r"^C([0-9]+|X|Y)orf[0-9]+")
        if 2 * int(odd.sum()) > n_named:
            raise UserError(
                f"not human, it seems: {int(odd.sum())} of {n_named} gene symbols are in {what}, e.g. "
                + ", ".join(str(s) for s in symbols[odd][:3]),
                path=path,
                fix=fix,
            )


def check_mapping(report: dict[str, Any], path: str | Path) -> None:
    """Refuse a file in which under half of the counts outside spike-ins are of genes known to the vocabulary.

    Parameters
    ----------
    report
        What `FeatureMap.report` says.

    Raises
    ------
    UserError
        With examples of the unknown names.
    """
    share = report["shares"]["known"]
    if share is None or share >= MIN_KNOWN_SHARE:
        return
    examples = ", ".join(report["examples"]["unknown"])
    raise UserError(
        f"only {share:.1%} of its counts are of known human genes; {report['features']['unknown']} of "
        f"{report['features']['all']} names are unknown, e.g. {examples}",
        path=path,
        fix="name the column that holds Ensembl ids or gene symbols (gene_column:), or translate the names",
    )
