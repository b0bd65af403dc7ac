"""Loading of a config: YAML files and `--set` options become one frozen Config with the origin of every value.

Layers, a later one wins: schema defaults < files included by a file < the file < files to its right < `--set`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from neox.config.key_types import property_schema, type_text
from neox.config.layers import Layers, Origin, Setting
from neox.config.parse import Leaf, YamlValue
from neox.config.problems import brief, nearest, raise_problems
from neox.config.schema import Config
from neox.config.values import DERIVED, flatten, known_keys, nested_section, suggestions
from neox.config.vocabulary import tokenizer_vocab_size
from neox.errors import ConfigError

NOT_A_SECTION = ("model_type", "model_attributes_type")  # pydantic's types of this error
KEYS = known_keys()

Settings = dict[tuple[str, ...], Setting]
Location = tuple[int | str, ...]


@dataclass(frozen=True)
class Loaded:
    """A config with its sources.

    Attributes:
        config: the effective values.
        origins: origin of each dotted key.
        notes: remarks on the translation of GPT-NeoX files, one line each.
    """

    config: Config
    origins: dict[str, Origin]
    notes: tuple[str, ...] = ()


def load(paths: Iterable[str | Path], overrides: Sequence[str] = (), *, embedding_rows: int | None = None) -> Loaded:
    """Load files, left to right, then overrides.

    Args:
        paths: files, or names under configs/.
        overrides: `section.key=value`, as after `--set`.
        embedding_rows: rows of the embedding in a checkpoint that GPT-NeoX files describe; they set the vocabulary
            size, unless native keys do.

    Raises:
        ConfigError: all problems at once, each with file and line.
    """
    layers = Layers(embedding_rows)
    for path in paths:
        layers.add_file(str(path))
    for override in overrides:
        layers.add_override(override)
    return build(layers)


def load_config(*paths: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load files and overrides; see load()."""
    return load(paths, overrides).config


def loads(text: str, source: str = "<text>") -> Config:
    """Load one self-contained document, such as config.lock.yml.

    Raises:
        ConfigError: all problems at once.
    """
    layers = Layers()
    layers.add_text(text, source, None)
    return build(layers).config


def build(layers: Layers) -> Loaded:
    """Validate the collected settings against the schema.

    Raises:
        ConfigError: all problems of the sources and the values at once.
    """
    if layers.gpt_neox:
        layers.put_gpt_neox()
    derive_vocab_size(layers)
    problems = list(layers.problems)
    try:
        config = Config.model_validate(nest(layers.settings))
    except ValidationError as error:
        refused = schema_problems(error, layers.settings)
        if problems:  # a file that cannot be read would report every key in it as missing
            refused = [problem for problem in refused if problem.what != "key is missing"]
        raise_problems([*problems, *refused])
        raise
    raise_problems(problems)
    return Loaded(config, effective_origins(config, layers.settings), layers.notes)


def derive_vocab_size(layers: Layers) -> None:
    """Set model.vocab_size from tokenizer.file if only the latter is given."""
    given = layers.settings.get(("model", "vocab_size"))
    file = layers.settings.get(("tokenizer", "file"))
    if ("model",) in layers.settings:
        return  # not a section, which the schema refuses; a key below it would replace it unnoticed
    if (given is not None and given.value is not None) or file is None or not isinstance(file.value, str):
        return
    try:
        size = tokenizer_vocab_size(file.value)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        place = where(layers.settings, ("tokenizer", "file"))
        do = "give a `tokenizers` JSON file, or remove tokenizer.file and set model.vocab_size"
        what = "cannot read the vocabulary size from the tokenizer"
        layers.problems.append(ConfigError(what, where=place, got=f"{file.value}: {reason}", do=do))
        size = 1  # so that the schema does not report the missing key as well
    layers.put(Leaf(("model", "vocab_size"), size, 0, {}), Origin("derived"))


def effective_origins(config: Config, settings: Settings) -> dict[str, Origin]:
    """Return the origin of each dotted key of a config, in the order of the schema."""
    origins: dict[str, Origin] = {}
    for key, _ in flatten(config):
        setting, value = given_at(settings, tuple(key.split(".")))
        if setting is not None and not (value is None and key in DERIVED):
            origins[key] = setting.origin
        else:
            origins[key] = Origin("derived" if key in DERIVED else "default")
    return origins


def given_at(settings: Settings, path: tuple[str, ...]) -> tuple[Setting | None, YamlValue]:
    """Return the setting that gives a key, at it or as a mapping above it, and the value; (None, None) if none does."""
    for length in range(len(path), 0, -1):
        setting = settings.get(path[:length])
        if setting is None:
            continue
        value = setting.value
        for name in path[length:]:
            if not isinstance(value, dict) or name not in value:
                return None, None
            value = value[name]
        return setting, value
    return None, None


def nest(settings: Settings) -> dict[str, YamlValue]:
    """Convert flat settings to nested mappings."""
    tree: dict[str, YamlValue] = {}
    for path, setting in settings.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = setting.value
    return tree


