"""The genes a model knows: ids, tokens, medians, aliases, special tokens.

    vocabulary = read_published("gc104M")              # the pickles of a published model, read safely
    vocabulary = from_medians("medians.parquet", ...)  # an own corpus
    vocabulary.save("vocabulary/"); Vocabulary.load("vocabulary/")

A vocabulary is a folder: tokens.parquet (gene_id, token_id, median, symbol), aliases.parquet (alias, gene_id),
vocabulary.json (name, special tokens, context length, digests).
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from cellformers.errors import UserError
from cellformers.io.arrow import as_numbers, as_strings, numbers, strings
from cellformers.io.files import (
    DAMAGES,
    atomic_dir,
    check_plain,
    digest_arrays,
    read_json,
    read_table,
    whole,
    write_json,
    write_table,
)
from cellformers.io.pickles import read_dictionary

Array = np.ndarray[Any, Any]
Special = Literal["v1", "v2"]

SPECIAL_TOKENS: dict[Special, dict[str, int]] = {
    "v1": {"<pad>": 0, "<mask>": 1},
    "v2": {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3},
}
CONTEXT_LENGTH: dict[Special, int] = {"v1": 2048, "v2": 4096}
FILES = ("tokens.parquet", "aliases.parquet", "vocabulary.json")
# Larger than those of any published model by a wide margin: networks have a row for each.
MAX_TOKENS, MAX_CONTEXT = 2_000_000, 1_048_576
_ENSEMBL_VERSION = re.compile(r"(ENS[A-Z]*\d{6,})\.\d+(?:_PAR_Y)?")


@dataclass(frozen=True, eq=False, kw_only=True)
class Vocabulary:
    """Genes and their tokens, by ascending token.

    Raises
    ------
    UserError
        If tokens or genes repeat, a token is out of range, or a median is not a positive number.
    """

    name: str
    gene_ids: Array
    """object[n] of str: canonical ids."""
    token_ids: Array
    """int32[n], ascending."""
    medians: Array
    """float64[n]: median of the non-zero count per 10,000 counts of a cell, over a corpus."""
    symbols: Array
    """object[n] of str, None where unknown."""
    special_tokens: dict[str, int]
    context_length: int
    """Most tokens of a cell, special ones included."""
    alias_source: pa.Table | Path = field(repr=False)
    """The table of `aliases()`, or the file that holds it."""

    def __post_init__(self) -> None:
        special = set(self.special_tokens.values())
        problems = [
            (not len(self.gene_ids), "has no genes"),
            (len({len(self.gene_ids), len(self.token_ids), len(self.medians), len(self.symbols)}) > 1,
             "has columns of different lengths"),
            (len(set(self.gene_ids.tolist())) < len(self.gene_ids), "names a gene twice"),
            (bool((np.diff(self.token_ids) <= 0).any()), "has tokens that repeat or don't ascend"),
            (bool(special & set(self.token_ids.tolist())) or len(special) < len(self.special_tokens),
             "uses a token twice"),
            (not set(SPECIAL_TOKENS["v1"]) <= set(self.special_tokens), "lacks <pad> or <mask>"),
            (("<cls>" in self.special_tokens) != ("<eos>" in self.special_tokens), "has one of <cls> and <eos> only"),
            (not (np.isfinite(self.medians) & (self.medians > 0)).all(), "has a median that is not above zero"),
            (min([*special, *self.token_ids[:1].tolist()], default=0) < 0, "has a negative token"),
            (max([*special, *self.token_ids[-1:].tolist()], default=0) >= MAX_TOKENS, "has too high a token"),
            (self.context_length <= len(special), "has no room for genes in its context"),
            (self.context_length > MAX_CONTEXT, "has too long a context"),
        ]  # fmt: skip
        for wrong, what in problems:
            if wrong:
                raise UserError(f"the vocabulary {self.name!r} {what}", fix="make it again")

    @property
    def size(self) -> int:
        """Rows of the embedding table that fits: largest token + 1."""
        return 1 + max(int(self.token_ids.max()), *self.special_tokens.values())

    @property
    def has_cls(self) -> bool:
        """Whether cells stand between <cls> and <eos>."""
        return "<cls>" in self.special_tokens

    @cached_property
    def digest(self) -> str:
        """sha256 over what gives tokens their meaning: genes, tokens, medians, special tokens, context length."""
        names = sorted(self.special_tokens)
        special = np.array([self.special_tokens[n] for n in names], np.int64)
        return digest_arrays(
            self.gene_ids,
            self.token_ids,
            self.medians,
            names,
            special,
            np.array([self.context_length], np.int64),
        )

    def aliases(self) -> pa.Table:
        """Columns alias (upper case, unique) and gene_id: every name that stands for a known gene, itself included.

        Known genes are more than those that have a token. Read from disk when asked for.
        """
        if isinstance(self.alias_source, Path):
            return read_table(self.alias_source, ["alias", "gene_id"])
        return self.alias_source

    def save(self, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
        """Write the vocabulary as a folder, replacing one that is there; `metadata` goes into every file.

        Raises
        ------
        UserError
            If the folder holds anything but a vocabulary.
        """
        there = sorted(path.name for path in Path(folder).iterdir()) if Path(folder).is_dir() else []
        foreign = [name for name in there if name not in FILES]
        if foreign:
            raise UserError(
                f"is a folder with other things in it ({foreign[0]})",
                path=folder,
                fix="choose another --output",
            )
        aliases = self.aliases()
        tokens = pa.Table.from_arrays(
            [strings(self.gene_ids), numbers(self.token_ids), numbers(self.medians), strings(self.symbols)],
            names=["gene_id", "token_id", "median", "symbol"],
        )
        with atomic_dir(folder) as temporary:
            write_table(tokens, temporary / "tokens.parquet", metadata)
            write_table(aliases, temporary / "aliases.parquet", metadata)
            description = {
                "name": self.name,
                "special_tokens": self.special_tokens,
                "context_length": self.context_length,
                "digest": self.digest,
                **({"metadata": dict(metadata)} if metadata else {}),
            }
            write_json(description, temporary / "vocabulary.json")

    @classmethod
    def load(cls, folder: str | Path) -> "Vocabulary":
        """Read a vocabulary folder.

        Raises
        ------
        UserError
            If a file is missing or broken, or its content is not what its digest says.
        """
        folder = Path(folder)
        if not (folder / "vocabulary.json").is_file():
            raise UserError(
                "no vocabulary here (no vocabulary.json)",
                path=folder,
                fix="make one with cellformers vocabulary --from DIR -o VOCAB",
            )
        description = read_json(folder / "vocabulary.json")
        table = read_table(folder / "tokens.parquet", ["gene_id", "token_id", "median", "symbol"])
        try:
            vocabulary = cls(
                name=str(description["name"]),
                gene_ids=as_strings(table["gene_id"]),
                token_ids=as_numbers(table["token_id"]).astype(np.int32),
                medians=as_numbers(table["median"]).astype(np.float64),
                symbols=as_strings(table["symbol"]),
                special_tokens={str(k): int(v) for k, v in description["special_tokens"].items()},
                context_length=int(description["context_length"]),
                alias_source=folder / "aliases.parquet",
            )
            if vocabulary.digest != description["digest"]:
                raise ValueError("its content is not what its digest says")
        except DAMAGES as error:
            raise UserError(f"not a whole vocabulary ({error})", path=folder, fix="make it again") from error
        return vocabulary


def copy_vocabulary(source: str | Path, target: str | Path) -> None:
    """Copy the files of a vocabulary folder, byte for byte and nothing else that is there, into a new folder.

    UserError where the copy is no whole vocabulary, as where the folder is being changed.
    """
    Path(target).mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(check_plain(Path(source) / name), Path(target) / name)
    try:
        Vocabulary.load(target).aliases()
    except UserError as error:
        raise UserError(
            "is no whole vocabulary, or changed while it was copied", path=source, fix="make it again"
        ) from error


def normalise(names: pa.Array) -> pa.Array:
    """Names as the alias table has them: upper case, Ensembl ids without version."""
    import pyarrow.compute as pc  # 35 ms that commands which only load a vocabulary are spared

    return pc.replace_substring_regex(
        pc.utf8_upper(names), pattern=r"^(ENS[A-Z]*[0-9]{6,})\.[0-9]+(_PAR_Y)?$", replacement=r"\1"
    )


def _alias_table(aliases: Mapping[str, str]) -> pa.Table:
    names = sorted(aliases)
    return pa.Table.from_arrays(
        [strings(names), strings([aliases[n] for n in names])], names=["alias", "gene_id"]
    )


def read_published(folder: str | Path, *, name: str | None = None) -> Vocabulary:
    """Read a published vocabulary: `token_dictionary`, `gene_median_dictionary`, `ensembl_mapping_dict` and
    `gene_name_id_dict` as pickles in one folder.

    V1 and V2 are told apart by their special tokens. A name stands for the gene that the mapping says, whatever its
    case; where the mapping has none, for the gene that the table of gene names says.

    Parameters
    ----------
    folder
        Holds one file of each kind; what follows the kind in the file name does not matter.
    name
        Name of the vocabulary; None: the folder's.

    Raises
    ------
    UserError
        If a file is missing, twice there, damaged, no plain dictionary, or the files don't belong together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("no such folder", path=folder)
    tokens, medians, mapping, names = (
        read_dictionary(_only_file(folder, kind))
        for kind in (
            "token_dictionary",
            "gene_median_dictionary",
            "ensembl_mapping_dict",
            "gene_name_id_dict",
        )
    )
    odd = next((k for k, v in tokens.items() if not isinstance(v, int) or v >= MAX_TOKENS), None)
    if odd is not None:
        raise UserError(
            f"token_dictionary: the entry of {odd!r} is no token", path=folder, fix="use one published folder"
        )
    special = {key: int(value) for key, value in tokens.items() if key.startswith("<")}
    series = next((s for s, expected in SPECIAL_TOKENS.items() if expected == special), None)
    if series is None:
        shown = ", ".join(f"{k}={v}" for k, v in special.items()) or "none"
        raise UserError(
            f"special tokens of neither V1 nor V2: {shown}", path=folder, fix="use one published folder"
        )
    genes = sorted((gene for gene in tokens if gene not in special), key=lambda gene: tokens[gene])
    _check_published(folder, {gene: tokens[gene] for gene in genes}, medians, mapping, names)

    symbol_of = {str(gene): symbol for symbol, gene in names.items() if symbol != gene}
    aliases = {key.upper(): str(gene) for key, gene in mapping.items()}
    for symbol, gene in names.items():
        aliases.setdefault(symbol.upper(), str(gene))
    for gene in [*map(str, names.values()), *genes]:
        aliases.setdefault(gene.upper(), gene)
    return Vocabulary(
        name=folder.name if name is None else name,
        gene_ids=np.array(genes, dtype=object),
        token_ids=np.array([tokens[gene] for gene in genes], np.int32),
        medians=np.array([medians[gene] for gene in genes], np.float64),
        symbols=np.array([symbol_of.get(gene) for gene in genes], dtype=object),
        special_tokens=special,
        context_length=CONTEXT_LENGTH[series],
        alias_source=_alias_table(aliases),
    )


