"""A model's parameters under DeepSpeed: what a ZeRO stage makes of the model that the engine trains."""

from __future__ import annotations

from typing import NamedTuple

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from neox.config.schema import Config
from neox.config.validate import batch_sizes
from neox.engine.deepspeed_setup import init_deepspeed
from neox.engine.drift import Named
from neox.engine.footprint import optimizer_state_keys
from neox.engine.objective import LossModule, Objective
from neox.engine.optimizer import build_optimizer
from neox.engine.optimizer_state import OptimizerState, zero_wrapper
from neox.model.adapters import is_trained
from neox.model.gpt import GPT
from neox.parallel.mesh import Mesh


class Sharded(NamedTuple):
    """A model under a ZeRO stage.

    Attributes:
        trained: name, parameter and layout of the parameters that are not frozen.
        deepspeed: the module to call: the sum of the losses of a micro-batch.
        state: the fp32 weights and optimizer state of this process.
    """

    trained: Named
    deepspeed: DeepSpeedEngine
    state: OptimizerState


def shard_model(config: Config, mesh: Mesh, model: GPT, objective: Objective) -> Sharded:
    """Shard a model, its gradients and its optimizer as `zero.stage` asks. Every process calls it.

    Args:
        config: the run.
        mesh: the layout of processes.
        model: fp32 parameters on mesh.device; their storage and dtype change.
        objective: of the run.
    """
    # before DeepSpeed, whose stage 3 empties the parameters
    specs, shapes = model.shard_specs(), model.logical_shapes()
    kinds = {
        name: optimizer_state_keys(config.optimizer, name, len(shape)) if is_trained(config.model, name) else ()
        for name, shape in shapes.items()
    }
    parameters = [(name, p, specs[name]) for name, p in model.named_parameters()]
    trained = [row for row in parameters if row[1].requires_grad]
    for _, p, spec in trained:
        # DeepSpeed's norm counts others on one member of the tensor group only
        vars(p)["tensor_model_parallel"] = spec.dim is not None and mesh.tp > 1
    optimizer = build_optimizer([(name, p) for name, p, _ in trained], config.optimizer)
    rounded = config.precision.dtype != "fp32"
    initial = copy_to_host(trained) if rounded else {}
    deepspeed = init_deepspeed(
        config, LossModule(model, objective), optimizer, batch_sizes(config, mesh.world_size), mesh
    )
    replica = (mesh.replica_rank, mesh.replicas)
    state = OptimizerState(parameters, zero_wrapper(deepspeed), optimizer, kinds, shapes, replica)
    if rounded:
        # DeepSpeed made its master weights from weights that were already rounded
        state.write_weights(initial)
    return Sharded(trained, deepspeed, state)


def copy_to_host(trained: Named) -> dict[str, torch.Tensor]:
    """Copies in host memory, by name.

    On a GPU a second set of fp32 weights besides DeepSpeed's would be the peak of the start.
    """
    return {name: p.detach().to("cpu", copy=True) for name, p, _ in trained}
