"""Use neox's operators in a model of your own: a Llama block in plain torch, and the same block on neox.ops.

python examples/operator_in_your_model.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from neox import ops


class Block(nn.Module):
    """The parameters of a pre-norm block with grouped-query attention and a SwiGLU MLP. Subclasses compute it."""

    def __init__(self, hidden: int = 128, heads: int = 8, kv_heads: int = 2, ffn: int = 352):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.kv = nn.Linear(hidden, 2 * kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def heads_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [b, s, n, d], keys and values [b, s, g, d]."""
        k, v = self.kv(x).chunk(2, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in (self.q(x), k, v))


class TorchBlock(Block):
    """The block on torch's operators."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [b, s, h] to the block's output [b, s, h]."""
        q, k, v = (part.transpose(1, 2) for part in self.heads_of(self.norm1(x)))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        inner = self.norm2(x)
        return x + self.down(F.silu(self.gate(inner)) * self.up(inner))


class NeoxBlock(Block):
    """The block on neox.ops: one kernel for residual add and second norm, one for the gate and its product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [b, s, h] to the block's output [b, s, h]."""
        q, k, v = self.heads_of(ops.rms_norm(x, self.norm1.weight, 1e-5))
        attended = self.out(ops.attention(q, k, v, causal=True).flatten(2))
        inner, x = ops.rms_norm(attended, self.norm2.weight, 1e-5, residual=x)
        return x + self.down(ops.gated(self.gate(inner), self.up(inner), activation="silu"))


def main() -> None:
    """Compare the outputs and gradients of both blocks."""
    torch.manual_seed(0)
    torch_block, neox_block = TorchBlock(), NeoxBlock()
    neox_block.load_state_dict(torch_block.state_dict())
    x = torch.randn(2, 64, 128)
    torch_block(x).square().mean().backward()
    neox_block(x).square().mean().backward()
    print(f"largest difference of an output    {(torch_block(x) - neox_block(x)).abs().max().item():.1e}")
    differences = [
        (a.grad - b.grad).abs().max().item()
        for a, b in zip(torch_block.parameters(), neox_block.parameters(), strict=True)
    ]
    print(f"largest difference of a gradient   {max(differences):.1e}")
    print(f"attention: {ops.backend('attention')}")


if __name__ == "__main__":
    main()
