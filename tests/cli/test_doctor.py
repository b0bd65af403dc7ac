"""`neox doctor`: what it reports and when it fails."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from neox.cli import doctor
from neox.cli.main import main
from neox.errors import INSTALL, EnvironmentProblem


def broken() -> str:
    raise OSError("undefined\nsymbol")


def unbuilt() -> str:
    raise EnvironmentProblem("not built", where="neox/_ops", got="no library", do="x")


def test_a_healthy_report_exits_0(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, lambda: [doctor.attempt("thing", lambda: "1.0")]))
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok   python ") and lines[-1].split() == ["ok", "thing", "1.0"]


@pytest.mark.parametrize(
    ("look", "text"),
    [
        (broken, "OSError: undefined symbol; do=make setup"),
        (unbuilt, "not built; where=neox/_ops; got=no library; do=make setup"),
    ],
)
def test_something_needed_that_fails_exits_14(monkeypatch, capsys, look, text):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [doctor.attempt("thing", look, do="make setup")],))
    assert main(["doctor"]) == 14
    assert capsys.readouterr().out == f"FAIL thing  {text}\n"


def test_something_not_needed_that_is_absent_exits_0(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: [doctor.attempt("thing", broken, needed=False)],))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("--   thing")


def test_json_is_one_list(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (doctor.python, doctor.machine))
    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"python", "cpu", "memory", "disk"} <= {row["name"] for row in rows}
    assert all(set(row) == {"name", "ok", "text", "needed", "do"} for row in rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORLD_SIZE", "abc"),
        ("OMP_NUM_THREADS", "0"),
        ("LOCAL_RANK", "-1"),
        ("MASTER_PORT", ""),
        ("RANK", "1.0"),
        ("RANK", "\u0661"),
    ],
)
def test_a_bad_variable_is_named_with_its_value(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    found = {finding.name: finding for finding in doctor.environment()}[name]
    assert not found.ok and repr(value) in found.text and name in found.do


def test_good_variables_pass(monkeypatch):
    for name in doctor.VARIABLES:
        monkeypatch.setenv(name, "2")
    assert all(finding.ok for finding in doctor.environment())


def test_every_part_of_the_installation_is_checked():
    names = {finding.name for look in doctor.CHECKS for finding in look()}
    assert {
        "python",
        "neox",
        "torch",
        "deepspeed",
        "numpy",
        "native operators",
        "native data core",
        "cpu",
        "memory",
        "disk",
        "gpu",
        "g++",
        "nvcc",
    } <= names


def test_an_old_torch_fails(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    (finding,) = doctor.torch_version()
    assert not finding.ok and "2.9.1+cpu is older than 2.11" in finding.text


def test_missing_extras_name_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"pytest": ("tests", "x"), "no-such-package": ("nothing", "pip install it")})
    here, absent = doctor.extras()
    assert here.ok and "tests" in here.text
    assert not absent.ok and not absent.needed and absent.do == "pip install it"


@pytest.mark.parametrize(
    ("flags", "ok", "text"),
    [
        ({"avx2", "fma"}, True, "AVX2"),
        ({"sse4_2"}, False, "no AVX2: the portable kernels are several times slower"),
        (set(), None, ""),
    ],
)
def test_a_cpu_without_avx2_is_reported(monkeypatch, flags, ok, text):
    monkeypatch.setattr(doctor, "cpu_flags", lambda: flags)
    found = [finding for finding in doctor.machine() if finding.name == "vector instructions"]
    assert [finding.ok for finding in found] == ([] if ok is None else [ok])
    assert all(finding.text.startswith(text) and not finding.needed for finding in found)


@pytest.mark.parametrize(
    ("version", "ok"),
    [
        ("2.11.0", True),
        ("2.11.0+cpu", True),
        ("2.12.1a0+git", True),
        ("3.0.0", True),
        ("2.10.9", False),
        ("1.13.1", False),
    ],
)
def test_the_oldest_torch_that_will_do(monkeypatch, version, ok):
    monkeypatch.setattr(torch, "__version__", version)
    (finding,) = doctor.torch_version()
    assert (finding.ok, finding.needed, finding.name) == (ok, True, "torch")
    wanted = f"{version}, {torch.get_num_threads()} threads" if ok else f"ImportError: {version} is older than 2.11"
    assert finding.text == wanted and (ok or finding.do == INSTALL)


@pytest.mark.parametrize(("version", "ok"), [((3, 10, 0), True), ((3, 9, 18), False), ((4, 0, 0), True)])
def test_the_oldest_python_that_will_do(monkeypatch, version, ok):
    monkeypatch.setattr(sys, "version_info", version)
    python, neox = doctor.python()
    assert (python.ok, python.needed, python.do) == (ok, True, "use Python 3.10 or later")
    assert python.text.endswith(", want 3.10 or later") and sys.executable in python.text
    assert (neox.name, neox.ok) == ("neox", True)


@pytest.mark.parametrize(
    ("finding", "wanted"),
    [
        (doctor.Finding("a", True, "b\n c", do="x"), "ok   a    b c"),
        (doctor.Finding("a", True, "b", needed=False), "ok   a    b"),
        (doctor.Finding("a", False, "b", do="x"), "FAIL a    b; do=x"),
        (doctor.Finding("a", False, "b"), "FAIL a    b"),
        (doctor.Finding("abc", False, "b", needed=False, do="x"), "--   abc  b; do=x"),
    ],
)
def test_a_finding_on_its_line(finding, wanted):
    assert doctor.line(finding, 3) == wanted


def test_the_advice_of_an_error_stands_where_the_check_has_none():
    found = doctor.attempt("thing", unbuilt)
    assert (found.do, found.ok, found.needed) == ("x", False, True)
    assert doctor.attempt("thing", unbuilt, do="y").do == "y"
    assert doctor.attempt("thing", lambda: str(print("noise")), needed=False) == doctor.Finding(
        "thing", True, "None", needed=False
    )


@pytest.mark.parametrize(
    ("name", "least"),
    [("OMP_NUM_THREADS", 1), ("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("MASTER_PORT", 1)],
)
def test_the_least_value_of_every_variable(monkeypatch, name, least):
    for each in doctor.VARIABLES:
        monkeypatch.delenv(each, raising=False)
    assert list(doctor.environment()) == []
    for value, ok in ((least, True), (least - 1, False)):
        monkeypatch.setenv(name, str(value))
        (found,) = doctor.environment()
        assert (found.name, found.ok, found.needed) == (name, ok, True)
        assert found.text == f"'{value}'" + ("" if ok else f", want a number of at least {least}")


def test_graphics_cards_and_compilers(monkeypatch):
    cards = [
        SimpleNamespace(name="H200", total_memory=141 * 2**30, major=9, minor=0),
        SimpleNamespace(name="A10", total_memory=24 * 2**30, major=8, minor=6),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", cards.__getitem__)
    monkeypatch.setattr("shutil.which", {"nvcc": "/opt/nvcc", "g++": None}.__getitem__)
    gpu, compiler, nvcc = doctor.accelerators()
    assert (gpu.ok, gpu.text) == (True, "H200 (141 GiB, sm_90), A10 (24 GiB, sm_86)")
    assert (compiler.name, compiler.ok, compiler.text) == ("g++", False, "not found (needed only to build)")
    assert (nvcc.name, nvcc.ok, nvcc.text) == ("nvcc", True, "/opt/nvcc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    absent = next(doctor.accelerators())
    assert (absent.ok, absent.needed) == (False, False)
    assert absent.text == "none that torch can use: training runs on the CPU" and not any(
        finding.needed for finding in (gpu, compiler, nvcc)
    )


def test_memory_and_disk_in_gibibytes(monkeypatch):
    import psutil

    state = SimpleNamespace(available=3 * 2**29, total=2**33)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: state)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5 * 2**28, total=2**40, used=2**39))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 5, 7})
    monkeypatch.setattr(doctor, "cpuinfo", lambda key: {"model name": ["fast", "slow"]}[key])
    found = {finding.name: finding for finding in doctor.machine()}
    assert found["cpu"].text == "fast, 3 cores" and found["memory"].text == "1.5 of 8.0 GiB available"
    assert found["disk"].text.startswith("1.2 GiB free in ")
    assert not found["memory"].needed and not found["disk"].needed
    monkeypatch.setattr(doctor, "cpuinfo", lambda key: [])
    assert doctor.cpu_name()


@pytest.mark.parametrize(
    ("flags", "text"),
    [({"avx2", "fma", "avx512f"}, "AVX2 and AVX-512"), ({"avx2", "fma"}, "AVX2"), ({"avx2"}, "no AVX2")],
)
def test_vector_instructions_need_both_extensions(monkeypatch, flags, text):
    monkeypatch.setattr(doctor, "cpu_flags", lambda: flags)
    (found,) = (finding for finding in doctor.machine() if finding.name == "vector instructions")
    assert found.text.partition(":")[0] == text and found.ok is ("fma" in flags)


def test_every_package_is_imported_and_a_broken_one_fails(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "yaml", "no_such_package"))
    numpy, yaml, absent = doctor.packages()
    assert numpy.text == importlib.import_module("numpy").__version__
    assert yaml.ok and yaml.text == importlib.import_module("yaml").__version__
    assert (absent.ok, absent.needed, absent.do) == (False, True, INSTALL)
    assert absent.text.startswith("ModuleNotFoundError: ")


@pytest.mark.parametrize(("state", "ok"), [("loaded", True), ("not built", False)])
def test_cuda_operators_are_reported_and_not_needed(monkeypatch, state, ok):
    monkeypatch.setattr("neox.ops._library.CUDA", state)
    operators, cuda, core = doctor.native()
    assert (cuda.name, cuda.ok, cuda.text, cuda.needed) == ("cuda operators", ok, state, False)
    assert operators.needed and core.needed and core.text.endswith(".so")
    library = importlib.import_module("neox.ops._library")
    built = sorted(path.name.removesuffix(".so") for path in library.FOLDER.iterdir() if path.suffix == ".so")
    assert operators.text == f"{library.ISA} (built: {', '.join(built)})"


def test_one_missing_requirement_of_many_exits_14(monkeypatch, capsys):
    findings = [
        doctor.Finding("a", False, "x", needed=False),
        doctor.Finding("long", False, "y"),
        doctor.Finding("b", True, "z"),
    ]
    monkeypatch.setattr(doctor, "CHECKS", (lambda: findings[:1], lambda: findings[1:]))
    assert main(["doctor"]) == 14
    assert capsys.readouterr().out == "--   a     x\nFAIL long  y\nok   b     z\n"
    monkeypatch.setattr(doctor, "CHECKS", (lambda: findings[:1], lambda: findings[2:]))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {
        "name": "a",
        "ok": False,
        "text": "x",
        "needed": False,
        "do": None,
    }
