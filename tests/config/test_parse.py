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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-0x1F", "-0x1F"),
        ("0o8", "0o8"),
        ("0xg", "0xg"),
        ("00", 0),
        ("-010", -10),
        ("+.5", 0.5),
        ("1.e3", 1000.0),
        ("1E+5", 1e5),
        ("-1.5e-3", -1.5e-3),
        ("1e", "1e"),
        (".", "."),
        ("+", "+"),
        ("TRUE", True),
        ("FALSE", False),
        ("tRUE", "tRUE"),
        ("NULL", None),
        ("Null", None),
        ("nULL", "nULL"),
        ("+.inf", math.inf),
        ("-.nan", "-.nan"),
        ("0x" + "f" * 38, 16**38 - 1),
        ("9" * 40, 10**40 - 1),
        ("-" + "9" * 39, 1 - 10**39),
    ],
)
def test_unusual_scalars_follow_yaml_1_2(text, value):
    for got in (read(f"a: {text}")["a"], plain_scalar(text)):
        assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("!!float 3", 3.0),
        ("!!str 3", "3"),
        ("!!str null", "null"),
        ("!!int 0x10", 16),
        ("!!null ''", None),
        ("!!bool TRUE", True),
        ("!!seq [1]", [1]),
        ("!!float 1e3", 1000.0),
        ("!!int '0o17'", 15),
    ],
)
def test_tags_of_the_core_schema_select_the_type(text, value):
    got = read(f"a: {text}")["a"]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("!!bool yes", "a YAML 1.2 bool"),
        ("!!null x", "a YAML 1.2 null"),
        ("!!int 1.5", "a YAML 1.2 int"),
        ("!!float 0x10", "a YAML 1.2 float"),
        ("!!float one", "a YAML 1.2 float"),
        ("9" * 41, "an integer of at most 40 digits"),
    ],
)
def test_a_text_that_is_not_of_its_type(text, want):
    (line,) = problems(f"\na: {text}")
    value = text.rpartition(" ")[2]
    assert line == f"error[2] not a value; where=x.yml:2 a; got='{value}'; want={want}"


def nested(levels: int) -> str:
    """Mappings inside each other."""
    return "".join("  " * level + f"k{level}:\n" for level in range(levels)) + "  " * levels + "last: 1\n"


def test_the_deepest_nesting():
    assert list(read(nested(MAX_DEPTH - 1)).values()) == [1]
    (line,) = problems(nested(MAX_DEPTH))
    assert line == f"error[2] nested too deeply; where=x.yml:{MAX_DEPTH + 1} k0.k1.k2; want=at most 32 levels"
    lists = "a: " + "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)
    assert str(read(lists)["a"]).count("[") == MAX_DEPTH - 1
    assert "nested too deeply" in problems(lists.replace("[1", "[[1]"))[0]


def test_the_values_of_a_document_are_counted_with_aliases_expanded(monkeypatch):
    monkeypatch.setattr("neox.config.parse.MAX_NODES", 20)
    assert read("a: &x [1, 2, 3]\nb: *x") == {"a": [1, 2, 3], "b": [1, 2, 3]}
    text = "a: &x [1, 2, 3, 4]\nb: &y [*x, *x]\nc: [*y, *y]\nd: 1\n"
    (line,) = problems(text)
    assert "too many values" in line and line.endswith("want=at most 20 after aliases are expanded")


def test_hyphens_in_lists_and_in_nested_keys():
    assert read("data: {train: [{a-b: 1}]}\nmy-key: 2\ndeepspeed: {x: {a-b: 1}, y: [{c-d: 2}]}\n") == {
        "data.train": [{"a_b": 1}],
        "my_key": 2,
        "deepspeed.x.a-b": 1,
        "deepspeed.y": [{"c-d": 2}],
    }
    assert "key given twice" in problems("data: {a-b: 1, a_b: 2}")[0]
    assert problems("deepspeed: {a-b: 1, a_b: 2}") == []


def test_lines_of_keys_and_of_items():
    reader = Reader("x.yml")
    text = "a:\n  b:\n\n    - 1\n    - c: 2\n      d:\n        - 3\ne:\n  |\n  text\nf: {}\n"
    leaves = {".".join(leaf.path): leaf for leaf in reader.read(text)}
    assert {key: leaf.line for key, leaf in leaves.items()} == {"a.b": 2, "e": 8, "f": 11}
    assert leaves["a.b"].value == [1, {"c": 2, "d": [3]}]
    assert leaves["a.b"].lines == {(): 4, (0,): 4, (1,): 5, (1, "c"): 5, (1, "d"): 7, (1, "d", 0): 7}
    assert (leaves["e"].value, leaves["f"].value) == ("text\n", {})


def test_every_problem_of_a_document_is_reported():
    text = "a: 1\na: 2\nb: !x 1\nc: {d: 1, d: 2, <<: {}}\n? [q]\n: 1\ne: !!int z\nf: 3\n"
    reader = Reader("x.yml")
    assert [leaf.path for leaf in reader.read(text)] == [("a",), ("c", "d"), ("f",)]
    assert [(problem.what, problem.where) for problem in reader.problems] == [
        ("key given twice", "x.yml:2 a"),
        ("a key must be a scalar", "x.yml:5"),
        ("YAML tag is not allowed", "x.yml:3 b"),
        ("key given twice", "x.yml:4 c.d"),
        ("merge keys are not part of YAML 1.2", "x.yml:4 c"),
        ("not a value", "x.yml:7 e"),
    ]
    assert reader.problems[0].got == "also on line 1, as a"


@pytest.mark.parametrize(
    ("text", "got"), [("- 1", "a list"), ("secret", "a text"), ("3", "a text"), ("!!seq [1]", "a list")]
)
def test_a_document_that_is_a_list_or_a_text(text, got):
    assert problems(f"\n{text}") == [f"error[2] a config must be a mapping of sections; where=x.yml:2; got={got}"]


def test_an_undefined_alias_is_reported_without_its_name():
    (line,) = problems("a: 1\nb: *hidden\n")
    assert line == "error[2] not YAML; where=x.yml:2; got=found undefined alias"
