"""The runner on a toy module: it finds what no test notices, and only that."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys

import pytest

from tests.mutation import cpp_source, python_source, suites, workplace
from tests.mutation.run import described, drawn

TOY = """def clamp(x, low=0):
    if x < low:
        return low
    return x


def half(x, by=2):
    return x // by
"""
TOY_TESTS = """from toy import clamp, half


def test_clamp():
    assert (clamp(-1), clamp(1)) == (0, 1)


def test_half():
    assert half(4, 2) == 2  # not the default
"""
SURVIVORS = """
import argparse, json, sys
from pathlib import Path
from tests.mutation import workplace
from tests.mutation.run import survivors
from tests.mutation.workplace import Copy

tree = Copy(Path(sys.argv[1]) / "toy", Path(sys.argv[1]) / "copy", ["toy.py", "test_toy.py", "pytest.ini"])
workplace.LEAST_SECONDS = float(sys.argv[3])
lines = []
args = argparse.Namespace(number=100, seed=1, tests=["test_toy.py"], line=json.loads(sys.argv[2]))
count = survivors(tree, "toy.py", args, lines.append)
print(json.dumps([count, lines]))
"""


def changed(source: bytes, found) -> list[str]:
    """The file after each mutation."""
    return [mutation.apply(source).decode() for mutation in found]


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy").mkdir()
    for name, text in {"toy.py": TOY, "test_toy.py": TOY_TESTS, "pytest.ini": "[pytest]\n"}.items():
        (tmp_path / "toy" / name).write_text(text)
    return tmp_path


def survivors(folder, repository, line=None, least_seconds=60):
    command = [sys.executable, "-c", SURVIVORS, folder, json.dumps(line), str(least_seconds)]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_survivors_are_found_and_what_a_test_notices_is_not(toy, repository):
    count, lines = survivors(toy, repository)
    assert sorted(lines) == [
        "toy.py: 5 noticed, 3 not, of 8 possible",
        "toy.py:2\n  - if x < low:\n  + if (x <= low):",  # equivalent
        "toy.py:7\n  - def half(x, by=2):\n  + def half(x, by=1):",
        "toy.py:7\n  - def half(x, by=2):\n  + def half(x, by=3):",
    ]
    assert count == 3
    assert (toy / "copy" / "toy" / "toy.py").read_text() == TOY


def test_a_change_that_never_ends_is_noticed(toy, repository):
    (toy / "toy" / "toy.py").write_text("while True:\n    break\n")
    (toy / "toy" / "test_toy.py").write_text("def test_toy():\n    import toy\n")
    _, lines = survivors(toy, repository, line=2, least_seconds=1)
    assert lines == ["toy.py: 1 noticed, 0 not, of 1 possible"]


def test_tests_that_fail_without_a_change_are_reported(toy, repository):
    (toy / "toy" / "test_toy.py").write_text("def test_nothing():\n    assert 0\n")
    count, lines = survivors(toy, repository)
    assert (count, lines[0].splitlines()[0]) == (1, "toy.py: its tests fail without a change")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a < b <= c", ["a <= b <= c", "a < b < c"]),
        ("f(a, b)", ["pass", "f(b, a)"]),
        ("f(1, key=x)", ["pass", "f(2, key=x)", "f(0, key=x)", "f(1)"]),
        ("x.y = min(a)", ["pass", "x.y = max(a)"]),
        ("raise ValueError(1 + 2)", ["pass"]),
        ("if a and not b: c", [f"if {x}: c" for x in ("a or not b", "a", "not b", "a and b", "not (a and not b)")]),
        ("[x for x in y if x]", ["[x for x in y if True]"]),
        ("y = 2 * a[1:]", [f"y = {x}:]" for x in ("3 * a[1", "1 * a[1", "2 // a[1", "2 * a[2", "2 * a[0", "2 * a[")]),
        ("y = b if a else c", ["y = c if a else b"]),
        ("def f(x: int = -0.5): g()", [f"def f(x: int = {x}" for x in ("0.5): g()", "-1.0): g()", "-0.5): pass")]),
        ("def f(): return x", ["def f(): return"]),
        ("s = 'ä' 'b' + f'{n - 1}'; del s", ["s = 'ä' 'b' + f'{n - 1}'; pass"]),
    ],
)  # fmt: skip
def test_mutations_of_python(before, after):
    texts = changed(before.encode(), python_source.mutations(before.encode()))
    assert sorted(ast.unparse(ast.parse(text)) for text in texts) == sorted(ast.unparse(ast.parse(t)) for t in after)


def test_mutations_of_cpp():
    source = b"""#if A == 1
// a < b
int f(int n) {
    check(n < 2, "n < 2");
    for (int i = 0; i < n; ++i)
        if (ready(i)) break;
    return std::min(n, 10);
}
"""
    found = {(m.line, source[m.start : m.stop].strip(), m.replacement.strip()) for m in cpp_source.mutations(source)}
    assert found == {
        (4, b"<", b"<="),
        (4, b"2", b"1"),
        (4, b"2", b"3"),
        (4, b'check(n < 2, "n < 2");', b""),
        (5, b"0", b"1"),
        (5, b"<", b"<="),
        (6, b"if (ready(i))", b"if (!(ready(i)))"),
        (6, b"break;", b"continue;"),
        (7, b"std::min", b"std::max"),
        (7, b"10", b"9"),
        (7, b"10", b"11"),
    }


def test_every_line_is_drawn_once_before_any_is_drawn_twice():
    found = python_source.mutations(TOY.encode())
    order = [m.line for m in drawn(found, "1")]
    assert len(order) == len(found)
    assert len(set(order[:6])) == 6 == len(set(order))
    assert [m.line for m in drawn(found, "1")] == order
    assert described("toy.py", TOY.encode(), found[0]).startswith("toy.py:1\n  - def clamp")


def test_the_tests_are_chosen_by_markers_that_exist(pytestconfig):
    declared = {line.split(":")[0] for line in pytestconfig.getini("markers")}
    assert set(re.findall(r"\w+", " ".join(workplace.QUICK_FIRST))) - {"not", "and", "or"} <= declared


def test_every_module_has_tests(repository):
    for path in (
        *repository.glob("neox/*/**/*.py"),
        *repository.glob("csrc/data/*.cpp"),
        *repository.glob("csrc/ops/**/*.cpp"),
    ):
        if len(path.read_text(encoding="utf-8").splitlines()) >= 40 and path.name != "__init__.py":
            assert suites.tests_of(repository, str(path.relative_to(repository)))
