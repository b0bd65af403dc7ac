"""The type of a key in words, from the JSON schema of the config."""

from __future__ import annotations

import functools

from neox.config.schema import Config
from neox.config.schema.base import LARGEST_BATCH
from neox.files import JsonObject


@functools.cache
def config_schema() -> JsonObject:
    """JSON schema of the complete config."""
    return Config.model_json_schema()


def property_schema(key: str) -> JsonObject:
    """JSON schema of a dotted key, with references resolved."""
    root = config_schema()
    node = root
    for name in key.split("."):
        node = _resolve(node, root)["properties"][name]
    return node if "$ref" not in node else {**_resolve(node, root), **node}


def _resolve(node: JsonObject, root: JsonObject) -> JsonObject:
    """Follow a `$ref`, also inside `X | null`."""
    options = [node, *node.get("anyOf", ()), *node.get("allOf", ())]
    reference = next((option["$ref"] for option in options if "$ref" in option), None)
    return node if reference is None else root["$defs"][reference.rpartition("/")[2]]


def type_text(schema: JsonObject) -> str:
    """Describe a JSON schema in words: `integer > 0`, `one of a, b`, `list of ...`.

    The upper bounds of all integers (docs/config.md) are left out.
    """
    if "anyOf" in schema:
        return " or ".join(type_text(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "$ref" in schema:
        return f"mapping ({schema['$ref'].rpartition('/')[2]})"
    kind = schema.get("type", "anything")
    if kind == "array":
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])} numbers"
        return f"list of {type_text(schema.get('items') or {})}"
    if kind == "object":
        return "mapping"
    bounds = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
    limits = [
        f"{sign} {schema[name]:g}" for name, sign in bounds if name in schema and abs(schema[name]) < LARGEST_BATCH
    ]
    return " ".join([kind, ", ".join(limits)]).strip()
