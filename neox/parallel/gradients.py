"""Gradients of replicated parameters of which each tensor-parallel process computes only a part."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from neox.parallel.collectives import all_reduce
from neox.parallel.mesh import Mesh
from neox.parallel.shard_spec import ShardSpec


def sum_partial_gradients(module: nn.Module, specs: Mapping[str, ShardSpec], mesh: Mesh) -> None:
    """Register hooks that sum over the tensor group the gradients of parameters whose spec is `partial`.

    These are norm weights and biases under sequence parallelism (each process sees its part of the sequence), per-head
    norms (each sees its heads) and adapter factors. The hook runs when the gradient arrives, before anything
    accumulates, clips or reduces it, so that it holds for every ZeRO stage. All processes run the same graph, hence the
    same order.
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
