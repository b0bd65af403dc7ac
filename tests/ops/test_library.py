"""Which native library is selected, and the errors without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

import neox.ops
from neox.errors import EnvironmentProblem
from neox.ops import _library

pytestmark = pytest.mark.skipif(
    _library.ISA == _library.LOADED, reason="is about choosing a library: --ops-library has loaded one"
)

ZEN3 = {"avx2", "fma", "f16c"}
SKYLAKE = ZEN3 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


def test_best_library_that_the_cpu_can_run():
    built = {"avx2", "avx512", "avx512_bf16", "portable"}
    assert _library.choose(built, SKYLAKE | {"avx512_bf16"}) == "avx512_bf16"
    assert _library.choose(built, SKYLAKE) == "avx512"
    assert _library.choose(built, ZEN3) == "avx2"
    assert _library.choose(built, set()) == "portable"
    assert _library.choose({"avx2", "portable"}, SKYLAKE) == "avx2"


def test_a_cpu_needs_every_flag_that_a_library_is_compiled_with():
    source = ast.parse((Path(_library.__file__).parents[2] / "setup.py").read_text(encoding="utf-8"))
    (flags,) = [
        node.value
        for node in source.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CPU_ISA_FLAGS"
    ]
    spelt = {"avx512bf16": "avx512_bf16"}  # the compiler's spelling -> the one of /proc/cpuinfo
    compiled = {
        isa: {flag.removeprefix("-m") for flag in each if "prefer" not in flag}
        for isa, each in ast.literal_eval(flags).items()
    }
    assert {isa: {spelt.get(flag, flag) for flag in each} for isa, each in compiled.items()} == _library.REQUIREMENTS
    for isa, needed in _library.REQUIREMENTS.items():
        assert _library.choose({isa}, needed) == isa
        for flag in needed:
            assert _library.choose({isa, "portable"}, needed - {flag}) == "portable"


def test_nothing_built():
    with pytest.raises(EnvironmentProblem, match=r"not built; where=.*_ops; got=no library; .*; do=make setup, "):
        _library.choose(set(), ZEN3)


def test_nothing_fits():
    with pytest.raises(
        EnvironmentProblem, match=r"cannot run the native operators that are built; .*got=libraries avx512 on "
    ):
        _library.choose({"avx512"}, ZEN3)


def test_a_damaged_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    for isa in _library.REQUIREMENTS:
        (tmp_path / f"{isa}.so").write_bytes(b"not a library")
    with pytest.raises(EnvironmentProblem, match=r"do not load; where=.*\.so; got=.*; do=rebuild"):
        _library.load()


def test_backend():
    assert neox.ops.backend("bias_gelu").startswith(f"native {neox.ops.ISA}: ")
    with pytest.raises(ValueError, match=r"unknown operator 'gelu'; known: .*bias_gelu"):
        neox.ops.backend("gelu")
    with pytest.raises(ValueError, match="unknown operator 'rotary_tables'"):  # runs no kernel
        neox.ops.backend("rotary_tables")


def test_missing_cuda_kernels_are_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    assert _library.load_cuda(gpu=False) == "not loaded: torch sees no GPU"
    assert _library.load_cuda(gpu=True).startswith("not built: needs nvcc and a torch with CUDA, then make setup, ")
    (tmp_path / "cuda.so").write_bytes(b"not a library")
    with pytest.raises(EnvironmentProblem, match=r"the CUDA kernels do not load; where=.*cuda\.so; got=.*; do=rebuild"):
        _library.load_cuda(gpu=True)


def test_backend_reports_cuda(monkeypatch):
    monkeypatch.setattr(neox.ops, "CUDA", "loaded")
    monkeypatch.setattr(neox.ops, "runs_on_cuda", {"gated": False, "norm": True, "rotary_qkv_": True}.__getitem__)
    assert neox.ops.backend("gated").endswith("on CUDA tensors: no kernel in neox/_ops/cuda.so")
    assert neox.ops.backend("dual_rms_norm").endswith("on CUDA tensors: native CUDA kernel")
    monkeypatch.setattr(neox.ops, "CUDA", "not loaded: torch sees no GPU")
    assert neox.ops.backend("gated").endswith("on CUDA tensors: no kernel, not loaded: torch sees no GPU")


def test_operators_without_kernels_for_cuda():
    assert not _library.runs_on_cuda("invented_yesterday")
    assert _library.runs_on_cuda("norm") == (_library.CUDA == "loaded")
    assert not _library.runs_on_cuda("decode_block")


@pytest.mark.parametrize("name", [name for name in neox.ops.__all__ if name not in neox.ops.HELPERS | {"linear"}])
def test_every_public_operator_names_a_native_one(name):
    assert hasattr(torch.ops.neox, neox.ops.NATIVE.get(name, name))


def test_a_library_of_older_sources_is_named(monkeypatch):
    monkeypatch.setattr(_library, "OPERATORS", (*_library.OPERATORS, "invented_yesterday"))
    with pytest.raises(
        EnvironmentProblem, match="older than the Python sources; .*got=no invented_yesterday; do=rebuild"
    ):
        _library.load()


def test_every_called_operator_is_required():
    """A library of older sources would otherwise fail at the first call, with an AttributeError."""
    sources = "".join(path.read_text(encoding="utf-8") for path in Path(_library.__file__).parent.glob("*.py"))
    assert list(_library.OPERATORS) == sorted(set(re.findall(r"native\.([a-z]\w+)\(", sources)))
