"""Norms that also carry the residual stream: the sum that a norm reads is formed inside the norm's kernel.

Every norm takes the output of the last branch (`delta`) and the residual stream it is still to be added to, and returns
the normed sum together with the sum.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from neox import ops
from neox.config.schema import ModelConfig
from neox.parallel.mesh import ONE_PROCESS, Mesh
from neox.parallel.shard_spec import ShardedLayer, ShardSpec

Pair = tuple[torch.Tensor, torch.Tensor]


class LayerNorm(ShardedLayer):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float, mesh: Mesh = ONE_PROCESS, *, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=mesh.device))
        self.bias = nn.Parameter(torch.empty(size, dtype=dtype, device=mesh.device))
        spec = ShardSpec.replicated(size, partial=mesh.sequence)
        self.sharding = {"weight": spec, "bias": spec}

    def forward(self, delta: torch.Tensor, stream: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(stream + delta), stream + delta); without a stream, (norm(delta), delta). All [..., h]."""
        if stream is None:
            return cast(torch.Tensor, ops.layer_norm(delta, self.weight, self.bias, self.eps)), delta
        return cast(Pair, ops.layer_norm(delta, self.weight, self.bias, self.eps, residual=stream))


class RMSNorm(ShardedLayer):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467).

    Args:
        size: elements of the last dimension.
        eps: added to the mean square.
        mesh: layout over processes; by default this process alone.
        dtype: dtype of the weight.
        per_head: the norm acts on heads, of which each tensor-parallel process sees others.
    """

    def __init__(
        self,
        size: int,
        eps: float,
        mesh: Mesh = ONE_PROCESS,
        *,
        dtype: torch.dtype = torch.float32,
        per_head: bool = False,
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=mesh.device))
        self.sharding = {"weight": ShardSpec.replicated(size, partial=mesh.tp > 1 and (per_head or mesh.sequence))}

    def forward(self, delta: torch.Tensor, stream: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(stream + delta), stream + delta); without a stream, (norm(delta), delta). All [..., h]."""
        if stream is None:
            return cast(torch.Tensor, ops.rms_norm(delta, self.weight, self.eps)), delta
        return cast(Pair, ops.rms_norm(delta, self.weight, self.eps, residual=stream))


def make_norm(config: ModelConfig, mesh: Mesh = ONE_PROCESS, dtype: torch.dtype = torch.float32) -> LayerNorm | RMSNorm:
    """The norm that config.norm selects, over hidden_size."""
    kind = LayerNorm if config.norm == "layernorm" else RMSNorm
    return kind(config.hidden_size, config.norm_eps, mesh, dtype=dtype)


def dual_norm(
    first: LayerNorm | RMSNorm, second: LayerNorm | RMSNorm, delta: torch.Tensor, stream: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two norms of one sum, for a parallel residual: (first(sum), second(sum), sum).

    The statistics are computed once.
    """
    if isinstance(first, LayerNorm) and isinstance(second, LayerNorm):
        out = ops.dual_layer_norm(
            delta, first.weight, first.bias, second.weight, second.bias, first.eps, residual=stream
        )
    else:
        out = ops.dual_rms_norm(delta, first.weight, second.weight, first.eps, residual=stream)
    return out[0], out[1], delta if stream is None else out[2]
