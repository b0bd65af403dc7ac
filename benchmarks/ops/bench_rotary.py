"""rotary against torch, eager and compiled, and in place on the packed projection."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare, compare_op, dtype_name, run, with_compiled

from neox.ops import rotary, rotary_qkv, rotary_tables


def torch_rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotation as models in plain torch compute it."""
    r = cos.shape[-1]

    def rotate(x):
        low, high = x[..., : r // 2], x[..., r // 2 : r]
        return torch.cat((x[..., :r] * cos + torch.cat((-high, low), dim=-1) * sin, x[..., r:]), dim=-1)

    return rotate(q), rotate(k)


def rows(options: Options) -> Iterator[Row]:
    """The attention of Pythia-160M (a quarter of the channels) and of a Llama (all of them) at 4 x 512 tokens."""
    batch, seq, heads, head_dim = options.shapes((1, 256, 12, 64), (4, 512, 12, 64), (16, 2048, 12, 64))
    for rotary_dim in (16, 64):
        cos, sin = rotary_tables(rotary_dim, seq)
        for dtype in options.dtypes:
            q, k = (torch.randn(batch, seq, heads, head_dim).to(dtype) for _ in range(2))
            broadcast = cos[:, None].to(dtype), sin[:, None].to(dtype)
            setting = f"{batch}x{seq}x{heads}x{head_dim} r{rotary_dim} {dtype_name(dtype)}"
            peers = {
                name: lambda q, k, op=op, broadcast=broadcast: op(q, k, *broadcast)
                for name, op in with_compiled(torch_rotary, options).items()
            }
            moved = 4 * q.numel() * q.element_size()
            ours = lambda q, k, cos=cos, sin=sin: rotary(q, k, cos, sin)  # noqa: E731
            yield from compare_op(
                "rotary", setting, ours, peers, (q, k), options, forward_bytes=moved, backward_bytes=moved
            )
            yield from packed_rows(
                setting, torch.randn(batch, seq, heads, 3, head_dim).to(dtype), (cos, sin), broadcast, options
            )


def packed_rows(
    setting: str,
    qkv: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    broadcast: tuple[torch.Tensor, ...],
    options: Options,
) -> list[Row]:
    """The forward on the packed projection: neox in place, torch out of place on slices of it."""

    def eager():
        return torch_rotary(qkv[:, :, :, 0], qkv[:, :, :, 1], *broadcast)

    moved = 4 * qkv[:, :, :, 0, : tables[0].shape[-1]].numel() * qkv.element_size()
    return compare(
        "rotary_qkv forward",
        setting,
        lambda: rotary_qkv(qkv, *tables),
        {"torch eager": eager},
        options,
        work=moved / 1e9,
        unit="GB/s",
    )


if __name__ == "__main__":
    run(__doc__, rows)
