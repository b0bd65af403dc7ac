"""The mesh as the `mpu` (model parallel unit) object that DeepSpeed expects."""

from __future__ import annotations

from typing import cast

import torch.distributed as dist

from neox.parallel.mesh import Mesh


class MeshMPU:
    """A Mesh with the methods that DeepSpeed calls.

    DeepSpeed's "data parallel" processes are our replicas (dp x cp: the same parameters, other tokens), its "model
    parallel" group is our model group (pp x tp), and its "tensor model parallel" or "slice" group is our tensor group.
    DeepSpeed's sequence parallelism is not used.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        if mesh.replica_group is not None and mesh.tp_group is not None:
            self.replica_group, self.tensor_group = mesh.replica_group, mesh.tp_group
        else:
            alone = lone_group(mesh)
            self.replica_group, self.tensor_group = mesh.replica_group or alone, mesh.tp_group or alone

    def get_data_parallel_rank(self) -> int:
        """Rank among the replicas."""
        return self.mesh.replica_rank

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return self.mesh.replicas

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Group of the replicas."""
        return self.replica_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the replicas."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """Rank within the model group.

        Without pipeline stages it equals the tensor rank, on which DeepSpeed's stage 3 relies.
        """
        return self.mesh.pp_rank * self.mesh.tp + self.mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        """Number of processes that hold one complete model."""
        return self.mesh.pp * self.mesh.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """The model group; None, which means no model parallelism to DeepSpeed, if it is one process."""
        return self.mesh.model_group

    def get_tensor_model_parallel_rank(self) -> int:
        """Rank within the tensor group."""
        return self.mesh.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Size of the tensor group."""
        return self.mesh.tp

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The tensor group."""
        return self.tensor_group

    def get_pipeline_model_parallel_rank(self) -> int:
        """Rank of the pipeline stage."""
        return self.mesh.pp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of stages."""
        return self.mesh.pp


def lone_group(mesh: Mesh) -> dist.ProcessGroup:
    """A group of this process alone: DeepSpeed requires a group even for one process."""
    if mesh.world_size == 1 and dist.get_world_size() == 1:
        group = dist.group.WORLD
    else:
        group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    return cast(dist.ProcessGroup, group)  # the annotations allow for processes that are not in it
