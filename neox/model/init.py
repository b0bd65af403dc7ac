"""Initial weights: a pure function of the seed and the parameter's name.

Each complete logical tensor is drawn from its own generator and then sliced, so that values depend neither on the
layout over processes, nor on other parameters, nor on the order of construction.
"""

from __future__ import annotations

import math

import torch

from neox.config.schema import ModelConfig
from neox.parallel.rng import derive_seed
from neox.parallel.shard_spec import ShardSpec

RESIDUAL_OUTPUTS = ("out.weight", "down.weight")  # of attention and MLP


def standard_deviation(config: ModelConfig, name: str) -> float:
    """Standard deviation of a weight matrix by its parameter name.

    normal: init_std. scaled_normal: init_std / sqrt(2 num_layers) (GPT-2). small_init: sqrt(2 / 5h) (arXiv:1910.05895).
    wang_init: 2 / (num_layers sqrt(h)) (GPT-J). Projections into the residual stream use config.output_init.
    """
    method = config.output_init if name.endswith(RESIDUAL_OUTPUTS) else config.init
    if method == "normal":
        return config.init_std
    if method == "scaled_normal":
        return config.init_std / math.sqrt(2.0 * config.num_layers)
    if method == "small_init":
        return math.sqrt(2.0 / (5.0 * config.hidden_size))
    return 2.0 / (config.num_layers * math.sqrt(config.hidden_size))


def initial_value(config: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """The logical initial tensor, fp32 on the CPU.

    Biases and the B of adapters are 0, norm weights 1, matrices normal with mean 0.

    Args:
        config: gives the methods and sizes.
        name: parameter name, such as layers.0.mlp.up.weight; of a layer alone its last part, such as bias.
        shape: logical shape.
        seed: train.seed.
    """
    kind = name.rpartition(".")[2]
    if kind in ("bias", "lora_b"):  # with B = 0 an adapter changes nothing at first
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    generator = torch.Generator().manual_seed(derive_seed(seed, "init", name))
    deviation = 1.0 / math.sqrt(shape[-1]) if kind == "lora_a" else standard_deviation(config, name)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator)


@torch.no_grad()
def fill(parameter: torch.Tensor, spec: ShardSpec, logical: torch.Tensor) -> None:
    """Copy this process's slice of a logical tensor into a parameter; padding rows become zero."""
    real = spec.unpad(parameter)
    real.copy_(spec.take(logical))
    parameter[real.shape[0] :] = 0
