"""What a pickled state dict may hold: named, dense tensors of floating-point numbers that lie in memory, the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from neox.config.problems import brief
from neox.errors import CheckpointError

State = dict[str, torch.Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def named_tensors(content: Any, where: object) -> State:
    """The tensors of a state dict by name; other values are left out.

    Args:
        content: what a file held.
        where: what to call the file in errors.

    Raises:
        CheckpointError: it is no dictionary, or a key is no string.
    """
    if not isinstance(content, dict):
        raise CheckpointError("no state dict", where=where, got=type(content).__name__, want="tensors by name")
    strange = [key for key in content if not isinstance(key, str)]
    if strange:
        raise CheckpointError("key of a state dict is not a name", where=where, got=brief(strange[0]), want="tensors by name")
    return {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}


def check_tensor(tensor: torch.Tensor, where: object) -> None:
    """Raise CheckpointError unless a tensor can be read as weights: copying it must take no more memory than its file has bytes."""
    problem = None
    if tensor.is_meta:
        problem = "a meta tensor, which has no values"
    elif tensor.is_quantized or tensor.layout != torch.strided or tensor.is_nested:
        problem = "quantized" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    elif tensor.dtype not in DTYPES:
        problem = str(tensor.dtype).removeprefix("torch.")
    elif tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        problem = f"shape {tuple(tensor.shape)} over {tensor.untyped_storage().nbytes()} bytes"
    if problem is not None:
        want = "a dense tensor of " + ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise CheckpointError("tensor cannot be read as weights", where=where, got=problem, want=want)


def check_ranks(states: Sequence[State], where: object) -> None:
    """Raise CheckpointError unless all tensor ranks hold readable tensors of the same names and shapes."""
    for rank, state in enumerate(states):
        for name, tensor in state.items():
            check_tensor(tensor, f"{where}, rank {rank}: {name}")
        differing = sorted(state.keys() ^ states[0].keys())
        if differing:
            lacking = rank if differing[0] in states[0] else 0
            raise CheckpointError("tensor ranks hold different weights", where=f"{where}: {differing[0]}", got=f"rank {lacking} lacks it")
        for name, tensor in state.items():
            if tensor.shape != states[0][name].shape:
                got = f"{tuple(states[0][name].shape)} on rank 0, {tuple(tensor.shape)} on rank {rank}"
                raise CheckpointError("tensor ranks hold different shapes", where=f"{where}: {name}", got=got)