def setting_at(settings: Settings, location: Location) -> tuple[tuple[str, ...], Setting] | None:
    """Find the setting of a location: the one at it, above it or, for a section, the first below it."""
    names = tuple(map(str, location))
    for length in range(len(names), 0, -1):
        if names[:length] in settings:
            return names[:length], settings[names[:length]]
    return next(((path, setting) for path, setting in settings.items() if path[: len(names)] == names), None)


def value_at(settings: Settings, location: Location) -> YamlValue:
    """Return the value that was set at a location, which may be inside the value of a setting."""
    found = setting_at(settings, location)
    if found is None:
        return None
    path, setting = found
    value = setting.value
    for part in location[len(path) :]:
        value = value[part]
    return value


def where(settings: Settings, location: Location) -> str:
    """Return `file:line key` of a location of the config."""
    key = ".".join(map(str, location))
    found = setting_at(settings, location)
    if found is None:
        return key
    path, setting = found
    line = setting.lines.get(location[len(path) :], setting.origin.line)
    return f"{Origin(setting.origin.source, line)} {key}"


def schema_problems(error: ValidationError, settings: Settings) -> list[ConfigError]:
    """Convert the errors of pydantic. Values derived from invalid ones are reported only if there is nothing else."""
    given: dict[Location, ConfigError] = {}
    derived: dict[Location, ConfigError] = {}
    details = error.errors(include_url=False)
    wrong_items = [detail["loc"] for detail in details if not has_wrong_length(detail)]
    for detail in details:
        location = key_of(detail)
        if has_wrong_length(detail) and any(other[: len(location)] == location for other in wrong_items):
            continue  # pydantic does not count invalid items; they are reported
        place = where(settings, location)
        if location == detail["loc"] and not has_wrong_length(detail):
            problem = schema_problem(detail, ".".join(map(str, location)), place)
        else:
            schema = property_schema(".".join(map(str, location)))
            least = schema.get("minItems", 0)
            want = f"a list of at least {least}" if detail["type"] == "too_short" and least else type_text(schema)
            problem = ConfigError("bad value", where=place, got=brief(value_at(settings, location)), want=want)
        known = setting_at(settings, location) is not None or detail["type"] == "missing"
        (given if known else derived).setdefault(location, problem)
    return list((given or derived).values())


def has_wrong_length(detail: ErrorDetails) -> bool:
    """Whether an error is about the number of items in a list. For a tuple pydantic reports each missing item."""
    missing_item = detail["type"] == "missing" and isinstance(detail["loc"][-1], int)
    return missing_item or detail["type"] in ("too_short", "too_long")


def key_of(detail: ErrorDetails) -> Location:
    """Return the location of the key that an error is about.

    pydantic appends the position of a missing item, and for a union the name of a branch, such as `tuple[int, ...]`.
    """
    location = detail["loc"]
    for depth in range(1, len(location)):
        field = KEYS.get(".".join(map(str, location[:depth])))
        if field is not None and nested_section(field.annotation) is None and isinstance(location[depth], str):
            return location[:depth]
    return location[:-1] if has_wrong_length(detail) and detail["type"] == "missing" else location


def schema_problem(detail: ErrorDetails, key: str, place: str) -> ConfigError:
    """Convert one error of pydantic."""
    if detail["type"] == "extra_forbidden":
        close = nearest(".".join(part for part in key.split(".") if not part.isdigit()), suggestions())
        got = None if "." not in key else brief(detail["input"])  # a file that is not a config may hold secrets
        do = misplaced_section(key, detail["input"]) or (f"did you mean {close}?" if close else "neox config explain")
        return ConfigError("unknown key", where=place, got=got, do=do)
    if detail["type"] == "missing" and key in ("model", "model.vocab_size"):
        do = "set model.vocab_size or tokenizer.file"
        return ConfigError("key is missing", where="model.vocab_size", want="the number of token ids", do=do)
    if detail["type"] == "missing":
        return ConfigError("key is missing", where=place, want=key)
    no_space = detail["type"] in NOT_A_SECTION and isinstance(detail["input"], str) and ":" in detail["input"]
    do = "put a space after the colon of each key below it" if no_space else misplaced_section(key, detail["input"])
    if detail["type"] == "string_type" and type(detail["input"]) in (int, float):
        do = do or f"put the value in quotes: '{brief(detail['input'])}'"
    return ConfigError("bad value", where=place, got=brief(detail["input"]), want=wanted(detail), do=do)


def misplaced_section(key: str, value: object) -> str | None:
    """What to do about a section that is indented below another one; None for anything else."""
    name = key.rpartition(".")[2]
    if "." in key and name in Config.attributes() and isinstance(value, dict):
        return f"{name} is a section: move it to the first column"
    return None


def wanted(detail: ErrorDetails) -> str:
    """Rephrase the reason of pydantic as a rule: `Input should be greater than 0` -> `greater than 0`."""
    if detail["type"] in NOT_A_SECTION:
        return "a section: keys below it, indented"
    if detail["type"] == "tuple_type":
        items = detail["input"]
        return f"a list, such as [{items}]" if isinstance(items, str) and "," in items else "a list"
    text = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ").removeprefix("Value error, ")
    value = detail["input"]
    if detail["type"] == "int_type" and isinstance(value, float) and value.is_integer() and abs(value) < 1e18:
        text += f", such as {int(value)}"
    return text
