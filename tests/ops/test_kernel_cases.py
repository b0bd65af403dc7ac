"""The tiny cases that benchmarks/gpu.sh runs first on a GPU pass on the kernels that these tests run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests import reference

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = sorted({path.relative_to(reference.OPERATORS).parts[0] for path in reference.OPERATORS.rglob("*_cuda.cu")})


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("gpu.cases")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.mark.parametrize("op", OPERATORS)
def test_the_cases_pass(op, cases):
    for case in cases.CASES[op]():
        try:
            case.check()
        except (AssertionError, RuntimeError, ValueError) as problem:
            raise AssertionError(f"{case.text}: {problem}") from problem
