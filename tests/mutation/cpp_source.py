"""The same small changes of a C++ file, from its tokens: the text is not parsed, so some of them do not compile."""

from __future__ import annotations

import re

from tests.mutation.python_source import Mutation

SKIPPED = re.compile(
    rb"""//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])+'|^[ \t]*\#(?:\\\n|[^\n])*"""
    rb"""|^[ \t]*(?:using|template|static_assert|namespace)\b[^\n]*""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)
OPERATORS = {
    b" < ": [b" <= "],
    b" <= ": [b" < "],
    b" > ": [b" >= "],
    b" >= ": [b" > "],
    b" == ": [b" != "],
    b" != ": [b" == "],
    b" + ": [b" - "],
    b" - ": [b" + "],
    b" / ": [b" * "],
    b" % ": [b" / "],
    b" && ": [b" || "],
    b" || ": [b" && "],
    b" & ": [b" | "],
    b" | ": [b" & "],
    b" += ": [b" -= ", b" = "],
    b" -= ": [b" += ", b" = "],
    b"std::min": [b"std::max"],
    b"std::max": [b"std::min"],
    b"true": [b"false"],
    b"false": [b"true"],
    b"continue;": [b"break;"],
    b"break;": [b"continue;"],
}
TOKEN = re.compile(
    rb"|".join(re.escape(operator) for operator in OPERATORS)
    + rb"|(?<![\w.'])(?P<number>\d+)(?![\w.'])"
    + rb"|(?P<condition>\b(?:if|while) \((?P<inside>[^;{}\n]*)\)(?= [{\w]| *\n))"
    + rb"|(?P<call>(?<=[{};]\n)[ \t]+(?!return\b|else\b)[\w:.>\[\]-]+\([^;{}]*\);)"
    + rb"|(?P<store>(?<=[{};]\n)[ \t]+[\w.\[\]>-]+ = [^;{}]*;)"
)


def mutations(source: bytes) -> list[Mutation]:
    """Every mutation of a file's code, in the order of its text."""
    code = SKIPPED.sub(lambda m: re.sub(rb"[^\n]", b"\0", m[0]), source)
    found, at = [], 0
    while (match := TOKEN.search(code, at)) is not None:
        line = source.count(b"\n", 0, match.start()) + 1
        found += [Mutation(line, match.start(), match.end(), new) for new in replacements(match)]
        at = match.start() + 1
    return found


def replacements(match: re.Match[bytes]) -> list[bytes]:
    """What a token is replaced by."""
    if match["number"] is not None:
        value = int(match["number"])
        return [b"%d" % (value + 1), *([b"%d" % (value - 1)] if value else [])]
    if match["condition"] is not None:
        return [match[0].replace(match["inside"], b"!(%s)" % match["inside"], 1)]
    if match["call"] is not None or match["store"] is not None:
        return [b""]
    return OPERATORS[match[0]]
