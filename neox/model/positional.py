"""Positions: rotary tables with their scalings, learned embeddings, ALiBi slopes.

Rotary tables are fp32 whatever the model's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from neox import ops
from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.parallel.mesh import Mesh
from neox.parallel.shard_spec import ShardSpec


class RotaryTable:
    """cos and sin by position, grown on demand. A plain object, so that casting the model to bf16 leaves it fp32.

    Args:
        config: the architecture.
    """

    def __init__(self, config: ModelConfig):
        scaling = config.rope_scaling
        if config.rotary_dim < 2:
            raise ConfigError("too few rotary channels", where="model.rotary_pct", got=config.rotary_dim, want="head_dim x rotary_pct >= 2")
        self.config = config
        self.dynamic = scaling is not None and scaling.type == "ntk" and scaling.original_max_position_embeddings is not None
        self.key: tuple | None = None
        self.cos = self.sin = torch.empty(0)

    def _fill(self, length: int, device: torch.device) -> None:
        key = (device, length if self.dynamic else None)
        if self.key == key and self.cos.shape[0] >= length:
            return
        rows = length if self.dynamic else min(self.config.max_position_embeddings, max(64, 1 << (length - 1).bit_length()))
        cos, sin = ops.rotary_tables(self.config.rotary_dim, rows, self.config.rope_theta, self.config.rope_scaling)
        self.cos, self.sin = cos.to(device), sin.to(device)
        self.key = key

    @property
    def steady_length(self) -> int | None:
        """Sequences up to this length have the same tables whatever their length; None: all have (no dynamic NTK)."""
        scaling = self.config.rope_scaling
        return scaling.original_max_position_embeddings if self.dynamic and scaling is not None else None

    def rows_by_length(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [b, s, r] of positions [b, s], each sequence by the base of its own length: one more than its last position."""
        lengths = (position_ids.amax(dim=1) + 1).tolist()
        dim, theta, scaling = self.config.rotary_dim, self.config.rope_theta, self.config.rope_scaling
        tables = {length: ops.rotary_tables(dim, length, theta, scaling) for length in set(lengths)}
        device = position_ids.device
        cos, sin = (
            torch.stack([F.embedding(ids, tables[length][which].to(device)) for ids, length in zip(position_ids, lengths, strict=True)]) for which in (0, 1)
        )
        return cos, sin

    def rows(self, start: int, length: int, position_ids: torch.Tensor | None, reach: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of positions start .. start + length - 1 ([s, r]), or of position_ids ([b, s, r]), fp32; all positions are below `reach`."""
        self._fill(reach, device)
        if position_ids is None:
            return self.cos[start : start + length], self.sin[start : start + length]
        return F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)


class PositionEmbedding(nn.Module):
    """Learned positions (GPT-2): a [max_position_embeddings, h] table, whole on every member of the tensor group."""

    def __init__(self, positions: int, hidden_size: int, mesh: Mesh, *, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(positions, hidden_size, dtype=dtype, device=mesh.device))
        self.shard_specs = {"weight": ShardSpec.replicated(positions, hidden_size, partial=mesh.sequence)}

    def forward(self, start: int, length: int, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Rows start .. start + length - 1 ([s, h]), or those of position_ids ([b, s, h])."""
        return self.weight[start : start + length] if position_ids is None else F.embedding(position_ids, self.weight)


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of every head (arXiv 2108.12409): 2^(-8i/n) for a power of two; else those of the next lower power, then every other one of the next higher."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes
