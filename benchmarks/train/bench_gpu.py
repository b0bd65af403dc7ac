"""One training step of Pythia-160M and Pythia-1.4B in bf16 on one GPU, ours against transformers' GPTNeoXForCausalLM
with sdpa, eager and compiled.

All have bf16 weights and activations, fused AdamW and the same random tokens; first losses are compared before anything
is timed. Each model is on the GPU alone: one after another, a warm-up that includes compilation, then timed steps
between two events, without a transfer to the host inside. The rows give tokens/s; MFU counts attention in full
(GPT.flops_per_token) against the data sheet's dense peak (neox/train/metrics.py). --quick takes Pythia-160M alone,
without its compiled peer. --device cpu tries the script with Pythia-14M in fp32. It has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, show

from neox.config.load import load_config
from neox.convert.huggingface import from_huggingface
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.train.metrics import peak_flops

OURS = "neox"
LOSS_TOLERANCE = 2e-2  # relative, bf16
WARM_UP, ROUNDS, STEPS = 3, 5, 5


@dataclass(frozen=True)
class Case:
    """A preset under configs/, and its batch."""

    preset: str
    batch: int
    seq: int = 2048


CASES = (Case("pythia/160M.yml", 16), Case("pythia/1-4B.yml", 8))
TRIAL = Case("pythia/14M.yml", 1, 64)  # on a CPU


def their_model(case: Case, device: torch.device) -> GPTNeoXForCausalLM:
    """transformers' model of the preset's shape with random weights, the same at every call."""
    model = load_config(case.preset).model
    config = GPTNeoXConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_position_embeddings,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": model.rope_theta,
            "partial_rotary_factor": model.rotary_pct,
        },
        use_parallel_residual=model.parallel_residual,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with device:
        return GPTNeoXForCausalLM(config).to(dtype_on(device)).train()


def dtype_on(device: torch.device) -> torch.dtype:
    """Of weights and activations: kernels for bf16 on a CPU would take the time of a measurement."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call, on a GPU by its own clock."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def loss_of(
    name: str, case: Case, device: torch.device
) -> tuple[torch.nn.Module, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """A contestant's model, and its mean loss of (tokens, targets)."""
    theirs = their_model(case, device)
    if name == OURS:
        config, weights = from_huggingface(theirs)
        ours = GPT(config, Mesh.single(device), dtype=dtype_on(device))
        ours.load_weights(weights)
        return ours.train(), lambda tokens, targets: ours(tokens, targets, expected_dloss=1 / targets.numel()).mean()

    def their_loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(theirs(input_ids=tokens).logits.float().flatten(0, 1), targets.flatten())

    return theirs, torch.compile(their_loss) if name == "transformers compiled" else their_loss


def run(name: str, case: Case, device: torch.device) -> tuple[float, float]:
    """(first loss, seconds per step) of one contestant: median over rounds of STEPS steps."""
    model, mean_loss = loss_of(name, case, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens, targets = torch.randint(
        model.config.vocab_size, (2, case.batch, case.seq), generator=torch.Generator().manual_seed(0)
    ).to(device)

    def step() -> torch.Tensor:
        loss = mean_loss(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first = step().item()
    for _ in range(WARM_UP):
        step()

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return first, statistics.median(seconds_of(steps, device) / STEPS for _ in range(ROUNDS))


def compare(case: Case, peers: tuple[str, ...], device: torch.device) -> Iterator[Row]:
    """tokens/s against each peer, then MFU against the best of them.

    Raises:
        RuntimeError: first losses differ: the comparison would be of two different things.
    """
    seconds = {}
    ours_first = 0.0
    for name in (OURS, *peers):
        first, seconds[name] = run(name, case, device)
        ours_first = first if name == OURS else ours_first
        if not abs(first - ours_first) <= LOSS_TOLERANCE * ours_first:
            raise RuntimeError(f"the models are not the same: first losses {ours_first} and, of {name}, {first}")
        gc.collect()
        torch.cuda.empty_cache()
    tokens = case.batch * case.seq
    dtype = dtype_on(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shape = f"{case.preset.removesuffix('.yml')} {case.batch}x{case.seq}"
    setting = f"{shape} {str(dtype).removeprefix('torch.')}, {where}"
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
    flops = GPT(load_config(case.preset).model, Mesh.single("meta")).flops_per_token(case.seq) * tokens
    best = min(peers, key=lambda peer: seconds[peer])
    mfu = {name: flops / seconds[name] / peak_flops(device, dtype) * 100 for name in (OURS, best)}
    yield Row("training step, MFU", setting, mfu[OURS], mfu[best], best, mfu[OURS] / mfu[best], "%")


def main() -> int:
    """Reads the command line, prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else")
    parser.add_argument("--quick", action="store_true", help="Pythia-160M against the eager peer: under a minute")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial with a small model")
    args = parser.parse_args()
    options = Options(json=args.json, quick=args.quick, threads=1, device=args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"{parser.prog}: torch sees no GPU here: nothing measured", file=sys.stderr)
        show([], options)
        return 0
    peers = ("transformers eager",) if args.quick else ("transformers eager", "transformers compiled")
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    cases = (TRIAL,) if args.device == "cpu" else CASES[: 1 if args.quick else None]
    show((row for case in cases for row in compare(case, peers, device)), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
