"""A broken rule, and what rules are checked against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Environment:
    """What a config is checked against besides itself.

    Attributes:
        world_size: number of processes.
        device: "cpu" or "cuda".
    """

    world_size: int
    device: str


@dataclass(frozen=True)
class Conflict:
    """A broken rule.

    Attributes:
        what: the problem in a few words.
        keys: dotted keys involved; the error reports their values and origins.
        rule: the condition that must hold.
        do: next action.
        facts: other values involved, such as ("world size", 4).
    """

    what: str
    keys: tuple[str, ...]
    rule: str
    do: str | None = None
    facts: tuple[tuple[str, object], ...] = ()
