"""A small GPT trained on the emulated CUDA kernels has the losses of the CPU kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neox.config.schema import ModelConfig
from neox.model.gpt import GPT
from neox.ops import ISA
from neox.parallel.mesh import Mesh

STEPS, BOUND = 10, 1e-5  # largest relative difference of a loss; both sum in fp32, in different orders


def train() -> list[float]:
    """Train on the library of this process; returns the losses."""
    # the CUDA kernels of attention support 16-bit types only
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 32}
    form = {"vocab_size": 96, "rotary_pct": 0.25, "parallel_residual": True, "attention_backend": "sdpa"}
    model = GPT(ModelConfig(**sizes, **form), Mesh.single(), dtype=torch.float32, seed=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    tokens = torch.randint(96, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(STEPS):
        loss = model(tokens[:, :-1], tokens[:, 1:], expected_dloss=1 / 64).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


TRAIN = """
import json, sys, torch
torch.ops.load_library(sys.argv[1])
from tests.cuda import test_training
print(json.dumps([test_training.ISA, test_training.train()]))
"""


def train_with(library: Path, repository: Path) -> tuple[str, list[float]]:
    """The name of a library and its losses, from a separate process, because schemas can be defined once only."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(library)], capture_output=True, text=True, timeout=300, cwd=repository
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name, losses = json.loads(done.stdout.splitlines()[-1])
    return name, losses


def test_emulated_kernels_give_the_losses_of_the_cpu_kernels(repository):
    library = repository / "build" / "native" / "tests" / "emu" / "neox_emulated.so"
    if not library.exists():
        pytest.skip(f"needs {library}: make emulated-test builds it")
    assert ISA != "loaded by the process"
    want = train()
    name, got = train_with(library, repository)
    assert name == "loaded by the process"
    assert got[-1] < 0.5 * got[0]  # it memorises the text
    assert [mine / other for mine, other in zip(got, want, strict=True)] == pytest.approx([1.0] * STEPS, rel=BOUND)
