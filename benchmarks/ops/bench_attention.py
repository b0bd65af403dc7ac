"""attention against torch's scaled_dot_product_attention: forward, and backward alone, over masks and for decoding.

On a GPU the peers are sdpa's flash and cuDNN backends where is_causal suffices, and what sdpa chooses for a full mask
where it does not; and our kernels for Hopper, where they take the case.

GFLOP/s count the pairs that the mask leaves visible: 4 operations per pair and channel forward, 10 backward. sdpa is
given is_causal where that suffices, and the full mask, made outside of the timing, where it does not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
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

    @property
    def plain(self) -> bool:
        """Whether sdpa needs no mask: is_causal suffices."""
        return self.s == self.keys and not {"window", "segment_ids", "alibi_slopes"} & set(self.options)

    def visible(self) -> torch.Tensor:
        """[s, t] or [b, 1, s, t] bool."""
        mask = visible_keys(
            self.s,
            self.keys,
            self.options.get("causal", True),
            self.options.get("window"),
            self.options.get("segment_ids"),
        )
        return torch.ones(self.s, self.keys, dtype=torch.bool) if mask is None else mask


def documents(s: int, count: int) -> torch.Tensor:
    """Segment ids [1, s] of `count` documents of the same length."""
    return (torch.arange(s, dtype=torch.int32) * count // s)[None]


GPU_CASES = (
    Case("Pythia-1.4B", 2048, 128, b=8, n=16, g=16),
    Case("Pythia-160M", 2048, 64, b=16, n=12, g=12),
    Case("long", 16384, 128, n=16, g=16),
    Case("head_dim 96", 2048, 96, b=8, n=16, g=16),
    Case("head_dim 256", 2048, 256, b=4, n=16, g=16),
    Case("full", 2048, 128, b=8, n=16, g=16, options={"causal": False}),
    Case("grouped 32:8", 4096, 128, b=2, n=32, g=8),
    Case("decoding 32:8", 1, 128, t=8192, b=8, n=32, g=8),
)


def gpu_cases(quick: bool) -> list[Case]:
    """The shapes of the goals first; masks that sdpa must be given in full after them."""
    ids = documents(4096, 8)
    masks = [
        Case("documents of 1/8", 4096, 128, n=16, g=16, options={"segment_ids": ids}),
        Case("window 512", 4096, 128, n=16, g=16, options={"window": 512}),
        Case(
            "alibi", 2048, 128, b=2, n=16, g=16, options={"alibi_slopes": 2.0 ** -(torch.arange(1, 17).float() ** 0.5)}
        ),
    ]
    return [*GPU_CASES[:2]] if quick else [*GPU_CASES, *masks]


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
    plain = case.plain
    causal, mask = case.options.get("causal", True), None
    if not plain and case.s > 1:
        mask = case.visible()
    if "alibi_slopes" in case.options:
        distance = (torch.arange(case.s)[:, None] - torch.arange(case.s)).abs()
        mask = torch.where(mask, -case.options["alibi_slopes"][:, None, None] * distance, -torch.inf).to(dtype)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=plain and causal,
            enable_gqa=case.n != case.g,
        )
        return out.transpose(1, 2)

    return run


def through(backend: SDPBackend, run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same with one of sdpa's backends and no other."""

    def held(*inputs: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return run(*inputs)

    return held


def peers_of(
    case: Case, dtype: torch.dtype, options: Options, inputs: list[torch.Tensor]
) -> dict[str, Callable[..., torch.Tensor]]:
    """What ours is compared with. A backend that refuses the case is left out, and named on the error stream."""
    run = sdpa(case, dtype)
    if options.device == "cpu":
        return {"sdpa": run}
    tried: dict[str, Callable[..., torch.Tensor]] = {"sdpa": run}
    if case.plain:
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
        tried = {name: through(backend, run) for name, backend in backends.items()}
    peers = {}
    for name, peer in {**tried, "neox hopper": partial(attention, backend="hopper", **case.options)}.items():
        try:
            peer(*inputs)
        except (RuntimeError, ValueError) as problem:
            print(f"{case.label}: {name} is left out: {str(problem).splitlines()[0]}", file=sys.stderr)
        else:
            peers[name] = peer
    return peers if peers.keys() & tried.keys() else {"sdpa": run, **peers}


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

    peers = peers_of(case, dtype, options, inputs)
    with torch.no_grad():
        forwards = {name: partial(peer, *inputs) for name, peer in peers.items()}
        rows = compare(
            "attention forward",
            setting,
            lambda: ours(*inputs),
            forwards,
            options,
            work=4 * pairs * case.d,
            unit="GFLOP/s",
        )
    yield from rows
    if case.s > 1:
        backwards = {name: backward(peer) for name, peer in peers.items()}
        yield from compare(
            "attention backward", setting, backward(ours), backwards, options, work=10 * pairs * case.d, unit="GFLOP/s"
        )


def rows(options: Options) -> Iterator[Row]:
    """All cases of the device in the dtypes that it is measured in.

    Raises:
        RuntimeError: cases failed, after the others were measured.
    """
    failed = []
    for dtype in options.dtypes:
        for case in gpu_cases(options.quick) if options.device == "cuda" else cases(options.quick):
            try:
                yield from measure(case, dtype, options)
            except (RuntimeError, ValueError) as problem:
                failed.append(f"{case.label}: {problem}")
                record.add({"failed": case.label, "error": str(problem)[:300]})
    if failed:
        raise RuntimeError("; ".join(failed))


if __name__ == "__main__":
    chosen = parse(__doc__)
    show(rows(chosen), chosen)
