"""YAML files and `--set` options -> one frozen Config, every value of which knows where it came from.

Layers, later wins: schema defaults < `include:` of a file < the file < files to its right < `--set section.key=value`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from neox.config.deepspeed_keys import DEEPSPEED_KEYS
from neox.config.gpt_neox.files import Given, collect, is_upstream, translate
from neox.config.parse import MAX_BYTES, CoreLoader, Leaf, Reader, plain_scalar
from neox.config.problems import brief, nearest, raise_problems
from neox.config.schema import Config, DataSource
from neox.config.vocabulary import tokenizer_vocab_size
from neox.errors import ConfigError
from neox.printing import printable

PACKAGE = Path(__file__).resolve().parent.parent
# configs/, train.py and launch/: in a checkout next to the package, in a wheel inside it (setup.py).
SHARED_FILES = PACKAGE / "share" if (PACKAGE / "share").is_dir() else PACKAGE.parent
PRESETS = SHARED_FILES / "configs"
MAX_INCLUDES = 64  # files of one config
SECTION_TYPES = ("model_type", "model_attributes_type")  # pydantic's names of "not a section"


@dataclass(frozen=True)
class Origin:
    """Where an effective value came from.

    Attributes:
        source: a file as it was named, `--set`, `default`, `derived`, or the name given to loads().
        line: line in the file, from 1; 0 where there is none.
        overridden: earlier layers that gave the key, newest first, with the value each gave.
    """

    source: str
    line: int = 0
    overridden: tuple[tuple[Origin, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Loaded:
    """A config, for each dotted key the origin of its value, and what reading GPT-NeoX's files has to tell, a line each."""

    config: Config
    origins: dict[str, Origin]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One value of one layer."""

    value: Any
    origin: Origin
    lines: dict[tuple, int]


class Layers:
    """Collects settings layer by layer, and everything that is wrong with the sources."""

    def __init__(self, embedding_rows: int | None = None) -> None:
        self.embedding_rows = embedding_rows
        self.settings: dict[tuple[str, ...], Setting] = {}
        self.upstream: dict[str, Given] = {}
        self.problems: list[ConfigError] = []
        self.notes: tuple[str, ...] = ()
        self._files = 0

    def add_file(self, name: str, base: Path | None = None, chain: tuple[Path, ...] = (), asked_by: str | None = None) -> None:
        """Add a file and, before it, the files it includes.

        Args:
            name: path, or a bare name looked for under `configs/`.
            base: folder of the including file, where a relative name is looked for first.
            chain: the files being read, outermost first.
            asked_by: `file:line` of the include, for messages.
        """
        path = find(name, base)
        if path is None:
            self.problems.append(not_found(name, asked_by))
            return
        if path in chain:
            circle = " -> ".join(shown(file) for file in (*chain, path))
            self.problems.append(ConfigError("files include each other in a circle", where=asked_by, got=circle))
            return
        self._files += 1
        if self._files > MAX_INCLUDES:
            self.problems.append(ConfigError("too many files", where=asked_by, want=f"at most {MAX_INCLUDES} after includes"))
            return
        text = self._text(path)
        if text is not None:
            self.add_text(text, shown(path), path.parent, (*chain, path))

    def add_text(self, text: str, source: str, base: Path | None, chain: tuple[Path, ...] = ()) -> None:
        """Add a document; `base` None means that it may include nothing."""
        reader = Reader(source)
        leaves = reader.read(text)
        self.problems += reader.problems
        if is_upstream(leaves):
            self.add_upstream(leaves, source)
            return
        own = []
        for leaf in leaves:
            if leaf.path == ("include",):
                self._include(leaf, source, base, chain)
            else:
                own.append(leaf)
        for leaf in own:
            self.put(leaf, Origin(source, leaf.line))

    def add_upstream(self, leaves: list[Leaf], source: str) -> None:
        """Add a file of GPT-NeoX; all of them lie below the native ones."""
        if self.settings and not self.upstream:
            got = f"a GPT-NeoX file after {next(iter(self.settings.values())).origin.source}"
            self.problems.append(ConfigError("files out of order", where=source, got=got, want="GPT-NeoX files before native ones"))
        self.upstream.update(collect(leaves, source))

    def put_upstream(self) -> None:
        """Translate the files of GPT-NeoX and put what they say below everything else."""
        native, self.settings = self.settings, {}
        settings, notes, problems = translate(self.upstream, {path: setting.value for path, setting in native.items()}, self.embedding_rows)
        self.notes = tuple(notes)
        self.problems += problems
        for item in settings:
            self.put(Leaf(item.path, item.value, item.line, {}), Origin(item.source, item.line))
        for path, setting in native.items():
            self.put(Leaf(path, setting.value, setting.origin.line, setting.lines), setting.origin)

    def _include(self, leaf: Leaf, source: str, base: Path | None, chain: tuple[Path, ...]) -> None:
        names = [leaf.value] if isinstance(leaf.value, str) else leaf.value
        where = f"{source}:{leaf.line}"
        if base is None or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            want = "a file name or a list of them" if base else "no include here: the text is complete in itself"
            self.problems.append(ConfigError("bad include", where=f"{where} include", got=brief(leaf.value), want=want))
            return
        for name in names:
            self.add_file(name, base, chain, where)

    def add_override(self, text: str) -> None:
        """Add one `section.key=value`."""
        key, equals, value = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if path and path[0] != "deepspeed":
            path = tuple(part.replace("-", "_") for part in path)
        if not equals or not all(path):
            do = "join key, = and value to one word, without spaces: --set train.train_iters=1000"
            self.problems.append(ConfigError("cannot read an override", where="--set", got=brief(text), want="section.key=value", do=do))
            return
        parsed = self._override_value(text, value.strip())
        if parsed is not None:
            self.put(Leaf(path, parsed.value, 0, {}), Origin("--set"))

    def _override_value(self, text: str, value: str) -> Leaf | None:
        """The value as a leaf: lists, mappings and quoted texts are YAML, anything else is one plain scalar, whatever characters it has."""
        if value[:1] not in ("[", "{", '"', "'"):
            try:
                return Leaf((), plain_scalar(value), 0, {})
            except ValueError as reason:
                self.problems.append(ConfigError("not a value", where=f"--set {printable(text.partition('=')[0])}", got=printable(value)[:80], want=reason))
                return None
        reader = Reader(f"--set {text}")
        leaves = reader.read(f"value: [{value}]")
        self.problems += reader.problems
        return Leaf((), leaves[0].value[0], 0, {}) if leaves and not reader.problems else None

    def put(self, leaf: Leaf, origin: Origin) -> None:
        """Let a value win over what earlier layers said at, above or below its key."""
        if len(leaf.path) == 1 and leaf.path[0] in Config.model_fields and leaf.value in (None, {}):
            return  # `train:` with nothing below it says nothing
        earlier = [path for path in self.settings if path[: len(leaf.path)] == leaf.path or leaf.path[: len(path)] == path]
        history: list[tuple[Origin, Any]] = []
        for path in earlier:
            old = self.settings.pop(path)
            if path == leaf.path:
                history = [(Origin(old.origin.source, old.origin.line), old.value), *old.origin.overridden]
        self.settings[leaf.path] = Setting(leaf.value, Origin(origin.source, origin.line, (*origin.overridden, *history)), leaf.lines)

    def _text(self, path: Path) -> str | None:
        """Text of a file, or None with a problem."""
        try:
            if not path.is_file():
                raise IsADirectoryError("not a regular file")
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
            if len(raw) > MAX_BYTES:
                self.problems.append(ConfigError("config file is too large", where=shown(path), want=f"at most {MAX_BYTES} bytes"))
                return None
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            self.problems.append(ConfigError("not UTF-8", where=f"{shown(path)}:{line}", got=f"byte 0x{raw[error.start]:02x} at offset {error.start}"))
        except OSError as error:
            self.problems.append(ConfigError("cannot read config file", where=shown(path), got=error.strerror or str(error)))
        return None


def find(name: str, base: Path | None = None) -> Path | None:
    """The file that a name means: as it stands (or below `base`), then under ./configs and the configs of this installation.

    `.yml` may be left out. None: no such file.
    """
    if not name or "\0" in name or name != printable(name):
        return None
    given = Path(name)
    roots = [base if base is not None else Path()]
    if not given.is_absolute():
        roots += [Path("configs"), PRESETS]
    for root in roots:
        for candidate in (root / given, root / f"{name}.yml"):
            if candidate.exists() and not (candidate.is_dir() and candidate.suffix != ".yml"):
                return candidate.resolve()
    return None


def shown(path: Path) -> str:
    """A path for messages: relative to the working folder where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def not_found(name: str, asked_by: str | None) -> ConfigError:
    """The error for a config file that is nowhere, with the shipped name that comes closest."""
    shipped = {str(path.relative_to(PRESETS).with_suffix("")).lower(): str(path.relative_to(PRESETS)) for path in sorted(PRESETS.glob("**/*.yml"))}
    wanted = name.lower().removesuffix(".yml").removeprefix("configs/")
    same_file = [key for key in shipped if key.rpartition("/")[2] == wanted.rpartition("/")[2]]
    close = difflib.get_close_matches(wanted, shipped, n=1, cutoff=0.8) or same_file[:1]
    do = f"did you mean {shipped[close[0]]}?" if close else None
    return ConfigError("no such config file", where=asked_by, got=printable(name), want="a file, or a name under configs/", do=do)


