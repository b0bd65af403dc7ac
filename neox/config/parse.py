"""YAML text -> leaves with their lines: YAML 1.2 core scalars, safe by construction, every problem reported.

PyYAML's composer builds the node tree (it constructs no objects); this module turns nodes into values itself, so that
tags other than those of the core schema, duplicate keys and alias bombs are refused, and every value keeps its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from neox.config.problems import brief
from neox.config.syntax import advice
from neox.errors import ConfigError

MAX_BYTES = 1 << 20  # a config larger than this is a mistake or an attack
MAX_NODES = 100_000  # values after aliases are expanded
MAX_DEPTH = 32
RAW_SECTIONS = ("deepspeed",)  # below these, keys are somebody else's and are kept as written

PREFIX = "tag:yaml.org,2002:"
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# YAML 1.2.2, section 10.3.2, in order: the first that matches the whole plain scalar decides its type
CORE_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    ("float", re.compile(r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"), list("-+.0123456789")),
)


def core_resolvers() -> dict[str, list[tuple[str, re.Pattern]]]:
    """PyYAML's resolver table (first character -> candidates) for the YAML 1.2 core schema."""
    table: dict[str, list[tuple[str, re.Pattern]]] = {}
    for name, pattern, firsts in CORE_SCALARS:
        for first in firsts:
            table.setdefault(first, []).append((PREFIX + name, pattern))
    return table


class CoreLoader(yaml.SafeLoader):
    """Composes nodes whose plain scalars are typed by YAML 1.2; it is never asked to construct anything."""

    yaml_implicit_resolvers = core_resolvers()


@dataclass(frozen=True)
class Leaf:
    """A value at a path of keys.

    Attributes:
        path: keys from the root, `-` read as `_` except below `deepspeed`.
        value: scalar, list, or empty mapping.
        line: line of the key, from 1; 0 when it did not come from a file.
        lines: for a list of mappings, (path below this leaf) -> line.
    """

    path: tuple[str, ...]
    value: Any
    line: int
    lines: dict[tuple, int]


