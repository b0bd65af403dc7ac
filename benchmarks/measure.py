"""Measuring by interleaved rounds, and the rows every benchmark prints.

A round times each contestant once, one after another, so that a change of clock or a busy neighbour meets all of them;
the figure of a contestant is its median over the rounds. Inputs are random: zeros run faster than data.

On a GPU (--device cuda) a call is timed by events around it, after a write that is far larger than the caches has
preceded it: the caches are cold, and while the GPU writes the host gets ahead, so that launch gaps are not part of the
figure. An operator in GB/s has a row with the peer "memory copy", the same number of bytes copied in the same rounds:
its ratio is the share of the copy bandwidth that ours reaches.
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

import record
import torch

FLUSH_BYTES = 1 << 30
COPY = "memory copy"


@dataclass(frozen=True)
class Options:
    """Command line of a benchmark."""

    json: bool
    quick: bool
    threads: int
    device: str = "cpu"

    @property
    def rounds(self) -> int:
        """Rounds per comparison."""
        return 5 if self.quick or self.device == "cuda" else 15

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """What is measured: on a GPU the type that models are trained in."""
        return (torch.bfloat16,) if self.device == "cuda" else (torch.float32, torch.bfloat16)

    @property
    def place(self) -> str:
        """Where it ran, for the setting of a row."""
        return (
            torch.cuda.get_device_name()
            if self.device == "cuda"
            else f"{self.threads} thread" + ("s" if self.threads > 1 else "")
        )

    def shapes(self, quick: Sequence, cpu: Sequence, cuda: Sequence) -> Sequence:
        """The shapes for this machine and this time."""
        return cuda if self.device == "cuda" else quick if self.quick else cpu

    @property
    def seconds(self) -> float:
        """Least time of one contestant in one round."""
        return 0.01 if self.quick else 0.1


@dataclass(frozen=True)
class Row:
    """One comparison. `ours` and `peer` are in `unit`; ratio > 1 means that ours is better. `seconds` of one call of
    ours are for the table alone.
    """

    name: str
    setting: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str
    seconds: float | None = None


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Mean wall time of one call over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def gpu_seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Median GPU time of one call, its launches queued and the caches cold."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def medians(contestants: dict[str, Callable[[], object]], options: Options) -> dict[str, float]:
    """Median seconds per call of each contestant over interleaved rounds, after a warm-up that also fixes the calls
    per round.
    """
    clock = gpu_seconds_per_call if options.device == "cuda" else seconds_per_call
    calls = {}
    for name, call in contestants.items():
        call()
        least, most = (3, 20) if options.device == "cuda" else (1, sys.maxsize)
        calls[name] = min(max(least, round(options.seconds / max(clock(call, 1), 1e-7))), most)
    rounds = [{name: clock(call, calls[name]) for name, call in contestants.items()} for _ in range(options.rounds)]
    return {name: statistics.median(times[name] for times in rounds) for name in contestants}


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
    """Rows of ours against each peer.

    Args:
        name: what is measured, such as "bias_gelu forward".
        setting: shape, dtype and whatever else distinguishes the rows.
        ours: one run of ours.
        peers: name -> one run of theirs, on the same inputs.
        options: from `parse`.
        work: amount of work of one call in units of 1e-9 `unit` seconds (bytes for "GB/s", operations for "GFLOP/s");
            without it the figures are microseconds.
        unit: "us", or what `work` makes of it.
    """
    if unit == "GB/s" and work:
        peers = {**peers, COPY: memory_copy(int(work))}
    times = medians({"": ours, **peers}, options)
    figure = {key: seconds * 1e6 if work is None else work / seconds / 1e9 for key, seconds in times.items()}
    return [
        Row(
            name,
            f"{setting}, {options.place}",
            figure[""],
            figure[peer],
            peer,
            times[peer] / times[""],
            unit,
            times[""],
        )
        for peer in peers
    ]


def memory_copy(moved: int) -> Callable[[], object]:
    """A copy that reads and writes `moved` bytes together."""
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
    """Rows in GB/s for an operator's forward without autograd and for its backward alone.

    Args:
        name: of the operator.
        setting: as in `compare`.
        ours: called with the leaves; returns a tensor or a tuple of tensors.
        peers: name -> the same function by other means.
        leaves: float inputs; all receive gradients.
        options: from `parse`.
        forward_bytes: what a forward must move.
        backward_bytes: what a backward must move.
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
    for part, run, work in (("forward", forward, forward_bytes), ("backward", backward, backward_bytes)):
        rows += compare(
            f"{name} {part}",
            setting,
            run(ours),
            {peer: run(op) for peer, op in peers.items()},
            options,
            work=work,
            unit="GB/s",
        )
    return rows


def with_compiled(eager: Callable[..., object], options: Options) -> dict[str, Callable[..., object]]:
    """The peers "torch eager" and, unless quick, "torch.compile" of one function."""
    return {"torch eager": eager} if options.quick else {"torch eager": eager, "torch.compile": torch.compile(eager)}


def liger(name: str, options: Options) -> dict[str, Callable[..., object]]:
    """The peer "Liger", its Triton kernel liger_<name>: on a GPU where the package is installed."""
    if options.device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return {}
    return {"Liger": getattr(importlib.import_module("liger_kernel.transformers.functional"), f"liger_{name}")}


def parse(description: str) -> Options:
    """Reads the command line and pins the process to as many CPUs as it has threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("--quick", action="store_true", help="smaller inputs and fewer rounds: under a minute")
    parser.add_argument("--threads", type=int, default=1, help="threads of ours and of the peers")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU, at the shapes of Pythia-1.4B and 160M"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no GPU")
        torch.set_default_device("cuda")
        return Options(json=args.json, quick=args.quick, threads=args.threads, device="cuda")
    cpus = sorted(os.sched_getaffinity(0))
    if not 1 <= args.threads <= len(cpus):
        parser.error(f"--threads must be 1 to {len(cpus)}, the CPUs of this process; got {args.threads}")
    os.sched_setaffinity(0, cpus[: args.threads])
    torch.set_num_threads(args.threads)
    return Options(json=args.json, quick=args.quick, threads=args.threads)


def show(rows: Iterable[Row], options: Options) -> None:
    """Prints the rows as they come, with --json on the error stream, and then the JSON: of the rows that there are,
    should one raise.
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
            print(
                json.dumps([{key: value for key, value in asdict(row).items() if key != "seconds"} for row in done]),
                flush=True,
            )
