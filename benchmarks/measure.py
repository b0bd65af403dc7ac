"""Measuring by interleaved rounds, and the rows every benchmark prints.

A round times each contestant once, one after another, so that a change of clock or a busy neighbour meets all of them; the figure of a
contestant is its median over the rounds. Inputs are random: zeros run faster than data.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Options:
    """Command line of a benchmark."""

    json: bool
    quick: bool
    threads: int

    @property
    def rounds(self) -> int:
        """Rounds per comparison."""
        return 5 if self.quick else 15

    @property
    def seconds(self) -> float:
        """Least time of one contestant in one round."""
        return 0.01 if self.quick else 0.1


@dataclass(frozen=True)
class Row:
    """One comparison. `ours` and `peer` are in `unit`; ratio > 1 means that ours is better."""

    name: str
    setting: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    unit: str


def seconds_per_call(call: Callable[[], object], calls: int) -> float:
    """Mean wall time of one call over `calls` of them."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def medians(contestants: dict[str, Callable[[], object]], options: Options) -> dict[str, float]:
    """Median seconds per call of each contestant over interleaved rounds, after a warm-up that also fixes the calls per round."""
    calls = {}
    for name, call in contestants.items():
        call()
        calls[name] = max(1, round(options.seconds / max(seconds_per_call(call, 1), 1e-7)))
    rounds = [{name: seconds_per_call(call, calls[name]) for name, call in contestants.items()} for _ in range(options.rounds)]
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
        work: amount of work of one call in units of 1e-9 `unit` seconds (bytes for "GB/s", operations for "GFLOP/s"); without it the
            figures are microseconds.
        unit: "us", or what `work` makes of it.
    """
    times = medians({"": ours, **peers}, options)
    figure = {key: seconds * 1e6 if work is None else work / seconds / 1e9 for key, seconds in times.items()}
    threads = f"{options.threads} thread" + ("s" if options.threads > 1 else "")
    return [Row(name, f"{setting}, {threads}", figure[""], figure[peer], peer, times[peer] / times[""], unit) for peer in peers]


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
        rows += compare(f"{name} {part}", setting, run(ours), {peer: run(op) for peer, op in peers.items()}, options, work=work, unit="GB/s")
    return rows


def with_compiled(eager: Callable[..., object], options: Options) -> dict[str, Callable[..., object]]:
    """The peers "torch eager" and, unless quick, "torch.compile" of one function."""
    return {"torch eager": eager} if options.quick else {"torch eager": eager, "torch.compile": torch.compile(eager)}


def parse(description: str) -> Options:
    """Reads the command line and pins the process to as many CPUs as it has threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("--quick", action="store_true", help="smaller inputs and fewer rounds: under a minute")
    parser.add_argument("--threads", type=int, default=1, help="threads of ours and of the peers")
    args = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if not 1 <= args.threads <= len(cpus):
        parser.error(f"--threads must be 1 to {len(cpus)}, the CPUs of this process; got {args.threads}")
    os.sched_setaffinity(0, cpus[: args.threads])
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    return Options(json=args.json, quick=args.quick, threads=args.threads)


def show(rows: Iterable[Row], options: Options) -> None:
    """Prints the rows: as they come in a table, or all at the end as JSON."""
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"torch {torch.__version__}, {os.uname().machine}; ratio > 1: ours is better", file=sys.stderr)
    for row in rows:
        print(f"{row.name:32} {row.setting:40} ours {row.ours:10.4g}  {row.peer_name:20} {row.peer:10.4g} {row.unit:8} ratio {row.ratio:5.2f}", flush=True)
