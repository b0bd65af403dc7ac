"""What a config says and why: every value with its origin, the meaning of a key, the difference of two configs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import yaml

from neox.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.load import Loaded, LockDumper, Origin, flatten, known_keys, nested_model, suggestions
from neox.config.problems import nearest
from neox.config.schema import Config, DataSource
from neox.errors import ConfigError

ABSENT = "(absent)"  # a key that only the other config has, such as one below `deepspeed`


@dataclass(frozen=True)
class KeyHelp:
    """What there is to know about a key.

    Attributes:
        key: dotted.
        meaning: description of the schema.
        type: accepted values in words.
        default: in words, None for a section.
        keys: for a section, the keys below it.
        value: effective value, where a config was given.
        origin: where that value came from.
    """

    key: str
    meaning: str
    type: str
    default: str | None
    keys: tuple[str, ...] = ()
    value: Any = None
    origin: Origin | None = None


@dataclass(frozen=True)
class Difference:
    """A key whose value differs between two configs."""

    key: str
    left: Any
    right: Any
    left_origin: str
    right_origin: str


def show(loaded: Loaded) -> str:
    """The whole config as YAML, with the origin of each value that is no default as a comment."""
    lines: list[tuple[str, str]] = []
    path: list[str] = []
    for key, value in flatten(loaded.config):
        names = key.split(".")
        shared = next((depth for depth, (a, b) in enumerate(zip(path, names[:-1], strict=False)) if a != b), min(len(path), len(names) - 1))
        for depth in range(shared, len(names) - 1):
            lines.append((f"{'  ' * depth}{names[depth]}:", ""))
        path = names[:-1]
        origin = loaded.origins[key]
        lines.append((f"{'  ' * len(path)}{names[-1]}: {inline(value)}", "" if origin.source == "default" else str(origin)))
    notes = [f"# note: {note}" for note in loaded.notes]
    width = min(max((len(text) for text, _ in lines), default=0), 60)
    return "\n".join([*notes, *(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines)])


def converted(loaded: Loaded) -> str:
    """What files and `--set` say, in the native form: every key that is no default, by section, with the notes as comments.

    Loading it gives the same config.
    """
    tree: dict[str, Any] = {}
    for key, value in flatten(loaded.config):
        if loaded.origins[key].source in ("default", "derived"):
            continue
        inner = tree
        *sections, name = key.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    notes = "".join(f"# {note}\n" for note in loaded.notes)
    parts = [yaml.dump({name: section}, Dumper=LockDumper, sort_keys=False, allow_unicode=True, width=150) for name, section in tree.items()]
    return notes + ("\n" if notes else "") + "\n".join(parts)


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(value, Dumper=LockDumper, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def explain(key: str, loaded: Loaded | None = None) -> KeyHelp:
    """The meaning of a dotted key or section.

    Args:
        key: such as `model.rotary_pct`, or a section such as `model`.
        loaded: a config whose value and origin are wanted too.

    Raises:
        ConfigError: no such key; names the nearest.
    """
    key = key.replace("-", "_")
    fields = known_keys()
    if key not in fields and key in suggestions():
        return explain_foreign(key)
    if key not in fields and key in GPT_NEOX_KEYS:
        return explain_upstream(key)
    if key not in fields:
        close = nearest(key, suggestions())
        raise ConfigError("unknown key", got=key, do=f"did you mean {close}?" if close else f"sections are {', '.join(Config.model_fields)}")
    field = fields[key]
    schema = property_schema(key)
    model = nested_model(field.annotation)
    below = tuple(name for name in fields if name.startswith(f"{key}.") and "." not in name[len(key) + 1 :])
    if below and key in Config.model_fields:
        return KeyHelp(key, (model.__doc__ or "").strip().splitlines()[0], "section", None, below)
    if key == "deepspeed":
        return KeyHelp(key, field.description, "section", None, tuple(f"deepspeed.{name}" for name in DEEPSPEED_KEYS if name not in OWNED_KEYS))
    default = "derived (see the meaning), or required" if field.is_required() else inline(schema.get("default"))
    value = origin = None
    if loaded is not None:
        value = dict(flatten(loaded.config)).get(key)
        origin = loaded.origins.get(key)
    return KeyHelp(key, field.description or "", type_text(schema), default, below, value, origin)


def explain_foreign(key: str) -> KeyHelp:
    """A key that is no field of its own: of a data source, or of DeepSpeed."""
    name = key.rpartition(".")[2]
    if not key.startswith("deepspeed."):
        field = DataSource.model_fields[name]
        schema = DataSource.model_json_schema()["properties"][name]
        return KeyHelp(key, f"in each item of the list: {field.description}", type_text(schema), None if field.is_required() else inline(schema["default"]))
    owner = OWNED_KEYS.get(name)
    meaning = f"decided by {owner}: set that" if owner else "key of DeepSpeed's own config, handed on as it is"
    return KeyHelp(key, meaning, "what DeepSpeed takes", None, tuple(f"{key}.{inner}" for inner in DEEPSPEED_KEYS[name] or () if not owner))


def explain_upstream(key: str) -> KeyHelp:
    """A key of GPT-NeoX's files."""
    row = GPT_NEOX_KEYS[key]
    meaning = {"renamed": f"is {row.to[0]}" if row.to else "", "translated": row.text, "ignored": f"ignored: {row.text}", "unsupported": row.text}[row.kind]
    to = f" -> {', '.join(row.to)}" if row.kind == "translated" else ""
    default = None if row.default is None else inline(row.default)
    return KeyHelp(key, f"key of GPT-NeoX{to}: {meaning}", f"{row.kind}, GPT-NeoX's own type", default)


@functools.cache
def config_schema() -> dict[str, Any]:
    """JSON schema of the whole config."""
    return Config.model_json_schema()


def property_schema(key: str) -> dict[str, Any]:
    """JSON schema of a dotted key, references resolved."""
    root = config_schema()
    node = root
    for name in key.split("."):
        node = resolve(node, root)["properties"][name]
    return node if "$ref" not in node else {**resolve(node, root), **node}


def resolve(node: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """Follow a `$ref`, also inside `X | null`."""
    options = [node, *node.get("anyOf", ()), *node.get("allOf", ())]
    reference = next((option["$ref"] for option in options if "$ref" in option), None)
    return node if reference is None else root["$defs"][reference.rpartition("/")[2]]


def type_text(schema: dict[str, Any]) -> str:
    """A JSON schema in words: `integer > 0`, `one of a, b`, `a list of ...`."""
    if "anyOf" in schema:
        return " or ".join(type_text(option) for option in schema["anyOf"])
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    if "$ref" in schema:
        return f"mapping ({schema['$ref'].rpartition('/')[2]})"
    kind = schema.get("type", "anything")
    if kind == "array":
        items = schema.get("items") or {}
        return f"list of {len(schema['prefixItems'])} numbers" if "prefixItems" in schema else f"list of {type_text(items)}"
    if kind == "object":
        return "mapping"
    bounds = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
    limits = [f"{sign} {schema[name]:g}" for name, sign in bounds if name in schema]
    return " ".join([kind, ", ".join(limits)]).strip()


def diff(left: Loaded, right: Loaded) -> list[Difference]:
    """Keys whose effective values differ, in the order of the schema."""
    ours, theirs = dict(flatten(left.config)), dict(flatten(right.config))
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return [
        Difference(key, ours.get(key, ABSENT), theirs.get(key, ABSENT), str(left.origins.get(key, Origin(ABSENT))), str(right.origins.get(key, Origin(ABSENT))))
        for key in keys
        if key not in ours or key not in theirs or ours[key] != theirs[key]
    ]
