"""attention against torch's scaled_dot_product_attention: forward, and backward alone, over masks and for decoding.

GFLOP/s count the pairs that the mask leaves visible: 4 operations per pair and channel forward, 10 backward. sdpa is given is_causal where that
says it all, and the whole mask, made outside of the timing, where it does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, compare, parse, show

from neox.ops import attention
from neox.ops.attention import visible_keys


@dataclass(frozen=True)
class Case:
    """One setting: shape [b, s or t, n or g, d] and the options of `attention`."""

    label: str
    s: int
    d: int
    t: int | None = None
    b: int = 1
    n: int = 4
    g: int = 4
    options: dict = field(default_factory=dict)

    @property
    def keys(self) -> int:
        """Key length."""
        return self.t or self.s

    def visible(self) -> torch.Tensor:
        """[s, t] or [b, 1, s, t] bool."""
        mask = visible_keys(self.s, self.keys, self.options.get("causal", True), self.options.get("window"), self.options.get("segment_ids"))
        return torch.ones(self.s, self.keys, dtype=torch.bool) if mask is None else mask


def documents(s: int, count: int) -> torch.Tensor:
    """Segment ids [1, s] of `count` documents of the same length."""
    return (torch.arange(s, dtype=torch.int32) * count // s)[None]


def cases(quick: bool) -> list[Case]:
    """Training shapes first, then masks, then decoding."""
    lengths, long = ((512,), 512) if quick else ((512, 2048), 2048)
    training = [Case("causal", s, d) for s in lengths for d in (64, 128)]
    masks = [
        Case("full", long, 64, options={"causal": False}),
        Case("documents of 1/8", long, 64, options={"segment_ids": documents(long, 8)}),
        Case("window 256", long, 64, options={"window": 256}),
        Case("alibi", long, 64, options={"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}),
        Case("grouped 8:2", long, 64, n=8, g=2),
        Case("Pythia-160M 4x512", 512, 64, b=4, n=12, g=12),
    ]
    decoding = [
        Case("decoding", 1, 64, t=1024, b=4, n=12, g=12),
        Case("decoding 32:8", 1, 128, t=4096, n=32, g=8),
        Case("decoding 32:32", 1, 128, t=4096, n=32, g=32),
    ]
    return training + masks + (decoding[:1] if quick else decoding)


def sdpa(case: Case, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """sdpa on [b, s, n, d] tensors with the mask ready."""
    plain = case.s == case.keys and not {"window", "segment_ids", "alibi_slopes"} & set(case.options)
    causal, mask = case.options.get("causal", True), None
    if not plain and case.s > 1:
        mask = case.visible()
    if "alibi_slopes" in case.options:
        distance = (torch.arange(case.s)[:, None] - torch.arange(case.s)).abs()
        mask = torch.where(mask, -case.options["alibi_slopes"][:, None, None] * distance, -torch.inf).to(dtype)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=plain and causal, enable_gqa=case.n != case.g
        )
        return out.transpose(1, 2)

    return run


def measure(case: Case, dtype: torch.dtype, options: Options) -> Iterator[Row]:
    """Forward without autograd; for training shapes the backward alone."""
    shapes = (case.s, case.n), (case.keys, case.g), (case.keys, case.g)
    inputs = [torch.randn(case.b, length, heads, case.d).to(dtype) for length, heads in shapes]
    tracked = [tensor.clone().requires_grad_() for tensor in inputs]
    pairs = case.visible().expand(case.b, 1, case.s, case.keys).sum().item() * case.n
    setting = f"{case.label} s {case.s} t {case.keys} d {case.d} {str(dtype).removeprefix('torch.')}"

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, backend="native", **case.options)

    def backward(op: Callable[..., torch.Tensor]) -> Callable[[], object]:
        out = op(*tracked)
        dout = torch.randn_like(out)
        return lambda: torch.autograd.grad(out, tracked, dout, retain_graph=True)

    peer = sdpa(case, dtype)
    with torch.no_grad():
        rows = compare("attention forward", setting, lambda: ours(*inputs), {"sdpa": lambda: peer(*inputs)}, options, work=4 * pairs * case.d, unit="GFLOP/s")
    yield from rows
    if case.s > 1:
        yield from compare("attention backward", setting, backward(ours), {"sdpa": backward(peer)}, options, work=10 * pairs * case.d, unit="GFLOP/s")


def rows(options: Options) -> Iterator[Row]:
    """All cases in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases(options.quick):
            yield from measure(case, dtype, options)


if __name__ == "__main__":
    chosen = parse(__doc__)
    show(rows(chosen), chosen)
