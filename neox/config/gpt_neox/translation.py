"""What is made of GPT-NeoX's keys while they are translated: native settings with their origin, notes, problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox.config.gpt_neox.keys import GPT_NEOX_KEYS, REQUIRED
from neox.config.problems import brief, same_word, similar_words
from neox.errors import ConfigError

DEFAULT = "GPT-NeoX default"


@dataclass(frozen=True)
class Given:
    """A value in an upstream file.

    Attributes:
        value: as read, mappings nested.
        source, line: where.
    """

    value: Any
    source: str
    line: int


@dataclass(frozen=True)
class Translated:
    """A native value and the upstream key it came from.

    Attributes:
        path: native key.
        value: native value.
        source, line: of the upstream key; `GPT-NeoX default` and 0 where the file does not give it.
    """

    path: tuple[str, ...]
    value: Any
    source: str
    line: int


class Translation:
    """Upstream values by name, and what has been made of them."""

    def __init__(self, given: Mapping[str, Given], native: Mapping[tuple[str, ...], Any], embedding_rows: int | None = None):
        self.embedding_rows = embedding_rows
        self.given = {name: value for name, value in given.items() if value.value is not None}
        self.native = native
        self.settings: list[Translated] = []
        self.notes: list[str] = []
        self.problems: list[ConfigError] = []

    def value(self, name: str) -> Any:
        """Value of an upstream key, or upstream's default; where it is only renamed and a native file or `--set` gives it, that."""
        row = GPT_NEOX_KEYS[name]
        if row.kind == "renamed" and (path := tuple(row.to[0].split("."))) in self.native:
            return self.native[path]
        return self.given[name].value if name in self.given else GPT_NEOX_KEYS[name].default

    def number(self, name: str) -> Any:
        """Value of a key that has to be a number; None, with a problem, where it is none."""
        value = self.value(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            self.refuse(name, "bad value", want="a number")
            return None
        return value

    def first(self, *names: str) -> str:
        """The first of some names that is given, or the first of all."""
        return next((name for name in names if name in self.given), names[0])

    def set(self, key: str, value: Any, source: str = "") -> None:
        """Give a native key a value; `source` is the upstream key that it came from."""
        origin = self.given.get(source)
        place = (origin.source, origin.line) if origin else (DEFAULT, 0)
        self.settings.append(Translated(tuple(key.split(".")), value, *place))

    def note(self, text: str, name: str = "") -> None:
        """Tell people what was made of a key."""
        where = f"{self.where(name)}: " if name else ""
        self.notes.append(where + text)

    def where(self, name: str) -> str:
        """`file:line key` of an upstream key."""
        origin = self.given.get(name)
        return f"{origin.source}:{origin.line} {name}" if origin else name

    def refuse(self, name: str, what: str, *, want: Any = None, do: str | None = None, decides: str | None = None) -> None:
        """Report a problem, unless a native file or `--set` gives the key that it is about."""
        if decides is not None and tuple(decides.split(".")) in self.native:
            return
        self.problems.append(ConfigError(what, where=self.where(name), got=brief(self.value(name)) if name in GPT_NEOX_KEYS else None, want=want, do=do))

    def unknown_and_unsupported(self) -> None:
        """Problems of single keys: unknown to upstream too, or naming what we have not."""
        for name, origin in self.given.items():
            row = GPT_NEOX_KEYS.get(name)
            if row is None:
                effective = [key for key, row in GPT_NEOX_KEYS.items() if row.kind != "ignored"]
                close = same_word(name, GPT_NEOX_KEYS) or similar_words(name, effective)
                do = f"did you mean {' or '.join(close)}?" if close else "`neox config reference --gpt-neox` lists the known keys; take this one out"
                self.problems.append(ConfigError("unknown key of GPT-NeoX", where=self.where(name), got=brief(origin.value), do=do))
            elif row.kind == "unsupported" and not any(origin.value == value and type(origin.value) is type(value) for value in row.harmless):
                wrong = row.text.startswith("not a key")
                self.refuse(name, "the file is wrong: GPT-NeoX has no such key" if wrong else "GPT-NeoX key is not supported", do=row.text)

    def complete(self) -> bool:
        """Whether the files describe a model at all."""
        missing = [name for name in REQUIRED if name not in self.given and tuple(GPT_NEOX_KEYS[name].to[0].split(".")) not in self.native]
        if missing:
            files = ", ".join(sorted({origin.source for origin in self.given.values()}))
            do = "give it together with the file of a model: --conf 125M.yml local_setup.yml"
            self.problems.append(ConfigError("not a whole GPT-NeoX config", where=files, want=", ".join(missing), do=do))
        return not missing
