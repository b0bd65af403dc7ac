"""Typed reading of a config.json: every key has a kind, a default where it is missing, and a stated meaning of null.

A missing key and null differ: `"sliding_window": null` is full attention, while a missing one is the class's 4096. The tables of
neox.convert.families follow the configuration classes of transformers, which refuse null where a value has no "none".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from neox import files
from neox.config.problems import brief
from neox.errors import CheckpointError, ConfigError

Json = dict[str, Any]

REQUIRED: Any = object()  # as a default: the key must be there
LARGEST_COUNT = 1 << 31
LARGEST_NUMBER = 1e30

WANTED = {
    "count": "a positive whole number",
    "index": "a whole number from 0",
    "number": "a number",
    "positive": "a positive number",
    "share": "a number from 0 to below 1",
    "flag": "true or false",
    "name": "text",
    "id": "a token id",
    "ids": "a token id or a list of them",
    "names": "a list of names",
    "object": "an object",
}


@dataclass(frozen=True)
class Key:
    """One key of a config.json.

    Attributes:
        kind: what values it takes.
        default: its value where it is missing.
        nullable: null is a value of its own, read as None; else it is an error.
    """

    kind: Literal["count", "index", "number", "positive", "share", "flag", "name", "id", "ids", "names", "object"]
    default: Any = REQUIRED
    nullable: bool = False


def _fits(kind: str, value: Any) -> bool:
    if kind in ("count", "index"):
        return type(value) is int and (kind == "count") <= value < LARGEST_COUNT
    if kind in ("id", "ids"):
        items = value if kind == "ids" and isinstance(value, list) else [value]
        return all(type(item) is int and abs(item) < LARGEST_COUNT for item in items)
    if kind in ("number", "positive", "share"):
        low, high = {"number": (-math.inf, math.inf), "positive": (0, math.inf), "share": (0, 1)}[kind]
        return type(value) in (int, float) and low <= value < high and abs(value) < LARGEST_NUMBER and (kind != "positive" or value > 0)
    if kind == "names":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, {"flag": bool, "name": str, "object": dict}[kind])


def read_keys(table: Mapping[str, Key], theirs: Json, where: str = "config.json") -> Json:
    """The values of all keys of a table; keys of `theirs` that the table lacks are left out.

    Args:
        table: keys by name.
        theirs: the JSON object.
        where: what to call it in errors.

    Raises:
        ConfigError: a key is missing, null where null means nothing, or of another type or range.
    """
    found: Json = {}
    for name, key in table.items():
        if name not in theirs:
            if key.default is REQUIRED:
                raise ConfigError(f"{where} lacks a key", where=f"{where}: {name}", want=WANTED[key.kind], do="get the model's own config.json")
            found[name] = key.default
            continue
        value = theirs[name]
        if not (value is None and key.nullable) and not _fits(key.kind, value):
            want = WANTED[key.kind] + (" or null" if key.nullable else "")
            raise ConfigError("value cannot be used", where=f"{where}: {name}", got="null" if value is None else brief(value), want=want)
        found[name] = value
    return found


def read_json(path: Path) -> Json:
    """A JSON object from a file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = files.read_json(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise CheckpointError("file cannot be read", where=path, got=reason, want="a JSON object", do="copy the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError("file cannot be read", where=path, got=type(value).__name__, want="a JSON object")
    return value
