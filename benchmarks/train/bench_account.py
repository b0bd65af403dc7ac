"""Counts kernels, bytes, FLOPs and peak memory of one training step on a GPU, neox against transformers.

Nothing is measured: the models run on fake CUDA tensors (tests/cuda/fake_cuda.py), and account.py counts their
operators. Neither a GPU nor an idle machine is needed.

The models have bf16 weights and activations, fused AdamW on the bf16 weights, and the same tokens. neox is counted with
its native attention, and with torch's flash attention (sdpa), which `auto` selects on a GPU.

"neox engine" is a step as `neox train` runs it: the native model under the engine, with DeepSpeed's ZeRO 1, fp32 master
weights and moments, and gradient clipping. Its phase "engine" is everything but the model: casts, accumulation, norms,
AdamW, and copies of weights. Its roofline is the sum of its operators' times at the data sheet's peak or bandwidth,
whichever is longer; the plan's time is what `neox plan` estimates for the same step.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tests.cuda import fake_device  # noqa: F401  # isort: skip  # before torch

import contextlib
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from account import Account
from measure import new_parser
from transformers_peer import build_peer, peer_loss

with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints the accelerator that it detects
    from engine_account import account_of_engine

from neox.config.load import load_config
from neox.config.schema import Config, ModelConfig
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.plan.devices import DEVICES
from neox.plan.fit import estimate
from tests.cuda.fake_cuda import FakeCuda

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NEOX = ("neox native", "neox sdpa")
ENGINE = "neox engine"
PEERS = ("transformers sdpa", "transformers eager")  # by attn_implementation; both eager, without torch.compile
PHASES = ("forward", "backward", "optimizer", "engine")
# Bytes that AdamW reads and writes per parameter.
ADAM = 14  # in bf16: reads weight, gradient and two moments; writes weight and moments
ADAM_FP32 = 28  # reads a bf16 gradient, the fp32 weight and moments; writes these three and the bf16 weight


@dataclass(frozen=True)
class Case:
    """A preset under configs/, and its batch."""

    preset: str
    batch: int
    seq: int


CASES = (Case("pythia/160M.yml", 16, 2048), Case("pythia/1-4B.yml", 8, 2048), Case("llama/3-8B.yml", 1, 8192))


def build(name: str, model: ModelConfig) -> tuple[torch.nn.Module, Loss]:
    """The model of one implementation on the fake GPU, and its mean loss of (tokens, targets)."""
    attention = name.split()[1]
    if name in NEOX:
        config = model.model_copy(update={"attention_backend": attention})
        with mock.patch.object(GPT, "initialize", lambda self: None):
            ours = GPT(config, Mesh.single("cuda"), dtype=torch.bfloat16).train()
        return ours, lambda tokens, targets: ours(tokens, targets, expected_dloss=1 / targets.numel()).mean()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            peer = build_peer(model, attention).train()
    finally:
        torch.set_default_dtype(torch.float32)
    return peer, partial(peer_loss, peer)


def config_of(case: Case) -> Config:
    """The config that `neox train` would run."""
    return load_config(
        case.preset,
        overrides=[
            f"train.micro_batch_size={case.batch}",
            f"train.global_batch_size={case.batch}",
            "train.activation_checkpointing=none",
            f"data.seq_length={case.seq}",
            "zero.stage=1",
            "model.attention_backend=native",
        ],
    )


def account_of(name: str, case: Case) -> Account:
    """The account of the second step of one implementation. The first one also allocates the optimizer state."""
    if name == ENGINE:
        return account_of_engine(config_of(case))
    # On fake tensors transformers assumes that it is traced, and builds full masks.
    traced = mock.patch("transformers.masking_utils.is_tracing", lambda *_: False)
    # transformers reads whether all positions of a sample belong to one document; `read` answers that they do.
    with FakeCuda(read=lambda _: 1), Account() as account, traced:
        model, mean_loss = build(name, load_config(case.preset).model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        tokens = torch.zeros(case.batch, case.seq, dtype=torch.int64, device="cuda")
        for _ in range(2):
            account.start()
            account.phase = "forward"
            loss = mean_loss(tokens, tokens)
            account.phase = "backward"
            loss.backward()
            account.phase = "optimizer"
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            del loss
    gc.collect()
    return account


def floor_bytes(case: Case, adam: int) -> float:
    """Bytes of a step that reads each operand and writes each result once, with element-wise operations fused.

    The operations that remain are matrix products; the embedding; per layer a norm per branch (one for both in a
    parallel block), the rotation in place, attention and the activation; the loss, which reads and writes the logits
    once; and AdamW, with `adam` bytes per parameter.
    """
    model, tokens = load_config(case.preset).model, case.batch * case.seq
    h, f, v = model.hidden_size, model.intermediate_size, model.vocab_size
    kv = model.num_kv_heads * model.head_dim
    qkv, widths = h + 2 * kv, 2 if model.gated else 1
    matrices = [(h, qkv), (h, h), *[(h, f)] * widths, (f, h)]
    products = sum(3 * (i * o + tokens * (i + o)) for i, o in matrices)
    if model.parallel_residual:
        norms = 3 + 4  # x to two outputs; x and two gradients to one
    else:
        norms = 2 * (4 + 4)  # x and delta to y and their sum; dy, x and the gradient of the sum to dx
    rotated = 2 * 2 * tokens * (h + kv) * model.rotary_pct
    attention = tokens * (qkv + h) + tokens * (2 * qkv + 2 * h)
    activation = tokens * f * ((3 + 5) if model.gated else (2 + 3))
    layer = products + norms * tokens * h + rotated + attention + activation
    head = 3 * (h * v + tokens * (h + v)) + 2 * tokens * v
    embedding = 2 * tokens * h + tokens * h + h * v
    parameters = GPT(model, Mesh.single("meta")).num_parameters()
    return 2 * (model.num_layers * layer + head + embedding) + adam * parameters


def devices_of(case: Case, account: Account) -> list[dict[str, float | str]]:
    """Milliseconds of a step on each device: the roofline of the account, and the estimate of `neox plan`."""
    config = config_of(case)
    return [
        {
            "device": device.name,
            "roofline_ms": 1e3 * account.roofline(device.flops, device.bandwidth),
            "plan_ms": 1e3 * estimate(config, 1, device).time.total,
        }
        for device in DEVICES
    ]


def row_of(case: Case, name: str) -> dict:
    """The account of one implementation as a JSON object."""
    account, floor = account_of(name, case), floor_bytes(case, ADAM_FP32 if name == ENGINE else ADAM)
    return {
        "preset": case.preset.removesuffix(".yml"),
        "batch": case.batch,
        "seq": case.seq,
        "contestant": name,
        "parameters": GPT(load_config(case.preset).model, Mesh.single("meta")).num_parameters(),
        "launches": account.total("launches"),
        "gigabytes": account.total("moved") / 1e9,
        "over_floor": account.total("moved") / floor,
        "teraflop": account.total("flops") / 1e12,
        "peak_gigabytes": account.memory.peak / 1e9,
        "by_phase": {
            phase: [account.total("launches", phase), account.total("moved", phase) / 1e9] for phase in PHASES
        },
        "largest": [
            {"phase": phase, "operator": operator, "launches": cost.launches, "gigabytes": cost.moved / 1e9}
            for phase, operator, cost in account.largest(25)
        ],
        "devices": devices_of(case, account) if name == ENGINE else [],
    }


def print_row(row: dict) -> None:
    """Print one implementation; for the engine also its part around the model, and the step's time on each device."""
    print(
        f"{row['preset']:12} {row['batch']:>2}x{row['seq']:<5} {row['contestant']:20} {row['launches']:6.0f} launches "
        f"{row['gigabytes']:8.1f} GB ({row['over_floor']:.2f} of the floor) {row['teraflop']:7.1f} TFLOP "
        f"{row['peak_gigabytes']:6.1f} GB at the peak",
        file=sys.stderr,
        flush=True,
    )
    launches, gigabytes = row["by_phase"]["engine"]
    if launches:
        print(f"{'':12} around the model: {launches} launches, {gigabytes:.1f} GB", file=sys.stderr)
    for device in row["devices"]:
        print(
            f"{'':12} {device['device']:15} roofline {device['roofline_ms']:8.1f} ms, plan {device['plan_ms']:8.1f} ms",
            file=sys.stderr,
            flush=True,
        )


def main() -> int:
    """Parse the command line and print the accounts."""
    args = new_parser(__doc__, "Pythia-160M only").parse_args()
    done = []
    for case in CASES[: 1 if args.quick else None]:
        for name in (*NEOX, ENGINE, *PEERS):
            done.append(row_of(case, name))
            print_row(done[-1])
    if args.json:
        print(json.dumps(done, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
