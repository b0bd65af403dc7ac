"""The dataset core that is loaded has what the Python sources use of it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest

import neox
from neox import _native
from neox._native import NAMES
from neox.errors import EnvironmentProblem


def test_the_list_of_names_is_what_the_sources_use(repository):
    used = {
        name
        for path in (repository / "neox").rglob("*.py")
        for name in re.findall(r"(?<![.\w])core\.([A-Za-z]\w*)", path.read_text(encoding="utf-8"))
    }
    assert sorted(NAMES) == sorted(used)


def test_an_older_build_is_refused_with_what_to_do(repository):
    probe = (
        "import neox._data as core; del core.xxh3, core.best_fit\n"
        "from neox.errors import EnvironmentProblem\n"
        "try: import neox.data.store.indexed\n"
        "except EnvironmentProblem as error: print(error.line())"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, cwd=repository)
    assert "older than the Python sources" in done.stdout, done.stderr
    assert "got=no best_fit, xxh3;" in done.stdout
    assert "pip install -e ." in done.stdout


def load_again() -> object:
    """The module as another process would load it."""
    spec = importlib.util.spec_from_file_location("neox_native_again", _native.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_core_that_is_missing_is_named_with_what_to_do(monkeypatch):
    assert load_again().core is _native.core
    monkeypatch.delattr(neox, "_data")
    monkeypatch.setitem(sys.modules, "neox._data", None)
    with pytest.raises(EnvironmentProblem) as caught:
        load_again()
    line = caught.value.line()
    assert line.startswith("error[14] the dataset core is not built or does not load; where=neox._data; got=")
    assert line.endswith("; do=make setup, or pip install -e .")
