"""attention against torch's scaled_dot_product_attention: forward, and backward alone, over masks and for decoding.

sdpa gets is_causal where that expresses the mask, and otherwise the full mask, built outside of the timing. On a GPU
the peers are sdpa's flash and cuDNN backends with is_causal, and the backend that sdpa selects with a full mask. There
neox's kernels for Hopper are one more peer, in the cases that they support.

GFLOP/s count the pairs that the mask leaves visible: 4 operations per pair and channel in the forward, 10 in the
backward.
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
from measure import Options, Row, compare, dtype_name, run

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
    def needs_no_mask(self) -> bool:
        """Whether sdpa's is_causal expresses the mask."""
        return self.s == self.keys and not {"window", "segment_ids", "alibi_slopes"} & set(self.options)

    def visible(self) -> torch.Tensor:
        """The mask of visible pairs, bool [s, t] or [b, 1, s, t]."""
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
    """Cases on a GPU: shapes of models, then masks that sdpa needs in full."""
    ids = documents(4096, 8)
    masks = [
        Case("documents of 1/8", 4096, 128, n=16, g=16, options={"segment_ids": ids}),
        Case("window 512", 4096, 128, n=16, g=16, options={"window": 512}),
        Case(
            "alibi", 2048, 128, b=2, n=16, g=16, options={"alibi_slopes": 2.0 ** -(torch.arange(1, 17).float() ** 0.5)}
        ),
    ]
    return [*GPU_CASES[:2]] if quick else [*GPU_CASES, *masks]


def cpu_cases(quick: bool) -> list[Case]:
    """Cases on a CPU: shapes of training, then masks, then decoding."""
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
    """sdpa on [b, s, n, d] tensors, with the mask already built."""
    causal, mask = case.options.get("causal", True), None
    if not case.needs_no_mask and case.s > 1:
        mask = case.visible()
    if "alibi_slopes" in case.options:
        distance = (torch.arange(case.s)[:, None] - torch.arange(case.s)).abs()
        mask = torch.where(mask, -case.options["alibi_slopes"][:, None, None] * distance, -torch.inf).to(dtype)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=case.needs_no_mask and causal,
            enable_gqa=case.n != case.g,
        )
        return out.transpose(1, 2)

    return attend


def with_backend(backend: SDPBackend, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """sdpa restricted to one of its backends."""

    def restricted(*inputs: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return attend(*inputs)

    return restricted


def peers_of(
    case: Case, dtype: torch.dtype, options: Options, inputs: list[torch.Tensor]
) -> dict[str, Callable[..., torch.Tensor]]:
    """The peers of a case. A backend that rejects the case is omitted, with a line on stderr."""
    attend = sdpa(case, dtype)
    if options.device == "cpu":
        return {"sdpa": attend}
    tried: dict[str, Callable[..., torch.Tensor]] = {"sdpa": attend}
    if case.needs_no_mask:
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}
        tried = {name: with_backend(backend, attend) for name, backend in backends.items()}
    peers = {}
    for name, peer in {**tried, "neox hopper": partial(attention, backend="hopper", **case.options)}.items():
        try:
            peer(*inputs)
        except (RuntimeError, ValueError) as problem:
            print(f"{case.label}: {name} is omitted: {str(problem).splitlines()[0]}", file=sys.stderr)
        else:
            peers[name] = peer
    return peers if peers.keys() & tried.keys() else {"sdpa": attend, **peers}


def measure(case: Case, dtype: torch.dtype, options: Options) -> Iterator[Row]:
    """Compare the forward without autograd and, unless the case is decoding, the backward alone."""
    shapes = (case.s, case.n), (case.keys, case.g), (case.keys, case.g)
    inputs = [torch.randn(case.b, length, heads, case.d).to(dtype) for length, heads in shapes]
    tracked = [tensor.clone().requires_grad_() for tensor in inputs]
    pairs = case.visible().expand(case.b, 1, case.s, case.keys).sum().item() * case.n
    setting = f"{case.label} s {case.s} t {case.keys} d {case.d} {dtype_name(dtype)}"

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
            work=4 * pairs * case.d / 1e9,
            unit="GFLOP/s",
        )
    yield from rows
    if case.s > 1:
        backwards = {name: backward(peer) for name, peer in peers.items()}
        yield from compare(
            "attention backward",
            setting,
            backward(ours),
            backwards,
            options,
            work=10 * pairs * case.d / 1e9,
            unit="GFLOP/s",
        )


def rows(options: Options) -> Iterator[Row]:
    """All cases of the device, in all of its dtypes.

    Raises:
        RuntimeError: some cases failed. It is raised after the others were measured.
    """
    failed = []
    for dtype in options.dtypes:
        for case in gpu_cases(options.quick) if options.device == "cuda" else cpu_cases(options.quick):
            try:
                yield from measure(case, dtype, options)
            except (RuntimeError, ValueError) as problem:
                failed.append(f"{case.label}: {problem}")
                record.add({"failed": case.label, "error": str(problem)[:300]})
    if failed:
        raise RuntimeError("; ".join(failed))


if __name__ == "__main__":
    run(__doc__, rows)
