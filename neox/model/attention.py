"""The attention branch: one fused projection, rotation in place, exact attention on the packed buffer.

Rows of the fused projection are [g, m + 2, d]: for each of g key/value groups its m = n/g query heads, then its key, then
its value. With g = n that is GPT-NeoX's [n, 3, d]. Groups are cut over the tensor group, so a shard has the same form.

With context parallelism (DeepSpeed-Ulysses, arXiv 2309.14509) a process has a part of the sequence. Around the attention alone the
members of the context group exchange it for the whole sequence of a part of the groups, so that every mask stays what it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from neox import ops
from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.norm import RMSNorm
from neox.model.positional import alibi_slopes
from neox.ops.attention import MaskCache
from neox.parallel.collectives import SEQUENCE, redistribute
from neox.parallel.linear import ColumnParallelLinear, RowParallelLinear
from neox.parallel.mesh import Mesh, split_evenly
from neox.parallel.rng import tensor_parallel_stream

GROUPS = "model.num_kv_heads"
HEADS = 2  # dimension of [b, s, n, d] and [b, s, g, m + 2, d]


@dataclass(frozen=True)
class Context:
    """What every attention of one forward pass shares.

    Attributes:
        cos, sin: rotary table rows, fp32 [s, r] or [b, s, r]; None without rotation.
        segment_ids: int32 [b, t] over the whole sequence, attention only between equal ids; None: no borders.
        cache: keys and values of earlier tokens (neox.generate.cache); None: none.
        mask_cache: full masks, where attention needs them: the first layer makes them, the others share them.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    cache: Any = None
    mask_cache: MaskCache = field(default_factory=MaskCache)


class Attention(nn.Module):
    """qkv [g(m+2)d, h], out [h, n d], and per-head query and key norms where config.qk_norm asks for them."""

    def __init__(self, config: ModelConfig, mesh: Mesh, index: int, *, dtype: torch.dtype):
        super().__init__()
        heads, groups, self.head_dim = config.num_attention_heads, config.num_kv_heads, config.head_dim
        if heads % groups:
            raise ConfigError(
                "num_attention_heads is not a multiple of num_kv_heads",
                where=GROUPS,
                got=f"{heads} heads, {groups} kv heads",
                want="num_attention_heads a multiple of num_kv_heads",
            )
        self.index = index
        self.mesh = mesh
        self.queries = heads // groups
        rows = groups * (self.queries + 2) * self.head_dim
        self.qkv = ColumnParallelLinear(config.hidden_size, rows, mesh, units=groups, what=GROUPS, bias=config.qkv_bias, dtype=dtype)
        self.out = RowParallelLinear(heads * self.head_dim, config.hidden_size, mesh, units=groups, what=GROUPS, bias=config.attention_out_bias, dtype=dtype)
        self.query_norm = RMSNorm(self.head_dim, config.norm_eps, mesh, dtype=dtype, inside=True) if config.qk_norm else None
        self.key_norm = RMSNorm(self.head_dim, config.norm_eps, mesh, dtype=dtype, inside=True) if config.qk_norm else None
        self.backend = config.attention_backend
        self.window = config.sliding_window
        self.softcap = config.attention_softcap
        self.dropout = config.attention_dropout
        self.alibi: torch.Tensor | None = None
        if config.position_embedding == "alibi":
            low, high = (group * self.queries for group in split_evenly(groups, mesh, GROUPS))
            share = (high - low) // mesh.cp
            low, high = low + mesh.cp_rank * share, low + (mesh.cp_rank + 1) * share
            self.alibi = torch.tensor(alibi_slopes(heads)[low:high], dtype=torch.float32)  # fp32, no buffer: casting the model must not round it

    def forward(self, x: torch.Tensor, context: Context, partial: bool = False) -> torch.Tensor:
        """[b, s, h] -> [b, s, h]; with `partial`, without the sum over the tensor group and without out's bias."""
        return self.out(self.mix(x, context), partial)

    def mix(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """[b, s, h] -> the heads' outputs side by side [b, s, n d/tp], before the output projection."""
        qkv = self.qkv(x)  # [b, s, g(m+2)d/tp]
        if self.query_norm is None and context.cache is None:
            mixed = self._attend(ops.attention_qkv, (self._packed(qkv, context),), context)
        else:
            mixed = self._attend(ops.attention, self._split(self._grouped(qkv), context), context)
        return mixed.flatten(2)

    def _grouped(self, qkv: torch.Tensor) -> torch.Tensor:
        """[b, s, g(m+2)d/tp] -> [b, s, g/tp, m + 2, d]."""
        return qkv.unflatten(2, (-1, self.queries + 2, self.head_dim))

    def _packed(self, qkv: torch.Tensor, context: Context) -> torch.Tensor:
        """The grouped projection, rotated in place."""
        if context.cos is None:
            return self._grouped(qkv)
        groups = qkv.shape[2] // ((self.queries + 2) * self.head_dim)
        return ops.rotary_qkv(qkv, context.cos, context.sin, num_kv_heads=groups, head_dim=self.head_dim)

    def _split(self, qkv: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normed and rotated q [b, s, n/tp, d] and, with the cached ones before them, k and v [b, t, g/tp, d]."""
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q)[0], self.key_norm(k)[0]
        if context.cos is not None:
            q, k = ops.rotary(q, k, context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        return q, k, v

    def _attend(self, attention, operands: tuple[torch.Tensor, ...], context: Context) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.alibi is not None and self.alibi.device != operands[0].device:
            self.alibi = self.alibi.to(operands[0].device)
        group = self.mesh.cp_group
        operands = tuple(redistribute(x, HEADS, SEQUENCE, group) for x in operands)
        with tensor_parallel_stream(self.mesh, operands[0].device, differs=dropout > 0):
            mixed = attention(
                *operands,
                causal=True,
                window=self.window,
                segment_ids=context.segment_ids,
                alibi_slopes=self.alibi,
                softcap=self.softcap,
                dropout_p=dropout,
                backend=self.backend,
                mask_cache=context.mask_cache,
            )
        return redistribute(mixed, SEQUENCE, HEADS, group)
