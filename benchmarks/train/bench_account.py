"""What one training step asks of a GPU, neox against transformers: kernels, bytes, FLOPs and memory at the peak.

Nothing is measured: the models run on fake CUDA tensors (tests/cuda/fake_cuda.py), and every operator is counted by the
rules of account.py, next to this file. It needs neither a GPU nor an idle machine.

The models have bf16 weights and activations, fused AdamW on the bf16 weights, and the same tokens. neox runs once with
its native attention and once with torch's flash attention (sdpa), which `auto` chooses on a GPU.

"neox engine" is a step as `neox train` runs it: the native model under the engine, with DeepSpeed's ZeRO 1, fp32 master
weights and moments, and the gradient clipped. Its phase "engine" is everything but the model: casts, accumulation,
norms, AdamW, and copies of weights. The roofline is the sum over the operators of that step of their times at the data
sheet's peak or bandwidth, whichever is longer; `neox plan` estimates the same step.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from tests.cuda import fake_device  # noqa: F401  # isort: skip  # before torch

import argparse
import contextlib
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from account import Account, largest
from torch.nn import functional
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

with contextlib.redirect_stdout(sys.stderr):  # where DeepSpeed reports the accelerator that it finds
    from engine_account import account_of_engine

from neox.config.load import load_config
from neox.config.schema import Config, ModelConfig
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh
from neox.plan.devices import DEVICES
from neox.plan.fit import estimate
from tests.cuda.fake_cuda import FakeCuda

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
OURS = ("neox native", "neox sdpa")
ENGINE = "neox engine"
PEERS = ("transformers sdpa", "transformers eager")  # by attn_implementation; no compiler in either
PHASES = ("forward", "backward", "optimizer", "engine")
# Bytes per parameter of AdamW.
ADAM = 14  # in bf16, reads weight, gradient and two moments, and writes weight and moments
ADAM_FP32 = 28  # reads a bf16 gradient, the fp32 weight and moments; writes these three, and the bf16 weight


@dataclass(frozen=True)
class Case:
    """A preset under configs/, and its batch."""

    preset: str
    batch: int
    seq: int


CASES = (Case("pythia/160M.yml", 16, 2048), Case("pythia/1-4B.yml", 8, 2048), Case("llama/3-8B.yml", 1, 8192))


def their_model(model: ModelConfig, attention: str) -> PreTrainedModel:
    """transformers' model of the same shape, on the default device."""
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    common = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.intermediate_size,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": False,
        "attn_implementation": attention,
    }
    if model.norm == "rmsnorm":
        config = LlamaConfig(num_key_value_heads=model.num_kv_heads, rope_parameters=rope, **common)
        return LlamaForCausalLM(config)
    rope["partial_rotary_factor"] = model.rotary_pct
    config = GPTNeoXConfig(use_parallel_residual=model.parallel_residual, rope_parameters=rope, **common)
    return GPTNeoXForCausalLM(config)


def contestant(name: str, model: ModelConfig) -> tuple[torch.nn.Module, Loss]:
    """A model on the fake GPU, and its mean loss of (tokens, targets)."""
    attention = name.split()[1]
    if name in OURS:
        config = model.model_copy(update={"attention_backend": attention})
        with mock.patch.object(GPT, "initialize", lambda self: None):
            ours = GPT(config, Mesh.single("cuda"), dtype=torch.bfloat16).train()
        return ours, lambda tokens, targets: ours(tokens, targets, expected_dloss=1 / targets.numel()).mean()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            theirs = their_model(model, attention).train()
    finally:
        torch.set_default_dtype(torch.float32)

    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(theirs(input_ids=tokens).logits.float().flatten(0, 1), targets.flatten())

    return theirs, loss


def config_of(case: Case) -> Config:
    """The run of `neox train`."""
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
    """The account of the second step of a contestant: the first one allocates the state of the optimizer."""
    if name == ENGINE:
        return account_of_engine(config_of(case))
    # transformers builds masks in full if it finds that it is traced, as on fake tensors
    traced = mock.patch("transformers.masking_utils.is_tracing", lambda *_: False)
    # read: transformers asks whether all positions of a sample belong to one document
    with FakeCuda(read=lambda _: 1), Account() as account, traced:
        model, mean_loss = contestant(name, load_config(case.preset).model)
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

    What is left of these: embedding; per layer a norm per branch (both at once in a parallel block), rotation in place,
    attention, activation; logits read and written once; AdamW, `adam` bytes per parameter.
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
    """Roofline of the account, and the time that `neox plan` estimates, of each device, in milliseconds."""
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
    """The account of a contestant as one object."""
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
            for phase, operator, cost in largest(account, 25)
        ],
        "devices": devices_of(case, account) if name == ENGINE else [],
    }


def show(row: dict) -> None:
    """Print one contestant; for neox engine also what runs around the model, and the step's time on each device."""
    print(
        f"{row['preset']:12} {row['batch']:>2}x{row['seq']:<5} {row['contestant']:20} {row['launches']:6.0f} launches "
        f"{row['gigabytes']:8.1f} GB ({row['over_floor']:.2f} of the floor) {row['teraflop']:7.1f} TFLOP "
        f"{row['peak_gigabytes']:6.1f} GB at the peak",
        file=sys.stderr,
        flush=True,
    )
    launches, gigabytes = row["by_phase"]["engine"]
    if launches:
        print(f"{'':12} of these around the model: {launches} launches, {gigabytes:.1f} GB", file=sys.stderr)
    for device in row["devices"]:
        print(
            f"{'':12} {device['device']:15} roofline {device['roofline_ms']:8.1f} ms, plan {device['plan_ms']:8.1f} ms",
            file=sys.stderr,
            flush=True,
        )


def main() -> int:
    """Read the command line, print the accounts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--quick", action="store_true", help="Pythia-160M alone")
    args = parser.parse_args()
    done = []
    for case in CASES[: 1 if args.quick else None]:
        for name in (*OURS, ENGINE, *PEERS):
            done.append(row_of(case, name))
            show(done[-1])
    if args.json:
        print(json.dumps(done, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
