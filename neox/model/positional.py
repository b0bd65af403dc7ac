"""Positions: rotary tables with their scalings, learned embeddings, ALiBi slopes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from neox import ops
from neox.config.schema import ModelConfig
from neox.errors import ConfigError
from neox.parallel.mesh import ONE_PROCESS, Mesh
from neox.parallel.shard_spec import ShardedLayer, ShardSpec


class RotaryTable:
    """cos and sin by position, fp32, extended as longer sequences arrive.

    It is not a module: casting the model to bf16 must leave the table fp32.

    Args:
        config: the architecture.

    Raises:
        ConfigError: fewer than two rotated channels.
    """

    def __init__(self, config: ModelConfig):
        scaling = config.rope_scaling
        if config.rotary_dim < 2:
            raise ConfigError(
                "too few rotary channels",
                where="model.rotary_pct",
                got=config.rotary_dim,
                want="head_dim x rotary_pct >= 2",
            )
        self.config = config
        self.original_length: int | None = None
        if scaling is not None and scaling.type == "ntk":
            self.original_length = scaling.original_max_position_embeddings
        self._key: tuple[torch.device, int | None] | None = None
        self.cos = self.sin = torch.empty(0)

    @property
    def dynamic(self) -> bool:
        """Whether frequencies depend on the length (dynamic NTK): they do for sequences beyond `original_length`."""
        return self.original_length is not None

    def rows(
        self, start: int, length: int, position_ids: torch.Tensor | None, num_positions: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of consecutive or given positions.

        Args:
            start: first position.
            length: s; positions are start .. start + s - 1 unless they are given.
            position_ids: int64 [b, s], or None.
            num_positions: one more than the highest position. Under dynamic NTK it sets the base.
            device: where the rows go.

        Returns:
            cos, sin: fp32 [s, r], or [b, s, r] of position_ids.
        """
        self._extend(num_positions, device)
        if position_ids is None:
            return self.cos[start : start + length], self.sin[start : start + length]
        return F.embedding(position_ids, self.cos), F.embedding(position_ids, self.sin)

    def rows_by_length(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [b, s, r] of positions [b, s] under dynamic NTK; a sequence's last position sets its base."""
        lengths = (position_ids.amax(dim=1) + 1).tolist()
        tables = {length: self._tables(length) for length in set(lengths)}
        device = position_ids.device
        cos, sin = (
            torch.stack(
                [
                    F.embedding(ids, tables[length][which].to(device))
                    for ids, length in zip(position_ids, lengths, strict=True)
                ]
            )
            for which in (0, 1)
        )
        return cos, sin

    def _extend(self, length: int, device: torch.device) -> None:
        key = (device, length if self.dynamic else None)
        if self._key == key and self.cos.shape[0] >= length:
            return
        rows = length
        if not self.dynamic:
            rows = min(self.config.max_position_embeddings, max(64, 1 << (length - 1).bit_length()))
        cos, sin = self._tables(rows)
        self.cos, self.sin = cos.to(device), sin.to(device)
        self._key = key

    def _tables(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        config = self.config
        return ops.rotary_tables(config.rotary_dim, length, config.rope_theta, config.rope_scaling)


class PositionEmbedding(ShardedLayer):
    """Learned positions (GPT-2): a [max_position_embeddings, h] table, replicated over the tensor group."""

    def __init__(
        self, positions: int, hidden_size: int, mesh: Mesh = ONE_PROCESS, *, dtype: torch.dtype = torch.float32
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(positions, hidden_size, dtype=dtype, device=mesh.device))
        self.sharding = {"weight": ShardSpec.replicated(positions, hidden_size, partial=mesh.sequence)}

    def forward(self, start: int, length: int, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Rows start .. start + length - 1, [s, h]; or those of position_ids, [b, s, h]."""
        if position_ids is None:
            return self.weight[start : start + length]
        return F.embedding(position_ids, self.weight)


def alibi_slopes(num_heads: int) -> list[float]:
    """Slope of every head (arXiv:2108.12409).

    For n a power of two 2^(-8i/n), i = 1 .. n; else those of the next lower power, then every other one of the next
    higher.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes
