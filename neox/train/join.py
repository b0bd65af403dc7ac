"""Joining the other processes of a launch. No DeepSpeed here: commands that print JSON join too, and DeepSpeed writes to the output at its import."""

from __future__ import annotations

import atexit

import torch
import torch.distributed as dist

from neox.config.schema import ParallelConfig
from neox.errors import EnvironmentProblem
from neox.parallel.mesh import Mesh, create_mesh
from neox.train.place import Place


def join(layout: ParallelConfig, place: Place, device: str) -> Mesh:
    """Join the process group that the launcher's variables name, and arrange the processes."""
    here = torch.device(device, place.local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(here)
    if place.world_size > 1:
        backend, bound = ("nccl", here) if device == "cuda" else ("gloo", None)
        store = dist.PrefixStore("neox-join", register(place))
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, device_id=bound)
        atexit.register(part)
    return create_mesh(layout.tensor, layout.pipeline, here, context=layout.context, sequence=layout.sequence)


def part() -> None:
    """Leave the process group while the interpreter is whole: a group that is torn down after it may end the process by std::terminate."""
    if dist.is_initialized():
        dist.destroy_process_group()


def register(place: Place) -> dist.Store:
    """The rendezvous store, with this process's rank taken in it.

    Raises:
        EnvironmentProblem: another process has this rank already.
    """
    store, _, _ = next(dist.rendezvous(f"tcp://{place.address}:{place.port}?rank={place.rank}&world_size={place.world_size}"))
    if store.add(f"neox-rank/{place.rank}", 1) > 1:
        raise EnvironmentProblem(
            "two processes have the same rank", where=place.source, got=f"rank {place.rank} twice", want=f"ranks 0 to {place.world_size - 1}, each once"
        )
    return store
