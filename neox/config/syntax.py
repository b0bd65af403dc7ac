"""What to do about a text that is not YAML. PyYAML says what its scanner met; the cause is usually on the line before, or where a bracket was opened.

Only line numbers and punctuation are named: a file that was included by mistake may hold what must not be printed.
"""

from __future__ import annotations

import yaml


def advice(error: yaml.MarkedYAMLError, text: str) -> str | None:
    """The next action for a syntax error; None where the message says it all."""
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
    """Advice for a ': ' where no key can be: the line before ends a value, or the line itself holds two of them."""
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
