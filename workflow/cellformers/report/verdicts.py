"""Scores in sentences: what a benchmark asks, how it was split, and who wins."""

from collections.abc import Mapping, Sequence
from typing import Any

from cellformers.report import words

Score = Mapping[str, Any]
CLASSES_TO_NAME = 4


def value(score: Score, metric: str) -> float:
    """The value of a metric; -1 where the method has none, which ranks it last."""
    found = (score["metrics"].get(metric) or {}).get("value")
    return -1.0 if found is None else float(found)


def name_of(score: Score) -> str:
    """The method of a score in words, as within a sentence."""
    return words.method(score["method"], score["kind"], score.get("task", ""))


def row_name(score: Score) -> str:
    """The method of a score in words, as at the head of a row."""
    return words.method_row(score["method"], score["kind"], score.get("task", ""))


def question(score: Score) -> str:
    """What a benchmark asks, in a sentence."""
    split, label = score["split"] or {}, str(score["label"]).replace("_", " ")
    classes = [str(c).replace("_", " ") for c in score["classes"] or []]
    if score["task"] == "mixing":
        batch = _plural(str(split.get("unit") or score.get("batch") or "batch").replace("_", " "))
        kept = f" while cells of different {label} stay apart" if score["label"] else ""
        return f"Do cells of different {batch} mix{kept}?"
    if score["task"] == "genes":
        return f"Is a gene {' or '.join(classes)}, judged by how cells of {score['dataset']} express it?"
    named = " or ".join([", ".join(classes[:-1]), classes[-1]])
    told = named if 2 <= len(classes) <= CLASSES_TO_NAME else f"one of {len(classes)}"
    text = f"What is the {label} of a cell ({told})"
    kind = split.get("kind")
    if kind == "held-out":
        return f"{text}, if no cell of its {str(split.get('unit')).replace('_', ' ')} was in training?"
    if kind == "transfer":
        return f"{text}, if training has seen another dataset only?"
    return f"{text}, learned from other cells?"


def _plural(noun: str) -> str:
    return noun if noun.endswith("s") else f"{noun}es" if noun.endswith("ch") else f"{noun}s"


def describe_split(score: Score) -> str:
    """How training and test were told apart, in a sentence or two."""
    split = score["split"] or {}
    excluded = [f"{n:,} {reason}" for reason, n in (split.get("excluded") or {}).items() if n]
    left_out = f" Left out: {words.listing(excluded)}." if excluded else ""
    if score["task"] == "mixing":
        batches = [f"{name} ({n:,} cells)" for name, n in (score.get("batches") or {}).items()]
        return (f"{len(batches)} batches: {words.listing(batches)}." if batches else "") + left_out
    folds, unit = split["folds"], split.get("unit")
    what = "genes" if score["task"] == "genes" else "cells"
    if split["kind"] == "held-out":
        each = [u for fold in split.get("units") or [] for u in fold]
        alone = f", each of {len(each)} held out in turn" if len(each) == folds else ""
        held = f"{len(each)} in {folds} folds" if each and not alone else f"{folds} folds"
        text = f"Whole units held out: no {unit} is in training and in test ({held}{alone})."
    elif split["kind"] == "transfer":
        text = f"Trained on one dataset, tested on another: {words.listing(list(split.get('names') or []))}."
    elif split["kind"] == "given":
        text = f"A split given by the user, {folds} fold{'s' if folds > 1 else ''}."
    else:
        text = f"{folds} folds, stratified over {what}."
        if what == "cells":
            text += " No donor or batch is held out."
    return text + left_out


def describe_interval(score: Score) -> str:
    """What the intervals are, or why there are none."""
    interval = score["interval"] or {}
    note = interval.get("note") or ""
    if interval.get("resampled") is None:
        return note[:1].upper() + note[1:] + "." if note else ""
    text = (
        f"Intervals: {interval['level']:.0%} percentile bootstrap over {_plural(str(interval['resampled']))}"
    )
    text = text.replace("%", " %")
    return f"{text} ({note})." if note else f"{text}."


