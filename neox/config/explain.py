"""Explanations of a config: every value with its origin, the meaning of a key, the differences of two configs."""

from __future__ import annotations

from dataclasses import dataclass

from neox.config.deepspeed_keys import DEEPSPEED_KEYS, OWNED_KEYS
from neox.config.gpt_neox.keys import GPT_NEOX_KEYS
from neox.config.key_types import property_schema, type_text
from neox.config.layers import Origin
from neox.config.load import Loaded
from neox.config.parse import YamlValue
from neox.config.problems import nearest
from neox.config.schema import Config, DataSource
from neox.config.values import flatten, inline, known_keys, nested_section, suggestions, to_yaml
from neox.errors import ConfigError

ABSENT = "(absent)"  # a key that only one of two configs has, such as a key below `deepspeed`


@dataclass(frozen=True)
class KeyHelp:
    """Description of a key.

    Attributes:
        key: dotted.
        meaning: description in the schema.
        type: accepted values in words.
        default: in words; None for a section.
        keys: for a section, the keys below it.
        value: effective value, if a config was given.
        origin: where that value came from.
    """

    key: str
    meaning: str
    type: str
    default: str | None
    keys: tuple[str, ...] = ()
    value: YamlValue = None
    origin: Origin | None = None


@dataclass(frozen=True)
class Difference:
    """A key whose value differs between two configs."""

    key: str
    left: YamlValue
    right: YamlValue
    left_origin: str
    right_origin: str


def show(loaded: Loaded) -> str:
    """Write the complete config as YAML. The origin of each value that is not a default is a comment."""
    lines: list[tuple[str, str]] = []
    path: list[str] = []
    for key, value in flatten(loaded.config):
        names = key.split(".")
        differing = (depth for depth, (a, b) in enumerate(zip(path, names[:-1], strict=False)) if a != b)
        shared = next(differing, min(len(path), len(names) - 1))
        for depth in range(shared, len(names) - 1):
            lines.append((f"{'  ' * depth}{names[depth]}:", ""))
        path = names[:-1]
        origin = loaded.origins[key]
        comment = "" if origin.source == "default" else str(origin)
        lines.append((f"{'  ' * len(path)}{names[-1]}: {inline(value)}", comment))
    notes = [f"# note: {note}" for note in loaded.notes]
    width = min(max((len(text) for text, _ in lines), default=0), 60)
    return "\n".join([*notes, *(f"{text:<{width}}  # {origin}" if origin else text for text, origin in lines)])


def converted(loaded: Loaded) -> str:
    """Write what files and `--set` give as a native config: every key that is not a default, with notes as comments.

    Loading the text gives the same config.
    """
    tree: dict[str, YamlValue] = {}
    for key, value in flatten(loaded.config):
        if loaded.origins[key].source in ("default", "derived"):
            continue
        inner = tree
        *sections, name = key.split(".")
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    notes = "".join(f"# {note}\n" for note in loaded.notes)
    return notes + ("\n" if notes else "") + "\n".join(to_yaml({name: section}) for name, section in tree.items())


def explain(key: str, loaded: Loaded | None = None) -> KeyHelp:
    """Describe a dotted key or a section.

    Args:
        key: such as `model.rotary_pct`, or a section such as `model`.
        loaded: a config whose value and origin of the key are included.

    Raises:
        ConfigError: there is no such key; the error names the most similar one.
    """
    key = key.replace("-", "_")
    fields = known_keys()
    if key not in fields and key in suggestions():
        return _explain_listed(key)
    if key not in fields and key in GPT_NEOX_KEYS:
        return _explain_gpt_neox(key)
    if key not in fields:
        close = nearest(key, suggestions())
        do = f"did you mean {close}?" if close else f"sections are {', '.join(Config.attributes())}"
        raise ConfigError("unknown key", got=key, do=do)
    field = fields[key]
    below = tuple(name for name in fields if name.startswith(f"{key}.") and "." not in name[len(key) + 1 :])
    section = nested_section(field.annotation)
    if section is not None and key in Config.attributes():
        return KeyHelp(key, (section.__doc__ or "").strip().splitlines()[0], "section", None, below)
    if key == "deepspeed":
        passed = tuple(f"deepspeed.{name}" for name in DEEPSPEED_KEYS if name not in OWNED_KEYS)
        return KeyHelp(key, field.description or "", "section", None, passed)
    schema = property_schema(key)
    default = inline(schema.get("default"))
    if field.is_required():
        default = "derived (see the meaning)" if "default" in (field.description or "") else "required"
    value = None if loaded is None else dict(flatten(loaded.config)).get(key)
    origin = None if loaded is None else loaded.origins.get(key)
    return KeyHelp(key, field.description or "", type_text(schema), default, below, value, origin)


def _explain_listed(key: str) -> KeyHelp:
    """Describe a key below a list or a mapping: of a data source, or of DeepSpeed."""
    name = key.rpartition(".")[2]
    if not key.startswith("deepspeed."):
        field = DataSource.model_fields[name]
        schema = DataSource.model_json_schema()["properties"][name]
        default = None if field.is_required() else inline(schema["default"])
        return KeyHelp(key, f"in each item of the list: {field.description}", type_text(schema), default)
    owner = OWNED_KEYS.get(name)
    meaning = f"set by {owner}; use that key" if owner else "key of DeepSpeed's own config, passed through unchanged"
    below = () if owner else tuple(f"{key}.{inner}" for inner in DEEPSPEED_KEYS[name] or ())
    return KeyHelp(key, meaning, "whatever DeepSpeed accepts", None, below)


def _explain_gpt_neox(key: str) -> KeyHelp:
    """Describe a key of GPT-NeoX's files."""
    rule = GPT_NEOX_KEYS[key]
    treatment = {
        "renamed": f"the same as {', '.join(rule.to)}",
        "translated": f"sets {', '.join(rule.to)}: {rule.text}",
        "ignored": f"ignored: {rule.text}",
        "unsupported": f"not supported: {rule.text}",
    }
    same = [name for name in known_keys() if name.rpartition(".")[2] == key and name not in rule.to]
    see = f"; see {', '.join(same)}" if same else ""
    default = None if rule.default is None else inline(rule.default)
    return KeyHelp(key, f"GPT-NeoX key, {treatment[rule.kind]}{see}", "as in GPT-NeoX", default)


def diff(left: Loaded, right: Loaded) -> list[Difference]:
    """List the keys whose effective values differ, in the order of the schema."""
    first, second = dict(flatten(left.config)), dict(flatten(right.config))
    absent = Origin(ABSENT)
    return [
        Difference(
            key,
            first.get(key, ABSENT),
            second.get(key, ABSENT),
            str(left.origins.get(key, absent)),
            str(right.origins.get(key, absent)),
        )
        for key in dict.fromkeys([*first, *second])
        if key not in first or key not in second or first[key] != second[key]
    ]
