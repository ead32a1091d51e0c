"""YAML of plain values, read with bounds on what a few bytes of it may ask for."""

from typing import Any

import yaml

MAX_DEPTH = 100
MAX_NODES = 20_000  # values and keys, with every alias written out; a dataset of a config has about 20
MAX_NUMBER = 400  # characters of a number or date


class _Loader(yaml.SafeLoader):
    """Stops at the first value too many, and where values are nested too deeply."""

    nodes = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes += 1
        self.depth += 1
        if self.nodes > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES:,} values")
        if self.depth > MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def load_yaml(content: str) -> Any:
    """The value of a document; ValueError as of `resources.read_yaml`."""
    _check_brackets(content)
    try:
        loader = _Loader(content)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def _check_brackets(content: str) -> None:
    """Refuse brackets in brackets without end, over which the parser takes the square of their number."""
    depth = 0
    for character in content:
        if character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError("it is nested too deeply")
        elif character in "]}":
            depth = max(depth - 1, 0)


def _count(node: Any, known: dict[int, int]) -> int:
    """Nodes of a document with its aliases written out; ValueError for too many, circles and keys that repeat."""
    found = known.get(id(node))
    if found is not None:
        if found < 0:
            raise ValueError(f"an alias holds itself ({_line(node)})")
        return found
    known[id(node)] = -1
    total = 1
    if node.id == "mapping":
        _check_keys(node)
        total += sum(_count(each, known) for pair in node.value for each in pair)
    elif node.id == "sequence":
        total += sum(_count(each, known) for each in node.value)
    elif len(node.value) > MAX_NUMBER and not node.tag.endswith(":str"):
        raise ValueError(f"a number of {len(node.value):,} characters ({_line(node)})")
    if total > MAX_NODES:
        raise ValueError(f"it has more than {MAX_NODES:,} values")
    known[id(node)] = total
    return total


def _check_keys(node: Any) -> None:
    seen = set()
    for key, _ in node.value:
        if key.id == "scalar" and key.value != "<<":
            if (key.tag, key.value) in seen:
                raise ValueError(f"the key {key.value!r} is there twice ({_line(key)})")
            seen.add((key.tag, key.value))


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"