class Reader:
    """Turns the nodes of one source into leaves and collects what is wrong with it.

    Args:
        source: name used in messages, such as the path of the file.
    """

    def __init__(self, source: str):
        self.source = source
        self.problems: list[ConfigError] = []
        self.leaves: list[Leaf] = []
        self._nodes = 0

    def read(self, text: str) -> list[Leaf]:
        """Leaves of a document; problems are left in `self.problems`."""
        try:
            root = yaml.compose(text, Loader=CoreLoader)
        except yaml.YAMLError as error:
            self.problems.append(self._syntax_problem(error, text))
            return []
        except RecursionError:
            self.problems.append(ConfigError("nested too deeply", where=self.source, want=f"at most {MAX_DEPTH} levels"))
            return []
        if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == PREFIX + "null"):
            return []
        if not isinstance(root, yaml.MappingNode):
            got = "a list" if isinstance(root, yaml.SequenceNode) else "a text"  # not which: a file included by mistake may hold a secret
            self.problems.append(ConfigError("a config is a mapping of sections", where=self._where(root), got=got))
            return []
        self._mapping(root, ())
        return self.leaves

    def _where(self, node: yaml.Node, path: tuple = ()) -> str:
        dotted = ".".join(map(str, path))
        return f"{self.source}:{node.start_mark.line + 1}" + (f" {dotted}" if dotted else "")

    def _problem(self, what: str, node: yaml.Node, path: tuple = (), *, got: object = None, want: object = None, do: object = None) -> None:
        self.problems.append(ConfigError(what, where=self._where(node, path), got=got, want=want, do=do))

    def _syntax_problem(self, error: yaml.YAMLError, text: str) -> ConfigError:
        if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
            return ConfigError("not YAML", where=self.source, got=str(error))
        got = (error.problem or "").partition(" '")[0] if "alias" in (error.problem or "") else error.problem  # its name is a part of the file
        return ConfigError("not YAML", where=f"{self.source}:{error.problem_mark.line + 1}", got=got, do=advice(error, text))

    def _too_large(self, node: yaml.Node, path: tuple) -> bool:
        """Count a visited node; True (with one problem) once a limit is passed."""
        self._nodes += 1
        if self._nodes == MAX_NODES + 1:
            self._problem("too many values", node, path, want=f"at most {MAX_NODES} after aliases are expanded")
        if len(path) > MAX_DEPTH:
            self._problem("nested too deeply", node, path[:3], want=f"at most {MAX_DEPTH} levels")
        return self._nodes > MAX_NODES or len(path) > MAX_DEPTH

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> None:
        for name, key_node, value_node in self._pairs(node, path):
            self._leaf(value_node, (*path, name), key_node)

    def _pairs(self, node: yaml.MappingNode, path: tuple) -> list[tuple[str, yaml.Node, yaml.Node]]:
        """Keys of a mapping with their nodes; a key twice (or its hyphen twin) is a problem that names both lines."""
        if node.tag != PREFIX + "map":
            self._problem("tag is not allowed", node, path, got=node.tag, want="plain YAML values")
        seen: dict[str, yaml.Node] = {}
        pairs = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem("a key must be a word", key_node, path)
                continue
            raw = bool(path) and path[0] in RAW_SECTIONS
            name = key_node.value if raw else key_node.value.replace("-", "_")
            if name == "<<":
                self._problem("merge keys are not part of YAML 1.2", key_node, path, do="use include: [other.yml]")
            elif name in seen:
                first = seen[name].start_mark.line + 1
                self._problem("key given twice", key_node, (*path, name), got=f"also on line {first}, as {seen[name].value}", do="keep one of them")
            else:
                seen[name] = key_node
                pairs.append((name, key_node, value_node))
        return pairs

    def _leaf(self, node: yaml.Node, path: tuple[str, ...], key_node: yaml.Node) -> None:
        if self._too_large(node, path):
            return
        if isinstance(node, yaml.MappingNode) and node.value:
            self._mapping(node, path)
            return
        lines: dict[tuple, int] = {}
        before = len(self.problems)
        value = self._value(node, path, lines, ())
        if len(self.problems) > before:
            return  # reported; a stand-in value would only be reported again by the schema
        self.leaves.append(Leaf(path, value, key_node.start_mark.line + 1, lines))

    def _value(self, node: yaml.Node, path: tuple, lines: dict[tuple, int], below: tuple) -> Any:
        """The Python value of a node; mappings appear here inside lists only."""
        if self._too_large(node, (*path, *below)):
            return None
        lines[below] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return {name: self._value(value, path, lines, (*below, name)) for name, _, value in self._pairs(node, path)}
        if isinstance(node, yaml.SequenceNode):
            if node.tag != PREFIX + "seq":
                self._problem("tag is not allowed", node, path, got=node.tag, want="plain YAML values")
            return [self._value(item, path, lines, (*below, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _scalar(self, node: yaml.ScalarNode, path: tuple) -> Any:
        try:
            return scalar(node.tag, node.value)
        except ValueError as reason:
            self._problem("not a value", node, path, got=brief(node.value), want=str(reason))
            return None


def scalar(tag: str, text: str) -> bool | int | float | str | None:
    """Value of a scalar by its YAML tag, YAML 1.2 core schema.

    Raises:
        ValueError: the text is none of that type, or the tag is not of the core schema.
    """
    kind = tag.removeprefix(PREFIX)
    if kind == "str":
        return writable(text)
    if kind not in ("null", "bool", "int", "float"):
        raise ValueError(f"plain YAML values, not the tag {tag}")
    if not any(name == kind and pattern.match(text) for name, pattern, _ in CORE_SCALARS) and not (kind == "float" and re.fullmatch(r"[-+]?[0-9]+", text)):
        raise ValueError(f"a YAML 1.2 {kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return BOOLEANS[text]
    if kind == "int":
        if len(text) > 40:
            raise ValueError("an integer of at most 40 digits")
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def plain_scalar(text: str) -> bool | int | float | str | None:
    """Type an unquoted text by the YAML 1.2 core schema: `1e-4` is a number, `no` a string, `010` is ten."""
    for kind, pattern, _ in CORE_SCALARS:
        if pattern.match(text):
            return scalar(PREFIX + kind, text)
    return writable(text)


def writable(text: str) -> str:
    """The text, which config.lock.yml, a log or a file system must be able to take.

    Raises:
        ValueError: it holds half of a surrogate pair, or a byte that is not UTF-8 on the command line.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("characters that UTF-8 can write") from None
    return text
