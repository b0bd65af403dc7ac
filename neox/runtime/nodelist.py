"""Slurm's compressed host lists, such as `gpu[01-03,7]-ib,login`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from neox.errors import EnvironmentProblem


def expand_hosts(nodes: str) -> Iterator[str]:
    """Yield the hosts of a list in Slurm's order, without building the complete list.

    A name may have several brackets, with text between and after them, and nested brackets; the last bracket varies
    fastest. The lower bound of a range gives the number of digits: `n[08-10]` is n08, n09, n10.

    Raises:
        EnvironmentProblem: the text is not such a list.
    """
    if nodes.strip():
        for item in split(nodes.strip(), nodes):
            yield from expand_name(item, nodes)


def split(text: str, nodes: str) -> list[str]:
    """The items between the commas outside of brackets."""
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if depth < 0:
            raise malformed(nodes)
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    if depth or not all(item.strip() for item in items):
        raise malformed(nodes)
    return [item.strip() for item in items]


def expand_name(name: str, nodes: str) -> Iterator[str]:
    """The hosts of one item."""
    parts: list[list[str] | Brackets] = []
    while name:
        if name[0] == "[":
            end = closing(name)
            parts.append(Brackets(name[1:end], nodes))
            name = name[end + 1 :]
        else:
            text, bracket, _ = name.partition("[")
            parts.append([text])
            name = name[len(text) :] if bracket else ""
    yield from map("".join, product(parts))


def product(parts: list) -> Iterator[tuple[str, ...]]:
    """As itertools.product, which would first expand every range."""
    if not parts:
        yield ()
        return
    for first in parts[0]:
        for rest in product(parts[1:]):
            yield (first, *rest)


def closing(name: str) -> int:
    """Index of the bracket that closes the one at 0, which exists."""
    depths = itertools.accumulate((letter == "[") - (letter == "]") for letter in name)
    return next(index for index, depth in enumerate(depths) if depth == 0)


class Brackets:
    """The content of one pair of brackets; can be iterated more than once."""

    def __init__(self, inside: str, nodes: str):
        self.items = split(inside, nodes)
        self.nodes = nodes
        for item in self.items:
            low, dash, high = item.partition("-")
            if "[" not in item and not (is_number(low) and (not dash or (is_number(high) and int(low) <= int(high)))):
                raise malformed(nodes)

    def __iter__(self) -> Iterator[str]:
        for item in self.items:
            low, dash, high = item.partition("-")
            if "[" in item:
                for inner in expand_name(item, self.nodes):
                    yield from Brackets(inner, self.nodes)
            elif dash:
                yield from (f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1))
            else:
                yield item


def is_number(text: str) -> bool:
    """Whether a text is a decimal number, with leading zeros or without."""
    return text.isascii() and text.isdigit()


def malformed(nodes: str) -> EnvironmentProblem:
    """The error for a text that is not a host list."""
    return EnvironmentProblem(
        "cannot read Slurm's host list",
        where="SLURM_STEP_NODELIST",
        got=nodes[:200],
        want="names with ranges in brackets, such as gpu[01-03,7]-ib,login",
        do="export MASTER_ADDR, the host of the first process",
    )