def said(score: Score, metric: str) -> str:
    """A value and its interval."""
    entry = score["metrics"][metric]
    low, high = entry["low"], entry["high"]
    interval = "" if low is None else f" ({words.score(low)} to {words.score(high)})"
    return words.score(entry["value"]) + interval


def overlap(a: Score, b: Score, metric: str) -> bool | None:
    """Whether two intervals overlap; None where there are no two."""
    first, second = a["metrics"][metric], b["metrics"][metric]
    if first["low"] is None or second["low"] is None:
        return None
    return bool(first["low"] <= second["high"] and second["low"] <= first["high"])


def ranked(scores: Sequence[Score], metric: str, kind: str | None = None) -> list[Score]:
    """Models and baselines (or one kind of these), best first; at equal numbers as shown, the model first."""
    kinds = ("model", "baseline") if kind is None else (kind,)
    return sorted(
        (s for s in scores if s["kind"] in kinds and value(s, metric) >= 0),
        key=lambda s: (-round(value(s, metric), 3), s["kind"] != "model", s["method"]),
    )


def twin(score: Score, scores: Sequence[Score]) -> Score | None:
    """The same network with random weights, treated in the same way; None where it was not scored."""
    tuned = words.FINETUNED_SUFFIX if score["method"].endswith(words.FINETUNED_SUFFIX) else ""
    name = score["method"].removesuffix(tuned) + words.RANDOM_SUFFIX + tuned
    return next((s for s in scores if s["method"] == name and s["kind"] == "baseline"), None)


def verdict(scores: Sequence[Score], metric: str) -> dict[str, str]:
    """Who wins, in words: `tone` (model, baseline or tie), `short` and `text`."""
    models, baselines = ranked(scores, metric, "model"), ranked(scores, metric, "baseline")
    everyone = ranked(scores, metric)
    if not everyone:
        return {"tone": "tie", "short": "nothing scored", "text": "No model or baseline was scored."}
    if not models or not baselines:
        other = "model" if baselines else "baseline"
        text = f"{words.metric(metric)} {said(everyone[0], metric)} by {name_of(everyone[0])}; "
        text += f"there is no {other} to compare it with."
        short = f"no {other} to compare with"
        return {"tone": "tie", "short": short, "text": text[:1].upper() + text[1:]}
    result = _compared(models[0], baselines[0], metric)
    random = twin(models[0], baselines)
    if random is not None and random is not baselines[0]:
        result["text"] += f" The same network with random weights: {words.score(value(random, metric))}."
    if (
        metric == "batch_correction"
        and min(value(s, "bio_conservation") for s in (models[0], baselines[0])) >= 0
    ):
        kept = [words.score(value(s, "bio_conservation")) for s in (models[0], baselines[0])]
        result["text"] += f" Bio conservation: {kept[0]} by the model, {kept[1]} by the baseline."
    for score in scores:
        low, chance = score["metrics"][metric]["low"], (score["chance"] or {}).get(metric)
        if score["kind"] == "control" and low is not None and chance is not None and low > chance:
            result["text"] += f" Beware: {name_of(score)} score above chance, which points to a leak."
            result["short"] += "; beware of a leak"
    return result


def _compared(model: Score, baseline: Score, metric: str) -> dict[str, str]:
    """The best model beside the best baseline."""
    name, m, b = words.metric(metric), name_of(model), name_of(baseline)
    difference = round(value(model, metric), 3) - round(value(baseline, metric), 3)
    if difference > 0:
        tone, short = "model", "model ahead"
        text = f"The model {m} is best: {name} {said(model, metric)}. "
        text += f"The best baseline, {b}, has {said(baseline, metric)}."
    elif difference == 0:
        tone, short = "tie", "a baseline ties"
        text = f"A baseline ties: the model {m} has {name} {said(model, metric)}, "
        text += f"the baseline {b} {said(baseline, metric)}."
    else:
        tone, short = "baseline", "a baseline wins"
        text = f"A baseline wins: {b}, {name} {said(baseline, metric)}. "
        text += f"The best model, {m}, has {said(model, metric)}."
    both = overlap(model, baseline, metric)
    if difference and both:
        text += " Their intervals overlap."
    short += ", no intervals" if both is None else ", intervals overlap" if both and difference else ""
    return {"tone": tone, "short": short, "text": text}
