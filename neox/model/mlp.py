"""The feed-forward branch: plain (up, activation, down) or gated (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from neox import ops
from neox.config.schema import GATED, ModelConfig
from neox.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_products
from neox.parallel.mesh import Mesh

WIDTH = "model.intermediate_size"


def _plain_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """activation(x + bias), the bias fused where the kernel takes it."""
    if bias is not None and activation in ("gelu", "gelu_tanh"):
        return ops.bias_gelu(x, bias, approximate="none" if activation == "gelu" else "tanh")
    x = x if bias is None else x + bias
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="none" if activation == "gelu" else "tanh")


class MLP(nn.Module):
    """up [f, h], gate [f, h] where gated, down [h, f]; f = intermediate_size is cut over the tensor group."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, dtype: torch.dtype, recompute: bool = False):
        super().__init__()
        hidden, width, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.mesh = mesh
        self.activation = config.activation
        self.recompute = recompute
        self.up = ColumnParallelLinear(hidden, width, mesh, units=width, what=WIDTH, bias=bias, dtype=dtype)
        self.gate = ColumnParallelLinear(hidden, width, mesh, units=width, what=WIDTH, bias=bias, dtype=dtype) if config.gated else None
        self.down = RowParallelLinear(width, hidden, mesh, units=width, what=WIDTH, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor, partial: bool = False) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; with `partial`, without the sum over the tensor group and without down's bias."""
        inner = self._widen(x)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(lambda *inner: self.down(self._activate(*inner), partial), *inner, use_reentrant=False)
        return self.down(self._activate(*inner), partial)

    def _widen(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Up, or gate and up, each [b, s, f/tp]; gate and up share one gathering of x and one reduction of its gradient."""
        if self.gate is None:
            return (self.up(x, add_bias=False),)
        if self.mesh.tp == 1:
            return self.gate(x), self.up(x)
        return column_products(x, self.mesh, (self.gate.matrix(), self.up.matrix()), (self.gate.bias, self.up.bias))

    def _activate(self, *inner: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return _plain_activation(*inner, self.up.bias, self.activation)
        return ops.gated(*inner, activation=GATED[self.activation])
