"""Conversion of a config to plain values, dotted keys and YAML, and the list of keys that the schema knows."""

from __future__ import annotations

from collections.abc import Iterator

import yaml
from pydantic.fields import FieldInfo

from neox.config.deepspeed_keys import DEEPSPEED_KEYS
from neox.config.parse import CoreLoader, YamlValue
from neox.config.schema import Config, DataSource, Section


def known_keys() -> dict[str, FieldInfo]:
    """Every dotted key of the schema with its pydantic field, sections included."""
    keys: dict[str, FieldInfo] = {}

    def visit(section: type[Section], prefix: str) -> None:
        for key, name in section.attributes().items():
            field = section.model_fields[name]
            keys[prefix + key] = field
            inner = nested_section(field.annotation)
            if inner is not None:
                visit(inner, f"{prefix}{key}.")

    visit(Config, "")
    return keys


def nested_section(annotation: YamlValue) -> type[Section] | None:
    """The section in an annotation such as `ModelConfig` or `RopeScaling | None`.

    None for other types and for lists.
    """
    if getattr(annotation, "__origin__", None) is tuple:
        return None
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)


def suggestions() -> list[str]:
    """Candidates for the correction of an unknown key: keys of the schema, of a data source, and of DeepSpeed."""
    sources = [f"data.{part}.{name}" for part in ("train", "validation", "test") for name in DataSource.attributes()]
    return [*known_keys(), *sources, *(f"deepspeed.{key}" for key in DEEPSPEED_KEYS)]


DERIVED = tuple(
    key
    for key, field in known_keys().items()
    if field.is_required() and nested_section(field.annotation) is None and key.count(".") == 1
)


def flatten(config: Config) -> list[tuple[str, YamlValue]]:
    """List (dotted key, value) of every leaf of a config, in the order of the schema. Lists are leaves."""

    def visit(value: YamlValue, key: str) -> Iterator[tuple[str, YamlValue]]:
        if isinstance(value, Section):
            entries = value.entries()
        elif isinstance(value, dict) and (value or "." not in key):
            entries = iter(value.items())
        else:
            yield key, to_builtins(value)
            return
        for name, inner in entries:
            yield from visit(inner, f"{key}.{name}" if key else name)

    return list(visit(config, ""))


def to_builtins(value: YamlValue) -> YamlValue:
    """Convert a config value to lists, dicts and scalars. A data source omits the keys that are null."""
    if isinstance(value, DataSource):
        return {name: inner for name, inner in value.entries() if inner is not None}
    if isinstance(value, Section):
        return {name: to_builtins(inner) for name, inner in value.entries()}
    if isinstance(value, dict):
        return {name: to_builtins(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_builtins(item) for item in value]
    return value


class ConfigDumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.2 would read as another type."""

    yaml_implicit_resolvers = CoreLoader.yaml_implicit_resolvers


def to_yaml(value: YamlValue) -> str:
    """Write plain values as YAML text in block style."""
    return yaml.dump(value, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True, width=150)


def dump(config: Config) -> str:
    """Write the resolved config as YAML text; `loads(dump(config)) == config`."""
    return to_yaml(to_builtins(config))


def inline(value: YamlValue) -> str:
    """Write a value as YAML on one line."""
    text = yaml.dump(
        value, Dumper=ConfigDumper, default_flow_style=True, allow_unicode=True, width=float("inf"), sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()
