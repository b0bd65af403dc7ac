"""A model whose parameters are shards of named logical tensors: initial values, loading, reading out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import nn

from neox.config.schema import ModelConfig
from neox.errors import CheckpointError
from neox.model.init import fill, initial_value
from neox.model.shapes import flops_per_token, logical_shapes, num_parameters
from neox.parallel.collectives import all_gather
from neox.parallel.embedding import TiedCopy
from neox.parallel.gradients import sum_partial_gradients
from neox.parallel.mesh import Mesh
from neox.parallel.shard_spec import ShardedLayer, ShardSpec

TIED = "embedding.word.weight"
Layer = TypeVar("Layer", bound=nn.Module)
Model = TypeVar("Model", bound="ShardedModel")


def shard_specs(module: nn.Module) -> dict[str, ShardSpec]:
    """Logical shape and local slice of every parameter of a layer or model, by name."""
    found = {}
    for prefix, part in module.named_modules():
        if isinstance(part, ShardedLayer):
            for name, _ in part.named_parameters(recurse=False):
                found[f"{prefix}.{name}" if prefix else name] = part.sharding[name]
    return found


@torch.no_grad()
def initialize(module: Layer, config: ModelConfig, seed: int = 1234) -> Layer:
    """Set every parameter of a layer or model to its initial value, a function of seed and name; returns the module."""
    specs = shard_specs(module)
    for name, parameter in module.named_parameters():
        fill(parameter, specs[name], initial_value(config, name, specs[name].shape, seed))
    return module


class ShardedModel(nn.Module):
    """Base of GPT: what its weights are called, where they lie, and how they get in and out.

    Attributes:
        config: the architecture.
        mesh: layout over processes.
        seed: seed of the initial weights.
        tied: copy of the word embedding on the last pipeline stage of a tied model, else None.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, seed: int):
        super().__init__()
        self.config = config
        self.mesh = mesh
        self.seed = seed
        self.tied: TiedCopy | None = None

    def shard_specs(self) -> dict[str, ShardSpec]:
        """Logical shape and local slice of every parameter that this process holds, by name."""
        return shard_specs(self)

    def logical_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shape of every parameter of the complete model, by name, on every process."""
        return logical_shapes(self.config)

    def num_parameters(self) -> int:
        """Parameters of the logical model: without vocabulary padding, tied weights once, over all processes."""
        return num_parameters(self.config)

    def flops_per_token(self, seq_length: int) -> int:
        """FLOPs per token of forward and backward of the logical model (`neox.model.shapes.flops_per_token`)."""
        return flops_per_token(self.config, seq_length)

    @torch.no_grad()
    def initialize(self) -> None:
        """Set every parameter to its initial value, which depends on the seed and its name only."""
        initialize(self, self.config, self.seed)
        if self.tied is not None:
            value = initial_value(self.config, TIED, self.tied.spec.shape, self.seed)
            fill(self.tied.weight, self.tied.spec, value)

    def sum_partial_gradients(self) -> None:
        """Register the hooks that sum gradients which each tensor-parallel process sees only in part."""
        sum_partial_gradients(self, self.shard_specs(), self.mesh)

    def materialize(self: Model, device: str | torch.device, *, initialize: bool = True) -> Model:
        """Allocate a model built on "meta" on `device`; returns self.

        Args:
            device: where the parameters go.
            initialize: set initial values; False where weights are loaded next.
        """
        self.to_empty(device=device)
        if self.tied is not None:
            self.tied.replace(torch.empty_like(self.tied.weight, device=device))
        self.mesh = replace(self.mesh, device=torch.device(device))
        if initialize:
            self.initialize()
        self.sum_partial_gradients()
        return self

    @torch.no_grad()
    def logical_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, logical tensor without padding) of every parameter of this stage.

        With tensor parallelism every process of the group must iterate, because the tensors are gathered.
        """
        specs = self.shard_specs()
        for name, parameter in self.named_parameters():
            yield name, _gather_logical(parameter.detach(), specs[name], self.mesh)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load logical tensors of the complete model by name, cast to the model's dtype; each process takes its slices.

        Raises:
            CheckpointError: a name is missing, unknown or given twice, or a shape differs. The model is then partly
                loaded.
        """
        shapes = logical_shapes(self.config)
        missing = dict(shapes)
        specs = self.shard_specs()
        held: dict[str, tuple[torch.Tensor, ShardSpec]] = {
            name: (p, specs[name]) for name, p in self.named_parameters()
        }
        if self.tied is not None:
            held[TIED] = (self.tied.weight, self.tied.spec)
        pairs = weights.items() if isinstance(weights, Mapping) else weights
        for name, tensor in cast("Iterable[tuple[str, torch.Tensor]]", pairs):
            if missing.pop(name, None) is None:
                why = "given twice" if name in shapes else "no such parameter"
                raise CheckpointError(
                    f"weight does not fit the model: {why}",
                    where=name,
                    do="check that the weights belong to this model config",
                )
            if tuple(tensor.shape) != shapes[name]:
                raise CheckpointError(
                    "weight has another shape", where=name, got=tuple(tensor.shape), want=shapes[name]
                )
            if name in held:
                parameter, spec = held[name]
                fill(parameter, spec, tensor)
        if missing:
            count = f"{len(shapes) - len(missing)} of {len(shapes)}"
            raise CheckpointError("weights are missing", where=", ".join(sorted(missing)[:4]), got=count)


def _gather_logical(parameter: torch.Tensor, spec: ShardSpec, mesh: Mesh) -> torch.Tensor:
    """The logical tensor of a parameter that may be cut along one dimension over the tensor group."""
    if mesh.tp_group is not None and spec.dim is not None:
        parameter = all_gather(parameter, spec.dim, mesh.tp_group)
    return parameter[: spec.shape[0]]
