"""The steps of the two calls of benchmarks/gpu.sh, with their limits in seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"a": 240, "b": 300}  # seconds of each call
MAX_FILES = 8  # that a call may leave: one per step, report.txt and log.txt
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
        limit: seconds for all of its commands. It may also use what the steps before it leave of theirs.
        commands: device, "cuda" or "cpu" -> its commands.
        needs: modules that it imports; if one is missing, the step is left out.
        parallel: commands that run at a time; 1 where time is measured.
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
    """Operators that have CUDA kernels. Those that take longest come first, so that none runs alone at the end."""
    folders = (ROOT / "csrc" / "ops").iterdir()
    names = sorted(folder.name for folder in folders if any(folder.rglob("*_cuda.cu")))
    return sorted(names, key=lambda name: name not in ("attention", "norm"))


def load(device: str) -> list[Command]:
    """Packages and libraries of the bundle where the machine lacks them, then versions."""
    return [script("gpu/bundle.py", "install", "--device", device), script("gpu/load.py", "--device", device)]


def build() -> list[Command]:
    """The libraries from source, then versions."""
    return [script("gpu/bundle.py", "build"), script("gpu/load.py", "--device", "cuda")]


def kernels(device: str) -> list[Command]:
    """Every kernel once, each operator in a process of its own: a kernel that fails takes its process along."""
    return [script("gpu/kernels.py", name, "--device", device) for name in operators()]


def sanitizer(device: str) -> list[Command]:
    """Attention under both tools."""
    return [script("gpu/sanitize.py", tool, "--device", device) for tool in ("memcheck", "racecheck")]


def tests(device: str) -> list[Command]:
    """The operators' tests; on the CPU, where `make test` runs them, those of one operator."""
    cases = "--ignore=tests/ops/test_kernel_cases.py"  # those of the step `kernels`
    chosen = ("tests/ops", cases) if device == "cuda" else ("tests/ops/test_bias_gelu.py",)
    return [script("gpu/run_tests.py", "--device", device, *chosen, "-m", "not fuzz and not sweep")]


def sweep(device: str) -> list[Command]:
    """Attention at two lengths, with every mask and head_dim; on the CPU at one length with one head_dim."""
    chosen = "test_every_mask and ([17- or [129-)" if device == "cuda" else "test_every_mask and [17- and -32-"
    return [
        script("gpu/run_tests.py", "--device", device, "tests/ops/test_attention_sweep.py", "-m", "sweep", "-k", chosen)
    ]


def attention(device: str) -> list[Command]:
    """Against sdpa's flash and cuDNN backends."""
    quick = () if device == "cuda" else ("--quick",)
    return [script("ops/bench_attention.py", "--device", device, *quick)]


def memory(device: str) -> list[Command]:
    """The other operators, against the bandwidth of a copy. --quick leaves out torch.compile."""
    names = [name for name in operators() if name != "attention"]
    return [script(f"ops/bench_{name}.py", "--device", device, "--quick") for name in names]


def model(device: str) -> list[Command]:
    """A step of Pythia-160M against transformers'."""
    return [script("train/bench_gpu.py", "--device", device, "--quick")]


def training(device: str) -> list[Command]:
    """20 steps, again with a kill and a resume, and generation."""
    return [script("gpu/train_and_resume.py", "--device", device)]


def profile(device: str) -> list[Command]:
    """The kernels of a step, by time."""
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
