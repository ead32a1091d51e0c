"""A comparison in words for people, and as JSON for machines."""

from collections.abc import Sequence
from typing import Any

from cellformers.compare.compared import Comparison
from cellformers.compare.tally import Difference

_LINES = 20  # of a section
_WITHIN = 4  # of an artefact


def as_text(comparison: Comparison, *, strict: bool = False) -> str:
    """A few lines a section, empty sections left out, the verdict at the end."""
    first, second = comparison.runs
    lines = [f"A  {first}", f"B  {second}"]
    lines += [f"note: {_safe(note)}" for note in comparison.notes]
    lines += _section("circumstances (they decide nothing)", map(_line, comparison.circumstances))
    lines += _section("config", map(_line, comparison.config))
    lines += _section("inputs", map(_line, comparison.inputs))
    lines += _section("artefacts only in A", map(_safe, comparison.only_first))
    lines += _section("artefacts only in B", map(_safe, comparison.only_second))
    for title, accepted in (
        ("artefacts that differ", False),
        (f"artefacts that differ within {comparison.tolerance:g}", True),
    ):
        block = [
            "\n".join([_safe(each.name), *(f"    {text}" for text in _few(each.differences))])
            for each in comparison.unlike
            if each.accepted == accepted
        ]
        lines += _section(title, block)
    lines += _section("changed since they were recorded", map(_safe, comparison.changed))
    return "\n".join([*lines, "", _verdict(comparison, strict=strict)])


def _verdict(comparison: Comparison, *, strict: bool) -> str:
    counts = [f"{comparison.equal:,} artefacts are equal to the byte"]
    if comparison.joined:
        counts.append(f"{len(comparison.joined):,} are cut into other shards with the same rows")
    within = sum(each.accepted for each in comparison.unlike)
    if within:
        counts.append(f"{within:,} differ within {comparison.tolerance:g}")
    beyond = len(comparison.unlike) - within
    if beyond:
        counts.append(f"{beyond:,} differ")
    alone = len(comparison.only_first) + len(comparison.only_second)
    if alone:
        counts.append(f"{alone:,} are in one run only")
    word = "The runs differ" if comparison.differs(strict=strict) else "Nothing differs"
    return f"{word}: {', '.join(counts)}."


def _section(title: str, entries: Any) -> list[str]:
    shown = list(entries)
    if not shown:
        return []
    lines = [line for entry in shown[:_LINES] for line in entry.split("\n")]
    rest = [f"  ... and {len(shown) - _LINES:,} more (--output has all)"] if len(shown) > _LINES else []
    return ["", f"{title}: {len(shown):,}", *(f"  {line}" for line in lines), *rest]


def _few(differences: Sequence[Difference]) -> list[str]:
    rest = len(differences) - _WITHIN
    return [_line(each) for each in differences[:_WITHIN]] + ([f"and {rest:,} more"] if rest > 0 else [])


def _line(difference: Difference) -> str:
    text = (
        f"{difference.place.removeprefix('key ')}: {difference.text}" if difference.place else difference.text
    )
    return _safe(text)


def _safe(text: str) -> str:
    """Names of files are data: what would move the cursor of a terminal is shown as its code."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def as_json(comparison: Comparison, *, strict: bool = False) -> dict[str, Any]:
    """Everything that was found, as `write_json` takes it."""

    def each(difference: Difference) -> dict[str, Any]:
        found: dict[str, Any] = {"place": difference.place, "text": difference.text}
        if difference.largest is not None:
            found |= {"absolute": difference.largest[0], "relative": difference.largest[1]}
        return found | {"accepted": difference.accepted}

    def plain(found: Sequence[Difference]) -> list[dict[str, str]]:
        return [{"place": d.place.removeprefix("key "), "text": d.text} for d in found]

    return {
        "differs": comparison.differs(strict=strict),
        "runs": list(comparison.runs),
        "tolerance": comparison.tolerance,
        "notes": comparison.notes,
        "circumstances": plain(comparison.circumstances),
        "config": plain(comparison.config),
        "inputs": plain(comparison.inputs),
        "only_first": comparison.only_first,
        "only_second": comparison.only_second,
        "unlike": [
            {"name": u.name, "accepted": u.accepted, "differences": [each(d) for d in u.differences]}
            for u in comparison.unlike
        ],
        "changed": comparison.changed,
        "equal": comparison.equal,
        "joined": comparison.joined,
    }
