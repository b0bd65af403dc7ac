"""benchmarks/gpu.sh keeps its time and loses nothing: limits, a JSON file per step, failures and missing packages."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
TOTAL = 540  # seconds of both calls


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """benchmarks/gpu/run.py, which its folder's programs import as gpu.run."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        for name in ("bundle", "calls", "kernels", "run_tests", "sanitize"):
            importlib.import_module(f"gpu.{name}")
        return importlib.import_module("gpu.run")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def call(gpu, tmp_path):
    """A call in an empty folder."""
    return gpu.Call("a", "cuda", tmp_path, limit=60)


def python(text: str) -> list[str]:
    """A command of a step. It can record rows."""
    return [sys.executable, "-c", f"import sys, time; sys.path.insert(0, {str(BENCHMARKS)!r}); import record\n{text}"]


def step(gpu, name: str, *texts: str, limit: int = 20, **options):
    return gpu.Step(name, limit, lambda _: [python(text) for text in texts], **options)


def document(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_the_limits_add_up(gpu):
    assert sum(gpu.LIMITS.values()) <= TOTAL
    for name, steps in gpu.CALLS.items():
        assert sum(one.limit for one in steps) <= gpu.LIMITS[name]
        assert len({one.name for one in steps}) == len(steps)
        assert len(steps) + 2 <= sys.modules["gpu.calls"].FILES  # and report.txt and log.txt


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_command_exists(gpu, device):
    calls = sys.modules["gpu.calls"]
    commands = [command for steps in gpu.CALLS.values() for one in steps for command in one.commands(device)]
    commands += calls.build()
    assert len(commands) > 25
    for command in commands:
        assert command[0] == sys.executable
        assert (ROOT / command[1]).is_file(), command
        assert device in command or command in calls.build()
    assert {path.parent.name for path in (ROOT / "csrc" / "ops").rglob("*_cuda.cu")} - {"cuda"} <= set(
        calls.operators()
    )


def test_every_operator_has_cases(gpu):
    calls = sys.modules["gpu.calls"]
    sys.path.insert(0, str(BENCHMARKS))
    cases = importlib.import_module("gpu.cases")
    sys.path.remove(str(BENCHMARKS))
    assert set(cases.CASES) == set(calls.operators())


def test_a_step_that_fails_is_reported_and_the_others_run(gpu, call, tmp_path):
    steps = [
        step(gpu, "good", "record.add({'x': 1})"),
        step(gpu, "bad", "record.add({'y': 2}); raise ValueError('the reason')", "record.add({'z': 3})"),
        step(gpu, "killed", "import os; record.add({'k': 4}); os.kill(os.getpid(), 9)"),
        step(gpu, "last", "record.add({'w': 5})"),
    ]
    call.run(steps)
    assert [document(tmp_path, one.name)["status"] for one in steps] == ["ok", "failed", "failed", "ok"]
    assert document(tmp_path, "bad")["rows"] == [{"y": 2}, {"z": 3}]
    assert "exit code 1: ValueError: the reason" in document(tmp_path, "bad")["problems"][0]
    assert document(tmp_path, "killed")["rows"] == [{"k": 4}]
    assert "signal 9" in document(tmp_path, "killed")["problems"][0]
    assert document(tmp_path, "last")["rows"] == [{"w": 5}]
    assert not call.passed
    report = (tmp_path / "report.txt").read_text()
    assert "the reason" in report and "w=5" in report
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{one.name}.json" for one in steps} | {"report.txt", "log.txt"}


def test_a_step_that_is_late_loses_nothing(gpu, call, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    deaf = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); record.add({'x': 1}); time.sleep(60)"
    start = time.monotonic()
    call.run([step(gpu, "late", deaf, "record.add({'never': 1})", limit=3), step(gpu, "next", "record.add({'y': 2})")])
    assert time.monotonic() - start < 15
    late = document(tmp_path, "late")
    assert (late["status"], late["rows"], len(late["problems"])) == ("out of time", [{"x": 1}], 2)
    assert document(tmp_path, "next")["status"] == "ok"


def test_a_late_step_takes_its_children_along(gpu, call, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    text = "import subprocess; c = subprocess.Popen(['sleep', '60']); record.add({'pid': c.pid}); c.wait()"
    call.run([step(gpu, "late", text, limit=3)])
    (row,) = document(tmp_path, "late")["rows"]
    for _ in range(100):
        state = Path(f"/proc/{row['pid']}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child still runs")


def test_a_killed_call_leaves_what_was_measured(gpu, tmp_path):
    program = python(
        f"from pathlib import Path\nimport gpu.run as run\ncall = run.Call('a', 'cpu', Path({str(tmp_path)!r}), 60)\n"
        f"call.run([run.Step('only', 30, lambda _: [{python('record.add(dict(x=1)); time.sleep(60)')!r}])])"
    )
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        for _ in range(400):
            if (tmp_path / "only.json").exists() and document(tmp_path, "only")["rows"]:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    assert (document(tmp_path, "only")["status"], document(tmp_path, "only")["rows"]) == ("running", [{"x": 1}])


def test_missing_packages_are_reported(gpu, call, tmp_path):
    call.run([step(gpu, "first", "", needs=("json", "no_such_package", "nor_this")), step(gpu, "second", "")])
    assert document(tmp_path, "first")["status"] == "left out"
    assert document(tmp_path, "first")["problems"] == ["no no_such_package, no nor_this"]
    assert document(tmp_path, "second")["status"] == "ok"
    assert not call.passed


def test_steps_that_no_longer_fit_are_reported(gpu, tmp_path):
    call = gpu.Call("a", "cuda", tmp_path, limit=4)
    call.run([step(gpu, "first", ""), step(gpu, "second", "")])
    assert document(tmp_path, "second")["status"] == "not run"
    assert "the 4 s of the call are spent" in (tmp_path / "report.txt").read_text()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_libraries_are_built_only_where_loading_fails(gpu, tmp_path, monkeypatch, device):
    monkeypatch.setattr(gpu, "build", lambda: [python("record.add({'built': 1})")])
    call = gpu.Call("a", device, tmp_path, limit=60)
    call.run([step(gpu, "load", "raise SystemExit('undefined symbol')"), step(gpu, "next", "")])
    load = document(tmp_path, "load")
    assert load["status"] == ("ok" if device == "cuda" else "failed")
    assert load["rows"] == ([{"built": 1}] if device == "cuda" else [])
    assert "undefined symbol" in load["problems"][0]
    assert document(tmp_path, "next")["status"] == "ok"


def test_rows_of_processes_at_the_same_time_are_all_recorded(gpu, call, tmp_path):
    texts = [f"for j in range(20): record.add({{'i': {i}, 'j': j}})" for i in range(4)]
    call.run([step(gpu, "many", *texts, parallel=4)])
    rows = document(tmp_path, "many")["rows"]
    assert sorted((row["i"], row["j"]) for row in rows) == [(i, j) for i in range(4) for j in range(20)]


def test_an_unknown_call_is_an_error(tmp_path):
    done = subprocess.run(["bash", BENCHMARKS / "gpu.sh", "c"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error[2] no such call; where=benchmarks/gpu.sh; got=c; want=a or b")


@pytest.mark.parametrize(
    ("line", "result"),
    [
        (
            "[gw3] [ 12%] FAILED tests/ops/test_a.py::test_b[x y-1] ",
            ("FAILED", "tests/ops/test_a.py", "::test_b[x y-1]"),
        ),
        ("tests/ops/test_a.py::test_b[x y-1] PASSED      [ 50%]", ("PASSED", "tests/ops/test_a.py", "::test_b[x y-1]")),
        ("ERROR tests/ops/test_a.py - ImportError: x", None),
        ("tests/ops/test_a.py:12: AssertionError", None),
        ("collected 3 items", None),
    ],
)
def test_outcomes_of_tests_are_read(gpu, line, result):
    assert sys.modules["gpu.run_tests"].result_of(line) == result


@pytest.mark.parametrize(
    ("tool", "code", "output", "passed", "found"),
    [
        ("memcheck", 0, "========= ERROR SUMMARY: 0 errors", True, 0),
        ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True, 0),
        (
            "memcheck",
            9,
            "========= Invalid __global__ read of size 16 bytes\n========= ERROR SUMMARY: 2 errors",
            False,
            2,
        ),
        ("racecheck", 9, "=========  RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", False, 1),
        ("memcheck", 0, "the program printed nothing", False, "no summary"),
    ],
)
def test_summaries_of_the_sanitizer_are_read(gpu, tool, code, output, passed, found):
    row = sys.modules["gpu.sanitize"].result(tool, code, output)
    assert (row["passed"], row["found"]) == (passed, found)
    assert ("first report" in row) == bool(code)


def test_kernels_that_were_not_launched_are_named(gpu, tmp_path, monkeypatch):
    """Names come from two demanglers: one prints types of template arguments, the other does not."""
    kernels = sys.modules["gpu.kernels"]
    monkeypatch.setattr(kernels, "BUNDLE", tmp_path)
    assert kernels.not_launched("gated", []) is None
    known = [
        "void neox::(anonymous namespace)::forward<float, (int)8>(neox::(anonymous namespace)::Forward<float>)",
        "void neox::(anonymous namespace)::forward<float, (int)1>(neox::(anonymous namespace)::Forward<float>)",
    ]
    (tmp_path / "kernels.json").write_text(json.dumps({"gated": known}))
    launched = ["void neox::(anonymous namespace)::forward<float, 8>(neox::(anonymous namespace)::Forward<float>)"]
    assert kernels.not_launched("gated", launched) == ["forward<float,1>"]
    assert kernels.not_launched("gated", known) == []


def wheel(folder: Path, name: str, *requirements: str) -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {one}" for one in requirements)]
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n\nRequires-Dist: text\n")


def test_a_bundle_without_a_requirement_or_too_large_is_an_error(gpu, tmp_path, monkeypatch, capsys):
    bundle = sys.modules["gpu.bundle"]
    monkeypatch.setattr(bundle, "BUNDLE", tmp_path)
    monkeypatch.setattr(bundle, "ROOT", tmp_path.parent)
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "one", "torch>=2", "typing_extensions", 'old; python_version < "3.9"', 'x; extra == "y"')
    bundle.check()
    assert "in all" in capsys.readouterr().out
    wheel(tmp_path / "wheels", "two", "one", "absent (>=1)")
    with pytest.raises(SystemExit, match="got=no absent of two"):
        bundle.check()
    wheel(tmp_path / "wheels", "absent")
    bundle.check()
    monkeypatch.setattr(bundle, "LIMIT_MB", 1e-4)
    with pytest.raises(SystemExit, match="the bundle is too large"):
        bundle.check()
