"""Parsing of YAML 1.2 to leaves with line numbers. All problems of a document are reported at once.

PyYAML's composer builds the node tree and constructs no objects. This module converts nodes to values itself, so that
it can reject tags outside the core schema, duplicate keys and alias bombs, and record the line of every value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from neox.config.problems import brief
from neox.config.syntax import advice
from neox.errors import ConfigError

YamlValue = Any  # a YAML scalar, list or mapping; the schema checks its type

MAX_BYTES = 1 << 20  # a larger config is a mistake or an attack
MAX_NODES = 100_000  # after aliases are expanded
MAX_DEPTH = 32
RAW_SECTIONS = ("deepspeed",)  # keys below these belong to another program and are not normalised

PREFIX = "tag:yaml.org,2002:"
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
# YAML 1.2.2, section 10.3.2, in order: the first pattern that matches a plain scalar gives its type
CORE_SCALARS = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+.0123456789"),
    ),
)


SCALAR_TYPES = ("str", *(name for name, _, _ in CORE_SCALARS))


def core_resolvers() -> dict[str, list[tuple[str, re.Pattern]]]:
    """Build PyYAML's resolver table (first character -> candidates) for the YAML 1.2 core schema."""
    table: dict[str, list[tuple[str, re.Pattern]]] = {}
    for name, pattern, firsts in CORE_SCALARS:
        for first in firsts:
            table.setdefault(first, []).append((PREFIX + name, pattern))
    return table


class CoreLoader(yaml.SafeLoader):
    """Composes nodes and types plain scalars by YAML 1.2. It is never used to construct objects."""

    yaml_implicit_resolvers = core_resolvers()


@dataclass(frozen=True)
class Leaf:
    """A value at a path of keys.

    Attributes:
        path: keys from the root, with `-` replaced by `_` except below `deepspeed`.
        value: scalar, list, or empty mapping.
        line: line of the key, from 1; 0 if it did not come from a file.
        lines: for a list of mappings, (path below this leaf) -> line.
    """

    path: tuple[str, ...]
    value: YamlValue
    line: int
    lines: dict[tuple, int]


class Reader:
    """Converts the nodes of one source to leaves and collects its problems.

    Args:
        source: name of the source in messages, such as the path of the file.
    """

    def __init__(self, source: str):
        self.source = source
        self.problems: list[ConfigError] = []
        self.leaves: list[Leaf] = []
        self._nodes = 0

    def read(self, text: str) -> list[Leaf]:
        """Return the leaves of a document. Problems are added to `self.problems`."""
        try:
            root = yaml.compose(text, Loader=CoreLoader)
        except yaml.YAMLError as error:
            self.problems.append(self._syntax_problem(error, text))
            return []
        except RecursionError:
            self.problems.append(
                ConfigError("nested too deeply", where=self.source, want=f"at most {MAX_DEPTH} levels")
            )
            return []
        if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == PREFIX + "null"):
            return []
        if not isinstance(root, yaml.MappingNode):
            # The content is not printed, because a file included by mistake may hold a secret.
            got = "a list" if isinstance(root, yaml.SequenceNode) else "a text"
            self._problem("a config must be a mapping of sections", root, got=got)
            return []
        self._mapping(root, ())
        return self.leaves

    def _where(self, node: yaml.Node, path: tuple = ()) -> str:
        dotted = ".".join(map(str, path))
        return f"{self.source}:{node.start_mark.line + 1}" + (f" {dotted}" if dotted else "")

    def _problem(
        self,
        what: str,
        node: yaml.Node,
        path: tuple = (),
        *,
        got: object = None,
        want: object = None,
        do: object = None,
    ) -> None:
        self.problems.append(ConfigError(what, where=self._where(node, path), got=got, want=want, do=do))

    def _tag_problem(self, node: yaml.Node, path: tuple) -> None:
        """Report a tag without its name, which may be a secret in a file included by mistake."""
        self._problem(
            "YAML tag is not allowed",
            node,
            path,
            want="values of YAML 1.2 without tags",
            do="quote a text that starts with !",
        )

    def _syntax_problem(self, error: yaml.YAMLError, text: str) -> ConfigError:
        if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
            return ConfigError("not YAML", where=self.source, got=str(error))
        got = error.problem or ""
        if "alias" in got:
            got = got.partition(" '")[0]  # without the name of the alias, which is content of the file
        return ConfigError(
            "not YAML", where=f"{self.source}:{error.problem_mark.line + 1}", got=got, do=advice(error, text)
        )

    def _too_large(self, node: yaml.Node, path: tuple) -> bool:
        """Count a visited node. True, and one problem, if a limit is exceeded."""
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
        """Return the keys of a mapping with their nodes. A duplicate key (also with - for _) is a problem."""
        if node.tag != PREFIX + "map":
            self._tag_problem(node, path)
        seen: dict[str, yaml.Node] = {}
        pairs = []
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem("a key must be a scalar", key_node, path)
                continue
            raw = bool(path) and path[0] in RAW_SECTIONS
            name = key_node.value if raw else key_node.value.replace("-", "_")
            if name == "<<":
                self._problem("merge keys are not part of YAML 1.2", key_node, path, do="use include: [other.yml]")
            elif name in seen:
                first = seen[name].start_mark.line + 1
                self._problem(
                    "key given twice",
                    key_node,
                    (*path, name),
                    got=f"also on line {first}, as {seen[name].value}",
                    do="keep one of them",
                )
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
            return  # reported; the schema would report a placeholder value again
        self.leaves.append(Leaf(path, value, key_node.start_mark.line + 1, lines))

    def _value(self, node: yaml.Node, path: tuple, lines: dict[tuple, int], below: tuple) -> YamlValue:
        """Return the Python value of a node. Non-empty mappings occur inside lists only."""
        if self._too_large(node, (*path, *below)):
            return None
        lines[below] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return {name: self._value(value, path, lines, (*below, name)) for name, _, value in self._pairs(node, path)}
        if isinstance(node, yaml.SequenceNode):
            if node.tag != PREFIX + "seq":
                self._tag_problem(node, path)
            return [self._value(item, path, lines, (*below, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise TypeError(f"not a YAML node: {node!r}")
        return self._scalar(node, path)

    def _scalar(self, node: yaml.ScalarNode, path: tuple) -> YamlValue:
        if node.tag.removeprefix(PREFIX) not in SCALAR_TYPES:
            self._tag_problem(node, path)
            return None
        try:
            return scalar(node.tag, node.value)
        except ValueError as reason:
            self._problem("not a value", node, path, got=brief(node.value), want=str(reason))
            return None


def scalar(tag: str, text: str) -> bool | int | float | str | None:
    """Convert a scalar by its YAML tag, which must be of the YAML 1.2 core schema.

    Raises:
        ValueError: the text is not of that type.
    """
    kind = tag.removeprefix(PREFIX)
    if kind == "str":
        return writable(text)
    if not any(name == kind and pattern.match(text) for name, pattern, _ in CORE_SCALARS) and not (
        kind == "float" and re.fullmatch(r"[-+]?[0-9]+", text)
    ):
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
    """Convert an unquoted scalar by the YAML 1.2 core schema: `1e-4` is a number, `no` a string, `010` is ten."""
    for kind, pattern, _ in CORE_SCALARS:
        if pattern.match(text):
            return scalar(PREFIX + kind, text)
    return writable(text)


def writable(text: str) -> str:
    """Return a text that can be encoded as UTF-8.

    Raises:
        ValueError: it has an unpaired surrogate, such as from a byte on the command line that is not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("characters that UTF-8 can encode") from None
    return text
