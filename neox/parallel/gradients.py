"""Gradients of parameters that every member of the tensor group holds whole but sees only in part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from neox.parallel.collectives import all_reduce
from neox.parallel.mesh import Mesh
from neox.parallel.shard_spec import ShardSpec


def sum_partial_gradients(module: nn.Module, specs: Mapping[str, ShardSpec], mesh: Mesh) -> None:
    """Make the backward sum the gradients of parameters whose layout says `partial` over the tensor group.

    Norm weights and biases under sequence parallelism (each member sees its part of the sequence) and per-head norms (each member
    sees its heads). The sum happens as the gradient arrives, before anything accumulates, clips or reduces it, so that it holds under every
    ZeRO stage; members run the same graph, so they meet in the same order.
    """
    if mesh.tp_group is None:
        return
    for name, parameter in module.named_parameters():
        if specs[name].partial and parameter.requires_grad:
            parameter.register_hook(_Sum(mesh.tp_group))


class _Sum:
    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return all_reduce(gradient, self.group)
