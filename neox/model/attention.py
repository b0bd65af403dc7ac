"""The attention layer: one fused projection, rotation in place, exact attention on the packed buffer.

Rows of the fused projection are [g, m + 2, d]: for each of g key/value heads its m = n / g query heads, then its key,
then its value. With g = n that is GPT-NeoX's [n, 3, d]. Tensor parallelism cuts over g, so a shard has the same form.

With context parallelism (DeepSpeed-Ulysses, arXiv:2309.14509) a process holds a part of the sequence. Around the
attention alone the context group redistributes the complete sequence of a part of the heads, so that masks need no
change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from neox import ops
from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.model.kv_cache import KVCache
from neox.model.norm import RMSNorm
from neox.model.positional import RotaryTable, alibi_slopes
from neox.ops.attention import MaskCache
from neox.parallel.collectives import SEQUENCE, redistribute
from neox.parallel.linear import ColumnParallelLinear, RowParallelLinear
from neox.parallel.mesh import ONE_PROCESS, Mesh, split_evenly
from neox.parallel.rng import tensor_parallel_stream

KV_HEADS = "model.num_kv_heads"
HEADS = 2  # dimension of [b, s, n, d] and [b, s, g, m + 2, d]


@dataclass(frozen=True)
class Context:
    """What the attention layers of one forward pass share.

    Attributes:
        cos, sin: rows of the rotary table, fp32 [s, r] or [b, s, r]; None without rotation.
        segment_ids: int32 [b, t] over the complete sequence, attention only between equal ids; None: one document.
        cache: keys and values of earlier tokens; None without a cache.
        mask_cache: masks in full, for backends that need them: the first layer computes them, the others share them.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    cache: KVCache | None = None
    mask_cache: MaskCache = field(default_factory=MaskCache)

    @classmethod
    def of(cls, config: ModelConfig, length: int) -> Context:
        """The context of sequences of `length` tokens from position 0 on, without a cache, on the CPU."""
        if config.position_embedding != "rotary":
            return cls()
        return cls(*RotaryTable(config).rows(0, length, None, length, torch.device("cpu")))

    def rotated(
        self,
        table: RotaryTable,
        start: int,
        length: int,
        position_ids: torch.Tensor | None,
        num_positions: int,
        device: torch.device,
    ) -> Context:
        """This context with the table's rows; under dynamic NTK those of each sequence's own length."""
        original = table.original_length
        if original is None or num_positions <= original or position_ids is None or self.cache is not None:
            cos, sin = table.rows(start, length, position_ids, num_positions, device)
        else:
            cos, sin = table.rows_by_length(position_ids)
        return replace(self, cos=cos, sin=sin)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads (arXiv:1706.03762, arXiv:2305.13245).

    Parameters: qkv [g (m + 2) d, h] and out [h, n d] with their biases where the config has them; with config.qk_norm
    query_norm [d] and key_norm [d], applied per head before the rotation.

    Args:
        config: the architecture.
        mesh: layout over processes; by default this process alone.
        index: number of the block, which names its keys and values in a cache.
        dtype: dtype of the parameters.

    Raises:
        ConfigError: num_kv_heads does not divide num_attention_heads, or is no multiple of the tensor-parallel size.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh = ONE_PROCESS, index: int = 0, *, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        heads, groups, d = config.num_attention_heads, config.num_kv_heads, config.head_dim
        self.queries = queries_per_kv_head(heads, groups)
        self.head_dim = d
        self.index = index
        self.mesh = mesh
        rows, bias = groups * (self.queries + 2) * d, config.qkv_bias
        self.qkv = ColumnParallelLinear(
            config.hidden_size, rows, mesh, units=groups, what=KV_HEADS, bias=bias, dtype=dtype
        )
        bias = config.attention_out_bias
        self.out = RowParallelLinear(
            heads * d, config.hidden_size, mesh, units=groups, what=KV_HEADS, bias=bias, dtype=dtype
        )
        self.query_norm = RMSNorm(d, config.norm_eps, mesh, dtype=dtype, per_head=True) if config.qk_norm else None
        self.key_norm = RMSNorm(d, config.norm_eps, mesh, dtype=dtype, per_head=True) if config.qk_norm else None
        self.backend = config.attention_backend
        self.window = config.sliding_window
        self.softcap = config.attention_softcap
        self.dropout = config.attention_dropout
        self.alibi: torch.Tensor | None = None
        if config.position_embedding == "alibi":
            low, high = (group * self.queries for group in split_evenly(groups, mesh, KV_HEADS))
            low, high = mesh.context_share(low, high)
            # not a buffer: casting the model must not round it
            self.alibi = torch.tensor(alibi_slopes(heads)[low:high], dtype=torch.float32)

    def forward(self, x: torch.Tensor, context: Context, partial: bool = False) -> torch.Tensor:
        """Attend from every token to the tokens up to it.

        Args:
            x: [b, s, h], normed.
            context: rotary rows, segments and cache of this forward pass.
            partial: leave out the sum over the tensor group and the bias of `out`.

        Returns:
            [b, s, h].
        """
        qkv = self.qkv(x)  # [b, s, g(m+2)d/tp]
        if self.query_norm is None and context.cache is None:
            mixed = self._attend_packed(qkv, context)
        else:
            mixed = self._attend(ops.attention, self._split(self._grouped(qkv), context), context)
        return self.out(mixed.flatten(2), partial)

    def _grouped(self, qkv: torch.Tensor) -> torch.Tensor:
        """[b, s, g(m+2)d/tp] -> [b, s, g/tp, m + 2, d]."""
        return qkv.unflatten(2, (-1, self.queries + 2, self.head_dim))

    def _attend_packed(self, qkv: torch.Tensor, context: Context) -> torch.Tensor:
        """Attention on the grouped projection, rotated in place: [b, s, n/tp, d]."""
        packed, attention = self._grouped(qkv), ops.attention_qkv
        if context.cos is None or context.sin is None:
            return self._attend(attention, (packed,), context)
        rotary = context.cos, context.sin
        if self.mesh.cp_group is None:
            return self._attend(partial(attention, rotary=rotary), (packed,), context)
        # each process rotates its part of the sequence, and attends to all of it
        return self._attend(attention, (ops.rotary_qkv(packed, *rotary),), context)

    def _split(self, qkv: torch.Tensor, context: Context) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normed and rotated q [b, s, n/tp, d], and k and v [b, t, g/tp, d] with the cached ones in front."""
        # the backward of split writes dqkv once; that of each slice would write a dqkv of zeros and add it
        q, k, v = qkv.split([self.queries, 1, 1], dim=3)
        q, k, v = q.flatten(2, 3), k.squeeze(3), v.squeeze(3)  # [b, s, n/tp, d] and [b, s, g/tp, d]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q)[0], self.key_norm(k)[0]
        if context.cos is not None and context.sin is not None:
            q, k = ops.rotary(q, k, context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.update(self.index, k, v)
        return q, k, v

    def _attend(
        self, attention: Callable[..., torch.Tensor], operands: tuple[torch.Tensor, ...], context: Context
    ) -> torch.Tensor:
        """Run an attention operator on the complete sequence: [b, s, n/tp, d]."""
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


def queries_per_kv_head(heads: int, kv_heads: int, *, where: str = KV_HEADS) -> int:
    """m = n / g, the query heads that share a key/value head.

    Args:
        heads: n.
        kv_heads: g.
        where: the key that holds g, for the error.

    Raises:
        ConfigError: g does not divide n.
    """
    if heads % kv_heads:
        raise ConfigError(
            "key/value heads do not divide the query heads",
            where=where,
            got=kv_heads,
            want=f"a divisor of {heads} heads",
        )
    return heads // kv_heads
