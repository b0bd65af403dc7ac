"""The steps of the two calls of benchmarks/gpu.sh, and their limits in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"a": 240, "b": 300}  # seconds of each call
MAX_FILES = 8  # files that a call may leave: one per step, report.txt and log.txt
BUILD_LIMIT = 200  # seconds to build libraries that do not load, at the expense of the later steps

# Modules that steps import.
KERNELS = ("numpy",)
TESTS = (*KERNELS, "pytest")
MODEL = ("numpy", "orjson", "pydantic", "safetensors", "tokenizers", "yaml")
TRAINING = (*MODEL, "deepspeed", "hjson", "jinja2", "psutil", "rich", "zstandard")

Command = list[str]


@dataclass(frozen=True)
class Step:
    """One step of a call.

    Attributes:
        name: of its JSON file.
        limit: seconds for all of its commands. Time that earlier steps leave of their limits is added.
        commands: device, "cuda" or "cpu" -> its commands.
        needs: modules that it imports; if one is missing, the step is skipped.
        parallel: number of commands that run at the same time; 1 where time is measured.
        environment: variables of its processes.
    """

    name: str
    limit: int
    commands: Callable[[str], list[Command]]
    needs: tuple[str, ...] = ()
    parallel: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def script(name: str, *arguments: str) -> Command:
    """A program of the repository, run by this Python."""
    return [sys.executable, str(ROOT / "benchmarks" / name), *arguments]


def operators() -> list[str]:
    """Operators that have CUDA kernels. The slowest come first, so that none of them runs alone at the end."""
    folders = (ROOT / "csrc" / "ops").iterdir()
    names = sorted(folder.name for folder in folders if any(folder.rglob("*_cuda.cu")))
    return sorted(names, key=lambda name: name not in ("attention", "norm"))


def load(device: str) -> list[Command]:
    """Install packages and libraries that the machine lacks from the bundle, then record versions."""
    return [script("gpu/bundle.py", "install", "--device", device), script("gpu/load.py", "--device", device)]


def build() -> list[Command]:
    """Build the libraries from source, then record versions."""
    return [script("gpu/bundle.py", "build"), script("gpu/load.py", "--device", "cuda")]


def kernels(device: str) -> list[Command]:
    """Launch every kernel once. Each operator has a separate process, which a kernel that fails can end."""
    return [script("gpu/kernels.py", name, "--device", device) for name in operators()]


def sanitizer(device: str) -> list[Command]:
    """Run attention under two tools of compute-sanitizer."""
    return [script("gpu/sanitize.py", tool, "--device", device) for tool in ("memcheck", "racecheck")]


def tests(device: str) -> list[Command]:
    """Run the operators' tests; on the CPU, where `make test` runs all of them, those of one operator."""
    cases = "--ignore=tests/ops/test_kernel_cases.py"  # the step `kernels` runs these
    chosen = ("tests/ops", cases) if device == "cuda" else ("tests/ops/test_bias_gelu.py",)
    return [script("gpu/run_tests.py", "--device", device, *chosen, "-m", "not fuzz and not sweep")]


def sweep(device: str) -> list[Command]:
    """Test attention at two lengths with every mask and head_dim; on the CPU at one length and head_dim."""
    chosen = "test_every_mask and ([17- or [129-)" if device == "cuda" else "test_every_mask and [17- and -32-"
    return [
        script("gpu/run_tests.py", "--device", device, "tests/ops/test_attention_sweep.py", "-m", "sweep", "-k", chosen)
    ]


def attention(device: str) -> list[Command]:
    """Compare attention with sdpa's flash and cuDNN backends."""
    quick = () if device == "cuda" else ("--quick",)
    return [script("ops/bench_attention.py", "--device", device, *quick)]


def memory(device: str) -> list[Command]:
    """Compare the other operators with the bandwidth of a copy. --quick omits torch.compile."""
    names = [name for name in operators() if name != "attention"]
    return [script(f"ops/bench_{name}.py", "--device", device, "--quick") for name in names]


def model(device: str) -> list[Command]:
    """Compare a training step of Pythia-160M with transformers."""
    return [script("train/bench_gpu.py", "--device", device, "--quick")]


def training(device: str) -> list[Command]:
    """Train 20 steps, repeat them with a kill and a resume, and generate."""
    return [script("gpu/train_and_resume.py", "--device", device)]


def profile(device: str) -> list[Command]:
    """Profile the kernels of a training step."""
    return [script("gpu/profile_step.py", "--device", device)]


CALLS = {
    "a": (
        Step("load", 45, load),
        Step("kernels", 60, kernels, KERNELS, parallel=4, environment={"CUDA_LAUNCH_BLOCKING": "1"}),
        Step("sanitizer", 40, sanitizer, KERNELS, parallel=2),
        Step("tests", 70, tests, TESTS),
        Step("sweep", 25, sweep, TESTS),
    ),
    "b": (
        Step("load", 20, load),
        Step("attention", 60, attention),
        Step("memory", 70, memory),
        Step("model", 50, model, (*MODEL, "transformers")),
        Step("training", 75, training, TRAINING),
        Step("profile", 25, profile, MODEL),
    ),
}
