"""Typed reading of a config.json: every key has a type, a default, and a defined meaning of null.

A missing key and null differ: `"sliding_window": null` is full attention, while a missing one is 4096, the default of
the class. The tables in family_keys.py follow the configuration classes of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neox import files
from neox.config.problems import brief
from neox.errors import CheckpointError, ConfigError
from neox.files import JsonObject

REQUIRED = object()  # as a default: the key is required
LARGEST_COUNT = 1 << 31
LARGEST_NUMBER = 1e30

WANTED = {
    "count": "a positive whole number",
    "index": "a whole number of at least 0",
    "number": "a number",
    "positive": "a positive number",
    "share": "a number of at least 0 and below 1",
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
        kind: type of the value.
        default: value of a missing key.
        nullable: null is valid and read as None; otherwise it is an error.
    """

    kind: Literal["count", "index", "number", "positive", "share", "flag", "name", "id", "ids", "names", "object"]
    default: object = REQUIRED
    nullable: bool = False


def _fits(kind: str, value: object) -> bool:
    if kind in ("count", "index"):
        return type(value) is int and (kind == "count") <= value < LARGEST_COUNT
    if kind in ("id", "ids"):
        items = value if kind == "ids" and isinstance(value, list) else [value]
        return all(type(item) is int and abs(item) < LARGEST_COUNT for item in items)
    if kind in ("number", "positive", "share"):
        low, high = {"number": (-math.inf, math.inf), "positive": (0, math.inf), "share": (0, 1)}[kind]
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and low <= value < high
            and abs(value) < LARGEST_NUMBER
            and (kind != "positive" or value > 0)
        )
    if kind == "names":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, {"flag": bool, "name": str, "object": dict}[kind])


def read_keys(table: Mapping[str, Key], theirs: JsonObject, where: str = "config.json") -> JsonObject:
    """Read the values of all keys in a table. Other keys of the JSON object are ignored.

    Args:
        table: keys by name.
        theirs: the JSON object.
        where: name of the object in errors.

    Raises:
        ConfigError: a key is missing, is null although it is not nullable, or has another type or range.
    """
    found: JsonObject = {}
    for name, key in table.items():
        if name not in theirs:
            if key.default is REQUIRED:
                raise ConfigError(
                    f"key is missing in {where}",
                    where=f"{where}: {name}",
                    want=WANTED[key.kind],
                    do="use the original config.json of the model",
                )
            found[name] = key.default
            continue
        value = theirs[name]
        if not (value is None and key.nullable) and not _fits(key.kind, value):
            want = WANTED[key.kind] + (" or null" if key.nullable else "")
            raise ConfigError(
                "invalid value", where=f"{where}: {name}", got="null" if value is None else brief(value), want=want
            )
        found[name] = value
    return found


def read_json(path: Path) -> JsonObject:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, or is not a JSON object.
    """
    try:
        value = files.read_json(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)[:200]
        raise CheckpointError(
            "file cannot be read", where=path, got=reason, want="a JSON object", do="copy the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError("file cannot be read", where=path, got=type(value).__name__, want="a JSON object")
    return value
