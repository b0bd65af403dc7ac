"""Running a command that reads a model over several processes, for models that do not fit one device."""

from __future__ import annotations

import argparse
import os

import torch

from neox.config.schema import ModelConfig, ParallelConfig
from neox.errors import ConfigError
from neox.parallel.mesh import Mesh
from neox.runtime.distributed import init_distributed
from neox.runtime.launch import read_launch_info


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --tensor and --pipeline."""
    parser.add_argument("--tensor", type=int, default=1, help="processes that share each layer; start them with torchrun (default 1)")
    parser.add_argument("--pipeline", type=int, default=1, help="stages the layers are cut into (default 1)")


def join_layout(args: argparse.Namespace, model: ModelConfig) -> Mesh:
    """The mesh that the options and the launcher's variables give; a mesh of one process where there is no launcher.

    Raises:
        ConfigError: sizes that fit neither the processes nor the model, before any process group.
    """
    launch = read_launch_info(os.environ)
    tensor, pipeline = args.tensor, args.pipeline
    if min(tensor, pipeline) < 1 or tensor * pipeline != launch.world_size:
        raise ConfigError(
            "the layout is not that of the processes",
            where="--tensor, --pipeline",
            got=f"{tensor} x {pipeline} with {launch.world_size} processes",
            want="tensor x pipeline = number of processes",
            do=f"torchrun --nproc-per-node {max(tensor * pipeline, 1)} -m neox.cli.main ...",
        )
    for name in ("num_attention_heads", "num_kv_heads", "intermediate_size"):
        if dict(model)[name] % tensor:
            raise ConfigError(
                "the tensor group does not divide the model",
                where=f"--tensor, model.{name}",
                got=f"{tensor}, {dict(model)[name]}",
                want="a multiple",
            )
    if pipeline > model.num_layers:
        raise ConfigError("more stages than layers", where="--pipeline, model.num_layers", got=f"{pipeline}, {model.num_layers}", want="at most num_layers")
    device = torch.device(args.device)
    if launch.world_size == 1:
        return Mesh.single(device)
    return init_distributed(ParallelConfig(tensor=tensor, pipeline=pipeline), launch, device.type)
