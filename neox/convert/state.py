"""Tensors by name: checks of a state dict from another program, and the interface of weights to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from neox.config.problems import brief
from neox.errors import CheckpointError

State = dict[str, torch.Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Tensors(Protocol):
    """Tensors by name, from files or from memory."""

    def names(self) -> list[str]:
        """All names, in the order of the source."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor. Raises CheckpointError if it cannot be read."""
        ...


class InMemoryTensors:
    """Tensors of a state dict."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def names(self) -> list[str]:
        """All names, in the order of the state dict."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor."""
        return self._tensors[name]


def named_tensors(content: object, where: object) -> State:
    """Return the tensors of a state dict by name. Other values are omitted.

    Args:
        content: content of a file.
        where: name of the file in errors.

    Raises:
        CheckpointError: the content is not a dictionary, or a key is not a string.
    """
    if not isinstance(content, dict):
        raise CheckpointError("not a state dict", where=where, got=type(content).__name__, want="tensors by name")
    strange = [key for key in content if not isinstance(key, str)]
    if strange:
        raise CheckpointError(
            "key of a state dict is not a name", where=where, got=brief(strange[0]), want="tensors by name"
        )
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def check_tensor(tensor: torch.Tensor, where: object) -> None:
    """Raise CheckpointError unless a tensor can be read as weights.

    A copy must not need more memory than its file has bytes.
    """
    problem = None
    if tensor.is_meta:
        problem = "a meta tensor, which has no values"
    elif tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested:
        problem = (
            "quantized"
            if tensor.is_quantized
            else "nested"
            if tensor.is_nested
            else str(tensor.layout).removeprefix("torch.")
        )
    elif tensor.dtype not in DTYPES:
        problem = str(tensor.dtype).removeprefix("torch.")
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        problem = f"shape {tuple(tensor.shape)} over {tensor.untyped_storage().nbytes()} bytes"
    if problem is not None:
        want = "a dense tensor of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise CheckpointError("tensor cannot be read as weights", where=where, got=problem, want=want)


def check_ranks(states: Sequence[State], where: object) -> None:
    """Raise CheckpointError unless all tensor-parallel ranks have readable tensors of the same names and shapes."""
    for rank, state in enumerate(states):
        for name, tensor in state.items():
            check_tensor(tensor, f"{where}, rank {rank}: {name}")
        differing = sorted(state.keys() ^ states[0].keys())
        if differing:
            lacking = rank if differing[0] in states[0] else 0
            raise CheckpointError(
                "tensor-parallel ranks have different weights",
                where=f"{where}: {differing[0]}",
                got=f"missing on rank {lacking}",
            )
        for name, tensor in state.items():
            if tensor.shape != states[0][name].shape:
                got = f"{tuple(states[0][name].shape)} on rank 0, {tuple(tensor.shape)} on rank {rank}"
                raise CheckpointError("tensor-parallel ranks have different shapes", where=f"{where}: {name}", got=got)
