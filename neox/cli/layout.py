"""Options for commands that load a model on several processes, for models that do not fit on one device."""

from __future__ import annotations

import argparse
import os

import torch

from neox.config.schema import ModelConfig, ParallelConfig
from neox.errors import ConfigError
from neox.parallel.mesh import Mesh
from neox.printing import counted
from neox.runtime.distributed import init_distributed
from neox.runtime.launch import read_launch_info


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --tensor and --pipeline."""
    parser.add_argument(
        "--tensor", type=int, default=1, help="processes that share each layer; start them with torchrun (default 1)"
    )
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages (default 1)")


def join_layout(args: argparse.Namespace, model: ModelConfig) -> Mesh:
    """Create the mesh from the options and the variables of the launcher; without a launcher, of one process.

    Raises:
        ConfigError: the sizes do not match the processes or the model. It is raised before any process group exists.
    """
    launch = read_launch_info(os.environ)
    tensor, pipeline = args.tensor, args.pipeline
    if min(tensor, pipeline) < 1 or tensor * pipeline != launch.world_size:
        raise ConfigError(
            "layout does not match the number of processes",
            where="--tensor, --pipeline",
            got=f"{tensor} x {pipeline} with {counted(launch.world_size, 'process')}",
            want="tensor x pipeline = number of processes",
            do=f"torchrun --nproc-per-node {max(tensor * pipeline, 1)} -m neox.cli.main ...",
        )
    for name in model.undivided(tensor):
        got = f"{tensor}, {getattr(model, name)}"
        raise ConfigError(
            "tensor parallelism does not divide the model", where=f"--tensor, model.{name}", got=got, want="a multiple"
        )
    if pipeline > model.num_layers:
        raise ConfigError(
            "more pipeline stages than layers",
            where="--pipeline, model.num_layers",
            got=f"{pipeline}, {model.num_layers}",
            want="at most num_layers",
        )
    device = torch.device(args.device)
    if launch.world_size == 1:
        return Mesh.single(device)
    return init_distributed(ParallelConfig(tensor=tensor, pipeline=pipeline), launch, device.type)
