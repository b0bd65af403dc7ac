"""Decoding on a CPU: a block as one operator, for so few tokens that operator calls cost as much as the arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from neox.model.attention import Context
from neox.model.block import Block, ParallelBlock, Residual
from neox.model.kv_cache import KVCache
from neox.model.norm import RMSNorm
from neox.ops.decode_block import ACTIVATIONS, AVAILABLE, PARAMETERS, decode_block
from neox.ops.linear import FEW_ROWS

FEW_TOKENS = FEW_ROWS  # of all sequences together; above, torch's matrix products are faster

Layer = Callable[[torch.Tensor, torch.Tensor | None, Context], Residual]


class BlockDecoder:
    """A block in the form that `decode_block` takes. It holds the block's tensors: make a new one when they change."""

    def __init__(self, block: Block):
        attention = block.attention
        self.index = attention.index
        self.parameters = [find_parameter(block, name) for name in PARAMETERS]
        self.options = {
            "rms": isinstance(block.norm1, RMSNorm),
            "parallel": isinstance(block, ParallelBlock),
            "eps": block.norm1.eps,
            "activation": block.mlp.activation,
            "scale": 1 / math.sqrt(attention.head_dim),
            "alibi_slopes": attention.alibi,
            "window": attention.window,
            "softcap": attention.softcap,
        }

    @staticmethod
    def supports(block: Block) -> bool:
        """Whether `decode_block` computes this block.

        It needs a CPU, fp32 or bf16, all weights on this process, no adapters, the native attention, and one of the
        operator's activations.
        """
        mesh, attention, mlp = block.mesh, block.attention, block.mlp
        layers = [layer for layer in (attention.qkv, attention.out, mlp.gate, mlp.up, mlp.down) if layer is not None]
        return (
            AVAILABLE
            and mesh.tp == mesh.cp == 1
            and not block.training
            and attention.backend in ("auto", "native")
            and mlp.activation in ACTIVATIONS
            and all(layer.lora_a is None and layer.weight.is_contiguous() for layer in layers)
            and block.norm1.weight.is_cpu
            and block.norm1.weight.dtype in (torch.float32, torch.bfloat16)
        )

    def __call__(self, stream: torch.Tensor, delta: torch.Tensor | None, context: Context) -> Residual:
        """(stream, delta) of the previous block -> those of this block. The tokens are added to the context's cache."""
        cache = context.cache
        if cache is None:
            raise ValueError("a BlockDecoder needs a context with a cache")
        keys, values = cache.buffers(self.index, stream.shape[1])
        return decode_block(
            *(stream, delta, keys, values, cache.length, self.parameters),
            cos=context.cos,
            sin=context.sin,
            segment_ids=context.segment_ids,
            **self.options,
        )


def find_parameter(block: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter by its dotted name, detached; None where the block has none of that name."""
    found: object = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return found.detach() if isinstance(found, torch.Tensor) else None


def decoding_layers(blocks: Iterable[Block], num_tokens: int, cache: KVCache) -> Sequence[Layer]:
    """The blocks to run for new tokens of a cache: as one operator each where that is supported and faster.

    Args:
        blocks: of the model.
        num_tokens: new tokens, of all sequences together.
        cache: holds the earlier tokens, and the decoders made for it.
    """
    if num_tokens > FEW_TOKENS or torch.is_grad_enabled() or cache.length == 0:
        return list(blocks)
    layers: list[Layer] = []
    for block in blocks:
        index = block.attention.index
        if index not in cache.decoders:
            cache.decoders[index] = BlockDecoder(block) if BlockDecoder.supports(block) else None
        layers.append(cache.decoders[index] or block)
    return layers