def _only_file(folder: Path, kind: str) -> Path:
    found = sorted(p for p in folder.glob(f"{kind}*") if p.is_file())
    if len(found) != 1:
        what = (
            f"has no {kind}*.pkl" if not found else f"has several {kind}*: {', '.join(p.name for p in found)}"
        )
        raise UserError(
            what, path=folder, fix="keep the four dictionaries of one vocabulary together in a folder"
        )
    return found[0]


def _check_published(
    folder: Path,
    tokens: Mapping[str, Any],
    medians: Mapping[str, Any],
    mapping: Mapping[str, Any],
    names: Mapping[str, Any],
) -> None:
    """Refuse dictionaries that hold the wrong kind of value or belong to different vocabularies.

    The published sets agree so: every gene with a token has a median and maps to itself; V1 has medians of exactly
    its genes, V2 of more. So V1 medians lack genes of V2, and V2 medians lack genes of V1 (tokens without medians).
    """
    fix = "use the four dictionaries of one vocabulary"
    for what, table, kinds in (
        ("token_dictionary", tokens, (int,)),
        ("gene_median_dictionary", medians, (int, float)),
        ("ensembl_mapping_dict", mapping, (str,)),
        ("gene_name_id_dict", names, (str,)),
    ):
        wrong = next((key for key, value in table.items() if not isinstance(value, kinds)), None)
        if wrong is not None:
            raise UserError(
                f"{what}: the entry of {wrong!r} is a {type(table[wrong]).__name__}", path=folder, fix=fix
            )
    for what, missing in (
        ("have no median", [gene for gene in tokens if gene not in medians]),
        ("are not in the mapping", [gene for gene in tokens if mapping.get(gene) != gene]),
    ):
        if missing:
            raise UserError(
                f"the dictionaries don't belong together: {len(missing)} of {len(tokens)} genes with a token {what}, "
                f"e.g. {missing[0]}",
                path=folder,
                fix=fix,
            )


