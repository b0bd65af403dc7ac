"""Conversion rules for single parameters, shared by all Hugging Face architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from neox.config.schema import ModelConfig


@dataclass(frozen=True)
class Rule:
    """How one neox parameter is stored in a Hugging Face model.

    Attributes:
        names: names of the Hugging Face tensors.
        split: neox tensor -> Hugging Face tensors, in the order of names.
        join: the inverse of split.
    """

    names: tuple[str, ...]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    join: Callable[..., torch.Tensor]


def same(name: str) -> Rule:
    """Rule for a tensor that is only renamed."""
    return Rule((name,), lambda x: (x,), lambda x: x)


def transposed(name: str) -> Rule:
    """Rule for a matrix that is stored as [in, out]."""
    return Rule((name,), lambda x: (x.t(),), lambda x: x.t())


def split_qkv(packed: torch.Tensor, config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split packed rows [g (m + 2) d, ...] to q [n d, ...], k [g d, ...] and v [g d, ...]."""
    heads = packed.unflatten(0, (config.num_kv_heads, -1, config.head_dim))
    return heads[:, :-2].flatten(0, 2), heads[:, -2].flatten(0, 1), heads[:, -1].flatten(0, 1)


def join_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The inverse of split_qkv."""
    parts = [x.unflatten(0, (config.num_kv_heads, -1, config.head_dim)) for x in (q, k, v)]
    return torch.cat(parts, dim=1).flatten(0, 2)


def separate_qkv(prefix: str, kind: str, config: ModelConfig) -> Rule:
    """Rule for three tensors q_proj, k_proj and v_proj."""
    names = tuple(f"{prefix}.{part}_proj.{kind}" for part in "qkv")
    return Rule(names, lambda x: split_qkv(x, config), lambda q, k, v: join_qkv(q, k, v, config))


def contiguous_qkv(name: str, config: ModelConfig, *, transpose: bool) -> Rule:
    """Rule for one tensor with all queries, then all keys, then all values; stored as [in, out] with `transpose`."""
    sizes = [config.num_attention_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]

    def split(packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = torch.cat(split_qkv(packed, config))
        return (rows.t() if transpose else rows,)

    def join(stored: torch.Tensor) -> torch.Tensor:
        q, k, v = (stored.t() if transpose else stored).split(sizes)
        return join_qkv(q, k, v, config)

    return Rule((name,), split, join)
