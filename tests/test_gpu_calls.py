"""benchmarks/gpu.sh keeps its time and loses nothing: limits, a JSON file per step, failures and missing packages."""

from __future__ import annotations

import importlib
import json
import os
import re
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
        assert len(steps) + 2 <= sys.modules["gpu.calls"].MAX_FILES  # and report.txt and log.txt


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
    assert {path.name for path in tmp_path.iterdir()} <= {"only.json", "only.partial", "log.txt"}  # at most 8 come back


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


@pytest.mark.parametrize("asking", [True, False])
def test_libraries_are_built_only_where_loading_fails(gpu, call, tmp_path, monkeypatch, asking):
    """Building takes most of a call: what else fails in the first step does not cause it."""
    monkeypatch.setattr(gpu, "build", lambda: [python("record.add({'built': 1})")])
    asks = "record.add({'then': record.BUILD, 'because': 'undefined symbol'}); raise SystemExit(1)"
    call.run([step(gpu, "load", asks if asking else "raise SystemExit('no wheel')"), step(gpu, "next", "")])
    load = document(tmp_path, "load")
    assert load["status"] == ("ok" if asking else "failed")
    assert ({"built": 1} in load["rows"]) == asking
    assert ("undefined symbol" if asking else "no wheel") in load["problems"][0]
    assert document(tmp_path, "next")["status"] == "ok"


def test_a_call_without_a_gpu_ends_at_once(gpu, call, tmp_path):
    stop = "record.add({'then': record.STOP, 'because': 'torch sees no GPU'}); raise SystemExit(1)"
    call.run([step(gpu, "load", stop), step(gpu, "next", "record.add({'ran': 1})")])
    assert document(tmp_path, "next")["status"] == "not run"
    assert document(tmp_path, "next")["problems"] == ["torch sees no GPU"]
    assert document(tmp_path, "next")["rows"] == []


def test_a_step_may_use_what_those_before_it_leave(gpu, tmp_path):
    call = gpu.Call("a", "cuda", tmp_path, limit=100)
    call.run([step(gpu, "first", "", limit=30), step(gpu, "second", "", limit=10), step(gpu, "third", "", limit=60)])
    limits = [document(tmp_path, name)["limit_s"] for name in ("first", "second", "third")]
    assert limits[0] == 30 and 30 < limits[1] <= 40 and 90 < limits[2] <= 100


def test_a_process_that_cannot_be_killed_is_abandoned(gpu, call, tmp_path, monkeypatch):
    """As one that waits in a driver."""
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.setattr(gpu, "STUCK", 0.5)
    monkeypatch.setattr(gpu.Running, "signal", lambda *_: None)
    start = time.monotonic()
    call.run([step(gpu, "stuck", "time.sleep(15)", limit=2), step(gpu, "next", "")])
    assert time.monotonic() - start < 12
    assert document(tmp_path, "stuck")["status"] == "out of time"
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


@pytest.fixture
def checkout(gpu, tmp_path, monkeypatch):
    """A checkout with sources and a bundle of them, and one library."""
    bundle = sys.modules["gpu.bundle"]
    for name, path in {"ROOT": ".", "BUNDLE": "bundle", "SITE": "site", "STAMP": "neox/_ops/bundle.txt"}.items():
        monkeypatch.setattr(bundle, name, tmp_path / path)
    monkeypatch.setattr(bundle, "loads", lambda _: any((tmp_path / "neox" / "_ops").glob("*.so")))
    monkeypatch.setenv(record_variable(), str(tmp_path / "rows.json"))
    for folder in ("csrc", "neox/_ops", "bundle/neox/_ops"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "csrc" / "a.cpp").write_text("a")
    (tmp_path / "setup.py").write_text("")
    (tmp_path / "bundle" / "neox" / "_ops" / "cuda.so").write_text("bundled")
    return bundle


def record_variable() -> str:
    return sys.modules["record"].VARIABLE


def test_the_libraries_of_a_bundle_are_copied_once_and_only_for_its_sources(checkout, tmp_path):
    library, sources = tmp_path / "neox" / "_ops" / "cuda.so", checkout.sources_hash()
    assert checkout.install_libraries(sources, "cuda") == "copied"
    assert library.read_text() == "bundled"
    assert checkout.install_libraries(sources, "cuda") == "not needed"

    (tmp_path / "csrc" / "a.cpp").write_text("b")  # a kernel is fixed, and the old bundle is carried
    assert checkout.install_libraries(sources, "cuda") == "of other sources"
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["then"] == sys.modules["record"].BUILD
    (tmp_path / "setup.py").write_text("open('neox/_ops/cuda.so', 'w').write('built')")
    assert checkout.build() == 0 and library.read_text() == "built"
    assert checkout.install_libraries(sources, "cuda") == "not needed"

    (tmp_path / "csrc" / "a.cpp").write_text("c")  # another fix, with its bundle
    (tmp_path / "bundle" / "neox" / "_ops" / "cuda.so").write_text("the newest")
    assert checkout.install_libraries(checkout.sources_hash(), "cuda") == "copied"
    assert library.read_text() == "the newest"


def test_a_build_that_fails_leaves_the_libraries_of_other_sources(checkout, tmp_path):
    checkout.install_libraries(checkout.sources_hash(), "cuda")
    (tmp_path / "csrc" / "a.cpp").write_text("b")
    (tmp_path / "setup.py").write_text("raise SystemExit(3)")
    assert checkout.build() == 3
    assert checkout.install_libraries("old", "cuda") == "of other sources"


@pytest.mark.parametrize(
    ("tool", "program", "error"),
    [
        ("nvcc", None, "error[14] no nvcc; where=PATH; want=CUDA"),
        ("nvcc", "echo sm_70 sm_80", "error[14] nvcc is too old; where=.*/nvcc; got=up to sm_80; want=sm_90"),
        (
            "python",
            None,
            "error[14] no Python with its headers; where=GPU_PYTHON; got=.*/python: no such program; want=",
        ),
        ("python", "echo the shim knows no 3.12 >&2; exit 1", "got=.*/python: the shim knows no 3.12; want="),
        ("python", "echo /none; echo 3.12", "got=no /none/Python.h; want=the version of the GPU machine; do=make"),
    ],
)
def test_a_machine_that_cannot_make_the_bundle_gets_one_error(gpu, tmp_path, monkeypatch, tool, program, error):
    bundle = sys.modules["gpu.bundle"]
    (tmp_path / "Python.h").touch()
    programs = dict.fromkeys(("c++filt", "strip", "nm", "g++"), "")
    programs |= {"nvcc": "echo sm_80 sm_90", "python": f"echo {tmp_path}; echo 3.12"}

    def write() -> None:
        for name, text in programs.items():
            if text is not None:
                (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
                (tmp_path / name).chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++ -m64")
    write()
    bundle.tools(str(tmp_path / "python"))
    (tmp_path / tool).unlink()
    programs[tool] = program
    write()
    with pytest.raises(SystemExit) as refusal:
        bundle.tools(str(tmp_path / "python"))
    assert re.search(error.replace("[14]", r"\[14\]"), str(refusal.value))


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
