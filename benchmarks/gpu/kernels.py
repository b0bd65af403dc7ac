"""Launches every CUDA kernel of an operator at a tiny shape and compares it with fp64: `kernels.py norm --device cuda`.

Records a row for each case that fails, and a row for the operator with the kernels that were not launched.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
import torch
from gpu.bundle import BUNDLE


def canonical(name: str) -> str:
    """A kernel's name without what demanglers print differently: parameters, and types of template arguments."""
    for word in ("void ", "(int)", "(bool)", "neox::", "(anonymous namespace)::", " "):
        name = name.replace(word, "")
    depth, end = 0, len(name)
    for index, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = index
            break
    return name[:end]


def not_launched(operator: str, launched: Iterable[str]) -> list[str] | None:
    """Kernels of an operator that did not run. None without a bundle, which has the list of kernels."""
    path = BUNDLE / "kernels.json"
    if not path.exists():
        return None
    return sorted(set(map(canonical, json.loads(path.read_text())[operator])) - set(map(canonical, launched)))


def check(operator: str, device: str, fewer: bool) -> int:
    """Run the cases. Returns the number of those that fail, plus that of kernels that were not launched."""
    cases = importlib.import_module("gpu.cases")
    count = failed = 0
    profiler = (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
        if device == "cuda" and not fewer
        else nullcontext()
    )
    with profiler as profile:
        for case in cases.CASES[operator]():
            if fewer and not any(word in case.text for word in ("causal", "decoding")):
                continue
            count += 1
            try:
                case.check()
            except (AssertionError, RuntimeError, ValueError) as problem:
                failed += 1
                message = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
                record.add({"operator": operator, "case": case.text, "error": message})
                print(f"{operator} {case.text}: {message}", file=sys.stderr)
    row: dict[str, object] = {"operator": operator, "cases": count, "failed": failed}
    if profile is not None:
        launched = {
            event.name for event in profile.events() or () if event.device_type == torch.autograd.DeviceType.CUDA
        }
        missed = not_launched(operator, launched)
        row["kernels launched"] = len({name for name in launched if "neox" in name})
        row["not launched"] = "unknown without build/gpu-bundle" if missed is None else missed
        failed += len(missed or ())
    record.add(row)
    print(row)
    return failed


def main() -> int:
    """Returns the exit code: 0 if every case passes and, on a GPU, every kernel ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operator")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument(
        "--fewer", action="store_true", help="a part of the cases, for compute-sanitizer, which slows kernels down"
    )
    args = parser.parse_args()
    torch.set_default_device(args.device)
    return 1 if check(args.operator, args.device, args.fewer) else 0


if __name__ == "__main__":
    sys.exit(main())
