"""Linear layers sharded over the tensor group, by output rows (column parallel) or by input columns (row parallel).

The residual stream between them is replicated over the group or, with sequence parallelism, cut along the sequence
(arXiv:2205.05198). A column-parallel layer reads it, a row-parallel layer produces it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from neox import ops
from neox.ops.linear import linear_input_gradient, linear_weight_gradient
from neox.parallel.collectives import (
    SEQUENCE,
    all_gather,
    reduce_from,
    reduce_scatter_from,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from neox.parallel.mesh import Mesh, split_evenly
from neox.parallel.shard_spec import ShardedLayer, ShardSpec


class _ColumnProducts(torch.autograd.Function):
    """x W_i^T + b_i for several cut weights of one input [b, s, i].

    The products are [b s, o_i] and no views, so that they may be changed in place. In the backward the gradients of x
    are summed over the group once for all weights, while the gradients of the weights are computed. With sequence
    parallelism the gathered input is not stored: it is gathered again while dx is computed.
    """

    @staticmethod
    def forward(ctx, x, mesh, *tensors):
        ctx.mesh = mesh
        count = len(tensors) // 2
        weights, biases = tensors[:count], tensors[count:]
        ctx.save_for_backward(x, *weights)
        ctx.biased = tuple(bias is not None for bias in biases)
        full = all_gather(x, SEQUENCE, mesh.tp_group) if mesh.sequence else x
        ctx.shape = full.shape
        rows = full.flatten(0, -2)
        return tuple(ops.linear(rows, weight, bias) for weight, bias in zip(weights, biases, strict=True))

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
            if mesh.sequence:
                reducing = start_reduce_scatter(dx, SEQUENCE, mesh.tp_group)
            else:
                reducing = start_all_reduce(dx, mesh.tp_group)
        rows = (x if gathering is None else gathering.wait()).flatten(0, -2)
        dweights, dbiases = [], []
        for i, dy in enumerate(dys):
            needs_bias = ctx.biased[i] and needs[len(dys) + i]
            dweight, dbias = linear_weight_gradient(dy, rows, weights[i], needs[i], needs_bias)
            dweights.append(dweight)
            dbiases.append(dbias)
        return None if reducing is None else reducing.wait(), None, *dweights, *dbiases


def column_products(
    x: torch.Tensor, mesh: Mesh, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """x W_i^T + b_i for weights sharded by rows over the tensor group.

    Args:
        x: [b, s, i]; with sequence parallelism [b, s/tp, i].
        mesh: gives the tensor group.
        weights: each [o_i/tp, i].
        biases: each [o_i/tp] or None.

    Returns:
        each [b, s, o_i/tp].
    """
    if mesh.tp_group is None:
        return tuple(ops.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))
    b, s = x.shape[:2]
    s = s * mesh.tp if mesh.sequence else s
    return tuple(y.view(b, s, -1) for y in _ColumnProducts.apply(x, mesh, *weights, *biases))


def reduce_partial(x: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """The sum over the tensor group of [b, s, h]; with sequence parallelism the local [b, s/tp, h] of it."""
    return reduce_scatter_from(x, SEQUENCE, mesh.tp_group) if mesh.sequence else reduce_from(x, mesh.tp_group)


class AdaptableLinear(ShardedLayer):
    """A cut weight W to which a low-rank adapter can be added: W + scale B A (LoRA, arXiv:2106.09685).

    The sum is formed before the product with x. Training therefore computes, bit for bit, what the merged weight
    computes, under every layout and without communication. It costs a second copy of W while a block is computed.

    Attributes:
        weight: W, [o, i] or its local slice.
        bias: [o] or its local slice; None without a bias.
        lora_a, lora_b: A [rank, i] and B [o, rank] or their local slices; None without an adapter.
        scale: factor on B A.
        mesh: layout over processes.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_a: nn.Parameter | None
    lora_b: nn.Parameter | None
    mesh: Mesh

    def __init__(self):
        super().__init__()
        self.register_parameter("lora_a", None)
        self.register_parameter("lora_b", None)
        self.scale = 0.0

    def add_adapter(self, rank: int, scale: float) -> None:
        """Add A [rank, i] and B [o, rank], cut as W is. Their values are not set."""
        spec, device, dtype = self.sharding["weight"], self.weight.device, self.weight.dtype
        rows, columns = self.weight.shape
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, columns, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.empty(rows, rank, dtype=dtype, device=device))
        a, b = (rank, spec.shape[1]), (spec.shape[0], rank)
        # each process computes only a part of the gradient of the factor that is not cut
        if spec.dim == 0:
            self.sharding["lora_a"] = ShardSpec.replicated(*a, partial=True)
            self.sharding["lora_b"] = ShardSpec.sharded(b, 0, *spec.slices[0])
        else:
            self.sharding["lora_a"] = ShardSpec.sharded(a, 1, *spec.slices[1])
            self.sharding["lora_b"] = ShardSpec.replicated(*b, partial=True)

    def matrix(self) -> torch.Tensor:
        """W [o, i], with the adapter added where there is one."""
        if self.lora_a is None or self.lora_b is None:
            return self.weight
        return merge_adapter(self.weight, self.lora_a, self.lora_b, self.scale)


