"""Splits of genes into folds, written to disk once and read by every method.

Runs as `cellformers split --task genes`. Folds are stratified by class; genes of one group stay in one fold. With
`--match expression` the split holds pairs of genes alike in expression, one of each class: what a method tells apart
there is not how much genes are expressed. A split depends on names, labels and the seed, never on the order of rows or
files, and no gene is on both sides of a fold.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cellformers.errors import UserError, did_you_mean
from cellformers.evaluate.gene_features import expression
from cellformers.evaluate.matching import CALIPER, balance, match_pairs
from cellformers.evaluate.splitfile import Split
from cellformers.evaluate.tables import read_gene_table, read_vectors
from cellformers.folds import group_folds, stratified_folds
from cellformers.io.files import digest_arrays, stamp, write_json
from cellformers.revisions import REVISIONS


def _groups(labels: str | Path, *, gene: str, group: str, names: np.ndarray) -> np.ndarray:
    """The group of each gene, object[n] of str; a gene without one is a group of its own."""
    ids, values = read_gene_table(labels, gene=gene, column=group)
    known = dict(zip(ids, values, strict=True))
    return np.array([f"gene {name}" if known[name] is None else known[name] for name in names], dtype=object)


class Matched(NamedTuple):
    """Genes that have a partner, and what became of the others."""

    rows: np.ndarray
    """int64[n]: which genes are kept, ascending."""
    groups: np.ndarray
    """object[n] of str: the pair of each of them."""
    excluded: dict[str, int]
    about: dict[str, Any]
    note: str


def _matched(
    names: np.ndarray,
    truth: np.ndarray,
    positive: str,
    negative: str,
    features: dict[str, np.ndarray],
    *,
    folds: int,
    seed: int,
) -> Matched:
    """Keep pairs of a positive and a negative gene that are alike in these features."""
    up = truth == positive
    pairs = match_pairs(np.stack(list(features.values()), axis=1), up, names, seed=seed)
    if len(pairs) < max(folds, 2):
        raise UserError(
            f"{len(pairs)} pairs of a {positive!r} and a {negative!r} gene are alike in expression, too few for "
            f"{folds} folds",
            fix="ask for fewer folds, or leave match out: these classes have no such control",
        )
    few, many = (positive, negative) if up.sum() <= (~up).sum() else (negative, positive)
    alone = min(int(up.sum()), int((~up).sum())) - len(pairs)
    spare = max(int(up.sum()), int((~up).sum())) - len(pairs)
    spread = balance(features, up, pairs)
    pair_of = {int(row): f"{names[a]} and {names[b]}" for a, b in pairs.tolist() for row in (a, b)}
    rows = np.array(sorted(pair_of), dtype=np.int64)
    told = "; ".join(
        f"{name.replace('_', ' ')}: standardised difference {v['difference_before']:.2f} before, "
        f"{v['difference_after']:.2f} after, AUC {v['auc_before']:.2f} before, {v['auc_after']:.2f} after"
        for name, v in spread.items()
    )
    return Matched(
        rows, np.array([pair_of[row] for row in rows.tolist()], dtype=object),
        {f"{few}, no partner alike in expression": alone, f"{many}, not needed as a partner": spare},
        {"by": list(features), "caliper": CALIPER, "pairs": len(pairs), "balance": spread},
        f"{len(pairs)} {few} genes matched 1:1 to {many} ones in mean expression and detection rate (percentile ranks "
        f"within {CALIPER:g}), {alone} without a partner left out; {told}",
    )  # fmt: skip


def make_gene_split(
    *,
    labels: str | Path,
    label: str,
    positive: str,
    embeddings: Sequence[Path],
    output: str | Path,
    dataset: str,
    gene: str = "gene_id",
    group: str | None = None,
    match: str | None = None,
    counts: Sequence[Path] = (),
    cells: Path | None = None,
    vocabulary: Path | None = None,
    folds: int = 5,
    seed: int = 0,
    note: str | None = None,
) -> Split:
    """Split labelled genes into stratified folds and write the split, which holds the labels as well.

    Parameters
    ----------
    labels, label, gene
        csv or tsv table, its column of classes and its column of gene ids (an Ensembl version is ignored).
    positive
        The class whose probability is scored; all others together are the negative class. Where the column holds
        the positive class only, genes with an empty field are the negative class, else they are left out.
    group
        Column of groups that stay together, such as pairs matched in expression or gene families. A gene whose
        matched partner, of the other class, is in training is predicted worse than by chance.
    embeddings
        Gene embeddings of every model of the benchmark: only genes that all of them have are kept, so that every
        method is scored on the same genes.
    match
        `expression`: keep pairs of a positive and a negative gene of like mean expression and detection rate, which
        stay in one fold. Genes without a partner are left out and counted; how alike the classes are before and after
        is noted.
    counts, cells, vocabulary
        With `match`: counts shards, the `cells.parquet` whose passing cells are used, and the vocabulary that maps
        features to genes.

    Raises
    ------
    UserError
        If the positive class is missing (the nearest is named) or a class has fewer genes than there are folds.
    """
    if match not in (None, "expression"):
        raise UserError(f"genes can't be matched by {match!r}", fix="give --match expression")
    if match and (group is not None or not counts):
        raise UserError(
            "matching makes groups of its own"
            if group is not None
            else "matching by expression needs counts",
            fix="leave group out" if group is not None else "give --counts and --cells",
        )
    ids, values = read_gene_table(labels, gene=gene, column=label)
    present = sorted({v for v in values if v is not None})
    if positive not in present:
        raise UserError(
            f"no gene is {positive!r} in column {label!r}", path=labels, fix=did_you_mean(positive, present)
        )
    others = [v for v in present if v != positive]
    negative = others[0] if len(others) == 1 else f"not {positive}"
    labelled = np.array([v is not None or not others for v in values], dtype=bool)
    covered = np.ones(len(ids), dtype=bool)
    for path in embeddings:
        covered &= np.isin(ids.astype(str), read_vectors([Path(path)], key="gene_id")[0].astype(str))
    keep = labelled & covered
    order = np.argsort(ids[keep].astype(str))
    names = ids[keep][order]
    truth = np.array([positive if v == positive else negative for v in values[keep][order]], dtype=object)
    matched = None
    if match and {positive, negative} <= set(truth):
        features = expression(counts, names, cells=cells, vocabulary=vocabulary)
        matched = _matched(names, truth, positive, negative, features, folds=folds, seed=seed)
        names, truth = names[matched.rows], truth[matched.rows]
    sizes = {c: int((truth == c).sum()) for c in (negative, positive)}
    if folds < 2 or min(sizes.values()) < folds:
        told = ", ".join(f"{n} {c}" for c, n in sizes.items())
        raise UserError(
            f"too few labelled genes for {folds} folds ({told})",
            path=labels,
            fix="ask for fewer folds, 2 at least: every one needs a gene of each class",
        )
    groups = None
    if matched is not None or group is not None:
        groups = matched.groups if matched else _groups(labels, gene=gene, group=str(group), names=names)
    if groups is None:
        fold_of = stratified_folds(names, truth, folds=folds, seed=seed)
    else:
        place = group_folds(groups, truth, folds=folds, seed=seed)
        fold_of = np.array([place[g] for g in groups])
        if any(len(set(truth[fold_of == f])) < 2 for f in range(folds)):
            raise UserError(
                f"the groups of column {group!r} leave a fold with one class",
                path=labels,
                fix="leave group out",
            )
    notes = [note] if note else []
    notes += [matched.note] if matched else []
    content: dict[str, Any] = {
        "task": "genes",
        "kind": "stratified" if groups is None else "held-out",
        "by": "gene",
        "dataset": dataset,
        "label": label,
        "unit": "pair alike in expression" if matched else group,
        "seed": seed,
        "classes": [negative, positive],
        "class_sizes": sizes,
        "n": len(names),
        "excluded": {
            "no label": int((~labelled).sum()),
            "no embedding": int((labelled & ~covered).sum()),
            **(matched.excluded if matched else {}),
        },
        "genes": dict(zip(names.tolist(), truth.tolist(), strict=True)),
        "groups": None if groups is None else groups.tolist(),
        "folds": [
            {"name": f"fold {f + 1}", "train": None, "test": names[fold_of == f].tolist()}
            for f in range(folds)
        ],
        **({"matched": matched.about} if matched else {}),
        "notes": notes,
    }
    parameters = {
        "label": label, "positive": positive, "group": group, "match": match, "folds": folds, "seed": seed,
    }  # fmt: skip
    content |= stamp(
        "split", REVISIONS["split"], parameters=parameters, inputs={"genes": digest_arrays(names, truth)}
    )
    write_json(content, output)
    return Split(content)
