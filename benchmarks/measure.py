"""Times implementations in interleaved rounds, and prints the rows of a benchmark.

A round times each implementation once, one after another, so that a change of the clock rate or another process on the
machine affects all of them. An implementation's figure is its median over the rounds. Inputs are random, because zeros
run faster than data.

On a GPU (--device cuda) events around each call time it. A write that is far larger than the caches precedes the call:
the caches are cold, and the host queues the call while the GPU writes, so that launch gaps are not timed. An operator
in GB/s also has a row with the peer "memory copy", which copies the same number of bytes in the same rounds; its ratio
is the share of the copy bandwidth that the operator reaches.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import record
import torch

FLUSH_BYTES = 1 << 30
COPY = "memory copy"


@dataclass(frozen=True)
class Options:
    """Command line of a benchmark."""

    json: bool
    quick: bool
    threads: int = 1
    device: str = "cpu"

    @property
    def rounds(self) -> int:
        """Rounds per comparison."""
        return 5 if self.quick or self.device == "cuda" else 15

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes to measure; on a GPU only the one that models are trained in."""
        return (torch.bfloat16,) if self.device == "cuda" else (torch.float32, torch.bfloat16)

    @property
    def processor(self) -> str:
        """The GPU, or the number of CPU threads, for the setting of a row."""
        return torch.cuda.get_device_name() if self.device == "cuda" else counted(self.threads, "thread")

    def shapes(self, quick: Sequence, cpu: Sequence, cuda: Sequence) -> Sequence:
        """The shapes for the device, and on a CPU for --quick."""
        return cuda if self.device == "cuda" else quick if self.quick else cpu

    @property
    def seconds(self) -> float:
        """Minimum time of one implementation in one round."""
        return 0.01 if self.quick else 0.1


@dataclass(frozen=True)
class Row:
    """One comparison of neox with a peer.

    Attributes:
        name: what is measured.
        setting: shape, dtype and whatever else distinguishes the rows of a name.
        ours: figure of neox, in `unit`.
        peer: figure of the peer, in `unit`.
        peer_name: what neox is compared with.
        ratio: above 1 if neox is better.
        unit: of both figures.
        seconds: of one call of neox, for the table only.
    """

    name: str
    setting: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str
    seconds: float | None = None


def rate_row(name: str, setting: str, ours: float, peer: float, peer_name: str, unit: str) -> Row:
    """A row whose higher figure is better, such as tokens/s."""
    return Row(name, setting, ours, peer, peer_name, ours / peer, unit)


def cost_row(name: str, setting: str, ours: float, peer: float, peer_name: str, unit: str) -> Row:
    """A row whose lower figure is better, such as seconds or bytes."""
    return Row(name, setting, ours, peer, peer_name, peer / ours, unit)


def counted(count: int, noun: str) -> str:
    """The count with its noun, such as "1 thread" and "2 threads"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def seconds_per_call(call: Callable[[], object], calls: int = 1) -> float:
    """Mean wall time of one call over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def gpu_seconds_per_call(call: Callable[[], object], calls: int = 1) -> float:
    """Median GPU time of one call, with its launches queued and the caches cold."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def median_over_rounds(measurements: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of the figures that each measurement returns, one figure per round."""
    figures = [{name: measure() for name, measure in measurements.items()} for _ in range(rounds)]
    return {name: statistics.median(figure[name] for figure in figures) for name in measurements}


def median_seconds(implementations: dict[str, Callable[[], object]], options: Options) -> dict[str, float]:
    """Median seconds per call of each implementation. A warm-up also determines the number of calls per round."""
    clock = gpu_seconds_per_call if options.device == "cuda" else seconds_per_call
    minimum, maximum = (3, 20) if options.device == "cuda" else (1, sys.maxsize)
    measurements = {}
    for name, call in implementations.items():
        call()
        calls = min(max(minimum, round(options.seconds / max(clock(call), 1e-7))), maximum)
        measurements[name] = partial(clock, call, calls)
    return median_over_rounds(measurements, options.rounds)


def compare(
    name: str,
    setting: str,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    options: Options,
    *,
    work: float | None = None,
    unit: str = "us",
) -> list[Row]:
    """Compare neox with each peer.

    Args:
        name: what is measured, such as "bias_gelu forward".
        setting: shape, dtype and whatever else distinguishes the rows.
        ours: one call of neox.
        peers: name -> one call of the peer, on the same inputs.
        options: from `parse`.
        work: what one call does, in the unit before "/s": GB, GFLOP or tokens. None: the figures are microseconds.
        unit: "us", or a rate such as "GB/s" if there is `work`.
    """
    if unit == "GB/s" and work:
        peers = {**peers, COPY: memory_copy(round(work * 1e9))}
    seconds = median_seconds({"": ours, **peers}, options)
    setting = f"{setting}, {options.processor}"
    rows = []
    for peer in peers:
        times = seconds[""], seconds[peer]
        figures = (time * 1e6 if work is None else work / time for time in times)
        rows.append(Row(name, setting, *figures, peer, times[1] / times[0], unit, times[0]))
    return rows


