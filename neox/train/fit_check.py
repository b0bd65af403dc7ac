"""Checks before the first step that a run fits into the memory of its hosts, and explains an allocation that failed.

On a CPU the plan (neox.plan) is within a tenth of what training allocates. A run that needs clearly more than is
available would be killed by the kernel, so it is refused. On a GPU, where the plan has not been verified by
measurement, it is a warning.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from neox.config.schema import Config
from neox.config.validate import batch_sizes
from neox.engine.footprint import effective_stage
from neox.errors import MemoryExhausted
from neox.parallel.mesh import Mesh
from neox.plan.devices import COMPILER, DEVICES, cpu, device_of_cuda_name
from neox.plan.fit import divisors, estimate
from neox.train.memory import available_bytes, in_use

CERTAIN = 1.1  # ratio of needed to available memory above which a run is refused
NEAR = 0.9  # ratio above which it is warned
GB = 1e9


@dataclass(frozen=True)
class Room:
    """Memory of the fullest host or GPU, bytes.

    Attributes:
        need: planned for the processes that share it.
        have: available to them.
        processes: number of processes that share it.
    """

    need: float
    have: float
    processes: int


def planned_bytes(config: Config, world_size: int, stage: int, kind: str) -> float:
    """Planned peak of a process of a pipeline stage, including the reserve of the device."""
    device = cpu(world_size) if kind == "cpu" else DEVICES[0]  # GPUs are planned in the same way, but for their time
    extra = COMPILER if kind == "cpu" and effective_stage(config) == 3 else 0.0
    return estimate(config, world_size, device).memories[stage].peak + device.reserve + extra


def measure_room(config: Config, mesh: Mesh) -> Room | None:
    """The fullest host or GPU of the run, the same on every process; None if the system does not report its memory.

    All processes call it.
    """
    kind = mesh.device.type
    have = torch.cuda.mem_get_info(mesh.device)[0] if kind == "cuda" else available_bytes()
    host = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).digest()
    shared = float(int.from_bytes(host, "big")) if kind == "cpu" else float(mesh.rank)  # a GPU belongs to one process
    row = torch.tensor(
        [[shared, planned_bytes(config, mesh.world_size, mesh.pp_rank, kind), float(have or 0)]],
        dtype=torch.float64,
        device=mesh.device,
    )
    rows = [row]
    if mesh.world_size > 1:
        rows = [torch.empty_like(row) for _ in range(mesh.world_size)]
        dist.all_gather(rows, row)
    found: dict[float, Room] = {}
    for place, need, free in torch.cat(rows).tolist():
        before = found.get(place, Room(0.0, free, 0))
        found[place] = Room(before.need + need, min(before.have, free), before.processes + 1)
    fullest = max(found.values(), key=lambda room: room.need / max(room.have, 1.0))
    return fullest if fullest.have else None


def largest_batch(config: Config, world_size: int, kind: str, have: float) -> dict[str, int] | None:
    """The largest micro-batch planned to stay within `have` bytes, as config keys; None if one sample does not.

    A configured global batch stays the same, by gradient accumulation.
    """
    sizes = batch_sizes(config, world_size)
    total = config.train.global_batch_size

    def with_micro(micro: int) -> Config:
        keys = {"micro_batch_size": micro, "gradient_accumulation": None if total else sizes.gradient_accumulation}
        return config.model_copy(update={"train": config.train.model_copy(update=keys)})

    def fits(micro: int) -> bool:
        needs = (planned_bytes(with_micro(micro), world_size, stage, kind) for stage in range(config.parallel.pipeline))
        return max(needs) <= have

    steps = sizes.micro_batch_size * sizes.gradient_accumulation  # samples of a process in a step
    smaller = range(1, sizes.micro_batch_size)
    choices = [n for n in divisors(steps) if n in smaller] if total else smaller
    best = last_that(fits, choices)
    if best is None:
        return None
    return {"train.micro_batch_size": best} | ({"train.gradient_accumulation": steps // best} if total else {})


def last_that(fits: Callable[[int], bool], choices: Sequence[int]) -> int | None:
    """The last of ascending choices that fits; if one fits, all before it do."""
    low, high = 0, len(choices)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(choices[middle]) else (low, middle)
    return choices[low - 1] if low else None


def advice(config: Config, mesh: Mesh, have: float) -> str:
    """What to change so that a process stays within `have` bytes."""
    smaller = largest_batch(config, mesh.world_size, mesh.device.type, have)
    others = "train.activation_checkpointing: full, a higher zero.stage or more processes (neox plan)"
    if smaller is None:
        return f"one sample does not fit either: {others}"
    return f"--set {' '.join(f'{key}={value}' for key, value in smaller.items())}, the largest that fits; or {others}"


def check_fit(config: Config, mesh: Mesh) -> str | None:
    """Check that the run fits. All processes call it.

    Returns:
        A warning if it may not fit; None if it does.

    Raises:
        MemoryExhausted: it cannot fit; the same on every process.
    """
    room = measure_room(config, mesh)
    if room is None or room.need <= NEAR * room.have:
        return None
    where = (
        f"one GPU of {torch.cuda.get_device_name(mesh.device)}"
        if mesh.device.type == "cuda"
        else f"{room.processes} process(es) on one host"
    )
    micro = batch_sizes(config, mesh.world_size).micro_batch_size
    got = f"{room.need / GB:.2f} GB planned with micro_batch_size {micro}"
    do = advice(config, mesh, NEAR * room.have / room.processes)
    if mesh.device.type == "cpu" and room.need > CERTAIN * room.have:
        raise MemoryExhausted(
            "the run does not fit into memory",
            where=where,
            got=got,
            want=f"at most the {room.have / GB:.2f} GB available",
            do=do,
        )
    return f"memory may not be enough on {where}: {got}, {room.have / GB:.2f} GB available; {do}"


def explain_exhaustion(error: BaseException, config: Config, mesh: Mesh) -> MemoryExhausted:
    """The error for a failed allocation: live and planned bytes, and what to change. Does not communicate."""
    planned = planned_bytes(config, mesh.world_size, mesh.pp_rank, mesh.device.type)
    if mesh.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(mesh.device)
        live, peak, have = (
            torch.cuda.memory_allocated(mesh.device),
            torch.cuda.max_memory_allocated(mesh.device),
            float(total),
        )
        state = (
            f"{live / GB:.2f} GB in use, {peak / GB:.2f} GB at the peak, {free / GB:.2f} of {total / GB:.2f} GB free"
        )
        device = device_of_cuda_name(torch.cuda.get_device_name(mesh.device))
        have = min(have, device.memory) if device else have
    else:
        live, have = in_use() or 0, float(available_bytes() or 0)
        state = f"{live / GB:.2f} GB in use, {have / GB:.2f} GB available"
        have += live
    within = min(NEAR * have, 0.75 * planned)  # the plan was exceeded if the run fits by it
    got = f"{state}; {planned / GB:.2f} GB planned; {str(error)[:200]}"
    return MemoryExhausted("not enough memory", where=f"rank {mesh.rank}", got=got, do=advice(config, mesh, within))
