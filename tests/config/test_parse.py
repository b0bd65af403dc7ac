"""YAML -> leaves: types of scalars, lines, and everything hostile or damaged that a file may hold."""

from __future__ import annotations

import math

import pytest

from neox.config.parse import MAX_DEPTH, MAX_NODES, Reader, plain_scalar


def read(text: str) -> dict[str, object]:
    """Dotted key -> value of a text without problems."""
    reader = Reader("x.yml")
    leaves = reader.read(text)
    assert [problem.line() for problem in reader.problems] == []
    return {".".join(leaf.path): leaf.value for leaf in leaves}


def problems(text: str) -> list[str]:
    """The lines of what is wrong with a text."""
    reader = Reader("x.yml")
    reader.read(text)
    return [problem.line() for problem in reader.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E6", 1e6),
        ("6.0e-4", 6e-4),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1,000", "1,000"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("True", True),
        ("false", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1e999", math.inf),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text, value):
    for got in (read(f"a: {text}")["a"], plain_scalar(text)):
        assert got == value and type(got) is type(value)


def test_not_a_number():
    assert math.isnan(read("a: .nan")["a"])


def test_quotes_make_strings():
    assert read("a: '1e-4'\nb: \"true\"") == {"a": "1e-4", "b": "true"}


def test_leaves_have_lines():
    reader = Reader("x.yml")
    leaves = {
        leaf.path: leaf
        for leaf in reader.read("model:\n  num_layers: 2\n\ndata:\n  train:\n    - a\n    - path: b\n      weight: 2\n")
    }
    assert leaves[("model", "num_layers")].line == 2
    assert leaves[("data", "train")].line == 5
    assert leaves[("data", "train")].lines[(1, "weight")] == 8


def test_hyphens_are_underscores_but_not_below_deepspeed():
    assert read("model: {num-layers: 2}\ndeepspeed: {a-b: 1}") == {"model.num_layers": 2, "deepspeed.a-b": 1}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: 2\na: 3", ["key given twice", "x.yml:3 a", "line 1"]),
        ("m:\n  num-layers: 1\n  num_layers: 2", ["key given twice", "x.yml:3 m.num_layers", "line 2", "num-layers"]),
        ("d: [{path: a, path: b}]", ["key given twice", "x.yml:1"]),
        ("a: !!python/object/apply:os.system ['touch canary']", ["YAML tag is not allowed; where=x.yml:1 a; want="]),
        ("a: !!python/name:os.system", ["YAML tag is not allowed; where=x.yml:1 a; want="]),
        ("!!python/dict {a: 1}", ["YAML tag is not allowed; where=x.yml:1; want="]),
        ("a: !!int abc", ["not a value", "got='abc'"]),
        ("a: !!binary aGk=", ["YAML tag is not allowed"]),
        ("a: " + "9" * 5000, ["not a value", "40 digits"]),
        ("a: 1\n---\nb: 2", ["not YAML", "x.yml:2"]),
        ("a: \0", ["not YAML"]),
        ("- 1\n- 2", ["mapping of sections", "x.yml:1"]),
        ("just text", ["mapping of sections"]),
        ("a: &x [*x]", ["nested too deeply", "x.yml:1"]),
        ("? [1, 2]\n: 3", ["a key must be a scalar"]),
        ("a: {<<: {b: 1}}", ["merge keys", "include"]),
        ("a: " + "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), ["nested too deeply"]),
        ("a: " + "[" * 20000, ["nested too deeply"]),
    ],
)
def test_refused(text, parts):
    lines = problems(text)
    assert lines and all(part in lines[0] for part in parts), lines
    assert len(lines) == 1


def test_an_alias_bomb_is_refused_in_bounded_work():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    reader = Reader("x.yml")
    reader.read(bomb)
    assert [problem.what for problem in reader.problems] == ["too many values"]
    assert reader._nodes < 2 * MAX_NODES


def test_plain_aliases_work():
    assert read("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}


def test_an_empty_file_sets_nothing():
    assert read("") == {} and read("# only a comment\n") == {}


def test_a_rejected_value_gives_no_leaf():
    reader = Reader("x.yml")
    assert [leaf.path for leaf in reader.read("a: !!int abc\nb: 1")] == [("b",)]
