"""The MLP: up, activation, down; or gated (arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from neox import ops
from neox.config.schema import GATED, ModelConfig
from neox.parallel.linear import ColumnParallelLinear, RowParallelLinear, column_products
from neox.parallel.mesh import ONE_PROCESS, Mesh

WIDTH = "model.intermediate_size"


class MLP(nn.Module):
    """down(activation(up(x))), or gated down(activation(gate(x)) * up(x)).

    Parameters: up [f, h], gate [f, h] where gated, down [h, f], with biases where config.mlp_bias asks for them. Tensor
    parallelism cuts f.

    Args:
        config: the architecture.
        mesh: layout over processes; by default this process alone.
        dtype: dtype of the parameters.
        recompute: recompute the activation in the backward instead of storing it.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh = ONE_PROCESS,
        *,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
    ):
        super().__init__()
        h, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.mesh = mesh
        self.activation = config.activation
        self.recompute = recompute
        self.up = ColumnParallelLinear(h, f, mesh, units=f, what=WIDTH, bias=bias, dtype=dtype)
        self.gate: ColumnParallelLinear | None = None
        if config.gated:
            self.gate = ColumnParallelLinear(h, f, mesh, units=f, what=WIDTH, bias=bias, dtype=dtype)
        self.down = RowParallelLinear(f, h, mesh, units=f, what=WIDTH, bias=bias, dtype=dtype)

    def forward(self, x: torch.Tensor, partial: bool = False) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; with `partial`, without the sum over the tensor group and the bias of down."""
        if self.gate is None:
            inner: tuple[torch.Tensor, ...] = (self.up(x, add_bias=False),)
        elif self.mesh.tp == 1:
            inner = self.gate(x), self.up(x)
        else:  # one gather of x and one reduction of its gradient for both
            weights, biases = (self.gate.matrix(), self.up.matrix()), (self.gate.bias, self.up.bias)
            inner = column_products(x, self.mesh, weights, biases)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(lambda *inner: self.down(self._activate(*inner), partial), *inner, use_reentrant=False)
        return self.down(self._activate(*inner), partial)

    def _activate(self, *inner: torch.Tensor) -> torch.Tensor:
        """Products of gate and up, or of up alone and without its bias, each [b, s, f/tp] -> [b, s, f/tp]."""
        if self.gate is None:
            return bias_activation(inner[0], self.up.bias, self.activation)
        return ops.gated(inner[0], inner[1], activation=GATED[self.activation])


def bias_activation(x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """activation(x + bias) for x [..., f] and bias [f]; one kernel where there is one for the activation."""
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    if bias is not None and activation in ("gelu", "gelu_tanh"):
        return ops.bias_gelu(x, bias, approximate=approximate)
    x = x if bias is None else x + bias
    if activation == "relu":
        return F.relu(x)
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate=approximate)
