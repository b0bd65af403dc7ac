"""One training step of Pythia-160M on a CPU, ours against transformers' GPTNeoXForCausalLM with sdpa: forward, loss,
backward, fused AdamW.

Every contestant is a process of its own, so that its peak memory is its own too, and a round lets each make one step.
All start from the same weights and see the same tokens; their losses are compared before anything is timed. Peers:
transformers as it is, and with freed memory retained in the process as `neox train` keeps it (neox/train/memory.py),
which no script of theirs does; in bf16 also autocast over fp32 weights. bf16 is otherwise bf16 weights and activations
for both. The peer's own bf16 product is far slower than its fp32 one on CPUs without fast bf16 dot products, so bf16
gets few rounds; `neox.ops.backend("linear")` reports what ours runs. The last row sets our arithmetic
(GPT.flops_per_token: attention in full) against torch's fp32 product of 2048^3 in the same round. --quick takes 1 x 128
tokens instead of 4 x 512.
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

# before torch: with OMP_PROC_BIND its threads, the first too, are bound to one CPU each
CPUS = sorted(os.sched_getaffinity(0))

import torch
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, seconds_per_call, show

from neox.convert.huggingface import from_huggingface
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.train.memory import keep_freed_memory

VOCAB = 50304
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # relative
ROUNDS = {"fp32": 5, "bf16": 3}
OURS = "neox"
PEERS = {
    "fp32": ("transformers", "transformers retained"),
    "bf16": ("transformers", "transformers retained", "transformers autocast"),
}
PRODUCT = 2048  # side of the matrices of the fp32 product


def their_model(dtype: torch.dtype) -> GPTNeoXForCausalLM:
    """Pythia-160M with random weights."""
    config = GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return GPTNeoXForCausalLM(config).to(dtype).train()


def our_model(theirs: GPTNeoXForCausalLM, dtype: torch.dtype) -> GPT:
    """The same model with the same weights."""
    config, weights = from_huggingface(theirs)
    model = GPT(config, Mesh.single(), dtype=dtype)
    model.load_weights(weights)
    return model.train()


def step_of(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """One optimizer step on the mean loss; returns the loss before it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> float:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.item()

    return step


def contestant(name: str, dtype: str, batch: int, seq: int) -> Callable[[], float]:
    """The step of one contestant."""
    if name in (OURS, "transformers retained"):
        keep_freed_memory()
    autocast = name == "transformers autocast"
    torch.manual_seed(0)
    theirs = their_model(torch.float32 if autocast else DTYPES[dtype])
    tokens, targets = torch.randint(VOCAB, (2, batch, seq), generator=torch.Generator().manual_seed(0))
    if name == OURS:
        ours = our_model(theirs, DTYPES[dtype])
        return step_of(ours, lambda: ours(tokens, targets).mean())

    def their_loss() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = theirs(input_ids=tokens).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return step_of(theirs, their_loss)


