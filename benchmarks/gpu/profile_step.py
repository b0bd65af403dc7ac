"""Profiles the kernels of a training step: Pythia-160M in bf16 on a GPU, Pythia-14M in fp32 with `--device cpu`.

Records a row per kernel, on a CPU per operator, and a row of the step with the fraction of its time that the device is
busy.
"""

from __future__ import annotations

import argparse
import sys
import time
from operator import attrgetter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record
import torch
from training_step import training_step

from neox.config.load import load_config
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh

WARM_UP, STEPS, ROWS = 3, 3, 40


def build(device: torch.device) -> tuple[GPT, torch.Tensor]:
    """The model with random weights, and tokens and targets [2, b, s]."""
    wide = device.type == "cuda"
    config = load_config("pythia/160M.yml" if wide else "pythia/14M.yml").model
    model = GPT(config, Mesh.single(device), dtype=torch.bfloat16 if wide else torch.float32).train()
    shape = (2, 16, 2048) if wide else (2, 1, 64)
    return model, torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)


def profile_steps(device: torch.device) -> tuple[torch.profiler.profile, float]:
    """Profile STEPS steps. Returns the profile and their wall seconds."""
    model, (tokens, targets) = build(device)
    step = training_step(model, lambda: model(tokens, targets, expected_dloss=1 / targets.numel()).mean())

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step()
    wait()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        seconds = time.perf_counter() - start
    return profile, seconds


def kernels_of(profile: torch.profiler.profile, device: torch.device) -> list[tuple[str, float, float]]:
    """(name, microseconds per step, launches per step) of each kernel, the slowest first."""
    on_gpu = device.type == "cuda"
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    time_of = attrgetter("self_device_time_total" if on_gpu else "self_cpu_time_total")
    events = [event for event in profile.key_averages() if event.device_type == kind]
    events.sort(key=time_of, reverse=True)
    return [(event.key[:200], time_of(event) / STEPS, event.count / STEPS) for event in events]


def main() -> int:
    """Returns the exit code: 0 if something was profiled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    device = torch.device(parser.parse_args().device)
    profile, seconds = profile_steps(device)
    kernels = kernels_of(profile, device)
    for name, microseconds, launches in kernels[:ROWS]:
        row = {"kernel": name, "us a step": microseconds, "launches a step": launches}
        record.add(row)
        print(row)
    busy = sum(microseconds for _, microseconds, _ in kernels) * STEPS / 1e6
    record.add({"step_s": seconds / STEPS, "busy": busy / seconds, "kernels": len(kernels)})
    return 0 if busy > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
