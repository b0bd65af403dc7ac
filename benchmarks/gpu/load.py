"""Records the machine's versions, and which kernels each operator runs: `load.py --device cuda`.

It fails if the operators, the dataset core or, for a GPU, the CUDA kernels do not load; the call then builds them.
If torch detects no GPU, the call ends.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
import torch
from gpu.bundle import BUNDLE

PACKAGES = ("torch", "deepspeed", "numpy", "pydantic", "orjson", "transformers", "triton", "pytest", "pytest-xdist")


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def commit() -> str:
    """The commit of the checkout, or, in a copy without git history, that of the bundle."""
    git = shutil.which("git")
    command = [git or "git", "rev-parse", "--short", "HEAD"]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() if git else ""
    about = BUNDLE / "bundle.json"
    return text or (json.loads(about.read_text())["commit"] if about.exists() else "unknown")


def machine(device: str) -> dict[str, object]:
    """Platform, versions and GPU of this machine."""
    row: dict[str, object] = {"platform": platform.platform(), "python": platform.python_version(), "commit": commit()}
    row |= {"cpus": len(os.sched_getaffinity(0)), "CUDA of torch": torch.version.cuda}
    row |= {package: version(package) for package in PACKAGES}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
        }
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
        if shutil.which(query[0]):
            row["driver, clocks"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return row


def operators(device: str) -> str:
    """Load the libraries and record which kernels each operator runs. Returns the error; empty if there is none."""
    try:
        ops = importlib.import_module("neox.ops")
        importlib.import_module("neox._native")
    except Exception as problem:  # a library that was built for another machine or torch can raise anything
        return str(problem) or type(problem).__name__
    for name in ops.__all__:
        if name not in ops.HELPERS:
            record.add({"operator": name, "backend": ops.backend(name)})
            print(name, "|", ops.backend(name))
    return f"the CUDA kernels are {ops.CUDA}" if device == "cuda" and ops.CUDA != "loaded" else ""


def main() -> int:
    """Returns the exit code: 0 if everything loads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        record.add({"then": record.STOP, "because": "torch detects no GPU", **machine("cpu")})
        print("torch detects no GPU", file=sys.stderr)
        return 1
    record.add(machine(device))
    problem = operators(device)
    if problem and device == "cuda":
        record.add({"then": record.BUILD, "because": problem})
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