def known_keys() -> dict[str, Any]:
    """Every dotted key of the schema with its pydantic field, sections included."""
    keys: dict[str, Any] = {}

    def visit(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            keys[prefix + name] = field
            inner = nested_model(field.annotation)
            if inner is not None:
                visit(inner, f"{prefix}{name}.")

    visit(Config, "")
    return keys


def nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `ModelConfig` or `RopeScaling | None`; None where there is none, or a list of them."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    if getattr(annotation, "__origin__", None) is tuple:
        return None
    return next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), None)


def suggestions() -> list[str]:
    """What an unknown key may have meant: the keys of the schema, of a data source, and of DeepSpeed."""
    sources = [f"data.{part}.{name}" for part in ("train", "validation", "test") for name in DataSource.model_fields]
    return [*known_keys(), *sources, *(f"deepspeed.{key}" for key in DEEPSPEED_KEYS)]


def nest(settings: dict[tuple[str, ...], Setting]) -> dict[str, Any]:
    """Flat settings as nested mappings."""
    tree: dict[str, Any] = {}
    for path, setting in settings.items():
        inner = tree
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = setting.value
    return tree


def setting_at(settings: dict[tuple[str, ...], Setting], location: tuple) -> tuple[tuple[str, ...], Setting] | None:
    """The setting that gave the value at a location of the config: the one at, above or (for a section) first below it."""
    names = tuple(map(str, location))
    for length in range(len(names), 0, -1):
        if names[:length] in settings:
            return names[:length], settings[names[:length]]
    return next(((path, setting) for path, setting in settings.items() if path[: len(names)] == names), None)


