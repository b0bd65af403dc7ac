"""Advice on YAML syntax errors.

PyYAML reports what its scanner found; the cause is usually on the line before, or at an opening bracket. The advice
names line numbers and punctuation only, because a file included by mistake may hold secrets.
"""

from __future__ import annotations

import yaml


def advice(error: yaml.MarkedYAMLError, text: str) -> str | None:
    """Return the next action for a syntax error, or None if PyYAML's message is sufficient."""
    if error.problem_mark is None:
        return None
    problem, line = error.problem or "", error.problem_mark.line
    opened = None if error.context_mark is None else error.context_mark.line + 1
    if "'\\t'" in problem:
        return "indent with spaces: YAML allows no tabs there"
    if problem.startswith("expected ',' or"):
        bracket = "[" if "']'" in problem else "{"
        return f"close the {bracket} of line {opened}, or separate its values with commas"
    if problem == "found unexpected end of stream":
        return f"close the quote of line {opened}"
    if problem.startswith("found character"):
        return "quote the value: it starts with a character that YAML reserves"
    if problem == "could not find expected ':'":
        return f"write ': ' after the key on line {opened}"
    if problem == "mapping values are not allowed here":
        return _misplaced_colon(text.splitlines(), line)
    if problem.startswith("expected <block end>"):
        return "indent the line exactly as the other keys of its section"
    return None


def _misplaced_colon(lines: list[str], line: int) -> str:
    """Return advice on a ': ' where a key is not allowed: the line before ends a value, or the line has two of them."""
    before = next((number for number in range(line - 1, -1, -1) if lines[number].split("#")[0].strip()), None)
    if before is None or lines[line].count(": ") > 1:
        return "quote the value: it holds ': '"
    if ":" not in lines[before].split("#")[0]:
        return f"write ': ' after the key on line {before + 1}"
    if _indentation(lines[line]) > _indentation(lines[before]):
        return f"indent line {line + 1} as line {before + 1}, whose key has a value and so no keys below it"
    return "quote the value: it holds ': '"


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
