"""Fixtures of the operator tests."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

OPERATORS = Path(__file__).parents[2] / "csrc" / "ops"


def chooses_for_cuda(config: pytest.Config) -> bool:
    """Whether the operators choose as for CUDA tensors: on a GPU, or in a rehearsal without one."""
    return "cuda" in (config.getoption("--device"), config.getoption("--choices"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of operators that have no CUDA kernel where the tensors are, or stand for, those of a GPU."""
    if not chooses_for_cuda(config):
        return
    for item in items:
        op = item.path.stem.removeprefix("test_")
        if (OPERATORS / op).is_dir() and not any((OPERATORS / op).rglob("*_cuda.cu")):
            item.add_marker(pytest.mark.skip(reason=f"{op} has no CUDA kernel"))


@pytest.fixture(autouse=True)
def choices(request, monkeypatch):
    """With --choices cuda, "auto" is resolved as for a CUDA tensor, and is an error where that is not our kernel:
    the test would be one of torch.
    """
    if request.config.getoption("--choices") == "cuda":
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