def compete(args: argparse.Namespace) -> None:
    """The life of a contestant's process: a line in, a step made, a line out: its seconds, its loss, peak resident
    bytes, GFLOP/s of a product.
    """
    step = contestant(args.contestant, args.dtype[0], *args.shape)
    losses: list[float] = []
    a, b = torch.randn(2, PRODUCT, PRODUCT)
    for _ in sys.stdin:
        seconds = seconds_per_call(lambda: losses.append(step()), 1)
        product = 2 * PRODUCT**3 / seconds_per_call(lambda: a @ b, 2) / 1e9 if args.contestant == OURS else 0.0
        print(seconds, losses[-1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, product, flush=True)


class Process:
    """A contestant in a process of its own, started with the CPUs that this one has."""

    def __init__(self, name: str, dtype: str, threads: int, shape: tuple[int, int]):
        options = ["--contestant", name, "--dtype", dtype, "--threads", str(threads), "--shape", *map(str, shape)]
        self.child = subprocess.Popen(
            [sys.executable, __file__, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def step(self) -> tuple[float, ...]:
        """(seconds, loss, peak resident bytes, GFLOP/s of the product) of one step.

        Raises:
            RuntimeError: the process has ended.
        """
        self.child.stdin.write("step\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.child.args)} ended with {self.child.wait()}")
        return tuple(map(float, line.split()))

    def close(self) -> None:
        """End the process."""
        self.child.communicate()


def compare(dtype: str, threads: int, shape: tuple[int, int], rounds: int, peers: tuple[str, ...]) -> Iterator[Row]:
    """Speed and peak memory against each peer, and our share of torch's own product.

    Raises:
        RuntimeError: first losses differ: the comparison would be of two different things.
    """
    processes = {name: Process(name, dtype, threads, shape) for name in (OURS, *peers)}
    try:
        first = {name: process.step()[1] for name, process in processes.items()}
        for name, loss in first.items():
            if not abs(loss - first[OURS]) <= LOSS_TOLERANCE[dtype] * first[OURS]:
                raise RuntimeError(f"the models are not the same: first losses {first[OURS]} and, of {name}, {loss}")
        results = [{name: process.step() for name, process in processes.items()} for _ in range(rounds)]
    finally:
        for process in processes.values():
            process.close()
    seconds = {name: statistics.median(result[name][0] for result in results) for name in processes}
    memory = {name: results[-1][name][2] / 1e9 for name in processes}
    tokens = shape[0] * shape[1]
    setting = f"Pythia-160M {shape[0]}x{shape[1]} {dtype}, {threads} thread{'s' if threads > 1 else ''}"
    for peer in peers:
        yield Row(
            "training step",
            setting,
            tokens / seconds[OURS],
            tokens / seconds[peer],
            peer,
            seconds[peer] / seconds[OURS],
            "tokens/s",
        )
        yield Row(
            "training step, peak memory", setting, memory[OURS], memory[peer], peer, memory[peer] / memory[OURS], "GB"
        )
    with torch.device("meta"):
        config = from_huggingface(their_model(torch.float32))[0]
        flops = GPT(config, Mesh.single(torch.device("meta"))).flops_per_token(shape[1]) * tokens
    product = statistics.median(result[OURS][3] for result in results)
    yield Row(
        "training step, arithmetic",
        setting,
        flops / seconds[OURS] / 1e9,
        product,
        "torch fp32 product",
        flops / seconds[OURS] / 1e9 / product,
        "GFLOP/s",
    )


def main() -> None:
    """Reads the command line, prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("--quick", action="store_true", help="1 x 128 tokens and fewer rounds: under a minute")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, each of ours and of the peer"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights and activations")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS["bf16"],
        default=list(PEERS["bf16"]),
        help="of these, those that the dtype has",
    )
    parser.add_argument(
        "--rounds", type=int, help="timed steps of each contestant; 5 in fp32, 3 in bf16, 2 with --quick"
    )
    # the processes that this one starts
    parser.add_argument("--contestant", choices=(OURS, *PEERS["bf16"]), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    counts = sorted(count for count in args.threads if 1 <= count <= len(CPUS))
    if args.contestant:
        os.sched_setaffinity(0, CPUS[: counts[0]])
        torch.set_num_threads(counts[0])
        return compete(args)
    os.sched_setaffinity(0, CPUS)  # for the processes that it starts
    if len(counts) < len(args.threads):
        print(f"this process has {len(CPUS)} CPUs: thread counts beyond it are left out", file=sys.stderr)
    shape = (1, 128) if args.quick else (4, 512)
    settings = (
        (n, dtype, tuple(peer for peer in PEERS[dtype] if peer in args.peers)) for n in counts for dtype in args.dtype
    )
    rows = (
        row
        for n, dtype, peers in settings
        for row in compare(dtype, n, shape, args.rounds or (2 if args.quick else ROUNDS[dtype]), peers)
    )
    show(rows, Options(json=args.json, quick=args.quick, threads=max(counts, default=1)))
    return None


if __name__ == "__main__":
    main()
