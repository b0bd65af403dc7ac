"""Initialises torch.distributed among the processes of a launch.

DeepSpeed is not imported: commands that print JSON run on several processes too, and DeepSpeed writes to stdout when it
is imported.
"""

from __future__ import annotations

import atexit

import torch
import torch.distributed as dist

from neox.config.schema import ParallelConfig
from neox.errors import EnvironmentProblem
from neox.parallel.mesh import Mesh, create_mesh
from neox.printing import counted
from neox.runtime.launch import LaunchInfo
from neox.runtime.rendezvous import Attempt, claim_rank


def init_distributed(layout: ParallelConfig, launch: LaunchInfo, device: str, *, limit: float = 0.0) -> Mesh:
    """Join the other processes of the launch, create the process group, and arrange the processes in a mesh.

    Args:
        layout: sizes of tensor, pipeline and context parallelism.
        launch: rank, size and address from the launcher.
        device: "cpu" or "cuda".
        limit: seconds to wait for the others; 0 for no limit.

    Raises:
        NeoxError: as `claim_rank`.
    """
    attempt = claim_rank(launch, limit) if launch.world_size > 1 else None
    return form_process_group(layout, launch, device, attempt)


def form_process_group(layout: ParallelConfig, launch: LaunchInfo, device: str, attempt: Attempt | None) -> Mesh:
    """Create the process group of an attempt, and the mesh; `attempt` is None for a single process."""
    here = local_device(launch, device)
    if device == "cuda":
        torch.cuda.set_device(here)
    if attempt is not None:
        backend, bound = ("nccl", here) if device == "cuda" else ("gloo", None)
        dist.init_process_group(
            backend, store=attempt.keys("group"), rank=launch.rank, world_size=launch.world_size, device_id=bound
        )
        atexit.register(destroy)
    return create_mesh(layout.tensor, layout.pipeline, here, context=layout.context, sequence=layout.sequence)


def local_device(launch: LaunchInfo, device: str) -> torch.device:
    """The device of this process: the GPU of its local rank, or the only visible one.

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
            got=f"local rank {launch.local_rank}, {counted(count, 'GPU')} visible",
            want="one GPU per process",
            do=f"start {counted(count, 'process')} here, or check CUDA_VISIBLE_DEVICES",
        )
    return torch.device(device, launch.local_rank if count > 1 else 0)


def destroy() -> None:
    """Destroy the process group before the interpreter shuts down: later, its destructor may call std::terminate."""
    if dist.is_initialized():
        dist.destroy_process_group()
