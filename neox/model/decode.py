"""Decoding on a CPU: a block as one operator, where there are so few tokens that calls would cost as much as arithmetic."""

from __future__ import annotations

import math

import torch
from torch import nn

from neox.model.attention import Context
from neox.model.norm import RMSNorm
from neox.ops.decode_block import ACTIVATIONS, AVAILABLE, PARAMETERS, decode_block
from neox.ops.linear import FEW_ROWS

FEW_TOKENS = FEW_ROWS  # of all sequences together; with more, the matrix products of torch are faster


class BlockDecoder:
    """A block (neox.model.block.Block) in the form that `decode_block` takes. It keeps the block's tensors: make a new one when they are exchanged."""

    def __init__(self, block: nn.Module):
        attention = block.attention
        self.index = attention.index
        self.parameters = [find(block, name) for name in PARAMETERS]
        self.options = {
            "rms": isinstance(block.norm1, RMSNorm),
            "parallel": block.parallel,
            "eps": block.norm1.eps,
            "activation": block.mlp.activation,
            "scale": 1 / math.sqrt(attention.head_dim),
            "alibi_slopes": attention.alibi,
            "window": attention.window,
            "softcap": attention.softcap,
        }

    @staticmethod
    def fits(block: nn.Module) -> bool:
        """Whether `decode_block` computes this block: whole on this process, on a CPU, without adapters, kernels and activation ours."""
        mesh, attention, mlp = block.mesh, block.attention, block.mlp
        layers = [layer for layer in (attention.qkv, attention.out, mlp.gate, mlp.up, mlp.down) if layer is not None]
        return (
            AVAILABLE
            and mesh.tp == mesh.cp == 1
            and not block.training
            and attention.backend != "sdpa"
            and mlp.activation in ACTIVATIONS
            and all(layer.lora_a is None and layer.weight.is_contiguous() for layer in layers)
            and block.norm1.weight.is_cpu
            and block.norm1.weight.dtype in (torch.float32, torch.bfloat16)
        )

    def __call__(self, stream: torch.Tensor, delta: torch.Tensor | None, context: Context) -> tuple[torch.Tensor, torch.Tensor]:
        """(stream, delta) of the block before -> those of this block; the cache takes in the tokens."""
        cache = context.cache
        keys, values = cache.buffers(self.index, stream.shape[1])
        return decode_block(
            *(stream, delta, keys, values, cache.length, self.parameters),
            cos=context.cos,
            sin=context.sin,
            segment_ids=context.segment_ids,
            **self.options,
        )


def find(block: nn.Module, name: str) -> torch.Tensor | None:
    """A parameter by its path; None where a module of the path is missing."""
    found: object = block
    for part in name.split("."):
        found = getattr(found, part, None)
    return None if found is None else found.detach()


def decoder(block: nn.Module, stream: torch.Tensor, context: Context) -> BlockDecoder | None:
    """The decoder of a block for these tokens; None where the ordinary path is to be taken. It is made once per cache."""
    cache = context.cache
    if cache is None or stream.shape[0] * stream.shape[1] > FEW_TOKENS or torch.is_grad_enabled() or cache.length == 0:
        return None
    decoders = cache.decoders
    if block.attention.index not in decoders:
        decoders[block.attention.index] = BlockDecoder(block) if BlockDecoder.fits(block) else None
    return decoders[block.attention.index]
