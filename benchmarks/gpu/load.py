"""Versions of what the machine has, and which kernels each operator runs: `load.py --device cuda`.

It fails if the operators, the dataset core or, for a GPU, the CUDA kernels do not load.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
import torch

PACKAGES = ("torch", "deepspeed", "numpy", "pydantic", "orjson", "transformers", "triton", "pytest", "pytest-xdist")


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def commit() -> str:
    """The commit of the checkout; a copy without its history has none."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def machine(device: str) -> dict[str, object]:
    """What it is and what it has."""
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
        row["driver, clocks"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return row


def main() -> int:
    """Returns the exit code: 0 if everything loads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU", file=sys.stderr)
        return 1
    record.add(machine(device))
    ops = importlib.import_module("neox.ops")
    importlib.import_module("neox._native")
    for name in ops.__all__:
        if name not in ops.HELPERS:
            record.add({"operator": name, "backend": ops.backend(name)})
            print(name, "|", ops.backend(name))
    if device == "cuda" and ops.CUDA != "loaded":
        print(f"the CUDA kernels are {ops.CUDA}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
