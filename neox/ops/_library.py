"""Loads the native operators: the best of neox/_ops/*.so for this CPU, and cuda.so where there is a GPU.

Importing this module registers torch.ops.neox.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from neox.cpu import cpu_flags
from neox.errors import INSTALL, EnvironmentProblem

FOLDER = Path(__file__).parent.parent / "_ops"
LOADED = "loaded by the process"

# best first: library name -> CPU flags (as /proc/cpuinfo spells them) that its code needs
REQUIREMENTS = {
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}

# every operator that this package calls: a library that lacks one was built from older sources
OPERATORS = (
    "attention",
    "attention_backward",
    "attention_qkv",
    "attention_qkv_backward",
    "attention_shared",
    "bias_dropout_add",
    "bias_dropout_add_backward",
    "bias_gelu",
    "bias_gelu_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_backward_",
    "cross_entropy_fused_",
    "cross_entropy_rescale_",
    "cross_entropy_statistics",
    "decode_block",
    "gated",
    "gated_backward",
    "linear_bf16",
    "linear_bf16_backward",
    "linear_few_rows",
    "norm",
    "norm_backward",
    "rotary",
    "rotary_qkv_",
    "scaled_causal_softmax",
    "scaled_masked_softmax",
    "scaled_softmax_backward",
)


def choose(built: set[str], flags: set[str]) -> str:
    """The best of the built libraries whose instructions the CPU supports.

    Raises:
        EnvironmentProblem: no library was built, or the CPU supports none of them.
    """
    fit = next((isa for isa, needed in REQUIREMENTS.items() if isa in built and needed <= flags), None)
    if fit is not None:
        return fit
    if not built:
        raise EnvironmentProblem(
            "the native operators are not built",
            where=FOLDER,
            got="no library",
            want=f"one of {', '.join(REQUIREMENTS)}",
            do=INSTALL,
        )
    raise EnvironmentProblem(
        "this CPU cannot run the native operators that are built",
        where=FOLDER,
        got=f"libraries {', '.join(sorted(built))} on {platform.machine()}",
        want="a library for this CPU",
        do=f"build on this machine: {INSTALL}",
    )


def load() -> str:
    """Load the library for this CPU and return its name.

    Raises:
        EnvironmentProblem: no library fits, it does not load into this torch, or it lacks operators.
    """
    isa = choose({path.stem for path in FOLDER.glob("*.so")} & set(REQUIREMENTS), cpu_flags())
    path = FOLDER / f"{isa}.so"
    try:
        torch.ops.load_library(str(path))
    except OSError as problem:
        raise EnvironmentProblem(
            "the native operators do not load",
            where=path,
            got=str(problem),
            want="a build for torch 2.11 or later",
            do=f"rebuild: {INSTALL}",
        ) from problem
    missing = [name for name in OPERATORS if not hasattr(torch.ops.neox, name)]
    if missing:
        raise EnvironmentProblem(
            "the native operators are older than the Python sources",
            where=path,
            got=f"no {', '.join(missing)}",
            do=f"rebuild: {INSTALL}",
        )
    return isa


def load_cuda(gpu: bool) -> str:
    """Load the CUDA kernels, which register themselves with the operators that `load` defined.

    Args:
        gpu: whether torch sees a GPU.

    Returns:
        "loaded", or why there are no CUDA kernels.

    Raises:
        EnvironmentProblem: the file does not load into this torch.
    """
    path = FOLDER / "cuda.so"
    if not gpu:
        return "not loaded: torch sees no GPU"
    if not path.exists():
        return f"not built: needs nvcc and a torch with CUDA, then {INSTALL}"
    try:
        torch.ops.load_library(str(path))
    except OSError as problem:
        raise EnvironmentProblem(
            "the CUDA kernels do not load",
            where=path,
            got=str(problem),
            want="a build for torch 2.11 or later",
            do=f"rebuild: {INSTALL}",
        ) from problem
    return "loaded"


def runs_on_cuda(op: str) -> bool:
    """Whether an operator of torch.ops.neox has a kernel for CUDA tensors in this process."""
    return hasattr(torch.ops.neox, op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"neox::{op}", "CUDA")


# A library that the process has loaded before, such as the emulated CUDA kernels of the tests, is used unchanged.
ISA = LOADED if hasattr(torch.ops.neox, "bias_gelu") else load()
CUDA = load_cuda(torch.cuda.is_available())
native = torch.ops.neox