def from_medians(
    path: str | Path, *, name: str, special: Special = "v2", context_length: int | None = None
) -> Vocabulary:
    """A vocabulary of an own corpus.

    Tokens follow the special ones by ascending gene id, as in the published vocabularies. A symbol stands for its
    gene where only one gene has it, whatever its case.

    Parameters
    ----------
    path
        medians.parquet: gene_id, symbol, median, n_cells. Genes without a median are left out.
    special
        "v1": <pad>, <mask>; "v2": also <cls>, <eos>.
    context_length
        Most tokens of a cell; None: 2,048 for "v1", 4,096 for "v2".

    Raises
    ------
    UserError
        If the file is not such a table or a median is not above zero.
    """
    table = read_table(path, ["gene_id", "symbol", "median"])
    with whole(path):
        medians = table["median"].cast(pa.float64()).to_pylist()
        symbols = table["symbol"].cast(pa.string()).to_pylist()
    rows = [
        (gene, symbol or None, median)
        for gene, symbol, median in zip(table["gene_id"].to_pylist(), symbols, medians, strict=True)
        if median is not None
    ]
    rows.sort(key=lambda row: row[0])
    if not rows:
        raise UserError("holds no medians", path=path)
    genes = [row[0] for row in rows]
    aliases: dict[str, str] = {}
    for gene in genes:
        aliases.setdefault(_ENSEMBL_VERSION.sub(r"\1", gene.upper()), gene)
    carriers: dict[str, set[str]] = {}
    for gene, symbol, _ in rows:
        if symbol:
            carriers.setdefault(symbol.upper(), set()).add(gene)
    for symbol, those in carriers.items():
        if len(those) == 1:
            aliases.setdefault(symbol, *those)
    specials = SPECIAL_TOKENS[special]
    return Vocabulary(
        name=name,
        gene_ids=np.array(genes, dtype=object),
        token_ids=np.arange(len(specials), len(specials) + len(genes), dtype=np.int32),
        medians=np.array([row[2] for row in rows], np.float64),
        symbols=np.array([row[1] for row in rows], dtype=object),
        special_tokens=dict(specials),
        context_length=CONTEXT_LENGTH[special] if context_length is None else context_length,
        alias_source=_alias_table(aliases),
    )
