"""Symbols that the oldest supported torch lacks are found in a library."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests.cuda import stable_symbols

SOURCE = """
#include <cstdio>
extern "C" int aoti_torch_known(int);
extern "C" int torch_new_function(int);
namespace c10 { int internal(int); }
extern "C" int entry(int x) { std::puts("x"); return CALLS; }
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
@pytest.mark.parametrize(
    ("calls", "found"),
    [
        ("aoti_torch_known(x)", []),
        ("aoti_torch_known(x) + torch_new_function(x)", ["torch_new_function"]),
        ("c10::internal(x)", ["_ZN3c108internalEi"]),
    ],
)
def test_functions_that_are_not_declared_are_found(calls, found, tmp_path, monkeypatch, capsys):
    (tmp_path / "shim.h").write_text("AOTI_TORCH_EXPORT AOTITorchError\naoti_torch_known(int x);\n")
    (tmp_path / "a.cpp").write_text(SOURCE.replace("CALLS", calls))
    library = tmp_path / "a.so"
    subprocess.run(["g++", "-shared", "-fPIC", tmp_path / "a.cpp", "-o", library], check=True)
    assert stable_symbols.foreign(tmp_path, [library]) == [f"{library}: {name}" for name in found]
    monkeypatch.setattr("sys.argv", ["stable_symbols.py", str(tmp_path), str(library)])
    assert stable_symbols.main() == bool(found)
    assert all(name in capsys.readouterr().err for name in found)
