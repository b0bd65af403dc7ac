"""Joining the other processes of a launch. No DeepSpeed here: commands that print JSON join too, and DeepSpeed writes to the output at its import."""

from __future__ import annotations

import atexit

import torch
import torch.distributed as dist

from neox.config.schema import ParallelConfig
from neox.errors import EnvironmentProblem
from neox.parallel.mesh import Mesh, create_mesh
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import Attempt, claim_rank


def init_distributed(layout: ParallelConfig, launch: LaunchInfo, device: str, *, limit: float = 0.0) -> Mesh:
    """Meet the processes that the launcher's variables name, within `limit` seconds (0: no limit), form the process group, and arrange them.

    Raises: as `register`.
    """
    attempt = claim_rank(launch, limit) if launch.world_size > 1 else None
    return form_process_group(layout, launch, device, attempt)


def form_process_group(layout: ParallelConfig, launch: LaunchInfo, device: str, attempt: Attempt | None) -> Mesh:
    """Form the process group of an attempt, and arrange the processes; None for a process that is alone."""
    here = local_device(launch, device)
    if device == "cuda":
        torch.cuda.set_device(here)
    if attempt is not None:
        backend, bound = ("nccl", here) if device == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=attempt.keys("group"), rank=launch.rank, world_size=launch.world_size, device_id=bound)
        atexit.register(destroy)
    return create_mesh(layout.tensor, layout.pipeline, here, context=layout.context, sequence=layout.sequence)


def local_device(launch: LaunchInfo, device: str) -> torch.device:
    """The device of this process: the GPU of its local rank, or the only one where the launcher shows each process its own.

    Raises:
        EnvironmentProblem: there are several GPUs, but fewer than local processes.
    """
    if device != "cuda":
        return torch.device(device)
    count = torch.cuda.device_count()
    if count > 1 and launch.local_rank >= count:
        raise EnvironmentProblem(
            "more processes than GPUs on this machine",
            where=launch.source or "LOCAL_RANK",
            got=f"local rank {launch.local_rank}, {count} GPUs visible",
            want="one GPU per process",
            do=f"start {count} processes here, or check CUDA_VISIBLE_DEVICES",
        )
    return torch.device(device, launch.local_rank if count > 1 else 0)


def destroy() -> None:
    """Leave the process group while the interpreter is whole: a group that is torn down after it may end the process by std::terminate."""
    if dist.is_initialized():
        dist.destroy_process_group()
