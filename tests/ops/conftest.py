"""Fixtures of the operator tests."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.cuda.check_library import implementations

OPERATORS = Path(__file__).parents[2] / "csrc" / "ops"


def chooses_for_cuda(config: pytest.Config) -> bool:
    """Whether the operators choose as for CUDA tensors: on a GPU, or in a rehearsal without one."""
    return "cuda" in (config.getoption("--device"), config.getoption("--choices"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of operators that have no CUDA kernel where the tensors are, or stand for, those of a GPU."""
    if not chooses_for_cuda(config):
        return
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        op = str(parameters.get("op", item.path.stem.removeprefix("test_")))
        if (OPERATORS / op).is_dir() and not any((OPERATORS / op).rglob("*_cuda.cu")):
            item.add_marker(pytest.mark.skip(reason=f"{op} has no CUDA kernel"))


@pytest.fixture(autouse=True)
def choices(request, monkeypatch):
    """With --choices cuda, the operators behave as for CUDA tensors where that decides whether a test may pass.

    "auto" is resolved as there, and is an error where that is not our kernel: the test would be one of torch. An
    operator without a CUDA kernel is an error. dq has other rounding errors in every call unless it is deterministic.
    """
    if request.config.getoption("--choices") != "cuda":
        return
    # only now: this file is read before --ops-library is loaded
    module = importlib.import_module("neox.ops.attention")
    choose = module.choose_backend

    def choose_for_cuda(backend: str, _: str, dtype: torch.dtype, softcap: float | None = None) -> str:
        chosen = choose(backend, "cuda", dtype, softcap)
        assert backend != "auto" or chosen == "native", (
            "on a GPU this test runs torch's attention: name the backend that it means"
        )
        return chosen

    monkeypatch.setattr(module, "choose_backend", choose_for_cuda)
    native = torch.ops.neox
    for name in names_without_cuda_kernel(native):
        monkeypatch.setattr(native, name, WithoutKernel(getattr(native, name)))
    calls = itertools.count()
    for name in ("attention_backward", "attention_qkv_backward"):
        monkeypatch.setattr(native, name, SummedByAtomics(getattr(native, name), calls))


def names_without_cuda_kernel(native: object) -> list[str]:
    """The operators that a GPU lacks, of those that the library defines."""
    folders = [folder for folder in OPERATORS.iterdir() if not any(folder.rglob("*_cuda.cu"))]
    names = [name for folder in folders for name in implementations(folder.name)]
    return [name for name in names if hasattr(native, name)]


class Replaced:
    """An operator that is called otherwise. For torch's compiler it has all other attributes of the operator."""

    def __init__(self, operator: torch._ops.OpOverloadPacket):
        self.operator = operator

    def __getattr__(self, name: str) -> object:
        return getattr(self.operator, name)


class WithoutKernel(Replaced):
    """In place of an operator that a GPU lacks."""

    def __call__(self, *_: object) -> NoReturn:
        raise AssertionError(f"{self.operator} has no CUDA kernel: skip this test on a GPU")


class SummedByAtomics(Replaced):
    """A backward of attention whose dq, unless it is deterministic, changes by one rounding error from call to
    call, in the first channel of each head. A GPU sums it in another order every time.
    """

    def __init__(self, operator: torch._ops.OpOverloadPacket, calls: Iterator[int]):
        super().__init__(operator)
        self.calls = calls
        self.deterministic = [argument.name for argument in operator.default._schema.arguments].index("deterministic")

    def __call__(self, *arguments: object, **named: object) -> torch.Tensor | tuple[torch.Tensor, ...]:
        gradients = self.operator(*arguments, **named)
        dq = gradients[0] if isinstance(gradients, tuple) else gradients[:, :, :, :-2]
        deterministic = named["deterministic"] if named else arguments[self.deterministic]
        if not deterministic and type(dq) is torch.Tensor:  # no fake one, of the compiler
            dq.data[..., 0] *= 1 + (next(self.calls) % 3 - 1) * 0.6 * torch.finfo(dq.dtype).eps
        return gradients


@pytest.fixture
def repeatable(request):
    """Algorithms that give the same bits every time, where a GPU's default ones do not: dq is summed by atomics
    there.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or chooses_for_cuda(request.config))
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads():
    """Sets the number of torch's threads; the number before the test comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
