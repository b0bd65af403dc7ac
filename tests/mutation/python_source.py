"""Small changes of a Python module that a test should notice, from its syntax tree."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list", "reversed": "list"}
DROPPED = (ast.Raise, ast.AugAssign, ast.Delete)
UNREAD = ("annotation", "returns", "decorator_list", "exc", "msg")  # of messages, tests compare a part at most


@dataclass(frozen=True)
class Mutation:
    """Replace the bytes from `start` to `stop` of a file; `line` is the first of them, from 1."""

    line: int
    start: int
    stop: int
    replacement: bytes

    def apply(self, source: bytes) -> bytes:
        """The complete file with this change."""
        return source[: self.start] + self.replacement + source[self.stop :]


def mutations(source: bytes) -> list[Mutation]:
    """Every mutation of a module, in the order of its text, without those that do not compile or change nothing."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for old, new in changes(ast.parse(source)):
        start = starts[old.lineno - 1] + old.col_offset
        stop = starts[old.end_lineno - 1] + old.end_col_offset
        text = ast.unparse(new)
        text = (
            f"({text})"
            if isinstance(new, ast.expr) and not isinstance(new, ast.Constant | ast.Name | ast.Slice)
            else text
        )
        found.append(Mutation(old.lineno, start, stop, text.encode()))
    found = [m for m in dict.fromkeys(found) if m.replacement != source[m.start : m.stop] and compiles(m.apply(source))]
    return sorted(found, key=lambda m: (m.start, m.stop, m.replacement))


def compiles(source: bytes) -> bool:
    """Whether Python accepts the text."""
    try:
        compile(source, "<mutation>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return False
    return True


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(node, what replaces it) for a tree."""
    if isinstance(node, ast.JoinedStr):
        return
    for change in (statement_changes, operator_changes, value_changes, call_changes):
        yield from ((node, new) for new in change(node))
    if isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.comprehension):
        yield from ((condition, ast.Constant(True)) for condition in node.ifs)
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in UNREAD:
                yield from changes(child)


def with_field(node: ast.AST, **fields: object) -> ast.AST:
    """A shallow copy of a node with some fields replaced."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def replaced(items: list, index: int, *new: object) -> list:
    """A copy of a list with `new` instead of one item."""
    return [*items[:index], *new, *items[index + 1 :]]


def statement_changes(node: ast.AST) -> Iterator[ast.AST]:
    """A statement dropped, a loop left instead of continued, nothing returned."""
    stores = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    calls = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if stores or calls or isinstance(node, DROPPED):
        yield ast.Pass()
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Return) and ast.unparse(node) not in ("return", "return None"):
        yield ast.Return(None)


def operator_changes(node: ast.AST) -> Iterator[ast.AST]:
    """Another comparison or arithmetic operator, a condition negated, left out or joined in the other way."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield with_field(node, ops=replaced(node.ops, i, COMPARISONS[type(op)]()))
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        texts = [side for side in (node.left, node.right) if isinstance(side, ast.JoinedStr | ast.List | ast.Tuple)]
        texts += [s for s in (node.left, node.right) if isinstance(s, ast.Constant) and isinstance(s.value, str)]
        if not texts:
            yield with_field(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield with_field(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for i in range(len(node.values)):
            rest = replaced(node.values, i)
            yield rest[0] if len(rest) == 1 else with_field(node, values=rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand


def value_changes(node: ast.AST) -> Iterator[ast.AST]:
    """A number off by one, a flag flipped, the two values of a conditional exchanged, a slice without an end."""
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        if node.value:
            yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(2 * node.value if node.value else 1.0)
    elif isinstance(node, ast.IfExp):
        yield with_field(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Slice):
        yield from (with_field(node, **{end: None}) for end in ("lower", "upper") if getattr(node, end) is not None)


def call_changes(node: ast.AST) -> Iterator[ast.AST]:
    """min for max, an option that is not passed on, two arguments exchanged."""
    if not isinstance(node, ast.Call):
        return
    if isinstance(node.func, ast.Name) and node.func.id in CALLS:
        keywords = [k for k in node.keywords if CALLS[node.func.id] != "list"]
        yield with_field(node, func=ast.Name(CALLS[node.func.id]), keywords=keywords)
    for i in range(len(node.keywords)):
        yield with_field(node, keywords=replaced(node.keywords, i))
    if len(node.args) == 2 and not any(isinstance(a, ast.Starred | ast.Constant) for a in node.args):
        yield with_field(node, args=node.args[::-1])
