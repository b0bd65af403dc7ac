"""Linear layers cut over the tensor group, by output rows (column parallel) or by input columns (row parallel)."""

from __future__ import annotations

import torch
from torch import nn

from neox import ops
from neox.parallel.collectives import copy_to, reduce_from
from neox.parallel.mesh import Layout, Mesh, split_evenly


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b with the rows of W and b cut over the tensor group: [..., i] -> [..., o/tp].

    Args:
        in_features: i.
        out_features: o, the logical rows.
        units: the number of equal units the rows consist of (kv groups of a fused QKV, channels of an MLP); units are never cut.
        what: the config key behind `units`, for errors.
    """

    def __init__(self, in_features: int, out_features: int, mesh: Mesh, *, units: int, what: str, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.group = mesh.tp_group
        low, high = (unit * (out_features // units) for unit in split_evenly(units, mesh, what))
        self.weight = nn.Parameter(torch.empty(high - low, in_features, dtype=dtype, device=mesh.device))
        self.layouts = {"weight": Layout.cut((out_features, in_features), 0, low, high)}
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(high - low, dtype=dtype, device=mesh.device))
            self.layouts["bias"] = Layout.cut((out_features,), 0, low, high)

    def forward(self, x: torch.Tensor, add_bias: bool = True) -> torch.Tensor:
        """[..., i] -> [..., o/tp]; without the bias where the activation that follows fuses it."""
        return ops.linear(copy_to(x, self.group), self.weight, self.bias if add_bias else None)


class RowParallelLinear(nn.Module):
    """y = x W^T + b with the columns of W cut over the tensor group; b is whole on every member: [..., i/tp] -> [..., o]."""

    def __init__(self, in_features: int, out_features: int, mesh: Mesh, *, units: int, what: str, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.group = mesh.tp_group
        low, high = (unit * (in_features // units) for unit in split_evenly(units, mesh, what))
        self.weight = nn.Parameter(torch.empty(out_features, high - low, dtype=dtype, device=mesh.device))
        self.layouts = {"weight": Layout.cut((out_features, in_features), 1, low, high)}
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=mesh.device))
            self.layouts["bias"] = Layout.whole(out_features)

    def forward(self, x: torch.Tensor, partial: bool = False) -> torch.Tensor:
        """[..., i/tp] -> [..., o], summed over the group; the bias is added once, after the sum.

        With `partial`, this member's part of the sum without bias, so that several layers can share one reduction.
        """
        if partial:
            return ops.linear(x, self.weight)
        if self.group is None:
            return ops.linear(x, self.weight, self.bias)
        y = reduce_from(ops.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias
