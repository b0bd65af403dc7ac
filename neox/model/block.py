"""One transformer block, in its sequential and its parallel form."""

from __future__ import annotations

import torch
from torch import nn

from neox import ops
from neox.config.schema import ModelConfig
from neox.model.attention import Attention, Context
from neox.model.mlp import MLP
from neox.model.norm import LayerNorm, RMSNorm, dual_norm, make_norm
from neox.parallel.linear import reduce_partial
from neox.parallel.mesh import ONE_PROCESS, Mesh
from neox.parallel.rng import tensor_parallel_stream

Residual = tuple[torch.Tensor, torch.Tensor | None]  # (stream, delta), each [b, s, h]


class Block(nn.Module):
    """Attention and MLP around the residual stream; `make_block` builds the form that a config asks for.

    A block takes and returns (stream, delta). Their sum is the residual stream; the next norm computes it inside its
    kernel. delta is None where nothing is left to add.

    Args:
        config: the architecture.
        mesh: layout over processes; by default this process alone.
        index: number of the block.
        dtype: dtype of the parameters.
        recompute_mlp: recompute the activation of the MLP in the backward instead of storing it.
    """

    norm2: LayerNorm | RMSNorm | None

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh = ONE_PROCESS,
        index: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        recompute_mlp: bool = False,
    ):
        super().__init__()
        self.dropout = config.hidden_dropout
        self.mesh = mesh
        self.norm1 = make_norm(config, mesh, dtype)
        self.attention = Attention(config, mesh, index, dtype=dtype)
        shared = config.parallel_residual and config.shared_residual_norm
        self.norm2 = None if shared else make_norm(config, mesh, dtype)
        self.mlp = MLP(config, mesh, dtype=dtype, recompute=recompute_mlp)

    def forward(self, stream: torch.Tensor, delta: torch.Tensor | None, context: Context) -> Residual:
        """(stream, delta) of the previous block, each [b, s, h] -> those of this block."""
        raise NotImplementedError

    @staticmethod
    def _norm(
        norm: LayerNorm | RMSNorm, stream: torch.Tensor, delta: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return norm(stream) if delta is None else norm(delta, stream)

    def _has_dropout(self) -> bool:
        return self.training and self.dropout > 0.0

    def _dropout_add(self, partial: torch.Tensor, bias: torch.Tensor | None, stream: torch.Tensor) -> torch.Tensor:
        """stream + dropout(sum over the tensor group of partial + bias)."""
        branch = reduce_partial(partial, self.mesh)
        # with sequence parallelism each process has other tokens: their masks must differ
        with tensor_parallel_stream(self.mesh, stream.device, differs=self.mesh.sequence):
            return ops.bias_dropout_add(branch, bias, stream, self.dropout, True)


class SequentialBlock(Block):
    """y = x + attention(norm1(x)), then y + mlp(norm2(y)) (GPT-2, Llama)."""

    norm2: LayerNorm | RMSNorm

    def forward(self, stream: torch.Tensor, delta: torch.Tensor | None, context: Context) -> Residual:
        """(stream, delta) of the previous block, each [b, s, h] -> those of this block."""
        normed, stream = self._norm(self.norm1, stream, delta)
        if self._has_dropout():
            attended = self.attention(normed, context, partial=True)
            stream, delta = self._dropout_add(attended, self.attention.out.bias, stream), None
        else:
            delta = self.attention(normed, context)
        normed, stream = self._norm(self.norm2, stream, delta)
        if self._has_dropout():
            return self._dropout_add(self.mlp(normed, partial=True), self.mlp.down.bias, stream), None
        return stream, self.mlp(normed)


class ParallelBlock(Block):
    """x + attention(norm1(x)) + mlp(norm2(x)) (GPT-NeoX), or with one norm for both branches (GPT-J)."""

    def forward(self, stream: torch.Tensor, delta: torch.Tensor | None, context: Context) -> Residual:
        """(stream, delta) of the previous block, each [b, s, h] -> those of this block.

        Both branches share one reduction over the tensor group, unless dropout has to see them separately.
        """
        if self.norm2 is None:
            for_attention, stream = self._norm(self.norm1, stream, delta)
            for_mlp = for_attention
        elif delta is None:
            for_attention, for_mlp, stream = dual_norm(self.norm1, self.norm2, stream, None)
        else:
            for_attention, for_mlp, stream = dual_norm(self.norm1, self.norm2, delta, stream)
        attended, fed = self.attention(for_attention, context, partial=True), self.mlp(for_mlp, partial=True)
        bias1, bias2 = self.attention.out.bias, self.mlp.down.bias
        if self._has_dropout():
            return self._dropout_add(fed, bias2, self._dropout_add(attended, bias1, stream)), None
        bias = bias1 + bias2 if bias1 is not None and bias2 is not None else bias1 if bias2 is None else bias2
        if self.mesh.tp == 1:
            return stream, ops.bias_dropout_add(attended, bias, fed, 0.0, False)
        total = reduce_partial(attended + fed, self.mesh)
        return stream, total if bias is None else total + bias


def make_block(
    config: ModelConfig,
    mesh: Mesh = ONE_PROCESS,
    index: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    recompute_mlp: bool = False,
) -> Block:
    """The block that config.parallel_residual selects; arguments as for `Block`."""
    kind = ParallelBlock if config.parallel_residual else SequentialBlock
    return kind(config, mesh, index, dtype=dtype, recompute_mlp=recompute_mlp)