def memory_copy(moved: int) -> Callable[[], object]:
    """A copy whose reads and writes together are `moved` bytes."""
    source = torch.randint(256, (moved // 2,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compare_op(
    name: str,
    setting: str,
    ours: Callable[..., object],
    peers: dict[str, Callable[..., object]],
    leaves: tuple[torch.Tensor, ...],
    options: Options,
    *,
    forward_bytes: float,
    backward_bytes: float,
) -> list[Row]:
    """Compare an operator in GB/s: its forward without autograd, and its backward alone.

    Args:
        name: the operator's name.
        setting: as in `compare`.
        ours: neox's operator; takes the leaves, and returns a tensor or a tuple of tensors.
        peers: name -> another implementation of the same function.
        leaves: float inputs; all receive gradients.
        options: from `parse`.
        forward_bytes: bytes that a forward must read and write.
        backward_bytes: bytes that a backward must read and write.
    """
    inputs = tuple(leaf.detach() for leaf in leaves)
    tracked = tuple(leaf.detach().requires_grad_() for leaf in leaves)

    def forward(op):
        return lambda: op(*inputs)

    def backward(op):
        outputs = op(*tracked)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        douts = tuple(torch.randn_like(output) for output in outputs)
        return lambda: torch.autograd.grad(outputs, tracked, douts, retain_graph=True)

    rows = []
    for part, call_of, moved in (("forward", forward, forward_bytes), ("backward", backward, backward_bytes)):
        calls = {peer: call_of(op) for peer, op in peers.items()}
        rows += compare(f"{name} {part}", setting, call_of(ours), calls, options, work=moved / 1e9, unit="GB/s")
    return rows


def with_compiled(eager: Callable[..., object], options: Options) -> dict[str, Callable[..., object]]:
    """The peers "torch eager" and, without --quick, "torch.compile" of one function."""
    return {"torch eager": eager} if options.quick else {"torch eager": eager, "torch.compile": torch.compile(eager)}


def liger(name: str, options: Options) -> dict[str, Callable[..., object]]:
    """The peer "Liger", the Triton kernel liger_<name>, on a GPU where its package is installed."""
    if options.device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return {}
    return {"Liger": getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}")}


def new_parser(description: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has. `quick` describes what --quick reduces."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON list to stdout, and the table to stderr")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def parse(description: str | None) -> Options:
    """Parse the command line, and pin the process to as many CPUs as it has threads."""
    parser = new_parser(description, "smaller inputs and fewer rounds: under a minute")
    parser.add_argument("--threads", type=int, default=1, help="threads of neox and of the peers")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU, at the shapes of Pythia-1.4B and 160M"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch detects no GPU")
        torch.set_default_device("cuda")
    else:
        cpus = sorted(os.sched_getaffinity(0))
        if not 1 <= args.threads <= len(cpus):
            parser.error(f"--threads must be 1 to {len(cpus)}, the CPUs of this process; got {args.threads}")
        os.sched_setaffinity(0, cpus[: args.threads])
        torch.set_num_threads(args.threads)
    return Options(json=args.json, quick=args.quick, threads=args.threads, device=args.device)


def report(rows: Iterable[Row], options: Options) -> None:
    """Print each row as it is measured, and with --json the JSON at the end. If a row raises, the rows before it are
    printed as JSON all the same.
    """
    table, done = sys.stderr if options.json else sys.stdout, []
    print(f"torch {torch.__version__}, {os.uname().machine}; ratio > 1: ours is better", file=sys.stderr)
    try:
        for row in rows:
            done.append(row)
            record.add(asdict(row))
            time = f"{row.seconds * 1e6:9.1f} us" if row.seconds else ""
            figures = (
                f"{time:12}  ours {row.ours:10.4g}  {row.peer_name:20} {row.peer:10.4g} {row.unit:8} ratio "
                f"{row.ratio:5.2f}"
            )
            print(f"{row.name:32} {row.setting:40} {figures}", file=table, flush=True)
    finally:
        if options.json:
            printed = [{key: value for key, value in asdict(row).items() if key != "seconds"} for row in done]
            print(json.dumps(printed), flush=True)


def run(description: str | None, rows: Callable[[Options], Iterable[Row]]) -> None:
    """Parse the command line, measure, and print the rows."""
    options = parse(description)
    report(rows(options), options)
