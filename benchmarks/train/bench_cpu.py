"""One training step of Pythia-160M on a CPU, neox against transformers' GPTNeoXForCausalLM with sdpa: forward, loss,
backward, fused AdamW.

Each implementation runs in its own process, which also separates their peak memory. A round is one step of each. All
start from the same weights and train on the same tokens, and their first losses are compared before a step is timed.

Peers are transformers as it is, and with freed memory retained in the process (neox/train/memory.py), as `neox train`
does and no script of transformers does; in bf16 also autocast over fp32 weights. Otherwise bf16 means bf16 weights and
activations in both. torch's bf16 matrix product is far slower than its fp32 one on CPUs without bf16 dot products, so
bf16 has few rounds; `neox.ops.backend("linear")` reports which product neox runs.

The last row compares neox's FLOP/s (GPT.flops_per_token, attention in full) with torch's fp32 product of 2048^3 in the
same rounds. --quick trains on 1 x 128 tokens instead of 4 x 512.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read before torch is imported: with OMP_PROC_BIND it binds this thread to one CPU.
CPUS = sorted(os.sched_getaffinity(0))

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, cost_row, counted, new_parser, rate_row, report, seconds_per_call
from training_step import check_first_losses, training_step
from transformers_peer import build_peer, neox_copy, peer_loss

from neox.config.load import load_config
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.train.memory import keep_freed_memory

MODEL = load_config("pythia/160M.yml").model
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative
ROUNDS = {"fp32": 5, "bf16": 3}
NEOX, PLAIN, RETAINED, AUTOCAST = "neox", "transformers", "transformers retained", "transformers autocast"
PEERS = {"fp32": (PLAIN, RETAINED), "bf16": (PLAIN, RETAINED, AUTOCAST)}
PRODUCT = 2048  # side of the matrices of the fp32 product


def build_step(name: str, dtype: str, batch: int, seq: int) -> Callable[[], torch.Tensor]:
    """The training step of one implementation."""
    if name in (NEOX, RETAINED):
        keep_freed_memory()
    torch.manual_seed(0)
    peer = build_peer(MODEL).to(torch.float32 if name == AUTOCAST else DTYPES[dtype]).train()
    tokens, targets = torch.randint(MODEL.vocab_size, (2, batch, seq), generator=torch.Generator().manual_seed(0))
    if name == NEOX:
        model = neox_copy(peer, Mesh.single(), DTYPES[dtype]).train()
        return training_step(model, lambda: model(tokens, targets).mean())

    def mean_loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=name == AUTOCAST):
            return peer_loss(peer, tokens, targets)

    return training_step(peer, mean_loss)


def run_worker(name: str, dtype: str, batch: int, seq: int) -> None:
    """Make one step per line of stdin, and answer with a line: seconds, loss, peak resident bytes, GFLOP/s of the
    product.
    """
    step = build_step(name, dtype, batch, seq)
    losses: list[float] = []
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    for _ in sys.stdin:
        seconds = seconds_per_call(lambda: losses.append(step().item()))
        product = 2 * PRODUCT**3 / seconds_per_call(lambda: a @ b, 2) / 1e9 if name == NEOX else 0.0
        print(seconds, losses[-1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, product, flush=True)


class Worker:
    """A process that trains with one implementation, on the CPUs of this process."""

    def __init__(self, name: str, dtype: str, threads: int, shape: tuple[int, int]):
        options = ["--worker", name, "--dtype", dtype, "--threads", str(threads), "--shape", *map(str, shape)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> tuple[float, ...]:
        """Make one step; returns its seconds and loss, the peak resident bytes, and the GFLOP/s of the product.

        Raises:
            RuntimeError: the process exited.
        """
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.process.args)}: exit code {self.process.wait()}")
        return tuple(map(float, line.split()))

    def close(self) -> None:
        """Close stdin, which ends the process, and wait for it."""
        self.process.communicate()


def compare(dtype: str, threads: int, shape: tuple[int, int], rounds: int, peers: tuple[str, ...]) -> Iterator[Row]:
    """Compare speed and peak memory with each peer, and FLOP/s with torch's product.

    Raises:
        RuntimeError: the first losses differ.
    """
    workers = {name: Worker(name, dtype, threads, shape) for name in (NEOX, *peers)}
    try:
        check_first_losses({name: worker.step()[1] for name, worker in workers.items()}, LOSS_TOLERANCE[dtype])
        results = [{name: worker.step() for name, worker in workers.items()} for _ in range(rounds)]
    finally:
        for worker in workers.values():
            worker.close()
    tokens = shape[0] * shape[1]
    seconds = {name: statistics.median(result[name][0] for result in results) for name in workers}
    memory = {name: results[-1][name][2] / 1e9 for name in workers}
    setting = f"Pythia-160M {shape[0]}x{shape[1]} {dtype}, {counted(threads, 'thread')}"
    for peer in peers:
        yield rate_row("training step", setting, tokens / seconds[NEOX], tokens / seconds[peer], peer, "tokens/s")
        yield cost_row("training step, peak memory", setting, memory[NEOX], memory[peer], peer, "GB")
    flops = GPT(MODEL, Mesh.single(torch.device("meta"))).flops_per_token(shape[1]) * tokens
    product = statistics.median(result[NEOX][3] for result in results)
    gflops = flops / seconds[NEOX] / 1e9
    yield rate_row("training step, arithmetic", setting, gflops, product, "torch fp32 product", "GFLOP/s")


def main() -> None:
    """Parse the command line and print the rows, or run as a worker."""
    parser = new_parser(__doc__, "1 x 128 tokens and fewer rounds: under a minute")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads to measure with")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights and activations")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS["bf16"], default=list(PEERS["bf16"]), help="autocast is for bf16 only"
    )
    parser.add_argument("--rounds", type=int, help="timed steps; default: 5 in fp32, 3 in bf16, 2 with --quick")
    # of the processes that Worker starts
    parser.add_argument("--worker", choices=(NEOX, *PEERS["bf16"]), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    threads = sorted(count for count in args.threads if 1 <= count <= len(CPUS))
    if not threads:
        parser.error(f"--threads must be 1 to {len(CPUS)}, the CPUs of this process; got {args.threads}")
    if args.worker:
        os.sched_setaffinity(0, CPUS[: threads[0]])
        torch.set_num_threads(threads[0])
        return run_worker(args.worker, args.dtype[0], *args.shape)
    os.sched_setaffinity(0, CPUS)  # the workers inherit it
    if len(threads) < len(args.threads):
        print(f"this process has {len(CPUS)} CPUs; other thread counts are omitted", file=sys.stderr)
    shape = (1, 128) if args.quick else (4, 512)
    rows = (
        row
        for count in threads
        for dtype in args.dtype
        for row in compare(
            dtype,
            count,
            shape,
            args.rounds or (2 if args.quick else ROUNDS[dtype]),
            tuple(peer for peer in PEERS[dtype] if peer in args.peers),
        )
    )
    return report(rows, Options(json=args.json, quick=args.quick, threads=max(threads)))


if __name__ == "__main__":
    main()
