"""Linear layers cut over the tensor group, by output rows (column parallel) or by input columns (row parallel).

The residual stream outside is whole on every member, or, with sequence parallelism, cut over the group along the sequence
(arXiv 2205.05198). A column-parallel layer takes it in, a row-parallel layer gives it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from neox import ops
from neox.ops.linear import linear_input_gradient, linear_weight_gradient
from neox.parallel.collectives import SEQUENCE, all_gather, reduce_from, reduce_scatter_from, start_all_gather, start_all_reduce, start_reduce_scatter
from neox.parallel.mesh import Mesh, split_evenly
from neox.parallel.shard_spec import ShardSpec


class _ColumnProducts(torch.autograd.Function):
    """x W_i^T + b_i for several cut weights of one input [b, s, i]; the products are [b s, o_i], no views, so that they may be changed in place.

    In the backward the gradients of x are summed over the group once for all weights, while the gradients of the weights are
    computed. With sequence parallelism the gathered input is not kept: it is gathered again while dx is computed.
    """

    @staticmethod
    def forward(ctx, x, mesh, *tensors):
        ctx.mesh = mesh
        count = len(tensors) // 2
        weights, biases = tensors[:count], tensors[count:]
        ctx.save_for_backward(x, *weights)
        ctx.biased = tuple(bias is not None for bias in biases)
        whole = all_gather(x, SEQUENCE, mesh.tp_group) if mesh.sequence else x
        ctx.shape = whole.shape
        return tuple(ops.linear(whole.flatten(0, -2), weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx, *dys):
        x, *weights = ctx.saved_tensors
        mesh = ctx.mesh
        needs = ctx.needs_input_grad[2:]
        gathering = start_all_gather(x, SEQUENCE, mesh.tp_group) if mesh.sequence and any(needs) else None
        reducing = None
        if ctx.needs_input_grad[0]:
            dx = linear_input_gradient(dys[0], weights[0])
            for dy, weight in zip(dys[1:], weights[1:], strict=True):
                dx += linear_input_gradient(dy, weight)
            dx = dx.view(ctx.shape)
            reducing = start_reduce_scatter(dx, SEQUENCE, mesh.tp_group) if mesh.sequence else start_all_reduce(dx, mesh.tp_group)
        whole = (x if gathering is None else gathering.wait()).flatten(0, -2)
        dweights, dbiases = [], []
        for i, dy in enumerate(dys):
            needs_bias = ctx.biased[i] and needs[len(dys) + i]
            dweight, dbias = linear_weight_gradient(dy, whole, weights[i], needs[i], needs_bias)
            dweights.append(dweight)
            dbiases.append(dbias)
        return None if reducing is None else reducing.wait(), None, *dweights, *dbiases


def column_products(x: torch.Tensor, mesh: Mesh, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
    """x W_i^T + b_i for weights cut by rows over the tensor group: x [b, s, i] or, with sequence parallelism, [b, s/tp, i] -> each [b, s, o_i/tp]."""
    if mesh.tp_group is None:
        return tuple(ops.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    b, s = x.shape[:2]
    return tuple(y.view(b, s * mesh.tp if mesh.sequence else s, -1) for y in _ColumnProducts.apply(x, mesh, *weights, *biases))


def reduce_partial(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The sum of the members' parts [b, s, h]: whole, or the own [b, s/tp, h] with sequence parallelism."""
    return reduce_scatter_from(x, SEQUENCE, mesh.tp_group) if mesh.sequence else reduce_from(x, mesh.tp_group)


