"""A small GPT trained on the emulated CUDA kernels has the losses of the CPU kernels."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

STEPS, BOUND = 20, 1e-5  # largest relative difference of a loss; both sum in fp32, in different orders

TRAIN = f"""
import json, sys, torch
if len(sys.argv) > 1:
    torch.ops.load_library(sys.argv[1])
from neox.config.schema import ModelConfig
from neox.model.gpt import GPT
from neox.ops import ISA
from neox.parallel.mesh import Mesh
# the CUDA kernels of attention support 16-bit types only
sizes = dict(num_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=32, vocab_size=96)
config = ModelConfig(**sizes, rotary_pct=0.25, parallel_residual=True, attention_backend="sdpa")
model = GPT(config, Mesh.single(), dtype=torch.float32, seed=1).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
tokens = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(0))
losses = []
for _ in range({STEPS}):
    loss = model(tokens[:, :-1], tokens[:, 1:], expected_dloss=1 / 64).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(json.dumps([ISA, losses]))
"""


def train(repository, *library: str) -> tuple[str, list[float]]:
    """Returns the name of the loaded library and its losses, from a separate process, because schemas can be defined
    once only.
    """
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, *library], capture_output=True, text=True, timeout=300, cwd=repository
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name, losses = json.loads(done.stdout.splitlines()[-1])
    return name, losses


def test_emulated_kernels_give_the_losses_of_the_cpu_kernels(repository):
    library = repository / "build" / "native" / "tests" / "emu" / "neox_emulated.so"
    if not library.exists():
        pytest.skip(f"needs {library}: make emulated-test builds it")
    _, want = train(repository)
    name, got = train(repository, str(library))
    assert name == "loaded by the process"
    assert got[-1] < 0.5 * got[0]  # it memorises the text
    assert [mine / other for mine, other in zip(got, want, strict=True)] == pytest.approx([1.0] * STEPS, rel=BOUND)