def where(settings: dict[tuple[str, ...], Setting], location: tuple) -> str:
    """`file:line key` of a location of the config."""
    key = ".".join(map(str, location))
    found = setting_at(settings, location)
    if found is None:
        return key
    path, setting = found
    line = setting.lines.get(location[len(path) :], setting.origin.line)
    return f"{Origin(setting.origin.source, line)} {key}"


def schema_problems(error: ValidationError, settings: dict[tuple[str, ...], Setting]) -> list[ConfigError]:
    """What the schema refuses, as our own errors; values that were derived from refused ones are not mentioned."""
    problems, derived = [], []
    for detail in error.errors(include_url=False):
        location = detail["loc"]
        key = ".".join(map(str, location))
        problem = schema_problem(detail, key, where(settings, location))
        is_given = setting_at(settings, location) is not None
        (problems if is_given or detail["type"] == "missing" else derived).append(problem)
    return problems or derived


def schema_problem(detail: dict[str, Any], key: str, place: str) -> ConfigError:
    """One refusal of the schema as our own error."""
    if detail["type"] == "extra_forbidden":
        close = nearest(".".join(part for part in key.split(".") if not part.isdigit()), suggestions())
        got = None if "." not in key else brief(detail["input"])  # of a file that is no config, the value may be a secret
        return ConfigError("unknown key", where=place, got=got, do=f"did you mean {close}?" if close else "neox config explain")
    if detail["type"] == "missing" and key in ("model", "model.vocab_size"):
        return ConfigError("key is missing", where="model.vocab_size", want="the number of token ids", do="set model.vocab_size or tokenizer.file")
    if detail["type"] == "missing":
        return ConfigError("key is missing", where=place, want=key)
    no_space = detail["type"] in SECTION_TYPES and isinstance(detail["input"], str) and ":" in detail["input"]
    do = "put a space after the colon of each key below it" if no_space else None
    return ConfigError("bad value", where=place, got=brief(detail["input"]), want=rule(detail), do=do)


def rule(detail: dict[str, Any]) -> str:
    """pydantic's reason as a rule: `Input should be greater than 0` -> `greater than 0`."""
    if detail["type"] in SECTION_TYPES:
        return "a section: keys below it, indented"
    if detail["type"] == "tuple_type":
        return "a list"
    text = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if detail["type"] == "int_type" and isinstance(detail["input"], float) and detail["input"].is_integer() and abs(detail["input"]) < 1e18:
        text += f", such as {int(detail['input'])}"
    if detail["type"] == "string_type":
        text += "; put it in quotes"
    return text


