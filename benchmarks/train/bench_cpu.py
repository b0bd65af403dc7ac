"""One training step of Pythia-160M on a CPU, ours against transformers' GPTNeoXForCausalLM with sdpa: forward, loss, backward, fused AdamW.

Both models have the same weights and see the same tokens, and their losses are compared before anything is timed. bf16 means bf16 weights
and activations for both. torch's own bf16 product, which the peer uses, is slower than its fp32 one on CPUs without fast bf16 dot products
(10 to 100 times where it is emulated), so bf16 gets few rounds; `neox.ops.backend("linear")` says what ours runs. --quick takes 1 x 128
tokens instead of 4 x 512.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, seconds_per_call, show

from neox.convert.huggingface import from_huggingface
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

VOCAB = 50304
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative
ROUNDS = {torch.float32: 5, torch.bfloat16: 3}
PEER = "transformers sdpa"


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


def contestants(dtype: torch.dtype, batch: int, seq: int) -> dict[str, Callable[[], float]]:
    """A step of ours ("") and of the peer.

    Raises:
        RuntimeError: their first losses differ: the comparison would be of two different things.
    """
    theirs = their_model(dtype)
    ours = our_model(theirs, dtype)
    tokens, targets = torch.randint(VOCAB, (2, batch, seq))
    steps = {
        "": step_of(ours, lambda: ours.loss(tokens, targets).mean()),
        PEER: step_of(theirs, lambda: functional.cross_entropy(theirs(input_ids=tokens).logits.float().flatten(0, 1), targets.flatten())),
    }
    losses = {name: step() for name, step in steps.items()}
    if not abs(losses[""] - losses[PEER]) <= LOSS_TOLERANCE[dtype] * losses[PEER]:
        raise RuntimeError(f"the two models are not the same: first losses {losses['']} and {losses[PEER]}")
    return steps


def rows(thread_counts: list[int], quick: bool) -> Iterator[Row]:
    """fp32 and bf16 at each number of threads: medians of tokens/s over interleaved rounds."""
    batch, seq = (1, 128) if quick else (4, 512)
    cpus = sorted(os.sched_getaffinity(0))
    for threads in thread_counts:
        os.sched_setaffinity(0, cpus[:threads])
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            steps = contestants(dtype, batch, seq)
            rounds = [{name: seconds_per_call(step, 1) for name, step in steps.items()} for _ in range(2 if quick else ROUNDS[dtype])]
            ours, peer = (statistics.median(times[name] for times in rounds) for name in ("", PEER))
            setting = f"Pythia-160M {batch}x{seq} {str(dtype).removeprefix('torch.')}, {threads} thread{'s' if threads > 1 else ''}"
            yield Row("training step", setting, batch * seq / ours, batch * seq / peer, PEER, peer / ours, "tokens/s")


def main() -> None:
    """Reads the command line, prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("--quick", action="store_true", help="1 x 128 tokens and fewer rounds: under a minute")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads, each of ours and of the peer")
    args = parser.parse_args()
    available = len(os.sched_getaffinity(0))
    counts = sorted(count for count in args.threads if 1 <= count <= available)
    if len(counts) < len(args.threads):
        print(f"this process has {available} CPUs: thread counts beyond it are left out", file=sys.stderr)
    show(rows(counts, args.quick), Options(json=args.json, quick=args.quick, threads=max(counts, default=1)))


if __name__ == "__main__":
    main()
