"""Advice on texts that are not YAML: it names the line where the cause is."""

from __future__ import annotations

import pytest

from neox.config.parse import Reader


@pytest.mark.parametrize(
    ("text", "where", "do"),
    [
        ("a:\n\tb: 1", "x.yml:2", "indent with spaces"),
        ("a: [1", "x.yml:1", "close the [ of line 1"),
        ("a: {b: 2, c: 8\nd: {e: 8}\n", "x.yml:2", "close the { of line 1, or separate its values with commas"),
        ("a:\n  b: 2\n   c: 8\n", "x.yml:3", "indent line 3 as line 2"),
        ("a:\n  b: 2\n\n  # why\n   c: 8\n", "x.yml:5", "indent the line exactly as the other keys"),
        ("a:\n  b: 2\n c: 8\n", "x.yml:3", "indent the line exactly as the other keys of its section"),
        ("a:\n- b\n  c: 2\n", "x.yml:3", "write ': ' after the key on line 2"),
        ("a:\n  b 2\n  c: 8\n", "x.yml:3", "write ': ' after the key on line 2"),
        ("a: 1\nb\nc\n", "x.yml:3", "write ': ' after the key on line 2"),
        ("a: C: b\n", "x.yml:1", "quote the value: it holds ': '"),
        ("a: @b\n", "x.yml:1", "quote the value: it starts with a character that YAML reserves"),
        ('a: 1\nb: "abc\nc: 2\n', "x.yml:4", "close the quote of line 2"),
    ],
)
def test_advice(text, where, do):
    reader = Reader("x.yml")
    reader.read(text)
    (problem,) = reader.problems
    assert (problem.what, problem.where) == ("not YAML", where)
    assert do in problem.do


def test_nothing_of_a_text_is_shown():
    reader = Reader("x.yml")
    reader.read("machine example login me password hunter2\nb: [hunter3\nc: hunter4\n")
    assert reader.problems and not any("hunter" in problem.line() for problem in reader.problems)


@pytest.mark.parametrize(
    ("text", "where", "do"),
    [
        (
            "a:\n  b: 1\n\n\n    c: 2\n",
            "x.yml:5",
            "indent line 5 as line 2, whose key has a value and so no keys below it",
        ),
        ("# first\na: {b: [1, 2}\n", "x.yml:2", "close the [ of line 2, or separate its values with commas"),
        ("a: 'b\n", "x.yml:2", "close the quote of line 1"),
        ("a: `b`\n", "x.yml:1", "quote the value: it starts with a character that YAML reserves"),
        ("a: b: c\nd: 1\n", "x.yml:1", "quote the value: it holds ': '"),
        ("\n\na: x\n  b: y: z\n", "x.yml:4", "quote the value: it holds ': '"),
        ("a: 1\n- b\n", "x.yml:2", "indent the line exactly as the other keys of its section"),
        ("a\nb: 1\n", "x.yml:2", "write ': ' after the key on line 1"),
        ("a: 1 # c\n # d\n  b: 2\n", "x.yml:3", None),
        ("key: 1\nword\n", "x.yml:3", "write ': ' after the key on line 2"),
        ("a: &x\nb: *y z\n", "x.yml:2", None),
        ("a:\n\t- b\n", "x.yml:2", "indent with spaces: YAML allows no tabs there"),
    ],
)
def test_the_complete_advice(text, where, do):
    reader = Reader("x.yml")
    reader.read(text)
    (problem,) = reader.problems
    assert (problem.what, problem.where) == ("not YAML", where), problem.line()
    if do is not None:
        assert problem.do == do
