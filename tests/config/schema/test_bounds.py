"""Every number in the schema has bounds, and values just outside of them are rejected.

The bounds themselves are pinned by docs/config-reference.md, which test_reference.py compares with the schema.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError

from neox.config.schema import Config

NEEDED = {
    "model": {"vocab_size": 8, "num_kv_heads": 1, "head_dim": 4, "intermediate_size": 8},
    "model.rope_scaling": {"type": "linear", "factor": 2.0},
    "model.lora": {"rank": 1},
    "data.train": {"path": "a"},
}
WITHOUT_BOUNDS = {("tokenizer.special_ids", key) for key in ("bos", "eos", "pad", "stop")}  # as in the imported model
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def parts(kind: object) -> list[object]:
    """A type and all its arguments."""
    return [kind, *(inner for part in get_args(kind) for inner in parts(part))]


def sections(section: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a config by its dotted name."""
    yield name, section
    for key, field in section.model_fields.items():
        for kind in parts(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel) and key not in ("validation", "test"):
                yield from sections(kind, f"{name}.{key}".lstrip("."))


SECTIONS = dict(sections(Config))


def numbers(schema: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
    """(JSON schema, length of the list) of each number that a key may hold; 0 for a number outside of a list."""
    for option in schema.get("anyOf", [schema]):
        if option.get("type") in ("integer", "number"):
            yield option, 0
        elif "prefixItems" in option:
            yield from ((item, len(option["prefixItems"])) for item in option["prefixItems"])
        elif isinstance(option.get("items"), dict):
            yield from ((item, 1) for item, _ in numbers(option["items"]))


NUMBERS = [
    (name, key, number, length)
    for name, section in SECTIONS.items()
    for key, schema in section.model_json_schema().get("properties", {}).items()
    for number, length in numbers(schema)
]


def neighbours(number: dict[str, Any], bound: str) -> tuple[float, float]:
    """The last valid value at a bound, and the first invalid one."""
    limit = number[bound]
    outwards = -math.inf if bound in LOWER else math.inf
    if number["type"] == "integer":
        step = -1 if bound in LOWER else 1
        return (limit - step, limit) if "exclusive" in bound else (limit, limit + step)
    if "exclusive" in bound:
        return math.nextafter(limit, -outwards), float(limit)
    return float(limit), math.nextafter(limit, outwards)


def validate(name: str, key: str, value: float, length: int) -> None:
    """Validate a section in which one key has a value, or a list of them."""
    content = (value,) * length if length else value
    SECTIONS[name].model_validate({**NEEDED.get(name, {}), key: content})


def test_every_number_has_a_lower_bound():
    unbounded = {(name, key) for name, key, number, _ in NUMBERS if not number.keys() & set(LOWER)}
    assert unbounded == WITHOUT_BOUNDS
    assert len(NUMBERS) > 60


@pytest.mark.parametrize(
    ("name", "key", "number", "length"),
    [row for row in NUMBERS if row[:2] not in WITHOUT_BOUNDS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_outside_of_the_bounds_are_rejected(name, key, number, length):
    rejected = [math.nan, math.inf] if number["type"] == "number" else [True]
    for bound in number.keys() & {*LOWER, *UPPER}:
        accepted, outside = neighbours(number, bound)
        validate(name, key, accepted, length)
        rejected.append(outside)
    for value in rejected:
        with pytest.raises(ValidationError) as raised:
            validate(name, key, value, length)
        assert {problem["loc"][0] for problem in raised.value.errors()} == {key}
