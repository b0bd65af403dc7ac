"""One training step of Pythia-160M and Pythia-1.4B in bf16 on one GPU, neox against transformers' GPTNeoXForCausalLM
with sdpa, eager and compiled.

All have bf16 weights and activations, fused AdamW, and the same random tokens; their first losses are compared. Each
implementation has the GPU to itself: it makes warm-up steps, which include compilation, and then steps between two
events, without a transfer to the host. The rows give tokens/s, and MFU: FLOPs with attention in full
(GPT.flops_per_token) over the dense peak of the data sheet (neox/train/metrics.py). --quick runs Pythia-160M without
the compiled peer. --device cpu tries the script with Pythia-14M in fp32.
It has not run on a GPU yet.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import Options, Row, dtype_name, new_parser, rate_row, report, seconds_per_call
from training_step import check_first_losses, training_step
from transformers_peer import build_peer, neox_copy, peer_loss

from neox.config.load import load_config
from neox.config.schema import ModelConfig
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.train.metrics import peak_flops

NEOX, EAGER, COMPILED = "neox", "transformers eager", "transformers compiled"
LOSS_TOLERANCE = 2e-2  # relative, bf16
WARM_UP, ROUNDS, STEPS = 3, 5, 5


@dataclass(frozen=True)
class Case:
    """A preset under configs/, and its batch."""

    preset: str
    batch: int
    seq: int = 2048

    def model(self) -> ModelConfig:
        """The preset's model."""
        return load_config(self.preset).model


CASES = (Case("pythia/160M.yml", 16), Case("pythia/1-4B.yml", 8))
CPU_CASE = Case("pythia/14M.yml", 1, 64)


def dtype_on(device: torch.device) -> torch.dtype:
    """The dtype of weights and activations. fp32 on a CPU, where a trial in bf16 would take too long."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Time of a call; on a GPU between two events."""
    if device.type == "cpu":
        return seconds_per_call(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def build_step(name: str, case: Case, device: torch.device) -> Callable[[], torch.Tensor]:
    """The training step of one implementation. All start from the same random weights."""
    dtype, shape = dtype_on(device), case.model()
    torch.manual_seed(0)
    with device:
        peer = build_peer(shape).to(dtype).train()
    tokens, targets = torch.randint(
        shape.vocab_size, (2, case.batch, case.seq), generator=torch.Generator().manual_seed(0)
    ).to(device)
    if name == NEOX:
        model = neox_copy(peer, Mesh.single(device), dtype).train()
        return training_step(model, lambda: model(tokens, targets, expected_dloss=1 / targets.numel()).mean())
    loss = torch.compile(peer_loss) if name == COMPILED else peer_loss
    return training_step(peer, lambda: loss(peer, tokens, targets))


def measure(name: str, case: Case, device: torch.device) -> tuple[float, float]:
    """First loss of an implementation, and its median seconds per step."""
    step = build_step(name, case, device)
    first = step().item()
    for _ in range(WARM_UP):
        step()

    def steps() -> None:
        for _ in range(STEPS):
            step()

    return first, statistics.median(seconds_of(steps, device) / STEPS for _ in range(ROUNDS))


def compare(case: Case, peers: tuple[str, ...], device: torch.device) -> Iterator[Row]:
    """Compare tokens/s with each peer, and MFU with the fastest of them.

    Raises:
        RuntimeError: the first losses differ.
    """
    seconds, losses = {}, {}
    for name in (NEOX, *peers):
        losses[name], seconds[name] = measure(name, case, device)
        check_first_losses(losses, LOSS_TOLERANCE)
        gc.collect()
        torch.cuda.empty_cache()
    tokens, dtype = case.batch * case.seq, dtype_on(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    setting = f"{case.preset.removesuffix('.yml')} {case.batch}x{case.seq} {dtype_name(dtype)}, {where}"
    for peer in peers:
        yield rate_row("training step", setting, tokens / seconds[NEOX], tokens / seconds[peer], peer, "tokens/s")
    flops = GPT(case.model(), Mesh.single("meta")).flops_per_token(case.seq) * tokens
    fastest = min(peers, key=lambda peer: seconds[peer])
    mfu = {name: flops / seconds[name] / peak_flops(device, dtype) * 100 for name in (NEOX, fastest)}
    yield rate_row("training step, MFU", setting, mfu[NEOX], mfu[fastest], fastest, "%")


def main() -> int:
    """Parse the command line and print the rows."""
    parser = new_parser(__doc__, "Pythia-160M against the eager peer: under a minute")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial with a small model")
    args = parser.parse_args()
    options = Options(json=args.json, quick=args.quick, device=args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"{parser.prog}: torch detects no GPU; nothing is measured", file=sys.stderr)
        report([], options)
        return 0
    peers = (EAGER,) if args.quick else (EAGER, COMPILED)
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    cases = (CPU_CASE,) if args.device == "cpu" else CASES[: 1 if args.quick else None]
    report((row for case in cases for row in compare(case, peers, device)), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
