"""Random streams: seeds derived by name, and dropout that is equal or different over the tensor group.

Dropout on replicated tensors must be equal on every process of the tensor group. Dropout inside a tensor-parallel
region (attention heads), or on a residual stream that is cut along the sequence, must differ. The first is drawn from
torch's default generator, which has the same seed over the group; the second from `tensor_parallel_stream`. That stream
has no
state: a checkpoint of the default generator restores both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from neox.parallel.mesh import Mesh


def derive_seed(seed: int, *path: object) -> int:
    """A 63-bit seed: a pure function (SHA-256) of a seed and a path of names or numbers."""
    text = "/".join([str(seed), *(str(part) for part in path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_default_generators(seed: int, mesh: Mesh) -> None:
    """Seed torch's default generators: equally over the tensor group, differently over the other axes."""
    context = (mesh.cp_rank,) if mesh.cp > 1 else ()
    torch.manual_seed(derive_seed(seed, "dropout", mesh.pp_rank, mesh.dp_rank, *context))


def tensor_parallel_stream(mesh: Mesh, device: torch.device, differs: bool = True) -> AbstractContextManager[None]:
    """A context in which random numbers differ over the tensor group; without tensor parallelism nothing changes.

    The default generator advances by one draw on every process, whatever is drawn inside.

    Args:
        mesh: gives the tensor-parallel rank.
        device: the GPU whose generator is forked too, or the CPU.
        differs: False where nothing is drawn inside, or every process must draw the same. Then no generator is touched:
            saving and restoring the states costs more than a small operator.
    """
    return _forked(mesh.tp_rank, device) if differs and mesh.tp > 1 else nullcontext()


@contextmanager
def _forked(tp_rank: int, device: torch.device) -> Iterator[None]:
    drawn = int(torch.randint(2**62, (1,)))  # from the CPU generator: no synchronisation with a GPU
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    torch.manual_seed(derive_seed(drawn, "tensor", tp_rank))
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