class AdaptableLinear(nn.Module):
    """A cut weight W to which a low-rank adapter can be added: W + scale B A (LoRA, arXiv 2106.09685).

    The product is formed before the layer's own: what is trained is, to the bit, what a merged weight computes, under every layout of
    processes, without communication of its own. It costs a second copy of W while a block is computed.
    """

    weight: nn.Parameter
    mesh: Mesh
    shard_specs: dict[str, ShardSpec]

    def __init__(self):
        super().__init__()
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.scale = 0.0

    def adapt(self, rank: int, scale: float) -> None:
        """Add A [rank, i] and B [o, rank], cut as W is; their values are not set."""
        place, device, dtype = self.shard_specs["weight"], self.weight.device, self.weight.dtype
        rows, columns = self.weight.shape
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, columns, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(rows, rank, dtype=dtype, device=device))
        by_rows = place.dim == 0
        a, b = (rank, place.shape[1]), (place.shape[0], rank)
        # The factor that is not cut sees a part of W's gradient on each member: `partial`.
        self.shard_specs["lora_a"] = ShardSpec.replicated(*a, partial=True) if by_rows else ShardSpec.sharded(a, 1, *place.slices[1])
        self.shard_specs["lora_b"] = ShardSpec.sharded(b, 0, *place.slices[0]) if by_rows else ShardSpec.replicated(*b, partial=True)

    def matrix(self) -> torch.Tensor:
        """W [o, i], with the adapter's product where there is one."""
        return self.weight if self.lora_a is None else merge_adapter(self.weight, self.lora_a, self.lora_b, self.scale)


def merge_adapter(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """weight + scale b a: [o, i], [r, i], [o, r] -> [o, i]."""
    return torch.addmm(weight, b, a, alpha=scale)


class ColumnParallelLinear(AdaptableLinear):
    """y = x W^T + b with the rows of W and b cut over the tensor group: [..., i] -> [..., o/tp].

    Args:
        in_features: i.
        out_features: o, the logical rows.
        units: the number of equal units the rows consist of (kv groups of a fused QKV, channels of an MLP); units are never cut.
        what: the config key behind `units`, for errors.
    """

    def __init__(self, in_features: int, out_features: int, mesh: Mesh, *, units: int, what: str, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.mesh = mesh
        low, high = (unit * (out_features // units) for unit in split_evenly(units, mesh, what))
        self.weight = nn.Parameter(torch.empty(high - low, in_features, dtype=dtype, device=mesh.device))
        self.shard_specs = {"weight": ShardSpec.sharded((out_features, in_features), 0, low, high)}
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(high - low, dtype=dtype, device=mesh.device))
            self.shard_specs["bias"] = ShardSpec.sharded((out_features,), 0, low, high)

    def forward(self, x: torch.Tensor, add_bias: bool = True) -> torch.Tensor:
        """[..., i] -> [..., o/tp]; without the bias where the activation that follows fuses it."""
        return column_products(x, self.mesh, (self.matrix(),), (self.bias if add_bias else None,))[0]


class RowParallelLinear(AdaptableLinear):
    """y = x W^T + b with the columns of W cut over the tensor group; b is whole on every member: [..., i/tp] -> [..., o]."""

    def __init__(self, in_features: int, out_features: int, mesh: Mesh, *, units: int, what: str, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.mesh = mesh
        low, high = (unit * (in_features // units) for unit in split_evenly(units, mesh, what))
        self.weight = nn.Parameter(torch.empty(out_features, high - low, dtype=dtype, device=mesh.device))
        self.shard_specs = {"weight": ShardSpec.sharded((out_features, in_features), 1, low, high)}
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=mesh.device))
            self.shard_specs["bias"] = ShardSpec.replicated(out_features, partial=mesh.sequence)

    def forward(self, x: torch.Tensor, partial: bool = False) -> torch.Tensor:
        """[..., i/tp] -> [..., o], summed over the group; the bias is added once, after the sum.

        With `partial`, this member's part of the sum without bias, so that several layers can share one reduction (`reduce_partial`).
        """
        if partial:
            return ops.linear(x, self.matrix())
        if self.mesh.tp_group is None:
            return ops.linear(x, self.matrix(), self.bias)
        y = reduce_partial(ops.linear(x, self.matrix()), self.mesh)
        return y if self.bias is None else y + self.bias
