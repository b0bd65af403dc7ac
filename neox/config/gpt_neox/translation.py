"""The state of a translation: values of GPT-NeoX's keys, and the native settings, notes and problems that result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from neox.config.gpt_neox.keys import GPT_NEOX_KEYS, REQUIRED
from neox.config.parse import YamlValue
from neox.config.problems import brief, same_word, similar_words
from neox.errors import ConfigError

DEFAULT = "GPT-NeoX default"
LARGEST = 2**63  # of a number; products of two still fit a float


@dataclass(frozen=True)
class Given:
    """A value in a GPT-NeoX file.

    Attributes:
        value: as read, with nested mappings.
        source: file.
        line: line in the file, from 1.
    """

    value: YamlValue
    source: str
    line: int


@dataclass(frozen=True)
class Translated:
    """A native value and the GPT-NeoX key that it came from.

    Attributes:
        path: native key.
        value: native value.
        source: file of the GPT-NeoX key, or `GPT-NeoX default` if no file sets it.
        line: line in that file, or 0.
    """

    path: tuple[str, ...]
    value: YamlValue
    source: str
    line: int


class Translation:
    """Values of GPT-NeoX files by name, and the result of the translation.

    Args:
        given: the merged GPT-NeoX files.
        native: values of native files and `--set`.
        embedding_rows: rows of the embedding in a checkpoint that the files describe, if there is one.
    """

    def __init__(
        self, given: Mapping[str, Given], native: Mapping[tuple[str, ...], YamlValue], embedding_rows: int | None = None
    ):
        self.embedding_rows = embedding_rows
        self.given = {name: value for name, value in given.items() if value.value is not None}
        self.native = native
        self.settings: list[Translated] = []
        self.notes: list[str] = []
        self.problems: list[ConfigError] = []

    def value(self, name: str) -> YamlValue:
        """Return the value of a key, or GPT-NeoX's default. For a renamed key a native value takes precedence."""
        rule = GPT_NEOX_KEYS[name]
        if rule.kind == "renamed" and (path := tuple(rule.to[0].split("."))) in self.native:
            return self.native[path]
        return self.given[name].value if name in self.given else rule.default

    def number(self, name: str) -> YamlValue:
        """Return the value of a key that must be a finite number. None, and a problem, if it is not."""
        value = self.value(name)
        if value is None:
            return None
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not -LARGEST <= value <= LARGEST:  # false for NaN
            self.refuse(name, "bad value", want="a finite number" if is_number else "a number")
            return None
        return value

    def first(self, *names: str) -> str:
        """Return the first of some keys that a file sets, or the first of all."""
        return next((name for name in names if name in self.given), names[0])

    def set(self, key: str, value: YamlValue, source: str = "") -> None:
        """Set a native key; `source` is the GPT-NeoX key that the value came from."""
        origin = self.given.get(source)
        file, line = (origin.source, origin.line) if origin else (DEFAULT, 0)
        self.settings.append(Translated(tuple(key.split(".")), value, file, line))

    def note(self, text: str, name: str = "") -> None:
        """Add a note for the user about a key."""
        where = f"{self.where(name)}: " if name else ""
        self.notes.append(where + text)

    def where(self, name: str) -> str:
        """Return `file:line key` of a GPT-NeoX key."""
        origin = self.given.get(name)
        return f"{origin.source}:{origin.line} {name}" if origin else name

    def refuse(
        self, name: str, what: str, *, want: YamlValue = None, do: str | None = None, decides: str | None = None
    ) -> None:
        """Report a problem, unless a native file or `--set` sets the native key `decides`."""
        if decides is not None and tuple(decides.split(".")) in self.native:
            return
        self.problems.append(
            ConfigError(
                what,
                where=self.where(name),
                got=brief(self.value(name)) if name in GPT_NEOX_KEYS else None,
                want=want,
                do=do,
            )
        )

    def unknown_and_unsupported(self) -> None:
        """Report keys that GPT-NeoX does not have, and keys that are not supported."""
        for name, origin in self.given.items():
            rule = GPT_NEOX_KEYS.get(name)
            if rule is None:
                effective = [key for key, known in GPT_NEOX_KEYS.items() if known.kind != "ignored"]
                close = same_word(name, GPT_NEOX_KEYS) or similar_words(name, effective)
                do = (
                    f"did you mean {' or '.join(close)}?"
                    if close
                    else "`neox config reference --gpt-neox` lists the known keys; remove this one"
                )
                self.problems.append(
                    ConfigError("unknown key of GPT-NeoX", where=self.where(name), got=brief(origin.value), do=do)
                )
            elif rule.kind == "unsupported" and not any(
                origin.value == value and type(origin.value) is type(value) for value in rule.harmless
            ):
                wrong = rule.text.startswith("not a key")
                self.refuse(
                    name,
                    "invalid file: GPT-NeoX has no such key" if wrong else "GPT-NeoX key is not supported",
                    do=rule.text,
                )

    def complete(self) -> bool:
        """Whether the files describe a complete model."""
        missing = [
            name
            for name in REQUIRED
            if name not in self.given and tuple(GPT_NEOX_KEYS[name].to[0].split(".")) not in self.native
        ]
        if missing:
            files = ", ".join(sorted({origin.source for origin in self.given.values()}))
            do = "add the file of a model: --conf 125M.yml local_setup.yml"
            self.problems.append(ConfigError("incomplete GPT-NeoX config", where=files, want=", ".join(missing), do=do))
        return not missing
