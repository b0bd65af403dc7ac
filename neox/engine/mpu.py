"""The mesh in the words DeepSpeed uses: what it calls `mpu`."""

from __future__ import annotations

import torch.distributed as dist

from neox.parallel.mesh import Mesh


class MeshMPU:
    """Answers DeepSpeed's questions about the layout from a Mesh.

    DeepSpeed's "data parallel" are our replicas (dp x cp: the same parameters, other tokens), its "model parallel" is our model
    group (pp x tp), its "tensor model parallel" or "slice" is our tensor group. Sequence parallelism of its own is not used.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.alone = None if mesh.replica_group is not None and mesh.tp_group is not None else lone_group(mesh)

    def get_data_parallel_rank(self) -> int:
        """Number among the replicas."""
        return self.mesh.replica_rank

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return self.mesh.replicas

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Replicas."""
        return self.mesh.replica_group or self.alone

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the replicas."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """Number within the model group; equals the tensor rank without stages, on which DeepSpeed's stage 3 relies."""
        return self.mesh.pp_rank * self.mesh.tp + self.mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Processes that hold one whole model."""
        return self.mesh.pp * self.mesh.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The model group; None, which DeepSpeed takes for no model parallelism, where it is one process."""
        return self.mesh.model_group

    def get_tensor_model_parallel_rank(self) -> int:
        """Number within the tensor group."""
        return self.mesh.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor group."""
        return self.mesh.tp

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Tensor group."""
        return self.mesh.tp_group or self.alone

    def get_pipeline_model_parallel_rank(self) -> int:
        """Number of the stage."""
        return self.mesh.pp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of stages."""
        return self.mesh.pp


def lone_group(mesh: Mesh) -> dist.ProcessGroup:
    """A group of this process alone, for DeepSpeed, which wants a group also where there is nobody to talk to."""
    if mesh.world_size == 1 and dist.get_world_size() == 1:
        return dist.group.WORLD
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
