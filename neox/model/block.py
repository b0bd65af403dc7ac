"""One transformer block in its three residual forms."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neox import ops
from neox.config.schema import ModelConfig
from neox.model.attention import Attention, Context
from neox.model.decode import decoder
from neox.model.mlp import MLP
from neox.model.norm import dual_norm, make_norm
from neox.parallel.linear import reduce_partial
from neox.parallel.mesh import Mesh
from neox.parallel.rng import tensor_parallel_stream

Residual = tuple[torch.Tensor, torch.Tensor | None]  # (stream, delta), each [b, s, h]


class Block(nn.Module):
    """Attention and MLP around the residual stream.

    A block passes on (stream, delta): the residual stream is their sum, and the next norm forms it inside its own kernel. delta
    is None where nothing is left to add.

    Forms (u = norm1, w = norm2): sequential y + mlp(w(y)) with y = x + attn(u(x)); parallel x + attn(u(x)) + mlp(w(x));
    parallel with a shared norm x + attn(u(x)) + mlp(u(x)).
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, index: int, *, dtype: torch.dtype, activation_checkpointing: str = "none"):
        super().__init__()
        self.parallel = config.parallel_residual
        self.dropout = config.hidden_dropout
        self.mesh = mesh
        self.recompute = activation_checkpointing == "full"
        self.norm1 = make_norm(config, mesh, dtype)
        self.attention = Attention(config, mesh, index, dtype=dtype)
        shared = config.parallel_residual and config.shared_residual_norm
        self.norm2 = None if shared else make_norm(config, mesh, dtype)
        self.mlp = MLP(config, mesh, dtype=dtype, recompute=activation_checkpointing == "selective")

    def forward(self, stream: torch.Tensor, delta: torch.Tensor | None, context: Context) -> Residual:
        """(stream, delta) of the block before -> those of this block."""
        if (decode := decoder(self, stream, context)) is not None:
            return decode(stream, delta, context)
        run = self._parallel if self.parallel else self._sequential
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(run, stream, delta, context, use_reentrant=False)
        return run(stream, delta, context)

    def _sequential(self, stream: torch.Tensor, delta: torch.Tensor | None, context: Context) -> Residual:
        normed, stream = self._norm(self.norm1, stream, delta)
        if self._drops():
            stream, delta = self._drop(self.attention(normed, context, partial=True), self.attention.out.bias, stream), None
        else:
            delta = self.attention(normed, context)
        normed, stream = self._norm(self.norm2, stream, delta)
        if self._drops():
            return self._drop(self.mlp(normed, partial=True), self.mlp.down.bias, stream), None
        return stream, self.mlp(normed)

    def _parallel(self, stream: torch.Tensor, delta: torch.Tensor | None, context: Context) -> Residual:
        """One reduction over the tensor group serves both branches, unless dropout must see them apart."""
        if self.norm2 is None:
            for_attention, stream = self._norm(self.norm1, stream, delta)
            for_mlp = for_attention
        elif delta is None:
            for_attention, for_mlp, stream = dual_norm(self.norm1, self.norm2, stream, None)
        else:
            for_attention, for_mlp, stream = dual_norm(self.norm1, self.norm2, delta, stream)
        attended, fed = self.attention(for_attention, context, partial=True), self.mlp(for_mlp, partial=True)
        bias1, bias2 = self.attention.out.bias, self.mlp.down.bias
        if self._drops():
            return self._drop(fed, bias2, self._drop(attended, bias1, stream)), None
        bias = bias1 + bias2 if bias1 is not None and bias2 is not None else bias1 if bias2 is None else bias2
        if self.mesh.tp == 1:
            return stream, ops.bias_dropout_add(attended, bias, fed, 0.0, False)
        total = reduce_partial(attended + fed, self.mesh)
        return stream, total if bias is None else total + bias

    @staticmethod
    def _norm(norm: nn.Module, stream: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return norm(stream) if delta is None else norm(delta, stream)

    def _drops(self) -> bool:
        return self.training and self.dropout > 0.0

    def _drop(self, partial: torch.Tensor, bias: torch.Tensor | None, stream: torch.Tensor) -> torch.Tensor:
        """stream + dropout(sum over the tensor group of partial + bias)."""
        branch = reduce_partial(partial, self.mesh)
        with tensor_parallel_stream(self.mesh, stream.device, differs=self.mesh.sequence):  # members see other tokens: their masks must differ
            return ops.bias_dropout_add(branch, bias, stream, self.dropout, True)