def merge_adapter(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """weight + scale b a: [o, i], [r, i], [o, r] -> [o, i]."""
    return torch.addmm(weight, b, a, alpha=scale)


class ColumnParallelLinear(AdaptableLinear):
    """y = x W^T + b with W and b sharded by rows over the tensor group: [..., i] -> [..., o/tp].

    Args:
        in_features: i.
        out_features: o, the logical rows.
        mesh: gives the tensor group.
        units: the number of equal units that the rows consist of, which are never cut: key/value heads of a fused QKV,
            channels of an MLP.
        what: the config key of `units`, for errors.
        bias: whether there is a bias.
        dtype: dtype of the parameters.

    Raises:
        ConfigError: `units` is no multiple of the tensor-parallel size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: Mesh,
        *,
        units: int,
        what: str,
        bias: bool,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.mesh = mesh
        low, high = (unit * (out_features // units) for unit in split_evenly(units, mesh, what))
        self.weight = nn.Parameter(torch.empty(high - low, in_features, dtype=dtype, device=mesh.device))
        self.sharding = {"weight": ShardSpec.sharded((out_features, in_features), 0, low, high)}
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(high - low, dtype=dtype, device=mesh.device))
            self.sharding["bias"] = ShardSpec.sharded((out_features,), 0, low, high)

    def forward(self, x: torch.Tensor, add_bias: bool = True) -> torch.Tensor:
        """[..., i] -> [..., o/tp]; without the bias where the next activation adds it in its own kernel."""
        bias = self.bias if add_bias else None
        if self.mesh.tp_group is None:
            return ops.linear(x, self.matrix(), bias)
        return column_products(x, self.mesh, (self.matrix(),), (bias,))[0]


class RowParallelLinear(AdaptableLinear):
    """y = x W^T + b with W sharded by columns over the tensor group and b replicated: [..., i/tp] -> [..., o].

    Arguments and errors as for `ColumnParallelLinear`; `units` are of the columns.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        mesh: Mesh,
        *,
        units: int,
        what: str,
        bias: bool,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.mesh = mesh
        low, high = (unit * (in_features // units) for unit in split_evenly(units, mesh, what))
        self.weight = nn.Parameter(torch.empty(out_features, high - low, dtype=dtype, device=mesh.device))
        self.sharding = {"weight": ShardSpec.sharded((out_features, in_features), 1, low, high)}
        self.bias = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=mesh.device))
            self.sharding["bias"] = ShardSpec.replicated(out_features, partial=mesh.sequence)

    def forward(self, x: torch.Tensor, partial: bool = False) -> torch.Tensor:
        """Multiply, and sum over the group; the bias is added once, after the sum.

        Args:
            x: [..., i/tp].
            partial: return the local term of the sum, without bias, so that several layers can share one reduction
                (`reduce_partial`).

        Returns:
            [..., o].
        """
        if partial:
            return ops.linear(x, self.matrix())
        if self.mesh.tp_group is None:
            return ops.linear(x, self.matrix(), self.bias)
        y = reduce_partial(ops.linear(x, self.matrix()), self.mesh)
        return y if self.bias is None else y + self.bias