def derive_vocab_size(layers: Layers) -> None:
    """Set model.vocab_size from tokenizer.file where only the latter is given."""
    given = layers.settings.get(("model", "vocab_size"))
    file = layers.settings.get(("tokenizer", "file"))
    if (given is not None and given.value is not None) or file is None or not isinstance(file.value, str):
        return
    try:
        size = tokenizer_vocab_size(file.value)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        place = where(layers.settings, ("tokenizer", "file"))
        todo = "name a `tokenizers` JSON file, or take tokenizer.file out and set model.vocab_size"
        layers.problems.append(ConfigError("cannot take the vocabulary's size from the tokenizer", where=place, got=f"{file.value}: {reason}", do=todo))
        size = 1  # so that the schema does not report the missing key a second time
    layers.put(Leaf(("model", "vocab_size"), size, 0, {}), Origin("derived"))


def build(layers: Layers) -> Loaded:
    """Check the collected settings against the schema.

    Raises:
        ConfigError: everything that is wrong with the sources and the values, at once.
    """
    if layers.upstream:
        layers.put_upstream()
    derive_vocab_size(layers)
    problems = list(layers.problems)
    try:
        config = Config.model_validate(nest(layers.settings))
    except ValidationError as error:
        refused = schema_problems(error, layers.settings)
        if problems:  # what a damaged or absent file would have given is not missing as well
            refused = [problem for problem in refused if problem.what != "key is missing"]
        raise_problems([*problems, *refused])
    raise_problems(problems)
    return Loaded(config, effective_origins(config, layers.settings), layers.notes)


def effective_origins(config: Config, settings: dict[tuple[str, ...], Setting]) -> dict[str, Origin]:
    """Origin of each dotted key of a config, in the order of the schema."""
    origins: dict[str, Origin] = {}
    for key, _ in flatten(config):
        path = tuple(key.split("."))
        found = settings.get(path)
        if found is None and path[0] == "deepspeed":
            pair = setting_at(settings, path)
            found = pair[1] if pair else None
        if found is not None and not (found.value is None and key in DERIVED):
            origins[key] = found.origin
        else:
            origins[key] = Origin("derived" if key in DERIVED else "default")
    return origins


DERIVED = tuple(key for key, field in known_keys().items() if field.is_required() and nested_model(field.annotation) is None and key.count(".") == 1)


def flatten(config: Config) -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a config, in the order of the schema; lists are leaves."""
    rows: list[tuple[str, Any]] = []

    def visit(value: Any, key: str) -> None:
        if isinstance(value, BaseModel):
            for name in type(value).model_fields:
                visit(getattr(value, name), f"{key}.{name}" if key else name)
        elif isinstance(value, dict) and (value or "." not in key):
            for name, inner in value.items():
                visit(inner, f"{key}.{name}")
        else:
            rows.append((key, to_builtins(value)))

    visit(config, "")
    return rows


def to_builtins(value: Any) -> Any:
    """A config value as plain lists, dicts and scalars; a data source without what it does not name."""
    if isinstance(value, DataSource):
        return {name: inner for name, inner in value if inner is not None}
    if isinstance(value, BaseModel):
        return {name: to_builtins(inner) for name, inner in value}
    if isinstance(value, dict):
        return {name: to_builtins(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_builtins(item) for item in value]
    return value


def load(paths: Iterable[str | Path], overrides: Sequence[str] = (), *, embedding_rows: int | None = None) -> Loaded:
    """Load files, left to right, then overrides.

    Args:
        paths: files, or bare names looked for under configs/.
        overrides: `section.key=value`, as after `--set`.
        embedding_rows: of a checkpoint that files of GPT-NeoX describe: the vocabulary, unless native keys give it.

    Raises:
        ConfigError: everything that is wrong, at once, each with file and line.
    """
    layers = Layers(embedding_rows)
    for path in paths:
        layers.add_file(str(path))
    for override in overrides:
        layers.add_override(override)
    return build(layers)


def load_config(*paths: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of some files and overrides; see load()."""
    return load(paths, overrides).config


def loads(text: str, source: str = "<text>") -> Config:
    """The config of one complete document, such as config.lock.yml.

    Raises:
        ConfigError: everything that is wrong, at once.
    """
    layers = Layers()
    layers.add_text(text, source, None)
    return build(layers).config


class LockDumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would read as something else than a string."""

    yaml_implicit_resolvers = CoreLoader.yaml_implicit_resolvers


def dump(config: Config) -> str:
    """The whole resolved config as YAML text; `loads(dump(config)) == config`."""
    return yaml.dump(to_builtins(config), Dumper=LockDumper, sort_keys=False, allow_unicode=True, width=150)
