"""The layers of a config: files, their includes and `--set` options, merged key by key. A later layer wins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from neox.config.files import display_path, find_config, not_found
from neox.config.gpt_neox.files import Given, collect, is_gpt_neox, translate
from neox.config.parse import MAX_BYTES, Leaf, Reader, YamlValue, plain_scalar
from neox.config.problems import brief
from neox.config.schema import Config
from neox.errors import ConfigError
from neox.printing import printable

MAX_INCLUDES = 64  # files of one config


@dataclass(frozen=True)
class Origin:
    """Where an effective value came from.

    Attributes:
        source: a file as it was named, `--set`, `default`, `derived`, or the name given to loads().
        line: line in the file, from 1; 0 if there is none.
        overridden: earlier layers that set the key, newest first, with the value of each.
    """

    source: str
    line: int = 0
    overridden: tuple[tuple[Origin, YamlValue], ...] = ()

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Setting:
    """One value of one layer.

    Attributes:
        value: as parsed.
        origin: where it was set.
        lines: for a list of mappings, (path inside the value) -> line.
    """

    value: YamlValue
    origin: Origin
    lines: dict[tuple, int]


class Layers:
    """Collects settings layer by layer, and every problem of the sources.

    Args:
        embedding_rows: rows of the embedding in a checkpoint that GPT-NeoX files describe, if there is one.
    """

    def __init__(self, embedding_rows: int | None = None) -> None:
        self.embedding_rows = embedding_rows
        self.settings: dict[tuple[str, ...], Setting] = {}
        self.gpt_neox: dict[str, Given] = {}
        self.problems: list[ConfigError] = []
        self.notes: tuple[str, ...] = ()
        self._files = 0

    def add_file(
        self, name: str, base: Path | None = None, chain: tuple[Path, ...] = (), included_by: str | None = None
    ) -> None:
        """Add a file, after the files that it includes.

        Args:
            name: path, or a name under `configs/`.
            base: folder of the including file, where a relative name is searched first.
            chain: the files being read, outermost first.
            included_by: `file:line` of the include, for messages.
        """
        path = find_config(name, base)
        if path is None:
            self.problems.append(not_found(name, included_by))
            return
        if path in chain:
            circle = " -> ".join(display_path(file) for file in (*chain, path))
            self.problems.append(ConfigError("circular include", where=included_by, got=circle))
            return
        self._files += 1
        if self._files > MAX_INCLUDES:
            want = f"at most {MAX_INCLUDES}, includes counted"
            self.problems.append(ConfigError("too many files", where=included_by, want=want))
            return
        text = self._read(path)
        if text is not None:
            self.add_text(text, display_path(path), path.parent, (*chain, path))

    def add_text(self, text: str, source: str, base: Path | None, chain: tuple[Path, ...] = ()) -> None:
        """Add a document. With `base` None it must not include files."""
        reader = Reader(source)
        leaves = reader.read(text)
        self.problems += reader.problems
        if is_gpt_neox(leaves):
            self.add_gpt_neox(leaves, source)
            return
        included = [leaf for leaf in leaves if leaf.path == ("include",)]
        for leaf in included:
            self._include(leaf, source, base, chain)
        for leaf in leaves:
            if leaf not in included:
                self.put(leaf, Origin(source, leaf.line))

    def add_gpt_neox(self, leaves: list[Leaf], source: str) -> None:
        """Add a GPT-NeoX file. All GPT-NeoX files form one layer below the native ones."""
        if self.settings and not self.gpt_neox:
            got = f"a GPT-NeoX file after {next(iter(self.settings.values())).origin.source}"
            want = "GPT-NeoX files before native ones"
            self.problems.append(ConfigError("files out of order", where=source, got=got, want=want))
        self.gpt_neox.update(collect(leaves, source))

    def put_gpt_neox(self) -> None:
        """Translate the GPT-NeoX files and insert the result below all other layers."""
        native, self.settings = self.settings, {}
        values = {path: setting.value for path, setting in native.items()}
        settings, notes, problems = translate(self.gpt_neox, values, self.embedding_rows)
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
            want = "a file name or a list of file names" if base else "no include in a self-contained document"
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
            do = "join key, = and value without spaces: --set train.train_iters=1000"
            what = "cannot parse an override"
            self.problems.append(ConfigError(what, where="--set", got=brief(text), want="section.key=value", do=do))
            return
        parsed = self._override_value(printable(key), value.strip())
        if parsed is not None:
            self.put(Leaf(path, parsed.value, 0, {}), Origin("--set"))

    def _override_value(self, key: str, value: str) -> Leaf | None:
        """Parse the value: lists, mappings and quoted strings are YAML; anything else is one plain scalar."""
        where = f"--set {key}"
        if value[:1] not in ("[", "{", '"', "'"):
            try:
                return Leaf((), plain_scalar(value), 0, {})
            except ValueError as reason:
                self.problems.append(ConfigError("not a value", where=where, got=printable(value)[:80], want=reason))
                return None
        reader = Reader(where)
        leaves = reader.read(f"value: [{value}\n]")
        if leaves and not reader.problems and len(leaves[0].value) == 1:
            return Leaf((), leaves[0].value[0], 0, {})
        syntax = [problem for problem in reader.problems if problem.what != "not YAML"]
        for problem in syntax:
            what, got = problem.what, problem.got
            self.problems.append(ConfigError(what, where=where, got=got, want=problem.want, do=problem.do))
        if not syntax:
            do = "match every bracket and quote, and quote the override for the shell: --set 'data.train=[a, b]'"
            want = "one value, such as [a, b] or {path: a}"
            self.problems.append(ConfigError("not a value", where=where, got=printable(value)[:80], want=want, do=do))
        return None

    def put(self, leaf: Leaf, origin: Origin) -> None:
        """Set a value. It replaces what earlier layers set at the same key, above it and below it."""
        if len(leaf.path) == 1 and leaf.path[0] in Config.attributes() and leaf.value in (None, {}):
            return  # a section without keys, such as `train:`, sets nothing
        self._divide_mappings(leaf.path)
        earlier = [
            path for path in self.settings if path[: len(leaf.path)] == leaf.path or leaf.path[: len(path)] == path
        ]
        history: list[tuple[Origin, YamlValue]] = []
        for path in earlier:
            old = self.settings.pop(path)
            if path == leaf.path:
                history = [(Origin(old.origin.source, old.origin.line), old.value), *old.origin.overridden]
        origin = Origin(origin.source, origin.line, (*origin.overridden, *history))
        self.settings[leaf.path] = Setting(leaf.value, origin, leaf.lines)

    def _divide_mappings(self, path: tuple[str, ...]) -> None:
        """Divide a mapping that --set gave above `path` into its keys, so that one of them can be replaced."""
        for length in range(1, len(path)):
            setting = self.settings.get(path[:length])
            if setting is not None and isinstance(setting.value, dict):
                del self.settings[path[:length]]
                for name, value in setting.value.items():
                    self.settings[(*path[:length], name)] = Setting(value, setting.origin, {})

    def _read(self, path: Path) -> str | None:
        """Read a file; None after a problem."""
        where = display_path(path)
        try:
            if not path.is_file():
                raise IsADirectoryError("not a regular file")
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
        except OSError as error:
            self.problems.append(ConfigError("cannot read config file", where=where, got=error.strerror or str(error)))
            return None
        if len(raw) > MAX_BYTES:
            self.problems.append(
                ConfigError("config file is too large", where=where, want=f"at most {MAX_BYTES} bytes")
            )
            return None
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            got = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
            self.problems.append(ConfigError("not UTF-8", where=f"{where}:{line}", got=got))
            return None
